"""The command line, run in the test's own process: what it says, without the seconds that a process takes to import."""

import io
import logging
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from workflow_copy import ROOT

from gdn_mup.cli import main


def gdn_mup(*arguments: object, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as `python -m gdn_mup` does, in that folder; what a process would show, and its exit code.

    A mistake in the program, which would end a process with a traceback, is raised.
    """
    command, said, errors, code = ["gdn-mup", *map(str, arguments)], io.StringIO(), io.StringIO(), 0
    logger = logging.getLogger()
    with pytest.MonkeyPatch.context() as patch, chdir(folder), redirect_stdout(said), redirect_stderr(errors):
        patch.setattr("sys.argv", command)
        patch.setattr("sys.path", sys.path[:])  # to which `gdn-mup check` adds
        patch.setattr(logger, "handlers", [])  # so that the command's own is installed
        patch.setattr(logger, "level", logger.level)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        finally:
            torch.set_flush_denormal(False)  # which a job switches on for its process
    return subprocess.CompletedProcess(command, code, said.getvalue(), errors.getvalue())
