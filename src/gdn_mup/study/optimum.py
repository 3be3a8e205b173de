"""Where a loss curve has its minimum in log₂ learning rate, how that moves with width, and what missing it costs.

All of it is read off draws of the loss curve (`loss_curve`), which know of noise, of few seeds and of what a grid
leaves open between its points: the optimum and its 95 % interval are the median and the percentiles of the draws'
minima; slope and regret are computed draw by draw.

An optimum at the edge of the grid, or next to a learning rate at which a seed diverged, is not bracketed and
has no number. Same data, same numbers: the random generator is seeded by what is estimated.

The intervals hold what they promise on curves like those of real sweeps (tests/test_coverage.py).
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy import stats
from statsmodels.regression.linear_model import WLS  # statsmodels.api takes another 0.6 seconds of every notebook
from statsmodels.tools import add_constant

from gdn_mup.errors import UserError
from gdn_mup.study import loss_curve
from gdn_mup.study.estimates import NOWHERE, TAIL, Estimate, Interval
from gdn_mup.study.loss_curve import FEWEST_POINTS, Curves, draw_curves
from gdn_mup.training.config import TrainingSettings

Array = NDArray[np.float64]

_NORMAL_95 = stats.norm.isf(TAIL)  # half width of a 95 % interval in standard deviations
_NO_CURVES = Curves(np.empty(0), np.empty((0, 0)), np.empty(0))


@dataclass(frozen=True)
class Optimum:
    """The minimum of one loss curve. When `reason` is not empty it is not bracketed and has no number.

    `grid` [learning rates] and `losses` [seeds, learning rates] are the stretch without divergence that the minimum
    lies in, `curves` the draws over it; `draws` and `loss_draws` [draws] are place and value of their minima.
    `loss` is what the curve has there, or the least mean of the grid and its standard error, if that is less: a smooth
    curve may pass above what was measured, an estimate must not.
    `diverges_above`: the learning rate that follows `grid` diverges.
    """

    log2_learning_rate: float = np.nan
    interval: Interval = NOWHERE
    loss: float = np.nan
    loss_interval: Interval = NOWHERE
    reason: str = ""
    diverges_above: bool = False
    grid: Array = field(default_factory=lambda: np.empty(0), repr=False)
    losses: Array = field(default_factory=lambda: np.empty((0, 0)), repr=False)
    curves: Curves = field(default=_NO_CURVES, repr=False)
    draws: Array = field(default_factory=lambda: np.empty(0), repr=False)
    loss_draws: Array = field(default_factory=lambda: np.empty(0), repr=False)

    @property
    def bracketed(self) -> bool:
        """Whether the optimum has a number."""
        return not self.reason


@dataclass(frozen=True)
class Slope(Estimate):
    """Change of the log₂ optimum per doubling of width, in octaves. `widths` are those with an optimum."""

    intercept: float = np.nan  # log₂ learning rate at width 1
    widths: tuple[int, ...] = ()


def find_optimum(log2_learning_rate: Array, losses: Array, random: np.random.Generator) -> Optimum:
    """The minimum of a loss curve.

    log2_learning_rate [learning rates]: ascending, evenly spaced. losses [seeds, learning rates]: NaN where a
    member diverged; a learning rate at which any seed diverged bounds the curve.
    """
    with np.errstate(invalid="ignore"):
        mean = losses.mean(axis=0)
    finite = np.isfinite(mean)
    if not finite.any():
        return Optimum(reason="every learning rate diverges")
    first, last = _block(finite, int(np.nanargmin(mean)))
    grid, mean, losses = log2_learning_rate[first : last + 1], mean[first : last + 1], losses[:, first : last + 1]
    # What lies beyond each end of the curve, for the reason when the minimum is there.
    low_edge = "the lowest of the grid" if first == 0 else "next to divergence"
    high_edge = "the highest of the grid" if last == len(finite) - 1 else "next to divergence"

    best = int(mean.argmin())
    if best in (0, len(mean) - 1):
        return Optimum(reason=f"best at {_power(grid[best])}, {low_edge if best == 0 else high_edge}")
    if len(mean) < FEWEST_POINTS:
        return Optimum(reason=f"only {len(mean)} learning rates without divergence around the best")

    drawn = draw_curves(grid, losses, random)
    draws, loss_draws = drawn.minima()
    for at_edge, edge, place in ((draws <= grid[0], low_edge, grid[0]), (draws >= grid[-1], high_edge, grid[-1])):
        if at_edge.mean() > TAIL:
            return Optimum(reason=f"noise alone could place the best at {_power(place)}, {edge}")

    estimate = float(np.median(draws))
    return Optimum(
        log2_learning_rate=estimate,
        interval=percentiles(draws),
        loss=min(drawn.middle_at(estimate), mean[best] + _error(losses[:, best])),
        loss_interval=percentiles(loss_draws + seed_noise([seed_effects(losses)], random)[0]),
        diverges_above=last < len(finite) - 1,
        grid=grid,
        losses=losses,
        curves=drawn,
        draws=draws,
        loss_draws=loss_draws,
    )


def transfer_regret(optimum: Optimum, base: Optimum) -> Estimate:
    """What it costs at a width to train with the base width's optimum: the loss there less the best, nats per token.

    Infinite if training diverges at the transferred learning rate. It cannot be negative, and is 0 when the two optima
    coincide: its interval is that of the signed square root, which passes through 0 smoothly, so that it begins at 0
    exactly when the interval of the distance between the optima contains 0.
    """
    if optimum is base:
        return Estimate(0.0, Interval(0.0, 0.0))
    if not base.bracketed:
        return Estimate(reason=f"no optimum at the base width: {base.reason}")
    if not optimum.bracketed:
        return Estimate(reason=f"no optimum at this width: {optimum.reason}")
    grid, transferred = optimum.grid, base.log2_learning_rate
    if transferred > grid[-1] and optimum.diverges_above:
        return Estimate(np.inf, Interval(np.inf, np.inf))
    if not grid[0] <= transferred <= grid[-1]:
        return Estimate(reason=f"the transferred learning rate {_power(transferred)} was not tried")
    drawn = optimum.curves
    excess = np.maximum(drawn.at(base.draws) - optimum.loss_draws, 0)
    low, high = percentiles(np.sign(base.draws - optimum.draws) * np.sqrt(excess))
    interval = Interval(0.0 if low <= 0 <= high else min(low**2, high**2), max(low**2, high**2))
    cost = drawn.middle_at(transferred) - drawn.middle_at(optimum.log2_learning_rate)
    return Estimate(max(0.0, cost), interval)


def slope_against_width(widths: Sequence[int], optima: Sequence[Optimum]) -> Slope:
    """Weighted least squares of the log₂ optimum on log₂ width.

    The interval knows how well each optimum is known, and widens where they do not lie on a line: see `fit_line`.
    """
    usable = [(width, optimum) for width, optimum in zip(widths, optima, strict=True) if optimum.bracketed]
    used = tuple(width for width, _ in usable)
    if len(usable) < 2:
        without = "; ".join(
            f"width {width}: {optimum.reason}"
            for width, optimum in zip(widths, optima, strict=True)
            if not optimum.bracketed
        )
        return Slope(widths=used, reason=f"fewer than two widths have an optimum ({without or 'one width only'})")
    line = fit_line(
        np.log2(used),
        np.array([optimum.log2_learning_rate for _, optimum in usable]),
        np.array([optimum.draws for _, optimum in usable]),
    )
    return Slope(line.slope, line.slope_interval, intercept=line.intercept, widths=used)


class Line(NamedTuple):
    """A straight line and 95 % intervals of its two numbers."""

    intercept: float
    slope: float
    intercept_interval: Interval
    slope_interval: Interval


def fit_line(x: Array, values: Array, draws: Array) -> Line:
    """Weighted least squares of `values` [points] on `x` [points], also of each draw of them, `draws` [points, draws].

    Each point counts by its own 95 % interval. Where points scatter about the line more than their intervals
    allow (χ², 5 %), the intervals are widened by the same factor.
    """
    sizes = standard_errors(draws)
    model = WLS(values, add_constant(x), weights=sizes**-2)
    fit = model.fit(cov_type="fixed scale")
    freedom = len(x) - 2
    strained = freedom > 0 and stats.chi2.sf(fit.ssr, freedom) < 0.05
    widened = float(np.sqrt(fit.ssr / freedom)) if strained else 1.0
    # The fit is linear in the values: the same coefficients give every draw's line.
    off = (model.pinv_wexog / sizes) @ (draws - values[:, None])
    intercept, slope = map(float, fit.params)
    of_intercept, of_slope = (percentiles(value + widened * each) for value, each in zip(fit.params, off, strict=True))
    return Line(intercept, slope, of_intercept, of_slope)


def standard_errors(draws: Array) -> Array:
    """Standard deviations [points] of normal distributions with the 95 % intervals of `draws` [points, draws]."""
    low, high = np.quantile(draws, [TAIL, 1 - TAIL], axis=1)
    return np.maximum((high - low) / (2 * _NORMAL_95), 1e-9)


# From datasets to estimates


def evaluation_steps(dataset: xr.Dataset, growth: str, optimizer: str) -> list[int]:
    """Updates after which the study evaluates the members of a learning-rate sweep, ascending; the first is 0."""
    study = json.loads(dataset.attrs["settings"])
    own = next(s["training"] for s in study["sweeps"] if (s["growth"], s["optimizer"]) == (growth, optimizer))
    return TrainingSettings.model_validate(study["training"] | own).evaluation_steps


def curves(
    dataset: xr.Dataset, growth: str, optimizer: str, rules: str, step: int | None = None
) -> dict[int, pd.DataFrame]:
    """Held-out losses after training, or at the evaluation after `step` updates, by width.

    Rows are seeds, columns are learning rates, NaN where diverged: in the course of training as at its end, where the
    loss is not finite or above the untrained model's. Widths, seeds and learning rates that were not run are left out.
    Empty if there was no such sweep.
    """
    if growth not in dataset.growth.values or optimizer not in dataset.optimizer.values:
        return {}
    if rules not in dataset.rules.values:
        return {}
    sweep = dataset.sel(growth=growth, optimizer=optimizer)
    evaluated = sweep.val_loss.notnull().any([name for name in sweep.val_loss.dims if name != "evaluation_step"])
    ran = sweep.diverged.sel(rules=rules).notnull()
    if not bool(ran.any()) or not bool(evaluated.any()):
        return {}
    by_step = sweep.val_loss.sel(rules=rules)
    if step is None:
        losses = by_step.sel(evaluation_step=sweep.evaluation_step.values[evaluated.values][-1])
        losses = losses.where(sweep.diverged.sel(rules=rules) == 0)
    else:
        losses = by_step.sel(evaluation_step=step)
        losses = losses.where(losses <= by_step.sel(evaluation_step=0))
    found: dict[int, pd.DataFrame] = {}
    for width in dataset.width.values:
        here = ran.sel(width=width).transpose("seed", "learning_rate").values
        seeds, rates = here.any(axis=1), here.any(axis=0)
        if here.any():
            values = losses.sel(width=width).transpose("seed", "learning_rate").values[np.ix_(seeds, rates)]
            found[int(width)] = pd.DataFrame(
                values.astype(np.float64),
                index=pd.Index(dataset.seed.values[seeds], name="seed"),
                columns=pd.Index(dataset.learning_rate.values[rates], name="learning_rate"),
            )
    return found


@dataclass(frozen=True)
class Transfer:
    """All estimates of one (growth, optimizer, rules): what a figure draws and a claim is judged on.

    `regret` is that of the base width's optimum; `seed_noise` the standard deviation over seeds of the loss at
    the best learning rate of the grid (NaN with one seed). All but the slopes by width. `slope_beyond_base` leaves the
    base width out: a trend goes on there, a step between the base width and the next does not.
    """

    growth: str
    optimizer: str
    rules: str
    base_width: int
    curves: dict[int, pd.DataFrame]
    optima: dict[int, Optimum]
    regrets: dict[int, Estimate]
    seed_noise: dict[int, float]
    slope: Slope
    slope_beyond_base: Slope

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that were run, ascending."""
        return tuple(self.curves)


def transfer(dataset: xr.Dataset, growth: str, optimizer: str, rules: str, step: int | None = None) -> Transfer | None:
    """Optima, regrets and slope of one sweep under one rule set, after training or at an evaluation, as `curves`.

    None if it was not run.
    """
    found = curves(dataset, growth, optimizer, rules, step)
    if not found:
        return None
    base_width = int(dataset.attrs["base_width"])
    # Seeded without the rule set's name: members that coincide get one and the same interval.
    optima = {
        width: _optimum(f"{growth} {optimizer} {width}", tuple(losses.columns), losses.to_numpy().tobytes())
        for width, losses in found.items()
    }
    beyond = {width: optimum for width, optimum in optima.items() if width != base_width}
    base = optima.get(base_width, Optimum(reason=f"base width {base_width} was not run"))
    return Transfer(
        growth=growth,
        optimizer=optimizer,
        rules=rules,
        base_width=base_width,
        curves=found,
        optima=optima,
        regrets={width: transfer_regret(optimum, base) for width, optimum in optima.items()},
        seed_noise={width: _seed_noise(losses) for width, losses in found.items()},
        slope=slope_against_width(list(optima), list(optima.values())),
        slope_beyond_base=slope_against_width(*zip(*beyond.items(), strict=True))
        if beyond
        else Slope(reason="not run"),
    )


@lru_cache(maxsize=256)
def _optimum(name: str, rates: tuple[float, ...], losses: bytes) -> Optimum:
    """The minimum of a loss curve, drawn with random numbers of that name; curves that coincide are looked at once.

    losses: float64 [seeds, learning rates], as bytes, since NaN is never equal to itself.
    """
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return find_optimum(np.log2(np.array(rates)), np.frombuffer(losses).reshape(-1, len(rates)), random)


def transfers(
    dataset: xr.Dataset, optimizer: str | None = None, growth: str | None = None, step: int | None = None
) -> list[Transfer]:
    """The estimates of every sweep in the dataset, or of one optimizer or growth mode, as `transfer` makes them.

    Raises UserError, naming what is missing, if there is none.
    """
    found = [
        result
        for g in dataset.growth.values
        for o in dataset.optimizer.values
        for r in dataset.rules.values
        if growth in (None, g) and optimizer in (None, o)
        if (result := transfer(dataset, str(g), str(o), str(r), step)) is not None
    ]
    if not found:
        asked = [f"optimizer `{optimizer}`"] * (optimizer is not None) + [f"growth `{growth}`"] * (growth is not None)
        raise UserError(
            f"the study has no learning-rate sweep{' with ' + ' and '.join(asked) if asked else ''}; "
            "add one under `sweeps` in the study file and run it"
        )
    return found


def best_rate(sweep: Transfer, width: int) -> float:
    """log₂ of the best learning rate of a width: its optimum, or the best of a grid that does not bracket it.

    NaN if the width was not run, or if every learning rate diverges.
    """
    if width not in sweep.curves:
        return np.nan
    optimum = sweep.optima[width]
    if optimum.bracketed:
        return optimum.log2_learning_rate
    mean = sweep.curves[width].mean(axis=0, skipna=False)
    return float(np.log2(mean.idxmin())) if mean.notna().any() else np.nan


def transferred_rate(sweep: Transfer) -> float | None:
    """The learning rate of the grid nearest the base width's best one; None if there is none."""
    best = best_rate(sweep, sweep.base_width)
    if np.isnan(best):
        return None
    rates = sweep.curves[sweep.base_width].columns.to_numpy(float)
    return float(rates[np.abs(np.log2(rates) - best).argmin()])


# Parts of the estimators


def _block(finite: NDArray[np.bool_], within: int) -> tuple[int, int]:
    """First and last index of the run of finite values around an index."""
    first = last = within
    while first > 0 and finite[first - 1]:
        first -= 1
    while last < len(finite) - 1 and finite[last + 1]:
        last += 1
    return first, last


def _error(losses: Array) -> float:
    """Standard error of the mean of losses [seeds]; 0 of one seed, whose loss is all that is known."""
    return float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else 0.0


def _seed_noise(losses: pd.DataFrame) -> float:
    mean = losses.mean(axis=0, skipna=False)
    if len(losses) < 2 or mean.isna().all():
        return float("nan")
    return float(losses[mean.idxmin()].std())


def seed_effects(losses: Array) -> Array:
    """What each seed [seeds] adds to losses [seeds, learning rates] near the best of them: median over up to five."""
    best = int(losses.mean(axis=0).argmin())
    near = losses[:, max(0, best - 2) : best + 3]
    return np.asarray(np.median(near - near.mean(axis=0), axis=1))


def seed_noise(effects: Sequence[Array], random: np.random.Generator) -> Array:
    """Draws [curves, draws] of the error that effects of few seeds leave in means over seeds.

    effects: for each curve one per seed, taken to vary as much at one curve as at another; 0 with one seed, unknown.
    """
    freedom = sum(len(each) - 1 for each in effects)
    if freedom == 0:
        return np.zeros((len(effects), loss_curve.DRAWS))
    squares = sum(float(((each - each.mean()) ** 2).sum()) for each in effects)
    size = np.sqrt(squares / random.chisquare(freedom, loss_curve.DRAWS))
    seeds = np.array([[len(each)] for each in effects])
    return np.asarray(size / np.sqrt(seeds) * random.standard_normal((len(effects), loss_curve.DRAWS)))


def best_loss_differences(optima: Sequence[Optimum], reference: Sequence[Optimum]) -> Array:
    """Draws [widths, draws] of the best loss less a reference's, both bracketed and of the same seeds.

    Seeds are paired, since the two see the same batches: what counts is the difference of each seed's effects, taken
    to vary as much at one width as at another.
    """
    pairs = list(zip(optima, reference, strict=True))
    # Draws at one width may come from the same random numbers, which would cancel: the order of one is changed.
    random = np.random.default_rng(0)
    draws = np.array([one.loss_draws - random.permutation(other.loss_draws) for one, other in pairs])
    return draws + seed_noise([seed_effects(one.losses) - seed_effects(other.losses) for one, other in pairs], random)


def percentiles(draws: Array) -> Interval:
    """The 95 % interval of draws [draws]."""
    # An order statistic, not an interpolation: draws may be infinite.
    low, high = np.quantile(draws, [TAIL, 1 - TAIL], method="closest_observation")
    return Interval(float(low), float(high))


def _power(log2: float) -> str:
    return f"2^{log2:g}" if float(log2).is_integer() else f"2^{log2:.2f}"
