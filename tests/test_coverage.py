"""95 % intervals against the truth: each must cover it in 92 to 98 % of 1 000 studies that are made up.

The curves are like those of real sweeps, of four families that the estimators know nothing of; half of them end in an
edge, as sweeps of small models do. Noise is 0.005 to 0.03 nats a run, of which a seed's neighbouring learning rates
share a part, and up to three times that where the loss is high; three to five seeds. The truth is that of the curve
without noise; the grid lies anywhere relative to it. Every test prints what it measured, limits too: single families,
and curves that fall off a cliff.
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit

from gdn_mup.study import loss_curve
from gdn_mup.study.optimum import Interval, Optimum, find_optimum, slope_against_width, transfer_regret
from gdn_mup.study.width_fit import asymptotic_loss_penalty, fit_error, robustness_exponent

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]

STUDIES = 1000
LEAST, MOST = 92.0, 98.0  # % of intervals that may cover
BEST_LOSS = 3.4
SHARED_NOISE = 0.02  # nats, of a seed at all learning rates


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coverage over a thousand studies needs no fine percentiles."""
    monkeypatch.setattr(loss_curve, "DRAWS", 200)


class Coverage:
    """Intervals against their truth, by what they are of."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[float, Interval]]] = defaultdict(list)

    def add(self, what: str, truth: float, interval: Interval) -> None:
        self.seen[what].append((truth, interval))

    def check(self, capsys: pytest.CaptureFixture[str], least: float = LEAST, most: float = MOST) -> None:
        """Print a line for each quantity, then hold all to the limits."""
        covered = {}
        lines = []
        for what, seen in self.seen.items():
            truth, low, high = (np.array(values) for values in zip(*((t, *i) for t, i in seen), strict=True))
            covered[what] = 100 * float(np.mean((low <= truth) & (truth <= high)))
            below, above = 100 * np.mean(high < truth), 100 * np.mean(low > truth)
            lines.append(
                f"{what:58} covers {covered[what]:5.1f} % (below {below:3.1f}, above {above:3.1f}) of {len(seen)}, "
                f"mean width {np.mean(high - low):.3f}"
            )
        with capsys.disabled():
            print("", *lines, sep="\n")
        assert all(least <= share <= most for share in covered.values()), covered


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def bends(random: np.random.Generator) -> Curve:
    """Straight lines joined by bends of different sharpness."""
    left, right, cliff = random.uniform(0.3, 0.6), random.uniform(0.3, 0.8), random.uniform(0.2, 1.0)
    soft_left, soft_right, soft_cliff = random.uniform(0.4, 1.1), random.uniform(0.3, 0.9), random.uniform(0.2, 0.5)
    bend, edge = random.uniform(-1.0, 0.5), random.uniform(0.5, 2.5)
    return lambda u: (
        left * soft_left * softplus(-(u - bend) / soft_left)
        + right * soft_right * softplus(u / soft_right)
        + cliff * soft_cliff * softplus((u - edge) / soft_cliff)
    )


def plateau(random: np.random.Generator) -> Curve:
    """Hyperbolas and, beyond an edge, a plateau 0.8 to 2 nats up, as where training all but diverges."""
    left, soft_left = random.uniform(0.3, 0.6), random.uniform(0.6, 2.0)
    right, soft_right = random.uniform(0.1, 0.5), random.uniform(0.6, 2.0)
    height, edge, soft_edge = random.uniform(0.8, 2.0), random.uniform(0.8, 2.5), random.uniform(0.3, 0.7)
    return lambda u: (
        left / 2 * (np.sqrt(u**2 + soft_left**2) - u)
        + right / 2 * (np.sqrt(u**2 + soft_right**2) + u)
        + height * expit((u - edge) / soft_edge)
    )


def sharp(random: np.random.Generator) -> Curve:
    """A bend of a third of an octave, sharper than in any of our sweeps."""
    left, right = random.uniform(0.4, 0.6), random.uniform(0.6, 1.0)
    soft_left, soft_right = random.uniform(0.3, 0.5), random.uniform(0.2, 0.4)
    return lambda u: left * soft_left * softplus(-u / soft_left) + right * soft_right * softplus(u / soft_right)


def from_its_best(curve: Curve) -> Curve:
    """The curve above its minimum, which is moved to 0."""
    fine = np.linspace(-4, 3, 1401)
    best = fine[curve(fine).argmin()]
    for reach in (1e-2, 1e-4):
        fine = np.linspace(best - reach, best + reach, 201)
        best = fine[curve(fine).argmin()]
    least = curve(np.array([best]))[0]
    return lambda u: curve(u + best) - least


def edge(random: np.random.Generator, place: float | None = None, width: float | None = None) -> Curve:
    """Gentle bends up to an edge, where the loss jumps by 0.1 to 0.6 nats within 0.1 to 0.6 octaves, as under SGD."""
    left, soft_left = random.uniform(0.2, 0.5), random.uniform(0.4, 1.1)
    right, soft_right = random.uniform(0.05, 0.3), random.uniform(0.3, 1.1)
    height = random.uniform(0.1, 0.6)
    place = random.uniform(-0.2, 2.5) if place is None else place
    width = random.uniform(0.1, 0.6) if width is None else width
    return lambda u: (
        left * soft_left * softplus(-u / soft_left)
        + right * soft_right * softplus(u / soft_right)
        + height * expit(4 * (u - place) / width)
    )


FAMILIES = {"bends": bends, "plateau": plateau, "edge": edge, "sharp": sharp}


# What a sweep is made of: half of those that were run have an edge (all of SGD's, and AdamW's under SP).
MIX = ("edge", "bends", "edge", "plateau", "edge", "sharp")


def realistic(random: np.random.Generator, family: str = "") -> Curve:
    """A curve of one of the families: excess loss [nats] as a function of octaves from the optimum."""
    return from_its_best(FAMILIES[family or random.choice(MIX)](random))


def some_noise(random: np.random.Generator) -> float:
    """0.005 to 0.03 nats; sweeps of small models have 0.01 to 0.03 near their optima."""
    return float(random.uniform(0.005, 0.03))


def run(grid: Array, excess: Array, seeds: Array, noise: float, random: np.random.Generator) -> Array:
    """Losses [seeds, learning rates] of a sweep whose seeds have these offsets [seeds].

    Up to four fifths of the noise's variance are a seed's own curve, smooth over an octave; runs half a nat and more
    above the best have up to three times the noise.
    """
    shared, unstable = random.uniform(0, 0.8), random.uniform(1, 3)
    alike = np.exp(-((grid[:, None] - grid) ** 2) / 2)
    root = np.linalg.cholesky(shared * alike + (1 - shared) * np.eye(len(grid)))
    normal = random.standard_normal((len(seeds), len(grid))) @ root.T
    return BEST_LOSS + excess + seeds[:, None] + noise * np.where(excess < 0.5, 1.0, unstable) * normal


def grid_around(low: float, high: float, spacing: float, random: np.random.Generator) -> Array:
    """A grid that reaches four octaves below and three above optima between `low` and `high`."""
    return np.arange(low - 4, high + 3.01, spacing) + random.uniform(-spacing / 2, spacing / 2)


def optimum_of(curve: Curve, spacing: float, seeds: int, noise: float, random: np.random.Generator) -> Optimum:
    grid = grid_around(0, 0, spacing, random)
    return find_optimum(grid, run(grid, curve(grid), random.normal(0, SHARED_NOISE, seeds), noise, random), random)


@pytest.mark.parametrize("spacing", [0.5, 1.0])
def test_optimum_and_its_loss(spacing: float, capsys: pytest.CaptureFixture[str]) -> None:
    random, coverage, by_family = np.random.default_rng(1), Coverage(), Coverage()
    for study in range(STUDIES):
        family, seeds = MIX[study % 6], 3 + study // 6 % 3
        found = optimum_of(realistic(random, family), spacing, seeds, some_noise(random), random)
        assert found.bracketed
        coverage.add(f"log2 optimum, {spacing} octaves", 0.0, found.interval)
        coverage.add(f"loss there, {spacing} octaves", BEST_LOSS, found.loss_interval)
        by_family.add(f"  log2 optimum, {family}", 0.0, found.interval)
    # Which family a sweep is of is not known, so that none can have an interval of its own: these cover more or less.
    by_family.check(capsys, least=88, most=100)
    coverage.check(capsys)


@pytest.mark.parametrize("spacing", [0.5, 1.0])
def test_limit_where_the_curve_falls_off_a_cliff(spacing: float, capsys: pytest.CaptureFixture[str]) -> None:
    """A jump within a twentieth of an octave, right above the optimum: no grid sees on which side a point lies."""
    random, coverage = np.random.default_rng(2), Coverage()
    for study in range(STUDIES):
        curve = from_its_best(edge(random, place=random.uniform(-0.2, 0.5), width=0.05))
        found = optimum_of(curve, spacing, 3 + study % 3, some_noise(random), random)
        if found.bracketed:
            coverage.add(f"log2 optimum below a cliff, {spacing} octaves", 0.0, found.interval)
    coverage.check(capsys, least=85)


@pytest.mark.parametrize("spacing", [0.5, 1.0])
def test_slope_and_transfer_regret(spacing: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Three widths, whose curves have shapes of their own; regret after one doubling and after two."""
    random, coverage = np.random.default_rng(3), Coverage()
    for study in range(STUDIES):
        slope, seeds = (0.0, -0.4, -1.0)[study % 3], 3 + study % 2
        grid, noise = grid_around(2 * slope, 0, spacing, random), some_noise(random)
        shapes = [realistic(random) for _ in range(3)]
        optima = [
            find_optimum(
                grid, run(grid, shape(grid - slope * i), random.normal(0, SHARED_NOISE, seeds), noise, random), random
            )
            for i, shape in enumerate(shapes)
        ]
        if not all(optimum.bracketed for optimum in optima):
            continue
        coverage.add(f"slope, {spacing} octaves", slope, slope_against_width([32, 64, 128], optima).interval)
        for i in (1, 2):
            truth = float(shapes[i](np.array([-slope * i]))[0])
            regret = transfer_regret(optima[i], optima[0], random)
            coverage.add(f"regret after {i} doublings, {spacing} octaves", truth, regret.interval)
    assert all(len(seen) > 0.98 * STUDIES for seen in coverage.seen.values())
    coverage.check(capsys)


def test_metrics_of_transfer(capsys: pytest.CaptureFixture[str]) -> None:
    """Four widths; costs of being off the optimum change like width^κ, and a second rule set loses in the limit."""
    random, coverage = np.random.default_rng(4), Coverage()
    widths, kappa, limit, correction, drift = [64, 128, 256, 512], -0.3, 0.03, 2.0, 0.2
    penalized = (widths[0], widths[-1])
    for _ in range(STUDIES):
        grid, noise = grid_around(-1, 1, 0.5, random), some_noise(random)
        optima, worse = [], []
        for width, off in zip(widths, random.normal(0, drift, len(widths)), strict=True):
            shape = realistic(random)
            cost = 0.2 * (width / 64) ** kappa  # nats an octave off, mean of both sides
            excess = cost / shape(np.array([-1.0, 1.0])).mean() * shape(grid - off)
            seeds = random.normal(0, SHARED_NOISE, 3)
            optima.append(find_optimum(grid, run(grid, excess, seeds, noise, random), random))
            if width in penalized:
                penalty = limit + correction / width
                worse.append(find_optimum(grid, run(grid, excess + penalty, seeds, noise, random), random))
        if not all(optimum.bracketed for optimum in [*optima, *worse]):
            continue
        coverage.add("fit error", drift, fit_error(widths, optima).interval)
        if not (robustness := robustness_exponent(widths, optima)).reason:
            coverage.add("robustness exponent", kappa, robustness.interval)
        coverage.add("asymptotic penalty", limit, asymptotic_loss_penalty(penalized, worse, optima[::3]).interval)
    assert all(len(seen) > 0.95 * STUDIES for seen in coverage.seen.values())
    coverage.check(capsys)
