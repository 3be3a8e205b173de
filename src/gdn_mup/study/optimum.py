"""Where a loss curve has its minimum in log₂ learning rate, how that moves with width, and what missing it costs.

The minimum is that of the parabola through the best learning rate of the grid and its two neighbours, on the
mean over seeds. Its 95 % interval joins two uncertainties:

noise      Seeds are paired: at one width all learning rates of a seed see the same batches. What is left after
           taking out each seed's and each learning rate's mean is the noise of a single run. With the two to
           five seeds of a study, resampling seeds has too few distinct outcomes to cover; so residual noise of
           that size is drawn anew (a parametric bootstrap with Student's t for the few degrees of freedom).
           With one seed, the third differences of the curve stand in for the noise; they overstate it.
grid       Loss curves are steeper on one side, so the parabola depends on where the grid happens to lie. How
           far the minimum moves when the parabola gives way to a cubic spline sets the size of that error.

On smooth curves the intervals hold what they promise (tests/test_optimum.py). A curve that bends sharply within an
octave of its minimum needs a grid finer than an octave: at that spacing no estimator sees the bend, and intervals
are too short.

An optimum at the edge of the grid, or next to a learning rate at which a seed diverged, is not bracketed and
has no number. Everything downstream (slope, regret) is computed from the same draws. Same data, same numbers:
the random generator is seeded by what is estimated.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from statsmodels.regression.linear_model import WLS  # statsmodels.api takes another 0.6 seconds of every notebook
from statsmodels.tools import add_constant

from gdn_mup.errors import UserError

Array = NDArray[np.float64]

DRAWS = 2000
_SPLINE_DRAWS = 200
_SPLINE_SHARE = 1.25  # the spline itself is off by some of the parabola's error; calibrated in tests/test_optimum.py
TAIL = 0.025  # probability outside a 95 % interval, on either side
_NORMAL_95 = 1.959964  # half width of a 95 % interval in standard deviations
_NEIGHBOURS = 2  # grid points on either side of the minimum that noise and spline are taken from
_FEWEST_POINTS = 4  # below this parabola and spline are the same curve and the grid's share is unknown


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


_NOWHERE = Interval(np.nan, np.nan)


@dataclass(frozen=True)
class Optimum:
    """The minimum of one loss curve. When `reason` is not empty it is not bracketed and has no number.

    `draws` [DRAWS] are log₂ learning rates distributed as the estimate's uncertainty; `noise_draws` the same
    without the grid's share; `mean_draws` [DRAWS, learning rates] the curves they are the minima of.
    `diverges_above`: the learning rate that follows `grid` diverges.
    """

    log2_learning_rate: float = np.nan
    interval: Interval = _NOWHERE
    loss: float = np.nan
    loss_interval: Interval = _NOWHERE
    reason: str = ""
    diverges_above: bool = False
    grid: Array = field(default_factory=lambda: np.empty(0), repr=False)
    mean: Array = field(default_factory=lambda: np.empty(0), repr=False)
    draws: Array = field(default_factory=lambda: np.empty(0), repr=False)
    noise_draws: Array = field(default_factory=lambda: np.empty(0), repr=False)
    mean_draws: Array = field(default_factory=lambda: np.empty((0, 0)), repr=False)

    @property
    def bracketed(self) -> bool:
        """Whether the optimum has a number."""
        return not self.reason


@dataclass(frozen=True)
class Regret:
    """Loss at the transferred learning rate minus the best loss at the same width, in nats per token.

    Infinite if training diverges at the transferred learning rate.
    """

    value: float = np.nan
    interval: Interval = _NOWHERE
    reason: str = ""


@dataclass(frozen=True)
class Slope:
    """Change of the log₂ optimum per doubling of width, in octaves. `widths` are those with an optimum."""

    value: float = np.nan
    interval: Interval = _NOWHERE
    intercept: float = np.nan  # log₂ learning rate at width 1
    widths: tuple[int, ...] = ()
    reason: str = ""


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
    if len(mean) < _FEWEST_POINTS:
        return Optimum(reason=f"only {len(mean)} learning rates without divergence around the best")

    noise, degrees_of_freedom = _noise(losses, best)
    scale = np.sqrt(degrees_of_freedom / random.chisquare(degrees_of_freedom, DRAWS))
    standard_error = noise / np.sqrt(len(losses))
    mean_draws = mean + standard_error * scale[:, None] * random.standard_normal((DRAWS, len(mean)))
    at_edge = np.array([(mean_draws.argmin(axis=1) == i).mean() for i in (0, len(mean) - 1)])
    for share, edge, place in zip(at_edge, (low_edge, high_edge), (grid[0], grid[-1]), strict=True):
        if share > TAIL:
            return Optimum(reason=f"noise alone could place the best at {_power(place)}, {edge}")

    estimate = float(_parabola_minimum(grid, mean[None])[0])
    noise_draws = _parabola_minimum(grid, mean_draws)
    # Over draws, since on the mean alone parabola and spline may agree by chance.
    apart = _spline_minimum(grid, mean_draws[:_SPLINE_DRAWS]) - noise_draws[:_SPLINE_DRAWS]
    grid_error = _SPLINE_SHARE * float(np.sqrt(np.mean(apart**2)))
    draws = noise_draws + grid_error * scale * random.standard_normal(DRAWS)
    # Centred on the estimate: the draws' own mean is off where noise makes the minimum jump between grid points.
    draws += estimate - np.median(draws)
    loss_draws = _loss_at(grid, mean_draws, noise_draws)
    seeds_apart = losses[:, best].std(ddof=1) if len(losses) > 1 else 0.0
    loss_draws = loss_draws + seeds_apart / np.sqrt(len(losses)) * scale * random.standard_normal(DRAWS)
    return Optimum(
        log2_learning_rate=estimate,
        interval=_percentiles(draws),
        loss=float(_loss_at(grid, mean[None], np.array([estimate]))[0]),
        loss_interval=_percentiles(loss_draws),
        diverges_above=last < len(finite) - 1,
        grid=grid,
        mean=mean,
        draws=draws,
        noise_draws=noise_draws,
        mean_draws=mean_draws,
    )


def transfer_regret(optimum: Optimum, base: Optimum) -> Regret:
    """What it costs at a width to train with the base width's optimum.

    A regret cannot be negative, and is 0 when the two optima coincide: its interval is that of the signed
    square root, which passes through 0 smoothly, so that it begins at 0 exactly when the interval of the
    distance between the optima contains 0.
    """
    if optimum is base:
        return Regret(0.0, Interval(0.0, 0.0))
    if not base.bracketed:
        return Regret(reason=f"no optimum at the base width: {base.reason}")
    if not optimum.bracketed:
        return Regret(reason=f"no optimum at this width: {optimum.reason}")
    grid = optimum.grid
    if base.log2_learning_rate > grid[-1] and optimum.diverges_above:
        return Regret(np.inf, Interval(np.inf, np.inf))
    if not grid[0] <= base.log2_learning_rate <= grid[-1]:
        return Regret(reason=f"the transferred learning rate {_power(base.log2_learning_rate)} was not tried")
    value = float(_loss_at(grid, optimum.mean[None], np.array([base.log2_learning_rate]))[0]) - optimum.loss
    distance = base.draws - optimum.draws
    transferred = optimum.noise_draws + distance
    losses = _loss_at(grid, optimum.mean_draws, np.clip(transferred, grid[0], grid[-1]))
    excess = np.maximum(losses - _loss_at(grid, optimum.mean_draws, optimum.noise_draws), 0)
    excess[(transferred < grid[0]) | (transferred > grid[-1])] = np.inf
    low, high = _percentiles(np.sign(distance) * np.sqrt(excess))
    interval = Interval(0.0 if low <= 0 <= high else min(low**2, high**2), max(low**2, high**2))
    return Regret(max(value, 0.0), interval)


def slope_against_width(widths: Sequence[int], optima: Sequence[Optimum]) -> Slope:
    """Weighted least squares of the log₂ optimum on log₂ width.

    Each optimum counts by its own interval. Where the optima scatter about the line more than their
    intervals allow, the slope's interval is widened by the same factor.
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
    sizes = np.array([(o.interval.high - o.interval.low) / (2 * _NORMAL_95) for _, o in usable])
    sizes = np.maximum(sizes, 1e-9)  # noiseless curves
    fit = WLS(
        [optimum.log2_learning_rate for _, optimum in usable], add_constant(np.log2(used)), weights=sizes**-2
    ).fit(cov_type="fixed scale")
    scatter = float(np.sqrt(fit.ssr / fit.df_resid)) if fit.df_resid > 0 else 1.0
    half_width = _NORMAL_95 * float(fit.bse[1]) * max(1.0, scatter)
    intercept, value = map(float, fit.params)
    return Slope(value, Interval(value - half_width, value + half_width), intercept, used)


# From datasets to estimates


def curves(dataset: xr.Dataset, growth: str, optimizer: str, rules: str) -> dict[int, pd.DataFrame]:
    """Final held-out losses by width: rows are seeds, columns are learning rates, NaN where diverged.

    Widths, seeds and learning rates that were not run are left out. Empty if there was no such sweep.
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
    final = sweep.val_loss.sel(rules=rules).sel(evaluation_step=sweep.evaluation_step.values[evaluated.values][-1])
    final = final.where(sweep.diverged.sel(rules=rules) == 0)
    found: dict[int, pd.DataFrame] = {}
    for width in dataset.width.values:
        here = ran.sel(width=width).transpose("seed", "learning_rate").values
        seeds, rates = here.any(axis=1), here.any(axis=0)
        if here.any():
            values = final.sel(width=width).transpose("seed", "learning_rate").values[np.ix_(seeds, rates)]
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
    the best learning rate of the grid (NaN with one seed). All but `slope` by width.
    """

    growth: str
    optimizer: str
    rules: str
    base_width: int
    curves: dict[int, pd.DataFrame]
    optima: dict[int, Optimum]
    regrets: dict[int, Regret]
    seed_noise: dict[int, float]
    slope: Slope

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that were run, ascending."""
        return tuple(self.curves)


def transfer(dataset: xr.Dataset, growth: str, optimizer: str, rules: str) -> Transfer | None:
    """Optima, regrets and slope of one sweep under one rule set; None if it was not run."""
    found = curves(dataset, growth, optimizer, rules)
    if not found:
        return None
    base_width = int(dataset.attrs["base_width"])
    optima = {}
    for width, losses in found.items():
        # Seeded without the rule set's name: members that coincide get one and the same interval.
        random = np.random.default_rng(zlib.crc32(f"{growth} {optimizer} {width}".encode()))
        optima[width] = find_optimum(np.log2(losses.columns.to_numpy(np.float64)), losses.to_numpy(), random)
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
    )


def transfers(dataset: xr.Dataset, optimizer: str | None = None, growth: str | None = None) -> list[Transfer]:
    """The estimates of every sweep in the dataset, or of one optimizer or growth mode.

    Raises UserError, naming what is missing, if there is none.
    """
    found = [
        result
        for g in dataset.growth.values
        for o in dataset.optimizer.values
        for r in dataset.rules.values
        if growth in (None, g) and optimizer in (None, o)
        if (result := transfer(dataset, str(g), str(o), str(r))) is not None
    ]
    if not found:
        asked = [f"optimizer `{optimizer}`"] * (optimizer is not None) + [f"growth `{growth}`"] * (growth is not None)
        raise UserError(
            f"the study has no learning-rate sweep{' with ' + ' and '.join(asked) if asked else ''}; "
            "add one under `sweeps` in the study file and run it"
        )
    return found


def transferred_rate(sweep: Transfer) -> float | None:
    """The learning rate of the grid nearest the base width's optimum."""
    losses = sweep.curves.get(sweep.base_width)
    if losses is None:
        return None
    optimum = sweep.optima[sweep.base_width]
    if optimum.bracketed:
        rates = losses.columns.to_numpy(float)
        return float(rates[np.abs(np.log2(rates) - optimum.log2_learning_rate).argmin()])
    mean = losses.mean(axis=0, skipna=False)
    return float(mean.idxmin()) if mean.notna().any() else None


def signed(value: float) -> str:
    """Two decimals with a sign; a true minus, and no sign on what rounds to zero."""
    rounded = round(float(value), 2)
    return "0.00" if rounded == 0 else f"{rounded:+.2f}".replace("-", "−")


# Parts of the estimators


def _block(finite: NDArray[np.bool_], within: int) -> tuple[int, int]:
    """First and last index of the run of finite values around an index."""
    first = last = within
    while first > 0 and finite[first - 1]:
        first -= 1
    while last < len(finite) - 1 and finite[last + 1]:
        last += 1
    return first, last


def _noise(losses: Array, best: int) -> tuple[float, int]:
    """Standard deviation of a single run's loss about the curve near the best, and its degrees of freedom."""
    if len(losses) == 1:
        third = np.diff(losses[0], n=3)  # of independent noise: 20 times its variance
        return float(np.sqrt(np.mean(third**2) / 20)), len(third)
    near = losses[:, max(0, best - _NEIGHBOURS) : best + _NEIGHBOURS + 1]
    residual = near - near.mean(axis=0) - near.mean(axis=1, keepdims=True) + near.mean()
    degrees_of_freedom = (near.shape[0] - 1) * (near.shape[1] - 1)
    return float(np.sqrt((residual**2).sum() / degrees_of_freedom)), degrees_of_freedom


def _seed_noise(losses: pd.DataFrame) -> float:
    mean = losses.mean(axis=0, skipna=False)
    if len(losses) < 2 or mean.isna().all():
        return float("nan")
    return float(losses[mean.idxmin()].std())


def _around(grid: Array, index: NDArray[np.intp], curve: Array) -> tuple[Array, Array, Array, float]:
    """Curvature and slope per grid step, and value, of each curve's parabola centred at a grid point."""
    rows = np.arange(len(curve))
    left, middle, right = curve[rows, index - 1], curve[rows, index], curve[rows, index + 1]
    return left - 2 * middle + right, (right - left) / 2, middle, float(grid[1] - grid[0])


def _parabola_minimum(grid: Array, curve: Array) -> Array:
    """Minimum of the parabola through the best point and its neighbours; an edge that is best is itself.

    curve [draws, learning rates] -> [draws].
    """
    best = curve.argmin(axis=1)
    inner = np.clip(best, 1, len(grid) - 2)
    curvature, slope, _, step = _around(grid, inner, curve)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(curvature > 0, -slope / curvature, 0.0)
    return np.where(best == inner, grid[inner] + step * np.clip(shift, -0.5, 0.5), grid[best])


def _spline_minimum(grid: Array, curve: Array) -> Array:
    """Minimum of the cubic spline through the points near the best, at most one grid step from it.

    curve [draws, learning rates] -> [draws].
    """
    minimum = np.empty(len(curve))
    best = curve.argmin(axis=1)
    for index in np.unique(best):
        near = slice(max(0, index - _NEIGHBOURS), index + _NEIGHBOURS + 1)
        fine = np.linspace(grid[max(0, index - 1)], grid[min(len(grid) - 1, index + 1)], 201)
        splines = CubicSpline(grid[near], curve[best == index][:, near], axis=1)(fine)
        minimum[best == index] = fine[splines.argmin(axis=1)]
    return minimum


def _loss_at(grid: Array, curve: Array, place: Array) -> Array:
    """Each curve at its own place, by the parabola through the three nearest grid points."""
    step = grid[1] - grid[0]
    nearest = np.clip(np.rint((place - grid[0]) / step).astype(np.intp), 1, len(grid) - 2)
    curvature, slope, value, _ = _around(grid, nearest, curve)
    distance = (place - grid[nearest]) / step
    return value + slope * distance + curvature * distance**2 / 2


def _percentiles(draws: Array) -> Interval:
    # An order statistic, not an interpolation: draws may be infinite.
    low, high = np.quantile(draws, [TAIL, 1 - TAIL], method="closest_observation")
    return Interval(float(low), float(high))


def _power(log2: float) -> str:
    return f"2^{log2:g}" if float(log2).is_integer() else f"2^{log2:.2f}"
