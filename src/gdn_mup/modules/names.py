"""Names of modules and parameters: patterns, and what wrappers add."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
T = TypeVar("T")


def matching(names: Collection[str], pattern: str) -> list[str]:
    """Names that a pattern such as `*.in_proj` is for; it may leave out a leading `*.`.

    Who writes a whole name means that one alone.
    """
    if pattern in names:
        return [pattern]
    return [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]


def resolve(patterns: Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    """What is said of each name; of several patterns that match, the last one holds, and a whole name above all."""
    found = {name: said for pattern, said in patterns.items() for name in matching(names, pattern)}
    return found | {name: said for name, said in patterns.items() if name in names}


def unused(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    """Patterns that match nothing."""
    return [pattern for pattern in patterns if not matching(names, pattern)]


def patterns_for(wanted: Collection[str], names: Collection[str]) -> list[str]:
    """The shortest pattern that matches `wanted` and none of the other `names`, or else the names themselves."""
    first = next(iter(wanted)).split(".")
    for length in range(1, len(first) + 1):
        last = [re.sub(r"\d+", "*", step) if step.isdigit() or len(wanted) > 1 else step for step in first[-length:]]
        pattern = ".".join(last)
        pattern = pattern if length == len(first) else f"*.{pattern}"
        if set(matching(names, pattern)) == set(wanted):
            return [pattern]
    return list(wanted)


def as_range(names: Sequence[str]) -> str:
    """Names that differ in numbers as one, `layers.0-11.q_proj`: the range of each number that varies."""
    columns = list(zip(*(re.findall(r"\d+", name) for name in names), strict=True))
    ranges = iter([_range(sorted({int(number) for number in column})) for column in columns])
    return re.sub(r"\d+", lambda _: next(ranges), names[0])


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside torch.compile's and DistributedDataParallel's."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def plain(name: str) -> str:
    """A name without what torch.compile and activation checkpointing put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _range(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
