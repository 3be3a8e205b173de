"""Compiled kernels in one file, so that the next machine does not compile them again.

Triton keeps a folder for each compiled kernel, whose index names its files by absolute path; unpacking writes the
new machine's paths. A cache serves one version of Triton and one kind of GPU, whose keys are in the folders' names:
elsewhere it is not found, and kernels compile as if there was none.
"""

import json
import os
import tarfile
from pathlib import Path, PurePosixPath

from gdn_mup.errors import UserError


def cache_folder() -> Path:
    """Where Triton keeps compiled kernels on this machine (TRITON_CACHE_DIR, or below the home folder)."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def pack(archive: Path, folder: Path | None = None) -> int:
    """Write every compiled kernel to `archive` (.tar.xz), which appears when complete; how many there are."""
    folder = folder or cache_folder()
    kernels = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}.tmp")
    archive.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(temporary, "w:xz") as tar:
            for kernel in kernels:
                for file in sorted(kernel.iterdir()):
                    if file.is_file() and file.name != "lock":
                        tar.add(file, f"{kernel.name}/{file.name}")
        os.replace(temporary, archive)
    finally:
        temporary.unlink(missing_ok=True)
    return len(kernels)


def unpack(archive: Path, folder: Path | None = None) -> int:
    """Add the kernels of `archive` to this machine's; how many it has. Raises UserError if it is not such a file."""
    folder = folder or cache_folder()
    kernels = set()
    try:
        with tarfile.open(archive, "r:xz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                source = tar.extractfile(member) if member.isfile() else None
                if source is None or len(path.parts) != 2 or ".." in path.parts or path.is_absolute():
                    raise UserError(f"{archive}: {member.name!r} does not belong in it; make it with gdn-mup warm-up")
                content = source.read()
                if path.name.startswith("__grp__"):
                    content = _with_paths_below(content, folder / path.parent)
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
                temporary.write_bytes(content)
                temporary.chmod(member.mode & 0o777)
                os.replace(temporary, target)
                kernels.add(path.parent)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive}: not a readable file of compiled kernels ({error})") from None
    return len(kernels)


def _with_paths_below(index: bytes, folder: Path) -> bytes:
    children = json.loads(index)["child_paths"]
    return json.dumps(
        {"child_paths": {name: str(folder / Path(path).name) for name, path in children.items()}}
    ).encode()
