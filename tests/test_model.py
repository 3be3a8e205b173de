"""The language model: causal, members apart, and the layer of fla's GatedDeltaNet to the letter."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from gdn_mup.model.config import ModelSettings, ModelShape, model_shape
from gdn_mup.model.language_model import LanguageModel, initialize, parameter_layout, parameter_table
from gdn_mup.model.operations import linear, short_conv
from gdn_mup.scaling.apply import scale_model

SETTINGS = ModelSettings(base_width=16, layers=2, heads=2, head_dim=8, value_head_dim=12, mlp_ratio=2)


def make_model(width: int = 32, tied: bool = False, members: tuple[str, ...] = ("sp", "gdn_mup"), seed: int = 0):
    settings = SETTINGS.model_copy(update={"tied_embeddings": tied})
    base = model_shape(settings, 16, "heads", 50)
    target = model_shape(settings, width, "heads", 50)
    model = LanguageModel(target, len(members))
    scalings = [
        scale_model(parameter_table(base), parameter_table(target), width / 16, rules, "adamw") for rules in members
    ]
    initialize(model, base, settings.initial_scale, scalings, seed)
    return model


def test_logits_depend_on_the_past_only() -> None:
    model, tokens = make_model(), torch.randint(50, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 50
    with torch.no_grad():
        before, after = model.forward(tokens), model.forward(changed)
    torch.testing.assert_close(before[:, :, :12], after[:, :, :12], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, :, 12:], after[:, :, 12:], atol=1e-3)


def test_tied_readout_is_the_embedding_times_the_output_multiplier() -> None:
    model = make_model(width=64, tied=True)
    assert "readout" not in model.weights
    assert model.logits_multiplier.tolist() == [1.0, 0.25]
    untied = make_model(width=64, tied=False)
    assert untied.logits_multiplier.tolist() == [1.0, 1.0]


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    first, same, other = make_model(), make_model(), make_model(seed=1)
    for name, weight in first.weights.items():
        assert torch.equal(weight, same.weights[name])
    assert not torch.equal(first.weights["0.q"], other.weights["0.q"])


def test_initial_standard_deviations_follow_the_rules() -> None:
    """At four times the base width: hidden 1/√fan-in under both, readout 1/√fan-in (SP) or 1/fan-in (ours)."""
    model = make_model(width=64)
    std = {name: weight.flatten(1).std(1) for name, weight in model.weights.items()}
    torch.testing.assert_close(std["0.mlp_up"], torch.full((2,), 64**-0.5), rtol=0.05, atol=0)
    torch.testing.assert_close(std["readout"], torch.tensor([1 / 8, 1 / 16]), rtol=0.05, atol=0)
    torch.testing.assert_close(std["embedding"], torch.ones(2), rtol=0.05, atol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_every_parameter_has_its_own_place_in_a_members_row(heads: int, tied: bool) -> None:
    """Stored tensors are aligned and do not overlap; whatever no parameter owns stays zero through an update."""
    settings = SETTINGS.model_copy(update={"heads": heads, "tied_embeddings": tied})
    shape = model_shape(settings, 16, "heads", 50)
    layout, table = parameter_layout(shape), parameter_table(shape)
    assert layout.parameters.keys() == table.keys()
    assert layout.size % 64 == 0 and all(tensor.offset % 64 == 0 for tensor in layout.tensors.values())
    assert layout.tensors["0.in_proj"].shape[0] % 16 == 0
    places = sorted((offset, offset + size) for _, offset, size in layout.parameters.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise([*places, (layout.size, layout.size)]))

    model = LanguageModel(shape, 2)
    for number, name in enumerate(table, start=1):
        model.weights[name].fill_(number)
    for number, name in enumerate(table, start=1):
        _, offset, size = layout.parameters[name]
        assert model.weights[name].shape[1:] == table[name].shape
        assert (model.flat[:, offset : offset + size] == number).all()
        model.flat[:, offset : offset + size] = 0
    assert (model.flat == 0).all()


def test_gradients_are_those_of_the_stored_tensors() -> None:
    model = make_model()
    model.losses(torch.randint(50, (2, 11))).sum().backward()
    gradients = model.gradients()
    assert gradients.keys() == model.weights.keys()
    keys = model.shape.heads * model.shape.head_dim
    in_proj = model.tensors["1.in_proj"].grad
    assert in_proj is not None
    torch.testing.assert_close(gradients["1.k"], in_proj[:, keys : 2 * keys], rtol=0, atol=0)
    rows = sum(model.weights[f"1.{name}"].shape[1] for name in ("q", "k", "v", "g")) + 2 * model.shape.heads
    assert rows < in_proj.shape[1] and (in_proj[:, rows:] == 0).all()
    gradients["1.k"].zero_()
    assert (in_proj[:, keys : 2 * keys] == 0).all()


@pytest.mark.parametrize("tied", [False, True])
def test_losses_are_the_cross_entropy_of_the_logits(tied: bool) -> None:
    model, batch = make_model(width=64, tied=tied), torch.randint(50, (3, 14))
    logits = model.forward(batch[:, :-1])
    expected = torch.stack([F.cross_entropy(own.flatten(0, 1), batch[:, 1:].flatten()) for own in logits])
    torch.testing.assert_close(model.losses(batch), expected)


def test_a_linear_map_has_the_gradients_of_its_product() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, (x, weight))


@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_short_conv_is_a_causal_depthwise_convolution(length: int) -> None:
    x = torch.randn(2, 3, length, 5, dtype=torch.float64, requires_grad=True)
    taps = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    reference = torch.stack([F.conv1d(F.pad(x[m].mT, (3, 0)), taps[m][:, None], groups=5).mT for m in range(2)])
    torch.testing.assert_close(short_conv(x, taps), reference)
    assert torch.autograd.gradcheck(short_conv, (x, taps))


def test_a_mixer_is_flas_gated_deltanet() -> None:
    """The same weights in fla's layer (its parameters, our arithmetic written out with its reference rule)."""
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive", reason="flash-linear-attention needs triton")
    model = make_model(members=("sp",))
    recorded: dict[str, torch.Tensor] = {}
    tokens = torch.randint(50, (2, 30))
    model.forward(tokens, lambda quantity, layer, x: recorded.update({quantity: x[0]}) if layer == 0 else None)
    shape: ModelShape = model.shape
    w = {name.removeprefix("0."): weight[0] for name, weight in model.weights.items() if name.startswith("0.")}
    x = model.weights["embedding"][0][tokens]
    x = F.rms_norm(x, (32,), w["mixer_norm"], 1e-5)

    def conv_silu(y: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
        return F.silu(F.conv1d(F.pad(y.mT, (3, 0)), taps[:, None], groups=taps.shape[0]).mT)

    q, k, v = (conv_silu(x @ w[name].T, w[f"{name}_conv"]).unflatten(-1, (shape.heads, -1)) for name in ("q", "k", "v"))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    g = -w["A_log"].exp() * F.softplus(x @ w["alpha_projection"].T + w["dt_bias"])
    beta = (x @ w["beta_projection"].T).sigmoid()
    o, _ = naive.naive_recurrent_gated_delta_rule(q=q, k=k, v=v, beta=beta, g=g, scale=1.0)
    gate = F.silu((x @ w["g"].T).unflatten(-1, (shape.heads, -1)))
    o = F.rms_norm(o, (shape.value_head_dim,), w["o_norm"], 1e-5) * gate
    expected = o.flatten(2) @ w["o"].T
    torch.testing.assert_close(recorded["mixer_output"].unflatten(0, (2, 30)), expected, rtol=1e-4, atol=1e-5)


def test_a_scaling_for_each_member_is_asked_for() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="1 scalings for 2 members"):
        initialize(model, model.shape, SETTINGS.initial_scale, [None], 0)  # type: ignore[list-item]
