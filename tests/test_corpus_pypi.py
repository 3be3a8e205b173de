"""Source `pypi`: pinned wheels, fetched by pip from a folder here, become text; near-duplicates go."""

import hashlib
import http.server
import json
import os
import random
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reliability import is_said_as
from workflow_copy import ROOT, WorkflowCopy

from gdn_mup.corpus import pypi
from gdn_mup.corpus.build import build_corpus
from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.documents import Document
from gdn_mup.corpus.near_duplicates import drop_near_duplicates
from gdn_mup.corpus.pypi import fetch, package_texts, read_pins
from gdn_mup.corpus.sources import select
from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.errors import MachineError, UserError

HASH = "0" * 64


def make_wheel(
    folder: Path, name: str, members: dict[str, bytes], metadata: str = "", tag: str = "py3-none-any"
) -> str:
    """A wheel that pip accepts, and the line that pins it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-{tag}.whl"
    information = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}\n")
        archive.writestr(f"{information}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{information}/RECORD", "")
    return f"{name}==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def distinct_text(seed: int, lines: int = 40) -> str:
    generator = random.Random(seed)
    return "".join(f"x{generator.getrandbits(64)} = {generator.getrandbits(32)}\n" for _ in range(lines))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, which is all that pip sees."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(pypi.time, "sleep", lambda seconds: None)
    return tmp_path / "index"


def failure(requirements: Path, downloads: Path) -> str:
    """The one line that fetching fails with."""
    with pytest.raises(UserError) as caught:
        fetch(requirements, downloads)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- pins ----


def test_pins_are_read_in_pips_own_format(tmp_path: Path) -> None:
    path = tmp_path / "pins.txt"
    path.write_text(f"# words\n\none==1.0 --hash=sha256:{HASH}  # why\nTwo[x]==2.1 \\\n    --hash=sha256:{HASH}\n")
    assert [tuple(pin) for pin in read_pins(path)] == [("one", "1.0", HASH), ("Two", "2.1", HASH)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one==1.0\n", "'one==1.0': pin one wheel with its hash"),
        (f"one>=1.0 --hash=sha256:{HASH}\n", "pin one wheel with its hash"),
        (f"one==1.* --hash=sha256:{HASH}\n", "pin one wheel with its hash"),
        (f"one==1.0 --hash=sha256:{HASH} --hash=sha256:{HASH}\n", "pin one wheel with its hash"),
        ("one==1.0 --hash=sha256:abc\n", "pin one wheel with its hash"),
        ("--index-url x\n", "'--index-url x': pin one wheel"),
        (f"one==1.0 --hash=sha256:{HASH}\none==1.1 --hash=sha256:{HASH}\n", "one is pinned twice"),
        ("# nothing\n", "pins no package; write lines such as"),
        (None, "cannot be read: "),
    ],
)
def test_messages_about_pins(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "pins.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_pins(path)
    assert str(path) in str(caught.value) and expected in str(caught.value) and "\n" not in str(caught.value)


def test_the_pins_that_ship_are_pins() -> None:
    assert len(read_pins(ROOT / "config/corpora/pypi.txt")) >= 12


# ---- fetching ----


def test_wheels_of_one_platform_are_fetched_everywhere_and_only_once(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = tmp_path / "pins.txt"
    tag = f"cp313-cp313-{pypi.PLATFORMS[-1]}"
    requirements.write_text(
        make_wheel(index, "one", {"one.py": b"1"}, "License-Expression: MIT\nLicense: no")
        + make_wheel(index, "two", {"two.py": b"2"}, "License: Long\n        text\n", tag)
        + make_wheel(index, "three", {"three.py": b"3"}, "License: UNKNOWN\nClassifier: License :: OSI Approved :: BSD")
    )
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("one<1\n")  # the user's own, on what to install
    monkeypatch.setenv("PIP_CONSTRAINT", str(constraints))
    downloads = tmp_path / "downloads"
    wheels = fetch(requirements, downloads)
    assert [(wheel.name, wheel.licence) for wheel in wheels] == [("one", "MIT"), ("two", "Long"), ("three", "BSD")]
    assert json.loads((downloads / "packages.json").read_text()) == [wheel._asdict() for wheel in wheels]
    assert {path.name for path in downloads.iterdir()} == {wheel.file for wheel in wheels} | {"packages.json"}

    fetched: list[str] = []
    download = pypi._pip_download
    monkeypatch.setattr(pypi, "_pip_download", lambda pin, folder: fetched.append(pin.name) or download(pin, folder))
    (downloads / wheels[1].file).write_bytes(b"broken off")
    assert fetch(requirements, downloads) == wheels
    assert fetched == ["two"]


def test_a_download_that_breaks_off_is_tried_again(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = tmp_path / "pins.txt"
    requirements.write_text(make_wheel(index, "one", {"one.py": b"1"}))
    outcomes = iter(["ERROR: Connection broken", "ERROR: Connection broken"])
    download = pypi._pip_download
    monkeypatch.setattr(pypi, "_pip_download", lambda pin, folder: next(outcomes, None) or download(pin, folder))
    assert len(fetch(requirements, tmp_path / "downloads")) == 1
    assert next(outcomes, None) is None

    monkeypatch.setattr(pypi, "_pip_download", lambda pin, folder: "noise\nERROR: Connection broken\n")
    with pytest.raises(MachineError) as caught:
        fetch(requirements, tmp_path / "others")
    is_said_as(caught.value, "a download that breaks off")
    assert "(Connection broken)" in str(caught.value)
    assert list((tmp_path / "others").iterdir()) == []


def test_a_download_that_really_breaks_off(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a server that closes its connections half-way, and then no more; what is whole is not fetched again."""
    requirements, downloads = tmp_path / "pins.txt", tmp_path / "downloads"
    requirements.write_text(
        make_wheel(index, "one", {"one.py": b"1"}) + make_wheel(index, "two", {"two.py": random.randbytes(100_000)})
    )
    asked: list[str] = []
    broken = True

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wheel = index / Path(self.path).name
            asked.append(wheel.name)
            name = f"{wheel.name}-1.0-py3-none-any.whl"
            data = wheel.read_bytes() if wheel.is_file() else f'<a href="/{name}">{name}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if data.startswith(b"<") else "application/zip")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            breaks = broken and wheel.name.startswith("two-")
            self.wfile.write(data[: 20_000 + len(asked)] if breaks else data)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.delenv(name, raising=False)
        settings = {"PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}", "PIP_RETRIES": "0"}
        for name, value in (settings | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(MachineError) as caught:
            fetch(requirements, downloads)
        is_said_as(caught.value, "a download that breaks off")
        assert [path.name for path in downloads.iterdir()] == ["one-1.0-py3-none-any.whl"]
        asked.clear()
        broken = False
        assert len(fetch(requirements, downloads)) == 2
        assert not any(name.startswith("one") for name in asked)
        server.shutdown()


def test_messages_about_wheels_that_are_not_the_pinned_ones(tmp_path: Path, index: Path) -> None:
    requirements = tmp_path / "pins.txt"
    pin = make_wheel(index, "one", {"one.py": b"1"})
    requirements.write_text(pin[:-65] + HASH)
    actual = pin.strip().rpartition(":")[2]
    with pytest.raises(UserError) as caught:
        fetch(requirements, tmp_path / "downloads")
    is_said_as(caught.value, "another file than the pinned one")
    assert f"(sha256 {HASH}, got {actual})" in str(caught.value)
    requirements.write_text(f"absent==1.0 --hash=sha256:{HASH}")
    text = failure(requirements, tmp_path / "downloads")
    assert "absent==1.0: pip cannot fetch it (Could not find a version that satisfies" in text
    assert "check the network" in text


# ---- text ----


def test_only_source_text_is_read_and_names_are_labels(tmp_path: Path) -> None:
    members = {
        "b/b.py": b"b",
        "../../escape.py": b"escape",
        "/absolute.md": b"absolute",
        "a.PYX": b"a",
        "data.csv": b"1,2",
        "notes.txt": b"3 4",
        "binary.so": b"\x7fELF",
        "latin1.py": "é".encode("latin1"),
        "huge.py": b"#" * (pypi.MEMBER_BYTES + 1),
        "one-1.0.dist-info/LICENSE.md": b"licence",
    }
    make_wheel(tmp_path, "one", members)
    before = sorted(tmp_path.iterdir())
    wheel = pypi.Wheel("one", "1.0", HASH, "one-1.0-py3-none-any.whl", "MIT")
    assert dict(package_texts([wheel], tmp_path)) == {
        "one/../../escape.py": "escape",
        "one//absolute.md": "absolute",
        "one/a.PYX": "a",
        "one/b/b.py": "b",
    }
    assert sorted(tmp_path.iterdir()) == before


def near_duplicates_dropped(*texts: str) -> list[int]:
    """Positions of those dropped."""
    dropped: list[Document] = []
    kept = list(drop_near_duplicates((Document(str(i), text, "") for i, text in enumerate(texts)), dropped))
    assert len(kept) + len(dropped) == len(texts)
    return [int(document.name) for document in dropped]


def test_a_document_that_mostly_repeats_others_is_dropped() -> None:
    first, second, third = (distinct_text(seed) for seed in range(3))
    lines = first.splitlines()
    edited = "\n".join(f"    {line}\n" for line in lines).replace(lines[20], "y = 1")
    assert near_duplicates_dropped(first, second, edited) == [2]  # indented, spaced and edited
    assert near_duplicates_dropped(first, second, first + second) == [2]  # put together from two
    assert near_duplicates_dropped(first, second, first + second + third * 4) == [2]  # repeating oneself adds nothing
    assert near_duplicates_dropped(first, first + second + third) == []  # two thirds are new
    shuffled = "\n".join(sorted(lines))
    assert near_duplicates_dropped(first, shuffled) == []  # the same lines, in another order, say something else
    assert near_duplicates_dropped("import a\n", "\n\nimport a", "import b") == [1]


@given(st.lists(st.text("ab\n ", max_size=12)))
def test_near_duplicates_are_found_as_by_definition(texts: list[str]) -> None:
    kept: list[set[str]] = []
    expected = []
    for position, text in enumerate(texts):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        windows = {"\n".join(lines[i : i + 3]) for i in range(max(1, len(lines) - 2))}
        if 2 * len(windows & set().union(*kept)) >= len(windows):
            expected.append(position)
        else:
            kept.append(windows)
    assert near_duplicates_dropped(*texts) == expected


def test_a_corpus_of_packages_says_what_it_is_made_of(tmp_path: Path, index: Path) -> None:
    texts = [distinct_text(seed) for seed in range(30)]
    (tmp_path / "pins.txt").write_text(
        make_wheel(index, "one", {f"{i}.py": text.encode() for i, text in enumerate(texts[:15])}, "License: MIT")
        + make_wheel(index, "two", {f"{i}.py": text.encode() for i, text in enumerate([*texts[10:], texts[0] + "z"])})
    )
    settings = CorpusSettings(
        source="pypi", requirements="pins.txt", vocabulary_size=300, validation_fraction=0.3, maximum_bytes=10**6
    )
    parts = build_corpus(settings, tmp_path, tmp_path / "corpus", progress=False)
    for part in parts:
        provenance = TokenFile.open(part.path).sidecar.provenance
        assert provenance["packages"] == json.loads((tmp_path / "corpus/downloads/packages.json").read_text())
        assert provenance["packages"][0]["licence"] == "MIT"
        assert provenance["read"]["documents"] == 31 and provenance["near_duplicates"]["documents"] == 1
        assert part.sidecar.source == "packages pinned in pins.txt"
    assert sum(part.sidecar.documents for part in parts) == 30
    # A smaller corpus is a part of the larger one: what is a near-duplicate does not hang on the limit.
    everything = [document.sha256 for document in select(settings, tmp_path, tmp_path / "corpus/downloads").documents]
    smaller = settings.model_copy(update={"maximum_bytes": 5000})
    some = [document.sha256 for document in select(smaller, tmp_path, tmp_path / "corpus/downloads").documents]
    assert 1 < len(some) < len(everything) and some == everything[: len(some)]


# ---- settings, and the workflow ----


def test_keys_of_another_source_do_not_change_a_jobs_settings() -> None:
    assert "requirements" not in CorpusSettings().model_dump()
    settings = CorpusSettings(source="pypi", requirements="pins.txt")
    assert settings.model_dump()["requirements"] == "pins.txt"
    assert CorpusSettings.model_validate(settings.model_dump()) == settings
    with pytest.raises(ValueError, match="`requirements` is only read by source `pypi`, but source is `stdlib`"):
        CorpusSettings(requirements="pins.txt")
    with pytest.raises(ValueError, match="source `pypi` needs a requirements file"):
        CorpusSettings(source="pypi")


@pytest.mark.workflow
def test_the_workflow_fetches_once_and_builds_again_when_pins_change(
    workflow: WorkflowCopy, index: Path, tmp_path: Path
) -> None:
    members = {f"{i}.py": distinct_text(i).encode() for i in range(20)}
    pins = workflow.folder / "pins.txt"
    pins.write_text(make_wheel(index, "one", members))
    (workflow.folder / "config/studies/packages.yaml").write_text(
        "corpus: {source: pypi, requirements: pins.txt, vocabulary_size: 300, validation_fraction: 0.3}\n"
    )
    target = "results/packages/corpus/train.tokens"
    assert workflow.planned(target) == {"fetch_packages": 1, "corpus": 1}
    run = workflow.snakemake("--cores", "1", target)
    assert run.returncode == 0, run.stdout
    assert workflow.planned(target) == {}
    pins.write_text(pins.read_text() + make_wheel(index, "two", members))
    assert workflow.planned(target) == {"fetch_packages": 1, "corpus": 1}
