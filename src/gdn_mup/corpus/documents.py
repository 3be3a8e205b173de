"""A document, and what is decided by its hash alone: whether it is held out, and where a selection ends."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

from gdn_mup.errors import UserError


class Document(NamedTuple):
    """One text with a name to find it by."""

    name: str  # a path, with `:line` (.jsonl) or `:row` (.parquet) where a file holds many
    text: str
    sha256: str  # of the whole text in UTF-8, also where `text` was cut at `maximum_bytes`
    position: dict[str, Any] | None = None  # of a stream: where it goes on after this document, if that can be said

    @classmethod
    def of(cls, name: str, text: str) -> Self:
        """A whole text."""
        return cls(name, text, hashlib.sha256(text.encode()).hexdigest())

    @property
    def bytes(self) -> int:
        """Size of the text in UTF-8."""
        return len(self.text.encode())


def is_validation(sha256: str, fraction: float) -> bool:
    """Whether the document with this hash is held out: a property of the document alone.

    It reads the last digits of the hash: `documents` orders and cuts by the first ones, so that the two are
    independent.
    """
    return int(sha256[-16:], 16) < fraction * 2.0**64


def split(texts: Iterable[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, in the order given.

    Raises UserError if either would be empty.
    """
    train: list[Document] = []
    validation: list[Document] = []
    for document in texts:
        (validation if is_validation(document.sha256, fraction) else train).append(document)
    for name, share in (("validation", validation), ("training", train)):
        if not share:
            raise no_documents(name, fraction, len(train) + len(validation))
    return train, validation


def no_documents(part: str, fraction: float, total: int) -> UserError:
    """The error where `part`, which is `validation` or `training`, gets none of `total` documents."""
    if not total:
        return UserError("corpus: every document is blank; name text under corpus, such as other files")
    cure = "raise" if part == "validation" else "lower"
    return UserError(
        f"corpus.validation_fraction: {fraction} of {total} document{'s' * (total > 1)} leaves none "
        f"for {part}; {cure} it, or give more documents (.jsonl holds one a line; "
        "corpus.maximum_bytes limits how many are taken)"
    )


def take_bytes(texts: Iterable[Document], limit: int) -> Iterator[Document]:
    """Documents up to `limit` bytes of UTF-8; the one that crosses the limit is cut, between characters."""
    left = limit
    for document in texts:
        size = document.bytes
        if size > left:
            text = document.text.encode()[:left].decode(errors="ignore")
            if text.strip():
                yield document._replace(text=text)
            return
        yield document
        left -= size
