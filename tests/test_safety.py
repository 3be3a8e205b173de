"""What Snakemake does around a job does not undo what the commands promise: workflow/rules/safety.smk."""

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
import yaml
from reliability import ends_as
from test_faults import STUDY, fill, mounted  # noqa: F401 - a fixture
from workflow_copy import HANGS, WorkflowCopy

PUBLISHED = ("--cores", "1", "--config", "study=h200", "runs=reference", "device=cpu", "--")
FIGURE = "results/h200/figures/norm_epsilon.svg"
PRODUCTS = [f"results/h200/figures/norm_epsilon.{suffix}" for suffix in ("svg", "png", "csv")]
NOTEBOOK = "notebooks/norm_epsilon.ipynb"

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> WorkflowCopy:
    """A copy, in a folder whose name holds an apostrophe and brackets, with one figure of the published runs."""
    copy = WorkflowCopy(tmp_path_factory.mktemp("published") / "it's my [copy]")
    run = copy.snakemake(*PUBLISHED, FIGURE)
    assert run.returncode == 0, run.stdout
    return copy


@pytest.fixture
def drawn(published: WorkflowCopy) -> Iterator[WorkflowCopy]:
    """The copy, with its notebook as it was before the test; the figure is up to date, and is so after the test."""
    notebook = published.folder / NOTEBOOK
    before = notebook.read_bytes()
    yield published
    if notebook.read_bytes() != before:
        notebook.write_bytes(before)
    assert published.snakemake(*PUBLISHED, FIGURE).returncode == 0


def hashes(copy: WorkflowCopy) -> list[str]:
    return [hashlib.sha256((copy.folder / product).read_bytes()).hexdigest() for product in PRODUCTS]


def last_error(run: "subprocess.CompletedProcess[str]") -> "subprocess.CompletedProcess[str]":
    """The command's own ending, of which Snakemake prints the log and the exit status."""
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("error: ")]
    status = re.search(r"exit status (\d+)", run.stdout)
    return subprocess.CompletedProcess([], int(status[1]) if status else run.returncode, "", line)


def wants(copy: WorkflowCopy) -> bool:
    """Whether the next run would draw the figure again."""
    return "figure_norm_epsilon" in copy.planned(*PUBLISHED, FIGURE)


def kill_kernel_of(snakemake: "subprocess.Popen[str]") -> None:
    """SIGKILL to the first kernel that Snakemake's job starts, when it has begun."""

    for _ in range(600):
        waiting = [snakemake.pid]
        while waiting:
            pid = waiting.pop()
            try:
                if b"ipykernel_launcher" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    time.sleep(1)
                    os.kill(pid, 9)
                    return
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    waiting += list(map(int, (thread / "children").read_text().split()))
            except OSError:
                continue
        time.sleep(0.1)
    raise AssertionError("no kernel was started")


@pytest.mark.parametrize("fault", ["a notebook that is wrong", "a notebook that is killed"])
def test_a_notebook_that_fails_leaves_the_old_figure(drawn: WorkflowCopy, fault: str) -> None:
    before, notebook = hashes(drawn), drawn.folder / NOTEBOOK
    content = nbformat.read(notebook, as_version=4)
    wrong = fault == "a notebook that is wrong"
    content.cells.append(nbformat.v4.new_code_cell("x = 1\n1/0" if wrong else "import time\ntime.sleep(100)"))
    nbformat.write(content, notebook)
    with drawn.start(*PUBLISHED, FIGURE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        if not wrong:
            kill_kernel_of(run)
        output, _ = run.communicate(timeout=HANGS)
    assert run.returncode == 1 and "Traceback" not in output
    ends_as(last_error(subprocess.CompletedProcess([], 1, output)), fault)
    assert hashes(drawn) == before
    assert wants(drawn)
    nbformat.write(nbformat.from_dict({**content, "cells": content.cells[:-1]}), notebook)
    assert wants(drawn)
    run = drawn.snakemake(*PUBLISHED, FIGURE)
    assert run.returncode == 0 and hashes(drawn) == before and not wants(drawn), run.stdout


def test_inputs_dated_in_the_future(drawn: WorkflowCopy) -> None:
    before, dataset = hashes(drawn), drawn.folder / "results/h200/datasets/multiplier.nc"
    os.utime(dataset, (2e9, 2e9))
    run = drawn.snakemake(*PUBLISHED, FIGURE)
    ends_as(last_error(run), "inputs dated in the future, through Snakemake")
    assert "Select jobs" not in run.stdout and hashes(drawn) == before
    (command,) = re.findall("`(touch [^`]+)`", run.stdout)
    subprocess.run(["bash", "-c", command], cwd=drawn.folder, check=True)
    assert drawn.snakemake(*PUBLISHED, FIGURE).returncode == 0
    soon = time.time() + 6  # clocks that hardly differ
    os.utime(dataset, (soon, soon))
    assert drawn.snakemake(*PUBLISHED, FIGURE).returncode == 0 and not wants(drawn)


def test_what_cannot_be_made_leaves_what_was_there(tmp_path: Path) -> None:
    """A rule without inputs, too: of the corpus nothing but its settings has changed."""
    copy = WorkflowCopy(tmp_path / "copy")
    study, target = copy.folder / "config/studies/tiny.yaml", "results/tiny/corpus/train.tokens"
    study.write_text(yaml.safe_dump(STUDY))
    arguments = ("--cores", "1", "--config", "study=tiny", "device=cpu", "--", target)
    assert copy.snakemake(*arguments).returncode == 0
    before = (copy.folder / target).read_bytes()
    study.write_text(yaml.safe_dump(STUDY | {"corpus": STUDY["corpus"] | {"vocabulary_size": 60_000}}))
    run = copy.snakemake(*arguments)
    assert run.returncode == 1 and "is more than the text supports" in run.stdout
    assert (copy.folder / target).read_bytes() == before
    assert copy.planned(*arguments)["corpus"] == 1
    study.write_text(yaml.safe_dump(STUDY | {"corpus": STUDY["corpus"] | {"vocabulary_size": 310}}))
    assert copy.snakemake(*arguments).returncode == 0
    assert (copy.folder / target).read_bytes() != before
    assert not copy.planned(*arguments)


def test_a_full_disk_leaves_a_reason(tmp_path: Path, mounted: Callable[..., Path]) -> None:  # noqa: F811
    copy = WorkflowCopy(tmp_path / "copy")
    (copy.folder / "config/studies/tiny.yaml").write_text(yaml.safe_dump(STUDY))
    disk = mounted("size=3m", copy.folder / "results")
    arguments = ("--cores", "1", "--config", "study=tiny", "device=cpu", "--")
    assert copy.snakemake(*arguments, "results/tiny/corpus/train.tokens").returncode == 0
    fill(disk)
    targets = ("tables/scaling_rules.csv", "datasets/lr_sweep.nc")
    for target in targets:
        run = copy.snakemake(*arguments, f"results/tiny/{target}")
        done = last_error(run)
        ends_as(
            subprocess.CompletedProcess([], run.returncode, "", done.stderr),
            "a full disk under the log, through Snakemake",
        )


# ---- what is refused before anything runs ----


def test_a_name_that_snakemake_reads_as_another(published: WorkflowCopy) -> None:
    studies = published.folder / "config/studies"
    (studies / "2026_11.yaml").write_text((studies / "smoke.yaml").read_text())

    def refused(*arguments: str) -> None:
        ends_as(last_error(published.snakemake("-n", *arguments)), "a study's name that Snakemake reads as another")

    refused("--config", "study=2026_11")
    refused("results/2026_11/report.html")
    (studies / "202611.yaml").write_text((studies / "smoke.yaml").read_text())
    refused("--config", "study=2026_11")
    refused("--config", "study=202611")
    (studies / "2026_11.yaml").unlink()
    assert published.planned("--config", "study=202611")["corpus"] == 1
    (studies / "202611.yaml").unlink()
    for name in ("my.study", "a b", "1e3", "007"):
        (studies / f"{name}.yaml").write_text((studies / "smoke.yaml").read_text())
        run = published.snakemake("-n", "--config", f"study={name}")
        line = last_error(run).stderr
        assert run.returncode == 2 and f"config/studies/{name}.yaml: " in line and "rename the file" in line
        (studies / f"{name}.yaml").unlink()


def test_sdm_conda(published: WorkflowCopy) -> None:
    ends_as(last_error(published.snakemake("-n", "--sdm", "conda")), "--sdm conda")


def test_a_home_that_is_none(published: WorkflowCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null/home")
    assert published.planned(*PUBLISHED, FIGURE) == {}  # with XDG_CACHE_HOME
    command = [sys.executable, "-m", "snakemake", "--nocolor", "-n", *PUBLISHED, FIGURE]
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    options = {"cwd": published.folder, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = subprocess.run(command, text=True, timeout=HANGS, **options)
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("NotADirectoryError")]
    done = subprocess.CompletedProcess([], run.returncode, "", line)
    ends_as(done, "a home folder that is none, through Snakemake")


def test_a_driver_that_hangs_is_named_before_anything_runs(published: WorkflowCopy, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nsleep 100\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    slots = published.folder / "src/gdn_mup/training/gpu_slots.py"
    assert "SECONDS_TO_ANSWER = 30" in slots.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        start = time.monotonic()
        run = published.snakemake("-n", "--config", "study=smoke", "device=auto")
    assert run.returncode == 3 and time.monotonic() - start < 60
    assert last_error(run).stderr.startswith("error: nvidia-smi: no answer in 30 seconds")
