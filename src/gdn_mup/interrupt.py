"""Signals that ask a process to end: a job that trains ends at the next step with everything saved, others at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from gdn_mup.errors import Interrupted

ASKING = (signal.SIGTERM, signal.SIGINT)  # a scheduler's, and a person's


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

    A second one does what it would have done before: whoever is in a hurry asks twice. Outside the main thread signals
    cannot be had, and nothing is called.
    """
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def first(number: int, _: FrameType | None) -> None:
        restore()
        handle(signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, first) for number in ASKING}
    try:
        yield
    finally:
        restore()
