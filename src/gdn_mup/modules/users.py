"""Code of the user's own that we call: what goes wrong there is said with file and line, and is no fault of ours."""

import errno
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from gdn_mup.errors import Interrupted, UserError, ending

_META = (
    "meta tensor",
    "meta device",
    "on meta",
    "'meta'",
    "Meta",
    "data-dependent",
    "unallocated storage",
)  # in what torch says where a tensor without values is read
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def users(what: str) -> Iterator[None]:
    """Turn whatever `what`, a function or module of the user's, raises into one line with file and line.

    Errors of the machine pass: memory, GPU, a full disk. So do a signal, and what is a line already.
    """
    try:
        yield
    except (UserError, Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:
        if isinstance(error, GeneratorExit) or _is_the_machines(error):
            raise
        raise UserError(f"{what}: {said(error)}") from error


def said(error: BaseException) -> str:
    """An error of the user's code: its type, its first line, where it was raised, and a cure if there is one."""
    reason = next(iter(str(error).strip().splitlines()), "")
    kind = type(error).__name__
    text = f"{kind}: {reason}" if reason else kind
    if isinstance(error, SystemExit):
        text = f"sys.exit({error.code!r}) was called"
    where = place(error)
    cure = (
        "; it must build a model without reading any tensor's values (load checkpoints afterwards)"
        if any(word in str(error) for word in _META)
        else ""
    )
    return text + (f" ({where})" if where else "") + cure


def place(error: BaseException) -> str:
    """File and line of the user's own code where an error was raised, or of the last code that is no package's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename)}:{error.lineno}"
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(_skipping(error.__traceback__))]
    own = [frame for frame in frames if _is_own(frame[0])]
    where = (own or frames)[-1:]
    return f"{_short(where[0][0])}:{where[0][1]}" if where else ""


def _skipping(frames: TracebackType | None) -> TracebackType | None:
    """What lies beyond our own functions, which called the user's."""
    here = str(Path(__file__).parents[1])
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(here) and frames.tb_next is not None:
        frames = frames.tb_next
    return frames


def _is_own(filename: str) -> bool:
    packages = [path for key in ("stdlib", "platstdlib", "purelib", "platlib") if (path := sysconfig.get_path(key))]
    return not filename.startswith(("<", *packages, str(Path(__file__).parents[1])))


def _short(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename


def _is_the_machines(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    return ending(error) is not None
