"""Models composed at random from torch's modules: each gets the multipliers of its own shapes, or is refused.

What is expected is worked out here from the sizes that a model was composed of and the tables of docs/rules.md, without
anything of the library's.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from gdn_mup import Scaling
from gdn_mup.errors import UserError

BASE = 16
Size = Callable[[int], int]

SIZES: dict[str, Size] = {
    "fixed": lambda w: 6,
    "width": lambda w: w,
    "double": lambda w: 2 * w,
    "half": lambda w: w // 2,
    "rounded": lambda w: -(-3 * w // 32) * 32,  # the same at some widths, and wider in the end
    "square": lambda w: w * w // 16,
}


class Expected(NamedTuple):
    """A parameter: whether it multiplies (else it is a vector or a lookup table), and what it reads and writes."""

    weighs: bool
    reads: tuple[str, ...]  # names of sizes whose product is the fan-in; none: 1
    writes: tuple[str, ...]
    constant: float | None = None  # what it is filled with, if by one number


class Layer(NamedTuple):
    """A module, and what its parameters are by name; None where it must be refused."""

    make: Callable[[int], nn.Module]
    parameters: dict[str, Expected] | None


def linear(i: str, o: str, bias: bool) -> Layer:
    biases = {"bias": Expected(False, (), (o,))} if bias else {}
    make = lambda w: nn.Linear(SIZES[i](w), SIZES[o](w), bias=bias)  # noqa: E731
    return Layer(make, {"weight": Expected(True, (i,), (o,))} | biases)


def embedding(o: str, padded: bool) -> Layer:
    return Layer(
        lambda w: nn.Embedding(11, SIZES[o](w), padding_idx=0 if padded else None),
        {"weight": Expected(False, (), (o,))},
    )


def convolution(i: str, o: str, transposed: bool) -> Layer:
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    make = lambda w: kind(SIZES[i](w), SIZES[o](w), 3)  # noqa: E731
    return Layer(make, {"weight": Expected(True, (i,), (o,)), "bias": Expected(False, (), (o,))})


def depthwise(o: str) -> Layer:
    make = lambda w: nn.Conv1d(SIZES[o](w), SIZES[o](w), 3, groups=SIZES[o](w), bias=False)  # noqa: E731
    return Layer(make, {"weight": Expected(True, (), (o,))})


def norm(kind: type[nn.Module], o: str) -> Layer:
    ones = {"weight": Expected(False, (), (o,), 1.0)}
    zeros = {} if kind is nn.RMSNorm else {"bias": Expected(False, (), (o,), 0.0)}
    return Layer(lambda w: kind(SIZES[o](w)), ones | zeros)


def recurrent(kind: type[nn.RNNBase], i: str, o: str, forget: bool) -> Layer:
    def make(width: int) -> nn.Module:
        module = kind(SIZES[i](width), SIZES[o](width))
        if forget:
            with torch.no_grad():
                module.bias_ih_l0[: SIZES[o](width)] = 1.0
        return module

    biases = {f"bias_{side}_l0": Expected(False, (), (o,)) for side in ("ih", "hh")}
    weights = {"weight_ih_l0": Expected(True, (i,), (o,)), "weight_hh_l0": Expected(True, (o,), (o,))}
    return Layer(make, weights | biases)


def attention(more_heads: bool) -> Layer:
    make = lambda w: nn.MultiheadAttention(w, w // 8 if more_heads else 2)  # noqa: E731
    matrices = dict.fromkeys(("in_proj_weight", "out_proj.weight"), Expected(True, ("width",), ("width",)))
    zeros = dict.fromkeys(("in_proj_bias", "out_proj.bias"), Expected(False, (), ("width",), 0.0))
    return Layer(make, matrices | zeros if more_heads else None)


def bare(i: str, o: str) -> Layer:
    def make(width: int) -> nn.Module:
        module = nn.Module()
        module.mixing = nn.Parameter(torch.randn(SIZES[o](width), SIZES[i](width)) / SIZES[i](width) ** 0.5)
        return module

    return Layer(make, {"mixing": Expected(True, (), ())} if {i, o} == {"fixed"} else None)


def subclass(i: str, o: str) -> Layer:
    class Own(nn.Linear):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(inputs, outputs)
            self.extra = nn.Parameter(torch.zeros(inputs, 5))

    known = {
        "weight": Expected(True, (i,), (o,)),
        "bias": Expected(False, (), (o,)),
        "extra": Expected(True, (), (), 0.0),
    }
    return Layer(lambda w: Own(SIZES[i](w), SIZES[o](w)), known if i == "fixed" else None)


def normed(i: str, o: str) -> Layer:
    make = lambda w: parametrizations.weight_norm(nn.Linear(SIZES[i](w), SIZES[o](w), bias=False))  # noqa: E731
    return Layer(make, {} if {i, o} == {"fixed"} else None)


def frozen(i: str, o: str) -> Layer:
    make = lambda w: nn.Linear(SIZES[i](w), SIZES[o](w) + 1).requires_grad_(False)  # noqa: E731
    return Layer(make, {})


SIZE = st.sampled_from(sorted(SIZES))
LAYERS = st.one_of(
    st.builds(linear, SIZE, SIZE, st.booleans()),
    st.builds(embedding, SIZE, st.booleans()),
    st.builds(convolution, SIZE, SIZE, st.booleans()),
    st.builds(depthwise, SIZE),
    st.builds(norm, st.sampled_from([nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d]), SIZE),
    st.builds(recurrent, st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]), SIZE, SIZE, st.booleans()),
    st.builds(attention, st.booleans()),
    st.builds(bare, SIZE, SIZE),
    st.builds(subclass, SIZE, SIZE),
    st.builds(normed, SIZE, SIZE),
    st.builds(frozen, SIZE, SIZE),
)


class Composed(NamedTuple):
    """Layers side by side, an embedding with a readout that shares its matrix or its memory, and what is expected."""

    make: Callable[[int], nn.Module]
    parameters: dict[str, Expected]
    refused: set[int]
    tied: bool


def compose(layers: list[Layer], tie: str | None) -> Composed:
    def make(width: int) -> nn.Module:
        model = nn.ModuleList([layer.make(width) for layer in layers])
        # A gain of every size: no axis is the only one of its growth, which would be asked for.
        model.append(nn.ModuleList([nn.RMSNorm(size(width)) for size in SIZES.values()]))
        if tie:
            model.append(nn.Embedding(13, width))
            model.append(nn.Linear(width, 13, bias=False))
            if tie == "parameter":
                model[-1].weight = model[-2].weight
            else:
                model[-1].weight.data = model[-2].weight.data
        return model

    n, known = len(layers), {}
    for i, layer in enumerate(layers):
        known |= {f"{i}.{name}": expected for name, expected in (layer.parameters or {}).items()}
    known |= {f"{n}.{i}.weight": Expected(False, (), (size,), 1.0) for i, size in enumerate(SIZES)}
    known |= {f"{n + 1}.weight": Expected(False, (), ("width",))} if tie else {}
    refused = {i for i, layer in enumerate(layers) if layer.parameters is None}
    return Composed(make, known, refused | ({n + 1} if tie == "memory" else set()), tie == "parameter")


def named(message: str) -> set[int]:
    """The layers that a refusal names, `0,2-3.weight` being three of them."""
    runs = [run for some in re.findall(r"([\d,-]+)(?:\.[a-z]|: head_dim)", message) for run in some.split(",") if run]
    return {i for run in runs for i in range(int(run.split("-")[0]), int(run.split("-")[-1]) + 1)}


def adamw(expected: Expected, target: int) -> tuple[float, float, float]:
    """Init, learning rate and ε of docs/rules.md: an axis that ever grows counts, by what it grows here."""

    def growth(sizes: tuple[str, ...]) -> tuple[bool, float]:
        return any(size != "fixed" for size in sizes), math.prod(SIZES[s](target) / SIZES[s](BASE) for s in sizes)

    (reads, r_in), (writes, r_out) = growth(expected.reads), growth(expected.writes)
    if reads and writes:
        return r_in**-0.5, 1 / r_in, 1 / r_out
    if writes:
        return 1.0, 1.0, 1 / r_out
    return (1 / r_in, 1 / r_in, 1.0) if reads else (1.0, 1.0, 1.0)


MODELS = given(
    layers=st.lists(LAYERS, min_size=1, max_size=6),
    tie=st.sampled_from([None, None, "parameter", "memory"]),
    target=st.sampled_from([8, 24, 32, 64]),
)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@MODELS
def test_a_model_composed_at_random_is_right_or_refused(layers: list[Layer], tie: str | None, target: int) -> None:
    is_right_or_refused(layers, tie, target)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@MODELS
def test_many_models_composed_at_random_are_right_or_refused(layers: list[Layer], tie: str | None, target: int) -> None:
    is_right_or_refused(layers, tie, target)


def is_right_or_refused(layers: list[Layer], tie: str | None, target: int) -> None:
    """Build, compare, initialise twice, and make groups."""
    composed = compose(layers, tie)
    if composed.refused:
        with pytest.raises(UserError) as error:
            Scaling.between(composed.make, BASE, target)
        assert composed.refused <= named(str(error.value)), str(error.value)
        return
    scaling = Scaling.between(composed.make, BASE, target)
    found: dict[str, Any] = scaling.multipliers("adamw")
    for name, expected in composed.parameters.items():
        init, learning_rate, epsilon = adamw(expected, target)
        assert (found[name].learning_rate, found[name].epsilon) == pytest.approx((learning_rate, epsilon)), name
        assert found[name].weight_decay == pytest.approx(1 / learning_rate), name
        if expected.weighs:
            assert found[name].init_std == pytest.approx(init), name
    readouts = {str(len(layers) + 2): pytest.approx(BASE / target)} if composed.tied else {}
    assert scaling.readouts == readouts
    torch.manual_seed(0)
    model, base = composed.make(target), composed.make(BASE)
    scaling.initialize(model)
    once = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaling.initialize(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, once[name]), name
        expected, rows = composed.parameters.get(name), parameter.detach()
        if expected is None:
            continue
        if expected.constant is not None:
            assert (parameter == expected.constant).all(), name
        elif expected.weighs and rows.numel() > 500 and base.get_parameter(name).numel() > 500:
            ratio = rows.std().item() / base.get_parameter(name).detach().std().item()
            assert ratio == pytest.approx(adamw(expected, target)[0], rel=0.25), name
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    groups = scaling.parameter_groups(model, "adamw", 1.0)
    assert {id(p) for group in groups for p in group["params"]} == trained
