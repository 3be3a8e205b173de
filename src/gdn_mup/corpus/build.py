"""From text to a folder of tokens."""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.documents import split, take_bytes
from gdn_mup.corpus.encoding import encode
from gdn_mup.corpus.sources import select
from gdn_mup.corpus.streaming import stream_corpus
from gdn_mup.corpus.tokenizer import train_tokenizer
from gdn_mup.corpus.tokens import TokenFile, open_corpus
from gdn_mup.corpus.writing import TokenWriter, publish
from gdn_mup.files import naming

logger = logging.getLogger(__name__)


def build_corpus(
    settings: CorpusSettings, root: Path, output: Path, progress: bool | None = None, downloads: Path | None = None
) -> tuple[TokenFile, TokenFile]:
    """From text to `tokenizer.json`, `train.tokens`, `validation.tokens` and their sidecars in `output`.

    Everything is written under a temporary name and renamed when all is complete. `root` is what relative
    file patterns start from. Packages are fetched to `downloads`, by default the folder of that name in `output`,
    if they are not there yet. `progress` shows bars, by default where standard error is a terminal; otherwise
    a line per stage is logged.

    Returns the training and the validation tokens. Raises UserError for text that cannot be used, before
    anything is written, and OSError, which names `output`, where it cannot be written.
    """
    if settings.source == "huggingface":
        stream_corpus(settings, root, output)
    else:
        _build_in_memory(settings, root, output, progress, downloads or output / "downloads")
    parts = open_corpus(output)
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


def _build_in_memory(
    settings: CorpusSettings, root: Path, output: Path, progress: bool | None, downloads: Path
) -> None:
    selection = select(settings, root, downloads)
    with _stages(sys.stderr.isatty() if progress is None else progress) as stage:
        stage("Reading text")
        train, validation = split(selection.documents, settings.validation_fraction)
        stage("Learning the vocabulary")
        sample = take_bytes(train, settings.tokenizer_sample_bytes)
        tokenizer = train_tokenizer((document.text for document in sample), settings)
        with _partial(output) as folder:
            (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            for name, part in (("train", train), ("validation", validation)):
                advance = stage(f"Encoding {name}", sum(document.bytes for document in part))
                with TokenWriter(folder / f"{name}.tokens", tokenizer.get_vocab_size()) as writer:
                    for piece, tokens in encode(part, tokenizer):
                        writer.append(piece, tokens)
                        advance(piece.bytes)
                    writer.finish(settings, selection.provenance, folder / "tokenizer.json")
            publish(folder, output)


@contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """A folder in `output` for what is not complete yet, which is made if it is not there."""
    with naming(output):
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=output) as partial:
            yield Path(partial)


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
