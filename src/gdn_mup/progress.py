"""Progress of long work: a bar where a terminal is, a plain line now and then where none is."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Report(Protocol):
    """What the work calls: how much of the total is done, and a word about how it goes."""

    def __call__(self, done: float, status: str = "") -> None: ...


def silent(done: float, status: str = "") -> None:
    """Report nothing."""


@contextmanager
def progress(title: str, total: float, *, shown: bool = True) -> Iterator[Report]:
    """Yield a function to be called with the amount done so far and a short status, on standard error."""
    if not shown:
        yield silent
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total, status="")
        yield lambda done, status="": bars.update(task, completed=done, status=status)


def _lines(title: str, total: float) -> Report:
    start = time.monotonic()
    last = -SECONDS_BETWEEN_LINES

    def report(done: float, status: str = "") -> None:
        nonlocal last
        now = time.monotonic() - start
        if now - last < SECONDS_BETWEEN_LINES and done < total:
            return
        last = now
        left = f", {now / done * (total - done):.0f} s left" if 0 < done < total else ""
        print(f"{title}: {done / total:4.0%} after {now:.0f} s{left} {status}".rstrip(), file=sys.stderr)
        sys.stderr.flush()

    return report
