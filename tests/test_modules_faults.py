"""Models of all kinds: where the rules cannot be known they are refused by name, and never wrong without a word."""

import ast
import re
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from module_examples import VOCABULARY, Mlp, Transformer, llama
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from gdn_mup import Scaling
from gdn_mup.errors import UserError
from gdn_mup.modules.names import matching, patterns_for, resolve
from gdn_mup.scaling.growth import Axes

BASE, TARGET, M = 32, 128, 4
MakeModel = Callable[[int], nn.Module]


def refusal(make: MakeModel, base: int = BASE, target: int = TARGET, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        Scaling.between(make, base, target, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def cures(message: str) -> list[dict[str, dict[str, Any]]]:
    """Every cure that a refusal prints, as arguments."""
    found = re.findall(r"(axes|parts|output_multipliers)=(\{[^}]*\})", message)
    return [{argument: ast.literal_eval(text)} for argument, text in found]


def init(scaling: Scaling, name: str) -> float:
    return scaling.multipliers("adamw")[name].init_std


# Types: a subclass is believed in what torch's own class registers, in its shapes.


class Lora(nn.Linear):
    """A linear layer with a low-rank pair of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.A = nn.Parameter(torch.randn(8, inputs) / inputs**0.5)
        self.B = nn.Parameter(torch.zeros(outputs, 8))


class Twin(nn.Module):
    """The same in linear layers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False)
        self.A, self.B = nn.Linear(inputs, 8, bias=False), nn.Linear(8, outputs, bias=False)


class Transposed(nn.Linear):
    """Stores its weight [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def with_matrix(kind: type[nn.Module], *arguments: Any) -> MakeModel:
    """A layer of torch with a matrix [width, width] of its own."""

    def make(width: int) -> nn.Module:
        layer = type(f"My{kind.__name__}", (kind,), {})(*[width if a == "width" else a for a in arguments])
        layer.project = nn.Parameter(torch.randn(width, width) / width**0.5)
        return nn.Sequential(nn.Linear(6, width), layer)

    return make


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (nn.Linear, ("width", "width")),
        (nn.Embedding, (7, "width")),
        (nn.EmbeddingBag, (7, "width")),
        (nn.Conv1d, ("width", "width", 3)),
        (nn.ConvTranspose2d, ("width", "width", 3)),
        (nn.LayerNorm, ("width",)),
        (nn.RMSNorm, ("width",)),
        (nn.GroupNorm, (4, "width")),
        (nn.BatchNorm1d, ("width",)),
        (nn.MultiheadAttention, ("width", 4)),
        (nn.LSTM, ("width", "width")),
        (nn.GRUCell, ("width", "width")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_matrix_that_a_subclass_adds_is_asked_for(kind, arguments):
    make = with_matrix(kind, *arguments)
    message = refusal(make)
    assert "1.project" in message
    printed = [cure for cure in cures(message) if "axes" in cure]
    assert {"axes": {"*.project": "out in"}} in printed
    if kind is not nn.MultiheadAttention:  # whose heads grow here
        scaling = Scaling.between(make, BASE, TARGET, axes={"*.project": "out in"})
        assert init(scaling, "1.project") == M**-0.5


def test_a_low_rank_pair_in_a_subclass_gets_what_its_twin_in_layers_gets():
    make = lambda kind: lambda w: nn.Sequential(nn.Linear(6, w), kind(w, w))  # noqa: E731
    message = refusal(make(Lora))
    assert "1.A" in message and "1.B" in message
    pair = {"*.A": "out in", "*.B": "out in"}
    assert all(cure["axes"].keys() <= pair.keys() for cure in cures(message))
    mine = Scaling.between(make(Lora), BASE, TARGET, axes=pair)
    twin = Scaling.between(make(Twin), BASE, TARGET)
    for name in ("A", "B"):
        assert mine.multipliers("adamw")[f"1.{name}"] == twin.multipliers("adamw")[f"1.{name}.weight"]


def test_a_weight_that_contradicts_its_layer_is_asked_for():
    make = lambda w: nn.Sequential(Transposed(6, w), Transposed(w, 5))  # noqa: E731
    message = refusal(make)
    assert "0.weight" in message and "1.weight" in message
    scaling = Scaling.between(make, BASE, TARGET, axes={"*.weight": "in out"})
    assert [scaling.entries[f"{i}.weight"].axes for i in (0, 1)] == [Axes.FAN_OUT, Axes.FAN_IN]


# Weights that are computed.


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", amount=1)
    return layer


NORMS = [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm, pruned]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "options", [{}, {"axes": {"*original*": "out in", "*weight_*": "out in"}}, {"parts": {"1*": "whole"}}]
)
@pytest.mark.parametrize("outputs", [5, "width"])
@pytest.mark.parametrize("norm", NORMS, ids=["weight", "spectral", "new weight", "new spectral", "pruned"])
def test_a_weight_that_is_computed_is_refused_whatever_is_said_of_it(norm, outputs, options):
    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), norm(nn.Linear(width, width if outputs == "width" else outputs)))

    message = refusal(make, **options)
    assert "the weight of 1 is computed from it" in message and "build the model without" in message
    frozen = Scaling.between(lambda w: nn.Sequential(*make(w)[:1], make(w)[1].requires_grad_(False)), BASE, TARGET)
    assert init(frozen, "0.weight") == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_cure_for_a_computed_weight_works():
    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), nn.utils.remove_weight_norm(weight_norm(nn.Linear(width, 5))))

    assert init(Scaling.between(make, BASE, TARGET), "1.weight") == 1 / M


# What is filled in parts.


def forget_gates(width: int) -> nn.Module:
    lstm = nn.LSTM(8, width)
    with torch.no_grad():
        lstm.bias_ih_l0[width : 2 * width] = 1.0
    return lstm


def test_forget_gates_of_one_stay_one_and_the_rest_is_rescaled():
    scaling, model = Scaling.between(forget_gates, BASE, TARGET), forget_gates(TARGET)
    before = model.bias_ih_l0.detach().clone()
    for _ in range(2):
        scaling.initialize(model)
        assert (model.bias_ih_l0[TARGET : 2 * TARGET] == 1).all()
        assert torch.allclose(model.bias_ih_l0[:TARGET], before[:TARGET] * M**0.5)
        assert torch.allclose(model.bias_ih_l0[2 * TARGET :], before[2 * TARGET :] * M**0.5)


@pytest.mark.parametrize("std", [None, 0.02, {"*": 0.02}])
@pytest.mark.parametrize("rows", [50, 3])
def test_padding_rows_stay_zero(rows, std):
    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(rows, width, padding_idx=1), nn.Linear(width, 4))

    scaling, model = Scaling.between(make, BASE, TARGET), make(TARGET)
    scaling.initialize(model, std=std)
    assert (model[0].weight[1] == 0).all() and (model[0].weight[0] != 0).all()
    if std is None:
        scaling.initialize(model)


def fused(width: int) -> nn.Module:
    """Three matrices of one parameter, each drawn by a law of its own, the last one zero."""
    layer = nn.Linear(width, 3 * width, bias=False)
    for i, scale in enumerate((1.0, 2.0, 0.0)):
        nn.init.normal_(layer.weight[i * width : (i + 1) * width], std=max(scale, 1) / width)
        with torch.no_grad():
            layer.weight[2 * width :] = 0.0
    return layer


def test_matrices_drawn_apart_are_rescaled_each_by_its_own_law():
    scaling, model = Scaling.between(fused, BASE, TARGET), fused(TARGET)
    scaling.initialize(model)
    sizes = [rows.std().item() for rows in model.weight.split(TARGET)]
    assert sizes == [pytest.approx(0.5 / BASE, rel=0.03), pytest.approx(1 / BASE, rel=0.03), 0]
    model.weight.data[TARGET : 2 * TARGET] *= 3
    with pytest.raises(UserError, match="weight has standard deviation"):
        scaling.initialize(model)


# What an init is compared with.


class Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(width // 16).uniform_(1, 16).log())
        self.dt = nn.Parameter(torch.arange(1.0, width // 8 + 1).log())
        self.norm = nn.LayerNorm(width)


def gated(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(64, width), Gate(width), nn.Linear(width, width, bias=False), nn.Linear(width, 64, bias=False)
    )


@pytest.mark.parametrize("value", [0.0, float("nan"), float("-inf"), float("inf"), 100.0])
@pytest.mark.parametrize(
    "name", ["0.weight", "1.A_log", "1.dt", "1.norm.weight", "1.norm.bias", "2.weight", "3.weight"]
)
def test_whatever_is_not_as_the_model_draws_it_is_named_before_anything_is_changed(name, value):
    scaling, model = Scaling.between(gated, 64, 256), gated(256)
    readout = model[3].weight.detach().clone()
    model.get_parameter(name).data.fill_(value)
    if (name, value) == ("1.norm.bias", 0.0):
        scaling.initialize(model)
        return
    with pytest.raises(UserError, match=re.escape(name)):
        scaling.initialize(model)
    if name != "3.weight":
        assert torch.equal(model[3].weight, readout)


def test_everything_that_is_wrong_is_in_one_line():
    scaling, model = Scaling.between(gated, 64, 256), gated(256).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(UserError) as error:
        scaling.initialize(model)
    for name in ("0.weight", "1.A_log", "1.dt", "1.norm.weight", "2.weight", "3.weight"):
        assert name in str(error.value)


def test_a_model_moved_to_memory_without_its_init_is_refused():
    scaling = Scaling.between(gated, 64, 256)
    with torch.device("meta"):
        model = gated(256)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(1e-3)
    with pytest.raises(UserError, match=r"1\.A_log"):
        scaling.initialize(model)


class Few(nn.Module):
    """So few entries that their size says nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f, self.q = nn.Linear(4, width), nn.Parameter(torch.randn(width) / width**0.5)
        self.out = nn.Linear(width, 1)


def test_twice_is_once_however_few_entries_there_are():
    scaling, model = Scaling.between(Few, 16, 32), Few(32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        scaling.initialize(model)
        assert torch.allclose(model.q, before["q"] * 2**0.5)
        assert torch.allclose(model.out.weight, before["out.weight"] * 2**-0.5)
    import copy

    twin = copy.deepcopy(model)
    Scaling.between(Few, 16, 32).initialize(twin)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(UserError, match="initialised by another Scaling"):
        Scaling.between(Few, 8, 32).initialize(model)


def test_an_init_run_again_after_the_rules_is_noticed():
    scaling, model = Scaling.between(Mlp, BASE, TARGET), Mlp(TARGET)
    scaling.initialize(model)
    model.readout.reset_parameters()
    with pytest.raises(UserError, match=r"readout\.weight has standard deviation"):
        scaling.initialize(model)


def test_complex_weights_are_followed_and_rescaled_by_their_absolute_values():
    class Rotating(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.f = nn.Linear(4, width)
            self.m = nn.Parameter(torch.randn(width, width, dtype=torch.cfloat) / width)

    scaling, model = Scaling.between(Rotating, BASE, TARGET, axes={"m": "in out"}), Rotating(TARGET)
    scaling.initialize(model)
    assert model.m.abs().square().mean().sqrt().item() == pytest.approx(0.5 / BASE, rel=0.02)
    scaling.initialize(model, std={"m": 0.1})
    assert model.m.abs().square().mean().sqrt().item() == pytest.approx(0.05, rel=0.02)


class Tables(nn.Module):
    """Values that are computed: sines of positions, and a matrix of them that would have to be scaled."""

    def __init__(self, width: int, *mixed: str) -> None:
        super().__init__()
        self.f = nn.Linear(4, width)
        self.positions = nn.Parameter(torch.sin(torch.arange(10.0)[:, None] * torch.arange(width) / width))
        for name in mixed:
            setattr(self, name, nn.Parameter(torch.sin(torch.arange(float(width))[:, None] * torch.arange(width))))


def test_tables_stay_where_nothing_scales_them_and_are_asked_for_together_where_something_does():
    axes = {"positions": "stack out", "a": "out in", "b": "out in"}
    scaling, model = Scaling.between(Tables, BASE, TARGET, axes={"positions": "stack out"}), Tables(TARGET)
    before = model.positions.detach().clone()
    scaling.initialize(model)
    assert torch.equal(model.positions, before)
    mixed = Scaling.between(lambda w: Tables(w, "a", "b"), BASE, TARGET, axes=axes)
    with pytest.raises(UserError, match=r"a: make_model fills it .*std=\{'a': \.\.\.\}.*; b: make_model fills it"):
        mixed.initialize(Tables(TARGET, "a", "b"))
    mixed.initialize(Tables(TARGET, "a", "b"), std={"a": 0.1, "b": 0.1})


# What is not trained.


class Frozen(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.randn(8, width), requires_grad=False)
        self.fused = nn.Linear(8, width + 16).requires_grad_(False)
        self.o = nn.Linear(width, 4)


def test_nothing_is_asked_of_what_no_optimizer_trains():
    scaling, model = Scaling.between(Frozen, BASE, TARGET), Frozen(TARGET)
    before = model.fused.weight.clone()
    scaling.initialize(model)
    assert torch.equal(model.fused.weight, before) and init(scaling, "fused.weight") == 1
    assert len(scaling.parameter_groups(model, "adamw", 1.0)) == 2
    model.fused.requires_grad_(True)
    for call in (scaling.initialize, lambda m: scaling.parameter_groups(m, "adamw", 1.0)):
        with pytest.raises(UserError, match=r"fused\.weight, fused\.bias: trained here, and frozen in make_model's"):
            call(model)


class Tied(nn.Module):
    def __init__(self, width: int, frozen: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, width), nn.Linear(width, 64, bias=False)
        self.head.weight = self.embed.weight
        self.requires_grad_(not frozen)
        self.A, self.B = nn.Linear(width, 8, bias=False), nn.Linear(8, width, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, ids: Tensor, labels: Tensor | None = None, fused: bool = False, features: bool = False) -> Any:
        h = self.embed(ids)
        h = h + self.B(self.A(h))
        if features:
            return h
        logits = functional.linear(h, self.head.weight) if fused else self.head(h)
        if labels is None:
            return logits
        return SimpleNamespace(loss=functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_a_frozen_pretrained_model_computes_what_it_did():
    scaling, model, ids = (
        Scaling.between(lambda w: Tied(w, True), BASE, TARGET),
        Tied(TARGET, True),
        torch.arange(8)[None],
    )
    before = model(ids)
    scaling.initialize(model)
    assert torch.equal(model(ids), before) and scaling.readouts == {}
    trained = {id(p) for group in scaling.parameter_groups(model, "adamw", 1.0) for p in group["params"]}
    assert trained == {id(model.A.weight), id(model.B.weight)}


def test_a_model_frozen_after_it_was_built_says_whether_it_has_the_multiplier():
    scaling, model = Scaling.between(Tied, BASE, TARGET), Tied(TARGET)
    model.embed.requires_grad_(False)
    with pytest.raises(UserError, match=r"embed\.weight is frozen, .* head gets a multiplier: freeze it in make_model"):
        scaling.initialize(model)
    scaling.add_multipliers(model)
    assert scaling.parameter_groups(model, "adamw", 1.0)


# Multipliers and the passes that they are in.


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_around_a_tied_readout_is_refused(compiled):
    scaling, model = Scaling.between(Tied, BASE, TARGET), Tied(TARGET)
    scaling.initialize(model)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    ids = torch.arange(16).view(2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(ids, labels=ids).loss.backward()
        if not compiled:
            run(ids, features=True)  # no readout, no multiplier: nothing is lost
            with torch.no_grad():
                run(ids, labels=ids)
    with pytest.raises(UserError, match=r"uses head\.weight without calling head"):
        run(ids, labels=ids, fused=True)
    with torch.no_grad(), pytest.warns(UserWarning, match="head was not called in this pass"):
        run(ids, labels=ids, fused=True)
    scaling.remove_multipliers(model)
    run(ids, labels=ids, fused=True)


@pytest.mark.parametrize("way", ["compile", "method"])
def test_a_graph_compiled_before_the_multiplier_has_it(way):
    scaling, model, ids = Scaling.between(Tied, BASE, TARGET), Tied(TARGET), torch.arange(16).view(2, 8)
    if way == "method":
        model.compile(backend="eager")
    run = torch.compile(model, backend="eager") if way == "compile" else model
    plain = run(ids)
    scaling.initialize(model)
    assert torch.allclose(run(ids), plain / M, atol=1e-6)
    scaling.remove_multipliers(model, fold=False)
    assert torch.allclose(run(ids), plain, atol=1e-6)
    scaling.add_multipliers(model)
    assert torch.allclose(run(ids), plain / M, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(run(ids), plain / M, atol=1e-6)


class Branching(nn.Module):
    """A module that returns what `output` makes, and one that is never called."""

    def __init__(self, width: int, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.f, self.branch, self.never = nn.Linear(4, width), nn.Module(), nn.Linear(width, width)
        self.branch.forward = output

    def forward(self, x: Tensor) -> Tensor:
        self.branch(self.f(x))
        return self.f(x)


OUTPUTS = [lambda x: (x, x), lambda x: [x], lambda x: {"h": x}, lambda x: SimpleNamespace(h=x), lambda x: None]


@pytest.mark.parametrize("output", OUTPUTS, ids=["tuple", "list", "dict", "object", "none"])
def test_a_multiplier_on_what_is_no_tensor_is_refused(output):
    make = lambda w: Branching(w, output)  # noqa: E731
    assert "branch returns a" in refusal(make, output_multipliers={"branch": 0.5})
    # The same where the model cannot be called without values.
    scaling = Scaling.between(make, BASE, TARGET, output_multipliers={"branch": 0.5}, call=lambda model: 1 / 0)
    model = make(TARGET)
    scaling.initialize(model)
    with pytest.raises(UserError, match="branch returns a"):
        model(torch.zeros(2, 4))


def test_a_multiplier_on_what_is_never_called_is_refused():
    make = lambda w: Branching(w, lambda x: x)  # noqa: E731
    assert "never is not called" in refusal(make, output_multipliers={"never": 0.5})
    call = lambda model: model.never(model(torch.zeros(2, 4, device=model.f.weight.device)))  # noqa: E731
    Scaling.between(make, BASE, TARGET, output_multipliers={"never": 0.5}, call=call)
    scaling = Scaling.between(make, BASE, TARGET, output_multipliers={"never": 0.5}, call=lambda model: 1 / 0)
    model = make(TARGET)
    scaling.initialize(model)
    with pytest.raises(UserError, match="never is not called in this pass"):
        model(torch.zeros(2, 4))
    with torch.no_grad():
        model(torch.zeros(2, 4))


def test_a_multiplier_on_one_of_many_experts_may_be_missed():
    class Experts(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.f, self.experts = nn.Linear(4, width), nn.ModuleList(nn.Linear(width, width) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[int(x.sum() > 0)](self.f(x))

    scaling = Scaling.between(Experts, BASE, TARGET, output_multipliers={"experts.*": 0.5})
    model = Experts(TARGET)
    scaling.initialize(model)
    for sign in (1, -1):
        model(sign * torch.ones(2, 4)).sum().backward()


def test_a_multiplier_folds_only_into_a_weight_of_its_own():
    class Model(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, width)
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    scaling, model, x = Scaling.between(Model, 32, 64, output_multipliers={"b": 0.5}), Model(64), torch.ones(2, 4)
    scaling.add_multipliers(model)
    before = model(x)
    with pytest.raises(UserError, match=r"b: a multiplier folds into .* fold=False"):
        scaling.remove_multipliers(model)
    assert torch.equal(model(x), before)


def test_folding_unties_every_config_within():
    pytest.importorskip("transformers")
    make = lambda w: llama(w, tie_word_embeddings=True)  # noqa: E731
    scaling, model = Scaling.between(make, 64, 128), make(128)
    scaling.initialize(model)
    inner = SimpleNamespace(tie_word_embeddings=True, vision_config=SimpleNamespace(tie_word_embeddings=True))
    model.config.text_config = inner
    model.model.config = SimpleNamespace(tie_word_embeddings=True)
    scaling.remove_multipliers(model)
    flags = [model.config, inner, inner.vision_config, model.model.config]
    assert [config.tie_word_embeddings for config in flags] == [False] * 4


# Softmax attention, whatever it is called.


class Heads(nn.Module):
    """Attention of four heads: its products and their scale as `attend` computes them."""

    def __init__(self, width: int, attend: Callable[..., Tensor], norm: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.embed, self.out, self.attend = nn.Embedding(64, width), nn.Linear(width, 64), attend
        self.project = nn.Linear(width, 3 * width) if fused else None
        self.q, self.k, self.v = (None if fused else nn.Linear(width, width) for _ in range(3))
        self.norm = nn.RMSNorm(width // 4) if norm else None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        three = self.project(x).chunk(3, -1) if self.project is not None else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in three)
        q = q if self.norm is None else self.norm(q)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5).softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("bhqk,bhkd->bhqd", functional.softmax(scores.float(), dim=-1), v)


def by_mup(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, scale=8 / q.shape[-1])


def by_constant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, scale=1 / 16)


@pytest.mark.parametrize(
    ("attend", "factor"),
    [
        (functional.scaled_dot_product_attention, 0.5),
        (by_matmul, 0.5),
        (by_einsum, 0.5),
        (by_constant, 0.25),
        (by_mup, None),
    ],
    ids=["sdpa", "matmul", "einsum", "constant", "mup"],
)
@pytest.mark.parametrize("norm", [False, True])
def test_softmax_attention_is_known_by_what_it_computes(attend, factor, norm):
    make = lambda w: Heads(w, attend, norm)  # noqa: E731
    if factor is None:
        Scaling.between(make, BASE, TARGET)
        return
    message = refusal(make)
    assert "head_dim grows from 8 to 32" in message
    printed = [cure for cure in cures(message) if "output_multipliers" in cure]
    assert printed == [{"output_multipliers": {"norm" if norm else "q": factor}}]
    scaling = Scaling.between(make, BASE, TARGET, **printed[0])
    model = make(TARGET)
    scaling.initialize(model)
    assert "grows from 8 to 32" in refusal(make, output_multipliers={"q" if norm else "v": factor})
    assert "multiplies them by 0.9" in refusal(make, output_multipliers={"k": 0.9})
    assert "head_dim" not in str(Scaling.between(lambda w: Heads(4 * (w // 4), attend), 32, 32))


def test_a_fused_projection_has_no_cure_but_more_heads():
    message = refusal(lambda w: Heads(w, by_matmul, fused=True))
    assert message.endswith("grow the number of heads") and not cures(message)


def test_products_with_parameters_and_growing_heads_are_no_attention():
    class Routed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.f, self.experts = nn.Linear(4, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.f(x)[:, None]
            return (h @ self.experts.weight.t()).softmax(-1)

    Scaling.between(Routed, BASE, TARGET)
    Scaling.between(lambda w: Transformer(w), BASE, TARGET, axes={"positions": "stack out"})


@pytest.mark.parametrize("heads", [4, None])
def test_bert_is_refused_with_larger_heads_and_not_with_more(heads):
    transformers = pytest.importorskip("transformers")

    def make(width: int) -> nn.Module:
        sizes = {"vocab_size": 64, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, num_attention_heads=heads or width // 16))

    if heads is None:
        Scaling.between(make, 64, 256)
        return
    message = refusal(make, 64, 256)
    assert cures(message) == [{"output_multipliers": {"*.query": 0.5}}]
    scaling = Scaling.between(make, 64, 256, **cures(message)[0])
    assert set(scaling.outputs.values()) == {0.5} and len(scaling.outputs) == 2


def test_torchs_own_attention_has_no_cure_but_more_heads():
    layer = lambda w: nn.TransformerEncoderLayer(w, 4, 2 * w, batch_first=True)  # noqa: E731
    for options in ({}, {"output_multipliers": {"self_attn.out_proj": 0.5}}):
        message = refusal(layer, **options)
        assert "self_attn: head_dim grows from 8 to 32" in message and not cures(message)
    assert "out_proj is not called" in message
    Scaling.between(lambda w: nn.TransformerEncoderLayer(w, w // 8, 2 * w, batch_first=True), BASE, TARGET)


# Sizes that agree by chance.


def test_rows_that_grow_as_features_do_are_no_vocabulary():
    class Gates(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.heads, self.gate = nn.Embedding(width // 8, width), nn.Linear(width, width // 8)
            self.code, self.hidden, self.out = nn.Embedding(width, width), nn.Linear(width, width), nn.Linear(width, 4)

    scaling = Scaling.between(Gates, 64, 256)
    assert [init(scaling, f"{name}.weight") for name in ("gate", "hidden", "out")] == [0.5, 0.5, 0.25]


def test_an_axis_that_rounding_hides_grows_at_every_target():
    def make(width: int) -> nn.Module:
        inner = -(-8 * width // 3 // 256) * 256
        return nn.Sequential(nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False))

    found = {}
    for target in (96, 128, 160, 512):
        scaling = Scaling.between(make, 64, target)
        assert scaling.entries["0.weight"].axes is Axes.BOTH and scaling.entries["1.weight"].axes is Axes.BOTH
        found[target] = init(scaling, "0.weight")
    assert found == {target: (64 / target) ** 0.5 for target in found}


def test_a_family_of_two_widths_is_enough():
    sizes = {32: 48, 128: 192}
    make = lambda w: nn.Sequential(nn.Linear(w, sizes[w]), nn.Linear(sizes[w], w))  # noqa: E731
    assert init(Scaling.between(make, 32, 128), "0.weight") == 0.5


def test_a_family_that_gets_deeper_at_other_widths_is_enough():
    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), *[nn.Linear(width, width) for _ in range(2 if width < 200 else 4)])

    scaling = Scaling.between(make, 32, 128)
    assert init(scaling, "1.weight") == 0.5 and len(scaling.entries) == 6


# Memory.


class Aliased(nn.Module):
    def __init__(self, width: int, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, width), nn.Linear(width, 64, bias=False)
        self.head.weight.data = view(self.embed.weight.data)


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[:32], lambda t: t.view(64, -1)])
def test_two_parameters_over_one_memory_are_refused(view):
    assert "head.weight" in refusal(lambda w: Aliased(w, view))

    def untied(width: int) -> nn.Module:
        return nn.ModuleDict({"embed": nn.Embedding(64, width), "head": nn.Linear(width, 64, bias=False)})

    scaling, model = Scaling.between(untied, BASE, TARGET), untied(TARGET)
    model["head"].weight.data = model["embed"].weight.data
    with pytest.raises(UserError, match=r"head\.weight shares its memory with embed\.weight"):
        scaling.initialize(model)


def test_axes_may_be_named_by_any_name_of_a_shared_parameter():
    class Shared(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(6, width), nn.Module(), nn.Linear(width, 3)
            self.two.mixing = self.one.weight

    message = refusal(Shared)
    assert "shared by modules that use it differently" in message
    for cure in cures(message):
        Scaling.between(Shared, BASE, TARGET, **cure)
    scaling = Scaling.between(Shared, BASE, TARGET, axes={"two.mixing": "out in"})
    assert scaling.entries["one.weight"].axes is Axes.FAN_OUT


# One error, and cures that were tried.


class Asks(nn.Module):
    """Something of everything that is asked for, in blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Parameter(torch.randn(width, width)), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"gate": nn.Module(), "fused": nn.Linear(width, width + 16)}) for _ in range(12)
        )
        for block in self.blocks:
            block["gate"].weight = nn.Parameter(torch.zeros(4, width))
        self.f = nn.Linear(width, width + 8)


def test_everything_that_is_open_is_in_one_error_and_its_cures_work_when_pasted():
    message = refusal(Asks)
    assert message.startswith("4 questions are open: (1) proj")
    found = cures(message)
    patterns = {pattern for cure in found for said in cure.values() for pattern in said}
    assert patterns == {"proj", "*.gate.weight", "*.fused", "f"}
    together: dict[str, dict[str, Any]] = {}
    for cure in found:
        for argument, said in cure.items():
            together[argument] = said | together.get(argument, {})
    scaling = Scaling.between(Asks, BASE, TARGET, **together)
    assert scaling.entries["proj"].axes is Axes.BOTH
    assert scaling.entries["blocks.11.gate.weight"].axes is Axes.FAN_IN
    assert scaling.entries["norm.weight"].axes is Axes.FAN_OUT


@pytest.mark.parametrize("names", [["a.b.weight"], ["proj"], ["blocks.0.a", "blocks.1.a"], ["x.0.a", "y.1.b"], [""]])
def test_printed_patterns_match_what_they_are_for_and_nothing_else(names):
    others = ["a.norm.weight", "b.weight", "x.proj", "blocks.0.b", "blocks.10.c.a", "x.1.a", "y.0.b", "a", "b.0.a.c"]
    known = [*names, *others]
    patterns = patterns_for(names, known)
    assert {name for pattern in patterns for name in matching(known, pattern)} == set(names)


def test_the_last_pattern_holds_and_a_whole_name_above_all():
    said = resolve({"head": 1, "*.head": 2, "*": 3}, ["head", "a.head", "b"])
    assert said == {"head": 1, "a.head": 3, "b": 3}


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (lambda w: __import__("a_package_that_is_not_there"), "ModuleNotFoundError: No module named 'a_package_that"),
        (lambda w: (_ for _ in ()).throw(AssertionError("heads must divide")), "AssertionError: heads must divide"),
        (lambda w: [][w], "IndexError: list index out of range"),
        (lambda w: sys.exit(1), r"sys\.exit\(1\) was called"),
        (lambda w: nn.Linear(w, w).weight.tolist(), "must build a model without reading any tensor's values"),
    ],
)
def test_what_make_model_raises_is_said_with_file_and_line_and_no_cure_that_does_not_fit(fails, message):
    said = refusal(fails)
    assert re.search(message, said)
    if "exit" not in message:
        assert f"{__name__}.py:" in said
    assert ("without reading" in said) == ("without reading" in message)


def test_a_lazy_model_is_to_be_called_once():
    lazy = lambda w: nn.Sequential(nn.LazyLinear(w), nn.LazyLinear(4))  # noqa: E731
    assert re.search(r"make_model\(32\): 0\.weight has no shape .*call the model once in make_model", refusal(lazy))

    def called(width: int) -> nn.Module:
        model = lazy(width)
        model(torch.zeros(1, 6))
        return model

    scaling = Scaling.between(called, BASE, TARGET)
    assert init(scaling, "1.weight") == 1 / M
    for call in (scaling.initialize, lambda m: scaling.parameter_groups(m, "adamw", 1.0)):
        with pytest.raises(UserError, match="has no shape before the first input"):
            call(lazy(TARGET))


def test_adamw_takes_no_sparse_gradients():
    make = lambda w: nn.Sequential(nn.Embedding(8, w, sparse=True), nn.Linear(w, 8))  # noqa: E731
    scaling, model = Scaling.between(make, BASE, TARGET), make(TARGET)
    scaling.initialize(model)
    with pytest.raises(UserError, match="0: sparse: True: AdamW takes no sparse gradients: use sparse=False"):
        scaling.parameter_groups(model, "adamw", 1.0)
    assert scaling.parameter_groups(model, "sgd", 1.0)


SCHEDULERS: dict[str, tuple[bool, Callable[..., Any]]] = {
    "cosine": (True, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8)),
    "step": (True, lambda o: torch.optim.lr_scheduler.StepLR(o, 2)),
    "lambda": (True, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1, (step + 1) / 4))),
    "cosine to a rate": (False, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8, eta_min=1e-3)),
    "one cycle": (False, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2e-3, total_steps=9)),
    "one cycle of each group": (
        True,
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [group["lr"] for group in o.param_groups], total_steps=9),
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_keep_or_lose_the_ratios_as_the_page_says(name):
    keeps, schedule = SCHEDULERS[name]
    scaling, model = Scaling.between(Mlp, BASE, TARGET), Mlp(TARGET)
    optimizer = torch.optim.AdamW(scaling.parameter_groups(model, "adamw", 2e-3))
    first = [group["lr"] for group in optimizer.param_groups]
    scheduler = schedule(optimizer)
    for _ in range(7):
        scheduler.step()
    ratios = [group["lr"] / rate for group, rate in zip(optimizer.param_groups, first, strict=True)]
    assert (max(ratios) / min(ratios) < 1.001) == keeps


def test_a_known_types_name_is_no_evidence():
    class Mamba2(nn.Module):
        """Not fla's."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.in_proj = nn.Linear(width, width + 16)

    class MixtralExperts(nn.Module):
        """Not transformers': its matrices are [experts, in, out]."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.gate_up_proj = nn.Linear(4, width), nn.Parameter(torch.zeros(4, width, 6))

    assert "in_proj.weight" in refusal(lambda w: nn.Sequential(Mamba2(w)))
    assert "gate_up_proj" in refusal(MixtralExperts)


@pytest.mark.parametrize("split", [lambda parent: parent.absent, lambda parent: [1, "x"], lambda parent: None])
def test_a_split_that_fails_is_said_with_its_parameter(split):
    make = lambda w: nn.Sequential(nn.LayerNorm(w), nn.Linear(w, w + 16))  # noqa: E731
    assert "parts: 1.weight: " in refusal(make, parts={"1": split})


@pytest.mark.parametrize("name", ["Qwen3_5Moe", "KimiLinear", "BailingHybrid", "Mixtral"])
def test_transformers_experts_and_routers_are_known_by_type_and_shape(name):
    transformers = pytest.importorskip("transformers")
    import importlib

    folder = {"Qwen3_5Moe": "qwen3_5_moe", "KimiLinear": "kimi_linear", "BailingHybrid": "bailing_hybrid"}
    modeling = importlib.import_module(
        f"transformers.models.{folder.get(name, name.lower())}.modeling_{folder.get(name, name.lower())}"
    )
    assert transformers

    class Config(SimpleNamespace):
        def __getattr__(self, key: str) -> Any:
            return {"hidden_act": "silu"}.get(key, 1)

    class Model(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            sizes = {"num_experts": 4, "num_local_experts": 4, "hidden_size": width, "num_experts_per_tok": 2}
            config = Config(**sizes, moe_intermediate_size=2 * width, intermediate_size=2 * width)
            router = next(
                getattr(modeling, f"{name}Top{k}Router") for k in "kK" if hasattr(modeling, f"{name}Top{k}Router")
            )
            self.experts, self.router = getattr(modeling, f"{name}Experts")(config), router(config)

    scaling = Scaling.between(Model, BASE, TARGET)
    axes = {key.rpartition(".")[2]: entry.axes for key, entry in scaling.entries.items()}
    assert axes | {"gate_up_proj": Axes.BOTH, "down_proj": Axes.BOTH, "weight": Axes.FAN_IN} == axes
    assert VOCABULARY
