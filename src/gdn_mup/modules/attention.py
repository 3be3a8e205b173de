"""Softmax attention whose heads grow: μP divides its logits by the head dim, not by its root (arXiv 2203.03466)."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from gdn_mup.modules.names import plain
from gdn_mup.modules.observe import Attention, Call, Pass, observe
from gdn_mup.modules.refusals import Cure, Refusal
from gdn_mup.modules.survey import MakeModel, Survey

_MOST_ENTRIES = 500_000_000  # of a base model that is built to try cures on


class _Grown(NamedTuple):
    """One softmax attention whose heads grow, and what its logits must be multiplied by."""

    module: str
    old: int
    new: int
    factor: float


def refusals(
    make_model: MakeModel,
    surveys: tuple[Survey, Survey],
    passes: tuple[Pass, Pass],
    outputs: Mapping[str, float],
    call: Call | None,
) -> list[Refusal]:
    """Softmax attention between two widths whose heads grow, unless `outputs` multiplies its logits as it must be."""
    grown = _grown(surveys, passes)
    if not grown:
        return []
    trial = _Trial(make_model, surveys[0], call)
    refused = []
    for one in grown:
        found = trial.factor(one, outputs)
        if found is None and any(path.startswith(one.module) for path in outputs):
            continue  # the model cannot be tried here: whoever multiplies within the attention is believed
        if found is not None and abs(found / one.factor - 1) < _CLOSE:
            continue
        module = trial.cure(one)
        cure = Cure("output_multipliers", f"{one.factor:.6g}", "multiply what queries are made of, ", module)
        said = f" (output_multipliers multiplies them by {found:.4g})" if found and abs(found - 1) > _CLOSE else ""
        refused.append(
            Refusal(
                (one.module,),
                f"head_dim grows from {one.old} to {one.new}, and softmax attention must then scale its logits by "
                f"1/head_dim instead of its root{said}",
                (cure,) if module else (),
                "or grow the number of heads" if module else "grow the number of heads",
                group=("attention", _alike(one.module), one.old, one.new, _alike("".join(module))),
            )
        )
    return refused


def _grown(surveys: tuple[Survey, Survey], passes: tuple[Pass, Pass]) -> list[_Grown]:
    """By what attention computes in a pass; where there is no whole pass, also by what its code and attributes say."""
    old, new = ({a.module: a for a in one.attention} for one in passes)
    found = {
        path: _Grown(path, one.head_dim, new[path].head_dim, _factor(one, new[path]))
        for path, one in old.items()
        if path in new and one.head_dim != new[path].head_dim
    }
    if not all(one.complete for one in passes):
        before = dict(surveys[0].model.named_modules())
        for path, module in surveys[1].model.named_modules():
            sizes = _head_dim(before.get(path)), _head_dim(module)
            if path not in old and all(sizes) and sizes[0] != sizes[1] and _is_softmax(module):
                found[path] = _Grown(path, sizes[0], sizes[1], (sizes[0] / sizes[1]) ** 0.5)
    return [one for one in found.values() if abs(one.factor - 1) > _CLOSE]


def _factor(old: Attention, new: Attention) -> float:
    """From the factor that the model has on its logits to one over the head dim."""
    return old.head_dim / new.head_dim * (old.scale * old.within) / (new.scale * new.within)


class _Trial:
    """A model of the base width with values, called as the others are: what multiplies queries, and nothing else."""

    def __init__(self, make_model: MakeModel, base: Survey, call: Call | None) -> None:
        self._call = call
        self._model: nn.Module | None = None
        if sum(p.numel() for p in base.model.parameters()) <= _MOST_ENTRIES:
            with suppress(Exception), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self._model = make_model(base.width)
        self._before = self._run({})
        self._cures: dict[str, str | None] = {}

    def factor(self, one: _Grown, outputs: Mapping[str, float]) -> float | None:
        """What these multipliers do to the product of queries and keys; None if the model cannot be called here."""
        if self._before is None or one.module not in self._before:
            return None
        after = self._run(outputs)
        if after is None:
            return None
        return after[one.module].logits / self._before[one.module].logits

    def cure(self, one: _Grown) -> tuple[str, ...]:
        """The module within this attention whose output is queries, with nothing behind it that undoes a factor."""
        if self._before is None or one.module not in self._before:
            return ()
        alike = _alike(one.module)
        if alike not in self._cures:
            self._cures[alike] = next(self._within(one), None)
        child = self._cures[alike]
        return () if child is None else (one.module + child,)

    def _within(self, one: _Grown) -> Iterator[str]:
        assert self._model is not None and self._before is not None
        before, start = self._before[one.module], f"{one.module}." if one.module else ""
        for path in [plain(path) for path, _ in self._model.named_modules()]:
            after = self._run({path: 2.0}) if path.startswith(start) and path != one.module else None
            seen = after.get(one.module) if after else None
            if seen and abs(seen.queries / before.queries - 2) < _CLOSE and abs(seen.keys / before.keys - 1) < _CLOSE:
                yield path[len(one.module) :]

    def _run(self, outputs: Mapping[str, float]) -> dict[str, Attention] | None:
        from gdn_mup.modules.forward import OutputMultiplier

        if self._model is None:
            return None
        modules: dict[str, Any] = {plain(path): module for path, module in self._model.named_modules()}
        handles = [
            modules[path].register_forward_hook(OutputMultiplier(factor, path)) for path, factor in outputs.items()
        ]
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                one = observe(self._model, self._call)
        finally:
            for handle in handles:
                handle.remove()
        return {a.module: a for a in one.attention} if one.complete else None


def _alike(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _head_dim(module: Any) -> int:
    sizes = (getattr(module, key, None) for key in _HEAD_DIMS)
    return next((size for size in sizes if type(size) is int), 0)


def _is_softmax(module: nn.Module) -> bool:
    """Whether the code of a module calls softmax attention, or has a float scale as transformers' has."""
    methods = [m for kind in type(module).__mro__ if kind is not nn.Module for m in vars(kind).values()]
    called = {name for method in methods for name in getattr(getattr(method, "__code__", None), "co_names", ())}
    return (
        isinstance(module, nn.MultiheadAttention)
        or isinstance(getattr(module, "scaling", None), float)
        or any(map(_SOFTMAX.fullmatch, called))
    )


_CLOSE = 0.01
_HEAD_DIMS = ("head_dim", "qk_head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_SOFTMAX = re.compile(
    r"ALL_ATTENTION_FUNCTIONS|eager_attention_forward|scaled_dot_product_attention|\w*flex_attention\w*|flash_attn\w*|"
    r"parallel_\w*attn|parallel_(nsa|moba|parallax)|deltaformer_attn"
)
