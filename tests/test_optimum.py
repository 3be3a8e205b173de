"""The estimators at their edges, on synthetic curves whose truth is known; tests/test_coverage.py tests intervals."""

import re

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic import BEST_AT_BASE, SLOPES, excess_loss, in_memory, study

from gdn_mup.errors import UserError
from gdn_mup.study.optimum import Optimum, find_optimum, slope_against_width, transfer, transfer_regret, transfers


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


@pytest.mark.parametrize("spacing", [0.25, 0.5, 1.0])
def test_parabola_without_noise_is_found_as_exactly_as_the_grid_allows(spacing: float) -> None:
    grid = np.arange(-9.0, -2.0, spacing)
    found = find_optimum(grid, np.tile(3 + 0.2 * (grid + 5.3) ** 2, (3, 1)), np.random.default_rng(0))
    assert found.log2_learning_rate == pytest.approx(-5.3, abs=0.1 * spacing)
    assert found.loss == pytest.approx(3.0, abs=0.02 * spacing)
    assert -5.3 in found.interval
    # How a curve goes on between its points is not known, even without noise.
    assert 0.1 * spacing < found.interval.high - found.interval.low < spacing


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


def test_a_seed_that_falls_off_beyond_the_best_says_nothing_of_the_best() -> None:
    """SGD, larger heads, gdn_mup, width 1024 of study h200: one seed of three jumps by 0.9 nats half an octave on."""
    losses = np.array(
        [
            [3.027, 2.879, 2.696, 2.590, 2.467, 2.479, 3.876, 6.325],
            [3.128, 2.949, 2.775, 2.627, 2.481, 3.396, 5.589, 6.227],
            [3.023, 2.810, 2.649, 2.514, 2.462, 2.455, 4.392, 6.160],
        ]
    )
    found = find_optimum(np.arange(0.0, 4.0, 0.5), losses, np.random.default_rng(0))
    assert found.loss <= losses[:, 4].mean() + losses[:, 4].std(ddof=1) / np.sqrt(3)
    assert 1.5 < found.log2_learning_rate < 2.3
    assert found.interval.high < 2.6


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


def test_regret_where_the_transferred_learning_rate_is_far_away() -> None:
    """Three and a half octaves off."""
    random, grid = np.random.default_rng(1), np.arange(-12.0, -1.0, 0.5)
    base, wide = (find_optimum(grid, draw_losses(best, grid, 3, 0.005, random), random) for best in (-3.6, -7.1))
    regret = transfer_regret(wide, base)
    assert float(excess_loss(np.array([3.5]))[0]) in regret.interval
    assert regret.interval.high - regret.interval.low < 0.5


def test_regret_where_the_transferred_learning_rate_was_not_tried() -> None:
    random, low, high = np.random.default_rng(1), np.arange(-12.0, -5.0), np.arange(-7.0, -1.0)
    wide, base = (
        find_optimum(grid, draw_losses(best, grid, 3, 0.005, random), random)
        for grid, best in ((low, -8.0), (high, -4.0))
    )
    assert "was not tried" in transfer_regret(wide, base).reason


def test_optima_off_the_line_widen_the_slope() -> None:
    random, grid = np.random.default_rng(2), np.arange(-9.0, -1.0, 0.5)
    optima = [find_optimum(grid, draw_losses(best, grid, 3, 0.005, random), random) for best in (-5, -4.5, -5, -4.5)]
    on_a_line = slope_against_width([32, 64], optima[:2]).interval
    scattered = slope_against_width([32, 64, 128, 256], optima).interval
    assert scattered.high - scattered.low > on_a_line.high - on_a_line.low


def test_slope_needs_two_widths() -> None:
    random, grid = np.random.default_rng(0), np.arange(-9.0, -2.0)
    bracketed = find_optimum(grid, draw_losses(-5, grid, 3, 0.005, random), random)
    assert bracketed.bracketed
    slope = slope_against_width([32, 64], [bracketed, Optimum(reason="every learning rate diverges")])
    assert np.isnan(slope.value)
    assert "width 64: every learning rate diverges" in slope.reason


def test_absent_sweep_is_named() -> None:
    dataset = in_memory(study(), "lr_sweep").sel(optimizer=["adamw"])
    assert transfer(dataset, "head_dim", "adamw", "sp") is None
    with pytest.raises(UserError, match=r"no learning-rate sweep with optimizer `sgd`.*add one under `sweeps`"):
        transfers(dataset, optimizer="sgd")
