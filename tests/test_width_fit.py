"""Width exponents and the metrics of transfer; tests/test_coverage.py tests their intervals."""

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
