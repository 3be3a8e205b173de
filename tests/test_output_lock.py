"""Two commands that make one output do not share what it is made from."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xarray as xr
import yaml
from reliability import is_logged_as_on_the_page
from workflow_copy import HANGS, LONG_ENOUGH_TO_KILL, ROOT

from gdn_mup.output_lock import alone_at
from gdn_mup.study.datasets import open_job

JOB = ("--growth", "heads", "--optimizer", "adamw", "--width", "16", "--seed", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study, its corpus, and the job's file as one process makes it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "study.yaml").write_text(yaml.safe_dump(LONG_ENOUGH_TO_KILL))
    command = [sys.executable, "-m", "gdn_mup", "corpus", "--study", "study.yaml", "--output", "corpus"]
    subprocess.run(command, cwd=folder, check=True, timeout=HANGS)
    assert sweep(folder, folder / "undisturbed.nc").wait(timeout=HANGS) == 0
    return folder


def sweep(made: Path, output: Path, *options: str) -> "subprocess.Popen[str]":
    files = ("--study", "study.yaml", "--corpus", "corpus", "--output", str(output), "--checkpoint-seconds", "0.2")
    command = [sys.executable, "-m", "gdn_mup", "sweep", *files, *JOB, *options]
    return subprocess.Popen(command, cwd=made, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(path)


def same(made: Path, job: Path) -> None:
    expected, found = (
        open_job(path, "lr_sweep").drop_vars("seconds").drop_attrs() for path in (made / "undisturbed.nc", job)
    )
    xr.testing.assert_identical(found, expected)
    assert [path.name for path in job.parent.iterdir()] == [job.name]


@pytest.mark.slow
def test_a_second_command_waits_and_takes_the_job_as_it_is(made: Path, tmp_path: Path) -> None:
    job = tmp_path / "out" / "job.nc"
    first = sweep(made, job)
    wait_for(job.with_name(".job.nc.checkpoint"))
    second = sweep(made, job)
    assert second.stderr
    waits, takes = second.stderr.readline().strip(), ""
    assert f"process {first.pid} makes" in waits
    is_logged_as_on_the_page(waits)
    assert first.wait(timeout=HANGS) == 0 and second.wait(timeout=HANGS) == 0
    takes = second.stderr.read().strip()
    is_logged_as_on_the_page(takes)
    same(made, job)


@pytest.mark.slow
def test_a_second_command_goes_on_where_the_first_was_killed(made: Path, tmp_path: Path) -> None:
    job = tmp_path / "out" / "job.nc"
    first = sweep(made, job)
    wait_for(job.with_name(".job.nc.checkpoint"))
    second = sweep(made, job)
    assert second.stderr and "Waiting" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    assert second.wait(timeout=HANGS) == 0
    said = second.stderr.read()
    assert "just made" not in said and "refused" not in said
    same(made, job)


def test_a_command_that_waits_can_be_ended(made: Path, tmp_path: Path) -> None:
    with alone_at(tmp_path / "job.nc"):
        waiting = sweep(made, tmp_path / "job.nc")
        assert waiting.stderr and "Waiting" in waiting.stderr.readline()
        waiting.terminate()
        assert waiting.wait(timeout=10) == 75
    assert list(tmp_path.iterdir()) == []


def test_many_take_turns(tmp_path: Path) -> None:
    """And each finds the lock of the one before gone or free, whenever it looks."""
    code = """
import sys
from pathlib import Path
from gdn_mup.output_lock import alone_at
output, scratch = Path(sys.argv[1]), Path(sys.argv[1] + ".scratch")
for _ in range(40):
    with alone_at(output):
        scratch.touch(exist_ok=False)
        scratch.unlink()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "output")]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [(process.wait(timeout=HANGS), process.stderr and process.stderr.read()) for process in processes] == [
        (0, "")
    ] * 4
    assert list(tmp_path.iterdir()) == []
