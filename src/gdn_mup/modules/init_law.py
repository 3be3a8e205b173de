"""The law that a model draws each parameter from, followed while the model is built.

To rescale a model's own init one must know it, and a measured standard deviation has sampling noise. So the calls are
watched: every random draw and every entry-wise operation that a constructor runs is replayed on a few thousand
quantiles of the law, beside a tensor that holds no values.
"""

import math
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

QUANTILES = 4096
_CENTRED = 1e-3  # a mean below this many standard deviations is none


class Law(NamedTuple):
    """Mean and standard deviation of the independent entries of a tensor."""

    mean: float
    std: float

    @property
    def centred(self) -> bool:
        """Whether entries are random with mean 0, as weights are: what a standard deviation describes."""
        return self.std > 0 and abs(self.mean) < _CENTRED * self.std


class InitRecorder(TorchDispatchMode):
    """While active, tensors are made on the meta device, and the law of every one that is filled is followed.

    `torch.device("meta")` would not do: under it, transformers' models skip their own init. What constructors count
    with (`torch.tensor`, `arange`, `linspace`) keeps its values, on the CPU.

    A tensor filled in any other way (orthogonal matrices, values computed from other tensors of another shape) has no
    law. Filling a part of a tensor, such as an embedding's padding row, leaves the law of the whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self._quantiles: dict[int, Tensor | None] = {}
        self._alive: list[Any] = []  # a storage's address is its name: it must not be given away while we look
        self._torchs_own = {name: getattr(torch.nn.init, name) for name in ("_no_grad_trunc_normal_", *_NO_LAW)}

    def __enter__(self) -> Self:
        # On the meta device these do nothing, and nothing could be followed. Who has imported one by its own name is
        # not seen; `initialize` then finds another standard deviation than the law's, and says so.
        torch.nn.init._no_grad_trunc_normal_ = self._draw_truncated_normal
        for name in _NO_LAW:
            setattr(torch.nn.init, name, self._lose)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for name, function in self._torchs_own.items():
            setattr(torch.nn.init, name, function)
        super().__exit__(*exception)

    def law(self, tensor: Tensor) -> Law | None:
        """The law of a tensor made while recording, or None if it could not be followed."""
        quantiles = self._quantiles.get(_key(tensor))
        if quantiles is None:
            return None
        with _disable_current_modes():
            mean, std = float(quantiles.mean()), float(quantiles.std(correction=0))
        return Law(mean, std) if math.isfinite(mean) and math.isfinite(std) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = _on_meta(func, args, kwargs or {})
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point() and not _is_view(func):
            whole = result.numel() * result.element_size() >= result.untyped_storage().nbytes()
            if whole or _key(result) not in self._quantiles:
                with _disable_current_modes():
                    self._quantiles[_key(result)] = self._replay(func, args, kwargs)
                self._alive.append(result.untyped_storage())
        return result

    def _draw_truncated_normal(
        self, tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
    ) -> Tensor:
        with _disable_current_modes():
            low, high = torch.special.ndtr((torch.tensor([a, b], dtype=torch.float64) - mean) / std)
            self._quantiles[_key(tensor)] = mean + std * torch.special.ndtri(low + (high - low) * _PROBABILITIES)
        return tensor

    def _lose(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        self._quantiles[_key(tensor)] = None
        return tensor

    def _replay(self, func: Any, args: tuple, kwargs: dict) -> Tensor | None:
        """The quantiles of an operation's result; None where they cannot be followed."""
        name = func._schema.name.removeprefix("aten::")
        if name in ("normal_", "uniform_"):
            bounds = [*args[1:], *kwargs.values()]
            first, second = (float(b) for b in (*bounds, *((0.0, 1.0)[len(bounds) :]))[:2])
            if name == "normal_":
                return first + second * _NORMAL
            return (first + second) / 2 + (second - first) * _UNIFORM
        match name:
            case "randn" | "randn_like":
                return _NORMAL.clone()
            case "rand" | "rand_like":
                return 0.5 + _UNIFORM
            case "zero_" | "zeros" | "zeros_like" | "new_zeros":
                return torch.zeros(QUANTILES, dtype=torch.float64)
            case "ones" | "ones_like" | "new_ones":
                return torch.ones(QUANTILES, dtype=torch.float64)
            case "fill_" | "full" | "full_like" if not isinstance(args[1], Tensor):
                return torch.full((QUANTILES,), float(args[1]), dtype=torch.float64)
            case "copy_":
                return self._of(args[1])
            case "_to_copy" | "clone" | "contiguous":
                return self._of(args[0])
        if torch.Tag.pointwise not in func.tags:
            return None
        operands = [self._of(arg) if isinstance(arg, Tensor) else arg for arg in args]
        if any(isinstance(arg, Tensor) and quantiles is None for arg, quantiles in zip(args, operands, strict=True)):
            return None
        keywords = {
            key: value for key, value in kwargs.items() if key not in ("device", "dtype", "layout", "pin_memory")
        }
        if any(isinstance(value, Tensor) for value in keywords.values()):
            return None
        try:
            return func(*(o.clone() if isinstance(o, Tensor) else o for o in operands), **keywords)
        except (RuntimeError, TypeError, NotImplementedError):
            return None

    def _of(self, tensor: Tensor) -> Tensor | None:
        if tensor.dim() == 0 and not tensor.is_meta and _key(tensor) not in self._quantiles:
            return torch.full((QUANTILES,), float(tensor), dtype=torch.float64)
        return self._quantiles.get(_key(tensor))


def _on_meta(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of the same call on the meta device."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    on_meta = any(tensor.is_meta for tensor in tensors)
    name = func._schema.name.removeprefix("aten::")
    made_here = not tensors and name not in _COUNTING and any(a.name == "device" for a in func._schema.arguments)
    if made_here or (on_meta and "device" in kwargs):
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": torch.device("meta")}
    if on_meta and name != "copy_":
        args = tuple(arg.to("meta") if isinstance(arg, Tensor) and arg.dim() > 0 else arg for arg in args)
    return args, kwargs


_NO_LAW = ("orthogonal_", "sparse_", "dirac_")
_COUNTING = ("arange", "linspace", "logspace", "scalar_tensor", "tensor")


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_view(func: Any) -> bool:
    """Whether the result shares memory with an argument and changes nothing in it."""
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _standardized(quantiles: Tensor) -> Tensor:
    return (quantiles - quantiles.mean()) / quantiles.std(correction=0)


_PROBABILITIES = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
_NORMAL = _standardized(torch.special.ndtri(_PROBABILITIES))
_UNIFORM = _standardized(_PROBABILITIES) / math.sqrt(12)
