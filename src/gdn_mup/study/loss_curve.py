"""A loss curve between and around the learning rates that were tried: draws of what it may look like.

The mean over seeds is known at the grid up to noise; between the grid points something has to be assumed. Here:
the curvature in log₂ learning rate changes like a random walk, so that the curve is a smoothing spline (G. Wahba,
Spline Models for Observational Data, 1990, chapter 1: such a spline and a Gaussian process are one). Level, slope
and curvature themselves are free. Two numbers are uncertain and are averaged over, by their likelihood:

noise       the standard deviation of a single run about its curve. Seeds are paired (at one width all learning
            rates of a seed share init and batches), so it is what is left after taking out each seed's and each
            learning rate's mean.
roughness   by how much the curvature changes along an octave; more at higher learning rates, since loss curves are
            gentle below the optimum and sharp above. With few points the data say little, so it has a prior, set
            such that intervals cover on curves with the slopes and bends of real sweeps, and with a tail for
            curves that jump within an octave.

Measured (tests/test_coverage.py; 3 to 5 seeds, noise of 0.005 to 0.03 nats): intervals of the optimum cover in 95 to
98 % of studies. Limits: with noise of 0.005 nats, and on curves that bend within a third of an octave, intervals are
somewhat too wide (98 to 99 %). With noise of 0.03 nats they are too short where the bottom is flat over two octaves
or more (85 to 90 %), and at octave spacing where a curve jumps by a nat right above its optimum (75 to 85 %; half
octaves: 95 %), as in SGD sweeps an octave fine: the curve is drawn too smooth and its optimum may come out too low.
With one seed at octave spacing a cliff may pass for noise (65 %).

Draws carry noise and grid at once, and nothing is resampled: three seeds have too few distinct resamples.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

DRAWS = 1000
ROUGHNESS = 0.04  # median of the prior at the middle of the curve, nats per octave^2.5
ROUGHNESS_SPREAD = 0.5  # its standard deviation in log e
JUMPS = 0.001  # share of curves that jump within an octave, whose roughness may be anything:
JUMPS_SPREAD = 2.0  # its standard deviation in log e
FEWEST_POINTS = 4  # three are any parabola: the roughness would be the prior's alone

_GROWTH = 0.5  # of log e roughness per octave: losses bend more sharply towards divergence
_REACH = 2.5  # octaves on either side of what is asked for that have a say
_FINE = 16  # points per octave at which curves are drawn
_UNSTABLE = 5  # times the median over learning rates: a scatter of seeds that only instability has
_RANK = 12  # of a curve's covariance; what is left out is below 1e-6 of it
_RATIOS = np.exp(np.arange(np.log(1e-5), np.log(1e7), 0.7))  # roughness² over noise², per octave^5
_NOISES = np.exp(np.linspace(-1.0, 1.6, 14))  # noise over its estimate: 0.4 to 5
_LEAST_NOISE = 1e-4  # nats: synthetic losses may have none


class Curves(NamedTuple):
    """Draws of a loss curve. `places` [places]: log₂ learning rates, ascending; `losses` [draws, places]; `mean`
    [places]: the most likely curve."""

    places: Array
    losses: Array
    mean: Array

    def minima(self) -> tuple[Array, Array]:
        """log₂ learning rate and loss of each draw's minimum, [draws] each; at an end if the minimum is there."""
        return minimum_of(self.places, self.losses)

    def at(self, place: Array) -> Array:
        """Each draw's loss [draws] at a place of its own, `place` [draws]; infinite outside of `places`."""
        return value_at(self.places, self.losses, place)


def draw_curves(grid: Array, losses: Array, around: tuple[float, float], random: np.random.Generator) -> Curves:
    """Draws of the curve near the stretch `around` of log₂ learning rates, as far as the grid goes.

    grid [learning rates]: log₂, ascending, evenly spaced. losses [seeds, learning rates]: finite, in nats.
    """
    step = float(grid[1] - grid[0])
    reach = int(np.ceil(_REACH / step - 1e-6)) * step
    inside = (grid > around[0] - reach - step / 2) & (grid < around[1] + reach + step / 2)
    grid, losses = grid[inside], losses[:, inside]
    stable = _stable(grid, losses, around)
    grid, losses = grid[stable], losses[:, stable]
    smoother = _smoother(len(grid), round(step, 9))
    mean = losses.mean(axis=0)
    level = mean.mean()

    noise, freedom = run_noise(losses)
    noises = max(noise, _LEAST_NOISE) * _NOISES
    of_mean = noises / np.sqrt(len(losses))
    misfit = np.einsum("i,rij,j->r", mean - level, smoother.misfit, mean - level)
    roughness = np.sqrt(_RATIOS)[:, None] * of_mean
    # Log posterior [ratios, noises]: scatter of the seeds, restricted likelihood of their mean, prior.
    log_weights = (
        -freedom * (np.log(noises) + (noise / noises) ** 2 / 2)
        - (len(grid) - 3) * np.log(of_mean)
        - smoother.log_determinant[:, None] / 2
        - misfit[:, None] / of_mean**2 / 2
        + _log_prior(roughness)
    )
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()

    ratio, level_of_noise = np.divmod(random.choice(weights.size, DRAWS, p=weights.ravel()), weights.shape[1])
    normal = random.standard_normal((DRAWS, _RANK)) * of_mean[level_of_noise, None]
    drawn = np.empty((DRAWS, len(smoother.places)))
    for each in np.unique(ratio):
        rows = ratio == each
        drawn[rows] = normal[rows] @ smoother.root[each].T + smoother.mean[each] @ (mean - level)
    most_likely = np.einsum("r,rpi,i->p", weights.sum(axis=1), smoother.mean, mean - level)
    return Curves(grid[0] + smoother.places, drawn + level, most_likely + level)


def run_noise(losses: Array) -> tuple[float, int]:
    """Standard deviation of a single run's loss about its curve, and its degrees of freedom.

    losses [seeds, learning rates]. With one seed the third differences of the curve stand in for the noise; they
    overstate it.
    """
    if len(losses) == 1:
        third = np.diff(losses[0], n=3)  # of independent noise: 20 times its variance
        return float(np.sqrt(np.mean(third**2) / 20)), len(third)
    residual = losses - losses.mean(axis=0) - losses.mean(axis=1, keepdims=True) + losses.mean()
    freedom = (losses.shape[0] - 1) * (losses.shape[1] - 1)
    return float(np.sqrt((residual**2).sum() / freedom)), freedom


def _stable(grid: Array, losses: Array, around: tuple[float, float]) -> slice:
    """The stretch before seeds scatter far more than elsewhere: near divergence, their noise says nothing of the rest.

    Reaches two learning rates beyond `around` at least.
    """
    if len(losses) == 1:
        return slice(None)
    residual = losses - np.median(losses, axis=1, keepdims=True)
    scatter = residual.std(axis=0)
    unstable = np.flatnonzero(
        (scatter > _UNSTABLE * np.median(scatter)) & (grid > around[1] + 2.5 * (grid[1] - grid[0]))
    )
    return slice(0, unstable[0] if len(unstable) else len(grid))


def minimum_of(places: Array, curves: Array) -> tuple[Array, Array]:
    """Place and value [curves] of the minimum of curves [curves, places] on an even, fine grid."""
    best = curves.argmin(axis=1)
    centre = np.clip(best, 1, len(places) - 2)
    rows = np.arange(len(curves))
    left, middle, right = (curves[rows, centre + i] for i in (-1, 0, 1))
    curvature, slope = left - 2 * middle + right, (right - left) / 2
    inside = (best == centre) & (curvature > 0)
    shift = np.where(inside, -slope / np.where(inside, curvature, 1.0), best - centre)
    return (
        places[centre] + shift * (places[1] - places[0]),
        np.where(inside, middle - slope**2 / np.where(inside, curvature, 1.0) / 2, curves[rows, best]),
    )


def value_at(places: Array, curves: Array, place: Array) -> Array:
    """Value [curves] of each curve [curves, places] at a place of its own; infinite outside of `places`."""
    position = (place - places[0]) / (places[1] - places[0])
    inside = (position >= -1e-9) & (position <= len(places) - 1 + 1e-9)
    centre = np.clip(np.rint(np.where(inside, position, 1)).astype(np.intp), 1, len(places) - 2)
    rows = np.arange(len(curves))
    left, middle, right = (curves[rows, centre + i] for i in (-1, 0, 1))
    off = position - centre
    value = middle + (right - left) / 2 * off + (left - 2 * middle + right) / 2 * off**2
    return np.where(inside, value, np.inf)


def _log_prior(roughness: Array) -> Array:
    off = np.log(roughness / ROUGHNESS)
    smooth, jumps = stats.norm.logpdf(off, scale=ROUGHNESS_SPREAD), stats.norm.logpdf(off, scale=JUMPS_SPREAD)
    return np.logaddexp(np.log(1 - JUMPS) + smooth, np.log(JUMPS) + jumps)


class _Smoother(NamedTuple):
    """What draws need of the spline, for each ratio of roughness to noise; the noise of the mean is 1.

    `mean` [ratios, places, points] times the data is the most likely curve, `root` [ratios, places, rank] a root
    of its covariance; `misfit` [ratios, points, points] and `log_determinant` [ratios] make the likelihood.
    """

    places: Array
    mean: Array
    root: Array
    misfit: Array
    log_determinant: Array


@lru_cache(maxsize=64)
def _smoother(points: int, step: float) -> _Smoother:
    """Kriging with a free parabola: grid of so many points, so many octaves apart."""
    grid = np.arange(points) * step
    places = np.linspace(0, grid[-1], int(np.ceil(grid[-1] * _FINE)) + 1)
    among, across, between = _covariance(grid, grid), _covariance(places, grid), _covariance(places, places)
    middle = grid[-1] / 2
    parabola, parabola_at = np.vander(grid - middle, 3), np.vander(places - middle, 3)
    means, roots, misfits, determinants = [], [], [], []
    for ratio in _RATIOS:
        covariance = ratio * among + np.eye(points)
        inverse = np.linalg.inv(covariance)
        normal = parabola.T @ inverse @ parabola
        coefficients = np.linalg.solve(normal, parabola.T @ inverse)
        misfits.append(inverse - inverse @ parabola @ coefficients)
        means.append(parabola_at @ coefficients + ratio * across @ misfits[-1])
        remaining = parabola_at - ratio * across @ inverse @ parabola
        posterior = ratio * between - ratio**2 * across @ inverse @ across.T
        posterior += remaining @ np.linalg.solve(normal, remaining.T)
        values, vectors = np.linalg.eigh((posterior + posterior.T) / 2)
        roots.append(vectors[:, -_RANK:] * np.sqrt(np.maximum(values[-_RANK:], 0)))
        determinants.append(np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(normal)[1])
    return _Smoother(places, np.array(means), np.array(roots), np.array(misfits), np.array(determinants))


def _covariance(one: NDArray[Any], other: NDArray[Any]) -> Array:
    """Covariance [one, other] of curves whose third derivative is white noise from 0 on, of size 1 at the middle.

    ∫ r(v)² (s−v)₊² (t−v)₊² / 4 dv, where r grows with v; by Gauss's rule, whose error is far below any loss's noise.
    """
    end = max(one[-1], other[-1])
    nodes, weights = np.polynomial.legendre.leggauss(200)
    nodes, weights = (nodes + 1) * end / 2, weights * end / 2
    weights = weights * np.exp(2 * _GROWTH * (nodes - end / 2)) / 4
    from_one, from_other = (np.maximum(points[:, None] - nodes, 0) ** 2 for points in (one, other))
    return (from_one * weights) @ from_other.T
