"""A corpus that does not fit in memory: documents are encoded as they come, and a build that ended early goes on."""

import hashlib
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError
from tokenizers import Tokenizer

from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.documents import is_validation, no_documents, take_bytes
from gdn_mup.corpus.encoding import encode, token_dtype
from gdn_mup.corpus.huggingface import Position, Stream
from gdn_mup.corpus.tokenizer import load_tokenizer, train_tokenizer
from gdn_mup.corpus.writing import Counts, TokenWriter, publish
from gdn_mup.files import naming, replacing
from gdn_mup.progress import Report, progress

PARTIAL = ".streaming"  # the folder in the output where a build that ended early left its files
STATE = "state.json"
TOKENIZER = "tokenizer.json"
SECONDS_BETWEEN_STATES = 30.0
SECONDS_BETWEEN_REPORTS = 0.2


class State(BaseModel):
    """How far a build is; another build may go on from here if it asks for the same."""

    settings: dict[str, Any]
    provenance: dict[str, Any]
    tokenizer_sha256: str
    position: Position | None = None
    train: Counts = Counts()
    validation: Counts = Counts()

    @property
    def bytes(self) -> int:
        """Text encoded so far."""
        return self.train.bytes + self.validation.bytes


def stream_corpus(settings: CorpusSettings, root: Path, output: Path) -> None:
    """From a stream to `tokenizer.json`, `train.tokens`, `validation.tokens` and their sidecars in `output`.

    The vocabulary is learnt from the stream's beginning. Progress is shown on standard error. A build that is
    stopped leaves its files under `.streaming` in `output`, and the next one with the same settings goes on there,
    with the same result.

    Raises UserError for a dataset that cannot be read and for one without documents for either part.
    """
    stream = Stream(settings, root)
    folder = output / PARTIAL
    with naming(output):
        asked = {"settings": settings.model_dump(mode="json"), "provenance": stream.provenance}
        state = _read_state(folder)
        if state is None or {"settings": state.settings, "provenance": state.provenance} != asked:
            shutil.rmtree(folder, ignore_errors=True)
            learnt = _learn_vocabulary(stream, settings).to_str(pretty=True).encode()
            folder.mkdir(parents=True)
            (folder / TOKENIZER).write_bytes(learnt)
            state = State(**asked, tokenizer_sha256=hashlib.sha256(learnt).hexdigest())
            _write_state(folder, state)
        tokenizer = load_tokenizer(folder / TOKENIZER)
        with progress(f"Encoding {settings.dataset}", settings.maximum_bytes) as report:
            _encode(stream, settings, tokenizer, folder, state, report)
        (folder / STATE).unlink()
        publish(folder, output)
        folder.rmdir()


def _learn_vocabulary(stream: Stream, settings: CorpusSettings) -> Tokenizer:
    fraction = settings.validation_fraction
    train = (document for document in stream.documents() if not is_validation(document.sha256, fraction))
    sample = take_bytes(train, settings.tokenizer_sample_bytes)
    return train_tokenizer((document.text for document in sample), settings)


def _encode(
    stream: Stream, settings: CorpusSettings, tokenizer: Tokenizer, folder: Path, state: State, report: Report
) -> None:
    """Encode what is left of the stream, and note from time to time how far that is."""
    documents = take_bytes(stream.documents(state.position), settings.maximum_bytes - state.bytes)
    before, start = state.bytes, time.monotonic()
    reported = noted = start
    with ExitStack() as files:
        train, validation = (
            files.enter_context(TokenWriter(folder / f"{name}.tokens", tokenizer.get_vocab_size(), counts))
            for name, counts in (("train", state.train), ("validation", state.validation))
        )
        for piece, tokens in encode(documents, tokenizer):
            held_out = is_validation(piece.document.sha256, settings.validation_fraction)
            (validation if held_out else train).append(piece, tokens)
            now = time.monotonic()
            if now - reported >= SECONDS_BETWEEN_REPORTS:
                reported = now
                report(state.bytes, f"{(state.bytes - before) / 1e6 / (now - start):.1f} MB/s")
            if piece.ends and piece.document.position and now - noted >= SECONDS_BETWEEN_STATES:
                noted = now
                state.position = piece.document.position
                train.flush()
                validation.flush()
                _write_state(folder, state)
        for name, writer in (("validation", validation), ("training", train)):
            if not writer.counts.documents:
                total = state.train.documents + state.validation.documents
                raise no_documents(name, settings.validation_fraction, total)
            writer.finish(settings, state.provenance, folder / TOKENIZER)


def _read_state(folder: Path) -> State | None:
    """What an earlier build left, if all of it is whole."""
    try:
        state = State.model_validate_json((folder / STATE).read_bytes())
        tokenizer = (folder / TOKENIZER).read_bytes()
        item = np.dtype(token_dtype(state.settings["vocabulary_size"])).itemsize
        for name, counts in (("train", state.train), ("validation", state.validation)):
            if counts.tokens and (folder / f"{name}.tokens").stat().st_size < counts.tokens * item:
                return None
    except (FileNotFoundError, ValidationError):
        return None
    return state if hashlib.sha256(tokenizer).hexdigest() == state.tokenizer_sha256 else None


def _write_state(folder: Path, state: State) -> None:
    with replacing(folder / STATE) as partial:
        partial.write_text(state.model_dump_json(), encoding="utf-8")
