"""Where products are found."""

from pathlib import Path


def from_root(path: Path | str) -> Path:
    """A path relative to the repository's root, wherever inside the repository a notebook was started.

    The root is the nearest folder, from the working directory upward, that holds the Snakefile.
    Absolute paths, and all paths where there is no Snakefile above, are returned as they are.
    """
    path = Path(path)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if not path.is_absolute() and (folder / "Snakefile").is_file():
            return folder / path
    return path
