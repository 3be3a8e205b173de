"""Token files as they are written: first beside their place, and moved there when all are complete."""

import hashlib
import os
import platform
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.encoding import Piece, token_dtype
from gdn_mup.corpus.tokens import Sidecar


class Counts(BaseModel):
    """How much a token file holds."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0  # of text in UTF-8


class TokenWriter:
    """Appends to one `.tokens` file; what lies behind `counts` in a file that is there already is cut off."""

    def __init__(self, path: Path, vocabulary_size: int, counts: Counts | None = None) -> None:
        self.path = path
        self.vocabulary_size = vocabulary_size
        self.counts = counts or Counts()
        self._dtype = token_dtype(vocabulary_size)
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(self.counts.tokens * np.dtype(self._dtype).itemsize)
        self._file.seek(0, os.SEEK_END)

    def append(self, piece: Piece, tokens: NDArray[np.unsignedinteger]) -> None:
        """Write the tokens of a piece of text."""
        self._file.write(tokens.data)
        self.counts.tokens += len(tokens)
        self.counts.documents += piece.ends
        self.counts.bytes += piece.bytes

    def flush(self) -> None:
        """Return when all is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, settings: CorpusSettings, provenance: dict[str, Any], tokenizer: Path) -> None:
        """Describe the complete file in the `.json` beside it."""
        self._file.flush()
        self._file.seek(0)
        sidecar = Sidecar(
            source=_describe(settings),
            settings=settings.model_dump(mode="json"),
            tokenizer_sha256=hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
            vocabulary_size=self.vocabulary_size,
            dtype=self._dtype,
            tokens=self.counts.tokens,
            documents=self.counts.documents,
            bytes=self.counts.bytes,
            sha256=hashlib.file_digest(self._file, "sha256").hexdigest(),
            provenance=provenance,
        )
        text = sidecar.model_dump_json(indent=2) + "\n"
        self.path.with_suffix(".json").write_text(text, encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def publish(folder: Path, output: Path) -> None:
    """Move complete files to their place."""
    for file in sorted(folder.iterdir()):
        os.replace(file, output / file.name)


def _describe(settings: CorpusSettings) -> str:
    """Where text comes from, in words."""
    match settings.source:
        case "stdlib":
            return f"standard library of {platform.python_implementation()} {platform.python_version()}"
        case "pypi":
            return f"packages pinned in {settings.requirements}"
        case "huggingface":
            return f"dataset {settings.dataset}, {settings.dataset_config or 'default'}, {settings.dataset_split}"
        case "files":
            return f"files: {', '.join(settings.files)}"
