"""The table of faults in docs/reliability.md, which the tests hold against what really happens."""

import re
import subprocess
from typing import NamedTuple

from workflow_copy import ROOT

from gdn_mup.errors import ending

PAGE = ROOT / "docs/reliability.md"


class Fault(NamedTuple):
    """A row: what goes wrong, the line that says so (`<…>` stands for anything), and the tests that saw it."""

    name: str
    line: str
    exit_code: int
    cure: str
    tests: tuple[str, ...]


def faults() -> dict[str, Fault]:
    """Every row, by its name."""
    rows = [row.strip("| ").split(" | ") for row in PAGE.read_text("utf-8").splitlines() if row.startswith("| ")]
    table = [row for row in rows if len(row) == 5 and row[2].isdigit()]
    return {
        name: Fault(name, re.sub(r"^`+ ?| ?`+$", "", line), int(code), cure, tuple(re.findall(r"`([^`]+)`", tests)))
        for name, line, code, cure, tests in table
    }


def ends_as(done: subprocess.CompletedProcess[str], name: str) -> None:
    """Assert that a command ended as the page says of this fault, with no other error and no traceback."""
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in lines) <= 1
    _matches(lines[-1], done.returncode, name)


def is_said_as(error: BaseException, name: str) -> None:
    """Assert that a command in which this is raised ends as the page says."""
    how = ending(error)
    assert how is not None, error
    _matches(how.line, how.exit_code, name)


def is_logged_as_on_the_page(message: str) -> None:
    """Assert that the page shows this line of a job's log, in a block of its own."""
    shown = [line.strip() for line in PAGE.read_text("utf-8").splitlines() if line.startswith("    ")]
    assert any(re.fullmatch(_pattern(line), message) for line in shown), message


def _matches(line: str, exit_code: int, name: str) -> None:
    fault = faults()[name]
    assert re.fullmatch(_pattern(fault.line), line), f"\n{line}\nis not\n{fault.line}"
    assert exit_code == fault.exit_code


def _pattern(line: str) -> str:
    return ".+".join(map(re.escape, re.split(r"<[^>]+>", line)))
