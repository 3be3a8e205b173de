"""Width exponents against statsmodels, and whether their intervals hold what they promise."""

import numpy as np
import pytest
import statsmodels.api as sm

from gdn_mup.study.width_fit import width_exponent

WIDTHS = [32, 64, 128, 256]


def test_width_exponent_is_that_of_statsmodels() -> None:
    random = np.random.default_rng(0)
    sizes = np.array(WIDTHS) ** 0.5 * np.exp(random.normal(0, 0.1, (2, 3, 4)))
    sizes[1, 2, 3] = np.nan  # a run that diverged
    found = width_exponent(WIDTHS, sizes)
    for i in range(2):
        seed, width = np.nonzero(np.isfinite(sizes[i]))
        design = np.column_stack([np.log(np.array(WIDTHS))[width], *(seed == each for each in range(3))]).astype(float)
        fit = sm.OLS(np.log(sizes[i][seed, width]), design).fit()
        assert found.value[i] == pytest.approx(fit.params[0])
        assert (found.low[i], found.high[i]) == pytest.approx(tuple(fit.conf_int()[0]))


def test_width_exponent_of_too_few_points_has_no_interval() -> None:
    assert np.isnan(width_exponent([32], [[0.1], [0.2]]).value)
    two = width_exponent([32, 64], [[1.0, 2.0]])
    assert two.value == pytest.approx(1.0)
    assert np.isnan(two.low) and np.isnan(two.high)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_of_exponents_cover(seeds: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 1 000 studies, 92 to 98 % of the intervals hold the true exponent, whatever each seed does at all widths."""
    random = np.random.default_rng(seeds)
    exponents = random.uniform(-1, 1, 1000)
    of_seed = random.normal(0, 0.3, (1000, seeds, 1))
    noise = random.normal(0, 0.1, (1000, seeds, len(WIDTHS)))
    found = width_exponent(WIDTHS, np.exp(exponents[:, None, None] * np.log(WIDTHS) + of_seed + noise))
    covered = 100 * np.mean((found.low <= exponents) & (exponents <= found.high))
    with capsys.disabled():
        print(f"\nwidth exponent, {seeds} seeds: 95 % intervals cover {covered:.1f} % of 1000, "
              f"mean width {np.mean(found.high - found.low):.3f}")  # fmt: skip
    assert 92 <= covered <= 98
