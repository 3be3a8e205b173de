"""Signals that ask a process to end: a job that trains ends at the next step with everything saved, others at once."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from gdn_mup.errors import Interrupted

ASKING = (signal.SIGTERM, signal.SIGINT)  # a scheduler's, and a person's
SAME_REQUEST_SECONDS = 1.0


@contextmanager
def raised_signals() -> Iterator[None]:
    """Turn a signal that comes in this block into Interrupted, so that temporary files are cleaned up."""

    def stop(name: str) -> None:
        raise Interrupted(name)

    with _handled(stop):
        yield


@contextmanager
def noted_signals() -> Iterator[Callable[[], str]]:
    """Yield a function that says which signal came ("" if none), while signals do nothing else."""
    came = ""

    def note(name: str) -> None:
        nonlocal came
        came = name

    with _handled(note):
        yield lambda: came


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
