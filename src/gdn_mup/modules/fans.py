"""Fan-in and fan-out of every parameter of a module, by the module's type.

A type is believed where it is known what it does: of the parameters that torch's own class registers, in the shapes
that its attributes say. A subclass may add parameters, or store its weight otherwise; these are for the user to name.
"""

import math
import re
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


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
    shape = tuple(shape)
    found = _of_torchs_own(module, name, shape)
    if found is not None:
        return found
    axes = _of_transformers(module, name, shape)
    if axes:
        return declared_fans(axes, shape)
    return _vector(shape) if sum(size != 1 for size in shape) <= 1 and not _weighs(module, name) else None


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


def computed_by(module: nn.Module, name: str) -> str | None:
    """What computes a weight from this parameter of `module` (weight norm, spectral norm, pruning); None if nothing.

    The rules are about the weight that multiplies, and neither the init nor the learning rate of what it is computed
    from moves it alike.
    """
    if isinstance(module, ParametrizationList):
        return ", ".join(type(step).__name__.strip("_") for step in module)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
            weight = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "")
            if name in (f"{weight}_g", f"{weight}_v", f"{weight}_orig"):
                return type(hook).__name__
    if isinstance(module, _WEIGHING) and "weight" not in module._parameters and name != "bias":
        return type(module).__name__
    return None


def _of_torchs_own(module: nn.Module, name: str, shape: tuple[int, ...]) -> Fans | None:
    match module, name:
        case nn.Linear(), "weight" if shape == (module.out_features, module.in_features):
            return Fans(Kind.MATRIX, *shape)
        case nn.Linear(), "bias" if shape == (module.out_features,):
            return _vector(shape)
        case ((nn.Embedding() | nn.EmbeddingBag()), "weight") if shape == (module.num_embeddings, module.embedding_dim):
            return Fans(Kind.LOOKUP, shape[1], 1)
        case _ConvNd(), "bias" if shape == (module.out_channels,):
            return _vector(shape)
        case _ConvNd(), "weight" if shape == _convolution_shape(module):
            taps = math.prod(module.kernel_size)
            return Fans(Kind.CONVOLUTION, module.out_channels, module.in_channels // module.groups * taps)
        case ((nn.LayerNorm() | nn.RMSNorm()), ("weight" | "bias")) if shape == tuple(module.normalized_shape):
            return _vector(shape)
        case nn.GroupNorm(), ("weight" | "bias") if shape == (module.num_channels,):
            return _vector(shape)
        case _NormBase(), ("weight" | "bias") if shape == (module.num_features,):
            return _vector(shape)
        case nn.MultiheadAttention(), _ if shape in _attention_shapes(module, name):
            return Fans(Kind.MATRIX, *shape) if name.endswith("_weight") else _vector(shape)
        case nn.RNNBase(), _ if name in module._flat_weights_names:
            return Fans(Kind.MATRIX, *shape) if len(shape) == 2 else _vector(shape)
        case nn.RNNCellBase(), _ if name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            return Fans(Kind.MATRIX, *shape) if len(shape) == 2 else _vector(shape)
    return None


def _weighs(module: nn.Module, name: str) -> bool:
    """Whether it is the weight of a layer that multiplies, stored in another shape than the layer says."""
    return isinstance(module, _WEIGHING) and name == "weight"


def _convolution_shape(module: Any) -> tuple[int, ...]:
    ends = [module.out_channels, module.in_channels]
    first, second = reversed(ends) if isinstance(module, _ConvTransposeNd) else ends
    return (first, second // module.groups, *module.kernel_size)


def _attention_shapes(module: nn.MultiheadAttention, name: str) -> list[tuple[int, ...]]:
    width = module.embed_dim
    shapes: dict[str, list[tuple[int, ...]]] = {
        "in_proj_weight": [(3 * width, width)],
        "q_proj_weight": [(width, width)],
        "k_proj_weight": [(width, module.kdim)],
        "v_proj_weight": [(width, module.vdim)],
        "in_proj_bias": [(3 * width,)],
        "bias_k": [(1, 1, width)],
        "bias_v": [(1, 1, width)],
    }
    return shapes.get(name, [])


def _vector(shape: Sequence[int]) -> Fans:
    return Fans(Kind.VECTOR, math.prod(shape), 1)


_WEIGHING = (nn.Linear, nn.Embedding, nn.EmbeddingBag, _ConvNd)


def _of_transformers(module: Any, name: str, shape: tuple[int, ...]) -> str | None:
    """Axes of the bare matrices of transformers' experts and routers, where shape and declaration agree."""
    own = type(module)
    if not own.__module__.startswith("transformers.models."):
        return None
    sizes = [getattr(module, key, None) for key in ("num_experts", "hidden_dim", "intermediate_dim")]
    experts, hidden, inner = sizes
    if re.search("Top[kK]Router$", own.__name__) and name == "weight" and shape == (experts, hidden):
        return "out in"
    if own.__name__.endswith("Experts") and inner is not None and not getattr(module, "is_transposed", False):
        layouts = {"gate_up_proj": (experts, 2 * inner, hidden), "down_proj": (experts, hidden, inner)}
        return "stack out in" if layouts.get(name) == shape else None
    return None
