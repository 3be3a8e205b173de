"""Work of libraries in other threads, so that a signal is heard while they compute.

Python handles signals between two of its own instructions: not before a call of a library returns, which may take
minutes. The threads are daemons. A process that is asked to end does not wait for them.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from gdn_mup.errors import BACKGROUND

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_background(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises; meanwhile this thread handles signals."""
    (result,) = prefetch(work() for _ in range(1))
    return result


def prefetch(items: Iterable[Item], ahead: int = 2) -> Iterator[Item]:
    """The same items, made by another thread, which is at most `ahead` items in front.

    What the items raise is raised here. Where they are not taken to the end, the other thread stops at its next one.
    """
    made: queue.Queue[tuple[str, Any]] = queue.Queue(ahead)
    left = threading.Event()

    def put(kind: str, content: Any = None) -> None:
        while not left.is_set():
            try:
                made.put((kind, content), timeout=0.1)
            except queue.Full:
                continue
            return

    def make() -> None:
        try:
            for item in items:
                put("item", item)
                if left.is_set():
                    return
        except BaseException as error:
            put("error", error)
        else:
            put("end")

    threading.Thread(target=make, name=BACKGROUND, daemon=True).start()
    try:
        while True:
            kind, content = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise content
            yield content
    finally:
        left.set()
