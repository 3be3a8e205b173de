"""The init that the rules ask for: a model's own, rescaled, or normal distributions.

Before anything is changed, all that is known of the model's own init is compared with what the model has: the entries
that one call filled together, and what was filled apart by its own law.
"""

import math
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gdn_mup.errors import UserError
from gdn_mup.modules.compare import Entry
from gdn_mup.modules.fans import Kind
from gdn_mup.modules.init_law import Law, Region
from gdn_mup.modules.names import resolve, unused, unwrapped
from gdn_mup.modules.survey import refuse_lazy, sharing

if TYPE_CHECKING:
    from gdn_mup.modules.scaling import Scaling

_STANDARD_ERRORS = 6  # how far a measured size may be off before it is another
_SLACK = 0.02  # and beyond that: rounding to bfloat16, a law that is followed on quantiles
_ROUNDING = 0.01  # of a constant, to bfloat16
_MARK = "_gdn_mup_initialized"  # what was multiplied by what, kept on the model itself


class State(Enum):
    """What the values of a parameter say of it."""

    OWN = "its own init"
    SCALED = "the rescaled init"
    EITHER = "too few entries to tell"
    NEITHER = "another"


class _Fill(NamedTuple):
    """Entries of a parameter that its model fills by one law, and what multiplies them, part by part.

    `region` is None for all that is not filled apart.
    """

    region: Region | None
    law: Law | None
    factors: list[float]

    @property
    def scaled(self) -> bool:
        """Whether anything is multiplied."""
        return any(factor != 1 for factor in self.factors)


@torch.no_grad()
def initialize(
    scaling: "Scaling",
    model: nn.Module,
    std: float | Mapping[str, float] | None,
    generator: torch.Generator | None,
) -> None:
    """See `Scaling.initialize`."""
    refuse_lazy(model, "model")
    parameters = scaling.trained_parameters_of(model)
    _check_memory(parameters)
    _check_tied(scaling, parameters)
    given = _given(std, scaling.entries)
    fills = _all_fills(scaling, [name for name in parameters if name not in given])
    known: dict[str, dict[str, float]] = vars(unwrapped(model)).setdefault(_MARK, {})
    marks = {name: _sizes(fills[name]) for name in fills if any(fill.scaled for fill in fills[name])}
    states = {name: _state(scaling.entries[name], parameters[name], fills[name]) for name in fills}
    _refuse_others(scaling, parameters, fills, states, marks, known)
    done = State.SCALED in states.values()
    for name, mark in marks.items():
        if not done and known.get(name) != mark:
            for fill in fills[name]:
                _scale(parameters[name], scaling.entries[name], fill.factors, _mask(scaling.entries[name], fill))
        known[name] = mark
    for name in given.keys() & parameters.keys():
        _draw(parameters[name], scaling, name, given[name], generator)
        known.pop(name, None)


def _check_tied(scaling: "Scaling", parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse a tied readout's multiplier on what is not trained here: a frozen model must stay what it computes."""
    for name, entry in scaling.entries.items():
        if entry.readouts and name not in parameters:
            raise UserError(
                f"model: {name} is frozen, and trained in make_model's, where {entry.readouts[0]} gets a multiplier: "
                "freeze it in make_model too, or, if this model was trained with it, call add_multipliers(model)"
            )


def _check_memory(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse what has no values to compare, or shares them with another parameter."""
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise UserError(f"model: {name} is on the meta device: materialise it and run the model's own init first")
    shared = sharing(parameters.items())
    if shared:
        one, other = shared[0]
        raise UserError(
            f"model: {other} shares its memory with {one}, but is another Parameter: tie them, or copy the values"
        )


def _refuse_others(
    scaling: "Scaling",
    parameters: Mapping[str, nn.Parameter],
    fills: Mapping[str, list[_Fill]],
    states: Mapping[str, State],
    marks: Mapping[str, Mapping[str, float]],
    known: Mapping[str, Mapping[str, float]],
) -> None:
    """One line for everything that is neither as the model draws it nor as the rules ask for."""
    infinite = [name for name, parameter in parameters.items() if not _is_finite(parameter)]
    if infinite:
        raise UserError(
            f"model: {', '.join(infinite)}: not finite: run the model's own init first, which a model that comes from "
            "the meta device has lost"
        )
    wrong = [name for name, state in states.items() if state is State.NEITHER]
    others = [name for name, mark in marks.items() if name in known and known[name] != mark]
    if others:
        raise UserError(f"model: {', '.join(others)}: initialised by another Scaling: build the model afresh")
    if not wrong:  # drawn again after it was scaled
        wrong = [name for name in marks if states[name] is State.OWN and name in known]
    if not wrong and {State.OWN, State.SCALED} <= {states[name] for name in marks}:
        wrong = [name for name in marks if states[name] is State.SCALED]
    if wrong:
        details = "; ".join(_difference(scaling, name, parameters[name], fills[name]) for name in wrong)
        raise UserError(
            f"model: {details}: initialise a model fresh from make_model, or, if this one is trained or loaded, call "
            "add_multipliers(model) instead"
        )


def _difference(scaling: "Scaling", name: str, parameter: Tensor, fills: list[_Fill]) -> str:
    """What a parameter has, and what it should have."""
    entry = scaling.entries[name]
    worst = next(
        (f for f in fills if f.law is not None and _fill_state(entry, parameter, f) is State.NEITHER),
        next(f for f in fills if f.law is not None),
    )
    assert worst.law is not None
    mean, rms, _ = _moments(parameter, _mask(entry, worst))
    if not worst.law.centred:
        own = f"{worst.law.mean:.4g} and {worst.law.rms:.4g}"
        return f"{name} has mean {mean:.4g} and root mean square {rms:.4g}, make_model's own init {own}"
    rescaled = f", rescaled {worst.law.std * size(entry, worst.factors):.4g}" if worst.scaled else ""
    return f"{name} has standard deviation {rms:.4g}, make_model's own init {worst.law.std:.4g}{rescaled}"


def _draw(
    parameter: nn.Parameter, scaling: "Scaling", name: str, std: float, generator: torch.Generator | None
) -> None:
    """Draw a parameter from a normal distribution, but for the constants that its model fills apart."""
    entry = scaling.entries[name]
    kept = [(_like(fill.region.mask(entry.shape), parameter)) for fill in entry.apart if _is_constant(fill.law)]
    before = parameter.clone() if kept else None
    parameter.normal_(0.0, std, generator=generator)
    _scale(parameter, entry, [part.init_std for part in scaling.part_multipliers(name, "adamw")], None)
    for mask in kept:
        assert before is not None
        parameter.copy_(torch.where(mask, before, parameter))


def _is_constant(law: Law | None) -> bool:
    return law is not None and law.std == 0


def _given(std: float | Mapping[str, float] | None, entries: Mapping[str, Entry]) -> dict[str, float]:
    """Standard deviations at the base width that the caller gives."""
    if std is None:
        return {}
    if not isinstance(std, Mapping):
        return {name: std for name, entry in entries.items() if entry.kind is not Kind.VECTOR}
    for pattern in unused(std, entries):
        raise UserError(f"std: {pattern!r} is the name of no parameter; there is {next(iter(entries))!r}")
    return resolve(std, entries)


def _all_fills(scaling: "Scaling", names: list[str]) -> dict[str, list[_Fill]]:
    """Those of every parameter; one UserError for all whose init is not known."""
    fills, refused = {}, []
    for name in names:
        try:
            fills[name] = _fills(scaling, name)
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise UserError("; ".join(refused))
    return fills


def _fills(scaling: "Scaling", name: str) -> list[_Fill]:
    """What to multiply a parameter's own init by: what is filled apart, each by its law, and the rest."""
    entry = scaling.entries[name]
    rest = math.prod(entry.shape) > sum(fill.region.numel for fill in entry.apart)
    fills = [
        _Fill(fill.region, fill.law, _factors(scaling, name, fill.base_law, fill.law, apart=True))
        for fill in entry.apart
    ]
    return [*([_Fill(None, entry.law, _factors(scaling, name, entry.base_law, entry.law))] if rest else []), *fills]


def _factors(scaling: "Scaling", name: str, base: Law | None, here: Law | None, apart: bool = False) -> list[float]:
    """What to multiply entries of a law by, part by part."""
    entry = scaling.entries[name]
    init = [part.init_std for part in scaling.part_multipliers(name, "adamw")]
    if base is not None and here is not None:
        if _is_constant(base) and _is_constant(here) and base.mean == here.mean and (apart or base.mean == 0):
            return [1.0]
        if base.centred and here.centred:
            return [factor * base.std / here.std for factor in init]
        counted = not base.drawn and not here.drawn and base.std > 0
        if counted and all(f == 1 for f in init) and abs(here.rms / base.rms - 1) < _SLACK:
            return [1.0]  # a table, such as of sines, that is as large at every width
    if entry.kind is Kind.VECTOR or (entry.base_shape == entry.shape and all(f == 1 for f in init)):
        return [1.0]  # gains, gates, time constants: what a model draws or counts by its own law
    how = (
        "in a way that cannot be followed"
        if base is None or here is None or not here.drawn
        else "with a mean that is not 0"
    )
    raise UserError(
        f"{name}: make_model fills it {how}: give its standard deviation at width {scaling.base}, "
        f"initialize(model, std={{{name!r}: ...}})"
    )


def _sizes(fills: list[_Fill]) -> dict[str, float]:
    """What a mark keeps of the factors: plain text and numbers, which go with the model wherever it is copied."""
    return {f"{fill.region and tuple(fill.region)} {i}": f for fill in fills for i, f in enumerate(fill.factors)}


def _state(entry: Entry, parameter: Tensor, fills: list[_Fill]) -> State:
    """What a parameter is, of all that is known of it: one part that is neither makes it another."""
    states = [_fill_state(entry, parameter, fill) for fill in fills if fill.law is not None]
    for state in (State.NEITHER, State.SCALED):
        if state in states:
            return state
    scaled = [state for state, fill in zip(states, [f for f in fills if f.law is not None], strict=True) if fill.scaled]
    return State.OWN if State.OWN in scaled else State.EITHER


def _fill_state(entry: Entry, parameter: Tensor, fill: _Fill) -> State:
    """OWN or SCALED where the size of the entries tells; what is not scaled is EITHER, or another."""
    law = fill.law
    assert law is not None
    mean, rms, entries = _moments(parameter, _mask(entry, fill))
    if entries == 0:
        return State.EITHER
    if law.std == 0 and not fill.scaled:
        same = abs(mean - law.mean) <= _ROUNDING * abs(law.mean) and abs(rms - abs(law.mean)) <= _ROUNDING * abs(
            law.mean
        )
        return State.EITHER if same else State.NEITHER
    if law.rms == 0:
        return State.EITHER if rms == 0 else State.NEITHER
    measured = math.log(max(rms, 1e-300) / law.rms)
    expected = math.log(size(entry, fill.factors)) if fill.scaled else 0.0
    tolerance = _STANDARD_ERRORS * law.spread / math.sqrt(entries) + _SLACK
    off = abs(mean - law.mean) > _STANDARD_ERRORS * law.std / math.sqrt(entries) + _SLACK * law.rms
    if not fill.scaled and (off or abs(measured) >= tolerance):
        return State.NEITHER
    own, scaled = abs(measured) < tolerance, abs(measured - expected) < tolerance
    if own and scaled:
        return State.EITHER
    return State.OWN if own else State.SCALED if scaled else State.NEITHER


def size(entry: Entry, factors: list[float]) -> float:
    """By how much the root mean square of a parameter changes, of factors part by part."""
    rows = [part.rows for part in entry.parts] if len(factors) > 1 else [1]
    return math.sqrt(sum(n * f**2 for n, f in zip(rows, factors, strict=True)) / sum(rows))


def rms(scaling: "Scaling", name: str) -> float:
    """The root mean square of a parameter after `initialize`; NaN if a law is not known."""
    entry = scaling.entries[name]
    try:
        fills = _fills(scaling, name)
    except UserError:
        return math.nan
    if not fills or any(fill.law is None for fill in fills):
        return math.nan
    apart = sum(fill.region.numel for fill in fills if fill.region)
    squares = [
        (fill.region.numel if fill.region else math.prod(entry.shape) - apart)
        * (fill.law.rms * size(entry, fill.factors)) ** 2
        for fill in fills
        if fill.law is not None
    ]
    return math.sqrt(sum(squares) / math.prod(entry.shape))


def _mask(entry: Entry, fill: _Fill) -> Tensor | None:
    """The entries that a fill is about, or None for all of them; what is filled later lies above."""
    if not entry.apart:
        return None
    regions = [other.region for other in entry.apart]
    later = regions if fill.region is None else regions[regions.index(fill.region) + 1 :]
    mask = torch.ones(entry.shape, dtype=torch.bool) if fill.region is None else fill.region.mask(entry.shape)
    for region in later:
        mask &= ~region.mask(entry.shape)
    return mask


def _scale(parameter: Tensor, entry: Entry, factors: list[float], mask: Tensor | None) -> None:
    """Multiply the parts of a parameter by their factors, where the mask says."""
    if mask is None and len(set(factors)) == 1:
        if factors[0] != 1:
            parameter.mul_(factors[0])
        return
    rows = [part.rows for part in entry.parts] if len(factors) > 1 else [entry.shape[0]]
    groups = entry.groups if len(factors) > 1 else 1
    column = torch.tensor(factors).repeat_interleave(torch.tensor(rows)).repeat(groups)
    factor: Any = column.view(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape)
    factor = factor if mask is None else torch.where(mask, factor, torch.ones(()))
    parameter.mul_(_like(factor.to(parameter.dtype), parameter))


def _like(tensor: Tensor, parameter: Any) -> Tensor:
    """A tensor of a parameter's shape, where the parameter is and as it is distributed."""
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, placements)


def _moments(parameter: Tensor, mask: Tensor | None) -> tuple[float, float, int]:
    """Mean, root mean square and number of the entries where the mask is true."""
    values = parameter.detach()
    entries = values.numel() if mask is None else int(mask.sum())
    values = values if values.is_complex() else values.float()
    values = values if mask is None else values * _like(mask.to(values.dtype), parameter)
    sums = [_full(values.sum()), _full(values.abs().square().sum())]
    count = max(entries, 1)
    return sums[0].real / count, math.sqrt(sums[1].real / count), entries


def _is_finite(parameter: Tensor) -> bool:
    return bool(math.isfinite(abs(_full(parameter.detach().abs().float().max())))) if parameter.numel() else True


def _full(value: Any) -> complex:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).item()
