"""Compiled kernels in one file, so that the next machine does not compile them again.

Triton keeps a folder for each compiled kernel, whose index names its files by absolute path; unpacking writes the
new machine's paths. A cache serves one version of Triton and one kind of GPU, whose keys are in the folders' names:
elsewhere it is not found, and kernels compile as if there was none.
"""

import json
import lzma
import os
import tarfile
from pathlib import Path, PurePosixPath

from gdn_mup.errors import UserError
from gdn_mup.files import replacing


def cache_folder() -> Path:
    """Where Triton keeps compiled kernels on this machine (TRITON_CACHE_DIR, or below the home folder).

    Raises UserError where there is neither.
    """
    if named := os.environ.get("TRITON_CACHE_DIR"):
        return Path(named)
    try:
        return Path.home() / ".triton" / "cache"
    except RuntimeError:
        raise UserError(
            "HOME: this user has no home folder; name one for compiled kernels in TRITON_CACHE_DIR"
        ) from None


def pack(archive: Path, folder: Path | None = None) -> int:
    """Write every compiled kernel to `archive` (.tar.xz), which appears when complete; how many there are.

    Raises UserError where there is none.
    """
    folder = folder or cache_folder()
    kernels = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not kernels:
        raise UserError(
            f"--pack: {folder} holds no compiled kernels; compile some on this machine with --study, or name where "
            "they are in TRITON_CACHE_DIR"
        )
    with replacing(archive) as temporary, tarfile.open(temporary, "w:xz") as tar:
        for kernel in kernels:
            for file in sorted(kernel.iterdir()):
                if file.is_file() and file.name != "lock":
                    tar.add(file, f"{kernel.name}/{file.name}")
    return len(kernels)


def unpack(archive: Path, folder: Path | None = None) -> int:
    """Add the kernels of `archive` to this machine's; how many it has.

    Raises UserError, before anything is written, if it is not such a file or holds anything else.
    """
    folder = folder or cache_folder()
    try:
        with tarfile.open(archive, "r:xz") as tar:
            files = [_read(member, tar, archive, folder) for member in tar]
    except (OSError, tarfile.TarError, lzma.LZMAError, EOFError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"{archive}: not a readable file of compiled kernels ({error}); make it with gdn-mup warm-up"
        ) from None
    for path, mode, content in files:
        with replacing(folder / path) as temporary:
            temporary.write_bytes(content)
            temporary.chmod(mode)
    return len({path.parent for path, _, _ in files})


def _read(
    member: tarfile.TarInfo, tar: tarfile.TarFile, archive: Path, folder: Path
) -> tuple[PurePosixPath, int, bytes]:
    """A file's path below the cache, its mode and its content. Raises UserError if it does not belong there."""
    path = PurePosixPath(member.name)
    source = tar.extractfile(member) if member.isfile() else None
    if source is None or len(path.parts) != 2 or ".." in path.parts or path.is_absolute():
        raise UserError(f"{archive}: {member.name!r} does not belong in it; make it with gdn-mup warm-up")
    content = source.read()
    if path.name.startswith("__grp__"):
        content = _with_paths_below(content, folder / path.parent)
    return path, member.mode & 0o777, content


def _with_paths_below(index: bytes, folder: Path) -> bytes:
    children = json.loads(index)["child_paths"]
    return json.dumps(
        {"child_paths": {name: str(folder / Path(path).name) for name, path in children.items()}}
    ).encode()
