"""A job's state on disk while it runs, so that a killed job goes on where it was.

One safetensors file, replaced atomically, keyed by the hash of the job's settings, with a digest of its own content.
Nothing is unpickled.
"""

import hashlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gdn_mup.files import naming

log = logging.getLogger(__name__)


class Position(NamedTuple):
    """How far a job is: after the members that are trained, a group of the next ones has done `step` updates."""

    trained_members: int
    group_size: int
    step: int
    micro_batches: int = 1  # parts of a batch that follow one another


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], settings_hash: str, position: Position) -> None:
    """Replace the checkpoint at `path`; a reader sees the old one or the new one, never half of one. Raises OSError."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"settings_hash": settings_hash, "digest": _digest(tensors)}
    metadata |= {name: str(number) for name, number in position._asdict().items()}
    partial = _partial(path)
    with naming(path):
        partial.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, partial / path.name, metadata)
            os.replace(partial / path.name, path)
        except SafetensorError as error:
            raise _as_os_error(error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(path: Path, settings_hash: str) -> tuple[dict[str, Tensor], Position] | None:
    """Tensors and the position they were saved at, or None if there is no checkpoint that fits.

    One of other settings, truncated, or changed since it was written is set aside under another name, with a
    warning that says so: it is neither loaded nor deleted, and the job starts afresh. What a process that was killed
    while it saved has left is removed.
    """
    shutil.rmtree(_partial(path), ignore_errors=True)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("settings_hash")
            if found != settings_hash:
                raise ValueError(f"of other settings (hash {found}, this job's is {settings_hash})")
            position = Position(*(int(metadata[name]) for name in Position._fields))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(tensors) != metadata["digest"]:
            raise ValueError("changed since it was written")
    except (SafetensorError, KeyError, ValueError) as error:
        log.warning("%s: checkpoint refused: %s; set aside as %s; starting afresh", path, error, _set_aside(path).name)
        return None
    return tensors, position


def _as_os_error(error: SafetensorError) -> Exception:
    """What the disk said, which safetensors tells in words alone: `I/O error: No space left (os error 28)`."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else error


def _partial(path: Path) -> Path:
    """A folder of its own for what is not complete: safetensors writes to temporary names that it does not tell."""
    return path.with_name(f"{path.name}.partial")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names and bytes, in the order of the names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _set_aside(path: Path) -> Path:
    """Rename to the first free of `<name>.refused`, `<name>.refused2`, …"""
    names = itertools.chain([f"{path.name}.refused"], (f"{path.name}.refused{n}" for n in itertools.count(2)))
    aside = next(candidate for name in names if not (candidate := path.with_name(name)).exists())
    return path.rename(aside)
