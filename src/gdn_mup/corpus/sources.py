"""Where text comes from: documents, each once, in an order that depends on nothing but their content."""

import codecs
import hashlib
import heapq
import json
import logging
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gdn_mup.corpus.columns import is_damage, is_text, texts_of
from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.documents import Document, take_bytes
from gdn_mup.corpus.near_duplicates import drop_near_duplicates
from gdn_mup.corpus.patterns import SUFFIXES, matching_files
from gdn_mup.corpus.pypi import Wheel, fetch, package_texts
from gdn_mup.corpus.text import check_beginning, check_pointer, check_record, decode, read_text
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
    for path in matching_files(settings.files, root):
        try:
            yield from _READERS[path.suffix.lower()](path, settings.field)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_whole(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """A file that is one document."""
    yield str(path), read_text(path)


def _read_jsonl(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """A document a line: JSON objects with the text in `field`. Blank lines and null texts are left out."""
    check_beginning(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            content = decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, where, path)
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
    return check_record(text, f"{where}: field {field!r}")


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """A document a row: the column named `field`, read in pieces. Nulls are left out, a column of nothing else too."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MachineError(f"{path}: reading .parquet needs pyarrow; `pip install pyarrow`") from None
    check_pointer(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            texts = ", ".join(repr(column.name) for column in schema if is_text(column.type)) or "none is"
            if field not in schema.names:
                raise UserError(f"{path}: no column {field!r}; set corpus.field to one that holds text: {texts}")
            kind = schema.field(field).type
            if pyarrow.types.is_null(kind):
                return
            if not is_text(kind):
                raise UserError(
                    f"{path}: column {field!r} is {kind}, not text; set corpus.field to one that is: {texts}"
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for text in texts_of(batch.column(0), lambda row: f"{path}:{row}: column {field!r}", row):
                    row += 1
                    if text is not None:
                        yield f"{path}:{row}", text
    except (pyarrow.ArrowInvalid, OSError) as error:
        if not is_damage(error):
            raise
        raise UserError(
            f"{path}: not a whole Parquet file ({' '.join(str(error).split())}); write it again, "
            "or narrow corpus.files so that it does not match"
        ) from None


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, str]]]] = dict(
    zip(SUFFIXES, (_read_whole, _read_whole, _read_whole, _read_jsonl, _read_parquet), strict=True)
)
