"""Fan-in and fan-out of every parameter of a module, by the module's type."""

import math
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


class Kind(Enum):
    """What a parameter does with its input."""

    MATRIX = "matrix"  # sums over fan-in
    LOOKUP = "lookup table"  # picks rows: nothing is summed, however many rows there are
    CONVOLUTION = "convolution"  # sums over input channels and taps
    VECTOR = "vector"  # acts entry by entry: gains, biases, scalars


class Fans(NamedTuple):
    """Features that a parameter reads and writes."""

    kind: Kind
    fan_out: int
    fan_in: int


def fans(module: nn.Module, name: str, shape: Sequence[int]) -> Fans | None:
    """Fans of the parameter that `module` holds under `name`, or None if its type does not say.

    Parameters with one axis, or none, longer than 1 are vectors, unless their module's type is known to multiply by
    them.
    """
    match module:
        case nn.Linear() | nn.Embedding() | nn.EmbeddingBag() | _ConvNd() if name != "weight":
            return _vector(shape)
        case nn.Linear():
            return Fans(Kind.MATRIX, shape[0], shape[1])
        case nn.Embedding() | nn.EmbeddingBag():
            return Fans(Kind.LOOKUP, shape[1], 1)
        case _ConvTransposeNd():
            taps = math.prod(module.kernel_size)
            return Fans(Kind.CONVOLUTION, module.out_channels, module.in_channels // module.groups * taps)
        case _ConvNd():
            return Fans(Kind.CONVOLUTION, shape[0], math.prod(shape[1:]))
        case nn.LayerNorm() | nn.RMSNorm() | nn.GroupNorm() | _NormBase():
            return _vector(shape)
        case nn.MultiheadAttention() | nn.RNNBase() | nn.RNNCellBase() if len(shape) == 2:
            return Fans(Kind.MATRIX, shape[0], shape[1])
    axes = _AXES.get((type(module).__name__, name))
    if axes:
        return declared_fans(axes, shape)
    return _vector(shape) if sum(size != 1 for size in shape) <= 1 else None


def declared_fans(axes: str, shape: Sequence[int]) -> Fans:
    """Fans of a parameter whose axes are named: `out`, `in`, `stack` (copies side by side), or all `vector`.

    Raises ValueError if there is not one name for each axis.
    """
    names = axes.split()
    if names == ["vector"]:
        return _vector(shape)
    if len(names) != len(shape) or set(names) - {"out", "in", "stack"}:
        raise ValueError(f"{axes!r} does not name the axes of shape {tuple(shape)}: `out`, `in`, `stack`, or `vector`")
    sizes = {role: math.prod(size for n, size in zip(names, shape, strict=True) if n == role) for role in ("out", "in")}
    return Fans(Kind.MATRIX, sizes["out"], sizes["in"])


def _vector(shape: Sequence[int]) -> Fans:
    return Fans(Kind.VECTOR, math.prod(shape), 1)


# Matrices that are bare parameters of modules outside torch, by the type of the module.
_EXPERTS = ("Mixtral", "Olmoe", "Qwen2Moe", "Qwen3Moe", "Qwen3Next")
_AXES = {
    (f"{model}{module}", parameter): axes
    for model in _EXPERTS
    for module, parameter, axes in (
        ("Experts", "gate_up_proj", "stack out in"),
        ("Experts", "down_proj", "stack out in"),
        ("TopKRouter", "weight", "out in"),
    )
}
