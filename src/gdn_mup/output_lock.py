"""One process at a time makes an output: two that made the same would share its checkpoints and scratch files.

It happens: SIGKILL of Snakemake leaves its jobs training, and the next Snakemake starts them again.
"""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gdn_mup.files import naming

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.2


@contextmanager
def alone_at(output: Path) -> Iterator[bool]:
    """Wait until no other process makes this output, and keep others waiting while the block lasts.

    The lock is on a hidden file beside the output, which the kernel frees however a process ends.

    Yields whether another process has made the output while this one waited. Raises OSError, which names `output`.
    """
    before = _identity(output)
    lock, waited = _take(output)
    try:
        yield waited and _identity(output) not in (before, None)
    finally:
        if lock is not None:
            with suppress(OSError):
                _lock_file(output).unlink()  # while it is held, so that nobody else's is removed
            os.close(lock)


def _lock_file(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _take(output: Path) -> tuple[int | None, bool]:
    """The open file that holds the lock, if the file system has locks, and whether it had to be waited for."""
    path, waited = _lock_file(output), False
    with naming(output):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    log.info("Waiting: process %s makes %s", _holder(lock), output)
                    waited = True
                os.close(lock)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            except OSError:  # a file system without locks
                os.close(lock)
                return None, waited
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), path.stat()):
                    break
            os.close(lock)  # whoever held it has removed it: another one lies there, or none
    return lock, waited


def _holder(lock: int) -> str:
    """The number of the process that holds a lock, as the kernel tells it: a full disk leaves no room for it there."""
    with suppress(OSError):
        for entry in Path("/proc/locks").read_text().splitlines():
            match entry.split():
                case [_, "FLOCK", _, "WRITE", pid, place, *_] if place.endswith(f":{os.fstat(lock).st_ino}"):
                    return pid
    return "(another)"


def _identity(path: Path) -> tuple[int, int] | None:
    """Another one for another file under this name."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
