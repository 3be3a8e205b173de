"""Sweeps with a known optimum: measured mean loss curves and made-up ones, and noise like that of real runs.

Set down before any estimator was tried on them. Four parts of nine are curves that were measured under AdamW and SGD
on a laptop, one SGD on a GPU (tests/data/make_measured_curves.py), four are formulae. Measured curves are joined by
Akima's interpolation, which keeps a cliff a cliff, and go on with the slope of their outermost octave, or 0.2 nats per
octave if that is more. They keep the scatter of their few seeds, which makes them a little more jagged than the truth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.interpolate import Akima1DInterpolator
from scipy.special import expit

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]

MEASURED = Path(__file__).with_name("data") / "measured_curves.csv"
BEST_LOSS = 3.4  # nats
OVER = 4.0  # octaves over which a seed's own slow curve forgets, as measured
ALIKE = 0.8  # share of its variance that two rule sets have in common at a seed and width, as measured
_LEAST_SLOPE = 0.2  # nats per octave beyond what was measured


@dataclass(frozen=True)
class LossCurve:
    """Excess loss [nats] and a run's own noise [nats] as functions of octaves from the optimum, where both are at 0.

    `seed_effect`: standard deviation [nats] of a seed's own slow curve.
    """

    group: str
    excess: Curve
    noise: Curve
    seed_effect: float

    def sweep(self, octaves: Array, seeds: int, random: np.random.Generator, alike: Array | None = None) -> Array:
        """Losses [seeds, learning rates] at these octaves from the optimum.

        `alike` [seeds, learning rates]: standard normal; what seeds' slow curves share with those of another sweep.
        """
        slow = self.seed_effect * np.linalg.cholesky(np.exp(-np.abs(octaves[:, None] - octaves) / OVER))
        effect = random.standard_normal((seeds, len(octaves)))
        if alike is not None:
            effect = np.sqrt(ALIKE) * alike + np.sqrt(1 - ALIKE) * effect
        common = effect @ slow.T
        own = self.noise(octaves) * random.standard_normal((seeds, len(octaves)))
        return BEST_LOSS + self.excess(octaves) + common + own


def grid_over(octaves: tuple[float, float], spacing: float, random: np.random.Generator) -> Array:
    """Learning rates, in octaves, that reach from two to three below `octaves` to as far above, at any phase."""
    first = octaves[0] - random.uniform(2, 3)
    return np.arange(first, octaves[1] + random.uniform(2, 3) + spacing / 2, spacing)


def draw_curve(group: str, random: np.random.Generator) -> LossCurve:
    """A curve of a group, stretched or squeezed by up to a fifth."""
    if group in FORMULAE:
        return _made_up(group, random)
    measured = _measured()[group]
    return stretched(measured[random.integers(len(measured))], random.uniform(0.8, 1.2))


def stretched(curve: LossCurve, factor: float) -> LossCurve:
    """The curve with its octaves made longer by a factor."""
    return LossCurve(
        curve.group, lambda u: curve.excess(u / factor), lambda u: curve.noise(u / factor), curve.seed_effect
    )


def _from_its_best(curve: Curve, low: float, high: float) -> tuple[Curve, float]:
    """The curve above its minimum between `low` and `high`, which is moved to 0, and where that was."""
    fine = np.linspace(low, high, 4001)
    values = curve(fine)
    best, least = fine[values.argmin()], values.min()
    return lambda u: np.maximum(curve(u + best) - least, 0.0), float(best)


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
# What sweeps are made of, one after another.
MIX = ("adamw", "sgd", "parabola", "asymmetric", "h200", "adamw", "sgd", "sharp bend", "edge of stability")


def _made_up(group: str, random: np.random.Generator) -> LossCurve:
    """Noise of 0.005 to 0.03 nats, and up to five times that above the optimum where the loss is 0.3 nats up."""
    excess, _ = _from_its_best(FORMULAE[group](random), -4, 4)
    noise, unstable = random.uniform(0.005, 0.03), random.uniform(1, 5)
    return LossCurve(group, excess, lambda u: noise * np.where((u > 0) & (excess(u) > 0.3), unstable, 1.0), 0.031)
