"""The init that the rules ask for: a model's own, rescaled, or normal distributions."""

import math
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gdn_mup.errors import UserError
from gdn_mup.modules.compare import Entry
from gdn_mup.modules.fans import Kind
from gdn_mup.modules.names import matching

if TYPE_CHECKING:
    from gdn_mup.modules.scaling import Scaling

_STANDARD_ERRORS = 6  # how far a measured standard deviation may be off before it is another
_SLACK = 0.02  # and beyond that: padding rows of zeros, rounding to bfloat16


class State(Enum):
    """What a parameter's standard deviation says of it."""

    OWN = "its own init"
    SCALED = "the rescaled init"
    EITHER = "too few entries to tell"
    NEITHER = "another"


@torch.no_grad()
def initialize(
    scaling: "Scaling",
    model: nn.Module,
    std: float | Mapping[str, float] | None,
    generator: torch.Generator | None,
) -> None:
    """See `Scaling.initialize`."""
    parameters = {name: p for name, p in scaling.parameters_of(model).items() if p.requires_grad}
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise UserError(f"model: {name} is on the meta device: materialise it and run the model's own init first")
    given = _given(std, scaling.entries)
    factors = {name: _factors(scaling, name) for name in parameters if name not in given}
    factors = {name: factor for name, factor in factors.items() if any(f != 1 for f in factor)}
    states = {name: _state(scaling.entries[name], parameters[name], factor) for name, factor in factors.items()}
    wrong = next((name for name, state in states.items() if state is State.NEITHER), None)
    if wrong is None and {State.OWN, State.SCALED} <= set(states.values()):
        wrong = next(name for name, state in states.items() if state is State.SCALED)
    if wrong is not None:
        entry = scaling.entries[wrong]
        assert entry.law is not None
        raise UserError(
            f"model: {wrong} has standard deviation {_rms(parameters[wrong]):.4g}, make_model's own init "
            f"{entry.law.std:.4g}, rescaled {entry.law.std * size(entry, factors[wrong]):.4g}: initialise a model "
            "fresh from make_model, or, if this one is trained or loaded, call add_multipliers(model) instead"
        )
    if State.SCALED not in states.values():
        for name, factor in factors.items():
            _scale(parameters[name], scaling.entries[name], factor)
    for name in given.keys() & parameters.keys():
        parameters[name].normal_(0.0, given[name], generator=generator)
        init = [part.init_std for part in scaling.part_multipliers(name, "adamw")]
        _scale(parameters[name], scaling.entries[name], init)


def _given(std: float | Mapping[str, float] | None, entries: Mapping[str, Entry]) -> dict[str, float]:
    """Standard deviations at the base width that the caller gives."""
    if std is None:
        return {}
    if not isinstance(std, Mapping):
        return {name: std for name, entry in entries.items() if entry.kind is not Kind.VECTOR}
    for pattern in std:
        if not any(matching(entries, pattern)):
            raise UserError(f"std: {pattern!r} is the name of no parameter; there is {next(iter(entries))!r}")
    return {name: value for pattern, value in std.items() for name in matching(entries, pattern)}


def _factors(scaling: "Scaling", name: str) -> list[float]:
    """What to multiply a parameter's own init by, part by part."""
    entry = scaling.entries[name]
    init = [part.init_std for part in scaling.part_multipliers(name, "adamw")]
    base, here = entry.base_law, entry.law
    if base is not None and here is not None:
        if base == here == (0.0, 0.0):
            return [1.0]
        if base.centred and here.centred:
            return [factor * base.std / here.std for factor in init]
    if entry.kind is Kind.VECTOR or (entry.base_shape == entry.shape and all(f == 1 for f in init)):
        return [1.0]  # gains, gates, time constants: what a model draws or counts by its own law
    how = "in a way that cannot be followed" if base is None or here is None else "with a mean that is not 0"
    raise UserError(
        f"{name}: make_model fills it {how}: give its standard deviation at width {scaling.base}, "
        f"initialize(model, std={{{name!r}: ...}})"
    )


def _state(entry: Entry, parameter: Tensor, factors: list[float]) -> State:
    assert entry.law is not None
    measured = math.log(max(_rms(parameter), 1e-300) / entry.law.std)
    expected = math.log(size(entry, factors))
    tolerance = _STANDARD_ERRORS / math.sqrt(2 * parameter.numel()) + _SLACK
    own, scaled = abs(measured) < tolerance, abs(measured - expected) < tolerance
    if own and scaled:
        return State.EITHER
    return State.OWN if own else State.SCALED if scaled else State.NEITHER


def size(entry: Entry, factors: list[float]) -> float:
    """By how much the root mean square of a parameter changes, of factors part by part."""
    rows = [part.rows for part in entry.parts] if len(factors) > 1 else [1]
    return math.sqrt(sum(n * f**2 for n, f in zip(rows, factors, strict=True)) / sum(rows))


def _scale(parameter: Tensor, entry: Entry, factors: list[float]) -> None:
    if len(set(factors)) == 1:
        if factors[0] != 1:
            parameter.mul_(factors[0])
        return
    rows = [part.rows for part in entry.parts]
    column = torch.tensor(factors).repeat_interleave(torch.tensor(rows)).repeat(entry.groups)
    factor: Any = column.view(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape).to(parameter.dtype)
    placements = getattr(parameter, "placements", None)
    if placements is None:
        parameter.mul_(factor.to(parameter.device))
    else:
        from torch.distributed.tensor import distribute_tensor

        parameter.mul_(distribute_tensor(factor.to(parameter.device), parameter.device_mesh, placements))  # type: ignore[attr-defined]


def _rms(parameter: Tensor) -> float:
    square: Any = parameter.detach().float().square().mean()
    return math.sqrt(float(square.full_tensor() if hasattr(square, "full_tensor") else square))
