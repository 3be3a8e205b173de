"""Documents become token ids: in pieces, in parallel, in the order given."""

import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gdn_mup.corpus.background import prefetch
from gdn_mup.corpus.documents import Document
from gdn_mup.corpus.tokenizer import END_OF_TEXT

BATCH_BYTES = 4_000_000  # of text encoded at once: the library's encodings take far more memory than the ids
PIECE_CHARACTERS = 2**18  # long documents are encoded in pieces of at least this many, in parallel
# Encoding before and after such a place equals encoding across it: no token pattern of the byte-level
# pre-tokenizer extends from a visible character into a line break.
PIECE_BOUNDARY = re.compile(r"(?<=[!-~])(?=\n)")


class Piece(NamedTuple):
    """What is encoded at once: a document, or a part of a long one."""

    text: str
    document: Document
    bytes: int  # of the text in UTF-8
    ends: bool  # whether the document ends here


def encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Piece, NDArray[np.unsignedinteger]]]:
    """Every piece with its tokens, and the end-of-text token after those of a document's last piece.

    The tokenizer's own threads encode one batch while the batch before is turned into arrays here, and written.
    """
    dtype = np.dtype(token_dtype(tokenizer.get_vocab_size())).newbyteorder("<")
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    assert end_of_text is not None, "every tokenizer of ours has it"
    batches = (
        (pieces, tokenizer.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False))
        for pieces in _batches(documents)
    )
    for pieces, encodings in prefetch(batches):
        for piece, encoding in zip(pieces, encodings, strict=True):
            ids = encoding.ids  # a new list each time
            if piece.ends:
                ids.append(end_of_text)
            yield piece, np.array(ids, dtype=dtype)


def token_dtype(vocabulary_size: int) -> Literal["uint16", "uint32"]:
    """The smallest of the two types that tokens are stored as."""
    return "uint16" if vocabulary_size <= 2**16 else "uint32"


def _batches(documents: Iterable[Document]) -> Iterator[list[Piece]]:
    """Pieces to encode together."""
    batch: list[Piece] = []
    size = 0
    for document in documents:
        *beginnings, end = _pieces(document.text)
        for text, ends in [*((text, False) for text in beginnings), (end, True)]:
            batch.append(Piece(text, document, len(text.encode()), ends))
            size += batch[-1].bytes
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text where encoding does not notice."""
    start = 0
    while boundary := PIECE_BOUNDARY.search(text, start + PIECE_CHARACTERS):
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]
