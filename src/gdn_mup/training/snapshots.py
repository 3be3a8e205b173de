"""When a job's checkpoints are written, and by whom: training stops for a copy of its state, a thread does the rest.

The copy stays on the GPU where its memory allows, else it goes to pinned main memory; on a CPU it is a second set of
arrays. What a checkpoint costs is measured, and the next ones come as much later as keeps that to 2 % of the job.
"""

import logging
import math
import shutil
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import torch
from torch import Tensor

from gdn_mup.errors import MachineError
from gdn_mup.training.checkpoint import Abandoned, Position, checkpoint_bytes, save_checkpoint

log = logging.getLogger(__name__)

SHARE = 0.02  # of a job's time that checkpoints may cost
DISK_SHARE = 0.5  # of the time that one job may write: others have the same disk
MARGIN = 2**30  # bytes of a GPU that a copy of the state leaves free, for what kernels ask for now and then


class Checkpoints:
    """The checkpoints of one job, at `path`.

    `seconds` between them at least; with 0 there is one after every update, and training waits until it is written.
    An error of the disk while one is written is raised by the next call.
    """

    def __init__(self, path: Path, settings_hash: str, seconds: float) -> None:
        self.path, self._settings_hash, self._seconds = path, settings_hash, seconds
        self._interval = seconds
        self._copies: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._given_up = Event()  # of the thread
        self._error: Exception | None = None
        self._announced = False
        self._begun = self._kept = time.monotonic()  # when the last one was copied, and the last that is complete
        self._writing_seconds = 0.0  # of the last that is complete

    def announce(self, tensors: Mapping[str, Tensor]) -> None:
        """Say what checkpoints of this state take. Raises MachineError if the disk cannot hold one."""
        if self._announced:
            return
        self._announced = True
        size = checkpoint_bytes(tensors)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path.parent).free
        if size > free:
            raise MachineError(
                f"{self.path}: a checkpoint takes {_bytes(size)}, and the disk has {_bytes(free)} free; make room "
                "there, or name a place on another disk with --checkpoint"
            )
        log.info(
            "Checkpoints: %s each, twice that on the disk while one replaces another, and once in %s; at most %.0f %% "
            "of the job's time",
            _bytes(size),
            "GPU or main memory" if any(tensor.is_cuda for tensor in tensors.values()) else "main memory",
            100 * SHARE,
        )

    def due(self) -> bool:
        """Whether it is time for one: after the interval, and if none is being written."""
        self._raise_error()
        return not self._busy() and time.monotonic() - self._begun >= self._interval

    def save(self, tensors: Mapping[str, Tensor], position: Position) -> None:
        """Copy the state, and begin to write it."""
        self._begun = time.monotonic()
        copies, copied = self._copy(tensors)
        self._begin(copies, position, copied, time.monotonic() - self._begun)
        if not self._seconds:
            self._wait()
            self._raise_error()

    def replace(self, tensors: Mapping[str, Tensor], position: Position) -> None:
        """Write a small one that makes any other needless: at the end of a group. Training waits for it."""
        self.forget()
        self._begun = time.monotonic()
        save_checkpoint(self.path, tensors, self._settings_hash, position)
        self._kept = self._begun

    def forget(self) -> None:
        """Give up what is being written, and free the copies."""
        self._give_up()
        self._raise_error()
        self._copies.clear()

    def close(self) -> None:
        """Let what is being written be completed, unless it was given up: the job ends by an error."""
        if not self._given_up.is_set():
            self._wait(time.monotonic() + 30)

    def last(self, tensors: Mapping[str, Tensor], position: Position, until: float) -> float:
        """Keep as much as can be by `until` (of time.monotonic): this state, or what is being written already.

        Returns how many seconds of training are lost, NaN if there is no checkpoint at all.
        """
        left = until - time.monotonic()
        needed = self._writing_seconds or (time.monotonic() - self._begun if self._busy() else 0.0)
        if 1.2 * needed <= left:
            self._give_up()
            self._begun = time.monotonic()
            self._begin(tensors, position, lambda: None, 0.0)  # nobody changes them any more: no copy
            now = self._begun
        else:
            now = time.monotonic()
        self._wait(until)
        if self._busy():
            self._give_up(1.0)
        self._raise_error()
        return self.age(now)

    def age(self, now: float | None = None) -> float:
        """Seconds from the last complete one to now; NaN if there is none."""
        return (time.monotonic() if now is None else now) - self._kept if self.path.exists() else math.nan

    def _begin(
        self, tensors: Mapping[str, Tensor], position: Position, copied: Callable[[], None], stopped: float
    ) -> None:
        begun, given_up = self._begun, Event()

        def write() -> None:
            began = time.monotonic()
            try:
                copied()
                save_checkpoint(self.path, tensors, self._settings_hash, position, lambda: not given_up.is_set())
            except Abandoned:
                return
            except Exception as error:
                self._error = error
                return
            self._kept, self._writing_seconds = begun, time.monotonic() - began
            self._stretch(tensors, stopped)

        self._given_up = given_up
        self._thread = Thread(target=write, daemon=True, name="checkpoint")
        self._thread.start()

    def _stretch(self, tensors: Mapping[str, Tensor], stopped: float) -> None:
        """Let the next ones come later if this one has cost too much."""
        if not self._seconds:
            return
        on_gpu = any(tensor.is_cuda for tensor in self._copies.values())
        cost = stopped if on_gpu else stopped + self._writing_seconds  # by a processor that could have trained
        interval = max(self._seconds, cost / SHARE, self._writing_seconds / DISK_SHARE)
        if interval > 1.1 * self._interval:
            log.info(
                "A checkpoint of %s stopped training for %.2f s and took %.1f s to write: from now on one every %.0f s",
                _bytes(checkpoint_bytes(tensors)), stopped, self._writing_seconds, interval,
            )  # fmt: skip
        self._interval = interval

    def _copy(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """The state as it is now, and a function that waits until the device has copied it."""
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = self._copies[name] = _room_for(tensor)
            copy.copy_(tensor.detach(), non_blocking=True)
        copies = {name: self._copies[name] for name in tensors}
        if not any(tensor.is_cuda for tensor in tensors.values()):
            return copies, lambda: None
        copied = torch.cuda.Event()
        copied.record()
        if any(tensor.is_cuda and not copies[name].is_cuda for name, tensor in tensors.items()):
            copied.synchronize()  # over the bus it takes a while, which is to be counted
        return copies, copied.synchronize

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wait(self, until: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(None if until is None else max(0.0, until - time.monotonic()))

    def _give_up(self, seconds: float = 30.0) -> None:
        """Let the thread end at its next piece."""
        self._given_up.set()
        self._wait(time.monotonic() + seconds)

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _room_for(tensor: Tensor) -> Tensor:
    """As much memory as a copy of it takes: on its own device, or in pinned main memory where that has no room."""
    if not tensor.is_cuda or torch.cuda.mem_get_info(tensor.device)[0] >= tensor.nbytes + MARGIN:
        with suppress(torch.OutOfMemoryError):
            return torch.empty_like(tensor)
    room = torch.empty_like(tensor, device="cpu")
    # Not torch's own pinned memory, which takes the next power of two.
    cuda = torch.cuda.cudart()
    if cuda.cudaHostRegister(room.data_ptr(), room.nbytes, 0) == cuda.cudaError.success:
        weakref.finalize(room, cuda.cudaHostUnregister, room.data_ptr())
    return room


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
