"""What is trained on is what the user meant: odd files are read right, or refused with a cure that can be pasted."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reliability import is_said_as
from workflow_copy import HANGS

from gdn_mup.corpus.build import build_corpus
from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.documents import Document, is_validation
from gdn_mup.corpus.huggingface import Stream
from gdn_mup.corpus.patterns import matching_files
from gdn_mup.corpus.sources import select
from gdn_mup.corpus.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from gdn_mup.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, MachineError, UserError

WORDS = ["width", "rate", "gate", "head", "norm", "state", "decay", "loss"]
SMALL = {"vocabulary_size": 270, "validation_fraction": 0.3}
ENGLISH = "The width of a model\nand its learning rate.\n" * 20
GERMAN = "Größe und Übertragung der Lernrate.\n" * 20
RUSSIAN = "Ширина модели и скорость обучения.\n" * 20
CHINESE = "模型的宽度，学习率和门控。\n一是一，二是二。" * 20
NO_LINES = "模型的宽度，学习率和门控。一是一。" * 20


def sentences(count: int = 40, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(5, 60))) for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With `good.jsonl`: forty documents."""
    lines = (json.dumps({"text": text}) for text in sentences())
    (tmp_path / "good.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def of_files(*patterns: str, **more: object) -> CorpusSettings:
    return CorpusSettings.model_validate({"source": "files", "files": patterns} | SMALL | more)


def of_hub(dataset: str, **more: object) -> CorpusSettings:
    return CorpusSettings.model_validate({"source": "huggingface", "dataset": dataset} | SMALL | more)


def texts(root: Path, *patterns: str) -> set[str]:
    return {document.text for document in select(of_files(*patterns), root, root / "downloads").documents}


def refusal(read: Callable[[], object]) -> str:
    """The line with which it is refused: bad input, exit code 2."""
    with pytest.raises(UserError) as caught:
        read()
    line = str(caught.value)
    assert caught.value.exit_code == EXIT_BAD_INPUT and "\n" not in line, line
    assert "start again" not in line and "network" not in line
    return line


def paste(line: str) -> None:
    """Run the command that a line names in backquotes."""
    (command,) = re.findall("`([^`]+)`", line)
    subprocess.run(["bash", "-ec", command], check=True, timeout=HANGS)


# ---- encodings ----


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", [ENGLISH, GERMAN, RUSSIAN, CHINESE, NO_LINES, "w\n"])
@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_wide_text_is_named_and_its_cure_gives_the_text(folder: Path, encoding: str, text: str, suffix: str) -> None:
    path = folder / f"it's a{suffix}"
    path.write_bytes(text.encode(encoding))
    line = refusal(lambda: texts(folder, "*.jsonl", f"*{suffix}"))
    assert f"UTF-{encoding[4:6]}" in line and str(path) in line
    paste(line)
    assert text in texts(folder, f"*{suffix}")


def test_big_endian_text_with_a_mark_is_wide_text_too(folder: Path) -> None:
    for mark, encoding in ((b"\xfe\xff", "utf-16-be"), (b"\0\0\xfe\xff", "utf-32-be")):
        (folder / "a.txt").write_bytes(mark + GERMAN.encode(encoding))
        paste(refusal(lambda: texts(folder, "*.txt")))
        assert texts(folder, "*.txt") == {GERMAN}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_jsonl_is_named_and_its_cure_gives_the_documents(folder: Path, encoding: str) -> None:
    lines = (json.dumps({"text": text + " größer"}, ensure_ascii=False) for text in sentences())
    (folder / "good.jsonl").write_bytes("\n".join(lines).encode(encoding))
    line = refusal(lambda: texts(folder, "*.jsonl"))
    assert "UTF-" in line and "JSON" not in line
    paste(line)
    assert len(texts(folder, "*.jsonl")) == 40


@pytest.mark.parametrize("encoding", ["latin1", "cp1252", "gb18030", "shift_jis", "koi8-r", "big5"])
def test_other_encodings_are_refused_and_not_taken_for_wide_ones(folder: Path, encoding: str) -> None:
    text = {"latin1": GERMAN, "cp1252": GERMAN, "koi8-r": RUSSIAN}.get(encoding, "日本中文" * 40 + "。\n")
    (folder / "a.txt").write_bytes(text.encode(encoding))
    line = refusal(lambda: texts(folder, "*.txt"))
    assert "not UTF-8 (byte 0x" in line and "UTF-16" not in line
    if encoding in ("latin1", "cp1252"):
        paste(line)
        assert texts(folder, "*.txt") == {GERMAN}


@pytest.mark.parametrize("text", [ENGLISH, GERMAN, RUSSIAN, CHINESE, NO_LINES, "w", "一", "\ufeffw"])
def test_utf8_is_read_as_it_is(folder: Path, text: str) -> None:
    (folder / "a.txt").write_bytes(text.encode("utf-8-sig" if len(text) > 10 else "utf-8"))
    assert texts(folder, "*.txt") == {text.removeprefix("\ufeff")}


def test_nulls_are_no_text_and_their_cure_leaves_the_rest(folder: Path) -> None:
    for content in (b"a log\n" + bytes(5000), b"width\0 and rate, and what follows\n" * 9, bytes(200_000)):
        (folder / "a.txt").write_bytes(content)
        line = refusal(lambda: texts(folder, "*.txt"))
        assert "U+0000" in line
        paste(line)
        assert (folder / "a.txt").read_bytes() == content.replace(b"\0", b"")


def test_records_may_hold_a_null_but_not_be_made_of_them(folder: Path) -> None:
    def write(text: str) -> None:
        (folder / "a.jsonl").write_text(json.dumps({"text": text}))
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), folder / "a.parquet")

    write("width\0rate and more")
    assert texts(folder, "a.*") == {"width\0rate and more"}
    write("width and rate".encode("utf-16-le").decode())
    assert f"{folder}/a.jsonl:1: field 'text' is U+0000 to" in refusal(lambda: texts(folder, "a.jsonl"))
    assert f"{folder}/a.parquet:1: column 'text' is U+0000 to" in refusal(lambda: texts(folder, "a.parquet"))


# ---- files that stand for others, and files of other formats ----

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".jsonl", ".parquet"])
@pytest.mark.parametrize("pointer", [POINTER, b"/annex/objects/SHA256E-s5--ab.txt\n"])
def test_pointers_are_not_the_text(folder: Path, suffix: str, pointer: bytes) -> None:
    path = folder / f"p{suffix}"
    path.write_bytes(pointer)
    line = refusal(lambda: texts(folder, f"p{suffix}"))
    assert line.startswith(f"{path}: a pointer of git-") and f"`git -C {folder} " in line


def test_a_text_about_pointers_is_a_text(folder: Path) -> None:
    (folder / "a.md").write_bytes(POINTER + ENGLISH.encode() * 30)
    assert len(texts(folder, "*.md")) == 1


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_pointers_in_a_folder_of_a_dataset(folder: Path, suffix: str) -> None:
    (folder / "hub").mkdir()
    (folder / "hub" / f"train{suffix}").write_bytes(POINTER)
    assert "a pointer of git-lfs" in refusal(lambda: list(Stream(of_hub("hub"), folder).documents()))


@pytest.mark.parametrize("start", [b"PAR1", b"\x1f\x8b\x08", b"PK\x03\x04", b"%PDF-1.7\n"])
def test_other_formats_are_named(folder: Path, start: bytes) -> None:
    (folder / "a.txt").write_bytes(start + bytes(range(256)))
    assert ", not text; unpack or convert it" in refusal(lambda: texts(folder, "*.txt"))
    (folder / "a.txt").write_text(text := "PAR1 is how a file of Parquet begins")
    assert texts(folder, "*.txt") == {text}


# ---- columns ----


def bad_bytes() -> pyarrow.Array:
    raw = pyarrow.array([*(text.encode() for text in sentences(50)), b"caf\xe9", b"more"], pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())


def write_parquet(path: Path, **columns: object) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_bytes_that_are_not_text_are_refused_with_their_row(folder: Path) -> None:
    write_parquet(folder / "hub/train.parquet", text=bad_bytes())
    said = "column 'text' is not UTF-8 (byte 0xe9 at 3), as text in Parquet must be; write it again"
    assert f"{folder}/hub/train.parquet:51: {said}" in refusal(lambda: texts(folder, "hub/*.parquet"))
    assert f"hub: row 51: {said}" in refusal(lambda: list(Stream(of_hub("hub"), folder).documents()))


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip", "none"])
def test_a_file_that_is_damaged_stays_damaged(folder: Path, compression: str) -> None:
    """Whatever is said of it, no retry helps."""
    (folder / "hub").mkdir()
    path, chosen = folder / "hub/train.parquet", random.Random(0)
    pyarrow.parquet.write_table(pyarrow.table({"text": sentences(900)}), path, compression=compression)
    whole = path.read_bytes()
    refused = 0
    for attempt in range(12):
        data = bytearray(whole)
        for _ in range(20):
            data[chosen.randrange(len(data))] ^= chosen.randrange(1, 256)
        path.write_bytes(data if attempt % 3 else whole[: chosen.randrange(len(whole))])
        for read in (lambda: texts(folder, "hub/*"), lambda: list(Stream(of_hub("hub"), folder).documents())):
            try:
                read()
            except UserError:
                refusal(read)
                refused += 1
    assert refused > 12


NULLS = pyarrow.nulls(30)
DIFFERENT = {
    "a null column first": ({"text": NULLS}, {}),
    "a null column after": ({}, {"text": NULLS}),
    "one column more": ({}, {"more": ["x"] * 30}),
    "another type in a column that is not read": ({"n": list(range(30))}, {"n": ["x"] * 30}),
    "nulls in a column that is not read": ({"n": NULLS}, {"n": ["x"] * 30}),
    "large strings": ({}, {"text": pyarrow.array(sentences(30, 2), pyarrow.large_string())}),
    "a dictionary": ({}, {"text": pyarrow.array(sentences(30, 2)).dictionary_encode()}),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_files_may_differ_in_what_is_not_read(folder: Path, case: str) -> None:
    parts = [{"text": sentences(30, seed)} | change for seed, change in zip((1, 2), DIFFERENT[case], strict=True)]
    for number, part in enumerate(parts):
        write_parquet(folder / f"hub/train-{number}.parquet", **part)
    expected = {text for seed, part in enumerate(parts, 1) for text in sentences(30, seed) if part["text"] is not NULLS}
    assert texts(folder, "hub/*.parquet") == expected
    assert {document.text for document in Stream(of_hub("hub"), folder).documents()} == expected


def test_files_that_differ_in_what_is_read_are_refused(folder: Path) -> None:
    write_parquet(folder / "hub/train-0.parquet", text=sentences(30))
    for other, said in (({"text": list(range(30))}, "is int64, not text"), ({"body": ["x"]}, "has no column 'text'")):
        write_parquet(folder / "hub/train-1.parquet", **other)
        assert said in refusal(lambda: list(Stream(of_hub("hub"), folder).documents()))


def test_a_column_of_nothing_is_no_text(folder: Path) -> None:
    write_parquet(folder / "a.parquet", text=NULLS)
    line = refusal(lambda: build_corpus(of_files("a.parquet"), folder, folder / "out"))
    assert line.startswith("corpus: every document is blank")


def write_differing_jsonl(hub: Path) -> None:
    hub.mkdir()
    for number, more in enumerate([{"n": 1}, {"n": {"a": [1]}}]):
        lines = [json.dumps({"text": text} | more) for text in sentences(30, number)]
        (hub / f"train-{number}.jsonl").write_text("\n".join(lines))


def test_jsonl_that_differs_is_no_fault_of_the_machine(folder: Path) -> None:
    write_differing_jsonl(folder / "hub")
    line = refusal(lambda: list(Stream(of_hub("hub"), folder).documents()))
    assert "read a copy by corpus.source `files`" in line
    assert len(texts(folder, "hub/*.jsonl")) == 60  # as it says


def test_what_passes_is_the_machines(folder: Path) -> None:
    write_parquet(folder / "hub/train.parquet", text=sentences(30))
    stream = Stream(of_hub("hub"), folder)

    class Refused(Exception):
        response = type("Response", (), {"status_code": 503})()

    for error, kind in ((Refused("busy"), MachineError), (TimeoutError("slow"), MachineError), (KeyError(), UserError)):
        stream._dataset = type("Broken", (), {"iter": lambda self, batch_size, e=error: (_ for _ in ()).throw(e)})()
        with pytest.raises(UserError) as caught:
            list(stream.documents())
        assert type(caught.value) is kind


def test_a_cache_that_cannot_be_written_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unwritable(*arguments: object, **more: object) -> None:
        raise OSError(30, "Read-only file system", "/home/.cache/huggingface")

    monkeypatch.setattr(datasets, "load_dataset_builder", unwritable)
    with pytest.raises(MachineError) as caught:
        Stream(of_hub("fineweb"), folder)
    is_said_as(caught.value, "a cache of `datasets` that cannot be written")


# ---- names ----

NAMES = ["notes [2026]", "notes [a-z]*", "what?", "a{b}", "100%", "it's", "a::b", "x://y", "日本", "-n", "~tilde", "#1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_it_says(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    for number in range(2):
        write_parquet(folder / name / f"train [{number}].parquet", text=sentences(30, number))
        (folder / name / f"{number} [x].txt").write_text(f"text {number}")
    assert texts(folder, f"{name}/*.txt") == {"text 0", "text 1"}
    assert texts(folder, f"{folder}/{name}/1 [x].txt") == {"text 1"}
    found = {document.text for document in Stream(of_hub(name), folder).documents()}
    assert found == {*sentences(30, 0), *sentences(30, 1)}


@pytest.mark.parametrize(("name", "other"), [("hub *v2", "hub v2"), ("hub [v2]", "hub v"), ("hu?", "hub")])
def test_a_name_never_means_another(folder: Path, name: str, other: str) -> None:
    for folder_name, text in ((name, "alpha"), (other, "SECRET")):
        write_parquet(folder / folder_name / "data/train-0.parquet", text=[f"{text} {i}" for i in range(40)])
    assert {document.text.split()[0] for document in Stream(of_hub(name), folder).documents()} == {"alpha"}
    line = refusal(lambda: texts(folder, f"{name}/data/*.parquet"))
    (escaped,) = re.findall(r"write '(.*)' for the name", line)
    assert {text.split()[0] for text in texts(folder, escaped)} == {"alpha"}


def test_a_name_that_is_not_there_is_no_pattern(folder: Path) -> None:
    write_parquet(folder / "hub v2/train.parquet", text=sentences(40))
    with pytest.raises(UserError):
        Stream(of_hub("hub *v2"), folder)


def test_patterns_stay_patterns(folder: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt"):
        (folder / name).write_text(name)
    (folder / "x [1]").mkdir()
    (folder / "x [1]" / "[2].txt").write_text("deep")
    assert [path.name for path in matching_files(["a[12].txt"], folder)] == ["a1.txt", "a2.txt"]
    assert [path.name for path in matching_files(["?1.txt"], folder)] == ["a1.txt", "b1.txt"]
    assert [path.name for path in matching_files(["x [1]/**/[[]2].txt"], folder)] == ["[2].txt"]
    assert len(matching_files(["**/*.txt"], folder)) == 4


# ---- long words ----

LONG = {
    "DNA": lambda r: ["".join(r.choices("ACGT", k=300_000)) for _ in range(3)],
    "one letter": lambda r: ["a" * 300_000, " " * 300_000 + "b"],
    "padding": lambda r: ["=" * 300_000, "-" * 300_000, "0" * 300_000],
    "Chinese": lambda r: ["".join(r.choices("中文文本训练语料宽度门控学习率", k=300_000)) for _ in range(3)],
    "Thai": lambda r: ["".join(r.choices("กขคงจฉชซ", k=300_000)) for _ in range(2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("vocabulary", [270, 512])
def test_long_words_take_bounded_time(folder: Path, kind: str, vocabulary: int) -> None:
    if kind in ("one letter", "padding") and vocabulary == 512:
        pytest.skip("there are no more than a few tokens to learn from one letter")
    documents = LONG[kind](random.Random(0))
    lines = [json.dumps({"text": text}) for text in (*documents, *sentences())]
    (folder / "good.jsonl").write_text("\n".join(lines))
    start = time.monotonic()
    train, validation = build_corpus(of_files("*.jsonl", vocabulary_size=vocabulary), folder, folder / "out")
    assert time.monotonic() - start < 60
    tokenizer = load_tokenizer(folder / "out/tokenizer.json")
    decoded = [tokenizer.decode(part.array.tolist(), skip_special_tokens=False) for part in (train, validation)]
    found = {text for part in decoded for text in part.split(END_OF_TEXT) if text}
    assert found == {*documents, *sentences()}


def test_a_long_word_is_learnt_from_in_bounded_time() -> None:
    word = "".join(random.Random(0).choices("ACGT", k=300_000))
    start = time.monotonic()
    train_tokenizer([word], of_files("*"))
    assert time.monotonic() - start < 30  # a second on an idle machine; more than a minute where words are learnt whole


def test_ordinary_text_gives_the_vocabulary_that_unbounded_words_give() -> None:
    from tokenizers import pre_tokenizers

    texts = [Path(module).read_text("utf-8") for module in (random.__file__, json.__file__, re.__file__, os.__file__)]
    ours = train_tokenizer(texts, of_files("*", vocabulary_size=600)).to_str()
    unbounded = pre_tokenizers.FixedLength

    class Unbounded:
        def __new__(cls, length: int) -> object:
            return unbounded(10**9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pre_tokenizers, "FixedLength", Unbounded)
        assert train_tokenizer(texts, of_files("*", vocabulary_size=600)).to_str() == ours


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["Learning the vocabulary", "Encoding train"])
def test_a_signal_is_heard_while_the_tokenizer_works(folder: Path, stage: str) -> None:
    size = 12_000_000
    chosen = random.Random(0)
    text = "".join(map(chr, (chosen.randint(0x4E00, 0x9FFF) for _ in range(size // 3))))
    while is_validation(Document.of("", text).sha256, 0.3):
        text += "。"
    (folder / "big.txt").write_text(text)
    sample = size if stage.startswith("Learning") else 20_000
    study = {"corpus": of_files("*.*", vocabulary_size=10_000 if sample == size else 270).model_dump(mode="json")}
    study["corpus"] |= {"files": ["big.txt", "good.jsonl"], "tokenizer_sample_bytes": sample}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "gdn_mup", "corpus", "--study", "study.yaml", "--output", "out"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as build:
        assert build.stderr
        while stage not in build.stderr.readline():
            assert build.poll() is None
        time.sleep(1)
        build.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        _, errors = build.communicate(timeout=HANGS)
    assert time.monotonic() - sent < 10
    assert build.returncode == EXIT_INTERRUPTED and errors.endswith("ended by SIGTERM; run the same command again\n")
    assert not [*folder.glob("out/*"), *folder.glob("out/.*")]


# ---- the page ----


def test_lines_of_the_page(folder: Path) -> None:
    def raised(*patterns: str) -> UserError:
        with pytest.raises(UserError) as caught:
            texts(folder, *patterns)
        return caught.value

    (folder / "wide.txt").write_bytes(ENGLISH.encode("utf-16-le"))
    is_said_as(raised("wide.txt"), "a file in UTF-16 or UTF-32")
    (folder / "padded.txt").write_bytes(b"a log" + bytes(100))
    is_said_as(raised("padded.txt"), "a file of NULs")
    (folder / "pointer.txt").write_bytes(POINTER)
    is_said_as(raised("pointer.txt"), "a pointer in place of a text")
    write_parquet(folder / "bad.parquet", text=bad_bytes())
    is_said_as(raised("bad.parquet"), "a row that is not UTF-8")
    for name in ("hub [v2]", "hub v"):
        (folder / name).mkdir()
        (folder / name / "a.txt").write_text(name)
    is_said_as(raised("hub [v2]/*.txt"), "a name that is a pattern")
    write_differing_jsonl(folder / "hub")
    with pytest.raises(UserError) as caught:
        list(Stream(of_hub("hub"), folder).documents())
    is_said_as(caught.value, "a dataset whose files do not fit together")


# ---- anything at all ----


@settings(
    max_examples=150, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.sampled_from([".txt", ".md", ".py", ".jsonl", ".parquet"]),
    st.binary(max_size=400)
    | st.text(max_size=200).map(str.encode)
    | st.tuples(st.text(max_size=200), st.sampled_from(["utf-16", "utf-16-le", "utf-32-be", "latin1"])).map(
        lambda pair: pair[0].encode(pair[1], "ignore")
    )
    | st.tuples(st.sampled_from([b"PAR1", POINTER, b"\xff\xfe", b'{"text": "']), st.binary(max_size=100)).map(b"".join)
    | st.dictionaries(st.sampled_from(["text", "n"]), st.none() | st.text() | st.integers())
    .map(json.dumps)
    .map(str.encode),
    st.integers(0, 3),
)
@example(".jsonl", b'{"text": ' + b"[" * 100_000, 0)
@example(".txt", b"\xff\xfe\0\0", 0)
@example(".txt", b"\0" * 200_000, 0)
def test_whatever_a_file_holds_it_is_a_corpus_or_one_line(
    folder: Path, suffix: str, content: bytes, copies: int
) -> None:
    for old in folder.glob("a.*"):
        old.unlink()
    (folder / f"a{suffix}").write_bytes(content * (copies + 1))
    try:
        documents = texts(folder, "*.*")
    except UserError as error:
        assert str(error).startswith((str(folder), "corpus")) and str(error).isprintable() and len(str(error)) < 1500
        return
    assert documents >= set(sentences())
    for text in documents - set(sentences()):
        assert text.encode().decode() == text and not (suffix in (".txt", ".md", ".py") and "\0" in text)
