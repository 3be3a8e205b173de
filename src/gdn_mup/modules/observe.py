"""One pass through a model, watched: which modules are called, what they return, and what softmax attention sees.

Attention is known by what it computes, whatever its module is called: `scaled_dot_product_attention`, or a softmax over
products of two tensors neither of which is a parameter.
"""

import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gdn_mup.modules.names import plain, unwrapped

Call = Callable[[nn.Module], Any]
"""Runs a model once, as training does."""

_SEQUENCES, _TOKENS, _IMAGE = 2, 8, 32


class Attention(NamedTuple):
    """What one softmax attention sees: in which module, the last axis of queries and keys, the factor on their product.

    `within` is the factor that queries and keys were multiplied by before. `queries` and `keys` are their root mean
    squares, NaN where they have no values.
    """

    module: str
    head_dim: int
    scale: float
    within: float
    queries: float
    keys: float

    @property
    def logits(self) -> float:
        """A measure of the logits."""
        return self.queries * self.keys * self.scale


class Pass(NamedTuple):
    """What one pass through a model does, up to its end or to what it could not do without values."""

    calls: Counter[str]
    returns: dict[str, str]  # the type of what a module returns
    attention: list[Attention]
    complete: bool


def observe(model: nn.Module, call: Call | None) -> Pass:
    """Watch a model while it is called, or called with inputs that are guessed: the call that gets farthest."""
    passes = [Pass(Counter(), {}, [], complete=False)]
    for attempt in [call] if call else _guesses(model):
        watch, complete = _Watch(model), True
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=[]),
                warnings.catch_warnings(action="ignore"),
                watch.hooks(),
                _no_kernels(),
                _nothing_compiled(),
                watch,
            ):
                attempt(model)
        except Exception:  # whatever a model says of inputs that are not its own, or have no values
            complete = False
        passes.append(Pass(watch.calls, watch.returns, watch.attention, complete))
        if complete:
            return passes[-1]
    return max(passes, key=lambda one: len(one.returns))


class _Watch(TorchFunctionMode):
    """Sees every function of torch that a pass calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.returns: dict[str, str] = {}
        self.attention: list[Attention] = []
        self._modules = {plain(name): module for name, module in unwrapped(model).named_modules()}
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._within: list[str] = []
        self._scales: dict[int, float] = {}  # what tensors were multiplied by, by their identity
        self._products: dict[int, tuple[Tensor, Tensor, float]] = {}  # of queries, keys, and their factor
        self._alive: list[Any] = []

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks that say in which module a pass is."""
        with ExitStack() as stack:
            for name, module in self._modules.items():

                def enter(_: nn.Module, __: Any, name: str = name) -> None:
                    self.calls[name] += 1
                    self._within.append(name)

                def leave(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                    self.returns[name] = type(output).__name__ if not isinstance(output, Tensor) else "Tensor"
                    self._within.pop()

                for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave)):
                    stack.callback(handle.remove)
            yield

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is functional.multi_head_attention_forward:
            query, key, *_ = args
            self._see(query, key, args[3] // args[4], (args[3] // args[4]) ** -0.5)
        elif name == "scaled_dot_product_attention":
            query, key = (args[i] if i < len(args) else kwargs[k] for i, k in enumerate(("query", "key")))
            given = args[6] if len(args) > 6 else kwargs.get("scale")
            scale = query.shape[-1] ** -0.5 if given is None else float(given)
            self._see(query, key, query.shape[-1], scale)
        elif name in ("softmax", "_softmax", "_safe_softmax") and args and id(args[0]) in self._products:
            query, key, scale = self._products[id(args[0])]
            self._see(query, key, query.shape[-1], scale)
        result = func(*args, **kwargs)
        self._alive.append(result)  # an identity is not given away while we look
        if isinstance(result, Tensor):
            self._follow(name, args, kwargs, result)
        return result

    def _follow(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        """Note products of queries and keys, and by what tensors are multiplied."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        if name in ("matmul", "bmm", "__matmul__", "einsum", "baddbmm"):
            operands = [*tensors, *(a for some in args if isinstance(some, list | tuple) for a in some)]
            operands += [a for a in kwargs.values() if isinstance(a, Tensor)]
            operands = operands[1:] if name == "baddbmm" else operands
            if len(operands) == 2 and not any(self._is_weight(o) for o in operands) and operands[0].dim() >= 3:
                query, key = operands
                self._products[id(result)] = (query, key, float(kwargs.get("alpha", 1.0)))
            return
        factor = 1.0
        numbers = [a for a in args if isinstance(a, int | float) and not isinstance(a, bool)]
        numbers += [float(a) for a in tensors if a.dim() == 0 and not a.is_meta]
        if name in ("mul", "mul_", "__mul__", "__rmul__", "multiply") and len(numbers) == 1:
            factor = float(numbers[0])
        if name in ("div", "div_", "__truediv__", "true_divide") and len(numbers) == 1:
            factor = 1 / float(numbers[0])
        source = next((a for a in tensors if id(a) in self._products), None)
        if source is not None and name in (*_VIEWS, *_POINTWISE):
            query, key, scale = self._products[id(source)]
            self._products[id(result)] = (query, key, scale * factor)
        scale = factor * (self._scale(tensors[0]) if tensors and (factor != 1.0 or name in _VIEWS) else 1.0)
        if scale != 1.0:
            self._scales[id(result)] = scale

    def _scale(self, tensor: Tensor) -> float:
        return self._scales.get(id(tensor), 1.0)

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._weights

    def _see(self, query: Tensor, key: Tensor, head_dim: int, scale: float) -> None:
        with torch._C.DisableTorchFunction():
            sizes = [float("nan") if t.is_meta else float(t.double().square().mean().sqrt()) for t in (query, key)]
        module, within = self._within[-1] if self._within else "", self._scale(query) * self._scale(key)
        self.attention.append(Attention(module, head_dim, scale, within, *sizes))


@contextmanager
def _no_kernels() -> Iterator[None]:
    """Without Triton: a kernel would follow the pointers of tensors that have no memory."""
    jit = getattr(sys.modules.get("triton.runtime.jit"), "JITFunction", None)
    if jit is None:
        yield
        return
    with mock.patch.object(jit, "run", side_effect=NotImplementedError("no kernel runs without values")):
        yield


def _nothing_compiled() -> AbstractContextManager[Any]:
    """What a model compiles by itself runs as it is written: one pass is not worth a compilation."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _guesses(model: nn.Module) -> list[Call]:
    """Calls that a model may answer to: transformers' own example, token ids, features, images."""
    device, dtype = next(((p.device, p.dtype) for p in model.parameters()), (torch.device("cpu"), torch.float32))

    def drawn(*size: int) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device).normal_()

    if hasattr(type(model), "dummy_inputs"):
        return [lambda m: m(**_transformers_inputs(m, device, drawn))]
    first: Any = next((m for m in model.modules() if next(m.parameters(recurse=False), None) is not None), model)
    shape = getattr(first, "normalized_shape", None)
    features = next((size for key in _FEATURES if isinstance(size := getattr(first, key, None), int)), None)
    features = shape[-1] if shape else features
    vocabulary = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), _TOKENS)
    inputs = [torch.arange(_TOKENS, device=device).remainder(vocabulary).repeat(_SEQUENCES, 1)]
    if features is not None and not isinstance(first, nn.Embedding):
        axes = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}.get(type(first))
        inputs = [drawn(_SEQUENCES, features, *[_IMAGE] * axes)] if axes else []
        inputs += [drawn(_SEQUENCES, _TOKENS, features), drawn(_SEQUENCES, features)]
    taken = inspect.signature(model.forward).parameters.values()
    needed = [p for p in taken if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [partial(_called_with, [tensor] * max(1, len(needed))) for tensor in inputs]


def _called_with(inputs: list[Tensor], model: nn.Module) -> Any:
    return model(*inputs)


def _transformers_inputs(model: Any, device: torch.device, drawn: Callable[..., Tensor]) -> dict[str, Tensor]:
    config = model.config
    inputs = {key: value.to(device) for key, value in model.dummy_inputs.items() if not key.endswith("mask")}
    ids = inputs.get("input_ids")
    match model.main_input_name:
        case "pixel_values":
            size = getattr(config, "image_size", _IMAGE)
            sizes = (size, size) if isinstance(size, int) else tuple(size)
            return {"pixel_values": drawn(_SEQUENCES, getattr(config, "num_channels", 3), *sizes)}
        case "input_features":
            inputs = {"input_features": drawn(_SEQUENCES, config.num_mel_bins, 2 * config.max_source_positions)}
            return inputs | ({"decoder_input_ids": ids[:_SEQUENCES]} if ids is not None else {})
    return inputs


_VIEWS = ("view", "reshape", "transpose", "permute", "contiguous", "to", "float", "type_as", "flatten", "unflatten")
_POINTWISE = (  # on the way from products to their softmax: factors, masks, caps
    *("mul", "mul_", "__mul__", "__rmul__", "multiply", "div", "div_", "__truediv__", "true_divide"),
    *("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "tanh", "clamp", "max", "maximum"),
    *("where", "masked_fill", "masked_fill_", "half", "bfloat16", "double", "type"),
)
_FEATURES = ("in_features", "in_channels", "embed_dim", "input_size", "num_features")
