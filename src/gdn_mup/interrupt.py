"""Signals that ask a process to end: a job that trains ends within seconds with what it can save, others at once."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from gdn_mup.errors import Interrupted

ASKING = (signal.SIGTERM, signal.SIGINT)  # a scheduler's, and a person's
SAME_REQUEST_SECONDS = 1.0
GRACE_SECONDS = 10.0  # between the signal and the end: SLURM gives 30 before it kills, Kubernetes too, systemd 90
SAVING_SECONDS = 8.0  # of these, for a last checkpoint


@contextmanager
def raised_signals() -> Iterator[None]:
    """Turn a signal that comes in this block into Interrupted, so that temporary files are cleaned up."""

    def stop(name: str) -> None:
        raise Interrupted(name)

    with _handled(stop):
        yield


class Asked:
    """Whether a signal has come, and by when what is to be kept must be on the disk."""

    def __init__(self) -> None:
        self.signal = ""
        self.save_until = float("inf")  # of time.monotonic

    def note(self, name: str) -> None:
        """A signal of this name comes now."""
        self.signal = self.signal or name
        self.save_until = min(self.save_until, time.monotonic() + SAVING_SECONDS)


@contextmanager
def noted_signals(last_words: Callable[[str], str] = lambda name: str(Interrupted(name))) -> Iterator[Asked]:
    """Note signals, while they do nothing else.

    Whoever does not look in time, since it waits for a GPU or a disk, is ended after GRACE_SECONDS with exit code 75;
    `last_words` makes the line that says so of the signal's name.
    """
    asked = Asked()
    with _handled(asked.note), _watched(asked, last_words):
        yield asked


@contextmanager
def _watched(asked: Asked, last_words: Callable[[str], str]) -> Iterator[None]:
    """End the process if this block outlasts a signal by GRACE_SECONDS.

    Python calls handlers between its own instructions alone, so a thread hears of signals from the interpreter itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        while number := ours.recv(1):
            if number[0] in ASKING:
                break
        else:
            return
        name = signal.Signals(number[0]).name
        asked.note(name)
        if not over.wait(GRACE_SECONDS):
            print(last_words(name), file=sys.stderr, flush=True)
            os._exit(Interrupted.exit_code)

    before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True, name="signals")
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        pythons.close()
        watcher.join()
        ours.close()


@contextmanager
def _handled(handle: Callable[[str], None]) -> Iterator[None]:
    """Call a function with the name of the first signal that comes.

    A second one does what it would have done before: whoever is in a hurry asks twice. But one within a second of the
    first is the same request, from a launcher that hands on what everybody got. Outside the main thread signals cannot
    be had, and nothing is called.
    """
    before: dict[signal.Signals, Any] = {}
    came: float | None = None

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def take(number: int, _: FrameType | None) -> None:
        nonlocal came
        if came is None:
            came = time.monotonic()
            handle(signal.Signals(number).name)
        elif time.monotonic() - came > SAME_REQUEST_SECONDS:
            restore()
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, take) for number in ASKING}
    try:
        yield
    finally:
        restore()
