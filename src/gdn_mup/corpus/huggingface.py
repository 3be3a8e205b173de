"""Source `huggingface`: any text dataset of the Hugging Face hub, or a folder of the same layout, as a stream.

A stream is not downloaded, not sorted and not searched for duplicates: it is taken in the dataset's own order.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.documents import Document
from gdn_mup.corpus.encoding import prefetch
from gdn_mup.errors import MachineError, UserError

if TYPE_CHECKING:
    import pyarrow

ROWS = 1024  # read at once; a position lies between two such reads

Position = dict[str, Any]  # where a stream goes on, as the `datasets` library writes it: JSON


class Stream:
    """The documents of one split of a dataset, in its order.

    `provenance` says what was read: the dataset, and the commit that the hub resolved it to.
    """

    def __init__(self, settings: CorpusSettings, root: Path) -> None:
        """Look the dataset up; relative folders start from `root`. No code of a dataset's author is run.

        Raises UserError, one line, if `datasets` is not installed or dataset, config, split or column are not there.
        """
        try:
            import datasets
        except ImportError:
            raise MachineError(
                "corpus.source: `huggingface` needs the package datasets; `pip install datasets`"
            ) from None
        self._settings = settings
        folder = root / settings.dataset
        try:
            builder = datasets.load_dataset_builder(
                str(folder) if folder.is_dir() else settings.dataset,
                settings.dataset_config or None,
                revision=settings.dataset_revision or None,
            )
            dataset = builder.as_streaming_dataset(split=settings.dataset_split)
            names = dataset.column_names or list(next(iter(dataset.take(1)), {settings.field: None}))
        except Exception as error:  # the library raises a dozen kinds, few of them its own
            raise _cannot_load(settings, error) from None
        if settings.field not in names:
            raise UserError(
                f"corpus.field: dataset {settings.dataset} has no column {settings.field!r}; use one that is there: "
                + ", ".join(names)
            )
        self._dataset = dataset.select_columns([settings.field]).with_format("arrow")
        files = [str(file) for file in (builder.config.data_files or {}).get(settings.dataset_split, [])]
        self.provenance = {
            "dataset": settings.dataset,
            "config": settings.dataset_config,
            "split": settings.dataset_split,
            "commit": resolved_commit(files),
            "files": len(files),
        }

    def documents(self, position: Position | None = None) -> Iterator[Document]:
        """All documents, or those from a position on; blank ones are left out.

        The last document of each read carries the position after it.

        Raises UserError where the column does not hold text, and where the stream breaks off.
        """
        if position is not None:
            self._dataset.load_state_dict(position)
        for batch in prefetch(self._batches()):
            yield from batch

    def _batches(self) -> Iterator[list[Document]]:
        try:
            for table in self._dataset.iter(batch_size=ROWS):
                column = table.column(self._settings.field)
                self._check_type(column.type)
                texts = [text for text in column.to_pylist() if text and not text.isspace()]
                batch = [Document.of(self._settings.dataset, text) for text in texts]
                if batch:
                    batch[-1] = batch[-1]._replace(position=self._dataset.state_dict())
                yield batch
        except UserError:
            raise
        except Exception as error:  # anything from a socket to a broken file
            raise MachineError(
                f"corpus.dataset: {self._settings.dataset}: reading broke off ({_reason(error)}); start again: "
                "it goes on where it was"
            ) from None

    def _check_type(self, kind: "pyarrow.DataType") -> None:
        from pyarrow import types

        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
            raise UserError(
                f"corpus.field: column {self._settings.field!r} of dataset {self._settings.dataset} is {kind}, "
                "not text; set corpus.field to one that is"
            )


def resolved_commit(files: Iterable[str]) -> str | None:
    """The commit in the hub's addresses, `hf://datasets/<name>@<commit>/<path>`; None for files on this machine."""
    commits = {match[1] for file in files if (match := re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", file))}
    return commits.pop() if len(commits) == 1 else None


def _cannot_load(settings: CorpusSettings, error: Exception) -> UserError:
    """The library's complaint, with the key that it is about."""
    reason = _reason(error)
    name = f"dataset {settings.dataset}"
    if "BuilderConfig" in reason or "Config name is missing" in reason:
        return UserError(f"corpus.dataset_config: {settings.dataset_config!r}: {name}: {reason}")
    if "Bad split" in reason:
        return UserError(f"corpus.dataset_split: {settings.dataset_split!r}: {name}: {reason}")
    kind = UserError if isinstance(error, FileNotFoundError) else MachineError  # the hub has no such dataset
    return kind(
        f"corpus.dataset: {settings.dataset!r} cannot be loaded ({reason}); check the name and the network, or name a "
        "folder that holds a copy"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
