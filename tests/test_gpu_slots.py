"""Jobs of one machine never share a GPU and never lose one, whatever kills them. The GPUs are a stub driver's."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from reliability import is_said_as
from workflow_copy import HANGS, ROOT, TINY, TINY_EXPERIMENT, WorkflowCopy

from gdn_mup.errors import MachineError, UserError
from gdn_mup.training import gpu_slots
from gdn_mup.training.gpu_slots import FOLDER_VARIABLE, free_gpus, take_gpus, usable_gpus

PROCESSES, GPUS, JOBS = 8, 4, 60
UUIDS = [f"GPU-{index}1234567-89ab-cdef-0123-456789abcdef" for index in range(GPUS)]
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")

# Takes a GPU, says so in a journal, holds it for a moment, says so again, and ends.
WORKER = """
import os, random, sys, time
from gdn_mup.training.gpu_slots import take_gpus

journal = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
slots = take_gpus()
os.write(journal, f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']}\\n".encode())
time.sleep(random.uniform(0.05, 0.3))
os.write(journal, f"{os.getpid()} leaves\\n".encode())
"""

Driver = Callable[..., None]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Install a driver that lists GPUs: (compute capability, UUIDs of MIG parts) each, UUIDs from `UUIDS`."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that what a test leaves there goes when it ends
        monkeypatch.delenv(name)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "slots"))

    def install(*gpus: tuple[str, tuple[str, ...]]) -> None:
        listed, queried = [], []
        for index, (capability, parts) in enumerate(gpus):
            listed += [f"GPU {index}: NVIDIA H100 80GB HBM3 (UUID: {UUIDS[index]})"]
            listed += [f"  MIG 1g.10gb     Device  {i}: (UUID: {part})" for i, part in enumerate(parts)]
            queried += [f"{index}, {UUIDS[index]}, {capability}"]
        script = ["#!/bin/sh", 'case "$1" in', "--list-gpus) cat <<'END'", *listed, "END", ";;"]
        script += ["--query-gpu=*) cat <<'END'", *queried, "END", ";;", "esac", ""]
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "nvidia-smi").write_text("\n".join(script))
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    yield install


@pytest.fixture
def four_gpus(driver: Driver) -> None:
    driver(*[("9.0", ())] * GPUS)


def devices() -> list[str]:
    return [gpu.device for gpu in usable_gpus()]


@pytest.mark.usefixtures("four_gpus")
def test_eight_processes_share_four_gpus_whoever_is_killed(tmp_path: Path) -> None:
    journal, moments = tmp_path / "journal", random.Random(0)
    journal.touch()

    def note(line: str) -> None:
        with journal.open("a") as file:
            file.write(line)

    running: list[subprocess.Popen[bytes]] = []
    started = killed = 0
    deadline = time.monotonic() + HANGS
    try:
        while started < JOBS or running:
            assert time.monotonic() < deadline, "a slot was lost"
            while started < JOBS and len(running) < PROCESSES:
                running.append(subprocess.Popen([sys.executable, "-c", WORKER, journal]))
                started += 1
            time.sleep(moments.uniform(0, 0.1))
            victim = moments.choice(running)
            if killed < JOBS // 2 and victim.poll() is None:
                note(f"{victim.pid} leaves\n")  # before it is killed: from then on its GPU may be another's
                victim.kill()
                killed += 1
            running = [process for process in running if process.poll() is None]
    finally:
        for process in running:
            process.kill()

    holding: dict[str, str] = {}
    gone, at_once = set(), 0
    for pid, device in map(str.split, journal.read_text().splitlines()):
        if device == "leaves":
            gone.add(pid)
            holding.pop(pid, None)
        elif pid not in gone:  # one that was just being killed may have said so after it had left
            assert device not in holding.values(), f"two processes on {device}"
            holding[pid] = device
            at_once = max(at_once, len(holding))
    assert not holding and killed
    assert at_once > 1
    free_gpus(take_gpus(GPUS))  # every slot is free again


@pytest.mark.usefixtures("four_gpus")
def test_a_job_waits_for_a_gpu_and_says_so(tmp_path: Path, corpus_folder: Path) -> None:
    study = STUDY | {"corpus": json.loads((corpus_folder / "train.json").read_text())["settings"]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    job = ["--growth", "heads", "--optimizer", "adamw", "--width", "16", "--seed", "0", "--device", "cuda"]
    files = ["--study", tmp_path / "study.yaml", "--corpus", corpus_folder, "--output", tmp_path / "job.nc"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "2"}  # the stub's, so that no real GPU is seen
    os.environ["CUDA_VISIBLE_DEVICES"] = "1,2"
    taken = take_gpus(2)
    command = [sys.executable, "-m", "gdn_mup", "sweep", *job, *files]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr and process.stderr.readline() == "Waiting: every GPU is taken\n"
    free_gpus(taken[:1])
    time.sleep(1)
    assert process.poll() is None
    free_gpus(taken[1:])
    assert process.stderr.readline() == "Took GPU 2\n"
    process.communicate(timeout=HANGS)


@pytest.mark.usefixtures("four_gpus")
def test_several_gpus_are_taken_together_or_not_at_all() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1,3"
    taken = take_gpus(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    with pytest.raises(UserError, match="3 GPUs are asked for, and this process may use 2; ask for 2"):
        take_gpus(3)
    free_gpus(taken)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("2,0", ["2", "0"]),
        (" 1 , 1,3", ["1", "3"]),
        (f"{UUIDS[3]},GPU-1", [UUIDS[3], "GPU-1"]),
        ("MIG-GPU-1234/7/0", []),
        ("2,GPU-none,1", ["2"]),
        ("1,-1,2", ["1"]),
        ("0,9,1", ["0"]),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_is_honoured(monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices() == expected
    slots = take_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == (expected[0] if expected else visible)
    free_gpus(slots)


@pytest.mark.usefixtures("four_gpus")
def test_a_gpu_has_one_slot_by_all_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = set()
    for visible in ("1", UUIDS[1], UUIDS[1][:12]):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        slots |= {gpu.slot for gpu in usable_gpus()}
    assert slots == {UUIDS[1]}


def test_gpus_that_are_too_old_are_left_out_and_parts_are_gpus(driver: Driver) -> None:
    driver(("7.5", ()), ("9.0", ("MIG-a", "MIG-b")), ("[N/A]", ()))
    assert devices() == ["MIG-a", "MIG-b", UUIDS[2]]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0", ["MIG-a"]),  # as CUDA: of a GPU that is divided, its first part
        (f"{UUIDS[0]},1", ["MIG-a", "1"]),
        ("MIG-b,MIG-a", ["MIG-b", "MIG-a"]),
        ("MIG-a,0", ["MIG-a"]),
        ("MIG-c", []),
    ],
)
def test_parts_by_name(driver: Driver, monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]) -> None:
    driver(("9.0", ("MIG-a", "MIG-b")), ("9.0", ()))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices() == expected


def test_parts_train_no_job_together(driver: Driver) -> None:
    driver(("9.0", ("MIG-a", "MIG-b")), ("9.0", ()))
    with pytest.raises(UserError) as caught:
        take_gpus(2)
    is_said_as(caught.value, "parts of GPUs for one job")
    slots = take_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-a"
    free_gpus(slots)


def test_an_index_is_no_gpu_without_a_driver(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert devices() == [] and take_gpus() == []
    (tmp_path / "gpus").mkdir()
    (tmp_path / "gpus/0000:01:00.0").touch()  # a container without nvidia-smi, but with the driver
    monkeypatch.setattr(gpu_slots, "DRIVER_FILES", (f"{tmp_path}/gpus/*",))
    assert devices() == ["0"]


@pytest.mark.parametrize("hangs", ["sleep 60", "sleep 60 & wait", "trap '' TERM; sleep 60"])
def test_a_driver_that_hangs_is_named(
    tmp_path: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch, hangs: str
) -> None:
    driver()
    (tmp_path / "bin/nvidia-smi").write_text(f"#!/bin/sh\n{hangs}\n")
    monkeypatch.setattr(gpu_slots, "SECONDS_TO_ANSWER", 1)
    start = time.monotonic()
    with pytest.raises(MachineError) as caught:
        usable_gpus()
    assert time.monotonic() - start < 10
    is_said_as(caught.value, "a GPU's driver that hangs")


def test_a_machine_without_gpus_has_no_slots(driver: Driver, tmp_path: Path) -> None:
    driver()
    assert devices() == [] and take_gpus() == []
    assert not (tmp_path / "slots").exists() and "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("assigned", "count", "takes"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, 1, None),
        ({"SLURM_JOB_GPUS": "3"}, 1, None),
        ({"SLURM_JOB_GPUS": "2,3", "CUDA_VISIBLE_DEVICES": "0,1"}, 2, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1, None),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, 1, "2"),  # a whole allocation's, for a workflow that runs inside it
    ],
)
def test_a_batch_system_that_assigns_gpus_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, assigned: dict[str, str], count: int, takes: str | None
) -> None:
    for name, value in {"SLURM_JOB_ID": "17", **assigned}.items():
        monkeypatch.setenv(name, value)
    slots = take_gpus(count)
    assert bool(slots) == bool(takes)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == (takes or assigned.get("CUDA_VISIBLE_DEVICES"))
    free_gpus(slots)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("fault", ["writable", "link", "file", "nowhere"])
def test_a_folder_that_others_could_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    folder = tmp_path / "slots"
    match fault:
        case "writable":
            folder.mkdir()
            folder.chmod(0o777)
        case "link":
            (tmp_path / "elsewhere").mkdir()
            folder.symlink_to(tmp_path / "elsewhere")
        case "file":
            folder.touch()
        case "nowhere":
            monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "absent/slots"))
    with pytest.raises(UserError, match=f"slots: .*{FOLDER_VARIABLE}"):
        take_gpus()


STUDY = {
    **TINY,
    "sweeps": [
        TINY_EXPERIMENT
        | {
            "optimizer": "adamw",
            "rules": ["sp"],
            "widths": [16],
            "learning_rates": {"log2_first": -8, "log2_last": -7},
        }
    ],
}


@pytest.mark.workflow
@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("arguments", "provided"),
    [
        (["device=auto"], "4"),
        (["device=auto", "--resources", "gpu=2"], "2"),
        (["device=cpu"], None),
    ],
)
def test_as_many_jobs_run_at_once_as_there_are_gpus(
    workflow: WorkflowCopy, arguments: list[str], provided: str | None
) -> None:
    (workflow.folder / "config/studies/slots.yaml").write_text(yaml.safe_dump(STUDY))
    target = "results/slots/tables/scaling_rules.csv"
    run = workflow.snakemake("--cores", "1", "--config", "study=slots", *arguments, "--forceall", "--", target)
    assert run.returncode == 0, run.stdout
    (line,) = re.findall(r"^Provided resources:.*", run.stdout, flags=re.MULTILINE) or [""]
    assert re.findall(r"\d+", line) == ([provided] if provided else [])
