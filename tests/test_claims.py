"""Verdicts on studies whose truth is known: each verdict is reached, and breaking a rule turns it."""

import re
from typing import Any

import pytest
import xarray as xr
from synthetic import SLOPES, in_memory, study, with_base_seeds

from gdn_mup.study.claims import CLAIMS, Verdict, count_tests, judge_all, verdict_table
from gdn_mup.study.equivalence import LOSS_MARGIN, judge_transfer
from gdn_mup.study.estimates import Estimate


def verdicts(selection: dict[str, Any] | None = None, **truth: Any) -> dict[tuple[str, str], Verdict]:
    """Verdicts by claim and rule set ("" is the claim as a whole)."""
    dataset = in_memory(study(), "lr_sweep", **truth)
    found = judge_all({"lr_sweep": dataset.sel(selection) if selection else dataset})
    return {(verdict.claim, verdict.rules): verdict for verdict in found}


def test_theory_is_reproduced_when_it_holds() -> None:
    found = verdicts()
    for claim in ("C1", "C2", "C3", "C4"):
        assert found[claim, ""].verdict == "reproduced", found[claim, ""]
    assert re.search(r"slope −(0\.9|1\.0)", found["C1", "sp"].reason)
    assert "it costs at most" in found["C2", "gdn_mup"].reason


@pytest.mark.parametrize("broken", ["mup", "liu_gu", "gdn_mup"])
def test_unscaled_learning_rate_turns_the_verdict(broken: str) -> None:
    found = verdicts(slopes=SLOPES | {broken: -1.0})
    assert found["C2", broken].verdict == found["C4", broken].verdict == "not reproduced"
    assert "beyond ±0.5" in found["C2", broken].reason
    assert found["C2", ""].verdict == "not reproduced"
    others = {"mup", "liu_gu", "gdn_mup"} - {broken}
    assert {found["C2", name].verdict for name in others} == {"reproduced"}


def test_divergence_at_the_transferred_learning_rate_is_named() -> None:
    found = verdicts(slopes=SLOPES | {"mup": -1.0})
    assert "width 128: training diverges at the transferred learning rate" in found["C2", "mup"].reason


def test_optimum_that_stays_under_sp_refutes_c1() -> None:
    found = verdicts(slopes=SLOPES | {"sp": 0.0})
    assert found["C1", "sp"].verdict == "not reproduced"
    rising = verdicts(slopes=SLOPES | {"sp": 0.5})
    assert rising["C1", "sp"].verdict == "not reproduced"
    assert "a fall of 0.5 is excluded" in rising["C1", "sp"].reason


def test_noise_makes_transfer_inconclusive_not_reproduced() -> None:
    """A wide interval contains 0, but does not show that the optimum stays."""
    found = verdicts(noise=0.15)
    assert found["C2", ""].verdict == "inconclusive"
    assert any(word in found["C2", "mup"].reason for word in ("reaches", "noise alone", "no optimum"))


def test_one_width_is_inconclusive() -> None:
    found = verdicts({"width": [32]})
    assert found["C1", ""].verdict == "inconclusive"
    assert found["C2", "mup"].reason == "only width 32 was run"


def test_base_optimum_outside_the_grid_is_inconclusive() -> None:
    found = verdicts(best_at_base=-11.3)
    assert found["C2", ""].verdict == "inconclusive"
    assert "the lowest of the grid" in found["C2", "mup"].reason


def test_absent_sweep_is_not_tested() -> None:
    found = verdicts({"optimizer": ["adamw"]})
    assert found["C3", ""].verdict == found["C4", ""].verdict == "not tested"
    assert found["C1", ""].verdict == "reproduced"


def test_rule_sets_that_were_not_run_do_not_count() -> None:
    found = verdicts({"rules": ["sp", "gdn_mup"]})
    assert found["C2", ""].verdict == "reproduced"
    assert found["C2", "mup"].verdict == "not tested"


def test_each_growth_mode_has_its_own_verdict() -> None:
    dataset = in_memory(study(), "lr_sweep")
    other = in_memory(study(), "lr_sweep", slopes=SLOPES | {"mup": -1.0}).assign_coords(growth=["head_dim"])
    both = xr.concat([dataset, other], dim="growth")
    found = {(v.growth, v.claim, v.rules): v.verdict for v in judge_all({"lr_sweep": both})}
    assert found["heads", "C2", "mup"] == "reproduced"
    assert found["head_dim", "C2", "mup"] == "not reproduced"


def test_table_has_a_row_and_a_reason_for_every_verdict() -> None:
    table = verdict_table({kind: in_memory(study(), kind) for kind in ("lr_sweep", "coordinates")})
    assert list(dict.fromkeys(table.claim)) == [claim.id for claim in CLAIMS]
    whole = table[table.rules == "all"]
    assert list(whole.claim) == [claim.id for claim in CLAIMS]  # one growth mode
    assert set(table.verdict) <= {"reproduced", "not reproduced", "inconclusive", "not tested"}
    assert (table.reason.str.len() > 0).all() and (table.decided_by.str.len() > 0).all()


def test_wider_is_better_and_no_worse_than_sp() -> None:
    found = verdicts()
    assert found["C9", "gdn_mup"].verdict == "reproduced", found["C9", "gdn_mup"]
    assert "32 to 64: 0.1" in found["C9", "gdn_mup"].reason
    assert verdicts(slopes=SLOPES | {"mup": -1.0})["C9", "mup"].verdict == "not reproduced"


def test_a_sweep_that_takes_no_less_saves_nothing() -> None:
    """The made-up jobs take 12.5 seconds at every width."""
    found = verdicts()
    assert found["C10", "gdn_mup"].verdict == "not reproduced"
    reason = found["C10", "gdn_mup"].reason
    # Four rule sets share the base width's, and have one each elsewhere.
    assert "times fewer FLOPs" in reason and "4.0 times more time (12.5 s instead of 3.12 s)" in reason


def test_what_tuning_at_the_base_width_saves() -> None:
    dataset = in_memory(study(), "lr_sweep")
    grows = (dataset.width / 32) ** 2 * dataset.members / 19  # seconds of nineteen members at the base width: 12.5
    costs = {"seconds": 12.5 * grows, "joules": 100 * grows.where(dataset.optimizer == "adamw")}
    found = {(v.claim, v.optimizer, v.rules): v for v in judge_all({"lr_sweep": dataset.assign(costs)})}
    measured, not_measured = (found["C10", optimizer, "gdn_mup"] for optimizer in ("adamw", "sgd"))
    assert measured.verdict == not_measured.verdict == "reproduced"
    assert "16.0 times less time (12.5 s instead of 200 s), 16.0 times less energy (100 J instead" in measured.reason
    assert "energy" not in not_measured.reason
    unknown = dataset.assign(members=dataset.members * float("nan"))
    found = {(v.claim, v.optimizer, v.rules): v for v in judge_all({"lr_sweep": unknown})}
    assert found["C10", "adamw", "gdn_mup"].verdict == "inconclusive"


def test_seeds_of_the_base_width_alone_move_no_comparison_between_widths() -> None:
    """They lie a nat above the others here, which a mean that is not paired by seed would show."""
    dataset = in_memory(with_base_seeds(3, 4, 5, 6), "lr_sweep")
    dataset = dataset.assign(val_loss=dataset.val_loss + (dataset.seed > 2))
    found = {(v.claim, v.optimizer, v.rules): v for v in judge_all({"lr_sweep": dataset})}
    before = verdicts()
    for claim in ("C1", "C2", "C3", "C4"):
        assert found[claim, "adamw" if claim < "C3" else "sgd", ""].verdict == before[claim, ""].verdict
    gains = [v.reason.split("32 to 64: ")[1][:5] for v in (before["C9", "gdn_mup"], found["C9", "sgd", "gdn_mup"])]
    assert gains[0] == gains[1]
    reason = found["C10", "sgd", "gdn_mup"].reason
    assert "than at 128, each of one seed (7 were run at 32, 3 at 128)" in reason
    assert "one seed" not in before["C10", "gdn_mup"].reason


def test_one_growth_mode_does_not_decide_on_both() -> None:
    assert verdicts()["C8", ""].verdict == "inconclusive"


def test_a_drift_inside_the_margin_is_a_number_not_a_refutation() -> None:
    """However little noise there is, a tenth of an octave per doubling costs less than matters."""
    found = verdicts(slopes=SLOPES | {"gdn_mup": -0.1}, noise=0.0003)
    assert found["C2", "gdn_mup"].verdict == "reproduced", found["C2", "gdn_mup"]
    assert found["C8", "gdn_mup"].verdict == "inconclusive"  # of one growth mode


def test_a_cost_beyond_the_margin_refutes_whatever_the_slope_is() -> None:
    found = verdicts(slopes=SLOPES | {"gdn_mup": -0.45}, noise=0.001)
    assert found["C2", "gdn_mup"].verdict == "not reproduced"
    assert re.search(r"width 128: it costs 0\.1\d\d .* beyond 0\.04", found["C2", "gdn_mup"].reason)


@pytest.mark.parametrize(
    ("slope", "wider", "said"),
    [
        ((-0.2, -0.3, -0.1), (0.0, -0.2, 0.2), "a drift, with no trend established without the base width"),
        ((-0.2, -0.3, -0.1), (-0.2, -0.35, -0.05), "a trend, which goes on without the base width"),
        ((-0.2, -0.3, 0.1), (-0.2, -0.35, -0.05), ", within ±0.5"),
    ],
)
def test_a_step_is_told_from_a_trend(slope: Any, wider: Any, said: str) -> None:
    verdict, reason = judge_transfer(Estimate.of(*slope), Estimate.of(*wider), {64: Estimate.of(0.01, 0, 0.03)})
    assert verdict == "reproduced" and said in reason


def test_margins_do_not_widen_with_noise() -> None:
    """An interval that reaches across the margin leaves it open, however much seeds differ."""
    narrow = judge_transfer(Estimate.of(0, -0.1, 0.1), Estimate(), {64: Estimate.of(0.03, 0.0, LOSS_MARGIN)})
    across = judge_transfer(Estimate.of(0, -0.1, 0.1), Estimate(), {64: Estimate.of(0.03, 0.0, LOSS_MARGIN + 0.001)})
    beyond = judge_transfer(Estimate.of(0, -0.1, 0.1), Estimate(), {64: Estimate.of(0.06, LOSS_MARGIN + 0.001, 0.1)})
    assert [narrow[0], across[0], beyond[0]] == ["reproduced", "inconclusive", "not reproduced"]


def test_what_could_not_have_come_out_otherwise_is_not_tested() -> None:
    """Clipped in every update, SP's residual stream changes by the same at every width: no fall is predicted."""
    dataset = in_memory(study(), "lr_sweep")
    clipped = {(v.claim, v.rules): v for v in judge_all({"lr_sweep": dataset.assign(grad_norm=2 * dataset.grad_norm)})}
    assert clipped["C3", "sp"].verdict == "not tested"
    assert "100 100 100 % of updates clipped at widths 32, 64, 128" in clipped["C3", "sp"].reason
    assert clipped["C1", "sp"].verdict == "reproduced"  # AdamW's update does not know the gradient's size
    assert verdicts()["C3", "sp"].verdict == "reproduced"  # norms of 1 are not above 1
    assert "0 0 0 % of updates clipped" in verdicts()["C4", "gdn_mup"].reason


def test_one_measurement_under_two_names_counts_once() -> None:
    dataset = in_memory(study(), "lr_sweep")
    same = dataset.copy(deep=True)
    same["val_loss"].loc[{"rules": "liu_gu"}] = dataset.val_loss.sel(rules="mup")
    same["diverged"].loc[{"rules": "liu_gu"}] = dataset.diverged.sel(rules="mup")
    before, after = judge_all({"lr_sweep": dataset}), judge_all({"lr_sweep": same})
    found = {(v.claim, v.rules): v for v in after}
    assert found["C2", "liu_gu"].same_runs_as == "mup"
    assert "(the same runs as original μP)" in found["C2", ""].reason
    assert count_tests(before) - count_tests(after) == 4  # C2, C4, and C9 under both optimizers


def test_changes_that_vanish_refute_as_those_that_grow() -> None:
    coordinates = in_memory(study(), "coordinates")
    shrinking = coordinates.copy(deep=True)
    shrinking["change"] = coordinates.change / (coordinates.width / 32) ** 0.6
    for dataset, verdict in ((coordinates, "reproduced"), (shrinking, "not reproduced")):
        found = {(v.claim, v.optimizer, v.rules): v for v in judge_all({"coordinates": dataset})}
        assert found["C5", "adamw", "gdn_mup"].verdict == verdict, found["C5", "adamw", "gdn_mup"]


def test_experiments_that_a_study_does_not_have_are_not_tested() -> None:
    found = verdicts()
    assert {found[claim, ""].verdict for claim in ("C5", "C6")} == {"not tested"}
