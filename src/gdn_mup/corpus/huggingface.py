"""Source `huggingface`: any text dataset of the Hugging Face hub, or a folder of the same layout, as a stream.

A stream is not downloaded, not sorted and not searched for duplicates: it is taken in the dataset's own order.
"""

import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdn_mup.corpus.background import prefetch
from gdn_mup.corpus.columns import is_damage, is_text, texts_of
from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.documents import Document
from gdn_mup.corpus.text import check_beginning, check_pointer
from gdn_mup.errors import MachineError, UserError

if TYPE_CHECKING:
    import pyarrow

ROWS = 1024  # read at once; a position lies between two such reads

SUFFIXES_OF_TEXT = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv")

_PLAIN = re.compile(r"[^][*?{}:|#%]*")  # names in which the library looks for nothing
_CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)
_NETWORK = ("requests", "urllib3", "http", "httpx", "httpcore", "aiohttp", "ssl", "socket")  # whose errors they are

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
        self._name = f"dataset {settings.dataset}"
        folder = root / settings.dataset
        self._links = ExitStack()  # until the stream is gone
        place = settings.dataset
        if folder.is_dir():
            place = str(folder if _PLAIN.fullmatch(str(folder)) else self._links.enter_context(_plainly_named(folder)))
        try:
            builder = datasets.load_dataset_builder(
                place, settings.dataset_config or None, revision=settings.dataset_revision or None
            )
            files = [str(file) for file in (builder.config.data_files or {}).get(settings.dataset_split, [])]
            for file in map(Path, files):
                if file.is_file():
                    original = file if place == str(folder) else file.readlink()
                    (check_beginning if file.suffix in SUFFIXES_OF_TEXT else check_pointer)(original)
            dataset = builder.as_streaming_dataset(split=settings.dataset_split)
            names = dataset.column_names or list(next(iter(dataset.take(1)), {settings.field: None}))
        except UserError:
            raise
        except Exception as error:  # the library raises a dozen kinds, few of them its own
            raise _cannot_load(settings, error, folder) from None
        if settings.field not in names:
            raise UserError(
                f"corpus.field: {self._name} has no column {settings.field!r}; use one that is there: "
                + ", ".join(names)
            )
        if hasattr(builder.config, "columns"):  # Parquet: files may differ in columns that nobody reads
            builder.config.columns = [settings.field]
            builder.info.features = datasets.Features({settings.field: datasets.Value("large_string")})
            builder._cast_table = self._as_text  # the library's own makes text of numbers
            dataset = builder.as_streaming_dataset(split=settings.dataset_split)
        self._dataset = dataset.select_columns([settings.field]).with_format("arrow")
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
        row = 0
        try:
            for table in self._dataset.iter(batch_size=ROWS):
                column = table.column(self._settings.field)
                self._check_type(column.type)
                texts = [text for text in texts_of(column, self._row, row) if text and not text.isspace()]
                row += len(column)
                batch = [Document.of(self._settings.dataset, text) for text in texts]
                if batch:
                    batch[-1] = batch[-1]._replace(position=self._dataset.state_dict())
                yield batch
        except UserError:
            raise
        except Exception as error:  # anything from a socket to a broken file
            raise _broke_off(self._settings, error) from None

    def _row(self, number: int) -> str:
        """What an error calls a row, counted from where reading began."""
        return f"corpus.dataset: {self._settings.dataset}: row {number}: column {self._settings.field!r}"

    def _as_text(self, table: "pyarrow.Table") -> "pyarrow.Table":
        """Of every file the column in the same type, if it holds text or nothing at all."""
        import pyarrow

        self._check_type(table.schema.field(self._settings.field).type)
        return table.cast(pyarrow.schema({self._settings.field: pyarrow.large_string()}))

    def _check_type(self, kind: "pyarrow.DataType") -> None:
        from pyarrow import types

        if not (is_text(kind) or types.is_null(kind)):
            raise UserError(
                f"corpus.field: column {self._settings.field!r} of {self._name} is {kind}, "
                "not text; set corpus.field to one that is"
            )


@contextmanager
def _plainly_named(folder: Path) -> Iterator[Path]:
    """A folder of links to every file of one whose name the library would take for a pattern, or for an address.

    It follows a link to a folder before it looks for files, but not links to files.
    """
    with tempfile.TemporaryDirectory(prefix="gdn-mup-") as place:
        for file in folder.absolute().rglob("*"):
            if file.is_file():
                link = Path(place) / "dataset" / file.relative_to(folder.absolute())
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)
        yield Path(place) / "dataset"


def resolved_commit(files: Iterable[str]) -> str | None:
    """The commit in the hub's addresses, `hf://datasets/<name>@<commit>/<path>`; None for files on this machine."""
    commits = {match[1] for file in files if (match := re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", file))}
    return commits.pop() if len(commits) == 1 else None


def _cannot_load(settings: CorpusSettings, error: Exception, folder: Path) -> UserError:
    """The library's complaint, with the key that it is about."""
    reason = _reason(error)
    name = f"dataset {settings.dataset}"
    if "BuilderConfig" in reason or "Config name is missing" in reason:
        return UserError(f"corpus.dataset_config: {settings.dataset_config!r}: {name}: {reason}")
    if "Bad split" in reason:
        return UserError(f"corpus.dataset_split: {settings.dataset_split!r}: {name}: {reason}")
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        return MachineError(
            f"{error.filename}: {os.strerror(error.errno)}; name a folder that can be written in HF_HOME, "
            "where `datasets` keeps what it needs"
        )
    complaint = f"corpus.dataset: {settings.dataset!r} cannot be loaded ({reason})"
    passing = _is_passing(error)
    if folder.is_dir() and not passing:
        return UserError(f"{complaint}; correct its files, or name a folder with files of one kind, such as .parquet")
    kind = MachineError if passing else UserError
    return kind(f"{complaint}; check the name and the network, or name a folder that holds a copy")


def _broke_off(settings: CorpusSettings, error: Exception) -> UserError:
    """Why reading ends: something that passes, or files that will always be like that."""
    reason = _reason(error)
    if _is_passing(error):
        return MachineError(
            f"corpus.dataset: {settings.dataset}: reading broke off ({reason}); start again: it goes on where it was"
        )
    if "No match for FieldRef" in reason:
        return UserError(
            f"corpus.field: a file of dataset {settings.dataset} has no column {settings.field!r}; "
            "use one that every file has, or leave the file out"
        )
    return UserError(
        f"corpus.dataset: {settings.dataset}: cannot be read ({reason}); correct the file, leave it out, or read "
        "a copy by corpus.source `files`, which looks at corpus.field alone"
    )


def _is_passing(error: BaseException | None) -> bool:
    """Whether the same command may succeed later: the network or the machine failed, not the content."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status >= 500 or status in (408, 429)
        if isinstance(error, FileNotFoundError):  # the hub has no such dataset
            return False
        if is_damage(error):
            return False
        if isinstance(error, OSError | MemoryError) or type(error).__module__.split(".")[0] in _NETWORK:
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
