"""A loss curve between and around the learning rates that were tried: draws of what it may look like.

The mean over seeds is known at the grid up to noise; between the grid points something has to be assumed. Here:
training is regular up to an edge, and anything may happen beyond it.

below the edge  The curvature in log₂ learning rate changes like a random walk, so that the curve is a smoothing spline
                (G. Wahba, Spline Models for Observational Data, 1990, chapter 1: such a spline and a Gaussian process
                are one). Level, slope and curvature themselves are free.
beyond it       The loss jumps upwards, by an unknown height at an unknown place between two learning rates, and is
                jagged: nothing is read off it for the curve below, and it is what was measured, joined by straight
                lines. SGD sweeps near the edge of stability look like this, AdamW sweeps at high learning rates too.

Four things are uncertain and are averaged over, by their likelihood:

noise       the standard deviation of a single run about its curve, and how much of it neighbouring learning rates
            share: all learning rates of a seed share init and batches, so that each seed has an optimum of its own.
            What is the same at all learning rates moves no optimum and is taken out. Runs beyond the edge have a
            noise of their own.
roughness   by how much the curvature changes along an octave; more at higher learning rates, since loss curves are
            gentle below the optimum and sharp above. With few points the data say little, so it has a prior, set
            such that intervals cover on curves with the slopes and bends of real sweeps.
edge        whether there is one, between which learning rates, and where between them.

Measured by tests/test_coverage.py, which prints it. Intervals of the optimum cover where curves of all kinds are mixed.
Which kind a sweep is of is not known beforehand, so that single kinds are covered more or less: smooth curves in 98 to
100 % of studies, those with an edge in about 95 %, and those that fall off a cliff within a twentieth of an octave
right above the optimum in about 92 %, at half octaves and octaves alike. There intervals are as wide as the grid's
spacing and more: only a finer grid tells where the cliff is.

Draws carry noise and grid at once, and nothing is resampled: three seeds have too few distinct resamples.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

DRAWS = 2000
ROUGHNESS = 0.06  # median of the prior at the middle of the curve, nats per octave^2.5
ROUGHNESS_SPREAD = 0.7  # its standard deviation in log e
EDGE = 0.25  # share of curves that have an edge
FEWEST_POINTS = 4  # three are any parabola: the roughness would be the prior's alone

_GROWTH = 0.1  # of log e roughness per octave: losses bend more sharply towards divergence
_REACH = 2.5  # octaves on either side of what is asked for that have a say
_FINE = 16  # points per octave at which curves are drawn
_RANK = 14  # of the spline's departure from a parabola; what is left out is below 1e-6 of it
_VAGUE = 1e8  # variance of level, slope and curvature over that of the noise
_STRIDE = stats.t(df=2, scale=0.1)  # nats from one learning rate to the next from the edge on
_REGULAR = 3  # learning rates below an edge at least
_SHARED = (0.0, 0.7)  # shares of the noise's variance that neighbouring learning rates may have in common
_SHARED_OVER = 1.0  # octaves over which that falls by a factor e
_RATIOS = np.exp(np.arange(np.log(1e-4), np.log(1e7), 1.0))  # roughness² over noise², per octave^5
_NOISES = np.exp(np.linspace(-0.9, 1.5, 11))  # noise over its estimate: 0.4 to 5
_LEAST_NOISE = 1e-4  # nats: synthetic losses may have none


class Curves(NamedTuple):
    """Draws of a loss curve. `places` [places]: log₂ learning rates, ascending; `losses` [draws, places]; `middle`
    [places]: the median of the draws."""

    places: Array
    losses: Array
    middle: Array

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
    spline = _spline(len(grid), round(step, 9))
    mean = losses.mean(axis=0)
    level = mean.mean()
    off = mean - level

    # Log posterior [ratios, cases, noises]: scatter of the seeds, restricted likelihood of their mean, priors.
    noise, of_scatter, noise_beyond = _scatter(losses, spline)
    of_mean = noise * _NOISES / np.sqrt(len(losses))
    misfit = np.einsum("i,rcij,j->rc", off, spline.misfit, off)
    strides = np.append(np.cumsum(_STRIDE.logpdf(np.diff(mean))[::-1])[::-1], 0.0)
    roughness = np.sqrt(_RATIOS)[:, None] * of_mean
    log_weights = (
        of_scatter
        - (spline.edges[:, None] - 2) * np.log(of_mean)
        - spline.log_determinant[:, :, None] / 2
        - misfit[:, :, None] / of_mean**2 / 2
        + stats.norm.logpdf(np.log(roughness / ROUGHNESS), scale=ROUGHNESS_SPREAD)[:, None, :]
        + (spline.log_prior + strides[spline.edges])[:, None]
    )
    downwards = (spline.jump @ off < 0) & (spline.edges < len(grid) - 1)
    log_weights = np.where(downwards[:, :, None], -np.inf, log_weights)
    weights = np.exp(log_weights - log_weights.max()).ravel()
    chosen = random.choice(weights.size, DRAWS, p=weights / weights.sum())
    ratio, case, level_of_noise = np.unravel_index(chosen, log_weights.shape)

    normal = random.standard_normal((DRAWS, spline.root.shape[-1])) * of_mean[level_of_noise, None]
    coefficients = spline.mean[ratio, case] @ off + np.einsum("dij,dj->di", spline.root[ratio, case], normal)
    regular = coefficients @ spline.basis.T

    # Beyond the edge, which lies anywhere between two learning rates: what was measured there.
    measured = off + noise_beyond[case, None] / np.sqrt(len(losses)) * random.standard_normal((DRAWS, len(grid)))
    last = spline.edges[case]
    beyond = spline.places > step * (last + random.uniform(0, 1, DRAWS))[:, None]
    ahead = np.maximum(spline.places, step * (last + 1)[:, None]) / step
    left = np.minimum(ahead.astype(np.intp), len(grid) - 2)
    rows = np.arange(DRAWS)[:, None]
    joined = measured[rows, left] + (ahead - left) * (measured[rows, left + 1] - measured[rows, left])
    drawn = np.where(beyond, joined, regular) + level
    return Curves(grid[0] + spline.places, drawn, np.median(drawn, axis=0))


def _scatter(losses: Array, spline: "_Spline") -> tuple[float, Array, Array]:
    """What the scatter of seeds says of noise: an estimate; log likelihood [cases, noises]; noise beyond [cases].

    losses [seeds, learning rates]. With one seed the third differences of the curve stand in for the noise; they
    overstate it.
    """
    (seeds, points), cases = losses.shape, len(spline.edges)
    if seeds == 1:
        third = np.diff(losses[0], n=3)  # of independent noise: 20 times its variance
        noise = max(float(np.sqrt(np.median(third**2) / stats.chi2.median(1) / 20)), _LEAST_NOISE)
        likelihood = -len(third) * (np.log(noise * _NOISES) + _NOISES**-2.0 / 2)
        return noise, np.tile(likelihood, (cases, 1)), np.full(cases, noise)
    residual = losses - losses.mean(axis=0)
    # Medians: what a seed shares between learning rates must not come from runs beyond the edge.
    squares = ((residual - np.median(residual, axis=1, keepdims=True)) ** 2).sum(axis=0)
    noise = max(float(np.sqrt(np.median(squares) / (seeds - 1))), _LEAST_NOISE)
    noises = noise * _NOISES
    below = np.einsum("si,cij,sj->c", residual, spline.scatter, residual)[:, None]
    freedom = ((seeds - 1) * spline.edges)[:, None]
    beyond = (squares * (np.arange(points) > spline.edges[:, None])).sum(axis=1)[:, None]
    freedom_beyond = (seeds - 1) * (points - 1) - freedom
    noise_beyond = np.sqrt((beyond + noise**2) / (freedom_beyond + 1))
    or_noise = np.maximum(noise_beyond, noises)
    likelihood = (
        -freedom * np.log(noises)
        - below / noises**2 / 2
        - (seeds - 1) * spline.log_determinant_of_scatter[:, None] / 2
        - freedom_beyond * np.log(or_noise)
        - beyond / or_noise**2 / 2
    )
    return noise, likelihood, noise_beyond[:, 0]


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
    left = np.clip(np.where(inside, position, 0), 0, len(places) - 2).astype(np.intp)
    rows = np.arange(len(curves))
    value = curves[rows, left] + (position - left) * (curves[rows, left + 1] - curves[rows, left])
    return np.where(inside, value, np.inf)


class _Spline(NamedTuple):
    """A spline as a linear model, conditioned for each ratio of roughness to noise and each case: where the edge is and
    how much of the noise neighbours share. The noise of the mean is 1.

    `basis` [places, terms] times coefficients is the curve at `places` [places], the grid starting at 0. `edges`
    [cases] index the last regular learning rate, the last of all if there is no edge; `log_prior` [cases].
    `mean` [ratios, cases, terms, points] times the data is the coefficients' mean, `root` [ratios, cases, terms, terms]
    a root of their covariance. `misfit` [ratios, cases, points, points] and `log_determinant` [ratios, cases] make the
    likelihood of the mean over seeds, `scatter` [cases, points, points] and `log_determinant_of_scatter` [cases] that
    of a seed's departures from it. `jump` [ratios, cases, points] times the data has the sign of the jump's height.
    """

    places: Array
    basis: Array
    edges: NDArray[np.intp]
    log_prior: Array
    mean: Array
    root: Array
    misfit: Array
    log_determinant: Array
    scatter: Array
    log_determinant_of_scatter: Array
    jump: Array


@lru_cache(maxsize=64)
def _spline(points: int, step: float) -> _Spline:
    """For a grid of so many points, so many octaves apart."""
    fine = max(2, round(step * _FINE))  # places per step, so that the grid is among them
    places = np.arange(fine * (points - 1) + 1) * step / fine
    values, vectors = np.linalg.eigh(_covariance(places, places))
    middle = (places - places[-1] / 2) / places[-1]
    basis = np.column_stack([np.vander(middle, 3), vectors[:, -_RANK:] * np.sqrt(np.maximum(values[-_RANK:], 0))])
    at_grid = basis[::fine]
    of_edge = np.arange(_REGULAR - 1, points)
    edge_prior = np.append(np.full(len(of_edge) - 1, EDGE / max(len(of_edge) - 1, 1)), 1 - EDGE)
    edges, shares = (each.ravel() for each in np.meshgrid(of_edge, _SHARED, indexing="ij"))

    distance = places[::fine, None] - places[::fine]
    alike = np.exp(-np.abs(distance) / _SHARED_OVER)
    beyond = (np.arange(points) > edges[:, None]).astype(float)
    noise = (1 - shares)[:, None, None] * np.eye(points) + shares[:, None, None] * alike
    weight = np.zeros_like(noise)  # the inverse among regular learning rates alone
    log_determinant_of_noise = np.empty(len(edges))
    for i, last in enumerate(edges):
        regular = slice(0, last + 1)
        weight[i, regular, regular] = np.linalg.inv(noise[i, regular, regular])
        log_determinant_of_noise[i] = np.linalg.slogdet(noise[i, regular, regular])[1]
    row, total = weight.sum(axis=-1), weight.sum(axis=(-1, -2))

    prior = np.repeat(1 / _RATIOS[:, None], 3 + _RANK, axis=1)
    prior[:, :3] = 1 / _VAGUE
    fitted = weight @ at_grid
    precision = at_grid.T @ fitted + np.eye(basis.shape[1]) * prior[:, None, :, None]
    posterior = np.linalg.inv(precision)
    mean = posterior @ fitted.swapaxes(-1, -2)
    return _Spline(
        places=places,
        basis=basis,
        edges=edges,
        log_prior=np.log(np.repeat(edge_prior, len(_SHARED)) / len(_SHARED)),
        mean=mean,
        root=np.asarray(np.linalg.cholesky((posterior + posterior.swapaxes(-1, -2)) / 2), np.float64),
        misfit=weight - fitted @ mean,
        log_determinant=np.linalg.slogdet(precision)[1] - np.log(prior).sum(axis=1)[:, None] + log_determinant_of_noise,
        scatter=weight - row[:, :, None] * row[:, None, :] / total[:, None, None],
        log_determinant_of_scatter=log_determinant_of_noise + np.log(total),
        jump=(beyond[:, None, :] @ (np.eye(points) - at_grid @ mean))[:, :, 0],
    )


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
