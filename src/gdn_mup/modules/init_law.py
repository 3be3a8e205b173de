"""The law that a model draws each parameter from, followed while the model is built.

To rescale a model's own init one must know it, and a measured standard deviation has sampling noise. So the calls are
watched: every random draw and every entry-wise operation that a constructor runs is replayed on a few thousand
quantiles of the law, beside a tensor that holds no values.
"""

import math
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

QUANTILES = 4096
_CENTRED = 1e-3  # a mean below this many standard deviations is none


class Law(NamedTuple):
    """What is known of the entries of a tensor that were filled by one call: they are independent and alike.

    `spread` is the relative standard error of the root mean square of one entry: that of n is known to spread / √n.
    Values that are counted or computed are not `drawn`: a table, a constant.
    """

    mean: float
    std: float
    spread: float = math.sqrt(0.5)
    drawn: bool = True

    @property
    def centred(self) -> bool:
        """Whether entries are random with mean 0, as weights are: what a standard deviation describes."""
        return self.drawn and self.std > 0 and abs(self.mean) < _CENTRED * self.std

    @property
    def rms(self) -> float:
        """The root mean square."""
        return math.hypot(self.mean, self.std)


class Region(NamedTuple):
    """Entries of a contiguous tensor: where they begin, and the shape and strides of the view that they are."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """The entries that a view shows of what it is a view of."""
        return cls(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))

    @property
    def numel(self) -> int:
        """How many entries."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """One past the last entry."""
        return self.offset + 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def within(self, other: "Region") -> bool:
        """Whether all entries lie in `other`, a block without gaps."""
        return other.numel == other.end - other.offset and other.offset <= self.offset and self.end <= other.end

    def mask(self, shape: tuple[int, ...]) -> Tensor:
        """True at these entries of a tensor of `shape`."""
        mask = torch.zeros(math.prod(shape), dtype=torch.bool)
        mask.as_strided(self.shape, self.stride, self.offset).fill_(True)
        return mask.view(shape)


class Filled(NamedTuple):
    """How a tensor was filled: the law of the whole, and of the entries that were filled apart, the later above.

    An embedding's padding row is filled apart, or the forget gates' bias of an LSTM. A law is None if it could not be
    followed.
    """

    law: Law | None
    apart: tuple[tuple[Region, Law | None], ...] = ()


class _Followed(NamedTuple):
    """Quantiles of a law, and what they come from: draws, numbered upward, and tables of values, downward."""

    quantiles: Tensor
    draws: frozenset[int] = frozenset()

    @property
    def law(self) -> Law | None:
        q = self.quantiles
        mean, std = float(abs(q.mean())), float(q.std(correction=0))
        mean = float(q.mean()) if not q.is_complex() else mean
        square = q.abs().square()
        rms2 = float(square.mean())
        spread = float(square.std(correction=0)) / (2 * rms2) if rms2 > 0 else 0.0
        known = all(map(math.isfinite, (mean, std, spread)))
        return Law(mean, std, spread, any(draw > 0 for draw in self.draws)) if known else None


class _Storage:
    """The memory of a tensor: what the whole was filled with, and parts of it since."""

    def __init__(self, whole: _Followed | None = None) -> None:
        self.whole = whole
        self.apart: dict[Region, _Followed | None] = {}

    def put(self, region: Region, what: _Followed | None) -> None:
        self.apart = {other: v for other, v in self.apart.items() if not other.within(region)} | {region: what}

    def at(self, region: Region) -> _Followed | None:
        """What a part holds, if it was filled alike."""
        if region in self.apart:
            return self.apart[region]
        touched = any(other.offset < region.end and region.offset < other.end for other in self.apart)
        return None if touched else self.whole


class InitRecorder(TorchDispatchMode):
    """While active, tensors are made on the meta device, and the law of every one that is filled is followed.

    `torch.device("meta")` would not do: under it, transformers' models skip their own init. What constructors count
    with (`torch.tensor`, `arange`, `linspace`) keeps its values, on the CPU.

    A tensor filled in any other way (orthogonal matrices, values computed from other tensors of another shape) has no
    law.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, _Storage] = {}
        self._alive: list[Any] = []  # a storage's address is its name: it must not be given away while we look
        self._count = 0
        self._assignments = _Assignments()
        self._torchs_own = {name: getattr(torch.nn.init, name) for name in ("_no_grad_trunc_normal_", *_NO_LAW)}

    def __enter__(self) -> Self:
        # On the meta device these do nothing, and nothing could be followed. Who has imported one by its own name is
        # not seen; `initialize` then finds another standard deviation than the law's, and says so.
        torch.nn.init._no_grad_trunc_normal_ = self._draw_truncated_normal
        for name in _NO_LAW:
            setattr(torch.nn.init, name, self._lose)
        self._assignments.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for name, function in self._torchs_own.items():
            setattr(torch.nn.init, name, function)
        super().__exit__(*exception)
        self._assignments.__exit__(*exception)

    def filled(self, tensor: Tensor) -> Filled:
        """How a tensor made while recording was filled."""
        with _disable_current_modes():
            storage = self._storages.get(_key(tensor))
            if storage is None or not (_is_whole(tensor) and tensor.is_contiguous()):
                return Filled(_law(self._of(tensor), tensor))
            apart = tuple((region, _law(what, tensor)) for region, what in storage.apart.items())
            return Filled(_law(storage.whole, tensor), apart)

    def law(self, tensor: Tensor) -> Law | None:
        """The law of the whole of a tensor made while recording, or None if it could not be followed."""
        return self.filled(tensor).law

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given, (args, kwargs) = args, _on_meta(func, args, kwargs or {})
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex()) and result.is_meta:
            with _disable_current_modes():
                name = func._schema.name.removeprefix("aten::")
                if not _is_view(func):
                    self._note(func, name, given, kwargs, result)
        return result

    def _note(self, func: Any, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        """Follow one call into what it has filled: the whole of a tensor, or a part."""
        if not _is_whole(result):
            self._put(result, self._replay(func, name, args, kwargs, None))
            return
        operands = [] if name in _FILLING else [arg for arg in args if isinstance(arg, Tensor)]
        operands = operands[1:] if name == "copy_" else operands
        alike = [o for o in operands if _key(o) in self._storages and Region.of(o) == Region.of(result)]
        regions = dict.fromkeys(region for o in alike for region in self._storages[_key(o)].apart)
        storage = _Storage(self._replay(func, name, args, kwargs, None))
        storage.apart = {region: self._replay(func, name, args, kwargs, region) for region in regions}
        if name == "cat" and all(isinstance(part, Tensor) for part in args[0]):
            start, axis = 0, args[1] if len(args) > 1 else kwargs.get("dim", 0)
            for part in args[0]:
                view = result.narrow(axis, start, part.shape[axis])
                storage.apart[Region.of(view)] = self._of(part)
                start += part.shape[axis]
        self._storages[_key(result)] = storage
        self._alive.append(result.untyped_storage())

    def _put(self, tensor: Tensor, what: _Followed | None) -> None:
        """Note what a tensor, or a part of one, is filled with."""
        self._alive.append(tensor.untyped_storage())
        if _is_whole(tensor):
            self._storages[_key(tensor)] = _Storage(what)
        else:
            self._storages.setdefault(_key(tensor), _Storage()).put(Region.of(tensor), what)

    def _draw_truncated_normal(
        self, tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
    ) -> Tensor:
        with _disable_current_modes():
            low, high = torch.special.ndtr((torch.tensor([a, b], dtype=torch.float64) - mean) / std)
            self._put(tensor, self._drawn(mean + std * torch.special.ndtri(low + (high - low) * _PROBABILITIES)))
        return tensor

    def _lose(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        with _disable_current_modes():
            self._put(tensor, None)
        return tensor

    def _drawn(self, quantiles: Tensor) -> _Followed:
        self._count += 1
        return _Followed(quantiles, frozenset({self._count}))

    def _replay(self, func: Any, name: str, args: tuple, kwargs: dict, at: Region | None) -> _Followed | None:
        """What an operation's result holds, everywhere or in a region; None where that cannot be followed."""
        if name in ("normal_", "uniform_"):
            bounds = [*args[1:], *(value for key, value in kwargs.items() if key != "generator")]
            first, second = (float(b) for b in (*bounds, *((0.0, 1.0)[len(bounds) :]))[:2])
            if name == "normal_":
                return self._drawn(first + second * _normal(args[0].is_complex()))
            return self._drawn((first + second) / 2 + (second - first) * _UNIFORM)
        match name:
            case "randn" | "randn_like":
                dtype = kwargs.get("dtype") or (args[0].dtype if name == "randn_like" else torch.float32)
                return self._drawn(_normal(dtype.is_complex))
            case "rand" | "rand_like":
                return self._drawn(0.5 + _UNIFORM)
            case "zero_" | "zeros" | "zeros_like" | "new_zeros":
                return _constant(0.0)
            case "ones" | "ones_like" | "new_ones":
                return _constant(1.0)
            case "fill_" | "full" | "full_like" if not isinstance(args[1], Tensor):
                return _constant(args[1])
            case "fill_":
                return self._of(args[1])
            case "copy_":
                return self._of(args[1], at)
            case "_to_copy" | "clone" | "contiguous":
                return self._of(args[0], at)
        if torch.Tag.pointwise not in func.tags and name != "complex":
            return None
        keywords = {
            key: value for key, value in kwargs.items() if key not in ("device", "dtype", "layout", "pin_memory")
        }
        if any(isinstance(value, Tensor) for value in keywords.values()):
            return None
        operands = [self._of(arg, at) if isinstance(arg, Tensor) else arg for arg in args]
        if any(o is None for o, arg in zip(operands, args, strict=True) if isinstance(arg, Tensor)):
            return None
        independent = _independent(operands)
        if independent is None:
            return None
        values, draws = independent
        try:
            return _Followed(func(*values, **keywords), draws)
        except (RuntimeError, TypeError, NotImplementedError):
            return None

    def _of(self, tensor: Tensor, at: Region | None = None) -> _Followed | None:
        """What a tensor holds, or that region of it."""
        storage = self._storages.get(_key(tensor))
        if storage is None:
            return None if tensor.is_meta else self._of_values(tensor)
        if at is not None:
            return storage.at(at)
        if not _is_whole(tensor):
            return storage.at(Region.of(tensor))
        return storage.whole

    def _of_values(self, tensor: Tensor) -> _Followed | None:
        """A tensor that has values, as quantiles of them."""
        values = tensor.detach().flatten().to(torch.complex128 if tensor.is_complex() else torch.float64)
        if not values.numel():
            return None
        if len(values) == 1:
            return _constant(values.item())
        if not values.is_complex():
            values = values.sort().values
        self._count += 1
        return _Followed(values[(_PROBABILITIES * len(values)).long()], frozenset({-self._count}))


class _Assignments(TorchFunctionMode):
    """`tensor[i:j] = 1.0` as a call that says the number: a tensor of it would lose it on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__setitem__ and args[0].is_meta and isinstance(args[2], int | float | complex):
            tensor, index, value = args
            rows = index if isinstance(index, list) and all(type(i) is int for i in index) else [index]
            views = [tensor[row] for row in rows]
            if all(_key(view) == _key(tensor) for view in views):
                for view in views:
                    view.fill_(value)
                return None
        return func(*args, **(kwargs or {}))


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


_FILLING = ("normal_", "uniform_", "zero_", "fill_")
_NO_LAW = ("orthogonal_", "sparse_", "dirac_")
_COUNTING = ("arange", "linspace", "logspace", "scalar_tensor", "tensor")


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_whole(tensor: Tensor) -> bool:
    """Whether it shows all of its memory."""
    return tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes()


def _law(what: _Followed | None, tensor: Tensor) -> Law | None:
    law = what.law if what else None
    if law is None or what is None or what.quantiles.is_complex() or not tensor.is_complex():
        return law
    return law._replace(std=law.std * math.sqrt(2), spread=law.spread / math.sqrt(2))  # filled as a pair of reals


def _constant(value: Any) -> _Followed:
    return _Followed(
        torch.full((QUANTILES,), value, dtype=torch.complex128 if isinstance(value, complex) else torch.float64)
    )


def _independent(operands: list[Any]) -> tuple[list[Any], frozenset[int]] | None:
    """Quantiles of operands side by side: those of one draw as they are, those of different draws shuffled."""
    values: list[Any] = []
    draws: frozenset[int] = frozenset()
    for operand in operands:
        if not isinstance(operand, _Followed):
            values.append(operand)
            continue
        quantiles = operand.quantiles.clone()
        if draws and operand.draws and draws != operand.draws:
            if draws & operand.draws:
                return None
            quantiles = quantiles[_SHUFFLED]
        elif len(draws) > 1 and operand.draws:
            return None  # both are sums of the same two draws, who knows in which order
        values.append(quantiles)
        draws |= operand.draws
    return values, draws


def _normal(complex_numbers: bool) -> Tensor:
    return torch.complex(_NORMAL, _NORMAL[_SHUFFLED]) / math.sqrt(2) if complex_numbers else _NORMAL.clone()


def _is_view(func: Any) -> bool:
    """Whether the result shares memory with an argument and changes nothing in it."""
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _standardized(quantiles: Tensor) -> Tensor:
    return (quantiles - quantiles.mean()) / quantiles.std(correction=0)


_PROBABILITIES = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
_NORMAL = _standardized(torch.special.ndtri(_PROBABILITIES))
_UNIFORM = _standardized(_PROBABILITIES) / math.sqrt(12)
_SHUFFLED = torch.randperm(QUANTILES, generator=torch.Generator().manual_seed(0))
