"""The rules for any module: growth from shapes, what is refused, inits, groups and forward multipliers."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from module_examples import CONTEXT, TRANSFORMER_AXES, VOCABULARY, Mlp, Transformer
from torch import nn

from gdn_mup import Depth, Scaling
from gdn_mup.errors import UserError
from gdn_mup.modules.parts import Rows
from gdn_mup.scaling import rules
from gdn_mup.scaling.growth import Axes, Growth
from gdn_mup.scaling.rules import GDN_MUP

BASE, TARGET, M = 32, 128, 4


def mlp() -> tuple[Scaling, nn.Module]:
    torch.manual_seed(0)
    return Scaling.between(Mlp, BASE, TARGET), Mlp(TARGET)


def transformer(tied: bool = False) -> tuple[Scaling, nn.Module]:
    torch.manual_seed(0)
    make = partial(Transformer, tied=tied)
    return Scaling.between(make, BASE, TARGET, axes=TRANSFORMER_AXES), make(TARGET)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def alone(module: type[nn.Module] | None = None, **shapes: object) -> type[nn.Module]:
    """A model of bare parameters: each from a function of the width to its shape."""

    class Bare(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.wide = nn.Linear(3, width)  # so that some axis is the width
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.randn(shape(width))))

    return Bare


# What is imported.


def test_importing_the_package_costs_neither_torch_nor_the_workflow():
    code = (
        "import sys; sys.modules['snakemake'] = None; import gdn_mup; assert 'torch' not in sys.modules, 'torch';"
        "assert 'Scaling' in dir(gdn_mup); gdn_mup.Scaling; assert 'xarray' not in sys.modules, 'xarray'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Growth from shapes.


def by_table(growth: Growth, optimizer: str) -> rules.Scaling:
    """The row of the axes that grow."""
    return GDN_MUP.rows[growth.axes].scaling(growth, optimizer, True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    layers=st.lists(
        st.tuples(
            st.sampled_from(["linear", "embedding", "conv", "depthwise", "transposed", "norm", "scalar"]),
            st.sampled_from(["width", "fixed", "double"]),
            st.sampled_from(["width", "fixed", "double"]),
        ),
        min_size=1,
        max_size=5,
    ),
    m=st.sampled_from([1, 2, 3, 8]),
)
def test_every_layer_of_a_random_model_gets_the_row_of_its_own_growth(layers, m):
    def sizes(width: int, inputs: str, outputs: str) -> tuple[int, int]:
        return tuple({"width": width, "fixed": 6, "double": 2 * width}[name] for name in (inputs, outputs))

    def make(width: int) -> nn.Module:
        modules = [nn.LayerNorm(width)]
        for kind, inputs, outputs in layers:
            i, o = sizes(width, inputs, outputs)
            modules.append(
                {
                    "linear": lambda i=i, o=o: nn.Linear(i, o),
                    "embedding": lambda o=o: nn.Embedding(11, o),
                    "conv": lambda i=i, o=o: nn.Conv2d(i, o, 3),
                    "depthwise": lambda i=i: nn.Conv1d(i, i, 4, groups=i),
                    "transposed": lambda i=i, o=o: nn.ConvTranspose1d(i, o, 3),
                    "norm": lambda o=o: nn.RMSNorm(o),
                    "scalar": lambda: nn.PReLU(),
                }[kind]()
            )
        return nn.Sequential(*modules)

    scaling = Scaling.between(make, 4, 4 * m)
    for index, (kind, inputs, outputs) in enumerate(layers, start=1):
        reads = {"linear": inputs, "conv": inputs, "transposed": inputs}.get(kind, "fixed")
        writes = {"depthwise": inputs, "scalar": "fixed"}.get(kind, outputs)
        growth = Growth(*(m if size != "fixed" else 1 for size in (reads, writes)), m)
        for optimizer in ("adamw", "sgd"):
            found = scaling.multipliers(optimizer)
            assert found[f"{index}.weight"] == by_table(growth, optimizer)
            if f"{index}.bias" in found:
                assert found[f"{index}.bias"] == by_table(growth._replace(fan_in=1), optimizer)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(axes=st.permutations(["out", "in", "stack"]), m=st.integers(1, 5), stack=st.integers(1, 4))
def test_the_axes_of_a_bare_parameter_may_come_in_any_order(axes, m, stack):
    sizes = {"out": lambda w: 2 * w, "in": lambda w: w, "stack": lambda w: stack * w}
    make = alone(mixing=lambda w: [sizes[axis](w) for axis in axes])
    scaling = Scaling.between(make, 8, 8 * m, axes={"mixing": " ".join(axes)})
    assert scaling.multipliers("adamw")["mixing"] == by_table(Growth(m, m, m), "adamw")


def test_the_base_width_itself_has_multipliers_of_one_and_keeps_its_bits():
    scaling = Scaling.between(Mlp, BASE, BASE)
    model = Mlp(BASE)
    before = values(model)
    scaling.initialize(model)
    assert all(torch.equal(before[name], value) for name, value in values(model).items())
    for optimizer in ("adamw", "sgd", "muon"):
        assert {tuple(s) for s in scaling.multipliers(optimizer).values()} == {(1.0, 1.0, 1.0, 1.0)}


def test_a_width_of_its_own_is_taken_as_it_is():
    """An MLP rounded to multiples of 48 grows by its own factor, which both matrices show."""

    def make(width: int) -> nn.Module:
        inner = -(-8 * width // 3 // 48) * 48
        return nn.Sequential(nn.Linear(width, inner), nn.Linear(inner, width))

    first, second = (Scaling.between(make, 32, 128).multipliers("adamw")[f"{i}.weight"] for i in (0, 1))
    inner = 384 / 96
    assert (first.learning_rate, first.epsilon) == (1 / 4, 1 / inner)
    assert (second.learning_rate, second.init_std) == (1 / inner, inner**-0.5)


def test_a_vocabulary_that_is_padded_differently_is_no_width():
    class Model(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            rows = 130 + -130 % width  # 160 and 256
            self.tokens, self.head = nn.Embedding(rows, width), nn.Linear(width, rows)

    multipliers = Scaling.between(Model, 32, 128).multipliers("sgd")
    assert multipliers["tokens.weight"].learning_rate == M
    assert multipliers["head.weight"] == GDN_MUP.rows[Axes.FAN_IN].scaling(Growth(M, 1, M), "sgd", True)
    assert multipliers["head.bias"].learning_rate == 1


# Fused parameters.


class Fused(nn.Module):
    """A query as wide as the model and a key of 16 channels, in one layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width + 16)


def query_and_key(model: Fused) -> list[int]:
    return [model.project.out_features - 16, 16]


def test_a_fused_layer_whose_parts_grow_differently_is_refused_unless_they_are_named():
    with pytest.raises(UserError, match=r"project\.weight, project\.bias: .* 48 \(width 32\) to 144 \(128\).*parts="):
        Scaling.between(Fused, BASE, TARGET)
    scaling = Scaling.between(Fused, BASE, TARGET, parts={"project": query_and_key})
    query, key = scaling.part_multipliers("project.weight", "adamw")
    assert (query.init_std, key.init_std) == (M**-0.5, 1 / M)
    assert scaling.multipliers("adamw")["project.weight"].epsilon == 1 / M
    model = Fused(TARGET)
    drawn = model.project.weight.detach().clone()
    scaling.initialize(model)
    own = torch.allclose(model.project.weight[:TARGET], drawn[:TARGET])  # drawn with 1/√fan-in already
    assert own and torch.allclose(model.project.weight[TARGET:], drawn[TARGET:] / math.sqrt(M))
    whole = Scaling.between(Fused, BASE, TARGET, parts={"*project": "whole"}).multipliers("adamw")["project.weight"]
    assert whole.epsilon == 48 / 144


def test_parts_that_need_learning_rates_of_their_own_are_refused():
    scaling = Scaling.between(Fused, BASE, TARGET, parts={"project": query_and_key})
    with pytest.raises(UserError, match=r"project\.weight: its parts need learning rates of their own under sgd"):
        scaling.parameter_groups(Fused(TARGET), "sgd", 0.1)


def test_interleaved_parts_are_scaled_row_by_row():
    class Interleaved(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.groups, self.each = 4, width // 4
            self.project = nn.Linear(width, 4 * (width // 4 + 2), bias=False)

    rows = {"project": lambda model: Rows((model.each, 2), groups=model.groups)}
    scaling = Scaling.between(Interleaved, BASE, TARGET, parts=rows)
    model = Interleaved(TARGET)
    drawn = model.project.weight.detach().clone().unflatten(0, (4, -1))
    scaling.initialize(model)
    scaled = model.project.weight.unflatten(0, (4, -1))
    assert torch.allclose(scaled[:, :32], drawn[:, :32]) and torch.allclose(scaled[:, 32:], drawn[:, 32:] / 2)


@pytest.mark.parametrize("sizes", [[100, 16], [144], [0, 144]])
def test_parts_must_add_up(sizes):
    with pytest.raises(UserError, match="rows"):
        Scaling.between(Fused, BASE, TARGET, parts={"project": lambda model: sizes})


# What is refused.


class Shared(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.conv = nn.Linear(width, width), nn.Conv1d(width, width, 1)
        self.conv.weight = nn.Parameter(self.one.weight[..., None].detach())
        self.two = nn.Module()
        self.two.mixing = self.one.weight


def unreadable(width: int) -> nn.Module:
    layer = nn.Linear(width, width)
    layer.scale = layer.weight.sum().item()
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            alone(mixing=lambda w: (w, w)),
            r"mixing: \(32, 32\) grows to \(128, 128\) in a Bare.*axes=\{'mixing': 'out in'\}; or axes=.*'in out'",
        ),
        (
            alone(table=lambda w: (8, w)),
            r"table: \(8, 32\) grows to \(8, 128\).*axes=\{'table': 'in out'\}.*'stack out'",
        ),
        (lambda w: nn.Bilinear(w, w, w), r"weight: .* in a Bilinear, whose type does not say what is summed over"),
        (
            Shared,
            r"one\.weight: .* shared by .* \(Linear one, Module two\): .*untie it.* shares its memory with conv",
        ),
        (lambda w: nn.Sequential(*[nn.Linear(w, w) for _ in range(w // 32)]), r"1\.bias is a parameter at width 32 or"),
        (lambda w: nn.Linear(8, 8), "have equal shapes: use the width"),
        (lambda w: [nn.Linear(w, w)], r"make_model\(32\): returned list: it must return an nn.Module"),
        (unreadable, r"make_model\(32\): .*without reading any tensor's values"),
        (lambda w: nn.MultiheadAttention(w, 4), r"the model: head_dim grows from 8 to 32.*: grow the number of heads$"),
    ],
    ids=["bare", "table", "bilinear", "shared", "deeper", "constant", "list", "item", "attention"],
)
def test_what_shapes_leave_open_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        Scaling.between(make, BASE, TARGET)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": {"absent": "whole"}}, "parts: 'absent' is the name of nothing in the model; there is"),
        ({"axes": {"absent": "in"}}, "axes: 'absent' is the name of nothing"),
        ({"axes": {"input.weight": "out in in"}}, "does not name the axes of shape"),
        ({"output_multipliers": {"absent": 0.5}}, "output_multipliers: 'absent' is the name of nothing"),
        ({"depth": Depth(2, 7, ("narrow.weight",))}, "depth: the model has no ModuleList of 7 blocks"),
        ({"base": 0}, "base: 0: use a width of 1 or more"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        Scaling.between(Mlp, **({"base": BASE, "target": TARGET} | arguments))


def test_another_model_is_refused():
    scaling, _ = mlp()
    with pytest.raises(UserError, match=r"input\.weight has shape \(64, 6\), and \(128, 6\) at width 128"):
        scaling.initialize(Mlp(64))
    with pytest.raises(UserError, match=r"is a parameter of .* alone"):
        scaling.parameter_groups(nn.Linear(3, 3), "adamw", 0.1)


# Init.


def test_the_own_init_is_rescaled_once_however_often_it_is_asked_for():
    scaling, model = mlp()
    drawn = values(model)
    scaling.initialize(model)
    once = values(model)
    # torch's own: 1/√fan-in for matrices, so that only readouts and biases change.
    assert torch.equal(once["hidden.weight"], drawn["hidden.weight"])
    assert torch.allclose(once["readout.weight"], drawn["readout.weight"] / math.sqrt(M))
    assert torch.allclose(once["hidden.bias"], drawn["hidden.bias"] * math.sqrt(M))
    assert torch.equal(once["input.bias"], drawn["input.bias"])  # its bound is that of fan-in 6 at every width
    scaling.initialize(model)
    Scaling.between(Mlp, BASE, TARGET).initialize(model)
    assert all(torch.equal(once[name], value) for name, value in values(model).items())


def test_a_trained_or_loaded_model_is_not_rescaled():
    scaling, model = mlp()
    with torch.no_grad():
        model.readout.weight.mul_(1.5)
    with pytest.raises(UserError, match=r"readout\.weight has standard deviation .* call add_multipliers\(model\)"):
        scaling.initialize(model)


def test_an_init_of_ones_own_is_a_standard_deviation_at_the_base_width():
    scaling, model = transformer()
    before = values(model)
    scaling.initialize(model, std=0.02, generator=torch.Generator().manual_seed(0))
    for name, factor in {"tokens.weight": 1, "queries.weight": M**-0.5, "head.weight": 1 / M, "positions": 1}.items():
        assert model.get_parameter(name).std().item() == pytest.approx(0.02 * factor, rel=0.05), name
    assert torch.equal(model.norms[0].weight, before["norms.0.weight"])
    assert torch.allclose(model.output.bias, before["output.bias"] * math.sqrt(M))  # biases keep their own law
    with pytest.raises(UserError, match="std: 'absent' is the name of no parameter"):
        scaling.initialize(model, std={"absent": 0.1})


def test_an_init_that_cannot_be_followed_must_be_given():
    class Orthogonal(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.turn = nn.Linear(width, width, bias=False)
            nn.init.orthogonal_(self.turn.weight)

    scaling = Scaling.between(Orthogonal, BASE, TARGET)
    with pytest.raises(UserError, match=r"turn\.weight: make_model fills it in a way that cannot be followed"):
        scaling.initialize(Orthogonal(TARGET))
    model = Orthogonal(TARGET)
    scaling.initialize(model, std={"turn.weight": 0.1})
    assert model.turn.weight.std().item() == pytest.approx(0.05, rel=0.05)


def test_gains_gates_zeros_and_frozen_parameters_keep_what_they_have():
    class Gated(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.a_log = nn.Parameter(torch.arange(1.0, width + 1).log())
            self.zero, self.frozen = nn.Linear(width, 3), nn.Linear(width, 3)
            nn.init.zeros_(self.zero.weight)
            self.frozen.requires_grad_(False)
            self.register_buffer("table", torch.randn(width, width))

    scaling = Scaling.between(Gated, BASE, TARGET)
    model = Gated(TARGET)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scaling.initialize(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {"zero.bias"}
    trained = [p for group in scaling.parameter_groups(model, "adamw", 1.0) for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_scaled_like_float32(dtype):
    scaling, model = mlp()
    model.to(dtype)
    drawn = values(model)
    scaling.initialize(model)
    scaling.initialize(model)
    assert model.readout.weight.dtype == dtype
    assert torch.allclose(model.readout.weight.double(), drawn["readout.weight"].double() / 2, rtol=1e-2)


def test_parameters_on_the_meta_device_have_groups_but_no_values_to_scale():
    scaling, _ = mlp()
    with torch.device("meta"):
        model = Mlp(TARGET)
    assert scaling.parameter_groups(model, "adamw", 0.1)
    with pytest.raises(UserError, match="on the meta device: materialise it"):
        scaling.initialize(model)


# Groups.


def test_groups_carry_the_hyperparameters_times_the_multipliers():
    scaling, model = transformer()
    scaling.initialize(model)
    groups = scaling.parameter_groups(model, "adamw", 2e-3, weight_decay=0.1, epsilon=1e-8)
    torch.optim.AdamW(groups)
    multipliers, names = scaling.multipliers("adamw"), {id(p): name for name, p in model.named_parameters()}
    seen = []
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            s = multipliers[name]
            decay = 0.1 * s.weight_decay if parameter.dim() > 1 else 0.0
            assert (group["lr"], group["weight_decay"], group["eps"]) == (
                2e-3 * s.learning_rate,
                decay,
                1e-8 * s.epsilon,
            )
            seen.append(name)
    assert sorted(seen) == sorted(names.values())


def test_what_decays_can_be_chosen():
    scaling, model = mlp()

    def decaying(decay: object) -> int:
        groups = scaling.parameter_groups(model, "sgd", 0.1, weight_decay=0.1, decay=decay)
        return sum(len(group["params"]) for group in groups if group["weight_decay"] > 0)

    assert [decaying(d) for d in ("weights", "all", lambda name, p: name == "readout.weight")] == [4, 7, 1]


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_muons_updates_have_spectral_norms_that_grow_as_root_fan_out_over_fan_in(adjust_lr_fn):
    """arXiv 2310.17813: ‖ΔW‖ ∝ √(fan-out/fan-in), which torch's own adjustment of the learning rate is not."""

    class Growing(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            inner = width**2 // 8  # grows faster than the width
            self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    norms = {}
    for width in (16, 64):
        scaling, model = Scaling.between(Growing, 16, width), Growing(width)
        groups = scaling.parameter_groups(
            model, "muon", 0.1, adamw_learning_rate=0.01, weight_decay=0.1, adjust_lr_fn=adjust_lr_fn
        )
        assert sum(len(group["params"]) for group in groups.muon) == 2
        assert sum(len(group["params"]) for group in groups.adamw) == 4
        assert all(group["lr"] * group["weight_decay"] == pytest.approx(0.01) for group in groups.muon)
        torch.manual_seed(0)
        # Muon's five steps turn singular values into something around 1: gradients alike at both widths.
        for parameter in model.parameters():
            grad = torch.zeros(parameter.shape)
            grad.view(-1)[0] = 1.0
            parameter.grad = grad
        before = values(model)
        torch.optim.Muon([{**group, "weight_decay": 0.0} for group in groups.muon]).step()
        for name in ("up.weight", "down.weight"):
            change = model.get_parameter(name).detach() - before[name]
            norms[name, width] = torch.linalg.matrix_norm(change, 2).item()
    assert norms["up.weight", 64] / norms["up.weight", 16] == pytest.approx(math.sqrt(16 / 4), rel=0.02)
    assert norms["down.weight", 64] / norms["down.weight", 16] == pytest.approx(math.sqrt(4 / 16), rel=0.02)


def test_muon_trains_the_same_matrices_at_every_width():
    at = [Scaling.between(Mlp, BASE, width) for width in (BASE, 2 * BASE, TARGET)]
    chosen = [[name for name in scaling.entries if scaling.trained_by_muon(name)] for scaling in at]
    assert chosen == [["hidden.weight", "narrow.weight"]] * 3


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [("muon", "adamw_learning_rate: None: Muon trains matrices alone"), ("lion", "optimizer: 'lion': use 'adamw'")],
)
def test_wrong_optimizers_are_named(optimizer, message):
    scaling, model = mlp()
    with pytest.raises(UserError, match=message):
        scaling.parameter_groups(model, optimizer, 0.1)


# Forward multipliers.


def test_a_tied_readout_has_a_multiplier_that_goes_into_a_weight_of_its_own_at_export():
    scaling, model = transformer(tied=True)
    ids = torch.randint(VOCABULARY, (2, CONTEXT))
    bias, plain = model.head.bias.detach().clone(), model(ids)
    with pytest.raises(UserError, match=r"head has no multiplier 0\.25 yet: call scaling\.initialize"):
        scaling.parameter_groups(model, "adamw", 0.1)
    for _ in range(3):
        scaling.add_multipliers(model)
    assert torch.allclose(model(ids) - bias, (plain - bias) / M, atol=1e-6)
    with_multiplier, names = model(ids), list(model.state_dict())
    scaling.remove_multipliers(model)
    assert torch.allclose(model(ids), with_multiplier, atol=1e-6)
    assert model.head.weight is not model.tokens.weight and list(model.state_dict()) == names
    assert not model.head._forward_pre_hooks and not model.head._forward_pre_hooks_with_kwargs


def test_multipliers_can_be_taken_away_without_a_trace():
    scaling, model = transformer(tied=True)
    ids = torch.randint(VOCABULARY, (2, CONTEXT))
    plain = model(ids)
    scaling.add_multipliers(model)
    scaling.remove_multipliers(model, fold=False)
    assert torch.equal(model(ids), plain) and model.head.weight is model.tokens.weight


def test_outputs_are_multiplied_as_asked_for():
    scaling = Scaling.between(Mlp, BASE, TARGET, output_multipliers={"narrow": 0.5})
    model, x = Mlp(TARGET), torch.randn(2, 6)
    seen = []
    model.readout.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    scaling.add_multipliers(model)
    model(x)
    scaling.remove_multipliers(model)
    model(x)
    assert torch.allclose(seen[1], seen[0] / 2) and torch.allclose(seen[2], seen[1])


# Depth.


class Deep(nn.Module):
    """Residual blocks of two matrices; `multiplier` is on every branch, as CompleteP writes it."""

    def __init__(self, width: int, depth: int, multiplier: float = 1.0) -> None:
        super().__init__()
        self.input, self.readout, self.multiplier = nn.Linear(4, width), nn.Linear(width, 3), multiplier
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(width), "up": nn.Linear(width, width), "down": nn.Linear(width, width)})
            for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.input(x)
        for block in self.blocks:
            x = x + self.multiplier * block["down"](block["up"](block["norm"](x)).relu())
        return self.readout(x)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_depth_scaling_trains_as_completep_with_its_multiplier_in_the_forward_pass(alpha):
    """arXiv 2505.01618, Table 1: residual × m^−α, and in blocks AdamW's LR × m^(α−1) and ε × m^−α."""
    growth, outputs = 3, ("down.weight", "down.bias")
    scaling = Scaling.between(lambda w: Deep(w, 6), BASE, TARGET, depth=Depth(2, 6, outputs, alpha))
    width_only = Scaling.between(lambda w: Deep(w, 6), BASE, TARGET)
    torch.manual_seed(0)
    folded, printed = Deep(TARGET, 6).double(), Deep(TARGET, 6, multiplier=growth**-alpha).double()
    printed.load_state_dict(folded.state_dict())
    scaling.initialize(folded)
    width_only.initialize(printed)
    arguments = {"weight_decay": 0.1, "epsilon": 1e-3, "decay": "all"}
    groups = width_only.parameter_groups(printed, "adamw", 0.01, **arguments)
    names = {id(p): name for name, p in printed.named_parameters()}
    single = [{**group, "params": [parameter]} for group in groups for parameter in group["params"]]
    for group in single:
        if names[id(group["params"][0])].startswith("blocks."):
            group["lr"] *= growth ** (alpha - 1)
            group["eps"] *= growth**-alpha
    steps = [
        torch.optim.AdamW(scaling.parameter_groups(folded, "adamw", 0.01, **arguments)),
        torch.optim.AdamW(single),
    ]
    for _ in range(4):
        x = torch.randn(8, 4, dtype=torch.float64)
        results = [model(x) for model in (folded, printed)]
        assert torch.allclose(*results, rtol=1e-9, atol=1e-11)
        for result, step in zip(results, steps, strict=True):
            step.zero_grad()
            result.square().mean().backward()
            step.step()
    with pytest.raises(UserError, match="CompleteP's rules are for AdamW"):
        scaling.parameter_groups(folded, "sgd", 0.1)


# The table.


def test_the_table_says_what_is_done_and_why():
    scaling, _ = transformer(tied=True)
    lines = str(scaling).splitlines()
    assert lines[0].startswith("gdn_mup, AdamW: width 32 -> 128")
    cells = {line.split()[0]: line for line in lines[2:]}
    assert "128×128" in cells["queries.weight"] and "Linear: fan-in ×4, fan-out ×4" in cells["queries.weight"]
    assert "norms.0-2.weight" in cells
    assert "tied: head multiplies by it" in cells["tokens.weight"]
    assert lines[-1] == "head: its input × 0.25 (tied to the embedding)"
    assert "ε" not in scaling.table("sgd").splitlines()[2]
    assert "; Muon" in scaling.table("muon")
