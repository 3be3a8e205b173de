"""Source `huggingface`: a folder in the hub's own layout, streamed, interrupted, resumed."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from reliability import is_said_as

from gdn_mup.corpus import huggingface, streaming
from gdn_mup.corpus.background import prefetch
from gdn_mup.corpus.build import build_corpus
from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.documents import is_validation
from gdn_mup.corpus.huggingface import Stream, resolved_commit
from gdn_mup.corpus.tokenizer import END_OF_TEXT, load_tokenizer
from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.errors import MachineError, UserError

WORDS = ["the", "width", "of", "a", "model", "and", "its", "rate", "größer", "日本", "more.\n", "heads", "values"]
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/*/*}
- config_name: sample-10BT
  data_files:
  - {split: train, path: sample/10BT/*}
---
"""


def text_of(seed: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choices(WORDS, k=generator.randint(5, 200)))


TEXTS = [text_of(seed) for seed in range(700)]
ROWS = [*TEXTS[:300], None, " \n", "", *TEXTS[300:]]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as HuggingFaceFW/fineweb-edu is: a card, a default config, and a sample in two files."""
    root = tmp_path_factory.mktemp("hub")
    parts = {"data/CC/train-0.parquet": ["default"], "sample/10BT/000.parquet": ROWS[:400]}
    for name, rows in (parts | {"sample/10BT/001.parquet": ROWS[400:]}).items():
        path = root / "fineweb-edu" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.string()), "score": [0.5] * len(rows)})
        pyarrow.parquet.write_table(table, path, row_group_size=90)
    (root / "fineweb-edu" / "README.md").write_text(CARD)
    return root


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "ROWS", 64)
    monkeypatch.setattr("gdn_mup.corpus.encoding.BATCH_BYTES", 3000)
    monkeypatch.setattr("gdn_mup.corpus.encoding.PIECE_CHARACTERS", 150)  # so that reads, batches and pieces cross


def of_hub(**more: object) -> CorpusSettings:
    plain = {"source": "huggingface", "dataset": "fineweb-edu", "dataset_config": "sample-10BT"}
    return CorpusSettings.model_validate(
        plain | {"vocabulary_size": 300, "validation_fraction": 0.2, "tokenizer_sample_bytes": 50_000} | more
    )


def failure(settings: CorpusSettings, root: Path) -> str:
    """The one line with which a dataset cannot be read."""
    with pytest.raises(UserError) as caught:
        list(Stream(settings, root).documents())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_stream_is_the_split_in_its_own_order(hub: Path) -> None:
    stream = Stream(of_hub(), hub)
    assert [document.text for document in stream.documents()] == TEXTS
    assert [document.text for document in stream.documents()] == TEXTS  # and once more from the start
    assert stream.provenance == {
        "dataset": "fineweb-edu",
        "config": "sample-10BT",
        "split": "train",
        "commit": None,
        "files": 2,
    }


def test_a_stream_goes_on_from_any_position(hub: Path) -> None:
    documents = list(Stream(of_hub(), hub).documents())
    places = [i for i, document in enumerate(documents) if document.position]
    assert len(places) == len(ROWS) // 64 + 1 and places[-1] == len(TEXTS) - 1
    for place in places:
        position = json.loads(json.dumps(documents[place].position))
        rest = [document.text for document in Stream(of_hub(), hub).documents(position)]
        assert rest == TEXTS[place + 1 :]


def test_tokens_are_the_documents_in_order_up_to_the_limit(hub: Path, tmp_path: Path) -> None:
    limit = 200_000
    parts = build_corpus(of_hub(maximum_bytes=limit), hub, tmp_path)
    assert sum(part.sidecar.bytes for part in parts) in range(limit - 3, limit + 1)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    end = tokenizer.token_to_id(END_OF_TEXT)
    for held_out, part in zip((False, True), parts, strict=True):
        pieces = np.split(part.array, np.flatnonzero(part.array == end) + 1)[:-1]
        expected = [text for text in TEXTS if is_validation(huggingface.Document.of("", text).sha256, 0.2) is held_out]
        decoded = [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]
        assert decoded[:-1] == expected[: len(decoded) - 1] and expected[len(decoded) - 1].startswith(decoded[-1])
        assert part.sidecar.documents == len(decoded)
        assert part.sidecar.source == "dataset fineweb-edu, sample-10BT, train"
        assert part.sidecar.provenance["files"] == 2
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["tokenizer.json", "train.json", "train.tokens", "validation.json", "validation.tokens"]


class Killed(BaseException):
    """Stands for whatever ends a process."""


def test_a_build_that_is_stopped_goes_on_with_the_same_result(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SECONDS_BETWEEN_STATES", 0.0)
    encode = streaming.encode
    learnt: list[int] = []
    learn = streaming._learn_vocabulary
    monkeypatch.setattr(streaming, "_learn_vocabulary", lambda *arguments: learnt.append(1) or learn(*arguments))
    encoded: list[int] = []

    def stopping(after: int) -> None:
        def stopped(*arguments: object) -> Iterator[object]:
            encoded.append(0)
            for item in encode(*arguments):
                if encoded[-1] == after:
                    raise Killed
                encoded[-1] += 1
                yield item

        monkeypatch.setattr(streaming, "encode", stopped)

    stopping(-1)
    build_corpus(of_hub(), hub, tmp_path / "whole")
    pieces = encoded[-1]
    learnt.clear()
    output = tmp_path / "stopped"
    for after in (0, 150, 333, 512):
        stopping(after)
        with pytest.raises(Killed):
            build_corpus(of_hub(), hub, output)
        assert [path.name for path in output.iterdir()] == [streaming.PARTIAL]
    stopping(-1)
    build_corpus(of_hub(), hub, output)
    assert len(learnt) == 1 and 0 < encoded[-1] < pieces - 400  # some are done twice, most are not
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in output.iterdir()) == names
    for name in names:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_build_stopped_inside_a_document_goes_on_before_it(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SECONDS_BETWEEN_STATES", 0.0)
    train, _ = build_corpus(of_hub(), hub, tmp_path / "whole")
    encode = streaming.encode

    def stopped(*arguments: object) -> Iterator[object]:
        for piece, tokens in encode(*arguments):
            yield piece, tokens
            if piece.document.position and not piece.ends:
                raise Killed

    monkeypatch.setattr(streaming, "encode", stopped)
    with pytest.raises(Killed):
        build_corpus(of_hub(), hub, tmp_path / "stopped")
    monkeypatch.setattr(streaming, "encode", encode)
    assert build_corpus(of_hub(), hub, tmp_path / "stopped")[0].sha256 == train.sha256


@pytest.mark.parametrize("damage", ["tokenizer.json", "state.json", "train.tokens"])
def test_what_is_not_whole_is_begun_again(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    whole, _ = build_corpus(of_hub(), hub, tmp_path / "whole")
    monkeypatch.setattr(streaming, "SECONDS_BETWEEN_STATES", 0.0)
    monkeypatch.setattr(streaming.TokenWriter, "finish", lambda *arguments: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        build_corpus(of_hub(), hub, tmp_path / "stopped")
    monkeypatch.undo()
    left = tmp_path / "stopped" / streaming.PARTIAL / damage
    left.write_bytes(left.read_bytes()[:-100])
    assert build_corpus(of_hub(), hub, tmp_path / "stopped")[0].sha256 == whole.sha256


def test_other_settings_start_again(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SECONDS_BETWEEN_STATES", 0.0)
    monkeypatch.setattr(streaming, "publish", lambda *arguments: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        build_corpus(of_hub(), hub, tmp_path)
    monkeypatch.undo()
    train, _ = build_corpus(of_hub(vocabulary_size=310), hub, tmp_path)
    assert train.vocabulary_size == 310
    assert TokenFile.open(train.path).sidecar.settings["vocabulary_size"] == 310


def test_messages_about_datasets(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failure(of_hub(dataset_config="sample-9BT"), hub) == (
        "corpus.dataset_config: 'sample-9BT': dataset fineweb-edu: BuilderConfig 'sample-9BT' not found. Available: "
        "['default', 'sample-10BT']"
    )
    assert failure(of_hub(dataset_split="test"), hub) == (
        "corpus.dataset_split: 'test': dataset fineweb-edu: Bad split: test. Available splits: ['train']"
    )
    assert failure(of_hub(field="body"), hub) == (
        "corpus.field: dataset fineweb-edu has no column 'body'; use one that is there: text, score"
    )
    assert failure(of_hub(field="score"), hub) == (
        "corpus.field: column 'score' of dataset fineweb-edu is double, not text; set corpus.field to one that is"
    )

    def unreachable(*arguments: object, **more: object) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    assert failure(of_hub(), hub) == (
        "corpus.dataset: 'fineweb-edu' cannot be loaded (Couldn't reach the Hub); check the name and the network, or "
        "name a folder that holds a copy"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert failure(of_hub(), hub) == "corpus.source: `huggingface` needs the package datasets; `pip install datasets`"


def test_message_when_the_stream_breaks_off(hub: Path, tmp_path: Path) -> None:
    stream = Stream(of_hub(), hub)

    class Broken:
        def iter(self, batch_size: int) -> Iterator[object]:
            raise OSError("Connection reset\nby peer")

    stream._dataset = Broken()
    with pytest.raises(MachineError) as caught:
        list(stream.documents())
    is_said_as(caught.value, "a stream that breaks off")


def test_message_when_a_part_is_empty(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves none for validation; raise it"):
        build_corpus(of_hub(validation_fraction=1e-9), hub, tmp_path)


def test_the_commit_is_in_the_hubs_addresses() -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    files = [f"hf://datasets/HuggingFaceFW/fineweb-edu@{commit}/sample/10BT/{i:03d}.parquet" for i in range(2)]
    assert resolved_commit(files) == commit
    assert resolved_commit(["/home/x/sample/10BT/000.parquet"]) is None
    assert resolved_commit([*files, files[0].replace("0", "1")]) is None


def test_a_dataset_must_be_named() -> None:
    with pytest.raises(ValueError, match="source `huggingface` needs the name of a dataset under `dataset`"):
        CorpusSettings(source="huggingface")
    with pytest.raises(ValueError, match="`dataset_config` is only read by source `huggingface`"):
        CorpusSettings(dataset_config="x")
    assert "dataset" not in CorpusSettings().model_dump()


def test_prefetching_changes_nothing_and_passes_errors_on() -> None:
    assert list(prefetch(range(7))) == list(range(7))
    seen: list[int] = []

    def failing() -> Iterator[int]:
        yield from range(5)
        raise ValueError("six")

    with pytest.raises(ValueError, match="six"):
        seen.extend(prefetch(failing()))
    made: list[int] = []
    ahead = prefetch(made.append(i) or i for i in range(100))
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()
    assert len(made) <= 5  # a reader that stops is not read for
