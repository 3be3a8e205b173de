"""Signals that ask a training job to end: it takes note, and ends at the next step with everything saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGINT)  # a scheduler's, and a person's


@contextmanager
def noted_signals() -> Iterator[Callable[[], str]]:
    """Yield a function that says which signal came ("" if none), while signals do nothing else.

    A second signal does what it would have done before: whoever is in a hurry asks twice. Outside the main
    thread signals cannot be had, and the function always says "".
    """
    came = ""
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: FrameType | None) -> None:
        nonlocal came
        came = signal.Signals(number).name
        restore()

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in ASKING}
    try:
        yield lambda: came
    finally:
        restore()
