"""Study files: what they ask for, and what is said when they are wrong."""

import functools
import json
import math
import operator
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from workflow_copy import ROOT

from gdn_mup.errors import UserError
from gdn_mup.model.config import InitialScale, ModelSettings, model_shape
from gdn_mup.study.plan import (
    SECTIONS,
    ClippingCheck,
    Job,
    LearningRateGrid,
    Log2Ranges,
    Sweep,
    Tuning,
    load_study,
    settings_hash,
)

STUDIES = sorted((ROOT / "config/studies").glob("*.yaml"))
SMOKE = ROOT / "config/studies/smoke.yaml"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_that_ship_are_valid(path: Path) -> None:
    study = load_study(path)
    jobs = [job for kind in SECTIONS for job in study.jobs(kind)]
    assert jobs and len({job.path for job in jobs}) == len(jobs)


def test_the_widest_jobs_come_first() -> None:
    widths = [job.width for job in load_study(SMOKE).jobs("lr_sweep")]
    assert widths == sorted(widths, reverse=True)


def test_a_job_depends_on_its_own_sweep_alone(tmp_path: Path) -> None:
    raw = yaml.safe_load(SMOKE.read_text())
    before = load_study(SMOKE)
    raw["sweeps"][1]["learning_rates"]["log2_last"] = 3
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw))
    after = load_study(tmp_path / "study.yaml")
    changed = {
        job.optimizer
        for job in before.jobs("lr_sweep")
        if settings_hash(before.settings_of(job)) != settings_hash(after.settings_of(job))
    }
    assert changed == {"sgd"}


def test_base_seeds_are_jobs_of_the_base_width_alone_and_change_no_other(tmp_path: Path) -> None:
    raw = yaml.safe_load(SMOKE.read_text())
    before = load_study(SMOKE)
    raw["sweeps"][0]["base_seeds"] = [7, 5]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw))
    after = load_study(tmp_path / "study.yaml")
    added = set(after.jobs("lr_sweep")) - set(before.jobs("lr_sweep"))
    assert added == {Job("lr_sweep", "heads", "adamw", 16, seed) for seed in (5, 7)}
    assert {after.settings_of(job)["seed"] for job in added} == {5, 7}
    assert all(before.settings_of(job) == after.settings_of(job) for job in before.jobs("lr_sweep"))
    with pytest.raises(UserError, match="no lr_sweep job growth=heads optimizer=adamw width=32 seed=5"):
        after.settings_of(Job("lr_sweep", "heads", "adamw", 32, 5))


def test_grids_are_in_octaves() -> None:
    assert LearningRateGrid(log2_first=-3, log2_last=-1).values == (0.125, 0.25, 0.5)
    assert len(LearningRateGrid(log2_first=-3, log2_last=0, log2_step=0.5).values) == 7


NO_RANGES = {name: [0, 0] for name in Log2Ranges.model_fields}
WRONG = {
    "unknown key": ({"training": {"stpes": 5}}, "training.stpes: unknown key"),
    "unknown section": ({"sweep": []}, "sweep: unknown key"),
    "width that heads do not divide": ({"sweeps": {0: {"widths": [16, 20]}}}, "sweeps[0].widths: width 20"),
    "no base width": ({"sweeps": {0: {"widths": [32, 64]}}}, "sweeps[0].widths: [32, 64] lacks the base width 16"),
    "widths that fall": (
        {"sweeps": {0: {"widths": [32, 16]}}},
        "sweeps[0].widths: widths must be ascending, ",
    ),
    "grid that falls": ({"sweeps": {0: {"learning_rates": {"log2_first": 0}}}}, "sweeps[0].learning_rates: the grid"),
    "unknown rule set": ({"sweeps": {0: {"rules": ["mu"]}}}, "sweeps[0].rules[0]: 'mu'"),
    "negative steps": ({"training": {"steps": -1}}, "training.steps: -1"),
    "warm-up as long as training": ({"training": {"warmup_steps": 12}}, "training: warmup_steps 12"),
    "override that does not exist": ({"sweeps": {0: {"training": {"stps": 1}}}}, "sweeps[0].training.stps: unknown"),
    "vocabulary below a byte": ({"corpus": {"vocabulary_size": 100}}, "corpus.vocabulary_size: 100"),
    "files without a pattern": ({"corpus": {"source": "files"}}, "corpus: source `files` needs"),
    "text for a number": ({"model": {"layers": "many"}}, "model.layers: 'many'"),
    "two sweeps of a kind": ({"sweeps": {1: {"optimizer": "adamw"}}}, "sweeps[1]: a second entry"),
    "epsilons that fall": ({"multiplier_checks": {0: {"epsilons": [1e-5, 0]}}}, "multiplier_checks[0].epsilons: eps"),
    "a negative epsilon": ({"multiplier_checks": {0: {"epsilons": [-1.0]}}}, "multiplier_checks[0].epsilons: eps"),
    "unknown init": ({"multiplier_checks": {0: {"inits": ["fla"]}}}, "multiplier_checks[0].inits[0]: 'fla'"),
    "a clipping named twice": (
        {"clipping_checks": {0: {"clippings": ["none"] * 2}}},
        "clipping_checks[0].clippings: na",
    ),
    "clipping in two places": (
        {"clipping_checks": {0: {"training": {"clipping": "none"}}}},
        "clipping_checks[0].training: clipping 'none' has no effect here",
    ),
    "a range that falls": (
        {"tunings": {0: {"log2_ranges": {"gate_init": [1, 0]}}}},
        "tunings[0].log2_ranges.gate_init: ",
    ),
    "an unknown multiplier": (
        {"tunings": {0: {"log2_ranges": {"conv_init": [0, 1]}}}},
        "tunings[0].log2_ranges.conv_in",
    ),
    "a search for nothing": ({"tunings": {0: {"log2_ranges": NO_RANGES}}}, "tunings[0].log2_ranges: nothing is tuned"),
    "one trial": ({"tunings": {0: {"trials": 1}}}, "tunings[0].trials: 1"),
    "a seed named twice": ({"sweeps": {0: {"seeds": [1, 1]}}}, "sweeps[0].seeds: named twice"),
    "a base seed named twice": ({"sweeps": {0: {"base_seeds": [7, 7]}}}, "sweeps[0].base_seeds: named twice"),
    "a seed that is a base seed too": (
        {"sweeps": {0: {"base_seeds": [7, 1]}}},
        "sweeps[0].base_seeds: [1] are among `seeds`",
    ),
    "base seeds of another experiment": (
        {"clipping_checks": {0: {"base_seeds": [7]}}},
        "clipping_checks[0].base_seeds: unknown key",
    ),
}


def merge(raw: object, change: dict) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and (isinstance(raw, list) or key in raw):
            merge(raw[key], value)
        else:
            raw[key] = value


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, case: str) -> None:
    change, expected = WRONG[case]
    raw = yaml.safe_load(SMOKE.read_text())
    merge(raw, change)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError) as error:
        load_study(path)
    message = str(error.value)
    assert message.startswith(f"{path}: {expected}"), message
    assert "\n" not in message


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
extremes = st.sampled_from(
    [-(10**400), -1, 0, 1, 10**12, 10**400, math.inf, -math.inf, math.nan, 1e308, 5e-324, "\n", ""]
)
values = st.recursive(
    scalars | extremes,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | scalars, inner, max_size=3),
    max_leaves=6,
)


def paths(raw: object, here: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """Where every value of a study lies, lists and sections too."""
    inner = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in inner:
        yield (*here, key)
        yield from paths(value, (*here, key))


@st.composite
def spoilt_studies(draw: st.DrawFn) -> object:
    """The study `smoke` with every key written out, one to three values replaced or keys added anywhere in it."""
    raw = load_study(SMOKE).model_dump(mode="json")
    for _ in range(draw(st.integers(1, 3))):
        *outer, key = draw(st.sampled_from(list(paths(raw))))
        here = functools.reduce(operator.getitem, outer, raw)
        if isinstance(here, dict) and draw(st.integers(0, 9)) == 0:
            key = draw(st.text(max_size=8))
        here[key] = draw(extremes | values)
    return raw


def write_study(folder: Path, raw: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.dump(raw, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))
    return path


def check_plan_or_one_line(path: Path) -> None:
    """Either every job of the study can be planned, with numbers that float32 holds, or the study is refused."""
    try:
        study = load_study(path)
    except UserError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 1000, message
        return
    for kind in SECTIONS:
        for job in study.jobs(kind):
            experiment = study.experiment_of(job)
            assert len(settings_hash(study.settings_of(job))) == 12
            json.dumps(study.settings_of(job), allow_nan=False)  # as its file keeps them
            assert min(model_shape(study.model, job.width, job.growth, study.corpus.vocabulary_size)[:-1]) > 0
            assert study.training_of(experiment).steps > 0
            if isinstance(experiment, Sweep | ClippingCheck | Tuning):
                assert np.isfinite(np.float32(experiment.learning_rates.values)).all()
            if isinstance(experiment, Tuning):
                drawn = [list(multipliers.values()) for multipliers in experiment.multipliers]
                assert np.isfinite(np.float32(drawn)).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300, -1, 10**15, 10**400], ids=lambda x: str(x)[:6])
def test_no_number_that_makes_no_sense_gets_through(tmp_path: Path, value: float) -> None:
    """Every number of the study `smoke`, its defaults too, replaced in turn."""
    dumped = load_study(SMOKE).model_dump(mode="json")
    raw = {name: section[:1] if isinstance(section, list) else section for name, section in dumped.items()}
    for *outer, key in paths(raw):
        here = functools.reduce(operator.getitem, outer, raw)
        before = here[key]
        if isinstance(before, int | float) and not isinstance(before, bool):
            here[key] = value
            check_plan_or_one_line(write_study(tmp_path, raw))
            here[key] = before


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spoilt_studies())
def test_whatever_a_study_file_says_is_planned_or_refused_in_one_line(tmp_path: Path, raw: object) -> None:
    """Row "a value that makes no sense" of docs/reliability.md."""
    check_plan_or_one_line(write_study(tmp_path, raw))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text("[]{}:,-#&*!|>'\"%@`?\n 0123456789.eabx_", max_size=60).map(str.encode))
@example(b"a: " + b"[" * 20_000)
@example(b"a: 2020-13-45")
@example(b"a: " + b"9" * 5000)
@example(b"a: &a [*a]")
def test_whatever_a_study_file_is_it_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.yaml").write_bytes(content)
    check_plan_or_one_line(tmp_path / "study.yaml")


def test_a_missing_study_names_those_that_exist() -> None:
    with pytest.raises(
        UserError,
        match=r"config/studies/lptop\.yaml: no such study file; there are: " + ", ".join(path.stem for path in STUDIES),
    ):
        load_study(ROOT / "config/studies/lptop.yaml")


@pytest.mark.parametrize(("text", "expected"), [("a: [", "not valid YAML"), ("- 1", "is a mapping of sections")])
def test_a_file_that_is_no_study_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected):
        load_study(path)


@pytest.mark.parametrize("key", ["short_conv", "mixer_output"])
def test_keys_that_were_added_are_no_setting_of_jobs_that_do_not_give_them(key: str) -> None:
    """Published jobs know nothing of them; given, they are settings like any other."""
    plain = ModelSettings().model_dump(mode="json")
    assert key not in plain["initial_scale"]
    default = InitialScale.model_fields[key].default
    assert ModelSettings.model_validate({"initial_scale": {key: default}}).model_dump(mode="json") == plain
    given = ModelSettings.model_validate({"initial_scale": {key: 0.5}})
    dumped = given.model_dump(mode="json")
    assert dumped["initial_scale"] == plain["initial_scale"] | {key: 0.5}
    assert ModelSettings.model_validate(dumped) == given


@pytest.mark.parametrize("name", ["paper_131m", "paper_131m_1536", "paper_131m_unclipped"])
def test_the_papers_architecture_is_that_of_its_released_code(name: str) -> None:
    study = load_study(ROOT / f"config/studies/{name}.yaml")
    training, base = study.training, study.model.base_width
    assert training.steps * training.batch_size * training.context_length == 131_072_000
    assert training.warmup_steps * 10 == training.steps and study.model.norm_epsilon == 1e-6
    for width in {width for sweep in study.sweeps for width in sweep.widths}:
        shape = model_shape(study.model, width, "head_dim", study.corpus.vocabulary_size)
        assert (shape.heads, shape.layers, shape.tied_embeddings) == (6, 8, True)
        assert (8 * shape.head_dim, 4 * shape.value_head_dim) == (width, width)
        theirs = -(-int(width * 4 * 2 / 3) // 256) * 256  # fla's GatedMLP with hidden_ratio 4
        assert shape.mlp_width == theirs if width <= 512 else theirs < shape.mlp_width < 1.13 * theirs
    shape = model_shape(study.model, base, "head_dim", study.corpus.vocabulary_size)
    scale, values = study.model.initial_scale, shape.heads * shape.value_head_dim
    assert scale.embedding == 0.02 and scale.mixer_output is not None
    gains = (scale.hidden, base), (scale.gate, base), (scale.mixer_output, values), (scale.residual, shape.mlp_width)
    for gain, fan_in in (*gains, (scale.short_conv, shape.conv_size)):
        assert gain / math.sqrt(fan_in) == pytest.approx(0.02, rel=1e-5)
    (clipping,) = {(study.training_of(sweep).clipping, study.training_of(sweep).clip_norm) for sweep in study.sweeps}
    assert clipping == (("none", 1.0) if name.endswith("unclipped") else ("global_norm", 1.0))


def test_the_papers_setting_is_the_papers() -> None:
    """Of arXiv 2606.04048, and of the configs in the code released with it."""
    study = load_study(ROOT / "config/studies/paper.yaml")
    training = study.training
    tokens = training.steps * training.batch_size * training.context_length
    assert tokens == pytest.approx(9.83e9, rel=1e-3)
    grids = {sweep.optimizer: sweep.learning_rates.values for sweep in study.sweeps}
    assert grids["adamw"][0] == pytest.approx(1e-3, rel=1e-5) and grids["adamw"][-1] == pytest.approx(2e-2, rel=1e-4)
    assert grids["sgd"][0] == pytest.approx(0.1, rel=1e-5) and grids["sgd"][-1] == pytest.approx(1.0, rel=1e-4)
    for sweep in study.sweeps:
        for width in sweep.widths:
            shape = model_shape(study.model, width, sweep.growth, study.corpus.vocabulary_size)
            assert (shape.heads, shape.layers, shape.mlp_width) == (6, 8, 4 * width)
            assert (8 * shape.head_dim, 4 * shape.value_head_dim) == (width, width)
        middle = math.sqrt(sweep.learning_rates.values[0] * sweep.learning_rates.values[-1])
        assert study.training_of(sweep).final_learning_rate * middle == pytest.approx(5e-5, rel=0.02)
