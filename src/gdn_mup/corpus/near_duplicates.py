"""Near-duplicates: documents that mostly repeat what others already said.

A document is the set of its *windows*: three consecutive lines that are not blank, without their indentation. In the
order given, a document is dropped if at least half of its windows occur in documents kept before it. This is
containment in everything kept, not likeness to one other document: a file put together from five others goes too,
which pairwise schemes such as MinHash keep. It is exact, and a function of the documents and their order alone.
"""

import hashlib
from collections.abc import Iterable, Iterator

from gdn_mup.corpus.documents import Document

WINDOW_LINES = 3
REPEATED_SHARE = 0.5


def drop_near_duplicates(documents: Iterable[Document], dropped: list[Document]) -> Iterator[Document]:
    """The documents that say something new, in the order given; the others are appended to `dropped`.

    Remembers eight bytes a window: some 500 MB of main memory for 250 MB of source code.
    """
    seen: set[bytes] = set()
    for document in documents:
        own = _windows(document.text)
        if len(own & seen) >= REPEATED_SHARE * len(own):
            dropped.append(document)
        else:
            seen |= own
            yield document


def _windows(text: str) -> set[bytes]:
    """Hashes of every window; of all lines, where there are fewer than a window's."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    starts = range(max(1, len(lines) - WINDOW_LINES + 1))
    return {
        hashlib.blake2b("\n".join(lines[start : start + WINDOW_LINES]).encode(), digest_size=8).digest()
        for start in starts
    }
