"""Run a notebook with parameters: `python run_notebook.py NOTEBOOK EXECUTED name=value ...`.

This is `papermill NOTEBOOK EXECUTED -p name value ...` with two things that papermill's command line cannot do:
the kernel is reached through Unix sockets, because kernels that start at the same moment race for TCP ports, and
it gets an IPython profile of its own, so that a user's start-up files have no say in a figure.
"""

import logging
import os
import re
import sys
import tempfile

from gdn_mup import errors


def main(notebook: str, executed: str, *parameters: str) -> None:
    """Execute `notebook`, keep the result in `executed`; a cell that raises ends the process as `gdn-mup` ends."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # A Unix socket's path holds about a hundred characters: less than some temporary directories take alone.
    with tempfile.TemporaryDirectory(prefix="gdn-mup-", dir="/tmp") as scratch:
        os.environ.update(JUPYTER_RUNTIME_DIR=scratch, IPYTHONDIR=scratch)
        # jsonschema, which checks notebooks, would compile the grammar of international addresses (IRIs) when it is
        # imported: 1.6 seconds for a format that no notebook has. It does without where the package is absent.
        sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
        import papermill
        from traitlets.config import Config

        papermill.execute_notebook(
            notebook,
            executed,
            parameters=dict(parameter.split("=", 1) for parameter in parameters),
            config=Config(KernelManager={"transport": "ipc", "ip": f"{scratch}/kernel"}),
            progress_bar=False,
            log_output=True,
        )


def raised(error: Exception) -> Exception:
    """What a cell raised, of which papermill knows the name and the text."""
    name, text = getattr(error, "ename", ""), getattr(error, "evalue", "")
    if name in ("UserError", "MachineError"):
        return getattr(errors, name)(text)
    said = re.fullmatch(r"\[Errno (\d+)\] (.*): '(.*)'", text)
    return OSError(int(said[1]), said[2], said[3]) if said else error


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        errors.end(raised(error))
        raise
