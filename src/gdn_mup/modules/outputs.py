"""What a module returns, taken apart: tensors in tuples, lists, dicts and output objects."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

_DEPTH = 4  # of containers within containers


def tensors_in(output: Any, label: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in an output, with where in it: `""` if it is one itself, else `[1]`, `['h']` or `[.state]`."""
    if isinstance(output, Tensor):
        yield label, output
        return
    if depth == 0 or isinstance(output, str | bytes | int | float | type(None)):
        return
    if isinstance(output, Mapping):
        items = [(f"[{key!r}]", value) for key, value in output.items()]
    elif isinstance(output, tuple | list):
        names = getattr(output, "_fields", None)
        items = [(f"[.{names[i]}]" if names else f"[{i}]", value) for i, value in enumerate(output)]
    else:
        items = [(f"[.{key}]", value) for key, value in getattr(output, "__dict__", {}).items()]
    for step, value in items:
        yield from tensors_in(value, label + step, depth - 1)
