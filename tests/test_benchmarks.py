"""Benchmarks that need GPUs run through on a CPU, at toy sizes: what they measure is not asked, only that they do."""

import re
import subprocess
import sys

import pytest
from workflow_copy import HANGS, ROOT

pytestmark = pytest.mark.slow


def rehearse(name: str) -> str:
    """What a benchmark prints in a rehearsal; records are as they were."""
    records = {path: path.read_bytes() for path in (ROOT / "benchmarks/records").iterdir()}
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in (ROOT / "benchmarks/records").iterdir()} == records
    return done.stdout


def test_two_gpus_compares_jobs_side_by_side_and_one_job_of_two_processes() -> None:
    printed = rehearse("two_gpus.py")
    assert re.search(r"│ jobs .*\d+\.\d+ +│", printed) and re.search(r"│ together .*\d+\.\d+ +│", printed)
    losses = re.search(r"losses differ by at most (\S+), relative", printed)
    assert losses and float(losses[1]) < 1e-5  # float32, summed in another order


@pytest.mark.parametrize("width", [256, 1536])
def test_the_papers_first_steps_train_without_divergence(width: int, first_steps: dict[int, list[float]]) -> None:
    first, last = first_steps[width]
    assert abs(first - last) < 0.5 and last < 7  # log 500 = 6.2, and a warm-up that has hardly begun


@pytest.fixture(scope="module")
def first_steps() -> dict[int, list[float]]:
    """Width -> first and last loss."""
    rows = re.findall(r"│ (\d+) +│.*│ +([\d.]+) +│ +([\d.]+) +│", rehearse("paper_steps.py"))
    return {int(width): [float(first), float(last)] for width, first, last in rows}
