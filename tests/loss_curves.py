"""Sweeps with a known optimum: measured mean loss curves and made-up ones, and noise like that of real runs.

Set down before any estimator was tried on them. Four parts of nine are curves that were measured under AdamW and SGD
on a laptop, one SGD on a GPU (tests/data/make_measured_curves.py), four are formulae. Measured curves are joined by
Akima's interpolation, which keeps a cliff a cliff, and go on with the slope of their outermost octave, or 0.2 nats per
octave if that is more. They keep the scatter of their few seeds, which makes them a little more jagged than the truth.

Set down later: the published sweeps (results/reference). Their means are smoothed by a cubic spline with a penalty on
its curvature, chosen by cross-validation: another fit than the estimator's process, and one that has no edge. Cliffs
with seeds on both sides, as they are under SGD at width 1024, are put on top: each seed falls off at a place of its
own, and the truth is the minimum of the expected loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.interpolate import Akima1DInterpolator, make_smoothing_spline
from scipy.special import expit, ndtr

from gdn_mup.study.datasets import open_dataset
from gdn_mup.study.optimum import curves

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]

MEASURED = Path(__file__).with_name("data") / "measured_curves.csv"
PUBLISHED = Path(__file__).parents[1] / "results" / "reference"
BEST_LOSS = 3.4  # nats
PUBLISHED_ALIKE = 0.22  # octaves over which a run's own noise forgets: variogram of h200_fine's 24 seeds
OVER = 4.0  # octaves over which a seed's own slow curve forgets, as measured
ALIKE = 0.8  # share of its variance that two rule sets have in common at a seed and width, as measured
_LEAST_SLOPE = 0.2  # nats per octave beyond what was measured


@dataclass(frozen=True)
class Cliff:
    """Where seeds fall off, in octaves from the optimum: at `place`, give or take `spread`.

    By `height` [nats], and `rise` [nats per octave] beyond. An octave and a half beyond, training diverges.
    """

    place: float
    spread: float
    height: float
    rise: float

    def drop(self, octaves: Array) -> Array:
        """What a run that fell off loses [nats]."""
        return self.height + self.rise * np.maximum(octaves - self.place, 0)

    def expected(self, octaves: Array) -> Array:
        """The mean over seeds [nats]."""
        return np.asarray(ndtr((octaves - self.place) / self.spread) * self.drop(octaves))

    def of_seeds(self, octaves: Array, seeds: int, random: np.random.Generator) -> Array:
        """What each seed loses [seeds, learning rates], NaN where it diverges."""
        beyond = octaves - self.place - self.spread * random.standard_normal((seeds, 1))
        return np.where(beyond > 1.5, np.nan, np.where(beyond > 0, self.drop(octaves), 0.0))


@dataclass(frozen=True)
class LossCurve:
    """Excess loss [nats] and a run's own noise [nats] as functions of octaves from the optimum, where both are at 0.

    `seed_effect`: standard deviation [nats] of a seed's own slow curve. `cliff` is part of the excess, which is the
    expected one, but comes to each seed by itself.
    """

    group: str
    excess: Curve
    noise: Curve
    seed_effect: float
    cliff: Cliff | None = None
    alike_over: float = 0.0

    def sweep(self, octaves: Array, seeds: int, random: np.random.Generator, alike: Array | None = None) -> Array:
        """Losses [seeds, learning rates] at these octaves from the optimum.

        `alike` [seeds, learning rates]: standard normal; what seeds' slow curves share with those of another sweep.
        """
        slow = self.seed_effect * np.linalg.cholesky(np.exp(-np.abs(octaves[:, None] - octaves) / OVER))
        effect = random.standard_normal((seeds, len(octaves)))
        if alike is not None:
            effect = np.sqrt(ALIKE) * alike + np.sqrt(1 - ALIKE) * effect
        common = effect @ slow.T
        own = random.standard_normal((seeds, len(octaves)))
        if self.alike_over:
            apart = np.abs(octaves[:, None] - octaves)
            own = own @ np.linalg.cholesky(np.exp(-apart / self.alike_over)).T
        own = self.noise(octaves) * own
        losses = BEST_LOSS + self.excess(octaves) + common + own
        if self.cliff is None:
            return losses
        return np.asarray(losses - self.cliff.expected(octaves) + self.cliff.of_seeds(octaves, seeds, random))


def grid_over(octaves: tuple[float, float], spacing: float, random: np.random.Generator) -> Array:
    """Learning rates, in octaves, that reach from two to three below `octaves` to as far above, at any phase."""
    first = octaves[0] - random.uniform(2, 3)
    return np.arange(first, octaves[1] + random.uniform(2, 3) + spacing / 2, spacing)


def draw_curve(group: str, random: np.random.Generator) -> LossCurve:
    """A curve of a group, stretched or squeezed by up to a fifth."""
    if group in FORMULAE:
        return _made_up(group, random)
    known = _published() if group.startswith("published") else _measured()
    curve = known[group.removesuffix(", cliff")][random.integers(len(known[group.removesuffix(", cliff")]))]
    curve = stretched(curve, random.uniform(0.8, 1.2))
    return _with_cliff(curve, random) if group.endswith(", cliff") else curve


def stretched(curve: LossCurve, factor: float) -> LossCurve:
    """The curve with its octaves made longer by a factor."""
    return LossCurve(
        curve.group,
        lambda u: curve.excess(u / factor),
        lambda u: curve.noise(u / factor),
        curve.seed_effect,
        alike_over=curve.alike_over,
    )


def _from_its_best(curve: Curve, low: float, high: float) -> tuple[Curve, float]:
    """The curve above its minimum between `low` and `high`, which is moved to 0, and where that was."""
    fine = np.linspace(low, high, 4001)
    values = curve(fine)
    best, least = fine[values.argmin()], values.min()
    return lambda u: np.maximum(curve(u + best) - least, 0.0), float(best)


def _with_cliff(curve: LossCurve, random: np.random.Generator) -> LossCurve:
    """A cliff 0.2 to 1.2 octaves above the optimum, over a tenth to four tenths of an octave."""
    place, spread, height = random.uniform(0.2, 1.2), random.uniform(0.1, 0.4), random.uniform(0.3, 1.5)
    cliff = Cliff(place, spread, height, random.uniform(1.0, 3.0))
    excess, best = _from_its_best(lambda u: curve.excess(u) + cliff.expected(u), -3, 3)
    moved = Cliff(place - best, spread, height, cliff.rise)
    return LossCurve(
        f"{curve.group}, cliff", excess, lambda u: curve.noise(u + best), curve.seed_effect, moved, curve.alike_over
    )


@cache
def _published() -> dict[str, list[LossCurve]]:
    """Curves of the published sweeps, by optimizer. The same model is there once."""
    found: dict[str, list[LossCurve]] = {}
    seen: set[bytes] = set()
    for path in sorted(PUBLISHED.glob("h200*/lr_sweep.nc")):
        dataset = open_dataset(path, "lr_sweep")
        for growth in map(str, dataset.growth.values):
            for optimizer in map(str, dataset.optimizer.values):
                for rules in map(str, dataset.rules.values):
                    for table in curves(dataset, growth, optimizer, rules).values():
                        places, losses = np.log2(table.columns.to_numpy(np.float64)), table.to_numpy(np.float64)
                        if losses.tobytes() not in seen and len(losses) > 1:
                            seen.add(losses.tobytes())
                            curve = _smoothed(f"published {optimizer}", places, losses)
                            found.setdefault(f"published {optimizer}", []).extend([curve] if curve else [])
    return found


def _smoothed(group: str, places: Array, losses: Array) -> LossCurve | None:
    """The curve that seeds [seeds, learning rates] scatter about; None if its best is at an end."""
    usual = np.nanmedian(losses, axis=0)
    stays = usual < np.nanmin(usual) + 1.0
    first, last = np.flatnonzero(stays)[[0, -1]]
    places, losses = places[first : last + 1], losses[:, first : last + 1]
    losses = np.where(losses > np.nanmedian(losses, axis=0) + 0.3, np.nan, losses)  # seeds that fell off
    mean = np.nanmean(losses, axis=0)
    if len(places) < 6 or not 0 < mean.argmin() < len(mean) - 1:
        return None
    departure = losses - mean
    effect = np.nanmedian(departure, axis=1, keepdims=True)
    own = np.sqrt(np.nansum((departure - effect) ** 2, axis=0) / np.maximum(np.isfinite(losses).sum(axis=0) - 1, 1))
    own = np.maximum(np.convolve(np.pad(own, 1, mode="edge"), np.ones(3) / 3, "valid"), 0.005)
    stretch = 1 + (mean - mean.min()) / 0.2  # a spline has no walls: it is one of 0.2 log(1 + excess / 0.2)
    spline = make_smoothing_spline(places, 0.2 * np.log(stretch), w=(stretch / own) ** 2)
    height, best = _from_its_best(spline, places[0], places[-1])
    if not places[0] + 0.3 < best < places[-1] - 0.3:
        return None
    low, high = places[0] - best, places[-1] - best
    ends = np.array([low, high])
    slopes = np.diff(height(np.array([low, low + 0.25, high - 0.25, high])))[[0, 2]] / 0.25

    def excess(u: Array) -> Array:
        inside = height(np.clip(u, low, high))
        beyond = np.minimum(slopes[0], -0.05) * np.minimum(u - ends[0], 0)
        return np.asarray(
            0.2 * np.expm1((inside + beyond + np.maximum(slopes[1], 0.05) * np.maximum(u - high, 0)) / 0.2)
        )

    return LossCurve(
        group, excess, lambda u: np.interp(u + best, places, own), float(effect.std(ddof=1)), None, PUBLISHED_ALIKE
    )


@cache
def _measured() -> dict[str, list[LossCurve]]:
    found: dict[str, list[LossCurve]] = {}
    for (group, _), table in pd.read_csv(MEASURED).groupby(["group", "curve"], sort=False):
        places, losses = table.log2_learning_rate.to_numpy(), table.loss.to_numpy()
        left = np.minimum((losses[2] - losses[0]) / (places[2] - places[0]), -_LEAST_SLOPE)
        right = np.maximum((losses[-1] - losses[-3]) / (places[-1] - places[-3]), _LEAST_SLOPE)
        excess, best = _from_its_best(_continued(places, losses, left, right), places[0], places[-1])
        noise = _continued(places, table.noise.to_numpy(), 0.0, 0.0)
        found.setdefault(str(group), []).append(
            LossCurve(str(group), excess, lambda u, noise=noise, best=best: noise(u + best), table.seed_effect.iloc[0])
        )
    return found


def _continued(places: Array, values: Array, left: float, right: float) -> Curve:
    """Interpolated, and straight on with these slopes."""
    inside = Akima1DInterpolator(places, values)

    def curve(u: Array) -> Array:
        clipped = np.clip(u, places[0], places[-1])
        return np.asarray(inside(clipped) + left * np.minimum(u - places[0], 0) + right * np.maximum(u - places[-1], 0))

    return curve


def _softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def _parabola(random: np.random.Generator) -> Curve:
    """0.05 to 0.25 nats an octave off the optimum."""
    curvature = random.uniform(0.05, 0.25)
    return lambda u: curvature * u**2


def _asymmetric(random: np.random.Generator) -> Curve:
    """Straight lines of different slopes, joined by bends of an octave."""
    left, right = random.uniform(0.3, 0.6), random.uniform(0.1, 0.8)
    soft_left, soft_right = random.uniform(0.4, 1.1), random.uniform(0.4, 1.1)
    return lambda u: left * soft_left * _softplus(-u / soft_left) + right * soft_right * _softplus(u / soft_right)


def _sharp(random: np.random.Generator) -> Curve:
    """A bend of a third of an octave."""
    left, right = random.uniform(0.4, 0.6), random.uniform(0.6, 1.0)
    soft_left, soft_right = random.uniform(0.3, 0.5), random.uniform(0.2, 0.4)
    return lambda u: left * soft_left * _softplus(-u / soft_left) + right * soft_right * _softplus(u / soft_right)


def _edge_of_stability(random: np.random.Generator) -> Curve:
    """Gentle bends up to an edge, where the loss jumps by 0.1 to 0.6 nats within 0.1 to 0.6 octaves."""
    left, soft_left = random.uniform(0.2, 0.5), random.uniform(0.4, 1.1)
    right, soft_right = random.uniform(0.05, 0.3), random.uniform(0.3, 1.1)
    height, place, width = random.uniform(0.1, 0.6), random.uniform(-0.2, 2.5), random.uniform(0.1, 0.6)
    return lambda u: (
        left * soft_left * _softplus(-u / soft_left)
        + right * soft_right * _softplus(u / soft_right)
        + height * expit(4 * (u - place) / width)
    )


FORMULAE = {
    "parabola": _parabola,
    "asymmetric": _asymmetric,
    "sharp bend": _sharp,
    "edge of stability": _edge_of_stability,
}
# Curves like the published ones, and what sweeps of all kinds are made of, one after another.
LIKE_PUBLISHED = ("published adamw", "published sgd", "published adamw, cliff", "published sgd, cliff")
MIX = ("adamw", "sgd", "parabola", "asymmetric", "h200", "adamw", "sgd", "sharp bend", "edge of stability")


def _made_up(group: str, random: np.random.Generator) -> LossCurve:
    """Noise of 0.005 to 0.03 nats, and up to five times that above the optimum where the loss is 0.3 nats up."""
    excess, _ = _from_its_best(FORMULAE[group](random), -4, 4)
    noise, unstable = random.uniform(0.005, 0.03), random.uniform(1, 5)
    return LossCurve(group, excess, lambda u: noise * np.where((u > 0) & (excess(u) > 0.3), unstable, 1.0), 0.031)
