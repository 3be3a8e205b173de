"""Random search over multipliers: what a trial is, and what the base width's choice is worth at other widths."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from synthetic import in_memory, study
from test_training import MODEL, TRAINING

from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.errors import UserError
from gdn_mup.model.config import GrowthMode
from gdn_mup.model.language_model import parameter_table
from gdn_mup.study.claims import judge_all
from gdn_mup.study.plan import Tuning
from gdn_mup.study.tuning import Search, choose, searches, tuning_table
from gdn_mup.training.config import OptimizerName
from gdn_mup.training.sweep import Member, Scaled, Trainer, distinct_members, scaled_model

TUNED = {"embedding_init": 0.3, "readout_init": 0.25, "residual_init": 0.7, "hidden_init": 2.0, "gate_init": 3.0}


def scaled(
    tokens: TokenFile,
    trials: Sequence[dict[str, float]],
    width: int = 32,
    optimizer: OptimizerName = "adamw",
    growth: GrowthMode = "heads",
) -> Scaled:
    one = scaled_model(MODEL, width, growth, tokens.vocabulary_size, ["sp", "gdn_mup"], optimizer)
    return one._replace(trials=tuple(trials))


def trainer(
    tokens: TokenFile, members: Sequence[Member], trials: Sequence[dict[str, float]], **options: Any
) -> Trainer:
    optimizer = options.pop("optimizer", "adamw")
    training = TRAINING.model_copy(update={"weight_decay": 0.1, "warmup_steps": 0})
    model = options.pop("model", MODEL)
    return Trainer(
        members, scaled(tokens, trials, optimizer=optimizer, **options), model, training, optimizer, 3, tokens
    )


# Trials


def test_trials_are_those_of_every_width_and_begin_with_no_multipliers() -> None:
    plan = study()
    (tuning,) = plan.tunings
    names = set(type(tuning.log2_ranges).model_fields)
    assert all(set(trial) == names for trial in tuning.multipliers)
    assert set(tuning.multipliers[0].values()) == {1.0}
    assert len(tuning.multipliers) == tuning.trials
    dataset = in_memory(plan, "tuning")
    first = dataset.multipliers.isel(width=0, seed=0)
    assert (dataset.multipliers == first).all()
    drawn = np.log2([list(trial.values()) for trial in tuning.multipliers])
    for (name, (low, high)), draws in zip(tuning.log2_ranges, drawn.T, strict=True):
        assert (draws >= low).all() and (draws <= high).all(), name
        assert (len(set(draws)) == tuning.trials) == (low < high), name


def test_draws_do_not_depend_on_how_many_there_are_nor_on_other_ranges() -> None:
    common = {"growth": "heads", "optimizer": "adamw", "widths": [32], "seeds": [0]} | {
        "learning_rates": {"log2_first": -5, "log2_last": -5}
    }
    few = Tuning.model_validate(common | {"trials": 3})
    many = Tuning.model_validate(common | {"trials": 9, "log2_ranges": {"hidden_init": [0, 0]}})
    other = Tuning.model_validate(common | {"trials": 3, "search_seed": 1})
    for one, two in zip(few.multipliers, many.multipliers, strict=False):
        assert one["gate_init"] == two["gate_init"] and two["hidden_init"] == 1
    assert few.multipliers[1]["gate_init"] != other.multipliers[1]["gate_init"]
    assert few.multipliers[1]["gate_init"] != few.multipliers[2]["gate_init"]
    alike = ("hidden_init", "residual_init")  # drawn from one range, each by itself
    assert few.log2_ranges.hidden_init == few.log2_ranges.residual_init
    assert len({few.multipliers[1][name] for name in alike}) == 2


# Members


def test_a_trials_init_is_that_of_a_model_whose_initial_scale_is_multiplied(tokens: TokenFile) -> None:
    members = [Member("gdn_mup", 0.01, trial) for trial in (0, 1)]
    together = trainer(tokens, members, [{}, TUNED]).model
    gains = {name.removesuffix("_init"): value for name, value in TUNED.items()}
    alone = trainer(
        tokens,
        members[:1],
        [{}],
        model=MODEL.model_copy(update={"initial_scale": MODEL.initial_scale.model_copy(update=gains)}),
    ).model
    plain = trainer(tokens, members[:1], [{}]).model
    for name, group in (("0.o", "residual"), ("1.mlp_down", "residual"), ("0.q", "hidden"), ("1.mlp_up", "hidden")):
        ratio = together.weights[name][1] / together.weights[name][0]
        torch.testing.assert_close(ratio, torch.full_like(ratio, gains[group]), rtol=1e-5, atol=0, msg=name)
    changed = 0
    for name, weight in together.weights.items():
        assert torch.equal(weight[0], plain.weights[name][0]), name
        torch.testing.assert_close(weight[1], alone.weights[name][0], rtol=1e-6, atol=0, msg=name)
        changed += not torch.equal(weight[1], weight[0])
    assert changed == 2 + MODEL.layers * (
        4 + 2 + 2 + 2
    )  # embedding, readout; q k v g, gates, MLP's inputs, o and its output


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("group", ["embedding", "readout", "residual"])
def test_a_learning_rate_multiplier_is_another_learning_rate_of_its_parameters_alone(
    tokens: TokenFile, optimizer: OptimizerName, group: str
) -> None:
    """One update from one init: those parameters move as at four times the learning rate, all others as before."""
    members = [Member("gdn_mup", 0.01), Member("gdn_mup", 0.01, 1), Member("gdn_mup", 0.04)]
    one = trainer(tokens, members, [{}, {f"{group}_learning_rate": 4.0}], optimizer=optimizer)
    one.step(0, 1.0)
    moved = set()
    for name, weight in one.model.weights.items():
        plain, tuned, faster = weight
        moved |= {name} if not torch.equal(tuned, plain) else set()
        torch.testing.assert_close(tuned, faster if name in moved else plain, rtol=1e-6, atol=1e-8, msg=name)
    named = {"embedding": ("embedding",), "readout": ("readout",), "residual": (".o", ".mlp_down")}[group]
    assert moved == {name for name in one.model.weights if name.endswith(named)}


def test_every_trial_is_trained_under_every_rule_set_that_differs(tokens: TokenFile) -> None:
    for width, rules in ((16, 1), (32, 2)):
        members, _ = distinct_members(scaled(tokens, [{}, TUNED], width), [0.01, 0.02, 0.03], "global_norm")
        assert len(set(members)) == len(members) == rules * 3 * 2
        assert {member.trial for member in members} == {0, 1}


def test_multipliers_leave_what_they_do_not_name(tokens: TokenFile) -> None:
    one = scaled(tokens, [{}, {"gate_init": 2.0}], optimizer="sgd")
    plain, tuned = (one.scaling(Member("gdn_mup", 0.01, trial)) for trial in (0, 1))
    assert plain == one.scalings["gdn_mup"] and tuned.logits == plain.logits
    assert tuned.parameters.keys() == parameter_table(one.target).keys()
    differ = {name for name in plain.parameters if plain.parameters[name] != tuned.parameters[name]}
    assert {name.split(".")[1] for name in differ} == {"alpha_projection", "beta_projection"}


# Estimates


def search(**truth: Any) -> Search:
    (found,) = searches(in_memory(study(), "tuning", **truth))
    return found


def test_a_planted_multiplier_is_found_and_gains_at_every_width() -> None:
    found = search()
    table = tuning_table(in_memory(study(), "tuning"))
    best = abs(np.log2(found.multipliers.embedding_learning_rate / 4)).idxmin()  # as planted
    assert found.choice.trial == best != 0
    assert list(found.multipliers.columns) == ["embedding_learning_rate", "readout_init"]
    for width in (32, 64, 128):
        gain, left_out = found.gain(width), found.gain_left_out(width)
        assert gain.low > 0.1 and left_out.low > 0.1
        assert found.rank_correlation(width).value > 0.9
        row = table[(table.width == width) & table.chosen].iloc[0]
        assert (row.gain, row.gain_low, row.gain_left_out) == (gain.value, gain.low, left_out.value)
        assert row.trial == best and 0 <= row.regret < 0.02
    assert (table[table.trial == 0].gain == 0).all()
    assert len(table) == 3 * found.multipliers.shape[0]


def test_a_multiplier_that_helps_the_base_width_alone_is_not_credited_elsewhere() -> None:
    found = search(transfers=False)
    assert found.gain(32).low > 0.1
    assert found.gain(128).high < 0 and found.gain_left_out(128).high < 0
    assert found.rank_correlation(128).high < 0 and found.regret(128).low > 0.1


def test_winning_by_luck_shows_in_the_gain_but_not_with_seeds_left_out() -> None:
    """Losses are noise about one mean: the winner's gain is luck, and at the base width it looks like one."""
    random, gains, left_out = np.random.default_rng(0), [], []
    for _ in range(200):
        losses = random.normal(4, 0.05, (3, 12, 1))
        found = Search("heads", "adamw", "gdn_mup", 32, np.ones(1), None, {32: (0, 1, 2)}, {32: losses})  # type: ignore[arg-type]
        gains.append(found.gain(32).value)
        left_out.append(found.gain_left_out(32).value)
    assert np.mean(gains) > 0.03
    assert abs(np.mean(left_out)) < 3 * np.std(left_out) / 200**0.5 < 0.01


def test_each_trial_is_judged_at_its_own_learning_rate_of_the_base_width() -> None:
    losses = np.array([[[3.0, 2.0], [1.5, np.inf]], [[3.0, 2.2], [1.7, 9.0]]])  # [seeds, trials, learning rates]
    choice = choose(losses)
    assert choice.trial == 1 and choice.rates.tolist() == [1, 0]
    np.testing.assert_array_equal(choice.transferred(losses), [[2.0, 1.5], [2.2, 1.7]])


def test_a_choice_that_diverges_elsewhere_has_an_infinite_loss() -> None:
    dataset = in_memory(study(), "tuning")
    trial = searches(dataset)[0].choice.trial
    diverged = dataset.diverged.where((dataset.trial != trial) | (dataset.width != 128), 1)
    (found,) = searches(dataset.assign(diverged=diverged, final_loss=dataset.final_loss.where(diverged == 0)))
    assert found.gain(128).value == -np.inf and np.isnan(found.gain(128).low)
    assert found.regret(128).value == np.inf
    assert found.gain(64).low > 0.1


def test_what_was_not_run_is_left_out() -> None:
    dataset = in_memory(study(), "tuning")
    partial = dataset.where((dataset.width != 64) & ((dataset.width != 128) | (dataset.seed == 0)))
    (found,) = searches(partial)
    assert found.widths == (32, 128) and found.seeds[128] == (0,)
    assert np.isfinite(found.gain(128).value) and np.isnan(found.gain(128).low)
    with pytest.raises(UserError, match="no search at the base width; add one under `tunings`"):
        searches(dataset.where(dataset.width != 32))


# The claim


def c9(tuning: xr.Dataset | None, **truth: Any) -> Any:
    evidence = {"lr_sweep": in_memory(study(), "lr_sweep", **truth)} | ({} if tuning is None else {"tuning": tuning})
    return next(v for v in judge_all(evidence) if (v.claim, v.optimizer, v.rules) == ("C9", "adamw", "gdn_mup"))


def test_tuned_multipliers_speak_for_the_best_loss() -> None:
    untuned, tuned = c9(None, penalty=0.05), c9(in_memory(study(), "tuning", penalty=0.05), penalty=0.05)
    assert untuned.verdict == "not reproduced" and "tuned" not in untuned.reason
    assert tuned.verdict == "reproduced", tuned
    assert (
        "multipliers tuned at width 32 gain 0.2" in tuned.reason
        and "the loss less SP's best is then −0.1" in tuned.reason
    )


def test_a_search_that_trained_otherwise_is_not_compared_with_sp() -> None:
    other = study(training={"steps": 61, "warmup_steps": 6, "evaluate_every": 20})
    verdict = c9(in_memory(other, "tuning"))
    assert "gain 0.2" in verdict.reason and "no sweep under SP was trained alike" in verdict.reason
    assert "the loss less SP's best is then" in c9(in_memory(study(), "tuning")).reason
