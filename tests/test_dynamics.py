"""Gates and state over training: what is measured, and what is estimated from it."""

import numpy as np
import pytest
import torch
import xarray as xr
from synthetic import in_memory, study
from test_training import make_trainer

from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.errors import UserError
from gdn_mup.measurement.coordinates import Place, activations, coordinate_check
from gdn_mup.measurement.dynamics import QUANTILES, effective_rank, gate_and_state
from gdn_mup.study.dynamics import BETA, HALF_LIFE, RANK, gate_dynamics, of
from gdn_mup.study.figures import gate_and_state_dynamics
from gdn_mup.training.sweep import Member

MEMBERS = [Member("sp", 0.02), Member("gdn_mup", 0.02)]


def test_effective_rank_counts_equal_directions() -> None:
    """Whatever their size and orientation."""
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    for count in (1, 3, 6):
        state = 7 * rotation[:, :count] @ rotation[:count]
        torch.testing.assert_close(effective_rank(state), torch.tensor(float(count)), rtol=1e-4, atol=0)
    between = effective_rank(torch.diag(torch.tensor([1.0, 0.5])))
    assert 1 < between < 2


def test_a_member_that_diverged_has_no_rank_and_leaves_the_others_theirs() -> None:
    states = torch.eye(4).repeat(3, 1, 1)
    states[1, 0, 0] = torch.nan
    states[2] = 0.0
    ranks = effective_rank(states)
    assert abs(ranks[0] - 4) < 1e-5 and ranks[1:].isnan().all()


def test_memory_halves_in_a_half_life() -> None:
    """Of α that forgets half in 5 tokens, and of one that never forgets."""
    log_alpha = torch.tensor([float(np.log(0.5)) / 5, 0.0]).view(2, 1, 1).expand(2, 8, 3)
    found = gate_and_state(log_alpha, torch.full((2, 8, 3), 0.25), torch.eye(4).expand(2, 1, 3, 4, 4), 8)
    torch.testing.assert_close(found["half_life_quantile"][0], torch.full((3,), 5.0))
    assert found["half_life_quantile"][1].isposinf().all()
    torch.testing.assert_close(found["alpha_mean"], torch.tensor([0.5**0.2, 1.0]))
    assert (found["beta_quantile"] == 0.25).all()


def test_a_coordinate_check_summarises_what_the_model_records(tokens: TokenFile, validation: TokenFile) -> None:
    """Against NumPy on the recorded gates and states, after an update."""
    probe = torch.from_numpy(validation.fixed_batches(1, 2, 6)[0, :, :-1])
    trainer = make_trainer(MEMBERS, tokens)
    checked = coordinate_check(trainer, MEMBERS, (0, 2), probe).sel(step=2, layer=1)
    recorded = activations(trainer.model, probe)
    log_alpha, beta, state = (recorded[Place(name, 1)].double().numpy() for name in ("log_alpha", "beta", "state"))
    for row in range(len(MEMBERS)):
        half_lives = np.quantile(np.log(2) / -log_alpha[row], QUANTILES, method="linear")
        np.testing.assert_allclose(checked.half_life_quantile[row], half_lives, rtol=0.05)  # another interpolation
        np.testing.assert_allclose(checked.alpha_quantile[row], np.quantile(np.exp(log_alpha[row]), QUANTILES), 1e-5)
        np.testing.assert_allclose(checked.beta_mean[row], beta[row].mean(), rtol=1e-5)
        shares = np.linalg.svd(state[row], compute_uv=False)
        shares /= shares.sum(-1, keepdims=True)
        ranks = np.exp(-(shares * np.log(shares)).sum(-1))
        np.testing.assert_allclose(checked.effective_rank[row], ranks.mean(), rtol=1e-3)
        np.testing.assert_allclose(checked.relative_rank[row], ranks.mean() / 6, rtol=1e-3)  # 6 tokens, K = V = 8


@pytest.fixture(scope="module")
def coordinates() -> xr.Dataset:
    return in_memory(study(), "coordinates")


def test_a_change_since_init_does_not_see_where_a_seed_started(coordinates: xr.Dataset) -> None:
    """The made-up rank falls as width^−½ under SP, by the last step, and stays under the others."""
    last = of(gate_dynamics(coordinates), RANK).query("step == step.max()")
    truth = np.where(last.rules == "sp", (last.width / 32) ** -0.5, 1.0)
    np.testing.assert_allclose(last.change, truth, rtol=1e-5)
    np.testing.assert_allclose(last.change_high, truth, rtol=1e-5)
    assert (last.high / last.low > 1.1).all()


def test_intervals_are_students_over_seeds(coordinates: xr.Dataset) -> None:
    here = {"growth": "heads", "optimizer": "adamw", "rules": "sp", "width": 64, "step": 0}
    row = of(gate_dynamics(coordinates), HALF_LIFE).set_index(list(here)).loc[tuple(here.values())]
    logs = np.log(coordinates.half_life_quantile.sel(here | {"quantile": 0.5}).mean("layer"))
    half_width = 4.302653 * float(logs.std(ddof=1)) / 3**0.5  # t of two degrees of freedom
    np.testing.assert_allclose(
        np.log([row.low, row.value, row.high]) - float(logs.mean()), half_width * np.r_[-1:2], atol=1e-5
    )


def test_a_single_seed_has_no_interval(coordinates: xr.Dataset) -> None:
    table = gate_dynamics(coordinates.sel(seed=[0]))
    assert table.change.notna().all() and table.change_low.isna().all()
    drawing = gate_and_state_dynamics(coordinates.sel(seed=[0]))
    assert "half-life" not in drawing.figure.get_suptitle()


def test_the_title_says_what_the_state_became(coordinates: xr.Dataset) -> None:
    figure, table = gate_and_state_dynamics(coordinates)
    text = " ".join(figure.get_suptitle().split())
    assert "at width 128" in text and "AdamW: SP 0.50, gdn-mup 1.00." in text
    assert "changed in 0 of these 2 cases" in text
    assert set(table.rules) == set(coordinates.rules.values)
    assert len(figure.axes) == 6


def test_both_growth_modes_stand_side_by_side(coordinates: xr.Dataset) -> None:
    other = coordinates.assign_coords(growth=["head_dim"])
    figure, table = gate_and_state_dynamics(xr.concat([coordinates, other], "growth"), ["mup"])
    assert len(figure.axes) == 3 * 2 * table.optimizer.nunique()
    assert "larger heads" in figure.axes[1].get_title(loc="left")


def test_other_rule_sets_are_drawn_where_the_usual_ones_were_not_run(coordinates: xr.Dataset) -> None:
    figure = gate_and_state_dynamics(coordinates.sel(rules=["mup", "liu_gu"])).figure
    assert "Liu & Gu" in figure.get_suptitle()


def test_beta_is_a_difference(coordinates: xr.Dataset) -> None:
    shifted = coordinates.assign(beta_mean=coordinates.beta_mean + 0.1 * (coordinates.step > 0))
    np.testing.assert_allclose(of(gate_dynamics(shifted), BETA).query("step > 0").change, 0.1, rtol=1e-5)


def test_init_alone_is_refused(coordinates: xr.Dataset) -> None:
    with pytest.raises(UserError, match="no step after 0"):
        gate_dynamics(coordinates.sel(step=[0]))
