"""What a study says on the multiplier √width before the delta rule's output norm: table and verdict.

RMSNorm(c·o) with ε is RMSNorm(o) with ε / c². So a multiplier should change nothing at ε = 0, and elsewhere the
less, the larger mean(o²) is against ε.
"""

from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from gdn_mup.errors import UserError
from gdn_mup.study.estimates import Estimate, over_seeds

ROUNDING = 1e-10  # a relative change below this is none: float64 rounds at 1e-16, and a backward pass adds that up

CONDITION = ["growth", "optimizer", "rules", "init", "kernel_scale", "width", "epsilon", "step"]


def multiplier_table(dataset: xr.Dataset) -> pd.DataFrame:
    """One row per model and seed of a collected `multiplier` dataset.

    Beside the dataset's own changes: `mean_square` is the geometric mean over layers of mean(o²); `reader_change` the
    relative change of the gradient of W_o, which reads the norm's output; `largest_change` the largest of any
    parameter class or of all together. Raises UserError if nothing was run.
    """
    columns = {
        "mean_square": np.exp(np.log(dataset.mean_square).mean("layer")),
        "share_below_epsilon": dataset.share_below_epsilon.mean("layer"),
        "gradient_change": dataset.gradient_change,
        "reader_change": dataset.class_gradient_change.sel(parameter="o", drop=True),
        "largest_change": np.fmax(dataset.class_gradient_change.max("parameter"), dataset.gradient_change),
        "loss": dataset.loss,
        "loss_change": dataset.loss_change,
        "trained_loss_change": dataset.trained_loss_change,
    }
    table = xr.Dataset(columns).expand_dims([name for name in (*CONDITION, "seed") if name not in dataset.dims])
    frame = table.to_dataframe(dim_order=[*CONDITION, "seed"]).reset_index().dropna(subset="gradient_change")
    if frame.empty:
        raise UserError("the dataset has no multiplier check; add one under `multiplier_checks` and run it")
    return frame[[*CONDITION, "seed", *columns]].reset_index(drop=True)


def multiplier_verdict(
    dataset: xr.Dataset,
) -> tuple[Literal["reproduced", "not reproduced", "inconclusive"], str]:
    """Does the multiplier have no effect beyond the norm's ε? A verdict on all that a `multiplier` dataset holds.

    For one growth mode give `dataset.sel(growth=...)`. Reproduced if at ε = 0 every change of a gradient is rounding,
    and at ε > 0 the change falls as mean(o²) / ε grows: Spearman's rank correlation of the two over all models of a
    seed, whose 95 % interval over seeds lies below 0. The change is that of the gradient of W_o, which reads the norm:
    that of all gradients falls again where ε silences the mixer, and with it all that the mixer contributes.
    """
    table = multiplier_table(dataset)
    at_zero, above = table[table.epsilon == 0], table[table.epsilon > 0]
    if at_zero.empty:
        return "inconclusive", "ε = 0 was not run"
    largest = at_zero.largest_change.max()
    if not largest < ROUNDING:
        return "not reproduced", f"at ε = 0 a gradient changes by {largest:.1e} of its norm: more than rounding"
    reason = f"at ε = 0 no gradient changes by more than {largest:.1e} of its norm"
    if above.empty:
        return "inconclusive", f"{reason}; no ε > 0 was run"
    trend = _trend(above)
    least, most = above.reader_change.min(), above.reader_change.max()
    epsilons = " and ".join(f"{epsilon:.0e}" for epsilon in sorted(above.epsilon.unique()))
    reason += (
        f"; at ε = {epsilons} that of W_o changes by {least:.1e} to "
        f"{most:.1e}, with rank correlation {trend.signed()} to mean(o²) / ε"
    )
    if trend.high < 0:
        return "reproduced", f"{reason}: the effect is that of ε"
    if trend.low > 0:
        return "not reproduced", f"{reason}: the effect grows where ε weighs less"
    few = "; one seed gives no interval" if table.seed.nunique() == 1 else ""
    return "inconclusive", f"{reason}: not shown to fall{few}"


def _trend(above: pd.DataFrame) -> Estimate:
    """Rank correlation of the change with mean(o²) / ε, over seeds; its interval is Fisher's, within ±1."""
    correlations = [
        float(stats.spearmanr(seed.mean_square / seed.epsilon, seed.reader_change).statistic)
        for _, seed in above.groupby("seed")
        if len(seed) > 2 and seed.reader_change.nunique() > 1
    ]
    within = np.clip(correlations, -0.999, 0.999)  # a correlation of ±1 has no finite transform
    return Estimate.of(*np.tanh(over_seeds(np.arctanh(within)).numbers))
