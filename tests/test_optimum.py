"""The estimators against synthetic curves whose truth is known."""

import re

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic import BEST_AT_BASE, SLOPES, excess_loss, in_memory, study

from gdn_mup.errors import UserError
from gdn_mup.study import optimum as estimators
from gdn_mup.study.optimum import Optimum, find_optimum, slope_against_width, transfer, transfer_regret, transfers

DRAWS = 300


def draw_losses(
    best: float, grid: NDArray[np.float64], seeds: int, noise: float, random: np.random.Generator
) -> NDArray[np.float64]:
    """Losses [seeds, learning rates]: a common curve, an offset per seed that moves no optimum, and noise."""
    return (
        3.4
        + excess_loss(grid - best)
        + random.normal(0, 0.02, (seeds, 1))
        + random.normal(0, noise, (seeds, len(grid)))
    )


def draw_optimum(best: float, spacing: float, seeds: int, noise: float, random: np.random.Generator) -> Optimum:
    """The estimate from a grid that lies anywhere relative to the truth."""
    grid = np.arange(-4, 3.01, spacing) + best + random.uniform(-spacing / 2, spacing / 2)
    return find_optimum(grid, draw_losses(best, grid, seeds, noise, random), random)


def check_coverage(what: str, hits: list[bool], lengths: list[float], low: float, high: float) -> None:
    coverage = 100 * float(np.mean(hits))
    print(f"{what}: {coverage:.1f} % of {len(hits)} 95 % intervals cover, median length {np.median(lengths):.3f}")
    assert low <= coverage <= high


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Coverage over hundreds of studies needs no fine percentiles."""
    if "covers" in request.node.name:
        monkeypatch.setattr(estimators, "DRAWS", 500)


@pytest.mark.parametrize("noise", [0.005, 0.02])
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spacing", [0.5, 1.0])
def test_optimum_interval_covers(spacing: float, seeds: int, noise: float) -> None:
    # At an octave's spacing and little noise the error is the grid's, which the interval bounds generously.
    random = np.random.default_rng(7)
    hits, lengths = [], []
    for _ in range(DRAWS):
        truth = random.uniform(-8, -4)
        found = draw_optimum(truth, spacing, seeds, noise, random)
        assert found.bracketed
        hits.append(truth in found.interval)
        lengths.append(found.interval.high - found.interval.low)
    generous = spacing == 1.0 and noise == 0.005
    check_coverage(f"optimum, {spacing} octaves, {seeds} seeds", hits, lengths, 90, 100 if generous else 99)


@pytest.mark.parametrize("slope", [0.0, -0.4, -1.0])
def test_slope_and_regret_intervals_cover(slope: float) -> None:
    """The grid lies anywhere relative to each width's optimum, as when optima move by a fraction of it."""
    random = np.random.default_rng(11)
    hits: dict[str, list[bool]] = {"slope": [], "regret": []}
    lengths: dict[str, list[float]] = {"slope": [], "regret": []}
    regret = float(excess_loss(np.array([-slope]))[0])
    for _ in range(DRAWS):
        optima = [draw_optimum(-6 + slope * i, 0.5, 3, 0.01, random) for i in range(3)]
        estimates = {
            "slope": (slope, slope_against_width([32, 64, 128], optima).interval),
            "regret": (regret, transfer_regret(optima[1], optima[0]).interval),
        }
        for name, (truth, interval) in estimates.items():
            hits[name].append(truth in interval)
            lengths[name].append(interval.high - interval.low)
    for name in hits:
        check_coverage(f"{name}, truth {slope} octaves per doubling", hits[name], lengths[name], 90, 100)


def test_exact_parabola_is_found_exactly() -> None:
    grid = np.arange(-9.0, -2.0)
    found = find_optimum(grid, np.tile(3 + 0.2 * (grid + 5.3) ** 2, (3, 1)), np.random.default_rng(0))
    assert found.log2_learning_rate == pytest.approx(-5.3)
    assert found.loss == pytest.approx(3.0)
    assert found.interval == pytest.approx((-5.3, -5.3), abs=0.01)


@pytest.mark.parametrize(
    ("best", "reason"),
    [(-3.0, r"best at 2\^-4, the highest of the grid"), (-10.0, r"best at 2\^-9, the lowest of the grid")],
)
def test_edge_of_the_grid_is_not_bracketed(best: float, reason: str) -> None:
    grid = np.arange(-9.0, -3.0)
    found = find_optimum(grid, np.tile(excess_loss(grid - best), (3, 1)), np.random.default_rng(0))
    assert not found.bracketed
    assert np.isnan(found.log2_learning_rate)
    assert re.search(reason, found.reason)


def test_edge_of_divergence_is_not_bracketed() -> None:
    grid = np.arange(-9.0, -2.0)
    losses = np.tile(excess_loss(grid + 4), (3, 1))
    losses[1, grid > -4.5] = np.nan  # one seed is enough
    found = find_optimum(grid, losses, np.random.default_rng(0))
    assert "2^-5, next to divergence" in found.reason


def test_noise_that_reaches_the_edge_is_not_bracketed() -> None:
    grid = np.arange(-9.0, -3.0)
    random = np.random.default_rng(0)
    losses = draw_losses(-4.9, grid, 3, 0.3, random)
    losses += np.where(grid == -5, -0.3, 0)  # the mean's best is inside, barely
    found = find_optimum(grid, losses, random)
    assert "noise alone could place the best at" in found.reason


def test_everything_diverges() -> None:
    found = find_optimum(np.arange(4.0), np.full((2, 4), np.nan), np.random.default_rng(0))
    assert found.reason == "every learning rate diverges"


def test_one_seed_has_an_interval_and_a_wider_one() -> None:
    dataset = in_memory(study(), "lr_sweep")
    three = transfer(dataset, "heads", "adamw", "mup")
    one = transfer(dataset.isel(seed=[0]), "heads", "adamw", "mup")
    assert three and one
    for width in three.widths:
        lengths = [s.optima[width].interval.high - s.optima[width].interval.low for s in (one, three)]
        assert lengths[0] > lengths[1] > 0


def test_slopes_of_a_study_are_recovered() -> None:
    for sweep in transfers(in_memory(study(), "lr_sweep"), optimizer="adamw"):
        assert SLOPES[sweep.rules] in sweep.slope.interval
        assert sweep.optima[32].log2_learning_rate == pytest.approx(BEST_AT_BASE, abs=0.1)
        assert sweep.slope.value == pytest.approx(SLOPES[sweep.rules], abs=0.1)


def test_rule_sets_coincide_at_the_base_width() -> None:
    optima = [sweep.optima[32] for sweep in transfers(in_memory(study(), "lr_sweep"), optimizer="adamw")]
    assert len(optima) == 4
    assert {(o.log2_learning_rate, o.interval) for o in optima} == {(optima[0].log2_learning_rate, optima[0].interval)}


def test_same_data_give_the_same_numbers() -> None:
    dataset = in_memory(study(), "lr_sweep")
    first, second = (transfer(dataset, "heads", "adamw", "sp") for _ in range(2))
    assert first and second
    assert first.slope == second.slope
    assert first.optima[64].interval == second.optima[64].interval


def test_regret_where_the_transferred_learning_rate_diverges() -> None:
    sweep = transfer(in_memory(study(), "lr_sweep"), "heads", "adamw", "sp")
    assert sweep
    assert sweep.regrets[32].value == 0
    assert float(excess_loss(np.array([1.0]))[0]) in sweep.regrets[64].interval
    assert np.isinf(sweep.regrets[128].value)


def test_slope_needs_two_widths() -> None:
    random = np.random.default_rng(0)
    bracketed = draw_optimum(-5, 1.0, 3, 0.005, random)
    slope = slope_against_width([32, 64], [bracketed, Optimum(reason="every learning rate diverges")])
    assert np.isnan(slope.value)
    assert "width 64: every learning rate diverges" in slope.reason


def test_absent_sweep_is_named() -> None:
    dataset = in_memory(study(), "lr_sweep").sel(optimizer=["adamw"])
    assert transfer(dataset, "head_dim", "adamw", "sp") is None
    with pytest.raises(UserError, match=r"no learning-rate sweep with optimizer `sgd`.*add one under `sweeps`"):
        transfers(dataset, optimizer="sgd")
