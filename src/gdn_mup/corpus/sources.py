"""Where text comes from: documents, each once, in an order that depends on nothing but their content."""

import glob
import hashlib
import heapq
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.documents import Document, take_bytes
from gdn_mup.corpus.near_duplicates import drop_near_duplicates
from gdn_mup.corpus.pypi import Wheel, fetch, package_texts
from gdn_mup.errors import MachineError, UserError

logger = logging.getLogger(__name__)


class Selection(NamedTuple):
    """The documents of a corpus, and what there is to say about where they come from."""

    documents: Iterator[Document]
    provenance: dict[str, Any]  # complete once all documents have been taken


def select(settings: CorpusSettings, root: Path, downloads: Path) -> Selection:
    """The documents of a corpus, by ascending hash, up to `settings.maximum_bytes` of text.

    Blank documents are left out and exact duplicates kept once; of source `pypi`, near-duplicates too. The hash order
    makes the selection a random sample that is the same whatever the files are called and in whatever order they are
    read; the document that crosses the limit is cut there. At no time is much more than the limit in memory, or than
    the packages' text.

    `root` is what relative paths and patterns start from; `downloads` is where fetched packages are kept.

    Raises UserError for files that cannot be read as text, for patterns that match nothing, and for packages that
    cannot be fetched.
    """
    if settings.source == "pypi":
        return _pypi(settings, fetch(root / settings.requirements, downloads), downloads)
    texts = _stdlib_texts() if settings.source == "stdlib" else _file_texts(settings, root)
    return Selection(_lowest_hashes(texts, settings.maximum_bytes), {})


def _lowest_hashes(texts: Iterable[tuple[str, str]], limit: int) -> Iterator[Document]:
    """Distinct non-blank texts by ascending hash until `limit` bytes, holding little more than that."""
    heap: list[tuple[int, int, Document]] = []  # (−hash, bytes, document): the highest hash on top
    held: set[str] = set()
    total = 0
    for name, text in texts:
        if not text.strip():
            continue
        data = text.encode()
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 in held:
            continue
        held.add(sha256)
        heapq.heappush(heap, (-int(sha256, 16), len(data), Document(name, text, sha256)))
        total += len(data)
        # The highest hash goes as soon as those below it reach the limit. Later documents cannot bring it
        # back, they only add to what lies below: neither its text nor its hash need be remembered.
        while total - heap[0][1] >= limit:
            _, size, dropped = heapq.heappop(heap)
            held.discard(dropped.sha256)
            total -= size
    return take_bytes((document for _, _, document in sorted(heap, reverse=True)), limit)


# ---- source `pypi` ----


def _pypi(settings: CorpusSettings, wheels: list[Wheel], downloads: Path) -> Selection:
    """Near-duplicates are looked for in all packages, so that `maximum_bytes` does not decide which are dropped."""
    provenance: dict[str, Any] = {"packages": [wheel._asdict() for wheel in wheels]}

    def documents() -> Iterator[Document]:
        dropped: list[Document] = []
        everything = list(_lowest_hashes(package_texts(wheels, downloads), sys.maxsize))
        kept = list(drop_near_duplicates(everything, dropped))
        for key, part in (("read", everything), ("near_duplicates", dropped)):
            provenance[key] = {"documents": len(part), "bytes": sum(document.bytes for document in part)}
        logger.info(
            "packages: %d, %d documents, %.1f MB; of these near-duplicates, which are dropped: %d, %.1f MB",
            len(wheels),
            len(everything),
            provenance["read"]["bytes"] / 1e6,
            len(dropped),
            provenance["near_duplicates"]["bytes"] / 1e6,
        )
        yield from take_bytes(kept, settings.maximum_bytes)

    return Selection(documents(), provenance)


# ---- source `stdlib` ----


def _stdlib_texts() -> Iterator[tuple[str, str]]:
    """Every Python file of the running interpreter's standard library that is UTF-8, in sorted order."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(library.rglob("*.py"))
    if not paths:
        raise UserError(
            f"corpus.source: `stdlib` finds no .py files in {library}; use an interpreter that ships its "
            "library as files, or source `files`"
        )
    for path in paths:
        name = path.relative_to(library)
        # Installed packages are not the library; _sysconfigdata records one machine's build.
        if {"site-packages", "dist-packages", "__pycache__"} & set(name.parts) or name.name.startswith(
            "_sysconfigdata"
        ):
            continue
        try:
            yield name.as_posix(), path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            continue  # the library's tests of encodings, dangling links


# ---- source `files` ----


def _file_texts(settings: CorpusSettings, root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every document in the files that the patterns match."""
    for path in _matching_files(settings.files, root):
        try:
            yield from _READERS[path.suffix.lower()](path, settings.field)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _matching_files(patterns: Iterable[str], root: Path) -> list[Path]:
    """Files that any pattern matches, each once, sorted. Extensions are checked before any is read."""
    found: set[Path] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        matches = [root / match for match in glob.glob(expanded, root_dir=root, recursive=True)]
        files = [path for path in matches if path.is_file()]
        if not files:
            kinds = ", ".join(_READERS)
            if matches:
                cure = f"matches only directories; write e.g. {Path(pattern) / '**/*.txt'} ({kinds} are read)"
            else:
                where = "" if os.path.isabs(expanded) else f" in {root.absolute()}"
                cure = f"matches no file{where}; correct the pattern (`**` descends, `~` is your home)"
            raise UserError(f"corpus.files: {pattern!r}: {cure}")
        for path in files:
            if path.suffix.lower() not in _READERS:
                raise UserError(
                    f"corpus.files: {pattern!r} matches {path}, which is none of {', '.join(_READERS)}; "
                    "narrow the pattern, e.g. end it in *.txt"
                )
        found.update(files)
    return sorted(found)


def _read_whole(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """A file that is one document. A byte-order mark is not text."""
    yield str(path), path.read_bytes().decode("utf-8-sig")


def _read_jsonl(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """A document a line: JSON objects with the text in `field`. Blank lines and null texts are left out."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                content = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(where, error) from None
            if content.strip():
                text = _text_of_line(content, field, where)
                if text is not None:
                    yield where, text


def _text_of_line(content: str, field: str, where: str) -> str | None:
    """The text in one line of a .jsonl file."""
    try:
        record = json.loads(content.rstrip())
    except (ValueError, RecursionError) as error:
        reason = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(
            f'{where}: not valid JSON ({reason}); each line is an object, e.g. {{"{field}": "…"}}'
        ) from None
    if not isinstance(record, dict):
        raise UserError(f'{where}: {type(record).__name__}, not an object; write e.g. {{"{field}": "…"}}')
    if field not in record:
        others = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where}: no field {field!r}; set corpus.field to one that is there: {others}")
    text = record[field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is {type(text).__name__}, not text; set corpus.field to one that is")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field!r} holds half a surrogate pair (\\u{ord(text[error.start]):04x}), "
            "which is no character; remove it or the line"
        ) from None
    return text


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """A document a row: the column named `field`, read in pieces. Nulls are left out."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MachineError(f"{path}: reading .parquet needs pyarrow; `pip install pyarrow`") from None
    types = pyarrow.types
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            names = ", ".join(map(repr, schema.names))
            if field not in schema.names:
                raise UserError(f"{path}: no column {field!r}; set corpus.field to one that is there: {names}")
            kind = schema.field(field).type
            if types.is_dictionary(kind):
                kind = kind.value_type
            if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
                raise UserError(
                    f"{path}: column {field!r} is {kind}, not text; set corpus.field to one that is: {names}"
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is not None:
                        yield f"{path}:{row}", text
    except pyarrow.ArrowInvalid as error:
        raise UserError(
            f"{path}: not a whole Parquet file ({' '.join(str(error).split())}); write it again, "
            "or narrow corpus.files so that it does not match"
        ) from None


def _not_utf8(where: Path | str, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(
        f"{where}: not UTF-8 (byte 0x{byte:02x} at {error.start}); convert it, e.g. "
        "`iconv -f latin1 -t utf-8 OLD > NEW`, or narrow corpus.files so that it does not match"
    )


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, str]]]] = {
    ".txt": _read_whole,
    ".md": _read_whole,
    ".py": _read_whole,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
