"""How things scale with width: exponents of sizes, and three numbers that say how well a learning rate transfers.

D. S. Kalra and M. Barkeshli (arXiv 2605.21486) judge hyperparameter transfer by the quality of the scaling law's fit,
the robustness to extrapolation errors and the asymptotic loss penalty of a parametrization. These are the three
quantities of their abstract; how each is measured is our choice, said at each function, and their numbers need not
agree with ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from gdn_mup.study.estimates import TAIL, Estimate, Interval
from gdn_mup.study.optimum import Optimum, best_loss_differences, fit_line, standard_errors

Array = NDArray[np.float64]

_EXTRAPOLATION_ERROR = 0.5  # octaves off the optimum at which robustness looks


class Exponents(NamedTuple):
    """Width exponents and the ends of their 95 % intervals, each of the same shape."""

    value: Array
    low: Array
    high: Array


def width_exponent(widths: Sequence[int], sizes: ArrayLike) -> Exponents:
    """The power of width that a size grows with: least squares of log size on log width, seeds as blocks.

    widths [widths]; sizes [..., seeds, widths], positive, NaN where not measured. A factor that a seed has at every
    width moves no exponent. The interval is Student's, of what is left: noise and any departure from a power law, with
    (seeds × widths) − seeds − 1 degrees of freedom; NaN where that is not positive. This is statsmodels' OLS with
    a dummy variable per seed, for thousands of quantities at once.
    """
    size = np.asarray(sizes, np.float64)
    known = np.isfinite(size) & (size > 0)
    log_size = np.log(np.where(known, size, 1.0))
    log_width = np.broadcast_to(np.log(np.asarray(widths, np.float64)), size.shape)
    count = np.maximum(known.sum(axis=-1, keepdims=True), 1)

    def centred(values: Array) -> Array:
        return np.where(known, values - (values * known).sum(axis=-1, keepdims=True) / count, 0.0)

    x, y = centred(log_width), centred(log_size)
    square = (x**2).sum(axis=(-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(square > 1e-12, (x * y).sum(axis=(-2, -1)) / square, np.nan)
        residual = np.where(known, y - value[..., None, None] * x, 0.0)
        freedom = known.sum(axis=(-2, -1)) - known.any(axis=-1).sum(axis=-1) - 1
        spread = np.sqrt((residual**2).sum(axis=(-2, -1)) / freedom / square)
        half_width = np.where(freedom > 0, stats.t.isf(TAIL, np.maximum(freedom, 1)) * spread, np.nan)
    return Exponents(value, value - half_width, value + half_width)


def fit_error(widths: Sequence[int], optima: Sequence[Optimum]) -> Estimate:
    """How far the true optima lie from a power law of width: standard deviation about the line, in octaves.

    That is what remains of the scatter about `slope_against_width`'s line after each optimum's own uncertainty is
    taken out: the between-study variance of a meta-regression (R. C. Paule and J. Mandel, 1982), its interval by
    the Q-profile method (W. Viechtbauer, Statistics in Medicine 26, 2007). Three widths leave one degree of
    freedom and an upper end far away.
    """
    used, usable = _bracketed(widths, optima)
    if len(used) < 3:
        return Estimate(reason="fewer than three widths have an optimum")
    values = np.array([optimum.log2_learning_rate for optimum in usable])
    sizes = standard_errors(np.array([optimum.draws for optimum in usable]))
    freedom = len(used) - 2

    def scatter(extra: float) -> float:
        weights = 1 / np.hypot(sizes, extra)
        return float(np.polyfit(np.log2(used), values, 1, w=weights, full=True)[1][0])

    def where(target: float) -> float:
        if scatter(0.0) <= target:
            return 0.0
        far = 1.0
        while scatter(far) > target:
            far *= 4
        return float(optimize.brentq(lambda extra: scatter(extra) - target, 0.0, far, xtol=1e-4))

    low, high = (where(float(stats.chi2.ppf(p, freedom))) for p in (1 - TAIL, TAIL))
    return Estimate(where(float(freedom)), Interval(low, high))


def robustness_exponent(widths: Sequence[int], optima: Sequence[Optimum]) -> Estimate:
    """The power of width that the cost of an extrapolation error grows with.

    The cost at a width is the mean rise of the loss half an octave above and below the optimum (a step, on a coarser
    grid), in nats; the exponent is the slope of its log against log width. Below 0: the wider the model, the less a
    learning rate that is off costs.
    """
    used, usable = _bracketed(widths, optima)
    if len(used) < 2:
        return Estimate(reason="fewer than two widths have an optimum")
    error = max(_EXTRAPOLATION_ERROR, *(float(optimum.grid[1] - optimum.grid[0]) for optimum in usable))
    costs = []
    for width, optimum in zip(used, usable, strict=True):
        sides = [optimum.curves.at(optimum.draws + off) for off in (-error, error)]
        cost = np.mean(sides, axis=0) - optimum.loss_draws
        if not (np.isfinite(cost) & (cost > 0)).mean() > 1 - TAIL:
            return Estimate(reason=f"width {width}: no losses {error:.2g} octaves to either side of the optimum")
        costs.append(np.where(np.isfinite(cost) & (cost > 0), cost, np.median(cost)))
    draws = np.log(np.array(costs))
    line = fit_line(np.log(used), np.median(draws, axis=1), draws)
    return Estimate(line.slope, line.slope_interval)


def asymptotic_loss_penalty(widths: Sequence[int], optima: Sequence[Optimum], reference: Sequence[Optimum]) -> Estimate:
    """What a parametrization costs in the limit of infinite width, both at their best learning rates: nats per token.

    The difference of the best losses, `optima` less `reference` [widths], seeds paired, is taken to approach its limit
    like 1/width and extrapolated. Widths at which the two are the same models (the base width) say nothing and are left
    out.
    """
    pairs = [
        (width, one, other)
        for width, one, other in zip(widths, optima, reference, strict=True)
        if one.bracketed and other.bracketed and len(one.losses) == len(other.losses)
        if not np.array_equal(one.losses, other.losses)
    ]
    if len(pairs) < 2:
        return Estimate(reason="fewer than two widths at which both have an optimum and differ")
    draws = best_loss_differences([one for _, one, _ in pairs], [other for _, _, other in pairs])
    line = fit_line(1 / np.array([width for width, _, _ in pairs]), np.median(draws, axis=1), draws)
    return Estimate(line.intercept, line.intercept_interval)


def _bracketed(widths: Sequence[int], optima: Sequence[Optimum]) -> tuple[list[int], list[Optimum]]:
    kept = [(width, optimum) for width, optimum in zip(widths, optima, strict=True) if optimum.bracketed]
    return [width for width, _ in kept], [optimum for _, optimum in kept]
