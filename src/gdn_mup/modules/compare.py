"""Two surveys side by side: how every parameter grows, or why that cannot be said."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from gdn_mup.errors import UserError
from gdn_mup.modules.fans import Fans, Kind
from gdn_mup.modules.init_law import Law
from gdn_mup.modules.names import matching
from gdn_mup.modules.parts import WHOLE, Rows, Split, known_split, rows_of
from gdn_mup.modules.survey import Holder, Survey, Surveyed
from gdn_mup.scaling.growth import Axes, Growth


class Part(NamedTuple):
    """Rows of a parameter that scale alike: how many in a group, which axes grow with width, by how much here."""

    rows: int
    axes: Axes
    growth: Growth


class Entry(NamedTuple):
    """One parameter of the target, compared with the base. Most have one part; a fused one has several.

    `groups` is how often the sequence of parts is repeated along the rows.
    """

    name: str
    base_shape: tuple[int, ...]
    shape: tuple[int, ...]
    kind: Kind
    parts: tuple[Part, ...]
    groups: int
    base_law: Law | None
    law: Law | None
    readouts: tuple[str, ...]
    module: str
    notes: tuple[str, ...]

    @property
    def axes(self) -> Axes | None:
        """The axes that grow, if all parts agree."""
        kinds = {part.axes for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else None


def compare(base: Survey, target: Survey, probe: Survey, splits: Mapping[str, Split | str]) -> dict[str, Entry]:
    """Every parameter of `target`. `probe` is the target, or a wider model where that is the base itself.

    Raises UserError where shapes leave open how a parameter scales.
    """
    for other in (target, probe):
        if base.parameters.keys() != other.parameters.keys():
            only = sorted(base.parameters.keys() ^ other.parameters.keys())
            raise UserError(
                f"make_model: {only[0]} is a parameter at width {base.width} or at {other.width}, not at both"
                f"{_and_others(only)}: keep depth and options equal and change the width alone"
            )
    vocabularies = {
        (one.shape[0], other.shape[0])
        for one, other in _pairs(base, probe)
        if one.kind is Kind.LOOKUP and one.shape[0] != other.shape[0]
    }
    evidence = _Evidence(_feature_growths(base, probe), vocabularies, splits)
    return {name: _entry(name, (base, target, probe), evidence) for name in target.parameters}


class _Evidence(NamedTuple):
    """What decides whether the rows of a matrix are one axis: growths that features have, vocabularies, splits."""

    growths: set[Fraction]
    vocabularies: set[tuple[int, int]]  # rows of lookup tables that differ between the widths
    splits: Mapping[str, Split | str]


class _Found(NamedTuple):
    parts: tuple[Part, ...]
    groups: int = 1
    notes: tuple[str, ...] = ()


def _entry(name: str, surveys: tuple[Survey, Survey, Survey], evidence: _Evidence) -> Entry:
    one, here, wide = (s.parameters[name] for s in surveys)
    found = _find_parts(name, surveys, (one, here, wide), evidence)
    tied = (f"tied: {', '.join(here.tied_readouts)} multiplies by it",) if here.tied_readouts else ()
    return Entry(
        name,
        base_shape=one.shape,
        shape=here.shape,
        kind=here.kind or Kind.VECTOR,
        parts=found.parts,
        groups=found.groups,
        base_law=one.law,
        law=here.law,
        readouts=here.tied_readouts,
        module=type(here.holders[0].module).__name__,
        notes=(*found.notes, *tied),
    )


def _find_parts(
    name: str, surveys: tuple[Survey, Survey, Survey], trio: tuple[Surveyed, Surveyed, Surveyed], evidence: _Evidence
) -> _Found:
    """How the rows of a parameter grow: as one, or part by part."""
    (base, target, probe), (one, here, wide) = surveys, trio
    width, holder = target.width / base.width, here.holders[0]
    if one.fans is None or here.fans is None or wide.fans is None:
        if one.shape != wide.shape:
            raise UserError(_unclear(name, one, wide))
        return _Found((Part(1, Axes.NONE, Growth(1.0, 1.0, width)),))
    fans = one.fans, here.fans, wide.fans
    if one.kind not in (Kind.MATRIX, Kind.CONVOLUTION) and not holder.is_bias:
        return _Found((_part(1, *fans, width),))
    if one.kind is not Kind.CONVOLUTION and (one.shape[0], wide.shape[0]) in evidence.vocabularies:
        first, second, third = (f._replace(fan_out=1) for f in fans)
        return _Found(
            (_part(1, first, second, third, width),), notes=("its rows are the vocabulary, which is no width",)
        )
    split = _split(holder, evidence.splits)
    if callable(split) and one.shape[0] != wide.shape[0]:
        rows = [rows_of(split, parameter.holders[0].parent) for parameter in trio]
        _check_rows(name, rows, trio)
        note = f"parts of {', '.join(map(str, rows[1].sizes))} rows"
        return _Found(_split_parts(rows, fans, width), rows[1].groups, (note,))
    if split != WHOLE and Fraction(wide.fans.fan_out, one.fans.fan_out) not in evidence.growths:
        pattern = repr("*." + holder.path.rpartition(".")[2])
        raise UserError(
            f"{name}: its fan-out grows from {one.fans.fan_out} (width {base.width}) to {wide.fans.fan_out} "
            f"({probe.width}), as nothing else does: if its rows are several matrices, say their sizes, "
            f"parts={{{pattern}: lambda parent: [...]}}; if they are one, parts={{{pattern}: 'whole'}}"
        )
    return _Found((_part(1, *fans, width),))


def _part(rows: int, one: Fans, here: Fans, wide: Fans, width: float) -> Part:
    axes = Growth(wide.fan_in / one.fan_in, wide.fan_out / one.fan_out, width).axes
    return Part(rows, axes, Growth(here.fan_in / one.fan_in, here.fan_out / one.fan_out, width))


def _split_parts(rows: Sequence[Rows], fans: Sequence[Fans], width: float) -> tuple[Part, ...]:
    parts = []
    for i, size in enumerate(rows[1].sizes):
        one, here, wide = (
            f._replace(fan_out=split.groups * split.sizes[i]) for f, split in zip(fans, rows, strict=True)
        )
        parts.append(_part(size, one, here, wide, width))
    return tuple(parts)


def _check_rows(name: str, rows: Sequence[Rows], parameters: Sequence[Surveyed]) -> None:
    for split, parameter in zip(rows, parameters, strict=True):
        if split.total != parameter.shape[0] or len(split.sizes) != len(rows[0].sizes) or min(split.sizes) < 1:
            raise UserError(
                f"parts: {name} has {parameter.shape[0]} rows, and its parts are {list(split.sizes)}"
                f"{f' × {split.groups}' if split.groups > 1 else ''}: give the same number of parts at every width, "
                "each of one row or more, that add up to all rows"
            )


def _feature_growths(base: Survey, probe: Survey) -> set[Fraction]:
    """Growths that some axis shows without doubt: axes that are summed over, embeddings, and gains or scalars.

    A fused projection's rows are none of these. If they grow as nothing else does, they are several things in one.
    """
    known = {Fraction(1), Fraction(probe.width, base.width)}
    for one, other in _pairs(base, probe):
        if one.fans is None or other.fans is None:
            continue
        match one.fans.kind:
            case Kind.MATRIX | Kind.CONVOLUTION:
                known.add(Fraction(other.fans.fan_in, one.fans.fan_in))
            case Kind.LOOKUP:
                known.add(Fraction(other.fans.fan_out, one.fans.fan_out))
            case Kind.VECTOR if not one.holders[0].is_bias:
                known.add(Fraction(other.fans.fan_out, one.fans.fan_out))
    return known


def _pairs(base: Survey, other: Survey) -> Iterator[tuple[Surveyed, Surveyed]]:
    return ((one, other.parameters[name]) for name, one in base.parameters.items())


def _split(holder: Holder, splits: Mapping[str, Split | str]) -> Split | str | None:
    """What the user says of a layer's rows, or else what is known of it."""
    for pattern, split in splits.items():
        if any(matching([holder.path], pattern)):
            return split
    return known_split(holder.parent, holder.path.rpartition(".")[2])


def _unclear(name: str, one: Surveyed, wide: Surveyed) -> str:
    module = type(one.holders[0].module).__name__
    if len(one.holders) > 1:
        users = ", ".join(f"{type(h.module).__name__} {h.path}" for h in one.holders)
        return f"{name}: shared by modules that use it differently ({users}): untie it"
    grown = [i for i, sizes in enumerate(zip(one.shape, wide.shape, strict=False)) if sizes[0] != sizes[1]]

    def named(*roles: str) -> str:
        names = ["stack"] * len(one.shape)
        for axis, role in zip(grown, roles, strict=False):
            names[axis] = role
        return repr(" ".join(names))

    examples = (
        f"{named('out')} or {named('in')}" if len(grown) == 1 else f"{named('out', 'in')} or {named('in', 'out')}"
    )
    pattern = repr("*." + name.rpartition(".")[2])
    return (
        f"{name}: {one.shape} grows to {wide.shape} in a {module}, whose type does not say what is summed over: name "
        f"the axes, axes={{{pattern}: ...}}, such as {examples} (`in` is summed over, `stack` holds copies side by "
        "side), or 'vector'"
    )


def _and_others(names: Iterable[str]) -> str:
    others = len(list(names)) - 1
    return f", and {others} more" if others else ""
