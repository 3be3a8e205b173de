"""A job's state as a file, so that a killed job goes on where it was: when to write one is `snapshots`' matter.

One safetensors file, replaced atomically, keyed by the hash of the job's settings, with a digest of its own content.
Nothing is unpickled. It is written piece by piece, straight from a GPU if the tensors are there, and hashed by several
threads: safetensors' own writer holds Python's lock over gigabytes and wants them twice in main memory.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gdn_mup.files import naming

log = logging.getLogger(__name__)

PIECE = 2**24  # bytes that are copied, hashed and written at a time
THREADS = 4  # that hash: one does 0.9 GB/s

_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64"}
_NO_DIGEST = "0" * 32  # while it is not known


class Position(NamedTuple):
    """How far a job is: after the members that are trained, a group of the next ones has done `step` updates."""

    trained_members: int
    group_size: int
    step: int
    micro_batches: int = 1  # parts of a batch that follow one another


class Abandoned(Exception):
    """Whoever asked for a checkpoint no longer wants it; the one before is in place."""


def checkpoint_bytes(tensors: Mapping[str, Tensor]) -> int:
    """How much a checkpoint of these tensors takes on the disk, but for some kilobytes."""
    return sum(tensor.nbytes for tensor in tensors.values())


def save_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor],
    settings_hash: str,
    position: Position,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Replace the checkpoint at `path`; a reader sees the old one or the new one, never half of one.

    Raises:
        OSError: it cannot be written.
        Abandoned: `wanted`, asked before every piece, said no.
    """
    metadata = {"settings_hash": settings_hash, "digest": _NO_DIGEST}
    metadata |= {name: str(number) for name, number in position._asdict().items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))  # so all are aligned
    partial = _partial(path)
    with naming(path):
        partial.mkdir(parents=True, exist_ok=True)
        try:
            with (partial / path.name).open("wb") as file, ThreadPoolExecutor(THREADS) as pool:
                head = _head(ordered, metadata)
                file.write(head)
                hashes: list[Future[bytes]] = []
                for piece in _pieces(ordered, hashes):
                    if not wanted():
                        raise Abandoned
                    hashes.append(pool.submit(_hash, piece))
                    file.write(piece)
                digest = _joined(head, [future.result() for future in hashes])
                file.seek(0)
                file.write(head.replace(_NO_DIGEST.encode(), digest.encode(), 1))
            os.replace(partial / path.name, path)
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
            if _digest(path, metadata["digest"]) != metadata["digest"]:
                raise ValueError("changed since it was written")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        log.warning("%s: checkpoint refused: %s; set aside as %s; starting afresh", path, error, _set_aside(path).name)
        return None
    return tensors, position


def _partial(path: Path) -> Path:
    """A folder of its own for what is not complete."""
    return path.with_name(f"{path.name}.partial")


def _head(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file: what lies where in the bytes that follow."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _pieces(tensors: Mapping[str, Tensor], hashes: list[Future[bytes]]) -> Iterator[memoryview]:
    """The tensors' bytes in pieces of PIECE, in a few buffers that take turns; one is reused when it is hashed.

    `hashes` has a future for each piece that was yielded. Copies from a GPU go by a stream of this thread's own.
    """
    total = checkpoint_bytes(tensors)
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    stream = torch.cuda.Stream(device) if device else None
    size, count = min(PIECE, total), min(THREADS, -(-total // PIECE))
    buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=device is not None) for _ in range(count)]
    filled = number = 0
    with torch.cuda.stream(stream):
        for tensor in tensors.values():
            content = tensor.detach().reshape(-1).view(torch.uint8)
            at = 0
            while at < len(content):
                buffer, count = buffers[number % len(buffers)], min(size - filled, len(content) - at)
                buffer[filled : filled + count].copy_(content[at : at + count], non_blocking=True)
                filled, at = filled + count, at + count
                if filled == size:
                    if stream is not None:
                        stream.synchronize()
                    yield buffer.numpy().data
                    filled, number = 0, number + 1
                    if number >= len(buffers):
                        hashes[number - len(buffers)].result()
        if filled:
            if stream is not None:
                stream.synchronize()
            yield buffers[number % len(buffers)][:filled].numpy().data


def _hash(piece: memoryview | bytes) -> bytes:
    return hashlib.blake2b(piece, digest_size=16).digest()


def _joined(head: bytes, hashes: list[bytes]) -> str:
    """The digest of a file, from its head without one and the hashes of its pieces."""
    return hashlib.blake2b(head + b"".join(hashes), digest_size=16).hexdigest()


def _digest(path: Path, said: str) -> str:
    """The digest of the file at `path`, which says that it is `said`."""
    with path.open("rb") as file, ThreadPoolExecutor(THREADS) as pool:
        length = file.read(8)
        head = length + file.read(struct.unpack("<Q", length)[0])
        begin, end = file.tell(), os.fstat(file.fileno()).st_size

        def piece(at: int) -> bytes:
            return _hash(os.pread(file.fileno(), PIECE, at))

        hashes = list(pool.map(piece, range(begin, end, PIECE)))
    return _joined(head.replace(said.encode(), _NO_DIGEST.encode(), 1), hashes)


def _set_aside(path: Path) -> Path:
    """Rename to the first free of `<name>.refused`, `<name>.refused2`, …"""
    names = itertools.chain([f"{path.name}.refused"], (f"{path.name}.refused{n}" for n in itertools.count(2)))
    aside = next(candidate for name in names if not (candidate := path.with_name(name)).exists())
    return path.rename(aside)
