"""How sizes scale with width: exponents with intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from gdn_mup.study.optimum import TAIL

Array = NDArray[np.float64]


class Exponents(NamedTuple):
    """Width exponents and the ends of their 95 % intervals, each of the same shape."""

    value: Array
    low: Array
    high: Array


def width_exponent(widths: Sequence[int], sizes: ArrayLike) -> Exponents:
    """The power of width that a size grows with: least squares of log size on log width, seeds as blocks.

    widths [widths]; sizes [..., seeds, widths], positive, NaN where not measured. A factor that a seed has at every
    width moves no exponent. The interval is Student's, of what is left: noise and any departure from a power law, with
    (seeds × widths) − seeds − 1 degrees of freedom; NaN where that is not positive. This is statsmodels' OLS with
    a dummy variable per seed, for thousands of quantities at once.
    """
    size = np.asarray(sizes, np.float64)
    known = np.isfinite(size) & (size > 0)
    log_size = np.log(np.where(known, size, 1.0))
    log_width = np.broadcast_to(np.log(np.asarray(widths, np.float64)), size.shape)
    count = np.maximum(known.sum(axis=-1, keepdims=True), 1)

    def centred(values: Array) -> Array:
        return np.where(known, values - (values * known).sum(axis=-1, keepdims=True) / count, 0.0)

    x, y = centred(log_width), centred(log_size)
    square = (x**2).sum(axis=(-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(square > 1e-12, (x * y).sum(axis=(-2, -1)) / square, np.nan)
        residual = np.where(known, y - value[..., None, None] * x, 0.0)
        freedom = known.sum(axis=(-2, -1)) - known.any(axis=-1).sum(axis=-1) - 1
        spread = np.sqrt((residual**2).sum(axis=(-2, -1)) / freedom / square)
        half_width = np.where(freedom > 0, stats.t.isf(TAIL, np.maximum(freedom, 1)) * spread, np.nan)
    return Exponents(value, value - half_width, value + half_width)
