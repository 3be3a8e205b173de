"""Checkpoints while a job trains: the file, the thread that writes it, and what a signal leaves."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reliability import is_logged_as_on_the_page, is_said_as
from torch import Tensor

from gdn_mup.errors import EXIT_INTERRUPTED, MachineError
from gdn_mup.training import checkpoint, snapshots
from gdn_mup.training.checkpoint import Abandoned, Position, load_checkpoint, save_checkpoint
from gdn_mup.training.snapshots import SHARE, Checkpoints

HERE = Position(trained_members=3, group_size=2, step=7)
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)


def state(seed: int = 0, size: int = 1000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"flat": torch.randn(size, generator=generator), "updates": torch.tensor(seed)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


def loaded(path: Path) -> dict[str, Tensor]:
    found = load_checkpoint(path, "abc")
    assert found is not None
    return found[0]


@given(
    shapes=st.lists(st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=8),
    piece=st.sampled_from([8, 24, 4096]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[torch.dtype, list[int]]], piece: int
) -> None:
    """Whatever the types, shapes and names, and wherever a piece ends."""
    tensors = {f"é{i}": torch.randn(shape).mul(9).to(dtype) for i, (dtype, shape) in enumerate(shapes)}
    path = tmp_path_factory.mktemp("saved") / "job.checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "PIECE", piece)
        save_checkpoint(path, tensors, "abc", HERE)
        found = load_checkpoint(path, "abc")
    assert found is not None and found[1] == HERE
    assert_same(found[0], tensors)
    assert [file.name for file in path.parent.iterdir()] == ["job.checkpoint"]


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_one_changed_bit_is_refused(tmp_path_factory: pytest.TempPathFactory, place: float, bit: int) -> None:
    """Wherever in the file it is: in the head, too."""
    path = tmp_path_factory.mktemp("changed") / "job.checkpoint"
    save_checkpoint(path, state(), "abc", HERE)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    assert load_checkpoint(path, "abc") is None
    assert path.with_name("job.checkpoint.refused").read_bytes() == content


def test_a_writing_that_is_given_up_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "job.checkpoint"
    save_checkpoint(path, state(0), "abc", HERE)
    with pytest.raises(Abandoned):
        save_checkpoint(path, state(1), "abc", HERE, wanted=lambda: False)
    assert_same(loaded(path), state(0))


class SlowDisk:
    """Writes checkpoints, but not before it may, or is given up; what it was told to keep."""

    def __init__(self) -> None:
        self.free, self.begun, self.given_up = threading.Event(), 0, 0

    def save(
        self, path: Path, tensors: object, settings_hash: str, position: Position, wanted: Callable[[], bool]
    ) -> None:
        self.begun += 1
        while not self.free.wait(0.005):
            if not wanted():
                self.given_up += 1
                raise Abandoned
        save_checkpoint(path, tensors, settings_hash, position)  # type: ignore[arg-type]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    slow = SlowDisk()
    monkeypatch.setattr(snapshots, "save_checkpoint", slow.save)
    return slow


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, disk: SlowDisk) -> None:
    """What is kept is the state as it was, not as it became meanwhile; no second one is begun beside it."""
    checkpoints, trained = Checkpoints(tmp_path / "job.checkpoint", "abc", seconds=1e-9), state()
    before = {name: tensor.clone() for name, tensor in trained.items()}
    checkpoints.save(trained, HERE)
    trained["flat"].add_(1.0)
    assert disk.begun == 1 and not checkpoints.due()
    disk.free.set()
    checkpoints.close()
    assert_same(loaded(checkpoints.path), before)


def test_checkpoints_that_cost_much_come_less_often(
    tmp_path: Path, disk: SlowDisk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    checkpoints = Checkpoints(tmp_path / "job.checkpoint", "abc", seconds=0.05)
    checkpoints.save(state(), HERE)
    time.sleep(0.1)
    disk.free.set()
    checkpoints.close()
    (message,) = caplog.messages
    is_logged_as_on_the_page(message)
    time.sleep(0.1)
    assert not checkpoints.due()  # 0.1 s of writing on a CPU are 2 % of five seconds
    assert float(message.rsplit(" ", 2)[-2]) >= round(0.1 / SHARE)


def test_what_a_job_takes_is_said_and_a_disk_that_is_too_small_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    checkpoints = Checkpoints(tmp_path / "job.checkpoint", "abc", seconds=120)
    checkpoints.announce(state(size=10**6))
    checkpoints.announce(state(size=10**6))
    (message,) = caplog.messages
    is_logged_as_on_the_page(message)
    assert "4.0 MB each" in message
    usage = type("usage", (), {"free": 3_000_000})
    monkeypatch.setattr(snapshots.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MachineError) as refused:
        Checkpoints(tmp_path / ".job.nc.checkpoint", "abc", seconds=120).announce(state(size=10**6))
    is_said_as(refused.value, "a disk too small for a checkpoint")


def test_a_disk_that_fills_up_while_a_job_trains(tmp_path: Path) -> None:
    """On a real file system that is full: the error comes up in training, and the checkpoint before is whole."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        checkpoints = Checkpoints(folder / ".job.nc.checkpoint", "abc", seconds=1e-9)
        checkpoints.save(state(0, 50_000), HERE)
        checkpoints.close()
        (folder / "filler").write_bytes(bytes(700_000))
        checkpoints.save(state(1, 50_000), HERE)
        with pytest.raises(OSError, match="No space") as full:
            while not checkpoints.due():
                time.sleep(0.01)
        is_said_as(full.value, "a full disk at a checkpoint")
        assert_same(loaded(checkpoints.path), state(0, 50_000))
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_signal_leaves_the_newest_that_the_time_allows(tmp_path: Path, disk: SlowDisk) -> None:
    disk.free.set()
    checkpoints = Checkpoints(tmp_path / "job.checkpoint", "abc", seconds=1e-9)
    assert checkpoints.last(state(1), HERE, time.monotonic() + 5) < 0.5  # written now
    assert_same(loaded(checkpoints.path), state(1))


def test_a_signal_that_leaves_no_time_completes_what_is_being_written(tmp_path: Path, disk: SlowDisk) -> None:
    checkpoints = Checkpoints(tmp_path / "job.checkpoint", "abc", seconds=1e-9)
    checkpoints.save(state(0), HERE)
    time.sleep(0.6)  # so that a new one is known to take as long
    threading.Timer(0.1, disk.free.set).start()
    lost = checkpoints.last(state(1), HERE, time.monotonic() + 0.5)
    assert_same(loaded(checkpoints.path), state(0))
    assert disk.begun == 1 and 0.6 <= lost < 2


def test_a_signal_beside_a_disk_that_hangs_says_what_is_lost(tmp_path: Path, disk: SlowDisk) -> None:
    checkpoints = Checkpoints(tmp_path / "job.checkpoint", "abc", seconds=1e-9)
    assert checkpoints.last(state(0), HERE, time.monotonic() + 0.2) != checkpoints.last(state(0), HERE, 0.0)  # NaN
    assert disk.given_up and not checkpoints.path.exists()


HANGS = """
import ctypes, sys
from pathlib import Path
from gdn_mup import interrupt
from gdn_mup.errors import Interrupted
interrupt.GRACE_SECONDS = 0.5
with interrupt.noted_signals(lambda name: str(Interrupted(name, Path("job.checkpoint"), 12.3))):
    print("waits", flush=True)
    for _ in range(10):
        ctypes.CDLL(None).sleep(2)  # and never looks whether a signal came
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_job_that_hears_nothing_is_ended(name: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waits\n"
    asked = time.monotonic()
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_INTERRUPTED and time.monotonic() - asked < 6
    assert errors == (
        f"ended by {name}; run the same command again to go on from job.checkpoint "
        "(the last 12 s of training are lost)\n"
    )
