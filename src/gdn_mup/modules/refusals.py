"""What the rules cannot be known for: everything of a model in one error, with cures that were tried."""

import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

from gdn_mup.modules.names import as_range, patterns_for


class Cure(NamedTuple):
    """What to say to `Scaling.between`: a value for a pattern, as it is pasted, and when that is right.

    `names` are what the pattern is for, if not what is refused.
    """

    argument: str
    value: str
    text: str = ""
    names: tuple[str, ...] = ()


class Refusal(NamedTuple):
    """Something whose rule is not known: parameters or modules, why, and what may be said about them.

    Refusals of one `group` share their cure.
    """

    names: tuple[str, ...]
    why: str
    cures: tuple[Cure, ...] = ()
    otherwise: str = ""
    group: Hashable = None


Try = Callable[[str, dict[str, str]], Sequence[Refusal]]
"""From an argument and what is said there, by pattern, to what would still be refused."""


def listed(refusals: Sequence[Refusal], names: Mapping[str, Collection[str]], try_out: Try) -> str:
    """One line that lists every refusal, each with the cures that are accepted when they are pasted.

    `names` has, by argument, all names that a pattern could match there.
    """
    merged = _merged(refusals)
    often = {r.otherwise for r in merged if sum(other.otherwise == r.otherwise for other in merged) > 1} - {""}
    lines = []
    for refusal in merged:
        cures = [written for cure in refusal.cures if (written := _tried(cure, refusal, refusals, names, try_out))]
        advice = "; ".join([*cures, *({refusal.otherwise} - often - {""})])
        what = f"{_named(refusal.names)}: {refusal.why}"
        lines.append(f"{what}: {advice}" if advice else what)
    if len(lines) == 1:
        return lines[0]
    numbered = [f"({i}) {line}" for i, line in enumerate(lines, start=1)]
    return "; ".join([f"{len(lines)} questions are open: {numbered[0]}", *numbered[1:], *sorted(often)])


def _named(names: Sequence[str]) -> str:
    """All names, those that differ in numbers as one."""
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        alike.setdefault(re.sub(r"\d+", "#", name), []).append(name or "the model")
    return ", ".join(as_range(some) for some in alike.values())


def _tried(
    cure: Cure,
    refusal: Refusal,
    before: Sequence[Refusal],
    names: Mapping[str, Collection[str]],
    try_out: Try,
) -> str:
    """A cure as it is pasted, or nothing if it is not accepted."""
    known = names[cure.argument]
    said_of = cure.names or refusal.names
    wanted = [name for name in said_of if name in known]
    wanted = wanted or [path for name in said_of if (path := name.rpartition(".")[0]) in known]
    if not wanted:
        return ""
    patterns = patterns_for(list(dict.fromkeys(wanted)), known)
    open_before, open_after = (
        _questions(before),
        _questions(try_out(cure.argument, dict.fromkeys(patterns, cure.value))),
    )
    if open_after - open_before or open_after & _questions([refusal]):
        return ""
    value = cure.value if cure.argument == "output_multipliers" else repr(cure.value)
    said = ", ".join(f"{pattern!r}: {value}" for pattern in patterns)
    return f"{cure.text}{cure.argument}={{{said}}}"


def _questions(refusals: Sequence[Refusal]) -> set[tuple[str, Hashable]]:
    return {(name, refusal.group or refusal.why) for refusal in refusals for name in refusal.names}


def _merged(refusals: Sequence[Refusal]) -> list[Refusal]:
    """Those of a group as one."""
    groups: dict[Hashable, Refusal] = {}
    for i, refusal in enumerate(refusals):
        key = refusal.group if refusal.group is not None else i
        first = groups.get(key)
        if first is None:
            groups[key] = refusal
            continue
        cures = tuple(
            one._replace(names=one.names + other.names) for one, other in zip(first.cures, refusal.cures, strict=True)
        )
        groups[key] = first._replace(names=first.names + refusal.names, cures=cures)
    return list(groups.values())
