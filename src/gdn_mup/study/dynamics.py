"""What training does to gates and state, by width: means over seeds with intervals, and changes since init.

The layers of a model are pooled: they share the batch but not their gates, so that their mean is one measurement of
a seed. A change is taken within each seed, against the same model at init: with few heads, half-lives and ranks start
where the seed put them.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from gdn_mup.errors import UserError
from gdn_mup.study.optimum import TAIL


class Quantity(NamedTuple):
    """A variable of a `coordinates` dataset, and which of its quantiles; the logarithm of a ratio is averaged."""

    variable: str
    quantile: float | None = None
    ratio: bool = False


HALF_LIFE = Quantity("half_life_quantile", 0.5, ratio=True)
BETA = Quantity("beta_mean")
RANK = Quantity("effective_rank", ratio=True)


def gate_dynamics(dataset: xr.Dataset) -> pd.DataFrame:
    """Gates and state over training, a row per growth, optimizer, rules, width, step, variable and quantile.

    `value`, `low`, `high`: the mean over layers and seeds and its 95 % interval over seeds (Student's; NaN with one
    seed), a geometric mean for half-lives and effective ranks. `change`, `change_low`, `change_high`: the same of the
    change since init, which is a ratio for half-lives and effective ranks and a difference for the others.
    Raises UserError if nothing was measured after init.
    """
    tables = []
    for quantity in _quantities(dataset):
        values = dataset[quantity.variable]
        if quantity.quantile is not None:
            values = values.sel(quantile=quantity.quantile, drop=True)
        pooled = (xr.ufuncs.log(values) if quantity.ratio else values).mean("layer")
        ends = zip(("value", "low", "high"), _over_seeds(pooled), strict=True)
        changes = zip(("change", "change_low", "change_high"), _over_seeds(pooled - pooled.sel(step=0)), strict=True)
        table = xr.Dataset(dict([*ends, *changes])).to_dataframe()
        table = (np.exp(table) if quantity.ratio else table).reset_index()
        tables.append(table.assign(variable=quantity.variable, quantile=quantity.quantile))
    found = pd.concat(tables, ignore_index=True).dropna(subset="value")
    if found.empty or found.step.max() == 0:
        raise UserError("the coordinate checks have no step after 0; add one to their `steps`")
    first = ["growth", "optimizer", "rules", "width", "step", "variable", "quantile"]
    return found[[*first, *(name for name in found.columns if name not in first)]]


def of(table: pd.DataFrame, quantity: Quantity) -> pd.DataFrame:
    """The table's rows of one quantity."""
    here = table[table.variable == quantity.variable]
    return here if quantity.quantile is None else here[here["quantile"] == quantity.quantile]


def _quantities(dataset: xr.Dataset) -> list[Quantity]:
    quantiles = dataset["quantile"].values.tolist()
    return [
        Quantity("alpha_mean"),
        *(Quantity("alpha_quantile", quantile) for quantile in quantiles),
        BETA,
        *(Quantity("beta_quantile", quantile) for quantile in quantiles),
        *(Quantity("half_life_quantile", quantile, ratio=True) for quantile in quantiles),
        RANK,
        Quantity("relative_rank"),
    ]


def _over_seeds(values: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """Mean over the seeds and the ends of Student's interval."""
    seeds = values.count("seed")
    error = values.std("seed", ddof=1) / np.sqrt(seeds.where(seeds > 1))
    half_width = error * stats.t.isf(TAIL, np.maximum(seeds - 1, 1))
    mean = values.mean("seed")
    return mean, mean - half_width, mean + half_width
