"""Studies put together by training length: what is compared, what is refused, and what the figure says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from synthetic import SLOPES, in_memory, study

from gdn_mup.errors import UserError
from gdn_mup.model.config import model_shape
from gdn_mup.model.language_model import parameter_table
from gdn_mup.study.comparison import load_comparison
from gdn_mup.study.figures import transfer_against_training_length
from gdn_mup.study.plan import Study, load_study
from gdn_mup.study.regime import regime_in_words
from gdn_mup.study.training_length import by_length, training_length

ROOT = Path(__file__).parents[1]


def trained(steps: int, rules: list[str] | None = None, **changes: Any) -> xr.Dataset:
    """The sweeps of a study that trains so long, under AdamW alone."""
    plan = study(training={"steps": steps, "warmup_steps": steps // 10, "evaluate_every": steps // 3})
    sweeps = [plan.sweeps[0].model_copy(update={"rules": tuple(rules or SLOPES)})]
    return in_memory(plan.model_copy(update={"sweeps": tuple(sweeps)}), "lr_sweep", **changes)


def test_lengths_stand_beside_each_other() -> None:
    datasets = {"short": trained(60), "long": trained(120, slopes=SLOPES | {"gdn_mup": -0.2})}
    table = training_length(datasets).set_index(["rules", "tokens"])
    short, long = sorted(set(table.index.get_level_values("tokens")))
    assert long == 2 * short
    assert table.slope["gdn_mup", long] == pytest.approx(-0.2, abs=0.1)
    assert table.slope["gdn_mup", short] == pytest.approx(0.0, abs=0.1)
    assert table.tokens_per_parameter["mup", long] == 2 * table.tokens_per_parameter["mup", short]
    assert (table.loss_less_sp.dropna().index.get_level_values("rules") != "sp").all()


def test_studies_of_one_length_become_one() -> None:
    """SP's sweep is a study of its own; the gap to it is that of a study that has both, seeds paired."""
    whole = trained(60)
    parts = {"mup": whole.sel(rules=["gdn_mup"]), "sp": whole.sel(rules=["sp"], seed=[0, 2])}
    (joined,) = by_length(parts).values()
    assert set(joined.rules.values) == {"gdn_mup", "sp"}
    table = training_length(parts).set_index("rules")
    assert table.seeds["gdn_mup"] == 2
    both = training_length({"all": whole.sel(rules=["gdn_mup", "sp"], seed=[0, 2])}).set_index("rules")
    assert table.loss_less_sp["gdn_mup"] == pytest.approx(both.loss_less_sp["gdn_mup"])


def test_a_study_of_the_base_width_alone_says_nothing_of_transfer() -> None:
    table = training_length({"short": trained(60), "long": trained(120).sel(width=[32])}).set_index(["rules", "tokens"])
    longest = max(table.index.get_level_values("tokens"))
    assert np.isnan(table.slope["gdn_mup", longest]) and np.isnan(table.loss_less_sp["gdn_mup", longest])


def test_studies_that_differ_in_more_than_length_are_refused() -> None:
    decayed = trained(120)
    settings = decayed.attrs["settings"].replace('"weight_decay": 0.0', '"weight_decay": 0.1')
    assert settings != decayed.attrs["settings"]
    decayed.attrs["settings"] = settings
    with pytest.raises(
        UserError, match=r"study long: training.weight_decay \(heads adamw\): 0.1 is not the 0.0 of study"
    ):
        by_length({"short": trained(60), "long": decayed})
    other_text = trained(120).assign_attrs(corpus_sha256="other")
    with pytest.raises(UserError, match="study long: corpus_sha256"):
        by_length({"short": trained(60), "long": other_text})


def test_the_figure_says_how_the_gap_to_sp_changes() -> None:
    figure, table = transfer_against_training_length({"short": trained(60), "long": trained(120)})
    assert "the gap to SP goes from" in figure.get_suptitle()
    assert set(table.tokens) == {60 * 8 * 128, 120 * 8 * 128}
    with pytest.raises(UserError, match="no sweep was run at two training lengths"):
        transfer_against_training_length({"short": trained(60)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question: why\nstudies: []\n", "studies: "),
        ("question: why\nstudies: [a, a]\n", "studies: named twice"),
        ("question: why\nstudies: [a]\nstudy: b\n", "study: "),
        ("studies: [a\n", "not valid YAML"),
        ("- a\n", "the file: "),
    ],
)
def test_bad_comparisons_are_named_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        load_comparison(path)
    assert str(raised.value).startswith(f"{path}: ") and message in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(UserError, match="there are: mine"):
        load_comparison(tmp_path / "other.yaml")


def test_every_comparison_names_studies_that_are_there_and_has_a_notebook() -> None:
    files = sorted((ROOT / "config/comparisons").glob("*.yaml"))
    assert files
    for path in files:
        assert (ROOT / "notebooks" / f"{path.stem}.ipynb").is_file()
        for name in load_comparison(path).studies:
            assert load_study(ROOT / f"config/studies/{name}.yaml").sweeps


@pytest.mark.parametrize("growth", ["heads", "head_dim"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted(growth: Any, tied: bool) -> None:
    model = study(
        model={"base_width": 32, "heads": 2, "head_dim": 16, "value_head_dim": 32, "tied_embeddings": tied}
    ).model
    shape = model_shape(model, 96, growth, 300)
    assert shape.parameters == sum(int(np.prod(info.shape)) for info in parameter_table(shape).values())


def test_the_regime_is_in_words() -> None:
    words = regime_in_words(load_study(ROOT / "config/studies/h200.yaml"))
    assert "9.83 million tokens a run: 5 per parameter at width 128, 0.15 at width 1024" in words
    assert regime_in_words(Study()) == ""
