"""Run a notebook with parameters: `python run_notebook.py NOTEBOOK EXECUTED name=value ...`.

This is `papermill NOTEBOOK EXECUTED -p name value ...` with what papermill's command line cannot do: the kernel is
this Python, whatever kernels a user has installed; it is reached through Unix sockets, since kernels that start at the
same moment race for TCP ports; and a user's settings and start-up files have no say in a figure.
"""

import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gdn_mup import errors
from gdn_mup.interrupt import raised_signals

LONGEST_FOLDER = 60  # characters: a Unix socket's path holds about a hundred
OF_THE_USER = ("MPLBACKEND", "MATPLOTLIBRC", "PYTHONSTARTUP")


def main(notebook: str, executed: str, *parameters: str) -> None:
    """Execute `notebook`, keep the result in `executed`. What fails ends the process as `gdn-mup` ends."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with scratch_folder() as scratch:
        for name in OF_THE_USER:
            os.environ.pop(name, None)
        places = ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        os.environ.update(dict.fromkeys(places, str(scratch)))
        kernel = scratch / "kernels" / "python3" / "kernel.json"
        kernel.parent.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
        # jsonschema, which checks notebooks, would compile the grammar of international addresses (IRIs) when it is
        # imported: 1.6 seconds for a format that no notebook has. It does without where the package is absent.
        sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
        import papermill
        from traitlets.config import Config

        papermill.execute_notebook(
            notebook,
            executed,
            parameters=dict(parameter.split("=", 1) for parameter in parameters),
            kernel_name="python3",
            config=Config(KernelManager={"transport": "ipc", "ip": str(scratch / "kernel")}),
            progress_bar=False,
            log_output=True,
        )


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for sockets, in TMPDIR if its path is short enough.

    Raises MachineError if there is no place for it.
    """
    places = [os.environ.get("TMPDIR", ""), "/tmp", "/dev/shm", os.getcwd()]
    for place in places:
        if place and len(place) <= LONGEST_FOLDER:
            with suppress(OSError):
                folder = tempfile.TemporaryDirectory(prefix="gdn-mup-", dir=place, ignore_cleanup_errors=True)
                break
    else:
        raise errors.MachineError(
            "TMPDIR: no folder for a kernel's sockets; name one that can be written, with a path of at most "
            f"{LONGEST_FOLDER} characters"
        )
    with folder as path:
        yield Path(path)


def raised(error: Exception, notebook: str) -> Exception:
    """Whose fault it is: what a cell raised, of which papermill knows name and text, or what became of the kernel."""
    name, text = getattr(error, "ename", ""), getattr(error, "evalue", "")
    if name in ("UserError", "MachineError"):
        return getattr(errors, name)(text)
    if said := re.fullmatch(r"\[Errno (\d+)\] (.*?)(?:: '(.*)')?", text):
        return OSError(int(said[1]), said[2], said[3] or notebook)
    if name == "MemoryError":
        return MemoryError(text)
    if name:
        return of_cell(error, name, text, notebook)
    if type(error).__name__ == "DeadKernelError":
        return errors.MachineError(
            f"{notebook}: its kernel was ended from outside, as Linux does where memory runs out; make room there, "
            "then run the same command again"
        )
    if "Kernel died before replying" in str(error):
        return errors.MachineError(
            f"{notebook}: its kernel does not start; see what `{sys.executable} -m ipykernel --version` says"
        )
    if type(error).__name__ == "NotJSONError":
        return errors.UserError(
            f"{notebook}: not a notebook ({' '.join(str(error).split())[:80]}); take it back from git"
        )
    return error


def of_cell(error: Exception, name: str, text: str, notebook: str) -> Exception:
    """What a cell raised: a mistake in the notebook, unless it came up inside this package."""
    frames = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(getattr(error, "traceback", [])))
    *_, in_cell = re.split(r"^(?:Cell )?In ?\[\d+\], line", frames, flags=re.MULTILINE)
    if re.search(r"^File .*[/\\]gdn_mup[/\\]", in_cell, flags=re.MULTILINE):
        return error
    line = re.match(r" (\d+)", in_cell)
    where = f"cell {getattr(error, 'exec_count', '?')}" + (f", line {line[1]}" if line else "")
    return errors.UserError(
        f"{notebook}: {where}: {name}: {' '.join(text.split())}; correct the notebook, or take back what was changed: "
        f"`git checkout {notebook}`"
    )


if __name__ == "__main__":
    try:
        with raised_signals():
            main(*sys.argv[1:])
    except Exception as error:
        if isinstance(error, OSError) and not error.filename:
            error.filename = sys.argv[2]  # what papermill writes as it goes
        errors.end(raised(error, sys.argv[1]))
        raise
    except errors.Interrupted as error:
        logging.getLogger("asyncio").disabled = True  # of a kernel that is gone
        errors.end(error)
