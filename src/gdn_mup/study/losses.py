"""Held-out losses at one learning rate: at the one that the base width hands on, and at each width's own best."""

import numpy as np
import pandas as pd
import xarray as xr

from gdn_mup.study.estimates import Estimate, over_seeds
from gdn_mup.study.optimum import Transfer, best_loss_differences, best_rate, percentiles, transfers

TRANSFERRED, OWN_BEST = "transferred", "own best"
_SAME = 1e-6  # octaves: learning rates no farther apart are one


def losses_at(curve: pd.DataFrame, log2_rate: float, mean: float = np.nan) -> pd.Series:
    """Each seed's loss at a learning rate.

    curve: rows are seeds, columns learning rates, NaN where diverged. Between learning rates, seeds follow straight
    lines, all moved alike if the mean that they should have is known. All infinite if training diverges for any seed at
    that learning rate, or at the next one of the grid on either side; all NaN beyond the ends of the grid.
    """
    grid = np.log2(curve.columns.to_numpy(np.float64))
    finite = curve.notna().all().to_numpy()
    above = int(np.searchsorted(grid, log2_rate - _SAME))
    if np.isnan(log2_rate) or above == len(grid) or log2_rate < grid[0] - _SAME:
        return pd.Series(np.nan, index=curve.index)
    below = above if grid[above] - log2_rate <= _SAME else above - 1
    if not finite[[below, above]].all():
        return pd.Series(np.inf, index=curve.index)
    share = (log2_rate - grid[below]) / (grid[above] - grid[below]) if above > below else 0.0
    losses = (1 - share) * curve.iloc[:, below] + share * curve.iloc[:, above]
    return losses if np.isnan(mean) else losses - losses.mean() + mean


def best_losses(sweep: Transfer, width: int) -> pd.Series:
    """Each seed's loss at the width's best learning rate."""
    return losses_at(sweep.curves[width], best_rate(sweep, width), sweep.optima[width].loss)


def transferred_losses(sweep: Transfer, width: int) -> pd.Series:
    """Each seed's loss at the base width's best learning rate."""
    mean = sweep.optima[width].loss + sweep.regrets[width].value
    rate = best_rate(sweep, sweep.base_width)
    return losses_at(sweep.curves[width], rate, mean if np.isfinite(mean) else np.nan)


def best_losses_less(sweep: Transfer, reference: Transfer) -> dict[int, Estimate]:
    """The best loss less the reference's, in nats per token, at each width where both have an optimum.

    Seeds are paired; widths that were not trained with the same seeds are left out, and the base width, where rule sets
    are the same model. Exactly 0 where the two are the same runs at other widths too.
    """
    widths = [
        width
        for width in sweep.widths
        if width != sweep.base_width
        if width in reference.widths and sweep.curves[width].index.equals(reference.curves[width].index)
        if sweep.optima[width].bracketed and reference.optima[width].bracketed
    ]
    if all(sweep.curves[width].equals(reference.curves[width]) for width in widths):
        return dict.fromkeys(widths, Estimate.of(0.0, 0.0, 0.0))
    pairs = [(sweep.optima[width], reference.optima[width]) for width in widths]
    draws = best_loss_differences(*zip(*pairs, strict=True))
    return {
        width: Estimate(one.loss - other.loss, percentiles(drawn))
        for width, (one, other), drawn in zip(widths, pairs, draws, strict=True)
    }


def loss_table(dataset: xr.Dataset) -> pd.DataFrame:
    """Losses of every sweep and width at the learning rate transferred from the base width and at the width's own best.

    `loss` is the mean over seeds with its 95 % interval (Student's, the learning rate taken as known), infinite where
    training diverges. `bracketed`: whether the learning rate is an optimum or only the best of the grid.
    """
    rows = []
    for sweep in transfers(dataset):
        for width in sweep.widths:
            ways = {
                TRANSFERRED: (sweep.base_width, transferred_losses(sweep, width)),
                OWN_BEST: (width, best_losses(sweep, width)),
            }
            for name, (of, at_rate) in ways.items():
                losses = at_rate.to_numpy()
                loss = over_seeds(losses) if np.isfinite(losses).all() else Estimate(losses[0])
                rows.append(
                    {
                        "growth": sweep.growth,
                        "optimizer": sweep.optimizer,
                        "rules": sweep.rules,
                        "width": width,
                        "learning_rate": name,
                        "log2_learning_rate": best_rate(sweep, of),
                        "bracketed": of in sweep.optima and sweep.optima[of].bracketed,
                        "loss": loss.value,
                        "low": loss.low,
                        "high": loss.high,
                        "seeds": len(losses),
                    }
                )
    return pd.DataFrame(rows)
