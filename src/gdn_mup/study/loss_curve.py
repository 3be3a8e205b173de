"""A loss curve between and beside the learning rates that were tried: draws of what it may look like.

The mean over seeds is known at the grid, up to noise; between grid points something has to be assumed. Here: a Gaussian
process in log₂ learning rate (C. E. Rasmussen and C. K. I. Williams, 2006, chapter 2) with a Matérn covariance of
smoothness 3/2, whose curves have a slope everywhere and may bend anywhere. Three things are particular to losses:

walls       Losses rise by nats away from a valley that is hundredths deep, and what happens up there says little about
            the valley's floor. The process is one of VALLEY · log(1 + excess / VALLEY), where excess is above the least
            loss measured. A monotone function moves no minimum, and this one makes walls about as steep as the floor.
edge        Training may be stable up to some learning rate and not beyond, where the loss jumps upwards. Whether there
            is such an edge, and between which learning rates, is averaged over by likelihood. What lies beyond an edge
            is no part of the process, and neither is its noise part of the noise below. Seeds fall off at places
            of their own, so that there may be some on both sides: what is drawn is the expected loss, and how many
            have fallen says where the edge is and how sharp.
noise       Runs scatter more where training is unstable. A learning rate's noise is taken from the differences between
            it and its neighbours, since what a seed has at all learning rates moves no minimum; with few seeds these
            are moderated by the median over the grid (G. K. Smyth, 2004, doi 10.2202/1544-6115.1027). Neighbours a
            quarter of an octave apart share a third of a run's noise, those an octave apart none.

The constants are set once, for losses in nats per token, such that intervals cover on the sweeps with known truth of
tests/test_coverage.py, which prints by how much. Draws carry noise and grid at once, and nothing is resampled: three
seeds have too few distinct resamples.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Array = NDArray[np.float64]

DRAWS = 4000
FEWEST_POINTS = 4  # three leave nothing to tell an edge or the noise from

_VALLEY = 0.2  # nats
_SIZE = 0.2  # nats: standard deviation of the process
_LENGTH = 3.0  # octaves
_LEVEL = 1.0  # nats: standard deviation of its mean, in effect free
_EDGES = 0.15  # an octave, above the best learning rate
_JUMPS = stats.t(df=2, scale=0.1)  # nats, from one learning rate to the next from the edge on
_SPREAD = 0.25  # octaves: of the places where seeds fall off
_GAP = 0.15  # nats between seeds that fell off at a learning rate and those that did not
_ALIKE = 0.22  # octaves over which a run's own noise forgets: variogram of study h200_fine's 24 seeds
_TRIED = 4  # places and spreads that are drawn for each one that is kept
_MODERATION = 4.0  # degrees of freedom that the median noise counts for
_LEAST_NOISE = 1e-4  # nats: made-up losses may have none
_FINE = 16  # places per octave at which curves are drawn
_JITTER = 1e-9  # nats²: keeps covariances positive in floating point


class Curves(NamedTuple):
    """Draws of a loss curve. `places` [places]: log₂ learning rates, even, from the grid's first to its last; `losses`
    [draws, places]; `middle` [places]: the median of the draws."""

    places: Array
    losses: NDArray[np.floating]
    middle: Array

    def minima(self) -> tuple[Array, Array]:
        """log₂ learning rate and loss of each draw's minimum, [draws] each; at an end if the minimum is there."""
        best = self.losses.argmin(axis=1)
        centre = np.clip(best, 1, len(self.places) - 2)
        rows = np.arange(len(self.losses))
        left, middle, right = (self.losses[rows, centre + i] for i in (-1, 0, 1))
        curvature, slope = left - 2 * middle + right, (right - left) / 2
        inside = (best == centre) & (curvature > 0)
        shift = np.where(inside, -slope / np.where(inside, curvature, 1.0), best - centre)
        return (
            self.places[centre] + shift * (self.places[1] - self.places[0]),
            np.where(inside, middle + slope * shift / 2, self.losses[rows, best]),
        )

    def at(self, place: Array) -> Array:
        """Each draw's loss [draws] at a place of its own, `place` [draws]; infinite outside of `places`."""
        return _value_at(self.places, self.losses, place)

    def middle_at(self, place: float) -> float:
        """The median's loss at a place; infinite outside of `places`."""
        return float(_value_at(self.places, self.middle[None], np.array([place]))[0])


def draw_curves(grid: Array, losses: Array, random: np.random.Generator) -> Curves:
    """Draws of the curve over a grid.

    grid [learning rates]: log₂, ascending, evenly spaced. losses [seeds, learning rates]: finite, in nats.
    """
    points, step = len(grid), float(grid[1] - grid[0])
    mean = losses.mean(axis=0)
    best = int(mean.argmin())
    stretch = 1 + (mean - mean[best]) / _VALLEY  # nats per nat of what the process is of
    heights = _VALLEY * np.log(stretch)
    fine = max(2, round(step * _FINE))  # places per step, so that the grid is among them
    places = grid[0] + np.arange(fine * (points - 1) + 1) * step / fine

    # The process is of the first `regular` learning rates: of all, or of those below an edge.
    prior = _covariance(len(places), round(step / fine, 9))
    at_grid = prior[::fine, ::fine]
    regular = list(range(best + 1, points + 1))
    noises = [_noise(losses[:, :seen], heights[:seen], stretch[:seen], step) for seen in regular]
    jumps = _JUMPS.logpdf(np.diff(heights))
    below = step * np.arange(len(regular))  # octaves above the best learning rate without an edge
    log_weights = -_EDGES * below + np.log(np.append(np.full(len(regular) - 1, -np.expm1(-_EDGES * step)), 1.0))
    for case, (seen, noise) in enumerate(zip(regular, noises, strict=True)):
        of_seen = at_grid[:seen, :seen] + noise.covariance
        log_weights[case] += stats.multivariate_normal.logpdf(heights[:seen], cov=of_seen) + noise.log_likelihood
        log_weights[case] += jumps[seen - 1 :].sum()
    weights = np.exp(log_weights - log_weights.max())
    chosen = random.choice(len(regular), DRAWS, p=weights / weights.sum())

    drawn: NDArray[np.float32] = np.empty((DRAWS, len(places)), np.float32)  # they are kept: half the memory
    for case, (seen, noise) in enumerate(zip(regular, noises, strict=True)):
        mine = chosen == case
        count = int(mine.sum())
        if count == 0:
            continue
        across = prior[:, ::fine][:, :seen]
        gain = np.linalg.solve(at_grid[:seen, :seen] + noise.covariance, across.T).T
        covariance = prior - gain @ across.T + _JITTER * np.eye(len(places))
        heights_drawn = random.multivariate_normal(gain @ heights[:seen], covariance, count, method="cholesky")
        curves = _VALLEY * np.expm1(heights_drawn / _VALLEY)
        if seen < points:
            curves = _off_the_edge(curves, places, grid, losses - mean[best], seen, random)
        drawn[mine] = curves
    drawn += np.float32(mean[best])
    return Curves(places, drawn, np.median(drawn, axis=0).astype(np.float64))


def _off_the_edge(
    curves: Array, places: Array, grid: Array, losses: Array, seen: int, random: np.random.Generator
) -> Array:
    """Curves [draws, places] of which only the first `seen` learning rates are regular, as expected losses beyond.

    Seeds fall off at places of their own, about a common one. That and their spread are drawn from what fits the number
    of seeds that have fallen at the first learning rate with any, and that none had one below it.
    """
    count, seeds, step = len(curves), len(losses), grid[1] - grid[0]
    fallen = _has_fallen(losses[:, seen])
    beyond = losses[:, seen:].mean(axis=0)
    beyond[0] = losses[fallen, seen].mean()
    beyond = np.interp(places, grid[seen:], beyond)
    tried = _TRIED * count
    place = grid[seen - 1] + step * random.uniform(size=tried)
    spread = _SPREAD * np.abs(random.standard_normal(tried)) + 1e-3
    before, after = (special.ndtr((rate - place) / spread) for rate in grid[seen - 1 : seen + 1])
    odds = (1 - before) ** seeds * after ** fallen.sum() * (1 - after) ** (seeds - fallen.sum()) + 1e-300
    kept = random.choice(tried, count, p=odds / odds.sum())
    off = special.ndtr((places - place[kept, None]) / spread[kept, None])
    return np.asarray(curves + off * (beyond - curves))


def _has_fallen(losses: Array) -> Array:
    """Which seeds [seeds] fell off at the first learning rate beyond an edge: those above the widest gap, or all."""
    ordered = np.sort(losses)
    gaps = np.diff(ordered)
    if len(gaps) == 0 or gaps.max() < _GAP:
        return np.ones(len(losses), bool)
    return np.asarray(losses > ordered[gaps.argmax()])


def _value_at(places: Array, curves: NDArray[np.floating], place: Array) -> Array:
    """Value [curves] of each curve [curves, places] at a place of its own; infinite outside of `places`."""
    position = (place - places[0]) / (places[1] - places[0])
    inside = (position >= -1e-9) & (position <= len(places) - 1 + 1e-9)
    left = np.clip(np.where(inside, position, 0), 0, len(places) - 2).astype(np.intp)
    rows = np.arange(len(curves))
    value = curves[rows, left] + (position - left) * (curves[rows, left + 1] - curves[rows, left])
    return np.where(inside, value, np.inf)


class _Noise(NamedTuple):
    """What noise does to heights: its `covariance` [learning rates, learning rates], and how likely it is that some
    learning rates have so much more of it than is usual, against that they have what is usual."""

    covariance: Array
    log_likelihood: float


def _noise(losses: Array, heights: Array, stretch: Array, step: float) -> _Noise:
    """Noise of the heights [learning rates], the process's view of the mean loss.

    losses [seeds, learning rates]; stretch [learning rates]: nats of loss per nat of height; step: octaves.
    """
    seeds, points = losses.shape
    distance = step * np.abs(np.subtract.outer(np.arange(points), np.arange(points)))
    if seeds == 1:  # third differences stand in for noise, 20 times its variance; they overstate it
        third = np.diff(heights, n=3) ** 2 / 20
        return _Noise(np.eye(points) * max(float(np.mean(third)) if len(third) else 0.0, _LEAST_NOISE**2), 0.0)
    departure = losses - losses.mean(axis=0)
    between = np.diff(departure, axis=1)  # what a seed has at all learning rates is not in it
    variance = (between**2).sum(axis=0) / (seeds - 1) / 2 / -np.expm1(-step / _ALIKE)
    local = np.array([variance[max(0, i - 1) : i + 1].mean() for i in range(points)]) / stretch**2
    freedom = 1.5 * (seeds - 1)  # of two differences that share a learning rate
    usual = max(float(np.median(local)) * freedom / float(stats.chi2.median(freedom)), _LEAST_NOISE**2)
    moderated = (_MODERATION * usual + freedom * local) / (_MODERATION + freedom)
    ratio = np.append(1, np.maximum(local / usual, 1))  # less noise than usual is no sign of anything
    likelihood = stats.f.logpdf(ratio, freedom, _MODERATION) + np.log(ratio)  # of the logarithm of the ratio
    unlike = likelihood[1:] - likelihood[0]
    # Larger by what the variance of Student's t is above that of the normal distribution.
    size = np.sqrt(moderated * (_MODERATION + freedom) / (_MODERATION + freedom - 2) / seeds)
    return _Noise(np.outer(size, size) * np.exp(-distance / _ALIKE), float(unlike.sum()))


@lru_cache(maxsize=64)
def _covariance(count: int, spacing: float) -> Array:
    """Prior covariance [places, places] of the process at so many places, so many octaves apart."""
    distance = np.sqrt(3) / _LENGTH * spacing * np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    return _SIZE**2 * (1 + distance) * np.exp(-distance) + _LEVEL**2
