"""Forward multipliers as hooks: the model's code and parameters stay as they are.

A hook multiplies only where its module is called. So every pass is watched: one that uses a tied readout's weight
without calling the readout is refused, and so is one that calls none of the modules whose outputs are to be multiplied.
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gdn_mup.errors import UserError
from gdn_mup.modules.names import plain, unwrapped
from gdn_mup.modules.outputs import tensors_in


class InputMultiplier:
    """A forward pre-hook that multiplies a module's input."""

    def __init__(self, factor: float, path: str) -> None:
        self.factor, self.path, self.called = factor, path, False

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.called = True
        if args:
            return (args[0] * self.factor, *args[1:]), kwargs
        (name, value), *others = kwargs.items()
        return args, {name: value * self.factor, **dict(others)}


class OutputMultiplier:
    """A forward hook that multiplies a module's output."""

    def __init__(self, factor: float, path: str) -> None:
        self.factor, self.path, self.called = factor, path, False

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        self.called = True
        if not isinstance(output, Tensor):
            raise UserError(
                f"output_multipliers: {self.path} returns a {type(output).__name__}, which has no one factor: name a "
                "module that returns a tensor"
            )
        return output * self.factor


class _Begin:
    """A pre-hook of the whole model: a pass begins."""

    def __init__(self, multipliers: list[InputMultiplier | OutputMultiplier]) -> None:
        self.multipliers = multipliers

    def __call__(self, module: nn.Module, args: tuple) -> None:
        for multiplier in self.multipliers:
            multiplier.called = False


class _End:
    """A hook of the whole model: a pass ends, and every multiplier should have been met."""

    def __init__(self, multipliers: list[InputMultiplier | OutputMultiplier]) -> None:
        self.multipliers = multipliers

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        missed = [multiplier for multiplier in self.multipliers if not multiplier.called]
        if missed:
            judge = torch.compiler.disable(_judge)  # here, since it takes seconds to import what it needs
            judge(module, missed, [m for m in self.multipliers if m.called], output)


def _judge(
    model: nn.Module,
    missed: list[InputMultiplier | OutputMultiplier],
    met: list[InputMultiplier | OutputMultiplier],
    output: Any,
) -> None:
    """Refuse a pass that uses what a lost multiplier should have multiplied; warn where that is not seen."""
    modules: dict[str, Any] = _modules(model)
    tensors = [tensor for _, tensor in tensors_in(output)]
    differentiable = any(tensor.requires_grad for tensor in tensors)
    is_loss = differentiable and all(tensor.numel() == 1 for tensor in tensors)
    for multiplier in missed:
        if isinstance(multiplier, InputMultiplier):
            used = uses(tensors, {multiplier.path: modules[multiplier.path].weight})[multiplier.path]
            if (set(used) & _UNSEEN and not is_loss) or not differentiable:
                warnings.warn(
                    f"{multiplier.path} was not called in this pass: if it uses {multiplier.path}.weight otherwise, "
                    f"the multiplier {multiplier.factor:.4g} is lost",
                    stacklevel=2,
                )
            elif set(used) - _LOOKUPS:
                raise UserError(
                    f"model: this pass uses {multiplier.path}.weight without calling {multiplier.path}, so that its "
                    f"multiplier {multiplier.factor:.4g} is lost: compute the loss from what {multiplier.path} returns"
                )
    outputs = {_alike(multiplier.path) for multiplier in missed if isinstance(multiplier, OutputMultiplier)}
    lost = outputs - {_alike(multiplier.path) for multiplier in met}
    if lost and differentiable:
        path = next(multiplier.path for multiplier in missed if _alike(multiplier.path) in lost)
        raise UserError(
            f"output_multipliers: {path} is not called in this pass, so that its multiplier is lost: name a module "
            "that is called"
        )


def uses(tensors: Iterable[Tensor], weights: Mapping[str, Tensor]) -> dict[str, Counter[str]]:
    """What autograd's graph does with each weight on the way to these tensors, and how often."""
    names = {id(weight): name for name, weight in weights.items()}
    found = {name: Counter[str]() for name in weights}
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for other, _ in node.next_functions:
            if other is None:
                continue
            name = names.get(id(getattr(other, "variable", None)))
            if name is not None:
                found[name][node.name().rstrip("0123456789")] += 1
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return found


_LOOKUPS = {"EmbeddingBackward", "EmbeddingBagBackward", "IndexSelectBackward", "IndexBackward", "GatherBackward"}
_UNSEEN = {"CompiledFunctionBackward", "CheckpointFunctionBackward"}  # what happens within is not in the graph


def add(model: nn.Module, readouts: Mapping[str, float], outputs: Mapping[str, float]) -> None:
    """Put the multipliers in place of those that may be there already."""
    remove_hooks(model)
    modules = _modules(model)
    multipliers: list[InputMultiplier | OutputMultiplier] = []
    for path, factor in readouts.items():
        if factor != 1:
            _check_that_it_is_called(unwrapped(model), path)
            reads = InputMultiplier(factor, path)
            modules[path].register_forward_pre_hook(reads, with_kwargs=True)
            multipliers.append(reads)
    for path, factor in outputs.items():
        if factor != 1:
            writes = OutputMultiplier(factor, path)
            modules[path].register_forward_hook(writes)
            multipliers.append(writes)
    if multipliers:
        unwrapped(model).register_forward_pre_hook(_Begin(multipliers), prepend=True)
        unwrapped(model).register_forward_hook(_End(multipliers))
        _forget_graphs()


def check(model: nn.Module, readouts: Mapping[str, float], outputs: Mapping[str, float]) -> None:
    """Raise UserError unless all multipliers are in place."""
    modules = _modules(model)
    for expected, found in ((readouts, _inputs), (outputs, _outputs)):
        for path, factor in expected.items():
            if factor != 1 and found(modules[path]) != [factor]:
                raise UserError(
                    f"model: {path} has no multiplier {factor:.4g} yet: call scaling.initialize(model) first, or "
                    "scaling.add_multipliers(model) if its parameters are loaded"
                )


def remove_hooks(model: nn.Module) -> None:
    """Take all multipliers away."""
    ours = InputMultiplier | OutputMultiplier | _Begin | _End
    found = False
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, ours)]:
                del hooks[key]
                getattr(module, "_forward_pre_hooks_with_kwargs", {}).pop(key, None)
                found = True
    if found:
        _forget_graphs()


def _forget_graphs() -> None:
    """Graphs that were compiled before do not know that hooks have come or gone: nothing guards them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@torch.no_grad()
def remove(model: nn.Module, readouts: Mapping[str, float], outputs: Mapping[str, float], fold: bool) -> None:
    """Take all multipliers away; `fold` puts them into the weights of their linear layers."""
    if fold:
        modules: dict[str, Any] = dict(_modules(model))
        holders = Counter(id(p) for m in unwrapped(model).modules() for p in m._parameters.values() if p is not None)
        for path in outputs:
            if _outputs(modules[path]) and not _folds(modules[path], holders):
                raise UserError(
                    f"{path}: a multiplier folds into an nn.Linear of its own weight alone: "
                    "remove_multipliers(model, fold=False)"
                )
        for path in readouts:
            for factor in _inputs(modules[path]):
                weight = modules[path].weight
                modules[path].weight = nn.Parameter(weight * factor, requires_grad=weight.requires_grad)
                for config in _configs(model):
                    if getattr(config, "tie_word_embeddings", False):
                        config.tie_word_embeddings = False
        for path in outputs:
            for factor in _outputs(modules[path]):
                for parameter in modules[path].parameters():
                    parameter.mul_(factor)
    remove_hooks(model)


def _folds(module: nn.Module, holders: Counter[int]) -> bool:
    own = dict(module.named_parameters())
    linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return linear and own.keys() <= {"weight", "bias"} and all(holders[id(p)] == 1 for p in own.values())


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configs of a model of transformers, of its parts, and the configs within them."""
    waiting = [
        config for module in unwrapped(model).modules() if (config := getattr(module, "config", None)) is not None
    ]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        inner = vars(config).values() if hasattr(config, "__dict__") else ()
        waiting += [value for value in inner if hasattr(value, "tie_word_embeddings")]


def _check_that_it_is_called(model: nn.Module, path: str) -> None:
    if getattr(getattr(model, "config", None), "fuse_linear_cross_entropy", False):
        raise UserError(
            f"model.config: fuse_linear_cross_entropy: True: the loss reads {path}.weight without calling {path}, so "
            "that its multiplier is lost: use False (fuse_cross_entropy may stay)"
        )


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {plain(path): module for path, module in unwrapped(model).named_modules(remove_duplicate=False)}


def _alike(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _inputs(module: nn.Module) -> list[float]:
    return [hook.factor for hook in module._forward_pre_hooks.values() if isinstance(hook, InputMultiplier)]


def _outputs(module: nn.Module) -> list[float]:
    return [hook.factor for hook in module._forward_hooks.values() if isinstance(hook, OutputMultiplier)]
