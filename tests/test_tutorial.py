"""The tutorial runs, and what its text says is what it finds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from workflow_copy import ROOT

pytestmark = pytest.mark.slow

FOUND = """
import json
json.dump(
    {
        "sp": under_sp,
        "gdn_mup": under_rules,
        "same_at_base": same,
        "right": [str(finding) for finding in found_right],
        "planted": [finding._asdict() for finding in found_planted],
    },
    open(output, "w"),
)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the notebook finds, written by one more cell at its end."""
    folder: Path = tmp_path_factory.mktemp("tutorial")
    notebook = nbformat.read(ROOT / "docs/tutorial.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"output = {str(folder / 'found.json')!r}{FOUND}"))
    nbformat.write(notebook, folder / "tutorial.ipynb")
    script = [sys.executable, ROOT / "workflow/scripts/run_notebook.py", "tutorial.ipynb", "executed.ipynb"]
    run = subprocess.run(script, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "found.json").read_text("utf-8"))


def test_the_base_widths_learning_rate_costs_less_by_the_rules(found: dict[str, Any]) -> None:
    sp, rules = found["sp"], found["gdn_mup"]
    assert found["same_at_base"]
    assert rules["regret"] < sp["regret"]
    assert sp["moved"] <= -1 and abs(rules["moved"]) < abs(sp["moved"])


def test_the_right_setup_has_no_findings_and_the_planted_mistake_is_named(found: dict[str, Any]) -> None:
    assert found["right"] == []
    first = found["planted"][0]
    assert "output.weight" in first["where"] and first["look_at"] == "its learning rate"
