"""Jobs and workflows that are really killed go on, and end with the same datasets as undisturbed ones."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import xarray as xr
import yaml
from reliability import ends_as
from workflow_copy import HANGS, LONG_ENOUGH_TO_KILL, ROOT, WorkflowCopy

from gdn_mup.errors import EXIT_INTERRUPTED
from gdn_mup.study.datasets import open_dataset, open_job

KILLS = 10
WORKFLOW_KILLS = 3
SECONDS_TO_END = 10.0

EXPERIMENT = LONG_ENOUGH_TO_KILL["sweeps"][0]
STUDY = LONG_ENOUGH_TO_KILL | {
    "tunings": [EXPERIMENT | {"trials": 2, "rules": ["gdn_mup"]}],
    "clipping_checks": [EXPERIMENT | {"clippings": ["none", "global_norm"], "rules": ["gdn_mup"]}],
}
KINDS = {"sweep": "lr_sweep", "tune": "tuning", "clipping": "clipping"}


class Job:
    """The job of width 32 of a command, as a process that can be started again and again."""

    def __init__(self, folder: Path, corpus: Path, command: str = "sweep") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.command = command
        self.study, self.corpus, self.output = folder / "study.yaml", corpus, folder / "job.nc"
        self.study.write_text(yaml.safe_dump(STUDY))

    def start(self, checkpoint_seconds: float = 0.0, reuse: Sequence[Path] = ()) -> subprocess.Popen[str]:
        options = ["--growth", "heads", "--optimizer", "adamw", "--width", "32", "--seed", "0", "--threads", "1"]
        files = ["--study", self.study, "--corpus", self.corpus, "--output", self.output]
        command = [sys.executable, "-m", "gdn_mup", self.command, *options, *files, "--device", "cpu"]
        command += ["--checkpoint-seconds", checkpoint_seconds, *(f"--reuse={path}" for path in reuse)]
        return subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def start_training(self, **options: float) -> subprocess.Popen[str]:
        """Start, and wait until it has written a checkpoint."""
        before = self.written()
        process = self.start(**options)
        while process.poll() is None and self.written() == before:
            time.sleep(0.01)
        return process

    def written(self) -> int:
        """When the last checkpoint was written; a clipping check has several."""
        return max((path.stat().st_mtime_ns for path in self.output.parent.glob(".job.nc*.checkpoint")), default=0)

    def finish(self) -> xr.Dataset:
        process = self.start(checkpoint_seconds=120.0)
        _, errors = process.communicate(timeout=HANGS)
        assert process.returncode == 0, errors
        assert sorted(path.name for path in self.output.parent.iterdir()) == ["job.nc", "study.yaml"]
        return open_job(self.output, KINDS[self.command]).drop_vars("seconds").drop_attrs()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> xr.Dataset:
    return Job(tmp_path_factory.mktemp("undisturbed"), tiny_corpus).finish()


@pytest.mark.slow
def test_a_job_killed_at_ten_moments_gives_the_same_bits(
    tmp_path: Path, tiny_corpus: Path, undisturbed: xr.Dataset
) -> None:
    job, moments = Job(tmp_path / "job", tiny_corpus), random.Random(0)
    starting = job.start()
    time.sleep(moments.uniform(0, 2))  # while it starts
    starting.kill()
    starting.communicate()
    for kill in range(KILLS - 1):
        # Every other one while a thread writes beside the training.
        process = job.start_training(checkpoint_seconds=0.01 * (kill % 2))
        time.sleep(moments.uniform(0, 0.2))
        assert process.poll() is None, "trained to the end before it could be killed: the study is too short"
        process.kill()
        process.communicate()
    xr.testing.assert_identical(job.finish(), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["tune", "clipping"])
def test_other_jobs_that_are_killed_give_the_same_bits(tmp_path: Path, tiny_corpus: Path, command: str) -> None:
    moments = random.Random(2)
    job = Job(tmp_path / "job", tiny_corpus, command)
    for _ in range(3):
        process = job.start_training()
        time.sleep(moments.uniform(0, 1.0))
        assert process.poll() is None, "trained to the end before it could be killed: the study is too short"
        process.kill()
        process.communicate()
    xr.testing.assert_identical(job.finish(), Job(tmp_path / "undisturbed", tiny_corpus, command).finish())


@pytest.mark.slow
def test_a_job_that_reuses_runs_does_not_go_on_from_a_checkpoint_of_the_whole_job(
    tmp_path: Path, tiny_corpus: Path
) -> None:
    job, other = Job(tmp_path / "job", tiny_corpus), Job(tmp_path / "other", tiny_corpus)
    other.finish()
    process = job.start_training()
    process.kill()
    process.communicate()
    process = job.start(reuse=[other.output])
    _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 0 and "checkpoint refused: of other settings" in errors, errors


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_job_asked_to_end_saves_and_says_how_to_go_on(
    tmp_path: Path, tiny_corpus: Path, undisturbed: xr.Dataset, name: str
) -> None:
    job = Job(tmp_path / "job", tiny_corpus)
    process = job.start_training(checkpoint_seconds=1.0)
    before = job.written()
    asked = time.monotonic()
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=HANGS)
    assert time.monotonic() - asked < SECONDS_TO_END
    ends_as(subprocess.CompletedProcess([], process.returncode, "", errors), "SIGTERM or SIGINT while a job trains")
    assert process.returncode == EXIT_INTERRUPTED
    assert job.written() > before and not job.output.exists()
    assert errors.splitlines()[-1].startswith(f"ended by {name}; ") and ".job.nc.checkpoint" in errors
    xr.testing.assert_identical(job.finish(), undisturbed)


@pytest.mark.slow
@pytest.mark.workflow
def test_a_workflow_killed_at_three_moments_ends_with_the_same_dataset(tmp_path: Path) -> None:
    target = "results/restart/datasets/lr_sweep.nc"
    arguments = ["--config", "study=restart", "device=cpu", "--cores", "2", "--", target]
    datasets = []
    for name in ("undisturbed", "killed"):
        copy = WorkflowCopy(tmp_path / name)
        (copy.folder / "config/studies/restart.yaml").write_text(yaml.safe_dump(LONG_ENOUGH_TO_KILL))
        moments = random.Random(1)
        for _ in range(WORKFLOW_KILLS if name == "killed" else 0):
            # A session of its own, so that its jobs are killed with it, as they are when a machine goes down.
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            run = copy.start(*arguments, **quiet, start_new_session=True)
            time.sleep(moments.uniform(2, 12))
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            unlocked = copy.snakemake("--unlock", *arguments)
            assert unlocked.returncode == 0, unlocked.stdout
        finished = copy.snakemake(*arguments)
        assert finished.returncode == 0, finished.stdout
        datasets.append(open_dataset(copy.folder / target, "lr_sweep").drop_vars("seconds").drop_attrs())
    xr.testing.assert_identical(*datasets)
