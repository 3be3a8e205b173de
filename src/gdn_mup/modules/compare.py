"""Two models compared: how every parameter grows, part by part, and what that leaves open."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from gdn_mup.errors import UserError
from gdn_mup.modules.fans import Fans, Kind
from gdn_mup.modules.init_law import Filled, Law, Region
from gdn_mup.modules.names import resolve
from gdn_mup.modules.parts import WHOLE, Rows, Split, known_split, rows_of
from gdn_mup.modules.refusals import Cure, Refusal
from gdn_mup.modules.survey import Survey, Surveyed, sharing
from gdn_mup.scaling.growth import Axes, Growth


class Part(NamedTuple):
    """Rows of a parameter that scale alike: how many in a group, which axes grow with width, by how much here."""

    rows: int
    axes: Axes
    growth: Growth


class Apart(NamedTuple):
    """Entries of a parameter that its model fills apart: where they are here, and their law at both widths."""

    region: Region
    base_law: Law | None
    law: Law | None


class Entry(NamedTuple):
    """One parameter of the target, compared with the base. Most have one part; a fused one has several.

    `groups` is how often the sequence of parts is repeated along the rows. The laws are those of its init but for
    what is filled `apart`. What no optimizer trains has no rule.
    """

    name: str
    base_shape: tuple[int, ...]
    shape: tuple[int, ...]
    kind: Kind
    parts: tuple[Part, ...]
    groups: int
    base_law: Law | None
    law: Law | None
    apart: tuple[Apart, ...]
    readouts: tuple[str, ...]
    module: str
    trained: bool
    notes: tuple[str, ...]

    @property
    def axes(self) -> Axes | None:
        """The axes that grow, if all parts agree."""
        kinds = {part.axes for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else None


def compare(
    base: Survey, target: Survey, probe: Survey, parts: Mapping[str, Split | str], axes: Mapping[str, str]
) -> tuple[dict[str, Entry], list[Refusal]]:
    """Every parameter of `target`, and those whose rule the shapes leave open.

    `probe` is a wider model of the family: an axis that grows there is one that grows, though rounding may hide it
    between base and target.

    Raises UserError if the models have different parameters.
    """
    for other in (target, probe):
        if base.parameters.keys() != other.parameters.keys():
            only = sorted(base.parameters.keys() ^ other.parameters.keys())
            raise UserError(
                f"make_model: {only[0]} is a parameter at width {base.width} or at {other.width}, not at both"
                f"{_and_others(only)}: keep depth and options equal and change the width alone"
            )
    refused: list[Refusal] = []
    surveys = []
    for one in (base, target, probe):
        declared, problems = one.declaring(axes)
        surveys.append(declared)
        refused += problems if one is target else []
    first, here, wide = surveys
    growths = _feature_growths(first, wide)
    vocabularies = {
        (one.shape[0], other.shape[0])
        for one, other in _pairs(first, wide)
        if one.kind is Kind.LOOKUP
        and one.shape[0] != other.shape[0]
        and _ratio(other.shape[0], one.shape[0]) not in growths
    }
    paths = {holder.path for found in here.parameters.values() for holder in found.holders}
    evidence = _Evidence(growths, vocabularies, resolve(parts, paths))
    entries = {}
    for name in here.parameters:
        entry = _entry(name, (first, here, wide), evidence)
        if isinstance(entry, Refusal):
            refused.append(entry)
        else:
            entries[name] = entry
    refused += [
        Refusal(
            (other,),
            f"shares its memory with {name}, but is another Parameter, so that an optimizer would update it twice",
            otherwise="tie them, as in `head.weight = embedding.weight`, or copy the values (`.clone()`)",
        )
        for other, name in sharing([(n, here.model.get_parameter(n)) for n in here.parameters])
        if here.parameters[name].trained or here.parameters[other].trained
    ]
    return entries, refused


class _Evidence(NamedTuple):
    """What decides whether the rows of a matrix are one axis: growths that features have, vocabularies, splits."""

    growths: set[Fraction]
    vocabularies: set[tuple[int, int]]  # rows of lookup tables that differ between the widths, and not as features do
    splits: Mapping[str, Split | str]


class _Found(NamedTuple):
    parts: tuple[Part, ...]
    groups: int = 1
    notes: tuple[str, ...] = ()


def _entry(name: str, surveys: tuple[Survey, Survey, Survey], evidence: _Evidence) -> Entry | Refusal:
    one, here, wide = (s.parameters[name] for s in surveys)
    trained = one.trained or here.trained
    if trained:
        found = _find_parts(name, surveys, (one, here, wide), evidence)
        if isinstance(found, Refusal):
            return found
    else:
        growth = Growth(1.0, 1.0, surveys[1].width / surveys[0].width)
        found = _Found((Part(1, Axes.NONE, growth),), notes=("frozen: no optimizer trains it",))
    readouts = here.tied_readouts if trained else ()
    tied = (f"tied: {', '.join(readouts)} multiplies by it",) if readouts else ()
    return Entry(
        name,
        base_shape=one.shape,
        shape=here.shape,
        kind=here.kind or Kind.VECTOR,
        parts=found.parts,
        groups=found.groups,
        base_law=one.filled.law,
        law=here.filled.law,
        apart=_apart(one.filled, here.filled),
        readouts=readouts,
        module=type(here.holders[0].module).__name__,
        trained=trained,
        notes=(*found.notes, *tied),
    )


def _apart(one: Filled, here: Filled) -> tuple[Apart, ...]:
    """The same fills at both widths, in their order."""
    alike = len(one.apart) == len(here.apart)
    laws = [law for _, law in one.apart] if alike else [None] * len(here.apart)
    return tuple(Apart(region, base_law, law) for base_law, (region, law) in zip(laws, here.apart, strict=True))


def _find_parts(
    name: str, surveys: tuple[Survey, Survey, Survey], trio: tuple[Surveyed, Surveyed, Surveyed], evidence: _Evidence
) -> _Found | Refusal:
    """How the rows of a parameter grow: as one, or part by part."""
    (base, target, probe), (one, here, wide) = surveys, trio
    width, holder = target.width / base.width, here.holders[0]
    if here.computed_by and one.shape != wide.shape:
        return _computed(name, here)
    if one.fans is None or here.fans is None or wide.fans is None:
        if one.shape != wide.shape:
            return _unclear(name, one, here if here.shape != one.shape else wide)
        return _Found((Part(1, Axes.NONE, Growth(1.0, 1.0, width)),))
    fans = one.fans, here.fans, wide.fans
    if one.kind not in (Kind.MATRIX, Kind.CONVOLUTION) and not holder.is_bias:
        return _Found((_part(1, *fans, width),))
    if one.kind is not Kind.CONVOLUTION and (one.shape[0], wide.shape[0]) in evidence.vocabularies:
        first, second, third = (f._replace(fan_out=1) for f in fans)
        return _Found(
            (_part(1, first, second, third, width),), notes=("its rows are the vocabulary, which is no width",)
        )
    split = evidence.splits.get(holder.path) or known_split(holder.parent, holder.path.rpartition(".")[2])
    if callable(split) and one.shape[0] != wide.shape[0]:
        rows = [rows_of(split, parameter.holders[0].parent, name) for parameter in trio]
        if wrong := _wrong_rows(name, rows, trio):
            return wrong
        note = f"parts of {', '.join(map(str, rows[1].sizes))} rows"
        return _Found(_split_parts(rows, fans, width), rows[1].groups, (note,))
    shown = f"{here.fans.fan_out} ({target.width})"
    if here.fans.fan_out == one.fans.fan_out:  # hidden by rounding
        shown = f"{wide.fans.fan_out} ({probe.width})"
    if split != WHOLE and _ratio(wide.fans.fan_out, one.fans.fan_out) not in evidence.growths:
        return Refusal(
            (name,),
            f"its fan-out grows from {one.fans.fan_out} (width {base.width}) to {shown}, as nothing else does: its "
            "rows may be several matrices",
            (Cure("parts", WHOLE, "if they are one axis, "),),
            "if not, the same with a function from the module that holds the layer to the sizes of its parts, in rows, "
            "`lambda parent: [...]`",
            group=("parts", holder.path.rpartition(".")[2], one.fans.fan_out, wide.fans.fan_out),
        )
    return _Found((_part(1, *fans, width),))


def _computed(name: str, here: Surveyed) -> Refusal:
    """A weight computed from parameters: whatever is said of their axes."""
    path = here.holders[0].path.partition(".parametrizations")[0]
    return Refusal(
        (name,),
        f"the weight of {path or 'the model'} is computed from it ({here.computed_by}), and neither its init nor its "
        "learning rate moves that weight as the rules ask for",
        otherwise="build the model without (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
        "remove_spectral_norm or prune.remove undoes it), or freeze the layer",
        group=("computed", here.computed_by),
    )


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


def _wrong_rows(name: str, rows: Sequence[Rows], parameters: Sequence[Surveyed]) -> Refusal | None:
    for split, parameter in zip(rows, parameters, strict=True):
        if split.total != parameter.shape[0] or len(split.sizes) != len(rows[0].sizes) or min(split.sizes) < 1:
            return Refusal(
                (name,),
                f"parts: it has {parameter.shape[0]} rows, and its parts are {list(split.sizes)}"
                f"{f' × {split.groups}' if split.groups > 1 else ''}",
                otherwise="give the same number of parts at every width, each of one row or more, that add up to all "
                "rows",
            )
    return None


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
                known.add(_ratio(other.fans.fan_in, one.fans.fan_in))
            case Kind.LOOKUP:
                known.add(_ratio(other.fans.fan_out, one.fans.fan_out))
            case Kind.VECTOR if not one.holders[0].is_bias:
                known.add(_ratio(other.fans.fan_out, one.fans.fan_out))
    return known


def _pairs(base: Survey, other: Survey) -> Iterator[tuple[Surveyed, Surveyed]]:
    return ((one, other.parameters[name]) for name, one in base.parameters.items())


def _ratio(larger: int, smaller: int) -> Fraction:
    return Fraction(larger, smaller) if smaller else Fraction(0)


def _unclear(name: str, one: Surveyed, wide: Surveyed) -> Refusal:
    """A bare parameter, or one that modules use differently: which axes are summed over is for the user to say."""
    grown = [i for i, sizes in enumerate(zip(one.shape, wide.shape, strict=False)) if sizes[0] != sizes[1]]

    def named(*roles: str) -> str:
        names = ["stack"] * len(one.shape)
        for axis, role in zip(grown, roles, strict=False):
            names[axis] = role
        return " ".join(names)

    choices = [named("out"), named("in")] if len(grown) == 1 else [named("out", "in"), named("in", "out")]
    if len(grown) == 1 and len(one.shape) == 2:  # a matrix one of whose sides stays
        choices = ["out in", "in out"]
    first = one.holders[0]
    users = ", ".join(f"{type(h.module).__name__} {h.path}" for h in one.holders)
    used = (
        f"shared by modules that use it differently ({users})"
        if len(one.holders) > 1
        else f"in a {type(first.module).__name__}, whose type does not say what is summed over"
    )
    return Refusal(
        (name,),
        f"{one.shape} grows to {wide.shape} {used}",
        (Cure("axes", choices[0], "name its axes, "), Cure("axes", choices[1], "or "), Cure("axes", "vector", "or ")),
        ("untie it, or name its axes: " if len(one.holders) > 1 else "")
        + "`in` is summed over, `stack` (as in 'stack out') holds copies side by side, a 'vector' acts entry by entry",
        group=("axes", type(first.module), first.attribute, len(one.holders), one.shape, wide.shape),
    )


def _and_others(names: Iterable[str]) -> str:
    others = len(list(names)) - 1
    return f", and {others} more" if others else ""
