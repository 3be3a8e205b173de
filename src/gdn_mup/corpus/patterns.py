"""Which files the patterns under `corpus.files` mean."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from gdn_mup.errors import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")


def matching_files(patterns: Iterable[str], root: Path) -> list[Path]:
    """Files that any pattern matches, each once, sorted. Extensions are checked before any is read.

    A folder or file whose name holds `[`, `*` or `?` may be written as it is: a part of a pattern that is the name of
    something there means that. Relative patterns start from `root`.

    Raises UserError for a pattern that matches nothing, or files of other kinds than SUFFIXES, and for one that is a
    name and matches other names too.
    """
    found: set[Path] = set()
    kinds = ", ".join(SUFFIXES)
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        matches = [
            root / match for match in glob.glob(_literal(expanded, pattern, root), root_dir=root, recursive=True)
        ]
        files = [path for path in matches if path.is_file()]
        if not files:
            if matches:
                cure = f"matches only directories; write e.g. {Path(pattern) / '**/*.txt'} ({kinds} are read)"
            else:
                where = "" if os.path.isabs(expanded) else f" in {root.absolute()}"
                cure = f"matches no file{where}; correct the pattern (`**` descends, `~` is your home, `[[]` a bracket)"
            raise UserError(f"corpus.files: {pattern!r}: {cure}")
        for path in files:
            if path.suffix.lower() not in SUFFIXES:
                raise UserError(
                    f"corpus.files: {pattern!r} matches {path}, which is none of {kinds}; "
                    "narrow the pattern, e.g. end it in *.txt"
                )
        found.update(files)
    return sorted(found)


def _literal(expanded: str, pattern: str, root: Path) -> str:
    """The pattern with those parts escaped that are names of what is there, up to the first that is none."""
    folder = Path("/") if os.path.isabs(expanded) else root
    parts = expanded.split("/")
    for i, part in enumerate(parts):
        if glob.has_magic(part):
            if not os.path.lexists(folder / part):
                break
            others = [name for name in glob.glob(part, root_dir=folder) if name != part]
            if others:
                escaped = "/".join([*parts[:i], glob.escape(part), *parts[i + 1 :]])
                raise UserError(
                    f"corpus.files: {pattern!r}: {part!r} is a name there, and a pattern that matches {others[0]!r} "
                    f"too; write {escaped!r} for the name, or rename it"
                )
            parts[i] = glob.escape(part)
        folder = folder / part
    return "/".join(parts)
