"""Compiled kernels packed into one file and unpacked elsewhere."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from gdn_mup.errors import UserError
from gdn_mup.kernels.cache import pack, unpack


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    """A folder as Triton leaves it: a kernel with its index, and the launcher's library."""
    folder = tmp_path / "here"
    kernel = folder / "KERNEL"
    kernel.mkdir(parents=True)
    (kernel / "solve.cubin").write_bytes(bytes(range(256)))
    (kernel / "__grp__solve.json").write_text(json.dumps({"child_paths": {"solve.cubin": str(kernel / "solve.cubin")}}))
    (kernel / "lock").touch()
    (folder / "LAUNCHER").mkdir()
    (folder / "LAUNCHER" / "launcher.so").write_bytes(b"\x7fELF")
    (folder / "LAUNCHER" / "launcher.so").chmod(0o755)
    return folder


def test_a_packed_kernel_is_found_on_another_machine(compiled: Path, tmp_path: Path) -> None:
    archive, there = tmp_path / "kernels.tar.xz", tmp_path / "there"
    assert pack(archive, compiled) == 2
    assert unpack(archive, there) == 2
    found = json.loads((there / "KERNEL" / "__grp__solve.json").read_text())["child_paths"]
    assert found == {"solve.cubin": str(there / "KERNEL" / "solve.cubin")}
    assert Path(found["solve.cubin"]).read_bytes() == bytes(range(256))
    assert (there / "LAUNCHER" / "launcher.so").stat().st_mode & 0o100
    assert not (there / "KERNEL" / "lock").exists()


def test_unpacking_adds_to_what_is_there(compiled: Path, tmp_path: Path) -> None:
    archive, there = tmp_path / "kernels.tar.xz", tmp_path / "there"
    pack(archive, compiled)
    (there / "OTHER").mkdir(parents=True)
    unpack(archive, there)
    assert sorted(path.name for path in there.iterdir()) == ["KERNEL", "LAUNCHER", "OTHER"]


@pytest.mark.parametrize("name", ["../KERNEL/x", "/KERNEL/x", "x", "KERNEL/deep/x"])
def test_a_file_that_reaches_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    archive = tmp_path / "kernels.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="does not belong"):
        unpack(archive, tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.tar.xz"]


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "notes.txt"
    archive.write_text("not an archive")
    with pytest.raises(UserError, match=r"notes\.txt: not a readable file"):
        unpack(archive, tmp_path / "there")
