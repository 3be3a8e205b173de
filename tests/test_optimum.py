"""The estimators against synthetic curves whose truth is known."""

from collections.abc import Iterator

import numpy as np
import pytest
import xarray as xr
from synthetic import BEST_AT_BASE, SLOPES, excess_loss, in_memory, study

from gdn_mup.errors import UserError
from gdn_mup.study.optimum import (
    Optimum,
    find_optimum,
    slope_against_width,
    transfer,
    transfer_regret,
    transfers,
)

DRAWS = 300
WIDTHS = (32, 64, 128, 256)


def draw_losses(
    best: float, grid: np.ndarray, seeds: int, noise: float, random: np.random.Generator, floor: float = 3.4
) -> np.ndarray:
    """Losses [seeds, learning rates] with a spread between seeds that does not move the optimum."""
    offsets = random.normal(0, 0.02, (seeds, 1))
    return floor + excess_loss(grid - best) + offsets + random.normal(0, noise, (seeds, len(grid)))


def draw_optimum(best: float, spacing: float, seeds: int, noise: float, random: np.random.Generator) -> Optimum:
    """The estimate from a grid that lies anywhere relative to the truth."""
    grid = np.arange(-4, 3.01, spacing) + best + random.uniform(-spacing / 2, spacing / 2)
    return find_optimum(grid, draw_losses(best, grid, seeds, noise, random), random)


def settings() -> Iterator[tuple[float, int, float]]:
    """Grid spacing in octaves, seeds, noise of a run in nats."""
    for spacing in (0.5, 1.0):
        for seeds in (2, 3, 5):
            for noise in (0.005, 0.02):
                yield spacing, seeds, noise


def report(name: str, hits: list[bool], sizes: list[float]) -> float:
    coverage = float(np.mean(hits))
    print(f"{name}: {100 * coverage:.1f} % of {len(hits)} intervals cover, median length {np.median(sizes):.3f}")
    return coverage


@pytest.mark.parametrize("spacing", [0.5, 1.0])
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_optimum_interval_covers(spacing: float, seeds: int, noise: float) -> None:
    random = np.random.default_rng(1)
    hits, sizes = [], []
    for _ in range(DRAWS):
        optimum = draw_optimum(random.uniform(-8, -4), spacing, seeds, noise, random)
        truth = float(np.median(optimum.grid)) if not optimum.bracketed else optimum.truth
    assert hits
