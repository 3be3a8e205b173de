"""The rules for any module are the study's rules, and microsoft/mup's where that can describe the same model."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from module_examples import CONTEXT, TRANSFORMER_AXES, VOCABULARY, Mlp, Transformer, fla_model, of_table, study_name
from torch import nn
from torch.nn import functional

from gdn_mup import Scaling
from gdn_mup.model.config import ModelSettings, model_shape
from gdn_mup.model.language_model import parameter_table
from gdn_mup.scaling.apply import ModelScaling, scale_model
from gdn_mup.scaling.growth import Axes, growth_between
from gdn_mup.scaling.rules import RULE_SETS
from gdn_mup.scaling.rules import Scaling as Multipliers

# The study.

BASE, TARGET = 32, 128


def study(growth: str, tied: bool, optimizer: str, rules: str = "gdn_mup") -> ModelScaling:
    """The study's multipliers of its own model."""
    settings = ModelSettings(tied_embeddings=tied)
    base, target = (parameter_table(model_shape(settings, width, growth, 40)) for width in (BASE, TARGET))
    return scale_model(base, target, TARGET / BASE, rules, optimizer)


def as_trained(scaling: Scaling, model: nn.Module, optimizer: str) -> dict[str, Multipliers]:
    """Multipliers by parameter, 0 for the weight decay of what does not decay unless one asks for it."""
    scaling.initialize(model)
    groups = scaling.parameter_groups(model, optimizer, 1.0, weight_decay=1.0)
    decays = {id(p): group["weight_decay"] > 0 for group in groups for p in group["params"]}
    return {
        name: multipliers if decays[id(model.get_parameter(name))] else multipliers._replace(weight_decay=0.0)
        for name, multipliers in scaling.multipliers(optimizer).items()
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("growth", ["heads", "head_dim"])
def test_multipliers_are_those_that_the_study_trains_with(growth, tied):
    def make(width: int) -> nn.Module:
        return of_table(model_shape(ModelSettings(tied_embeddings=tied), width, growth, 40))

    scaling = Scaling.between(make, BASE, TARGET)
    for optimizer in ("adamw", "sgd"):
        expected = study(growth, tied, optimizer)
        found = {study_name(name): value for name, value in as_trained(scaling, make(TARGET), optimizer).items()}
        assert found == expected.parameters
        assert scaling.readouts == ({"readout": expected.logits} if tied else {})


FLA_NAMES = {
    "model.embeddings": "embedding",
    "model.layers.0.attn_norm": "0.mixer_norm",
    **{f"model.layers.0.attn.{name}_proj": f"0.{name}" for name in ("q", "k", "v", "g", "o")},
    **{f"model.layers.0.attn.{name}_conv1d": f"0.{name}_conv" for name in ("q", "k", "v")},
    "model.layers.0.attn.a_proj": "0.alpha_projection",
    "model.layers.0.attn.b_proj": "0.beta_projection",
    "model.layers.0.attn.A_log": "0.A_log",
    "model.layers.0.attn.dt_bias": "0.dt_bias",
    "model.layers.0.attn.o_norm": "0.o_norm",
    "model.layers.0.mlp_norm": "0.mlp_norm",
    "model.layers.0.mlp.gate_proj": "0.mlp_gate",
    "model.layers.0.mlp.up_proj": "0.mlp_up",
    "model.layers.0.mlp.down_proj": "0.mlp_down",
    "model.norm": "final_norm",
    "lm_head": "readout",
}


@pytest.mark.parametrize("growth", ["heads", "head_dim"])
def test_flas_gated_deltanet_gets_the_multipliers_that_the_study_trains_with(growth):
    def make(width: int) -> nn.Module:
        heads = {"num_heads": width // 16, "head_dim": 16} if growth == "heads" else {"num_heads": 2}
        head_dim = {} if growth == "heads" else {"head_dim": width // 2}
        return fla_model("GatedDeltaNet", expand_v=1, intermediate_size=3 * width, **heads, **head_dim)(width)

    scaling = Scaling.between(make, BASE, TARGET)
    for optimizer in ("adamw", "sgd"):
        expected = study(growth, False, optimizer).parameters
        trained = as_trained(scaling, make(TARGET), optimizer)
        found = {FLA_NAMES[name.removesuffix(".weight")]: multipliers for name, multipliers in trained.items()}
        assert found == {name: expected[name] for name in FLA_NAMES.values()}


def test_there_is_one_table_of_rules():
    from gdn_mup.modules.scaling import RULES

    assert RULES is RULE_SETS["gdn_mup"]


# microsoft/mup. Its readout has a forward multiplier 1/m and the init and learning rates that go with it; ours has
# none. W' = W/m says which of our weights is which of mup's: with Adam's ε out of the way, both train alike.

M = TARGET // BASE
HYPERPARAMETERS = {"lr": 0.01, "weight_decay": 0.2}


def both(kind: str, seed: int = 0) -> tuple[nn.Module, nn.Module, Scaling]:
    """A model under mup and the same model under our rules, drawn from the same random numbers, in float64."""
    mup = pytest.importorskip("mup", reason="mup is not installed: pip install --no-deps -r requirements-peers.txt")
    make, axes = {"mlp": (Mlp, {}), "transformer": (Transformer, TRANSFORMER_AXES)}[kind]
    torch.manual_seed(seed)
    theirs = make(TARGET, readout=mup.MuReadout).double()
    ours = make(TARGET).double()
    for mine, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.data.copy_(parameter.data)
    bases = {"base": make(BASE, readout=mup.MuReadout), "delta": make(2 * BASE, readout=mup.MuReadout)}
    mup.set_base_shapes(theirs, **bases)
    scaling = Scaling.between(make, BASE, TARGET, axes=axes)
    scaling.initialize(ours)
    return theirs, ours, scaling


@pytest.mark.parametrize("growth", ["heads", "head_dim"])
def test_the_rule_set_yang_hu_is_mup_on_the_studys_own_model(growth):
    """Init, learning rates and weight decay of every parameter, mup's forward multipliers folded in.

    What only reads the width (the readout, and W_a and W_b under larger heads) is a MuReadout to mup: aW computes what
    W with a multiplier a does, and is drawn and updated accordingly.
    """
    mup = pytest.importorskip("mup", reason="mup is not installed: pip install --no-deps -r requirements-peers.txt")
    settings = ModelSettings()
    tables = {w: parameter_table(model_shape(settings, w, growth, 40)) for w in (BASE, 2 * BASE, TARGET)}
    growths = {name: growth_between(tables[BASE][name], tables[TARGET][name], M) for name in tables[BASE]}
    readouts = {name for name, growth in growths.items() if growth.axes is Axes.FAN_IN}
    assert readouts == {"readout"} | (
        {f"{layer}.{gate}_projection" for layer in (0, 1) for gate in ("alpha", "beta")}
        if growth == "head_dim"
        else set()
    )

    def make(width: int) -> nn.Module:
        module = of_table(model_shape(settings, width, growth, 40))
        for name in readouts:
            path, _, leaf = name.replace(".", "_.").rpartition(".")
            fan_out, fan_in = tables[width][name].shape
            setattr(module.get_submodule(path), leaf, mup.MuReadout(fan_in, fan_out, bias=False))
        return module

    torch.manual_seed(0)
    model = make(TARGET)
    before = {name: parameter.detach().std() for name, parameter in model.named_parameters()}
    mup.set_base_shapes(model, make(BASE), delta=make(2 * BASE))
    for optimizer, peer in (("adamw", mup.MuAdamW), ("sgd", mup.MuSGD)):
        groups = peer(model.parameters(), lr=1.0, weight_decay=1.0).param_groups
        group_of = {id(p): group for group in groups for p in group["params"]}
        ours = study(growth, False, optimizer, "yang_hu").parameters
        for name, parameter in model.named_parameters():
            mine, group = ours[study_name(name)], group_of[id(parameter)]
            folded = 1 / M if study_name(name) in readouts else 1.0
            update = folded**2 if optimizer == "sgd" else folded
            assert mine.learning_rate == pytest.approx(group["lr"] * update, rel=1e-15), name
            assert mine.weight_decay in (0.0, pytest.approx(group["weight_decay"] / update, rel=1e-15)), name
            assert (mine.weight_decay == 0.0) is (parameter.dim() == 1), name
            if parameter.dim() == 2:  # drawn as torch draws, ∝ 1/√fan-in, and rescaled by mup
                drawn = 1.0 if study_name(name) == "embedding" else growths[study_name(name)].fan_in ** -0.5
                rescaled = float(parameter.detach().std() / before[name])
                assert mine.init_std == pytest.approx(drawn * rescaled * folded, rel=1e-6), name


def test_what_the_paper_calls_original_mup_is_not_mup_under_sgd():
    """Gains, convolutions and, where heads grow, gate scalars; under larger heads W_a and W_b."""
    for growth, others in (
        ("heads", {"A_log", "dt_bias"}),
        ("head_dim", {"o_norm", "alpha_projection", "beta_projection"}),
    ):
        published, original = (study(growth, False, "sgd", rules).parameters for rules in ("yang_hu", "mup"))
        differ = {name.rpartition(".")[2] for name in published if published[name][:2] != original[name][:2]}
        assert differ == others | {"mixer_norm", "mlp_norm", "final_norm", "q_conv", "k_conv", "v_conv"}


def readout(name: str) -> bool:
    return name in ("readout.weight", "head.weight")


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_the_init_is_mups(kind):
    theirs, ours, _ = both(kind)
    for (name, mine), parameter in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, parameter / M if readout(name) else parameter, rtol=1e-14, atol=0), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_learning_rates_and_weight_decay_are_mups(kind, optimizer):
    import mup

    theirs, ours, scaling = both(kind)
    peer = {"adamw": mup.MuAdamW, "sgd": mup.MuSGD}[optimizer](theirs.parameters(), **HYPERPARAMETERS)
    mine = scaling.parameter_groups(
        ours, optimizer, HYPERPARAMETERS["lr"], weight_decay=HYPERPARAMETERS["weight_decay"], decay="all"
    )
    expected = {id(p): group for group in peer.param_groups for p in group["params"]}
    found = {id(p): group for group in mine for p in group["params"]}
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        m = {"adamw": M, "sgd": M**2}[optimizer] if readout(name) else 1
        assert found[id(parameter)]["lr"] == pytest.approx(expected[id(other)]["lr"] / m, rel=1e-15), name
        assert found[id(parameter)]["weight_decay"] == pytest.approx(expected[id(other)]["weight_decay"] * m, rel=1e-15)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("adamw", {}), ("sgd", {}), ("sgd", {"momentum": 0.9, "nesterov": True})],
    ids=["adamw", "sgd", "nesterov"],
)
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_training_is_mups_step_by_step(kind, optimizer, options):
    import mup

    theirs, ours, scaling = both(kind)
    epsilon = {"eps": 1e-30} if optimizer == "adamw" else {}
    peer = {"adamw": mup.MuAdamW, "sgd": mup.MuSGD}[optimizer](
        theirs.parameters(), **HYPERPARAMETERS, **options, **epsilon
    )
    groups = scaling.parameter_groups(ours, optimizer, 0.01, weight_decay=0.2, decay="all", epsilon=1e-30)
    mine = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer](groups, **options)
    random = torch.Generator().manual_seed(1)
    first = None
    for _ in range(5):
        if kind == "mlp":
            x, y = torch.randn(8, 6, generator=random).double(), torch.randint(5, (8,), generator=random)
        else:
            x, y = (torch.randint(VOCABULARY, (4, CONTEXT), generator=random) for _ in range(2))
        outputs = []
        for model, step in ((theirs, peer), (ours, mine)):
            output = model(x)
            step.zero_grad()
            functional.cross_entropy(output.flatten(0, -2), y.flatten()).backward()
            step.step()
            outputs.append(output.detach())
        assert torch.allclose(*outputs, rtol=1e-9, atol=1e-9)
        first = outputs[0] if first is None else first
    assert not torch.allclose(first, outputs[0], atol=1e-3)


def test_a_tied_readout_is_mups_shared_readout():
    mup = pytest.importorskip("mup", reason="mup is not installed: pip install --no-deps -r requirements-peers.txt")

    def tied(width: int, readout: Callable[[nn.Parameter], nn.Module]) -> nn.Module:
        model = Transformer(width)
        model.head = readout(model.tokens.weight)
        return model.double()

    def linear(weight: nn.Parameter) -> nn.Module:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = weight
        return layer

    shared = partial(mup.MuSharedReadout, bias=False)
    theirs, ours = tied(TARGET, shared), tied(TARGET, linear)
    ours.load_state_dict(theirs.state_dict())
    mup.set_base_shapes(theirs, tied(BASE, shared), delta=tied(2 * BASE, shared), rescale_params=False)
    scaling = Scaling.between(partial(tied, readout=linear), BASE, TARGET, axes=TRANSFORMER_AXES)
    ids = torch.randint(VOCABULARY, (2, CONTEXT))
    assert not torch.allclose(ours(ids), theirs(ids))
    scaling.add_multipliers(ours)
    assert torch.allclose(ours(ids), theirs(ids), rtol=1e-12)
