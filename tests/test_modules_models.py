"""The rules on models of other packages as they come: shapes, inits, groups, and training where a CPU can."""

import pytest
import torch
from module_examples import VOCABULARY, fla_model, llama, qwen3_next
from torch import nn

from gdn_mup import Scaling
from gdn_mup.errors import UserError
from gdn_mup.scaling.growth import Axes

BASE, TARGET, M = 64, 256, 4


def axes_of(scaling: Scaling, name: str) -> list[Axes]:
    """The axes that grow of every part of the one parameter whose name ends so."""
    (entry,) = (entry for key, entry in scaling.entries.items() if key.endswith(name))
    return [part.axes for part in entry.parts]


def check_init(scaling: Scaling, model: nn.Module) -> None:
    """Every centred parameter of the model has the standard deviation that the rules ask for, part by part."""
    scaling.initialize(model)
    for name, parameter in model.named_parameters():
        entry = scaling.entries[name]
        if entry.base_law is None or not entry.base_law.centred:
            continue
        multipliers = scaling.part_multipliers(name, "adamw")
        rows = parameter.detach().unflatten(0, (entry.groups, -1)) if len(entry.parts) > 1 else parameter.detach()[None]
        sizes = [part.rows for part in entry.parts] if len(entry.parts) > 1 else [rows.shape[1]]
        for piece, multiplier in zip(rows.split(sizes, dim=1), multipliers, strict=True):
            tolerance = 0.01 + 4 / (2 * piece.numel()) ** 0.5
            assert piece.std().item() == pytest.approx(entry.base_law.std * multiplier.init_std, rel=tolerance), name


# transformers.


@pytest.fixture
def pure_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-Next's own PyTorch delta rule: where fla imports, transformers dispatches to its GPU kernels."""
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        function = getattr(modeling, name)
        monkeypatch.setattr(modeling, name, getattr(function, "__wrapped__", function))


@pytest.mark.parametrize("tied", [False, True])
def test_qwen3_next_trains_with_three_lines(tied, pure_pytorch):
    torch.manual_seed(0)
    model = qwen3_next(TARGET, tied=tied)

    scaling = Scaling.between(lambda width: qwen3_next(width, tied=tied), base=BASE, target=TARGET)
    scaling.initialize(model)
    optimizer = torch.optim.AdamW(scaling.parameter_groups(model, "adamw", learning_rate=4e-3, weight_decay=0.1))

    ids = torch.arange(32).remainder(VOCABULARY).repeat(2, 1)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert scaling.readouts == ({"lm_head": 1 / M} if tied else {})


def test_qwen3_nexts_init_is_rescaled_and_its_rows_are_right():
    scaling = Scaling.between(qwen3_next, BASE, TARGET)
    torch.manual_seed(0)
    check_init(scaling, qwen3_next(TARGET))
    expected = {
        "layers.0.linear_attn.in_proj_qkvz.weight": [Axes.BOTH] * 4,
        "layers.0.linear_attn.in_proj_ba.weight": [Axes.BOTH],
        "layers.0.linear_attn.conv1d.weight": [Axes.FAN_OUT] * 3,
        "layers.0.linear_attn.A_log": [Axes.FAN_OUT],
        "layers.0.linear_attn.norm.weight": [Axes.NONE],
        "layers.0.mlp.gate.weight": [Axes.FAN_IN],
        "layers.0.mlp.experts.gate_up_proj": [Axes.BOTH],
        "layers.0.mlp.experts.down_proj": [Axes.BOTH],
        "layers.3.self_attn.q_proj.weight": [Axes.BOTH],
        "layers.3.self_attn.k_norm.weight": [Axes.NONE],
        "lm_head.weight": [Axes.FAN_IN],
        "embed_tokens.weight": [Axes.FAN_OUT],
    }
    assert {name: axes_of(scaling, name) for name in expected} == expected


def larger_heads(width: int) -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes = dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), width // 4)
    return qwen3_next(width, **heads, **sizes)


def test_larger_heads_need_another_scale_of_softmax_attention_and_make_gates_readouts(pure_pytorch):
    with pytest.raises(UserError, match=r"layers\.3\.self_attn: head_dim grows from 16 to 64.*'\*\.q_norm': 0\.5"):
        Scaling.between(larger_heads, BASE, TARGET)
    scaling = Scaling.between(larger_heads, BASE, TARGET, output_multipliers={"*.q_norm": 0.5})
    assert scaling.outputs == {"model.layers.3.self_attn.q_norm": 0.5}
    assert axes_of(scaling, "layers.0.linear_attn.in_proj_ba.weight") == [Axes.FAN_IN]
    assert axes_of(scaling, "layers.0.linear_attn.dt_bias") == [Axes.NONE]
    assert axes_of(scaling, "layers.0.linear_attn.norm.weight") == [Axes.FAN_OUT]


def test_value_heads_that_grow_alone_leave_queries_and_keys_as_readouts():
    def make(width: int) -> nn.Module:
        return qwen3_next(width, linear_num_key_heads=2)

    scaling = Scaling.between(make, BASE, TARGET)
    assert axes_of(scaling, "layers.0.linear_attn.in_proj_qkvz.weight") == [*[Axes.FAN_IN] * 2, *[Axes.BOTH] * 2]
    torch.manual_seed(0)
    check_init(scaling, make(TARGET))


def test_llama_with_key_value_heads_that_grow_by_a_factor_of_their_own_is_refused_until_that_is_said():
    def make(width: int) -> nn.Module:
        return llama(width, num_key_value_heads=2 if width == BASE else 4)

    with pytest.raises(UserError, match=r"k_proj\.weight: .*parts=\{'\*\.k_proj': 'whole'\}"):
        Scaling.between(make, BASE, TARGET)
    scaling = Scaling.between(make, BASE, TARGET, parts={"*.k_proj": "whole", "*.v_proj": "whole"})
    assert scaling.multipliers("sgd")["model.layers.0.self_attn.k_proj.weight"].learning_rate == 2 / M


def test_llama_gets_the_transformers_rules_and_an_own_init_in_bfloat16():
    scaling = Scaling.between(llama, BASE, TARGET)
    assert axes_of(scaling, "layers.1.self_attn.k_proj.weight") == [Axes.BOTH]
    assert axes_of(scaling, "model.norm.weight") == [Axes.FAN_OUT]
    torch.manual_seed(0)
    check_init(scaling, llama(TARGET).to(torch.bfloat16))


# flash-linear-attention. Its models construct on a CPU; their forward passes need a GPU.


@pytest.mark.parametrize("name", ["GatedDeltaNet", "KDA", "DeltaNet", "Mamba2", "GLA"])
def test_flas_models_are_understood_and_rescaled_as_they_come(name):
    make = fla_model(name)
    scaling = Scaling.between(make, BASE, TARGET)
    torch.manual_seed(0)
    model = make(TARGET)
    check_init(scaling, model)
    groups = scaling.parameter_groups(model, "adamw", 2e-3, weight_decay=0.1)
    torch.optim.AdamW(groups)
    muon = scaling.parameter_groups(model, "muon", 2e-2, adamw_learning_rate=2e-3)
    torch.optim.Muon(muon.muon)
    assert sum(len(g["params"]) for g in [*muon.muon, *muon.adamw]) == len(list(model.parameters()))


def test_low_rank_gates_have_one_side_that_grows_each():
    kda = Scaling.between(fla_model("KDA"), BASE, TARGET)
    assert axes_of(kda, "attn.f_proj.0.weight") == [Axes.FAN_IN]  # to a head's 32 channels
    assert axes_of(kda, "attn.f_proj.1.weight") == [Axes.FAN_OUT]
    gla = Scaling.between(fla_model("GLA"), BASE, TARGET)
    assert [axes_of(gla, f"attn.gk_proj.{i}.weight") for i in (0, 1)] == [[Axes.FAN_IN], [Axes.FAN_OUT]]


def test_mamba2s_fused_projection_is_five_matrices():
    scaling = Scaling.between(fla_model("Mamba2"), BASE, TARGET)
    z, x, b, c, dt = axes_of(scaling, "mixer.in_proj.weight")
    assert (z, x, dt) == (Axes.BOTH,) * 3 and (b, c) == (Axes.FAN_IN,) * 2
    assert axes_of(scaling, "mixer.conv1d.bias") == [Axes.FAN_OUT, Axes.NONE, Axes.NONE]


def test_a_loss_that_goes_around_a_tied_readout_is_refused():
    make = fla_model(
        "GatedDeltaNet", tie_word_embeddings=True, fuse_linear_cross_entropy=True, fuse_cross_entropy=False
    )
    with pytest.raises(UserError, match=r"fuse_linear_cross_entropy: True.*use False"):
        Scaling.between(make, BASE, TARGET).initialize(make(TARGET))
