"""From bytes to text. Only UTF-8 is text; anything else is refused with the command that makes it so."""

import codecs
import shlex
import unicodedata
from pathlib import Path

from gdn_mup.errors import UserError

BEGINNING = 65_536  # bytes of a file that are looked at for what it is
_WITHOUT_NULS = r"tr -d '\000' <"
_NARROW = "or narrow corpus.files so that it does not match"

# How files begin that stand for others, which were not fetched, and what fetches those.
_POINTERS = {
    b"version https://git-lfs": ("git-lfs", "lfs pull"),
    b"version https://hawser": ("git-lfs", "lfs pull"),
    b"version http://git-media": ("git-lfs", "lfs pull"),
    b"# xet version": ("git-xet", "xet checkout"),
    b"/annex/objects/": ("git-annex", "annex get ."),
    b"../.git/annex/objects/": ("git-annex", "annex get ."),
    b".git/annex/objects/": ("git-annex", "annex get ."),
}
_POINTER_BYTES = 1024  # the largest that git-lfs makes
_OTHER_FORMATS = {
    b"PAR1": "Parquet",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"%PDF-": "PDF",
    b"\x89HDF": "HDF5",
    b"SQLite format 3\x00": "SQLite",
}
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_WIDE = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
_EAST_ASIAN_MARKS = "\u3000\u3001\u3002\uff0c"  # of which any longer text holds some


def read_text(path: Path) -> str:
    """A whole file of text. A byte-order mark of UTF-8 is not part of it.

    Raises UserError, one line, for what is no text, and OSError.
    """
    data = path.read_bytes()
    check_beginning(path, data[:BEGINNING])
    return decode(data.removeprefix(codecs.BOM_UTF8), path, path)


def check_beginning(path: Path, beginning: bytes | None = None) -> None:
    """Raise UserError if the file stands for another one, is of a format that is no text, or is UTF-16 or UTF-32."""
    if beginning is None:
        with path.open("rb") as file:
            beginning = file.read(BEGINNING)
    check_pointer(path, beginning)
    for magic, name in _OTHER_FORMATS.items():
        if beginning.startswith(magic) and not _is_utf8(beginning):
            raise UserError(f"{path}: {name}, not text; unpack or convert it, {_NARROW}")
    encoding = _wide_encoding(beginning)
    if encoding is not None:
        raise UserError(f"{path}: {encoding}, not UTF-8; convert it: `{_conversion(path, encoding)}`")


def check_pointer(path: Path, beginning: bytes | None = None) -> None:
    """Raise UserError if the file only says where git-lfs, git-annex or git-xet keeps its content."""
    if beginning is None:
        with path.open("rb") as file:
            beginning = file.read(BEGINNING)
    for start, (tool, command) in _POINTERS.items():
        if beginning.startswith(start) and len(beginning) <= _POINTER_BYTES:
            folder = shlex.quote(str(path.parent))
            raise UserError(f"{path}: a pointer of {tool}, not the text itself; fetch it: `git -C {folder} {command}`")


def decode(data: bytes, where: object, path: Path) -> str:
    """The text in UTF-8. `where` is what an error calls this part of the file `path`."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte 0x{data[error.start]:02x} at {error.start}); if it is Western European text, "
            f"convert it: `{_conversion(path, 'WINDOWS-1252')}`; else put its encoding there, {_NARROW}"
        ) from None
    if (at := text.find("\0")) >= 0:
        raise UserError(
            f"{where}: holds U+0000 (character {at}), which no text does; take it out: "
            f"`{_in_place(path, _WITHOUT_NULS)}`, {_NARROW}"
        )
    return text


def check_record(text: str, where: str) -> str:
    """The text of one record, which may hold U+0000, but not mostly: that is UTF-16 read as UTF-8, or padding.

    Raises UserError for that, and for half a surrogate pair.
    """
    if len(text) >= 8 and 4 * text.count("\0") >= len(text):
        raise UserError(
            f"{where} is U+0000 to a quarter or more, as where UTF-16 was read as UTF-8 or a field is padded; "
            "write it again from the original, or leave it out"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half a surrogate pair (\\u{ord(text[error.start]):04x}), "
            "which is no character; remove it or leave the text out"
        ) from None
    return text


def _conversion(path: Path, encoding: str) -> str:
    return _in_place(path, f"iconv -f {encoding} -t UTF-8")


def _in_place(path: Path, filter_: str) -> str:
    """A shell command that rewrites a file by a filter."""
    old, new = shlex.quote(str(path)), shlex.quote(f"{path}.new")
    return f"{filter_} {old} > {new} && mv {new} {old}"


def _is_utf8(beginning: bytes) -> bool:
    """Whether the bytes can be UTF-8 that goes on behind them, without U+0000."""
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError:
        return False


def _wide_encoding(beginning: bytes) -> str | None:
    """UTF-16 or UTF-32, with or without a byte-order mark, if the bytes are nothing else."""
    for mark, name in _MARKS.items():
        if beginning.startswith(mark) and (name == "UTF-16" or len(beginning) % 4 == 0):
            return name
    if _is_utf8(beginning) or _is_narrow_with_nuls(beginning):
        return None
    readings: dict[str, str] = {}
    for encoding in _WIDE:
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(beginning)
        except UnicodeDecodeError:
            continue
        # Pairs of letters of another encoding may pass as ideographs, but hardly as plain characters.
        if _is_plausible(text) and _plain_characters(text):
            readings[encoding] = text
    return max(readings, key=lambda encoding: _plain_characters(readings[encoding]), default=None)


def _is_narrow_with_nuls(beginning: bytes) -> bool:
    """Whether these are one-byte characters, and U+0000 among them: UTF-16 and UTF-32 have more of it."""
    text = beginning.replace(b"\0", b"")
    return 4 * len(text) > 3 * len(beginning) and _is_plausible(text.decode(errors="ignore"))


def _is_plausible(text: str) -> bool:
    """Whether text hardly holds characters that are not there to be read."""
    read = sum(c in "\t\n\v\f\r\ufeff" or unicodedata.category(c)[0] != "C" for c in text)
    return bool(text) and read >= 0.98 * len(text)


def _plain_characters(text: str) -> float:
    """Share of the characters that occur in every long text of their script."""
    return sum(character.isascii() or character in _EAST_ASIAN_MARKS for character in text) / len(text)
