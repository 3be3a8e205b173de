"""Columns of Arrow tables that hold text."""

import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gdn_mup.corpus.text import check_record
from gdn_mup.errors import UserError

if TYPE_CHECKING:
    import pyarrow


def is_text(kind: "pyarrow.DataType") -> bool:
    """Whether a column of this type holds text, or texts by their numbers in a dictionary."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_damage(error: BaseException) -> bool:
    """Whether Arrow says so of a file's content, by an OSError too, which then is its own and has no number."""
    import pyarrow

    *_, (innermost, _) = [(None, 0), *traceback.walk_tb(error.__traceback__)]
    raised_by = innermost.f_globals.get("__name__", "") if innermost else ""
    return isinstance(error, pyarrow.ArrowInvalid) or (
        type(error) is OSError and error.errno is None and raised_by.startswith("pyarrow")
    )


def texts_of(
    column: "pyarrow.Array | pyarrow.ChunkedArray", where: Callable[[int], str], first_row: int
) -> Iterator[str | None]:
    """The texts of a column. `where` is what an error calls a row by its number, which counts from 1.

    Raises UserError, one line with the row, for bytes that are not UTF-8.
    """
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = (_decoded(scalar, where(row)) for row, scalar in enumerate(column, start=first_row + 1))
    for row, text in enumerate(texts, start=first_row + 1):
        yield None if text is None else check_record(text, where(row))


def _decoded(scalar: "pyarrow.Scalar", where: str) -> str | None:
    try:
        text: str | None = scalar.as_py()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{where} is not UTF-8 (byte 0x{byte:02x} at {error.start}), as text in Parquet must be; "
            "write it again from the original, or leave the row out"
        ) from None
    return text
