"""How a command ends when it does not end well: every failure that is not a mistake in the program, as one line.

The rest of the package raises what fits where it fails; `ending` is the one place that makes a line of it.
"""

import errno
import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

EXIT_BAD_INPUT = 2
EXIT_MACHINE = 3
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again

TRACEBACK = "GDN_MUP_TRACEBACK"  # set to anything, this environment variable adds the traceback
BACKGROUND = "gdn-mup: a library's work"  # the name of daemon threads that a process does not wait for
LAST_LINE = "GDN_MUP_LAST_LINE"  # the number of an open file for the last line, should standard error take none


class UserError(Exception):
    """Bad input. The message is one line: file, key, value, and what is allowed."""

    exit_code = EXIT_BAD_INPUT


class MachineError(UserError):
    """The input may be fine, the machine is not: disk, memory, GPU, network, a package that is not installed."""

    exit_code = EXIT_MACHINE


class Interrupted(BaseException):
    """A signal asked the process to end.

    `checkpoint` is where it goes on from, if there is one, and `lost` how many seconds of training are not in it: 0 if
    it was written after the signal.

    Like KeyboardInterrupt no `Exception`: it comes from anywhere and is nobody's to handle.
    """

    exit_code = EXIT_INTERRUPTED

    def __init__(self, signal_name: str, checkpoint: Path | None = None, lost: float = 0.0) -> None:
        where = f" to go on from {checkpoint}" if checkpoint else ""
        less = f" (the last {lost:.0f} s of training are lost)" if lost >= 1 else ""
        super().__init__(f"ended by {signal_name}; run the same command again{where}{less}")


class Ending(NamedTuple):
    """The last line of a command, and its exit code."""

    line: str
    exit_code: int


def ending(error: BaseException) -> Ending | None:
    """How a command that raised this ends; None for a mistake in the program, which keeps its traceback.

    Libraries are known by the names of their exceptions, so that none is imported for this.
    """
    if isinstance(error, Interrupted):
        return Ending(str(error), error.exit_code)
    if isinstance(error, UserError):
        return Ending(f"error: {error}", error.exit_code)
    complaint = _complaint(error)
    return Ending(f"error: {complaint}", EXIT_MACHINE) if complaint else None


def end(error: BaseException) -> None:
    """Print the one line of this error and exit; return if it is a mistake in the program, to be raised again."""
    how = ending(error)
    if how is None:
        return
    try:
        if os.environ.get(TRACEBACK):
            error.__suppress_context__ = False  # also of what was turned into a line before
            traceback.print_exception(error)
        print(how.line, file=sys.stderr, flush=True)
    except OSError:  # a log on the full disk
        with suppress(OSError, ValueError):
            os.write(int(os.environ.get(LAST_LINE, "")), f"{how.line}\n".encode(errors="replace"))
    if isinstance(error, Interrupted) and any(thread.name == BACKGROUND for thread in threading.enumerate()):
        # A library still computes in a thread of its own, for minutes perhaps, and would end a Python that is being
        # taken down under it by SIGABRT. What was to be put in order has been, on the way here.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(how.exit_code)
    sys.exit(how.exit_code)


_CURES = {
    errno.ENOSPC: "make room there, then run the same command again",
    errno.EDQUOT: "make room there, then run the same command again",
    errno.EROFS: "make it writable, or name another place",
    errno.EACCES: "get access to it, or name another place",
    errno.EEXIST: "it is no folder: name another place",
    errno.ENOTDIR: "it is no folder: name another place",
    errno.EPERM: "get access to it, or name another place",
}


def _complaint(error: BaseException) -> str | None:
    """What the machine has to say, with a cure."""
    kind, said = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, OSError):
        if "No usable temporary directory" in said:
            return f"{' '.join(str(error.strerror).split())}; name a folder that can be written in TMPDIR"
        cure = _CURES.get(error.errno or 0, "see to it, then run the same command again")
        what = os.strerror(error.errno) if error.errno else said or kind
        return f"{error.filename}: {what}; {cure}" if error.filename else f"{what}; {cure}"
    if kind == "OutOfMemoryError":  # of torch, and no smaller group of members was to be had
        return (
            "the GPU's memory does not hold this job; make training.batch_size or context_length smaller, or use "
            "a GPU with more memory"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in said or "Storage size calculation overflow" in said:
        return (
            "the machine's memory does not hold this job; make model, training.batch_size or context_length smaller, "
            "or use a machine with more memory"
        )
    if kind == "OutOfResources":  # of Triton
        return f"no kernel of this size runs on this GPU ({said}); use smaller heads, another GPU, or --device cpu"
    if kind == "AcceleratorError" or said.startswith("CUDA error"):
        return f"the GPU failed ({said.split('. ')[0]}); see `nvidia-smi`, then run the same command again"
    return None
