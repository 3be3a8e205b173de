"""Two surveys side by side: how every parameter grows, or why that cannot be said."""

from collections.abc import Iterable, Iterator, Mapping
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
    known = _feature_growths(base, probe)
    vocabularies = {
        (one.shape[0], other.shape[0])
        for one, other in _pairs(base, probe)
        if one.kind is Kind.LOOKUP and one.shape[0] != other.shape[0]
    }
    return {name: _entry(name, base, target, probe, splits, known, vocabularies) for name in target.parameters}


def _entry(
    name: str,
    base: Survey,
    target: Survey,
    probe: Survey,
    splits: Mapping[str, Split | str],
    known: set[Fraction],
    vocabularies: set[tuple[int, int]],
) -> Entry:
    trio = one, here, wide = tuple(s.parameters[name] for s in (base, target, probe))
    width, holder = target.width / base.width, here.holders[0]
    notes: list[str] = []
    parts: tuple[Part, ...] = ()
    groups = 1
    if one.fans is None or here.fans is None or wide.fans is None:
        if one.shape != wide.shape or len(one.shape) != len(wide.shape):
            raise UserError(_unclear(name, one, wide))
        parts = (Part(1, Axes.NONE, Growth(1.0, 1.0, width)),)
    elif (one.kind is Kind.MATRIX or holder.is_bias) and _rows(one, wide) in vocabularies:
        notes.append("its rows are the vocabulary, which is no width")
        one, here, wide = (s._replace(fans=_fans(s)._replace(fan_out=1)) for s in trio)
    elif one.kind in (Kind.MATRIX, Kind.CONVOLUTION) or holder.is_bias:
        split = _split(holder, splits)
        if callable(split) and one.shape[0] != wide.shape[0]:
            rows = [rows_of(split, parameter.holders[0].parent) for parameter in trio]
            _check_rows(name, rows, trio)
            parts, groups = _split_parts(rows, trio, width), rows[1].groups
            notes.append(f"parts of {', '.join(map(str, rows[1].sizes))} rows")
        elif split != WHOLE and _growth_of_rows(one, wide) not in known:
            pattern = repr("*." + holder.path.rpartition(".")[2])
            raise UserError(
                f"{name}: its fan-out grows from {_fans(one).fan_out} (width {base.width}) to {_fans(wide).fan_out} "
                f"({probe.width}), as nothing else does: if its rows are several matrices, say their sizes, "
                f"parts={{{pattern}: lambda parent: [...]}}; if they are one, parts={{{pattern}: 'whole'}}"
            )
    if not parts:
        parts = (_part(1, _fans(one), _fans(here), _fans(wide), width),)
    if here.tied_readouts:
        notes.append(f"tied: {', '.join(here.tied_readouts)} multiplies by it")
    kind = Kind.VECTOR if here.fans is None else here.fans.kind
    return Entry(
        name,
        base_shape=one.shape,
        shape=here.shape,
        kind=kind,
        parts=parts,
        groups=groups,
        base_law=one.law,
        law=here.law,
        readouts=here.tied_readouts,
        module=type(holder.module).__name__,
        notes=tuple(notes),
    )


def _fans(parameter: Surveyed) -> Fans:
    assert parameter.fans is not None
    return parameter.fans


def _part(rows: int, one: Fans, here: Fans, wide: Fans, width: float) -> Part:
    axes = Growth(wide.fan_in / one.fan_in, wide.fan_out / one.fan_out, width).axes
    return Part(rows, axes, Growth(here.fan_in / one.fan_in, here.fan_out / one.fan_out, width))


def _split_parts(rows: list[Rows], parameters: tuple[Surveyed, ...], width: float) -> tuple[Part, ...]:
    parts = []
    for i, size in enumerate(rows[1].sizes):
        one, here, wide = (
            _fans(parameter)._replace(fan_out=split.groups * split.sizes[i])
            for parameter, split in zip(parameters, rows, strict=True)
        )
        parts.append(_part(size, one, here, wide, width))
    return tuple(parts)


def _check_rows(name: str, rows: list[Rows], parameters: tuple[Surveyed, ...]) -> None:
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


def _rows(one: Surveyed, wide: Surveyed) -> tuple[int, int]:
    return one.shape[0], wide.shape[0]


def _growth_of_rows(one: Surveyed, wide: Surveyed) -> Fraction:
    return Fraction(_fans(wide).fan_out, _fans(one).fan_out)


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
    example = " ".join(["out", "in", *["stack"] * len(one.shape)][: len(one.shape)])
    return (
        f"{name}: {one.shape} grows to {wide.shape} in a {module}, whose type does not say which axis is fan-in: "
        f"name the axes, axes={{{'*.' + name.rpartition('.')[2]!r}: {example!r}}} (`in` is summed over, `stack` holds "
        "copies side by side), or 'vector'"
    )


def _and_others(names: Iterable[str]) -> str:
    others = len(list(names)) - 1
    return f", and {others} more" if others else ""
