"""What docs/reliability.md promises, fault by fault: the line, the exit code, and that earlier results stay whole."""

import ast
import errno
import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml
from command_line import gdn_mup
from reliability import PAGE, ends_as, faults, is_said_as
from workflow_copy import HANGS, ROOT, TINY, TINY_EXPERIMENT, WorkflowCopy

from gdn_mup.errors import EXIT_INTERRUPTED, EXIT_MACHINE, TRACEBACK, ending
from gdn_mup.model.kernels import check_head_dim
from gdn_mup.study.datasets import open_job

EXPERIMENT = TINY_EXPERIMENT | {"rules": ["gdn_mup"], "widths": [16]}
STUDY = {
    **TINY,
    "training": TINY["training"] | {"steps": 20},
    "multiplier_checks": [EXPERIMENT | {"learning_rate": 0.01, "steps": [0, 10**9]}],
    "sweeps": [EXPERIMENT | {"optimizer": "adamw", "learning_rates": {"log2_first": -7, "log2_last": -6}}],
}
JOB = ("--growth", "heads", "--optimizer", "adamw", "--seed", 0)


class Place:
    """A folder with the tiny study and its corpus, to spoil."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.study, self.corpus = folder, folder / "study.yaml", folder / "corpus"

    def change(self, **sections: dict) -> None:
        """Write the study with some keys of some sections changed."""
        study = {name: STUDY.get(name, {}) | sections.get(name, {}) for name in ("corpus", "model", "training")}
        self.study.write_text(yaml.safe_dump(STUDY | study))

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command, in this process."""
        return gdn_mup(*arguments, folder=self.folder, **environment)

    def run_process(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A command in a process of its own: for how that ends."""
        command = [sys.executable, "-m", "gdn_mup", *map(str, arguments)]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=HANGS)

    def sweep(self, output: Path, *options: object) -> subprocess.CompletedProcess[str]:
        return self.run(*self.sweep_of(output, *options))

    def sweep_of(self, output: Path, *options: object, width: int = 16) -> tuple[object, ...]:
        """The command that trains a job."""
        files = ("--study", self.study, "--corpus", self.corpus, "--output", output)
        device = () if "--device" in options else ("--device", "cpu")
        return ("sweep", *files, *JOB, "--width", width, *device, *options)


@pytest.fixture
def place(tiny_corpus: Path, tmp_path: Path) -> Place:
    place = Place(tmp_path / "place")
    shutil.copytree(tiny_corpus, place.corpus)
    place.change()
    return place


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system of its own at a folder, which takes root's rights."""
    folders: list[Path] = []

    def mount(options: str, folder: Path = tmp_path / "disk") -> Path:
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", folder], check=True)


def fill(disk: Path, leaving: int = 0) -> Path:
    """Take all of a disk's room but so many bytes; the file that takes it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(file.tell() - leaving)
    return filler


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, by its sha256."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- the page ----


@pytest.mark.parametrize("name", faults())
def test_every_fault_on_the_page_has_tests_that_know_it(name: str) -> None:
    fault = faults()[name]
    assert fault.tests and fault.cure
    for test in fault.tests:
        path, _, function = test.partition("::")
        source = (ROOT / path).read_text("utf-8")
        assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}, test
        assert f'"{name}"' in source, f"{path} does not compare with the row `{name}`"


def test_no_row_of_the_page_is_left_out() -> None:
    section = PAGE.read_text("utf-8").split("## Faults")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(faults())


def test_nothing_is_unpickled() -> None:
    """Nor read in any other way in which a file could run code."""
    unsafe = re.compile(
        r"\bimport (pickle|marshal|shelve|joblib)\b|torch\.load|allow_pickle|yaml\.(unsafe_|full_)?load\("
    )
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "workflow").rglob("*.py")]:
        assert not unsafe.search(path.read_text("utf-8")), path


# ---- bad input ----


def other_tokens(place: Place, first: int) -> None:
    """Put another first token into the training tokens, with a sidecar that fits."""
    tokens, sidecar = place.corpus / "train.tokens", place.corpus / "train.json"
    array = np.fromfile(tokens, "<u2")
    array[0] = first
    tokens.write_bytes(array.tobytes())
    record = json.loads(sidecar.read_text()) | {"sha256": hashlib.sha256(array.tobytes()).hexdigest()}
    sidecar.write_text(json.dumps(record))


def other_settings(place: Place, **settings: object) -> None:
    """Let the corpus be one that another corpus section asks for."""
    for sidecar in (place.corpus / "train.json", place.corpus / "validation.json"):
        record = json.loads(sidecar.read_text())
        record["settings"] |= settings
        sidecar.write_text(json.dumps(record))


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


BAD_CORPORA: dict[str, Callable[[Place], object]] = {
    "a token file that was changed": lambda place: flip(place.corpus / "train.tokens"),
    "a token file that was cut off": lambda place: append(place.corpus / "validation.tokens", b"x"),
    "a token id beyond the vocabulary": lambda place: other_tokens(place, 300),
    "a tokenizer that was changed": lambda place: flip(place.corpus / "tokenizer.json"),
    "the corpus of another study": lambda place: other_settings(place, vocabulary_size=320),
    "a corpus shorter than one context": lambda place: place.change(training={"context_length": 999_999}),
    "a model that is not finite before it trains": lambda place: place.change(
        model={"initial_scale": {"hidden": 1e30}}
    ),
}


@pytest.mark.parametrize("fault", BAD_CORPORA)
def test_a_job_that_cannot_be_trained(place: Place, tmp_path: Path, fault: str) -> None:
    BAD_CORPORA[fault](place)
    ends_as(place.sweep(tmp_path / "out" / "job.nc"), fault)
    assert content(tmp_path / "out") == {}


def files(place: Place, name: str, data: bytes) -> None:
    (place.folder / name).write_bytes(data)
    place.change(corpus={"source": "files", "files": [name]})


BAD_TEXT: dict[str, Callable[[Place], object]] = {
    "documents that are all empty": lambda place: files(place, "a.jsonl", b'{"text": ""}\n{"text": " \\n"}\n'),
    "a file that is not UTF-8": lambda place: files(place, "a.txt", "naïve".encode("latin1")),
    "a key that does not exist": lambda place: place.change(training={"stpes": 5}),
    "a value that makes no sense": lambda place: place.change(training={"steps": -1}),
}


@pytest.mark.parametrize("fault", BAD_TEXT)
def test_a_corpus_that_cannot_be_built(place: Place, fault: str) -> None:
    BAD_TEXT[fault](place)
    before = content(place.corpus)
    ends_as(place.run("corpus", "--study", place.study, "--output", place.corpus), fault)
    assert content(place.corpus) == before


def test_a_job_file_that_is_broken(place: Place, tmp_path: Path) -> None:
    job, dataset = tmp_path / "job.nc", tmp_path / "lr_sweep.nc"
    assert place.sweep(job).returncode == 0
    collect = ("collect", "--study", place.study, "--kind", "lr_sweep", "--output", dataset, job)
    assert place.run(*collect).returncode == 0
    before = content(tmp_path) | {"job.nc": ""}
    job.write_bytes(job.read_bytes()[:-1000])
    ends_as(place.run(*collect), "a job file that is not whole")
    assert content(tmp_path) | {"job.nc": ""} == before


def run_notebook(name: str, executed: Path, **parameters: Path) -> subprocess.CompletedProcess[str]:
    """As the workflow runs it."""
    script = [sys.executable, "workflow/scripts/run_notebook.py", f"notebooks/{name}.ipynb", executed]
    values = [f"{key}={value}" for key, value in parameters.items()]
    return subprocess.run([*script, *values], cwd=ROOT, capture_output=True, text=True, timeout=HANGS)


def test_a_dataset_that_is_broken(tmp_path: Path) -> None:
    dataset = tmp_path / "lr_sweep.nc"
    dataset.write_bytes(b"not netCDF")
    done = run_notebook("optima", tmp_path / "executed.ipynb", lr_sweep=dataset, output=tmp_path / "optima")
    ends_as(done, "a dataset that is not whole")
    assert set(content(tmp_path)) == {"lr_sweep.nc", "executed.ipynb"}


def test_heads_that_no_kernel_runs() -> None:
    check_head_dim(1024, 256)
    with pytest.raises(Exception) as caught:
        check_head_dim(2048, 512)
    is_said_as(caught.value, "heads larger than the GPU's kernels run")


def test_an_archive_that_reaches_elsewhere(place: Place, tmp_path: Path) -> None:
    archive, there = tmp_path / "kernels.tar.xz", tmp_path / "there"
    with tarfile.open(archive, "w:xz") as tar:
        for name in ("KERNEL/good", "../evil"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"x"))
    done = place.run("warm-up", "--unpack", archive, TRITON_CACHE_DIR=str(there))
    ends_as(done, "an archive with ../ in its paths")
    assert not there.exists() and not (tmp_path / "evil").exists()


# ---- the machine ----


def test_a_full_disk(place: Place, mounted: Callable[..., Path]) -> None:
    """At the start, at a checkpoint, and at the end: what is there stays, and nothing is trained twice."""
    disk, elsewhere = mounted("size=1m"), place.folder / "checkpoint"
    job, earlier = disk / "job.nc", disk / "earlier.nc"
    assert place.sweep(earlier).returncode == 0
    before = content(disk)

    filler = fill(disk)
    ends_as(place.run_process(*place.sweep_of(job)), "a full disk")
    filler.unlink()

    filler = fill(disk, leaving=16_384)
    ends_as(place.sweep(job, "--checkpoint-seconds", 0), "a disk too small for a checkpoint")
    filler.unlink()
    assert content(disk) == before

    filler = fill(disk, leaving=4096)
    trained = place.sweep(job, "--checkpoint", elsewhere)
    ends_as(trained, "a full disk")
    assert "100%" in trained.stderr and elsewhere.exists()
    filler.unlink()
    assert content(disk) == before

    done = place.sweep(job, "--checkpoint", elsewhere)
    assert done.returncode == 0 and "%" not in done.stderr  # written from the checkpoint
    assert not elsewhere.exists()
    expected, found = (open_job(path, "lr_sweep").drop_vars("seconds").drop_attrs() for path in (earlier, job))
    xr.testing.assert_identical(found, expected)


def test_a_corpus_on_a_full_disk(place: Place, mounted: Callable[..., Path]) -> None:
    disk = mounted("size=1m")
    shutil.copytree(place.corpus, disk / "corpus")
    before = content(disk / "corpus")
    fill(disk, leaving=100_000)
    place.change(corpus={"vocabulary_size": 320})
    ends_as(place.run("corpus", "--study", place.study, "--output", disk / "corpus"), "a full disk under the corpus")
    assert content(disk / "corpus") == before


def test_a_read_only_folder(place: Place, mounted: Callable[..., Path]) -> None:
    disk = mounted("ro")
    ends_as(place.sweep(disk / "job.nc"), "a read-only folder")
    done = run_notebook("scaling_rules", place.folder / "executed.ipynb", output=disk / "scaling_rules")
    ends_as(done, "a read-only folder")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_no_gpu(place: Place, tmp_path: Path) -> None:
    job = place.sweep_of(tmp_path / "job.nc", "--device", "cuda")
    ends_as(place.run_process(*job), "no GPU where one is asked for")


def test_a_model_beyond_the_machines_memory(place: Place, tmp_path: Path) -> None:
    wide = {"base_width": 16, "heads": 1, "head_dim": 16, "value_head_dim": 16, "mlp_ratio": 1000}
    place.study.write_text(
        yaml.safe_dump(
            STUDY | {"model": wide, "sweeps": [STUDY["sweeps"][0] | {"widths": [16, 16 * 2**15]}]}  # type: ignore[index]
        )
    )
    done = place.run_process(*place.sweep_of(tmp_path / "job.nc", width=16 * 2**15))
    ends_as(done, "a machine whose memory does not hold the job")


def test_a_gpu_that_fails() -> None:
    """As torch says it; that memory of a GPU runs out is tested where members train."""
    error = RuntimeError(
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported at"
    )
    is_said_as(error, "a GPU that fails")
    out_of_resources = type("OutOfResources", (Exception,), {})
    is_said_as(out_of_resources("out of resource: shared memory"), "a kernel too large for the GPU")
    is_said_as(type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "a GPU whose memory runs out")


def test_a_mistake_in_the_program_keeps_its_traceback() -> None:
    assert ending(ValueError("no line for this")) is None


def test_a_traceback_is_given_where_it_is_asked_for(place: Place, tmp_path: Path) -> None:
    plan = ("plan", "--study", tmp_path / "none.yaml")
    plain, asked = place.run(*plan), place.run(*plan, **{TRACEBACK: "1"})
    assert "Traceback" not in plain.stderr and "Traceback" in asked.stderr and "load_study" in asked.stderr
    assert asked.stderr.endswith(plain.stderr) and asked.returncode == plain.returncode


def test_a_line_that_nobody_can_write_leaves_the_exit_code(place: Place, tmp_path: Path) -> None:
    """Where the log is on the full disk too."""
    command = [sys.executable, "-m", "gdn_mup", "plan", "--study", tmp_path / "none.yaml"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stderr=full, timeout=HANGS).returncode == 2


# ---- signals outside training, which tests/test_restart.py does not see ----


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_job_that_keeps_no_checkpoint(place: Place, tmp_path: Path, name: str) -> None:
    files = ("--study", place.study, "--corpus", place.corpus, "--output", tmp_path / "job.nc")
    command = [sys.executable, "-m", "gdn_mup", "multiplier", *map(str, (*files, *JOB, "--width", 16))]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert job.stderr and "multiplier: heads" in job.stderr.readline()  # it trains
    job.send_signal(getattr(signal, name))
    _, errors = job.communicate(timeout=HANGS)
    ends_as(subprocess.CompletedProcess(command, job.returncode, "", errors), "SIGTERM or SIGINT elsewhere")
    assert job.returncode == EXIT_INTERRUPTED and content(tmp_path / "place") and not (tmp_path / "job.nc").exists()


# ---- the workflow ----


@pytest.mark.workflow
def test_a_workflow_on_a_full_disk_goes_on_when_there_is_room(tmp_path: Path, mounted: Callable[..., Path]) -> None:
    copy = WorkflowCopy(tmp_path / "copy")
    (copy.folder / "config/studies/tiny.yaml").write_text(yaml.safe_dump(STUDY))
    disk = mounted("size=4m", copy.folder / "results")
    arguments = ("--config", "study=tiny", "device=cpu", "--cores", "1")
    assert copy.snakemake(*arguments, "results/tiny/corpus/train.tokens").returncode == 0
    before = content(disk / "tiny/corpus")
    filler = fill(disk, leaving=4 * 4096)
    run = copy.snakemake(*arguments, "results/tiny/datasets/lr_sweep.nc")
    filler.unlink()
    assert run.returncode == 1 and content(disk / "tiny/corpus") == before
    assert f"exit status {EXIT_MACHINE}" in run.stdout and "Traceback" not in run.stdout
    run = copy.snakemake(*arguments, "results/tiny/datasets/lr_sweep.nc")
    assert run.returncode == 0 and "rule corpus" not in run.stdout, run.stdout
    assert content(disk / "tiny/corpus") == before


@pytest.mark.workflow
def test_a_workflow_in_a_read_only_folder(workflow: WorkflowCopy, mounted: Callable[..., Path]) -> None:
    mounted("ro", workflow.folder / "results")
    run = workflow.snakemake("--config", "study=smoke", "--cores", "1")
    last = subprocess.CompletedProcess([], run.returncode, "", run.stdout)
    ends_as(last, "a read-only results folder, through Snakemake")
