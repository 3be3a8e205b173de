"""Forward multipliers as hooks: the model's code and parameters stay as they are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gdn_mup.errors import UserError
from gdn_mup.modules.names import plain, unwrapped


class InputMultiplier:
    """A forward pre-hook that multiplies a module's input."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (args[0] * self.factor, *args[1:]), kwargs
        (name, value), *others = kwargs.items()
        return args, {name: value * self.factor, **dict(others)}


class OutputMultiplier:
    """A forward hook that multiplies a module's output."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * self.factor


def add(model: nn.Module, readouts: Mapping[str, float], outputs: Mapping[str, float]) -> None:
    """Put the multipliers in place of those that may be there already."""
    remove_hooks(model)
    modules = _modules(model)
    for path, factor in readouts.items():
        if factor != 1:
            _check_that_it_is_called(unwrapped(model), path)
            modules[path].register_forward_pre_hook(InputMultiplier(factor), with_kwargs=True)
    for path, factor in outputs.items():
        if factor != 1:
            modules[path].register_forward_hook(OutputMultiplier(factor))


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
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, InputMultiplier | OutputMultiplier)]:
                del hooks[key]
                getattr(module, "_forward_pre_hooks_with_kwargs", {}).pop(key, None)


@torch.no_grad()
def remove(model: nn.Module, readouts: Mapping[str, float], outputs: Mapping[str, float], fold: bool) -> None:
    """Take all multipliers away; `fold` puts them into the weights of their linear layers."""
    if fold:
        modules: dict[str, Any] = dict(_modules(model))
        for path in outputs:
            if not isinstance(modules[path], nn.Linear) and _outputs(modules[path]):
                raise UserError(
                    f"{path}: a multiplier folds into nn.Linear alone: remove_multipliers(model, fold=False)"
                )
        for path in readouts:
            for factor in _inputs(modules[path]):
                weight = modules[path].weight
                modules[path].weight = nn.Parameter(weight * factor, requires_grad=weight.requires_grad)
                config: Any = getattr(unwrapped(model), "config", None)
                if getattr(config, "tie_word_embeddings", False):
                    config.tie_word_embeddings = False
        for path in outputs:
            for factor in _outputs(modules[path]):
                for parameter in modules[path].parameters():
                    parameter.mul_(factor)
    remove_hooks(model)


def check_softmax_attention(base: nn.Module, target: nn.Module, outputs: Mapping[str, float]) -> None:
    """Raise UserError if softmax attention has heads that grow and nobody has said how its logits scale.

    μP divides them by the head dim where attention divides by its root (arXiv 2203.03466). Only attention that says
    its head dim is seen: torch's, transformers', fla's.
    """
    before = dict(base.named_modules())
    for path, module in target.named_modules():
        old, new = (getattr(m, "head_dim", None) for m in (before.get(path), module))
        if not isinstance(old, int) or not isinstance(new, int) or old == new or not _is_softmax(module):
            continue
        if not any(other.startswith(path) for other in outputs):
            factor = (old / new) ** 0.5
            raise UserError(
                f"{path}: head_dim grows from {old} to {new}, and softmax attention must then scale its "
                f"logits by 1/head_dim instead of its root: grow the number of heads, or multiply what queries are "
                f"made of, output_multipliers={{'*.q_proj': {factor:.6g}}} ('*.q_norm' where queries are normalised)"
            )


def _is_softmax(module: nn.Module) -> bool:
    fla_attention = type(module).__name__ == "Attention"
    return (
        isinstance(module, nn.MultiheadAttention)
        or isinstance(getattr(module, "scaling", None), float)
        or fla_attention
    )


def _check_that_it_is_called(model: nn.Module, path: str) -> None:
    if getattr(getattr(model, "config", None), "fuse_linear_cross_entropy", False):
        raise UserError(
            f"model.config: fuse_linear_cross_entropy: True: the loss reads {path}.weight without calling {path}, so "
            "that its multiplier is lost: use False (fuse_cross_entropy may stay)"
        )


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {plain(path): module for path, module in unwrapped(model).named_modules(remove_duplicate=False)}


def _inputs(module: nn.Module) -> list[float]:
    return [hook.factor for hook in module._forward_pre_hooks.values() if isinstance(hook, InputMultiplier)]


def _outputs(module: nn.Module) -> list[float]:
    return [hook.factor for hook in module._forward_hooks.values() if isinstance(hook, OutputMultiplier)]
