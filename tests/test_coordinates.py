"""The coordinate check measures what it says, at the places it says."""

import numpy as np
import pytest
import torch
from test_training import MODEL, make_trainer

from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.measurement.coordinates import activations, coordinate_check
from gdn_mup.model.config import model_shape
from gdn_mup.model.language_model import parameter_table
from gdn_mup.training.sweep import Member

MEMBERS = [Member("sp", 0.02), Member("gdn_mup", 0.02)]
STEPS = (0, 1, 3)


@pytest.fixture(scope="module")
def probe(validation: TokenFile) -> torch.Tensor:
    return torch.from_numpy(validation.fixed_batches(1, 2, 24)[0, :, :-1])


@pytest.fixture(scope="module")
def checked(tokens: TokenFile, probe: torch.Tensor):
    return coordinate_check(make_trainer(MEMBERS, tokens), MEMBERS, STEPS, probe)


def test_every_activation_and_parameter_class_is_measured(checked) -> None:
    outside, inside = checked.rms.sel(layer=-1), checked.rms.sel(layer=0)
    assert set(outside.dropna("quantity").quantity.values) == {"embedding", "final_norm", "logits"}
    assert {"q_projected", "q_conv", "q", "k", "v_conv", "alpha", "beta", "alpha_preactivation", "state", "o"} <= set(
        inside.dropna("quantity").quantity.values
    )
    classes = {name.rpartition(".")[2] for name in parameter_table(model_shape(MODEL, 32, "heads", 320))}
    assert set(checked.parameter.values) == classes
    assert np.isfinite(checked.update_rms.sel(layer=1, step=[1, 3]).dropna("parameter", how="all")).all()


def test_nothing_has_changed_at_init_and_everything_after_an_update(checked) -> None:
    change = checked.change.stack(place=("layer", "quantity")).dropna("place", how="all")
    assert (change.sel(step=0) == 0).all()
    assert (change.sel(step=3) > 0).all()


def test_bounded_quantities_have_the_size_that_they_must_have(checked) -> None:
    at_init = checked.sel(step=0, layer=0).rms
    unit = 8**-0.5  # RMS of a unit vector with head dim 8
    np.testing.assert_allclose(at_init.sel(quantity=["q", "k"]), unit, rtol=1e-3)
    for gate in ("alpha", "beta"):
        assert ((at_init.sel(quantity=gate) > 0) & (at_init.sel(quantity=gate) <= 1)).all()
    np.testing.assert_allclose(checked.sel(step=0, layer=-1).rms.sel(quantity="embedding"), 1.0, rtol=0.1)


def test_sizes_are_those_of_the_model(checked, tokens: TokenFile, probe: torch.Tensor) -> None:
    """An independent look at the logits, and at the update as the difference of weights."""
    trainer = make_trainer(MEMBERS, tokens)
    with torch.no_grad():
        logits = trainer.model.forward(probe)
    expected = logits.pow(2).mean((1, 2, 3)).sqrt()
    np.testing.assert_allclose(checked.sel(step=0, layer=-1, quantity="logits").rms, expected, rtol=1e-5)
    before = trainer.model.weights["0.q"].clone()
    trainer.backward(0)
    trainer.update(1.0)
    update = (trainer.model.weights["0.q"] - before).pow(2).mean((1, 2)).sqrt()
    np.testing.assert_allclose(checked.sel(step=1, layer=0, parameter="q").update_rms, update, rtol=1e-5)


def test_the_state_written_token_by_token_is_the_state_recorded(tokens: TokenFile, probe: torch.Tensor) -> None:
    """S at the end of the probe from the recorded k, v, α, β by the recurrence itself."""
    model = make_trainer(MEMBERS, tokens).model
    recorded = {place: tensor for place, tensor in activations(model, probe).items() if place.layer == 0}
    named = {place.name: tensor for place, tensor in recorded.items()}
    k = named["k"]  # [M, B, H, T, K]
    v = named["v_conv"].unflatten(-1, (k.shape[2], -1)).transpose(2, 3)
    shape = (*probe.shape, k.shape[2])
    alpha, beta = (named[gate].unflatten(1, shape[:2]).transpose(2, 3) for gate in ("alpha", "beta"))
    state = torch.zeros(*k.shape[:3], k.shape[-1], v.shape[-1])
    for t in range(shape[1]):
        decayed = state * alpha[..., t, None, None]
        wrong = v[..., t, :] - (k[..., t, :, None] * decayed).sum(-2)
        state = decayed + beta[..., t, None, None] * k[..., t, :, None] * wrong[..., None, :]
    torch.testing.assert_close(named["state"], state, rtol=1e-4, atol=1e-5)
