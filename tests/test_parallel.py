"""A batch in parts, one after another or in several processes at once, trains the same models."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml
from workflow_copy import HANGS, LONG_ENOUGH_TO_KILL, ROOT

from gdn_mup.errors import EXIT_INTERRUPTED
from gdn_mup.study.datasets import open_job

# What a batch's parts may change: the order in which float32 is added up, and what 20 updates make of that.
# A gradient is a difference, so that its norm is less sure than the loss.
TOLERANCE = {"train_loss": 2e-4, "val_loss": 2e-4, "grad_norm": 2e-3}
STUDY = {
    **LONG_ENOUGH_TO_KILL,
    "training": {
        **LONG_ENOUGH_TO_KILL["training"],  # type: ignore[dict-item]
        **{"steps": 20, "warmup_steps": 2, "batch_size": 4, "evaluate_every": 10, "clip_norm": 0.5},
    },
}
LONGER = STUDY | {"training": STUDY["training"] | {"steps": 150}}  # type: ignore[operator]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """Two studies and the corpus of both."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, study in {"study": STUDY, "longer": LONGER}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(study))
    (folder / "c").symlink_to(tiny_corpus)
    return folder


class Job:
    """The sweep of width 32, by some number of processes."""

    def __init__(self, folder: Path, name: str, processes: int = 1, study: str = "study") -> None:
        self.output, self.checkpoint = folder / f"{name}.nc", folder / f".{name}.nc.checkpoint"
        which = ["--growth", "heads", "--optimizer", "adamw", "--width", "32", "--seed", "0"]
        files = ["--study", folder / f"{study}.yaml", "--corpus", folder / "c", "--output", self.output]
        self.options = [*which, *map(str, files), "--device", "cpu" if processes == 1 else f"{processes}xcpu"]

    def start(self, *options: str, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "gdn_mup", "sweep", *self.options, *options],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *options: str) -> xr.Dataset:
        process = self.start(*options)
        _, errors = process.communicate(timeout=HANGS)
        assert process.returncode == 0, errors
        assert not self.checkpoint.exists()
        return open_job(self.output, "lr_sweep").drop_vars("seconds")


def assert_same_but_for_rounding(found: xr.Dataset, expected: xr.Dataset) -> None:
    assert float(np.abs(expected.train_loss.diff("step")).max()) > 0.02  # something happens in these steps
    assert float(expected.grad_norm.max()) > 0.5  # and clipping acts
    for name, tolerance in TOLERANCE.items():
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, err_msg=name)
    for name in ("members", "tokens", "evaluated_tokens", "diverged"):
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.fixture(scope="module")
def alone(folder: Path) -> xr.Dataset:
    return Job(folder, "alone").run()


@pytest.mark.parametrize(
    ("processes", "options"),
    [(1, ["--micro-batches", "4"]), (2, []), (2, ["--micro-batches", "2"])],
    ids=["four parts", "two processes", "two processes, two parts each"],
)
def test_losses_are_those_of_one_process(
    folder: Path, alone: xr.Dataset, processes: int, options: Sequence[str]
) -> None:
    job = Job(folder, f"{processes}{len(options)}", processes)
    assert_same_but_for_rounding(job.run(*options), alone)


@pytest.mark.slow
def test_processes_asked_to_end_save_and_go_on_with_the_same_bits(folder: Path) -> None:
    undisturbed = Job(folder, "undisturbed", 2, "longer").run()
    job = Job(folder, "disturbed", 2, "longer")
    process = job.start("--checkpoint-seconds", "0.2")
    while process.poll() is None and not job.checkpoint.exists():
        time.sleep(0.01)
    before = job.checkpoint.stat().st_mtime_ns
    process.send_signal(signal.SIGTERM)  # to torchrun, which hands it on
    _, errors = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert job.checkpoint.stat().st_mtime_ns > before
    assert f"ended by SIGTERM; run the same command again to go on from {job.checkpoint}" in errors
    assert not job.output.exists()
    xr.testing.assert_identical(job.run().drop_attrs(), undisturbed.drop_attrs())


@pytest.mark.parametrize(
    ("launcher", "options", "says"),
    [
        (
            [],
            ["--micro-batches", "3"],
            "training.batch_size: 4: cannot be divided among 1 processes with --micro-batches 3; their product must be "
            "one of its divisors",
        ),
        (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
            ["--device", "3xcpu"],
            "torchrun: 2 processes: this job and its --device ask for 3",
        ),
    ],
    ids=["parts", "processes"],
)
def test_what_cannot_be_divided_is_refused(folder: Path, launcher: list[str], options: list[str], says: str) -> None:
    job = Job(folder, "refused")
    process = job.start(*options, launcher=launcher)
    _, errors = process.communicate(timeout=HANGS)
    assert process.returncode != 0 and f"error: {says}\n" in errors
    assert not job.output.exists()


def test_a_second_signal_within_a_second_is_the_same_request(folder: Path) -> None:
    job = Job(folder, "twice", study="longer")
    process = job.start("--checkpoint-seconds", "0.2")
    while process.poll() is None and not job.checkpoint.exists():
        time.sleep(0.01)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == EXIT_INTERRUPTED, errors
