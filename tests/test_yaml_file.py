"""Study files are read as they stand: what readers of YAML would read differently is refused, or means one thing."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reliability import is_said_as
from test_plan import check_plan_or_one_line
from workflow_copy import ROOT

from gdn_mup.errors import UserError
from gdn_mup.study.plan import LearningRateGrid, load_study
from gdn_mup.study.yaml_file import read_yaml

SWEEP = """
sweeps:
  - growth: heads
    optimizer: adamw
    rules: [sp]
    seeds: [0]
    widths: [32]
    learning_rates: {log2_first: -9, log2_last: -2, log2_step: %s}
"""


@pytest.fixture
def refused(tmp_path: Path):
    def line(text: str) -> str:
        path = tmp_path / "study.yaml"
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            load_study(path)
        said = str(caught.value)
        assert said.startswith(f"{path}: ") and said.isprintable()
        return said.removeprefix(f"{path}: ")

    return line


@pytest.fixture
def read(tmp_path: Path):
    def study(text: str):
        (tmp_path / "study.yaml").write_text(text)
        return load_study(tmp_path / "study.yaml")

    return study


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("training: {steps: 400}\ntraining: {warmup_steps: 5}\n", "training: written twice, in lines 1 and 2"),
        ("training: {steps: 400, steps: 400}\n", "training.steps: written twice"),
        ("training:\n  steps: 400\n  'steps': 500\n", "training.steps: written twice, in lines 2 and 3"),
        (SWEEP.replace("widths: [32]", "widths: [32]\n    widths: [32, 64]") % 1, "sweeps[0].widths: written twice"),
        ("a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}\n", "b.x: written twice"),
    ],
)
def test_a_key_stands_once(refused, text: str, key: str) -> None:
    assert key in refused(text)


OTHER_NUMBERS = (
    "010",
    "-010",
    "0o10",
    "0x10",
    "0b10",
    "1:30",
    "190:20:30",
    "1__0",
    "10_",
    "1,000",
    "1 000",
    "１０",
    "1e3x",
)
NO_NUMBERS = ("true", "yes", "on", "~", "'10'", "2020-01-01", "[1]", "{}", "!!int 10", "!!int '010'")


@pytest.mark.parametrize("number", [*OTHER_NUMBERS, *NO_NUMBERS, ".nan", ".inf", "1e400", "0.5"])
@pytest.mark.parametrize("key", ["training.steps", "corpus.maximum_bytes", "model.layers"])
def test_what_is_no_whole_number_is_refused_where_one_belongs(refused, key: str, number: str) -> None:
    section, _, name = key.partition(".")
    assert refused(f"{section}:\n  {name}: {number}\n").startswith(f"{key}: ")


@pytest.mark.parametrize("number", ["010", "1:30", "true", "'0.1'", "0x1", "1.5:30", "1.2.3", "1e", ".", "-", "yes"])
def test_what_is_no_number_is_refused_where_one_belongs(refused, number: str) -> None:
    assert refused(f"training: {{weight_decay: {number}}}\n").startswith("training.weight_decay: ")


def refusal_of(tmp_path: Path, text: str) -> UserError:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_study(tmp_path / "study.yaml")
    return caught.value


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    error = refusal_of(tmp_path, "training: {steps: 400}\ntraining: {warmup_steps: 5}\n")
    is_said_as(error, "a key that stands twice")


def test_a_number_that_readers_read_differently(tmp_path: Path) -> None:
    error = refusal_of(tmp_path, "training: {steps: 010}\n")
    is_said_as(error, "a number that readers of YAML read differently")


def test_a_grid_that_ends_elsewhere(tmp_path: Path) -> None:
    is_said_as(refusal_of(tmp_path, SWEEP % 3), "a grid that ends elsewhere")


def test_overrides_are_read_as_strictly(refused) -> None:
    for number in ("010", "true", "'5'", "1:30"):
        line = refused(SWEEP.replace("widths", f"training: {{steps: {number}}}\n    widths") % 1)
        assert line.startswith("sweeps[0].training.steps: ")


@pytest.mark.parametrize(
    ("written", "value"),
    [("400", 400), ("1_000", 1000), ("1e3", 1000), ("1E+3", 1000), ("4.0", 4), ("+7", 7), ("20_000_000", 20_000_000)],
)
def test_whole_numbers_may_be_written_like_this(read, written: str, value: int) -> None:
    study = read(f"training: {{steps: {written}, warmup_steps: 0}}\n")
    assert study.training.steps == value and type(study.training.steps) is int


@pytest.mark.parametrize(
    ("written", "value"), [("1e-3", 1e-3), ("1", 1.0), (".5", 0.5), ("5.", 5.0), ("1_0.5", 10.5), ("1e-05", 1e-5)]
)
def test_numbers_may_be_written_like_this(read, written: str, value: float) -> None:
    study = read(f"training: {{weight_decay: {written}}}\n")
    assert study.training.weight_decay == value and type(study.training.weight_decay) is float


def test_cures_are_right(refused, read) -> None:
    assert refused("corpus: {maximum_bytes: '1e9'}\n") == (
        "corpus.maximum_bytes: '1e9': Input should be a valid integer; write it in digits, such as 400, 1_000_000 or "
        "1e6"
    )
    assert read("corpus: {maximum_bytes: 1e9}\n").corpus.maximum_bytes == 10**9
    assert refused("model: {tied_embeddings: yes}\n").endswith("; write true or false")
    assert refused("corpus: {source: huggingface, dataset: x, dataset_revision: 1234567}\n").endswith(
        "; put it in quotes"
    )
    text = "corpus: {source: huggingface, dataset: x, dataset_revision: '1234567'}\n"
    assert read(text).corpus.dataset_revision == "1234567"


def test_text_that_looks_like_a_number_elsewhere_stays_text(read) -> None:
    for written in ("010", "1:30", "yes", "on", "2020-01-01", "0x1F", "2026-11"):
        study = read(f"corpus: {{source: huggingface, dataset: x, dataset_config: {written}}}\n")
        assert study.corpus.dataset_config == written


def test_studies_that_ship_are_read_as_yaml_reads_them() -> None:
    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    for path in sorted((ROOT / "config/studies").glob("*.yaml")):
        assert plain(read_yaml(path)) == plain(yaml.safe_load(path.read_text("utf-8")))


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system [ls]", "a: !x 1", "? [a]\n: 1\n", "<<: 3", "a: &a [*a]", "a: 1\n---\nb: 1\n"],
)
def test_what_is_no_plain_yaml_is_refused(refused, text: str) -> None:
    refused(text)


def test_aliases_of_aliases_take_no_time(refused) -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(30)]
    assert "more than 100000 values" in refused("\n".join(levels))


# ---- grids ----


@pytest.mark.parametrize("step", ["3", "2", "0.4", "5", "7.5", "0.3"])
def test_a_grid_ends_where_it_says(refused, read, step: str) -> None:
    line = refused(SWEEP % step)
    assert line.startswith("sweeps[0].learning_rates: steps of ") and "miss log2_last -2; end at " in line
    for end in line.split("end at ")[1].split(" or "):
        cured = read((SWEEP % step).replace("log2_last: -2", f"log2_last: {end}"))
        assert cured.sweeps[0].learning_rates.values[-1] == pytest.approx(2.0 ** float(end), rel=1e-3)


def test_grids_may_be_rounded() -> None:
    for first, last, step, count in ((-9.965784, -5.643856, 0.480214, 10), (-3, 0, 1 / 3, 10), (-1, 0, 0.1, 11)):
        assert len(LearningRateGrid(log2_first=first, log2_last=last, log2_step=step).values) == count


# ---- anything at all ----

scalars = st.sampled_from(
    ["010", "1:30", "true", "1e3", "-1", "~", "x", "'x'", "[]", "{}", "*a", "&a 1", "<<", "", "0"]
)
keys = st.sampled_from(["training", "steps", "corpus", "model", "sweeps", "widths", "files", "<<", "? ", "- ", "&a "])
lines = st.tuples(st.integers(0, 3), keys, scalars).map(lambda line: f"{' ' * 2 * line[0]}{line[1]}: {line[2]}")


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(lines, max_size=8).map("\n".join) | st.text(max_size=80))
@example("a: " + "{a: " * 20_000)
@example("training: {steps: " + "9" * 5000 + "}")
@example('a: "\\ud800"')
@example("\ufeffmodel: {}")
def test_random_yaml_is_a_study_or_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.yaml").write_bytes(text.encode(errors="surrogatepass"))
    check_plan_or_one_line(tmp_path / "study.yaml")
