"""Names of modules and parameters: patterns, and what wrappers add."""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def matching(names: Iterable[str], pattern: str) -> Iterator[str]:
    """Names that a pattern such as `*.in_proj` is for; it may leave out a leading `*.`."""
    return (name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}"))


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
