"""Width exponents against statsmodels and whether their intervals cover; the metrics of transfer at their edges."""

import numpy as np
import pytest
import statsmodels.api as sm
from synthetic import in_memory, study

from gdn_mup.study.optimum import Optimum, transfer, transfers
from gdn_mup.study.width_fit import asymptotic_loss_penalty, fit_error, robustness_exponent, width_exponent

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


def test_metrics_of_a_study() -> None:
    """Optima on a line, curves alike, and losses of all rule sets the same."""
    sweeps = {sweep.rules: sweep for sweep in transfers(in_memory(study(), "lr_sweep"), optimizer="adamw")}
    ours, theirs = sweeps["gdn_mup"], sweeps["sp"]
    optima = list(ours.optima.values())
    assert 0.0 in fit_error(ours.widths, optima).interval
    assert 0.0 in robustness_exponent(ours.widths, optima).interval
    assert 0.0 in asymptotic_loss_penalty(ours.widths, list(theirs.optima.values()), optima).interval


def test_metrics_say_why_there_is_no_number() -> None:
    sweep = transfer(in_memory(study(), "lr_sweep"), "heads", "adamw", "mup")
    assert sweep
    optima = [*list(sweep.optima.values())[:1], Optimum(reason="every learning rate diverges")]
    assert "fewer than three widths" in fit_error([32, 64], optima).reason
    assert "fewer than two widths" in robustness_exponent([32, 64], optima).reason
    assert "fewer than two widths" in asymptotic_loss_penalty([32, 64], optima, optima).reason
