"""Estimates over seeds, with Student's intervals."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from gdn_mup.study.optimum import TAIL


class Estimate(NamedTuple):
    """A number and the ends of its 95 % interval; NaN ends where there is none, as with one seed."""

    value: float
    low: float
    high: float


def over_seeds(values: np.ndarray) -> Estimate:
    """The mean over seeds; NaN if there is none."""
    if len(values) == 0:
        return Estimate(np.nan, np.nan, np.nan)
    half_width = np.nan
    if len(values) > 1:
        half_width = stats.t.isf(TAIL, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(values.mean(), values.mean() - half_width, values.mean() + half_width)
