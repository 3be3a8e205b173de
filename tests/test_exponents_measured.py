"""Exponents and verdicts on real coordinate checks of small models; leaving a learning rate unscaled turns them."""

import dataclasses

import pytest
import xarray as xr
from synthetic import COSTS, study

from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.errors import UserError
from gdn_mup.measurement.coordinates import coordinate_check
from gdn_mup.scaling.growth import Axes
from gdn_mup.scaling.rules import ONE, RULE_SETS
from gdn_mup.study.claims import PREACTIVATIONS, TRUNK, judge_all
from gdn_mup.study.datasets import combine
from gdn_mup.study.equivalence import EXPONENT_MARGIN
from gdn_mup.study.exponents import exponents, gate_gradients
from gdn_mup.study.figures import gate_gradient_exponents, predicted_exponents
from gdn_mup.study.plan import settings_hash
from gdn_mup.training.sweep import Member, Trainer, scaled_model

WIDTHS, STEPS = [32, 64, 128], [0, 1, 4]


def measure(tokens: TokenFile, growth: str = "heads", optimizer: str = "adamw") -> xr.Dataset:
    """A collected coordinate check that was really run: SP and gdn_mup, two seeds."""
    plan = study(
        sweeps=[],
        training={"batch_size": 4, "context_length": 32, "clipping": "none"},
        coordinate_checks=[
            {"growth": growth, "optimizer": optimizer, "rules": ["sp", "gdn_mup"], "widths": WIDTHS, "seeds": [0, 1],
             "learning_rate": 0.02 if optimizer == "adamw" else 0.5, "steps": STEPS}
        ],
    )  # fmt: skip
    jobs = []
    for job in plan.jobs("coordinates"):
        check = plan.experiment_of(job)
        scaled = scaled_model(plan.model, job.width, job.growth, tokens.vocabulary_size, check.rules, job.optimizer)
        members = [Member(rules, check.learning_rate) for rules in check.rules]  # type: ignore[union-attr]
        trainer = Trainer(members, scaled, plan.model, plan.training_of(check), job.optimizer, job.seed, tokens)
        sizes = coordinate_check(trainer, members, STEPS, trainer.batch(99)[:, :-1])
        sizes = sizes.assign_coords(growth=job.growth, optimizer=job.optimizer, width=job.width, seed=job.seed)
        sizes.attrs |= {
            "settings_hash": settings_hash(plan.settings_of(job)),
            "learning_rate": check.learning_rate,
            "corpus_sha256": tokens.sha256,
            "vocabulary_size": tokens.vocabulary_size,
            "commit": "0123abc",
            "device": "cpu",
        }
        jobs.append(sizes.assign(COSTS))
    return combine(jobs, "coordinates", plan)


@pytest.fixture(scope="module")
def checked(tokens: TokenFile) -> xr.Dataset:
    return measure(tokens)


def verdict(dataset: xr.Dataset, claim: str, rules: str) -> str:
    return next(v.verdict for v in judge_all({"coordinates": dataset}) if (v.claim, v.rules) == (claim, rules))


def growing(dataset: xr.Dataset, rules: str) -> set[str]:
    """What training changes more the wider the model is, by an interval beyond the margin."""
    table = exponents(dataset)
    shown = table.name.isin((*TRUNK, *PREACTIVATIONS)) & (table.rules == rules)
    last = table[shown & (table.measure == "change") & (table.step == table.step.max())]
    return set(last.name[last.low > EXPONENT_MARGIN])


def test_changes_grow_under_sp_and_not_under_gdn_mup(checked: xr.Dataset) -> None:
    """At these widths and after four updates the logits' change still shrinks under gdn_mup, which the verdict says."""
    assert verdict(checked, "C5", "sp") == "reproduced" and growing(checked, "sp")
    assert not growing(checked, "gdn_mup")
    (found,) = (v for v in judge_all({"coordinates": checked}) if (v.claim, v.rules) == ("C5", "gdn_mup"))
    assert found.verdict == "not reproduced" and found.reason.endswith("beyond ±0.25: logits")


def test_a_learning_rate_left_unscaled_turns_the_verdict(tokens: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = RULE_SETS["gdn_mup"]
    hidden = ours.rows[Axes.BOTH]._replace(adamw_learning_rate=ONE)
    rows = {**ours.rows, Axes.BOTH: hidden}
    monkeypatch.setitem(RULE_SETS, "gdn_mup", dataclasses.replace(ours, rows=rows))
    mistaken = measure(tokens)
    assert verdict(mistaken, "C5", "gdn_mup") == "not reproduced" and growing(mistaken, "gdn_mup")


def test_weights_and_updates_have_the_exponents_of_the_rules(checked: xr.Dataset) -> None:
    """AdamW's updates and the init are the rules themselves."""
    table = exponents(checked)
    exact = table[
        (table.measure == "weight_rms") & (table.step == 0) & table.name.isin(["q", "o", "mlp_down", "embedding"])
    ]
    assert len(exact) == 2 * (3 * checked.sizes["layer"] - 3 + 1)
    assert (exact.agreement == "agrees").all()
    assert abs(exact.exponent - exact.predicted_low).max() < 0.1
    updates = table[(table.measure == "update_rms") & (table.step == 1) & table.name.isin(["q", "o", "mlp_down"])]
    assert (updates.agreement == "agrees").all()


def test_a_prediction_that_is_wrong_is_found(checked: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions of SP held against gdn_mup's measurements."""
    monkeypatch.setitem(RULE_SETS, "gdn_mup", RULE_SETS["sp"])
    table = exponents(checked)
    updates = table[
        (table.rules == "gdn_mup") & (table.measure == "update_rms") & (table.step == 1) & (table.name == "q")
    ]
    assert (updates.agreement == "differs").all() and len(updates)


def test_gate_gradients_under_growth_by_heads_have_one_premise(checked: xr.Dataset) -> None:
    table = gate_gradients(checked)
    assert (table.independent == table.aligned).all()
    assert set(table.step) == {1, 4}
    assert verdict(checked, "C6", "") == "not tested"


def test_gate_gradients_under_growth_by_head_dim_are_judged(tokens: TokenFile) -> None:
    dataset = measure(tokens, "head_dim", "sgd")
    table = gate_gradients(dataset)
    assert (table.aligned - table.independent == 0.5).all()
    assert verdict(dataset, "C6", "gdn_mup") in {"reproduced", "not reproduced", "inconclusive"}
    flat = dataset.assign(gradient_rms=dataset.gradient_rms.isel(width=0, drop=True).expand_dims(width=WIDTHS) * 1.0)
    assert verdict(flat, "C6", "gdn_mup") == "not reproduced"
    falling = flat.assign(gradient_rms=flat.gradient_rms * flat.width**-0.5)
    assert verdict(falling, "C6", "gdn_mup") == "reproduced"


def test_figures_say_what_was_found(checked: xr.Dataset) -> None:
    figure, table = predicted_exponents(checked)
    assert "As predicted:" in figure.get_suptitle() and len(table) > 100
    figure, table = gate_gradient_exponents(checked)
    assert "both premises predict the same" in figure.get_suptitle() and len(table)


def test_one_width_has_no_exponents(checked: xr.Dataset) -> None:
    with pytest.raises(UserError, match="more `widths`"):
        exponents(checked.isel(width=[0]))
