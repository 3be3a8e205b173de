"""What several test files share."""

from pathlib import Path

import pytest
from workflow_copy import WorkflowCopy


@pytest.fixture(scope="session")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> WorkflowCopy:
    """A copy of the workflow in which nothing has run: for dry runs."""
    return WorkflowCopy(tmp_path_factory.mktemp("workflow") / "copy")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> WorkflowCopy:
    """A copy of the workflow in which the study `smoke` has run from text to report."""
    copy = WorkflowCopy(tmp_path_factory.mktemp("smoke") / "copy")
    run = copy.snakemake("--config", "study=smoke", "--cores", "2")
    logs = "\n".join(path.read_text() for path in Path(copy.folder).glob("results/smoke/logs/**/*.log"))
    assert run.returncode == 0, run.stdout + logs
    return copy
