"""The workflow on a real SLURM cluster, as `--profile workflow/profiles/slurm` runs it."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import xarray as xr
import yaml
from slurm_cluster import Cluster, slurm_cluster
from workflow_copy import HANGS, LONG_ENOUGH_TO_KILL, WorkflowCopy

from gdn_mup.study.datasets import open_dataset

pytestmark = [pytest.mark.slurm, pytest.mark.workflow, pytest.mark.slow]

DATASET, TABLE = "results/killable/datasets/lr_sweep.nc", "results/killable/tables/optima.csv"
# Nothing is far away here, and jobs are seconds long; there is no accounting.
QUICKLY = ["--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1"]
PROFILE = ["--profile", "workflow/profiles/slurm", "--slurm-status-command", "squeue", *QUICKLY]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def copy_with_study(folder: Path) -> WorkflowCopy:
    copy = WorkflowCopy(folder)
    (copy.folder / "config/studies/killable.yaml").write_text(yaml.safe_dump(LONG_ENOUGH_TO_KILL))
    return copy


def dataset(copy: WorkflowCopy) -> xr.Dataset:
    return open_dataset(copy.folder / DATASET, "lr_sweep").drop_vars("seconds").drop_attrs()


def test_a_cancelled_job_runs_again_and_the_dataset_is_that_of_a_local_run(cluster: Cluster, tmp_path: Path) -> None:
    copy = copy_with_study(tmp_path / "cluster")
    arguments = ["--config", "study=killable", "device=cpu", "--", DATASET, TABLE]
    with (tmp_path / "output").open("w+") as output:
        run = copy.start(*PROFILE, *arguments, stdout=output, stderr=subprocess.STDOUT)
        try:
            cancelled = cancel_one_that_trains(cluster, copy, run)
            run.wait(timeout=HANGS)
        finally:
            run.kill()
        output.seek(0)
        said = output.read()
    assert run.returncode == 0, said
    states = {job["id"]: job["state"] for job in cluster.jobs()}
    assert states.pop(cancelled) in ("CANCELLED", "FAILED")
    assert set(states.values()) == {"COMPLETED"}, states
    assert {job["partition"] for job in cluster.jobs()} == {"cpu"}

    local = copy_with_study(tmp_path / "local")
    done = local.snakemake("--cores", "2", *arguments)
    assert done.returncode == 0, done.stdout
    xr.testing.assert_identical(dataset(copy), dataset(local))
    assert (copy.folder / TABLE).read_bytes() == (local.folder / TABLE).read_bytes()


def cancel_one_that_trains(cluster: Cluster, copy: WorkflowCopy, run: subprocess.Popen[str]) -> str:
    """Cancel a sweep that has begun to train, and see it leave a checkpoint; its id."""
    while run.poll() is None:
        for job in cluster.jobs("RUNNING"):
            if "rule_lr_sweep" not in job["comment"]:
                continue
            growth, optimizer, width, seed = job["comment"].split("_")[-4:]  # the wildcards
            name = f"lr_sweep/{growth}_{optimizer}_width{width}_seed{seed}"
            log = copy.folder / f"results/killable/logs/{name}.log"
            if not log.exists() or "lr_sweep: " not in log.read_text():  # its first line of progress
                continue
            cluster.cancel(job["id"])
            checkpoint = copy.folder / f"results/killable/jobs/{name.replace('/', '/.')}.nc.checkpoint"
            deadline = time.monotonic() + HANGS
            while not checkpoint.exists():
                assert time.monotonic() < deadline, "no checkpoint: cancelled before or after it trained"
                time.sleep(0.01)
            return job["id"]
        time.sleep(0.05)
    raise AssertionError("the workflow ended before a job could be cancelled")


def test_jobs_on_a_gpu_go_to_the_partition_with_gpus(cluster: Cluster, tmp_path: Path) -> None:
    copy = copy_with_study(tmp_path / "cluster")
    before = {job["id"] for job in cluster.jobs()}
    target = "results/killable/jobs/lr_sweep/heads_adamw_width32_seed0.nc"
    run = copy.snakemake(*PROFILE, "--retries", "0", "--config", "study=killable", "device=cuda", "--", target)
    partitions = {
        rule: {job["partition"] for job in cluster.jobs() if job["id"] not in before and rule in job["comment"]}
        for rule in ("rule_corpus", "rule_lr_sweep")
    }
    assert partitions == {"rule_corpus": {"cpu"}, "rule_lr_sweep": {"gpu"}}, run.stdout
    if not os.path.exists("/dev/nvidiactl"):
        assert run.returncode != 0
        assert "error: --device: cuda: torch finds no NVIDIA GPU here" in run.stdout
