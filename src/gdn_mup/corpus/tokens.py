"""Tokens on disk: a raw array beside a JSON sidecar, written once, memory-mapped by every job.

`train.tokens` and `train.json` (and the same for `validation`) hold documents one after another, each
followed by the end-of-text token, as little-endian uint16, or uint32 where the vocabulary needs it.
"""

import hashlib
import logging
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from tokenizers import Tokenizer

from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.documents import Document, split, take_bytes
from gdn_mup.corpus.sources import select
from gdn_mup.corpus.tokenizer import END_OF_TEXT, train_tokenizer
from gdn_mup.errors import UserError
from gdn_mup.settings import Settings

logger = logging.getLogger(__name__)

BATCH_BYTES = 4_000_000  # of text encoded at once: the library's encodings take far more memory than the ids
PIECE_CHARACTERS = 2**18  # long documents are encoded in pieces of at least this many, in parallel
# Encoding before and after such a place equals encoding across it: no token pattern of the byte-level
# pre-tokenizer extends from a visible character into a line break.
PIECE_BOUNDARY = re.compile(r"(?<=[!-~])(?=\n)")


class Sidecar(Settings):
    """What a `.tokens` file holds; stored as JSON beside it."""

    source: str = Field(description="Where the text came from.")
    settings: dict[str, Any] = Field(description="The corpus section of the study that built it.")
    tokenizer_sha256: str = Field(description="Of tokenizer.json.")
    vocabulary_size: int = Field(gt=0, description="Token ids are below this.")
    dtype: Literal["uint16", "uint32"] = Field(description="Little-endian.")
    tokens: int = Field(gt=0, description="Length of the array, end-of-text tokens included.")
    documents: int = Field(gt=0, description="Number of end-of-text tokens.")
    bytes: int = Field(gt=0, description="Size of the documents' text in UTF-8.")
    sha256: str = Field(description="Of the array as stored.")
    provenance: dict[str, Any] = Field(
        {}, description="Of source `pypi`: every package with version, sha256 and licence; near-duplicates dropped."
    )


class TokenFile:
    """A memory-mapped array of tokens. Batches depend on their arguments alone: all readers agree."""

    def __init__(self, path: Path, array: NDArray[np.unsignedinteger], sidecar: Sidecar) -> None:
        self.path = path
        self.array = array  # [tokens]
        self.sidecar = sidecar

    @classmethod
    def open(cls, path: Path | str, verify: bool = True) -> Self:
        """Map a `.tokens` file and check it against the `.json` beside it.

        `verify` reads the whole array once, to compare its checksum and to see that every token is in the
        vocabulary; without it only the sidecar and the size are checked.

        Raises UserError if either file is missing or does not fit the other.
        """
        path = Path(path)
        cure = "build the corpus again with `gdn-mup corpus`"
        if not path.is_file():
            raise UserError(f"{path}: no such token file; `gdn-mup corpus` builds it")
        sidecar_path = path.with_suffix(".json")
        try:
            sidecar = Sidecar.model_validate_json(sidecar_path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{sidecar_path}: missing: it says what {path.name} holds; {cure}") from None
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"])) or "JSON"
            raise UserError(f"{sidecar_path}: {key}: {problem['msg']}; {cure}") from None
        dtype = np.dtype(sidecar.dtype).newbyteorder("<")
        expected, found = sidecar.tokens * dtype.itemsize, path.stat().st_size
        if found != expected:
            raise UserError(
                f"{path}: {found} bytes, but {sidecar_path.name} says {expected} ({sidecar.tokens} tokens of "
                f"{sidecar.dtype}); {cure}"
            )
        array = np.memmap(path, dtype=dtype, mode="r")
        if verify:
            _check_content(path, array, sidecar, cure)
        return cls(path, array, sidecar)

    @property
    def tokens(self) -> int:
        """Length of the array."""
        return self.sidecar.tokens

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this."""
        return self.sidecar.vocabulary_size

    @property
    def sha256(self) -> str:
        """Checksum of the array: the identity of the corpus."""
        return self.sidecar.sha256

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text a token stands for on average: a loss in nats/token over this is one in nats/byte."""
        return self.sidecar.bytes / self.sidecar.tokens

    def batch(self, seed: int, step: int, batch_size: int, context_length: int) -> NDArray[np.int64]:
        """Sequences at random offsets: [batch_size, context_length + 1], inputs and the target after each.

        A function of the arguments alone: jobs that share a seed see the same batches in the same order,
        whatever else they differ in, and a restarted job needs only its step. A smaller batch is the
        beginning of a larger one.

        Raises UserError if the file is shorter than one sequence.
        """
        choices = self._offset_choices(context_length)
        # The raw stream of a bit generator is fixed for good, while distributions drawn from it may change
        # with the version of NumPy. The remainder's bias is below choices / 2⁶⁴.
        raw = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(step,))).random_raw(batch_size)
        offsets = (np.asarray(raw, dtype=np.uint64) % np.uint64(choices)).astype(np.int64)
        return self._sequences(offsets, context_length)

    def fixed_batches(self, count: int, batch_size: int, context_length: int) -> NDArray[np.int64]:
        """Evenly spaced sequences from the first to the last: [count, batch_size, context_length + 1].

        For held-out losses: the same for everyone. In a file too short for that many, sequences overlap.

        Raises UserError if the file is shorter than one sequence.
        """
        last = self._offset_choices(context_length) - 1
        sequences = count * batch_size
        offsets = np.arange(sequences, dtype=np.int64) * last // max(sequences - 1, 1)
        return self._sequences(offsets, context_length).reshape(count, batch_size, context_length + 1)

    def _offset_choices(self, context_length: int) -> int:
        """How many places a sequence of context_length + 1 tokens can start at."""
        choices = self.tokens - context_length
        if choices < 1:
            raise UserError(
                f"{self.path}: {self.tokens} tokens are fewer than one sequence of training.context_length "
                f"{context_length} and its target; use at most {self.tokens - 1}, or more text"
            )
        return choices

    def _sequences(self, offsets: NDArray[np.int64], context_length: int) -> NDArray[np.int64]:
        """The tokens from each offset on: [offsets, context_length + 1]."""
        return self.array[offsets[:, None] + np.arange(context_length + 1)].astype(np.int64)


def _check_content(path: Path, array: NDArray[np.unsignedinteger], sidecar: Sidecar, cure: str) -> None:
    """Compare checksum and vocabulary in one pass over the file."""
    checksum = hashlib.sha256()
    largest = 0
    for start in range(0, len(array), 2**22):
        chunk = array[start : start + 2**22]
        checksum.update(chunk.data)
        largest = max(largest, int(chunk.max()))
    if checksum.hexdigest() != sidecar.sha256:
        raise UserError(f"{path}: its sha256 is not the one in {path.with_suffix('.json').name}; {cure}")
    if largest >= sidecar.vocabulary_size:
        raise UserError(f"{path}: token id {largest} is not below vocabulary_size {sidecar.vocabulary_size}; {cure}")


def build_corpus(
    settings: CorpusSettings, root: Path, output: Path, progress: bool | None = None, downloads: Path | None = None
) -> tuple[TokenFile, TokenFile]:
    """From text to `tokenizer.json`, `train.tokens`, `validation.tokens` and their sidecars in `output`.

    Everything is written under a temporary name and renamed when all is complete. `root` is what relative
    file patterns start from. Packages are fetched to `downloads`, by default the folder of that name in `output`,
    if they are not there yet. `progress` shows bars, by default where standard error is a terminal; otherwise
    a line per stage is logged.

    Returns the training and the validation tokens. Raises UserError for text that cannot be used, before
    anything is written.
    """
    selection = select(settings, root, downloads or output / "downloads")
    with _stages(sys.stderr.isatty() if progress is None else progress) as stage:
        stage("Reading text")
        train, validation = split(selection.documents, settings.validation_fraction)
        stage("Learning the vocabulary")
        sample = take_bytes(train, settings.tokenizer_sample_bytes)
        tokenizer = train_tokenizer((document.text for document in sample), settings)
        try:
            output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=output) as partial:
                scratch = Path(partial)
                (scratch / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
                for name, part in (("train", train), ("validation", validation)):
                    advance = stage(f"Encoding {name}", sum(document.bytes for document in part))
                    _write_tokens(scratch, name, part, tokenizer, settings, selection.provenance, advance)
                for file in sorted(scratch.iterdir()):
                    os.replace(file, output / file.name)
        except OSError as error:
            raise UserError(
                f"{output}: the corpus cannot be written there: {error.strerror or error}; "
                "give a directory that is writable and has room"
            ) from None
    parts = (TokenFile.open(output / "train.tokens"), TokenFile.open(output / "validation.tokens"))
    for name, tokens in zip(("train", "validation"), parts, strict=True):
        logger.info(
            "%s: %d documents, %.1f MB, %d tokens, %.2f bytes/token",
            name,
            tokens.sidecar.documents,
            tokens.sidecar.bytes / 1e6,
            tokens.tokens,
            tokens.bytes_per_token,
        )
    return parts


def _write_tokens(
    directory: Path,
    name: str,
    texts: list[Document],
    tokenizer: Tokenizer,
    settings: CorpusSettings,
    provenance: dict[str, Any],
    advance: Callable[[int], None],
) -> None:
    """Encode documents into `name`.tokens, described in `name`.json; `advance` is told the bytes done."""
    vocabulary_size = tokenizer.get_vocab_size()
    dtype = np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")
    checksum = hashlib.sha256()
    tokens = size = 0
    with (directory / f"{name}.tokens").open("wb") as file:
        for batch, batch_bytes in _batches(texts):
            array = _encode(tokenizer, batch, dtype)
            file.write(array.data)
            checksum.update(array.data)
            tokens += len(array)
            size += batch_bytes
            advance(batch_bytes)
    sidecar = Sidecar(
        source=_describe(settings),
        settings=settings.model_dump(mode="json"),
        tokenizer_sha256=hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest(),
        vocabulary_size=vocabulary_size,
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        tokens=tokens,
        documents=len(texts),
        bytes=size,
        sha256=checksum.hexdigest(),
        provenance=provenance,
    )
    (directory / f"{name}.json").write_text(sidecar.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _describe(settings: CorpusSettings) -> str:
    """Where text comes from, in words."""
    if settings.source == "stdlib":
        return f"standard library of {platform.python_implementation()} {platform.python_version()}"
    if settings.source == "pypi":
        return f"packages pinned in {settings.requirements}"
    return f"files: {', '.join(settings.files)}"


def _batches(texts: Iterable[Document]) -> Iterator[tuple[list[tuple[str, bool]], int]]:
    """Pieces to encode together, each with whether it ends its document; and their size in bytes."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in texts:
        *beginnings, end = _pieces(document.text)
        for piece, ends in [*((piece, False) for piece in beginnings), (end, True)]:
            batch.append((piece, ends))
            size += len(piece.encode())
            if size >= BATCH_BYTES:
                yield batch, size
                batch, size = [], 0
    if batch:
        yield batch, size


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text where encoding does not notice."""
    start = 0
    while boundary := PIECE_BOUNDARY.search(text, start + PIECE_CHARACTERS):
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]


def _encode(tokenizer: Tokenizer, batch: list[tuple[str, bool]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Tokens of the pieces in order, with end-of-text after those that end a document."""
    end_of_text = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=dtype)
    encodings = tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
    parts: list[NDArray[Any]] = []
    for encoding, (_, ends) in zip(encodings, batch, strict=True):
        parts.append(np.array(encoding.ids, dtype=dtype))
        if ends:
            parts.append(end_of_text)
    return np.concatenate(parts)


# A stage is announced with the bytes that it will go through (if known) and returns how to report them.
Stage = Callable[..., Callable[[int], None]]


@contextmanager
def _stages(bars: bool) -> Iterator[Stage]:
    """Progress bars, or a logged line per stage."""
    if not bars:

        def log(name: str, total: int | None = None) -> Callable[[int], None]:
            logger.info("%s%s", name, f" ({total / 1e6:.1f} MB)" if total else "")
            return lambda size: None

        yield log
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:

        def show(name: str, total: int | None = None) -> Callable[[int], None]:
            for task in display.tasks:  # the stage before is done, whether or not its size was known
                if task.total is None:
                    display.update(task.id, total=1, completed=1, visible=False)
            task_id = display.add_task(name, total=total)
            return lambda size: display.advance(task_id, size)

        yield show
