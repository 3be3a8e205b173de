"""Tokens on disk: a raw array beside a JSON sidecar, written once, memory-mapped by every job.

`train.tokens` and `train.json` (and the same for `validation`) hold documents one after another, each
followed by the end-of-text token, as little-endian uint16, or uint32 where the vocabulary needs it.
"""

import hashlib
import reprlib
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.errors import UserError
from gdn_mup.settings import Settings

REBUILD = "build the corpus again with `gdn-mup corpus`"


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
        {},
        description="Of source `pypi`: every package with version, sha256 and licence, and what was dropped as "
        "near-duplicates; of source `huggingface`: the dataset's commit.",
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
        if not path.is_file():
            raise UserError(f"{path}: no such token file; `gdn-mup corpus` builds it")
        sidecar_path = path.with_suffix(".json")
        try:
            sidecar = Sidecar.model_validate_json(sidecar_path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{sidecar_path}: missing: it says what {path.name} holds; {REBUILD}") from None
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"])) or "JSON"
            raise UserError(f"{sidecar_path}: {key}: {problem['msg']}; {REBUILD}") from None
        dtype = np.dtype(sidecar.dtype).newbyteorder("<")
        expected, found = sidecar.tokens * dtype.itemsize, path.stat().st_size
        if found != expected:
            raise UserError(
                f"{path}: {found} bytes, but {sidecar_path.name} says {expected} ({sidecar.tokens} tokens of "
                f"{sidecar.dtype}); {REBUILD}"
            )
        array = np.memmap(path, dtype=dtype, mode="r")
        if verify:
            _check_content(path, array, sidecar)
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

    def check_settings(self, wanted: CorpusSettings) -> None:
        """Raise UserError if the tokens were made by another corpus section than this one."""
        found = self.sidecar.settings
        for key, value in wanted.model_dump(mode="json").items():
            if key in found and found[key] != value:
                raise UserError(
                    f"{self.path.with_suffix('.json')}: corpus.{key}: {reprlib.repr(found[key])} is not the study's "
                    f"{reprlib.repr(value)}: this is the corpus of another study; name the study's own, or "
                    "build it with `gdn-mup corpus`"
                )

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


def open_corpus(folder: Path) -> tuple[TokenFile, TokenFile]:
    """The training and the validation tokens that one `gdn-mup corpus` wrote.

    Raises UserError like `TokenFile.open`, and if the two or the tokenizer beside them are of different builds.
    """
    train, validation = (TokenFile.open(folder / f"{part}.tokens") for part in ("train", "validation"))
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer}: no such tokenizer; {REBUILD}")
    found = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    for part in (train, validation):
        if part.sidecar.tokenizer_sha256 != found:
            raise UserError(f"{tokenizer}: its sha256 is not the one in {part.path.stem}.json; {REBUILD}")
    return train, validation


def _check_content(path: Path, array: NDArray[np.unsignedinteger], sidecar: Sidecar) -> None:
    """Compare checksum and vocabulary in one pass over the file."""
    checksum = hashlib.sha256()
    largest = 0
    for start in range(0, len(array), 2**22):
        chunk = array[start : start + 2**22]
        checksum.update(chunk.data)
        largest = max(largest, int(chunk.max()))
    if checksum.hexdigest() != sidecar.sha256:
        raise UserError(f"{path}: its sha256 is not the one in {path.with_suffix('.json').name}; {REBUILD}")
    if largest >= sidecar.vocabulary_size:
        raise UserError(f"{path}: token id {largest} is not below vocabulary_size {sidecar.vocabulary_size}; {REBUILD}")
