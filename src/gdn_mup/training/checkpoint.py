"""A job's state on disk while it runs, so that a killed job goes on where it was.

One safetensors file, replaced atomically, keyed by the hash of the job's settings. Nothing is unpickled.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gdn_mup.errors import UserError


class Position(NamedTuple):
    """How far a job is: after the members that are trained, a group of the next ones has done `step` updates."""

    trained_members: int
    group_size: int
    step: int


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], settings_hash: str, position: Position) -> None:
    """Replace the checkpoint at `path`; a reader sees the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    metadata = {"settings_hash": settings_hash, **{name: str(n) for name, n in position._asdict().items()}}
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, settings_hash: str) -> tuple[dict[str, Tensor], Position] | None:
    """Tensors and the position they were saved at, or None if there is no checkpoint.

    Raises UserError if the file is not a checkpoint or belongs to other settings; it is left as it is.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("settings_hash")
            if found != settings_hash:
                raise UserError(
                    f"{path}: checkpoint of other settings (hash {found}, this job's is {settings_hash}); "
                    "move it away or delete it to start afresh"
                )
            position = Position(*(int(metadata[name]) for name in Position._fields))
            return {name: file.get_tensor(name) for name in file.keys()}, position  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable checkpoint ({error}); move it away or delete it to start afresh"
        ) from None
