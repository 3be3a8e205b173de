"""Text to tokens: selection, split, tokenizer, token files, and what bad input is told."""

import hashlib
import json
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gdn_mup.corpus import sources
from gdn_mup.corpus.build import build_corpus
from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.documents import Document, is_validation, split, take_bytes
from gdn_mup.corpus.sources import select
from gdn_mup.corpus.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.errors import EXIT_MACHINE, UserError, ending

# A fraction of 0.3 of some fifty documents: whichever Python's library it is, neither part is ever empty.
SMALL = CorpusSettings(
    maximum_bytes=1_000_000, tokenizer_sample_bytes=200_000, vocabulary_size=320, validation_fraction=0.3
)
SENTENCES = [
    "the width of a model",
    "a learning rate that transfers",
    "heads and values",
    "größer ist besser 🙂",
]

text_values = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def from_files(*patterns: str, **more: object) -> CorpusSettings:
    """Settings of source `files`, small enough for a few sentences to learn a vocabulary from."""
    return CorpusSettings.model_validate(
        {"source": "files", "files": patterns, "vocabulary_size": 270, "validation_fraction": 0.3} | more
    )


def documents(settings: CorpusSettings, root: Path) -> Iterator[Document]:
    """The documents of a corpus whose relative paths start at `root`."""
    return select(settings, root, root / "downloads").documents


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> None:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of the standard library."""
    output = tmp_path_factory.mktemp("corpus")
    build_corpus(SMALL, Path("."), output, progress=False)
    return output


@pytest.fixture
def editable(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus to spoil."""
    for file in corpus.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / "train.tokens"


def message(action: object, *arguments: object) -> str:
    """The one line that a UserError holds."""
    with pytest.raises(UserError) as caught:
        result = action(*arguments)  # type: ignore[operator]
        if hasattr(result, "__next__"):
            list(result)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- sources ----


def test_stdlib_is_the_library_and_nothing_else() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    found = list(documents(CorpusSettings(maximum_bytes=10**9), Path(".")))
    by_name = {document.name: document for document in found}
    assert by_name["argparse.py"].text == (library / "argparse.py").read_bytes().decode()
    assert not any("-packages" in name or "_sysconfigdata" in name for name in by_name)
    assert [document.sha256 for document in found] == sorted({document.sha256 for document in found})


def test_stdlib_leaves_out_packages_build_records_and_what_is_not_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["a.py", "package/b.py"]
    left_out = ["site-packages/c.py", "dist-packages/d.py", "package/__pycache__/e.py", "_sysconfigdata__linux.py"]
    for name in [*kept, *left_out, "data.txt", "latin1.py"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes("é".encode("latin1") if name == "latin1.py" else name.encode())
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    assert sorted(document.name for document in documents(CorpusSettings(), Path("."))) == kept


def test_maximum_bytes_is_met_exactly_and_takes_the_lowest_hashes() -> None:
    everything = list(documents(CorpusSettings(maximum_bytes=10**9), Path(".")))
    some = list(documents(SMALL, Path(".")))
    assert sum(document.bytes for document in some) == SMALL.maximum_bytes
    assert some[:-1] == everything[: len(some) - 1]
    assert some[-1].sha256 == everything[len(some) - 1].sha256
    assert everything[len(some) - 1].text.startswith(some[-1].text)


@quick
@given(texts=st.lists(text_values, max_size=30), limit=st.integers(1, 400), shuffle=st.randoms())
def test_selection_and_split_do_not_depend_on_order_or_repeats(
    tmp_path: Path, texts: list[str], limit: int, shuffle: random.Random
) -> None:
    """One file in order, and many files in another order with every text twice, give the same documents."""
    write_jsonl(tmp_path / "once.jsonl", texts)
    twice = texts * 2
    shuffle.shuffle(twice)
    write_jsonl(tmp_path / "twice.jsonl", twice)
    once, shuffled = (
        [(document.text, document.sha256) for document in documents(from_files(name, maximum_bytes=limit), tmp_path)]
        for name in ("once.jsonl", "twice.jsonl")
    )
    assert once == shuffled
    # Against the plain way: sort all distinct non-blank texts by hash and cut.
    expected: list[str] = []
    left = limit
    for text in sorted({text for text in texts if text.strip()}, key=sha256):
        cut = text.encode()[:left].decode(errors="ignore")
        if left > 0 and cut.strip():
            expected.append(cut)
        left -= len(text.encode())
    assert [text for text, _ in once] == expected


@given(st.text(), st.floats(0.01, 0.98), st.floats(0.001, 0.01))
def test_a_larger_validation_fraction_keeps_those_held_out(text: str, fraction: float, more: float) -> None:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    assert is_validation(digest, fraction + more) or not is_validation(digest, fraction)


def test_the_share_held_out_is_the_fraction_also_among_the_lowest_hashes() -> None:
    """Cutting at `maximum_bytes` keeps the lowest hashes; a split by the same digits would be biased."""
    digests = sorted(sha256(str(i)) for i in range(20_000))
    for part in (digests, digests[:4000]):
        held_out = sum(is_validation(digest, 0.1) for digest in part) / len(part)
        assert held_out == pytest.approx(0.1, abs=0.02)  # four standard deviations for the smaller part


@given(st.lists(text_values), st.integers(1, 200))
def test_take_bytes_never_takes_more_and_cuts_between_characters(texts: list[str], limit: int) -> None:
    taken = list(take_bytes((Document("", text, "") for text in texts), limit))
    assert sum(document.bytes for document in taken) <= limit
    assert "".join(texts).startswith("".join(document.text for document in taken))


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain\r\ntext")
    (tmp_path / "deep" / "b.md").write_text("# heading")
    (tmp_path / "deep" / "er" / "C.PY").write_text("print()")
    (tmp_path / "d.jsonl").write_text('\ufeff{"body": "one"}\n\n{"body": null}\n{"body": " \\n"}\n{"body": "two"}\n')
    for name, kind in (("e", pyarrow.string()), ("f", pyarrow.large_string())):
        column = pyarrow.array([f"{name} row", None, "one"], kind)
        pyarrow.parquet.write_table(pyarrow.table({"body": column, "n": [1, 2, 3]}), tmp_path / f"{name}.parquet")
    found = {document.text: document.name for document in documents(from_files("**/*", field="body"), tmp_path)}
    assert set(found) == {"plain\r\ntext", "# heading", "print()", "one", "two", "e row", "f row"}
    assert found["two"] == f"{tmp_path / 'd.jsonl'}:5"
    assert found["f row"] == f"{tmp_path / 'f.parquet'}:1"


def test_patterns_may_be_absolute_or_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("words")
    monkeypatch.setenv("HOME", str(tmp_path))
    for pattern in (f"{tmp_path}/*.txt", "~/*.txt"):
        assert [document.text for document in documents(from_files(pattern), Path("/"))] == ["words"]


def test_messages_about_patterns(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.pdf").write_bytes(b"%PDF")

    def of(pattern: str) -> str:
        return message(documents, from_files(pattern), tmp_path)

    assert of("nothing/*.txt") == (
        f"corpus.files: 'nothing/*.txt': matches no file in {tmp_path}; correct the pattern "
        "(`**` descends, `~` is your home, `[[]` a bracket)"
    )
    assert "matches only directories; write e.g. texts/**/*.txt" in of("texts")
    wrong_kind = of("texts/*")
    assert (
        "'texts/*' matches" in wrong_kind and "a.pdf, which is none of .txt, .md, .py, .jsonl, .parquet" in wrong_kind
    )
    assert "narrow the pattern" in wrong_kind


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "broken', "not valid JSON (column 10: Unterminated string"),
        (b"[" * 100_000, "not valid JSON ("),
        (b'["text"]', 'list, not an object; write e.g. {"text": "…"}'),
        (b'{"body": "x", "id": 1}', "no field 'text'; set corpus.field to one that is there: 'body', 'id'"),
        (b'{"text": 3}', "field 'text' is int, not text; set corpus.field"),
        (b'{"text": "\\ud83d"}', "field 'text' holds half a surrogate pair (\\ud83d), which is no character"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at 13); if it is Western European text, convert it: `iconv"),
    ],
)
def test_messages_about_lines_of_jsonl(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    text = message(documents, from_files("a.jsonl"), tmp_path)
    assert text.startswith(f"{path}:3: ") and expected in text


def test_messages_about_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), path)
    missing = message(documents, from_files("*.parquet"), tmp_path)
    assert missing == f"{path}: no column 'text'; set corpus.field to one that holds text: 'body'"
    numbers = message(documents, from_files("*.parquet", field="n"), tmp_path)
    assert numbers == f"{path}: column 'n' is int64, not text; set corpus.field to one that is: 'body'"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs pyarrow; `pip install pyarrow`" in message(documents, from_files("*.parquet"), tmp_path)
    monkeypatch.undo()
    path.write_bytes(b"PAR1 and then nothing")
    assert f"{path}: not a whole Parquet file (" in message(documents, from_files("*.parquet"), tmp_path)


def test_messages_about_files_that_are_not_utf8_or_not_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("naïve".encode("latin1"))
    text = message(documents, from_files("*.txt"), tmp_path)
    assert (
        text.startswith(f"{path}: not UTF-8 (byte 0xef at 2)")
        and f"`iconv -f WINDOWS-1252 -t UTF-8 {path} > {path}.new && mv {path}.new {path}`" in text
    )

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert message(documents, from_files("*.txt"), tmp_path) == f"{path}: cannot be read: Permission denied"


def test_messages_about_an_empty_part() -> None:
    texts = [Document(str(i), str(i), sha256(str(i))) for i in range(3)]
    no_validation = message(split, texts, 1e-9)
    assert no_validation.startswith(
        "corpus.validation_fraction: 1e-09 of 3 documents leaves none for validation; raise"
    )
    assert "leaves none for training; lower it" in message(split, texts, 1 - 1e-9)
    assert "of 1 document leaves" in message(split, texts[:1], 0.5)
    assert "every document is blank" in message(split, [], 0.5)


def test_message_when_the_library_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    text = message(documents, CorpusSettings(), Path("."))
    assert f"`stdlib` finds no .py files in {tmp_path}" in text and "or source `files`" in text


# ---- tokenizer ----


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from([END_OF_TEXT, f"a{END_OF_TEXT}b"]))
@quick
def test_any_text_comes_back_and_never_contains_the_end_of_text(corpus: Path, text: str) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id(END_OF_TEXT) not in ids
    assert tokenizer.get_vocab_size() == SMALL.vocabulary_size


@pytest.mark.parametrize("parallelism", ["true", "false"])
def test_the_same_text_gives_the_same_bytes_whatever_the_threads(
    corpus: Path, tmp_path: Path, parallelism: str
) -> None:
    build = (
        "from pathlib import Path; from gdn_mup.corpus.config import CorpusSettings; "
        "from gdn_mup.corpus.build import build_corpus; import sys; "
        f"build_corpus(CorpusSettings.model_validate_json({SMALL.model_dump_json()!r}), Path('.'), "
        f"Path({str(tmp_path)!r}), progress=False); "
        "assert not {'torch', 'pyarrow', 'gdn_mup.model', 'gdn_mup.training'} & set(sys.modules)"
    )
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": parallelism,
        "PYTHONHASHSEED": parallelism[-1:].replace("e", "7"),
    }
    subprocess.run([sys.executable, "-c", build], check=True, env=environment)
    names = sorted(path.name for path in corpus.iterdir())
    assert names == ["tokenizer.json", "train.json", "train.tokens", "validation.json", "validation.tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes(), name


def test_messages_about_tokenizers(tmp_path: Path) -> None:
    few = message(train_tokenizer, ["abab abab"], SMALL)
    assert few.startswith("corpus.vocabulary_size: 320 is more than the text supports: its training sample gave 25")
    assert "or raise corpus.tokenizer_sample_bytes (200000)" in few
    path = tmp_path / "tokenizer.json"
    assert message(load_tokenizer, path) == f"{path}: no such tokenizer; `gdn-mup corpus` writes it"
    path.write_text("{}")
    assert message(load_tokenizer, path).startswith(f"{path}: not a tokenizer (")


# ---- tokens ----


def test_tokens_decode_to_the_documents_each_ended(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = split(documents(SMALL, Path(".")), SMALL.validation_fraction)
    for name, expected in zip(("train", "validation"), parts, strict=True):
        tokens = TokenFile.open(corpus / f"{name}.tokens")
        ends = np.flatnonzero(tokens.array == end)
        assert ends[-1] == tokens.tokens - 1
        starts = [0, *(ends[:-1] + 1)]
        decoded = [tokenizer.decode(tokens.array[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
        assert decoded == [document.text for document in expected]
        assert tokens.sidecar.documents == len(expected)
        assert tokens.bytes_per_token == sum(document.bytes for document in expected) / tokens.tokens
        assert tokens.sha256 == hashlib.sha256((corpus / f"{name}.tokens").read_bytes()).hexdigest()
        record = (corpus / "tokenizer.json").read_bytes()
        assert tokens.sidecar.tokenizer_sha256 == hashlib.sha256(record).hexdigest()
        assert tokens.sidecar.settings == SMALL.model_dump(mode="json")


def test_a_long_document_gives_the_tokens_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is encoded in pieces; the pieces must not show."""
    generator = random.Random(1)
    words = [
        "width",
        " ",
        "\n",
        "\n\n",
        "\t",
        "'s",
        "日本",
        "0.5",
        ";",
        "\r\n",
        "\u2003",
        "\x1c",
        "\x85",
        "é",
        "{}",
    ]
    long = "".join(generator.choices(words, k=50_000))
    monkeypatch.setattr("gdn_mup.corpus.encoding.PIECE_CHARACTERS", 10)
    (tmp_path / "long.txt").write_bytes(long.encode())
    # The vocabulary is learnt from the like, so that tokens such as two line breaks exist to be torn apart.
    write_jsonl(tmp_path / "short.jsonl", ["".join(generator.choices(words, k=500)) for _ in range(30)])
    train, validation = build_corpus(
        from_files("*.txt", "*.jsonl", vocabulary_size=300), tmp_path, tmp_path / "out", progress=False
    )
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    part = validation if is_validation(sha256(long), 0.3) else train
    whole = np.array(tokenizer.encode(long).ids, dtype=part.array.dtype)
    end = tokenizer.token_to_id(END_OF_TEXT)
    ends = np.flatnonzero(part.array == end)
    starts = np.concatenate([[0], ends[:-1] + 1])
    longest = np.argmax(ends - starts)
    assert np.array_equal(part.array[starts[longest] : ends[longest]], whole)


def test_a_vocabulary_beyond_two_bytes_is_stored_in_four(tmp_path: Path) -> None:
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=24)) for _ in range(8_000)]
    write_jsonl(tmp_path / "a.jsonl", [" ".join([*words[i::8]] * 2) for i in range(8)])
    for size, dtype in ((65536, "uint16"), (65537, "uint32")):
        train, _ = build_corpus(from_files("a.jsonl", vocabulary_size=size), tmp_path, tmp_path, progress=False)
        assert train.sidecar.dtype == dtype == train.array.dtype.name
        assert train.vocabulary_size == size
        assert (int(train.array.max()) < size) and train.path.stat().st_size == train.tokens * train.array.itemsize


@given(
    seed=st.integers(0, 2**40),
    step=st.integers(0, 2**31),
    batch_size=st.integers(1, 6),
    context_length=st.integers(1, 64),
    others=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3),
)
@quick
def test_batches_are_functions_of_seed_and_step(
    corpus: Path, seed: int, step: int, batch_size: int, context_length: int, others: list[tuple[int, int]]
) -> None:
    first, second = (TokenFile.open(corpus / "train.tokens", verify=False) for _ in range(2))
    for other_seed, other_step in others:
        second.batch(other_seed, other_step, 3, 7)
    batch = first.batch(seed, step, batch_size, context_length)
    assert batch.dtype == np.int64 and batch.shape == (batch_size, context_length + 1)
    assert np.array_equal(batch, second.batch(seed, step, batch_size, context_length))
    assert np.array_equal(batch, second.batch(seed, step, batch_size + 1, context_length)[:-1])
    windows = np.lib.stride_tricks.sliding_window_view(first.array, context_length + 1)
    assert all((windows == sequence).all(axis=1).any() for sequence in batch[:1])


@pytest.fixture
def counting(tmp_path: Path) -> TokenFile:
    """A token file in which token i is i."""
    array = np.arange(1000, dtype="<u2")
    (tmp_path / "train.tokens").write_bytes(array.tobytes())
    record = {
        "source": "test",
        "settings": {},
        "tokenizer_sha256": "",
        "vocabulary_size": 1000,
        "dtype": "uint16",
    }
    record |= {
        "tokens": 1000,
        "documents": 1,
        "bytes": 2500,
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
    }
    (tmp_path / "train.json").write_text(json.dumps(record))
    return TokenFile.open(tmp_path / "train.tokens")


def test_batches_differ_by_step_and_seed_and_reach_every_offset(counting: TokenFile) -> None:
    offsets = {(seed, step): tuple(counting.batch(seed, step, 4, 9)[:, 0]) for seed in range(5) for step in range(5)}
    assert len(set(offsets.values())) == 25
    many = counting.batch(0, 0, 20_000, 989)
    assert set(many[:, 0]) == set(range(11))  # 1000 tokens hold 11 sequences of 990
    assert np.bincount(many[:, 0]).min() > 1500
    assert (np.diff(many, axis=1) == 1).all()


def test_batches_are_the_same_in_every_release(counting: TokenFile) -> None:
    """Published results hang on this order of the data: if it must change, that is a breaking change."""
    assert counting.batch(0, 0, 4, 9)[:, 0].tolist() == [87, 732, 614, 770]
    assert counting.batch(1, 7, 4, 9)[:, 0].tolist() == [565, 295, 94, 353]


def test_fixed_batches_are_evenly_spaced(counting: TokenFile) -> None:
    batches = counting.fixed_batches(count=3, batch_size=4, context_length=9)
    assert batches.shape == (3, 4, 10) and batches.dtype == np.int64
    assert batches[..., 0].ravel().tolist() == [0, 90, 180, 270, 360, 450, 540, 630, 720, 810, 900, 990]
    assert counting.fixed_batches(1, 1, 999)[0, 0].tolist() == list(range(1000))


def test_bytes_per_token(counting: TokenFile) -> None:
    assert counting.bytes_per_token == 2.5


def test_message_when_shorter_than_one_sequence(counting: TokenFile) -> None:
    for action in (lambda: counting.batch(0, 0, 1, 1000), lambda: counting.fixed_batches(1, 1, 1000)):
        text = message(action)
        assert text == (
            f"{counting.path}: 1000 tokens are fewer than one sequence of training.context_length 1000 and "
            "its target; use at most 999, or more text"
        )


def test_messages_about_token_files(editable: Path) -> None:
    sidecar = editable.with_suffix(".json")
    record = json.loads(sidecar.read_text())
    content = editable.read_bytes()

    def opened(**changes: object) -> str:
        sidecar.write_text(json.dumps(record | changes))
        return message(TokenFile.open, editable)

    largest = int(np.frombuffer(content, "<u2").max())
    assert opened(vocabulary_size=largest) == (
        f"{editable}: token id {largest} is not below vocabulary_size {largest}; "
        "build the corpus again with `gdn-mup corpus`"
    )
    assert f"but train.json says {2 * len(content)} " in opened(dtype="uint32")
    assert "sha256: Input should be a valid string; build" in opened(sha256=None)
    assert f"{sidecar}: dtype: " in opened(dtype="float32")
    editable.write_bytes(content[:-2] + bytes([content[-2] ^ 1, 0]))
    assert opened() == (
        f"{editable}: its sha256 is not the one in train.json; build the corpus again with `gdn-mup corpus`"
    )
    TokenFile.open(editable, verify=False)
    editable.write_bytes(content[:-1])
    assert f"{editable}: {len(content) - 1} bytes, but train.json says {len(content)} " in opened()
    sidecar.write_text("{")
    assert f"{sidecar}: JSON: " in message(TokenFile.open, editable)
    sidecar.unlink()
    assert f"{sidecar}: missing: it says what train.tokens holds; build" in message(TokenFile.open, editable)
    editable.unlink()
    assert message(TokenFile.open, editable) == f"{editable}: no such token file; `gdn-mup corpus` builds it"


# ---- building ----


def test_a_failed_build_writes_nothing(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", SENTENCES)
    message(build_corpus, from_files("*.jsonl", vocabulary_size=5000), tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_build_leaves_the_corpus_before_it(editable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in editable.parent.iterdir()}

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gdn_mup.corpus.build.encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(SMALL.model_copy(update={"maximum_bytes": 900_000}), Path("."), editable.parent, progress=False)
    assert {path.name: path.read_bytes() for path in editable.parent.iterdir()} == before


def test_message_when_the_output_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError) as caught:
        build_corpus(SMALL, tmp_path, tmp_path / "out", progress=False)
    line = f"error: {tmp_path / 'out'}: File exists; it is no folder: name another place"
    assert ending(caught.value) == (line, EXIT_MACHINE)


def test_progress_is_bars_or_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"{sentence} {i}" for sentence in SENTENCES for i in range(20)])
    with caplog.at_level("INFO", logger="gdn_mup.corpus.build"):
        build_corpus(from_files("a.jsonl"), tmp_path, tmp_path / "plain")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == ["Reading text", "Learning the vocabulary"] and lines[2].startswith("Encoding train (")
    assert "bytes/token" in lines[-1]
    assert capsys.readouterr().err == ""
    build_corpus(from_files("a.jsonl"), tmp_path, tmp_path / "bars", progress=True)
    assert "Encoding validation" in capsys.readouterr().err
