"""Figures and tables are drawn from whatever a study has, say what the data say, and are written reproducibly."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.text import Text
from synthetic import EXPONENTS, SLOPES, excess_loss, in_memory, job_file, study, with_base_seeds

from gdn_mup.errors import UserError
from gdn_mup.model.config import ModelSettings, model_shape
from gdn_mup.scaling.growth import growth_between
from gdn_mup.scaling.rules import RULE_SETS
from gdn_mup.study import datasets, figures, tables
from gdn_mup.study.estimates import signed
from gdn_mup.study.figures import style
from gdn_mup.study.files import from_root
from gdn_mup.study.losses import losses_at
from gdn_mup.study.published import study_setting
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def lr_sweep() -> xr.Dataset:
    return in_memory(study(), "lr_sweep")


@pytest.fixture(scope="module")
def coordinates() -> xr.Dataset:
    return in_memory(study(), "coordinates")


@pytest.fixture(scope="module")
def multiplier() -> xr.Dataset:
    return in_memory(study(), "multiplier")


@pytest.fixture(scope="module")
def clipping() -> xr.Dataset:
    return in_memory(study(), "clipping")


@pytest.fixture(scope="module")
def both_modes() -> xr.Dataset:
    """Sweeps under AdamW that grow by heads and by head dim, under two rule sets."""
    grid = {"log2_first": -11, "log2_last": -2}
    sweep = {"optimizer": "adamw", "rules": ["sp", "gdn_mup"], "seeds": [0, 1, 2], "learning_rates": grid}
    heads = sweep | {"growth": "heads", "widths": [32, 64, 128, 256]}
    return in_memory(study(sweeps=[heads, sweep | {"growth": "head_dim", "widths": [32, 64, 128]}]), "lr_sweep")


@pytest.fixture(scope="module")
def tuning() -> xr.Dataset:
    return in_memory(study(), "tuning")


@pytest.fixture(scope="module")
def drawings(
    lr_sweep: xr.Dataset,
    both_modes: xr.Dataset,
    coordinates: xr.Dataset,
    multiplier: xr.Dataset,
    clipping: xr.Dataset,
    tuning: xr.Dataset,
) -> dict[str, figures.Drawing]:
    return {
        "base_width_tuning": figures.base_width_tuning(tuning),
        "clipping": figures.clipping_against_width(clipping),
        "coordinate_check": figures.coordinate_check(coordinates),
        "gate_dynamics": figures.gate_and_state_dynamics(coordinates),
        "gate_gradients": figures.gate_gradient_exponents(coordinates),
        "growth_modes": figures.growth_modes(both_modes),
        "loss_vs_width": figures.loss_vs_width(lr_sweep),
        "lr_transfer": figures.lr_transfer(lr_sweep, "adamw"),
        "lr_transfer of one rule set": figures.lr_transfer(both_modes.sel(rules=["gdn_mup"]), "adamw"),
        "norm_epsilon": figures.norm_epsilon(multiplier),
        "optimum_vs_width": figures.optimum_vs_width(lr_sweep),
        "published_losses": figures.published_losses(lr_sweep),
        "training_curves": figures.training_curves(lr_sweep),
        "transfer_over_training": figures.transfer_over_training(lr_sweep),
        "clipped_updates": figures.clipped_updates(lr_sweep),
    }


@pytest.fixture(scope="module")
def everything() -> dict[str, figures.Drawing]:
    """Figures of a study with both optimizers, both growth modes and four rule sets; under SGD rates diverge early."""
    sweeps = [{**sweep, "growth": growth} for sweep in study().model_dump()["sweeps"] for growth in GROWTH_TITLES]
    checks = [
        {**study().model_dump()["coordinate_checks"][0], "optimizer": optimizer, "growth": growth}
        for optimizer in OPTIMIZER_TITLES
        for growth in GROWTH_TITLES
    ]
    plan = study(sweeps=sweeps, coordinate_checks=checks)
    lr_sweep, coordinates = (in_memory(plan, kind) for kind in ("lr_sweep", "coordinates"))
    return {
        "coordinate_check": figures.coordinate_check(coordinates),
        "gate_dynamics": figures.gate_and_state_dynamics(coordinates),
        "gate_gradients": figures.gate_gradient_exponents(coordinates),
        "growth_modes": figures.growth_modes(lr_sweep),
        "loss_vs_width": figures.loss_vs_width(lr_sweep),
        "lr_transfer_adamw": figures.lr_transfer(lr_sweep, "adamw"),
        "lr_transfer_sgd": figures.lr_transfer(lr_sweep, "sgd"),
        "optimum_vs_width": figures.optimum_vs_width(lr_sweep),
        "published_losses": figures.published_losses(lr_sweep),
        "training_curves": figures.training_curves(lr_sweep),
    }


def title_of(drawing: figures.Drawing) -> str:
    return " ".join(drawing.figure.get_suptitle().split())


def texts_of(drawing: figures.Drawing) -> Iterator[Text]:
    for text in drawing.figure.findobj(Text):
        if text.get_text().strip() and text.get_visible():
            yield text


def test_no_text_is_too_small_or_cut_off(drawings: dict[str, figures.Drawing]) -> None:
    for name, drawing in drawings.items():
        assert drawing.figure.get_figwidth() in (style.COLUMN_WIDTH, style.FULL_WIDTH), name
        width = drawing.figure.bbox.width
        heading = drawing.figure.texts + [ax.title for ax in drawing.figure.axes]
        heading += [text for legend in drawing.figure.legends for text in legend.get_texts()]
        heading += [ax.yaxis.label for ax in drawing.figure.axes]
        for text in texts_of(drawing):
            assert text.get_fontsize() >= 7, f"{name}: {text.get_text()!r}"
        for text in heading:
            box = text.get_window_extent()
            assert box.x0 >= -1 and box.x1 <= width + 1, f"{name}: {text.get_text()!r} is cut off"
            assert box.y0 >= -1 and box.y1 <= drawing.figure.bbox.height + 1, f"{name}: {text.get_text()!r} is cut off"


def test_legend_lies_below_the_axis_labels(drawings: dict[str, figures.Drawing]) -> None:
    for name, drawing in drawings.items():
        for legend in drawing.figure.legends:
            top = legend.get_window_extent().y1
            for ax in drawing.figure.axes:
                assert top <= ax.get_tightbbox().y0 + 1, name


def test_every_panel_shows_something(drawings: dict[str, figures.Drawing]) -> None:
    for name, drawing in drawings.items():
        for ax in drawing.figure.axes:
            assert not ax.axison or any(len(line.get_xdata()) > 1 for line in ax.lines), name


def test_titles_state_what_was_found(drawings: dict[str, figures.Drawing]) -> None:
    assert re.search("SP −(0.9|1.0)", title_of(drawings["lr_transfer"]))
    title = title_of(drawings["optimum_vs_width"])
    assert "The optimum moves with width: SP (AdamW, SGD)." in title
    assert "Movement not established: original μP, Liu & Gu, gdn-mup (AdamW, SGD)." in title
    assert "Not so at every width: SP (AdamW, SGD)." in title_of(drawings["training_curves"])
    assert "tuned at width 32 lower the loss there by 0.24 nats, and at" in title_of(drawings["base_width_tuning"])


def test_titles_of_a_study_with_everything_have_three_lines_at_most(everything: dict[str, figures.Drawing]) -> None:
    for name, drawing in everything.items():
        assert len(drawing.figure.get_suptitle().splitlines()) <= 3, f"{name}: {drawing.figure.get_suptitle()!r}"


def test_the_cost_in_the_title_is_the_largest_regret(everything: dict[str, figures.Drawing]) -> None:
    regrets = everything["growth_modes"].table.query("width == 128")
    for optimizer, here in regrets.groupby("optimizer"):
        for rules, name in (("sp", "SP"), *RULE_TITLES.items()):
            largest = here[(here.rules == "sp") == (rules == "sp")].transfer_regret.max()
            if largest in here[here.rules == rules].transfer_regret.to_numpy():
                cost = re.escape(f"{name} {largest:.2f} [") if np.isfinite(largest) else f"{name} diverges"
                text = title_of(everything["loss_vs_width"]).split(OPTIMIZER_TITLES[optimizer])[1]
                assert re.search(cost, text), (optimizer, rules)


def test_titles_follow_the_data() -> None:
    moved = in_memory(study(), "lr_sweep", slopes=SLOPES | {"sp": 0.0, "gdn_mup": -1.0})
    assert "The optimum moves with width: gdn-mup (AdamW, SGD)." in title_of(figures.optimum_vs_width(moved))
    assert re.search("gdn-mup −(0.9|1.0)", title_of(figures.lr_transfer(moved, "adamw")))
    harmful = figures.base_width_tuning(in_memory(study(), "tuning", transfers=False))
    assert "that gain 0.24 nats at width 32 lose at width 128: −0" in title_of(harmful)


def test_a_search_at_the_base_width_alone_claims_no_transfer(tuning: xr.Dataset) -> None:
    drawing = figures.base_width_tuning(tuning.sel(width=[32], seed=[0]))
    assert "on the one seed that chose it; no other width was run" in title_of(drawing)
    assert "correlation" not in " ".join(text.get_text() for text in texts_of(drawing))
    order = drawing.figure.axes[0]
    gains = [line.get_ydata()[0] for line in order.lines if line.get_markersize() == 3]
    assert gains == sorted(gains) and len(gains) == 15 and gains[-1] < drawing.table.gain.max()


def test_a_search_is_drawn_with_one_seed_and_with_a_trial_that_diverges(tuning: xr.Dataset) -> None:
    one_seed = figures.base_width_tuning(tuning.sel(seed=[0]))
    assert "nan" not in title_of(one_seed) and np.isnan(one_seed.table.gain_low).all()
    diverged = tuning.diverged.where(tuning.trial != 3, 1)
    drawn = figures.base_width_tuning(tuning.assign(diverged=diverged))
    assert np.isneginf(drawn.table.gain[drawn.table.trial == 3]).all()
    assert len(drawn.figure.axes[1].lines) == len(one_seed.figure.axes[1].lines) - 1


def test_wider_is_darker() -> None:
    colours = list(style.width_colours([256, 32, 64]).values())
    lightness = [sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in colours]
    assert list(style.width_colours([256, 32, 64])) == [32, 64, 256]
    assert lightness == sorted(lightness, reverse=True)


def test_coordinate_exponents_are_recovered(drawings: dict[str, figures.Drawing]) -> None:
    table = drawings["coordinate_check"].table
    last = table[(table.measure == "change") & (table.step == table.step.max())]
    for rules, exponent in EXPONENTS.items():
        assert last[last.rules == rules].exponent.mean() == pytest.approx(exponent, abs=0.03)
    one = last[(last.rules == "sp") & (last.quantity == "state") & (last.layer == 1)].sort_values("width")
    fitted = np.polyfit(np.log(one.width), np.log(one["size"]), 1)[0]  # balanced: every width has every seed
    assert one.exponent.iloc[0] == pytest.approx(fitted, abs=1e-6)


def test_table_of_a_figure_holds_every_run(drawings: dict[str, figures.Drawing], lr_sweep: xr.Dataset) -> None:
    table = drawings["lr_transfer"].table
    adamw = lr_sweep.sel(optimizer="adamw")
    assert len(table) == int(adamw.diverged.notnull().sum())
    assert table.diverged.sum() == int(adamw.diverged.sum())


def test_figures_facet_over_growth_modes(lr_sweep: xr.Dataset, coordinates: xr.Dataset) -> None:
    def both(dataset: xr.Dataset) -> xr.Dataset:
        few = dataset.sel(rules=["sp", "gdn_mup"])
        return xr.concat([few, few.assign_coords(growth=["head_dim"])], dim="growth")

    assert len(figures.lr_transfer(both(lr_sweep), "adamw").figure.axes) == 2 * 2
    assert len(figures.optimum_vs_width(both(lr_sweep)).figure.axes) == 2 * 2
    assert len(figures.training_curves(both(lr_sweep.sel(optimizer=["adamw"]))).figure.axes) == 2 * 2
    assert len(figures.coordinate_check(both(coordinates), ["state", "logits"]).figure.axes) == 2 * 2


@pytest.mark.parametrize(
    "selection",
    [
        {"width": [32]},
        {"seed": [0]},
        {"rules": ["sp"]},
        {"learning_rate": [2.0**-11, 2.0**-10, 2.0**-8]},
        {"learning_rate": [2.0**-3, 2.0**-2]},
    ],
    ids=["one width", "one seed", "one rule set", "not bracketed", "all diverge"],
)
def test_small_studies_are_drawn(lr_sweep: xr.Dataset, selection: dict[str, Any]) -> None:
    small = lr_sweep.sel(selection)
    for draw in (figures.optimum_vs_width, figures.loss_vs_width, figures.published_losses):
        assert len(draw(small).table)
    assert len(figures.transfer_over_training(small).table)
    assert len(figures.lr_transfer(small, "adamw").table)
    assert len(tables.printed_optima(tables.optima(small)))
    assert len(tables.printed_verdicts(tables.verdicts(small)))
    if "learning_rate" not in selection:
        assert len(figures.training_curves(small).table)
    assert not plt.get_fignums()  # a figure that stays open is shown twice in a notebook


def test_valleys_fill_the_panels_of_learning_rate_transfer(lr_sweep: xr.Dataset) -> None:
    """A learning rate that nearly diverges leaves the panel, by an arrowhead; the optima stay in its lower half."""
    highest = lr_sweep.learning_rate.where(lr_sweep.diverged == 0).max("learning_rate")
    nearly = lr_sweep.assign(val_loss=lr_sweep.val_loss.where(lr_sweep.learning_rate != highest, 60.0))
    for optimizer in ("adamw", "sgd"):
        figure, table = figures.lr_transfer(nearly, optimizer)
        optima = table.dropna(subset="optimum_log2_learning_rate")
        assert len(optima)
        for ax, (_, rules) in zip(figure.axes, table.groupby("rules", sort=False), strict=True):
            floor, ceiling = ax.get_ylim()
            circles = [line for line in ax.lines if line.get_marker() == "o"]
            assert len(circles) == rules.dropna(subset="optimum_log2_learning_rate").width.nunique() > 0
            heights = np.concatenate([line.get_ydata() for line in circles])
            assert (floor < heights).all() and (heights < (floor + ceiling) / 2).all()
            ends = rules[["optimum_low", "optimum_high"]].dropna().to_numpy()
            assert ax.get_xlim()[0] < ends.min() and ends.max() < ax.get_xlim()[1]
            arrowheads = [line for line in ax.lines if line.get_marker() == "^" and len(line.get_xdata())]
            assert ceiling < 30 and len(arrowheads) == rules.width.nunique()


def test_a_row_without_its_first_panel_keeps_its_numbers(both_modes: xr.Dataset) -> None:
    partial = both_modes.copy(deep=True)
    for name in ("train_loss", "val_loss", "diverged"):
        partial[name].loc[{"growth": "head_dim", "rules": "sp"}] = np.nan
    above, _, empty, beside = figures.lr_transfer(partial, "adamw").figure.axes
    assert not empty.axison
    assert "larger heads" in beside.get_ylabel() and any(label.get_visible() for label in beside.get_yticklabels())
    assert "learning rate" in above.get_xlabel() and any(label.get_visible() for label in above.get_xticklabels())


def test_one_width_has_an_optimum_and_no_slope(lr_sweep: xr.Dataset) -> None:
    for drawing in (
        figures.lr_transfer(lr_sweep.sel(width=[32]), "adamw"),
        figures.optimum_vs_width(lr_sweep.sel(width=[32])),
    ):
        said = " ".join(text.get_text() for text in texts_of(drawing))
        assert "at width 32 only" in said and "not bracketed" not in said


def test_coordinate_check_of_one_width_has_no_exponent(coordinates: xr.Dataset) -> None:
    drawing = figures.coordinate_check(coordinates.sel(width=[32]))
    assert drawing.table.exponent.isna().all()
    assert "One width only" in title_of(drawing)


def test_coordinate_check_of_init_only_is_refused(coordinates: xr.Dataset) -> None:
    with pytest.raises(UserError, match="no step after 0"):
        figures.coordinate_check(coordinates.sel(step=[0]))


def with_exponents(coordinates: xr.Dataset, more: dict[str, float]) -> xr.Dataset:
    """The coordinates with changes that grow by width^more besides, per rule set."""
    power = xr.DataArray([more.get(name, 0.0) for name in coordinates.rules.to_numpy()], dims="rules")
    ratio = coordinates.width / coordinates.attrs["base_width"]
    return coordinates.assign(change=coordinates.change * ratio**power)


def test_coordinate_title_names_what_grows_and_falls(coordinates: xr.Dataset) -> None:
    title = title_of(figures.coordinate_check(coordinates))
    assert ": SP (AdamW). No growth is established: original μP, Liu & Gu, gdn-mup (AdamW)." in title
    assert "fall" not in title
    title = title_of(figures.coordinate_check(with_exponents(coordinates, {"sp": -0.5, "liu_gu": -1.0})))
    assert title.startswith("No growth of a change with width") and "Liu & Gu, AdamW" in title.split("Steepest fall")[1]


def test_smaller_state_is_expected_of_larger_heads(coordinates: xr.Dataset) -> None:
    """With keys of length one: the exponent −½ is flat there, and no exponent is growth."""
    halved = with_exponents(coordinates, {name: -0.5 for name in EXPONENTS})
    heads = title_of(figures.coordinate_check(halved, ["state"]))
    larger = title_of(figures.coordinate_check(halved.assign_coords(growth=["head_dim"]), ["state"]))
    assert "Steepest fall" in heads and "No growth of a change" in heads
    assert "Steepest fall" not in larger and "grow with width" in larger and ": SP (AdamW)" in larger


@pytest.mark.parametrize("more", [0.0, 1.5, -1.5, 6.0])
@pytest.mark.parametrize("octaves", [0.0, 1.5], ids=["equal seeds", "unequal seeds"])
def test_exponents_of_the_coordinate_check_touch_no_data(coordinates: xr.Dataset, more: float, octaves: float) -> None:
    dataset = with_exponents(coordinates, dict.fromkeys(EXPONENTS, more))
    dataset = dataset.assign(change=dataset.change * 2 ** (octaves * (dataset.seed - 1)))
    arrows = 0
    for ax in figures.coordinate_check(dataset).figure.axes:
        labels = [text for text in ax.texts if text.get_text()[:1] in style.RULE_SIGNS.values()]
        assert len(labels) == len(EXPONENTS)
        boxes = [text.get_window_extent() for text in labels]
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :])
        points = [xy for line in ax.lines for xy in ax.transData.transform(line.get_xydata())]
        points += [xy for bars in ax.collections for bar in bars.get_segments() for xy in ax.transData.transform(bar)]
        assert not any(box.contains(*xy) for box in boxes for xy in points)
        arrows += sum(text.get_text().startswith("to ") for text in ax.texts)
    assert (arrows > 0) == (more == 6.0)


def test_equal_rule_sets_lie_side_by_side(coordinates: xr.Dataset) -> None:
    same = coordinates.sel(rules=["gdn_mup", "gdn_mup"]).assign_coords(rules=["mup", "gdn_mup"])
    for ax in figures.coordinate_check(same).figure.axes:
        drawn = {line.get_marker(): line.get_xydata() for line in ax.lines if line.get_marker() != "None"}
        mup, gdn_mup = (drawn[style.RULE_MARKERS[name]] for name in ("mup", "gdn_mup"))
        assert mup[:, 1] == pytest.approx(gdn_mup[:, 1])
        assert (gdn_mup[:, 0] - mup[:, 0] > 0.1).all()


def test_free_panels_of_training_curves_hold_the_legend(lr_sweep: xr.Dataset) -> None:
    missing = {"optimizer": "adamw", "rules": ["mup", "liu_gu"]}
    partial = lr_sweep.copy(deep=True)
    for name in ("train_loss", "val_loss", "diverged"):
        partial[name].loc[missing] = np.nan
    figure = figures.training_curves(partial).figure
    legends = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    assert len(legends) == 1 and not figure.legends
    assert [ax.axison for ax in figure.axes].count(False) == 1
    assert len(figure.axes) == 2 + 4 + 1


def test_absent_sweep_is_named(lr_sweep: xr.Dataset) -> None:
    with pytest.raises(UserError, match="no learning-rate sweep with optimizer `sgd`"):
        figures.lr_transfer(lr_sweep.sel(optimizer=["adamw"]), "sgd")


def test_saved_files_are_whole_and_reproducible(drawings: dict[str, figures.Drawing], tmp_path: Path) -> None:
    for name in ("first", "second"):
        figures.save(*drawings["optimum_vs_width"], tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("first.csv", "first.png", "first.svg", "second.csv", "second.png", "second.svg"),
    ]
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    assert b"dc:date" not in (tmp_path / "first.svg").read_bytes()
    pixels = plt.imread(tmp_path / "first.png").shape
    assert pixels[1] == pytest.approx(300 * style.FULL_WIDTH, abs=1)
    read = pd.read_csv(tmp_path / "first.csv")
    assert list(read.columns) == list(drawings["optimum_vs_width"].table.columns)


def test_paths_start_at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Snakefile").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert from_root("results/x.nc") == tmp_path / "results/x.nc"
    assert from_root(tmp_path / "x.nc") == tmp_path / "x.nc"


# Losses at one learning rate


def test_seeds_lie_about_a_mean_that_is_known() -> None:
    octaves = np.arange(-6.0, 0.0)
    curve = pd.DataFrame(0.3 * (octaves + 3.3) ** 2 + np.array([[3.0], [3.1]]), columns=2.0**octaves)
    assert losses_at(curve, -3.5).to_list() == pytest.approx(curve.iloc[:, 2:4].mean(axis=1).to_list())
    assert losses_at(curve, -3.3, 3.04).to_list() == pytest.approx([2.99, 3.09])
    assert losses_at(curve, -6.2).isna().all() and losses_at(curve, -0.8, 3.0).isna().all()


def test_a_learning_rate_beside_divergence_diverges() -> None:
    rates = 2.0 ** np.arange(-6.0, 0.0)
    curve = pd.DataFrame(np.tile([3.0, 2.0, 1.0, 2.0, 2.5, 3.0], (2, 1)), columns=rates)
    curve.iloc[1, 4] = np.nan  # one seed
    at = {rate: losses_at(curve, rate) for rate in (-3.5, -3, -2.5, -2, -1.5, -1)}
    assert [rate for rate, losses in at.items() if np.isinf(losses).all()] == [-2.5, -2, -1.5]
    assert [rate for rate, losses in at.items() if np.isfinite(losses).all()] == [-3.5, -3, -1]


def test_losses_agree_with_the_table_of_optima(lr_sweep: xr.Dataset, drawings: dict[str, figures.Drawing]) -> None:
    losses = drawings["loss_vs_width"].table.set_index(["optimizer", "rules", "width", "learning_rate"]).loss
    table = tables.optima(lr_sweep)
    for row in table[table.not_bracketed == ""].itertuples():
        best = losses[row.optimizer, row.rules, row.width, "own best"]
        transferred = losses[row.optimizer, row.rules, row.width, "transferred"]
        assert best == pytest.approx(row.loss, abs=1e-3)
        if np.isfinite(row.transfer_regret):
            assert transferred - best == pytest.approx(row.transfer_regret, abs=1e-3)
        elif row.transfer_regret == np.inf:
            assert transferred == np.inf


def test_best_losses_are_held_against_other_rule_sets_seed_by_seed() -> None:
    lower = in_memory(study(), "lr_sweep", slopes=SLOPES)
    loss = lower.val_loss
    lower["val_loss"] = loss.where((loss.rules != "gdn_mup") | (loss.width == 32), loss - 0.3)
    table = tables.optima(lower)
    rows = table[(table.growth == "heads") & (table.optimizer == "adamw") & (table.rules == "gdn_mup")]
    assert rows[rows.width == 32].loss_less_sp.isna().all()
    wider = rows[(rows.width > 32) & rows.loss_less_sp.notna()]
    assert len(wider)
    assert wider.loss_less_sp.between(wider.loss_less_sp_low, wider.loss_less_sp_high).all()
    assert (wider.loss_less_sp_high < 0).all()


def test_divergence_at_the_transferred_learning_rate_is_drawn() -> None:
    drawing = figures.loss_vs_width(in_memory(study(), "lr_sweep", slopes=SLOPES | {"sp": -0.5, "mup": -1.6}))
    crosses = {
        ax.get_title(loc="left"): len(line.get_xdata())
        for ax in drawing.figure.axes
        for line in ax.lines
        if line.get_marker() == "x"
    }
    infinite = drawing.table[np.isinf(drawing.table.loss)]
    assert set(infinite.rules) == {"mup"} and set(infinite.learning_rate) == {"transferred"}
    assert sum(crosses.values()) == len(infinite) == 2
    assert "original μP diverges" in title_of(drawing)
    assert any(text.get_text() == "diverges" for legend in drawing.figure.legends for text in legend.get_texts())


def test_seeds_of_the_base_width_alone_are_its_own() -> None:
    """They count for its optimum, and not where widths are held against one another."""
    few, more = (in_memory(plan, "lr_sweep") for plan in (study(), with_base_seeds(3, 4, 5, 6)))
    before, table = tables.optima(few), tables.optima(more)
    assert table.groupby("width").seeds.unique().map(list).to_dict() == {32: [7], 64: [3], 128: [3]}
    assert ((table.log2_learning_rate != before.log2_learning_rate) == (table.width == 32)).all()
    assert figures.lr_transfer(more, "adamw").table.groupby("width").seed.nunique().to_dict() == {32: 7, 64: 3, 128: 3}
    losses = figures.loss_vs_width(more).table
    assert losses.groupby("width").seeds.unique().map(list).to_dict() == {32: [7], 64: [3], 128: [3]}
    assert set(figures.training_curves(more).table.seed) == {0, 1, 2}
    assert set(figures.training_curves(more.sel(width=[32])).table.seed) == set(range(7))
    assert study_setting(more, "heads", "adamw").seeds == 3
    assert study_setting(more.sel(width=[32]), "heads", "adamw").seeds == 7


# Growth modes


def test_growth_modes_lie_side_by_side(drawings: dict[str, figures.Drawing], both_modes: xr.Dataset) -> None:
    drawing = drawings["growth_modes"]
    upper = drawing.figure.axes[:2]
    assert upper[0].get_ylim() == upper[1].get_ylim()
    assert set(drawing.table.growth) == {"heads", "head_dim"}
    slopes = drawing.table.groupby(["rules", "growth"]).slope.first()
    assert f"SP {signed(slopes['sp', 'heads'])} | {signed(slopes['sp', 'head_dim'])}" in title_of(drawing)


def test_growth_modes_share_axes_that_span_both() -> None:
    grid = {"log2_first": -11, "log2_last": -2}
    sweep = {"optimizer": "adamw", "rules": ["sp"], "widths": [32, 64], "seeds": [0, 1, 2], "learning_rates": grid}
    plan = study(sweeps=[sweep | {"growth": growth} for growth in GROWTH_TITLES])
    slopes = {"heads": SLOPES | {"sp": -1.0}, "head_dim": SLOPES | {"sp": -3.0}}
    jobs = [job_file(plan, job, slopes[job.growth]) for job in plan.jobs("lr_sweep")]
    for ax in figures.growth_modes(datasets.combine(jobs, "lr_sweep", plan)).figure.axes[:2]:
        low, high = ax.get_ylim()
        heights = np.concatenate([line.get_ydata() for line in ax.lines])
        assert len(heights) and low <= np.nanmin(heights) and np.nanmax(heights) <= high


def test_only_rule_sets_of_both_modes_are_compared(both_modes: xr.Dataset, lr_sweep: xr.Dataset) -> None:
    only_heads = both_modes.copy(deep=True)
    for name in ("train_loss", "val_loss", "diverged"):
        only_heads[name].loc[{"growth": "head_dim", "rules": "sp"}] = np.nan
    assert set(figures.growth_modes(only_heads).table.rules) == {"gdn_mup"}
    with pytest.raises(UserError, match="no rule set has learning-rate sweeps in both growth modes"):
        figures.growth_modes(lr_sweep)


def test_slopes_of_growth_modes_touch_no_data(drawings: dict[str, figures.Drawing]) -> None:
    for ax in drawings["growth_modes"].figure.axes[:2]:
        top = max(text.get_window_extent().y1 for text in ax.texts)
        ends = [y for line in ax.lines for y in np.atleast_1d(line.get_ydata()).astype(float)]
        ends += [y for bars in ax.collections for path in bars.get_paths() for y in path.vertices[:, 1]]
        assert top <= ax.transData.transform((1.0, min(y for y in ends if np.isfinite(y))))[1]


# Transfer over training


@pytest.mark.parametrize(
    ("early", "late", "says"),
    [(-0.5, 0.0, "only earlier"), (0.0, -0.5, "only at the end"), (-0.5, -0.5, "at the end as earlier")],
)
def test_when_the_optimum_moves_is_told(early: float, late: float, says: str) -> None:
    still = dict.fromkeys(SLOPES, 0.0)
    plan = study(sweeps=[study().sweeps[0].model_dump(mode="json", exclude_unset=True)])
    truth = {"slopes": still | {"liu_gu": late}, "early_slopes": still | {"liu_gu": early}}
    drawing = figures.transfer_over_training(in_memory(plan, "lr_sweep", **truth))
    told = re.findall("(only earlier|only at the end|at the end as earlier): (.*?) by more heads", title_of(drawing))
    assert told == [(says, "Liu & Gu (AdamW)")]
    assert ("at the end: no movement established" in title_of(drawing)) == (late == 0)
    assert f"at width 128: {'Liu & Gu' if late else ''}" in title_of(drawing)
    table = drawing.table.set_index(["rules", "step"])
    assert sorted(set(drawing.table.step)) == [20, 40, 60]
    for (rules, step), row in table.iterrows():
        slope = 0.0 if rules != "liu_gu" else late if step == 60 else early
        assert row.slope == pytest.approx(slope, abs=0.15)
        assert row.slope_low <= slope <= row.slope_high
        learned = 1.0 if step == 60 else 1 - np.exp(-6 * step / 60)
        regret = learned * float(excess_loss(np.array([-2 * slope]))[0])
        assert row.transfer_regret == pytest.approx(regret, abs=0.05)
        assert row.regret_low <= regret <= row.regret_high


def test_the_last_evaluation_is_that_of_the_other_figures(drawings: dict[str, figures.Drawing]) -> None:
    places = ["optimizer", "rules"]
    over_training = drawings["transfer_over_training"].table
    last = over_training[over_training.step == 60].set_index(places)
    optima = drawings["optimum_vs_width"].table.groupby(places, sort=False).first()
    names = ["slope", "slope_low", "slope_high"]
    pd.testing.assert_frame_equal(last[names], optima[names])


def test_a_loss_above_the_untrained_one_has_diverged(lr_sweep: xr.Dataset) -> None:
    """Also in the course of training, and only for as long as it is: what learning rates do later does not count."""
    adamw = lr_sweep.sel(optimizer=["adamw"], rules=["gdn_mup"]).copy(deep=True)
    adamw.val_loss.loc[{"evaluation_step": 20, "learning_rate": adamw.learning_rate > 2.0**-6}] = 7.0
    table = figures.transfer_over_training(adamw).table.set_index("step")
    assert "width 32: best at 2^-6, next to divergence" in table.no_slope[20]
    assert table.no_regret[20].startswith("no optimum at the base width")
    assert (table.no_slope[[40, 60]] == "").all()


def test_divergence_at_the_transferred_rate_is_drawn_when_it_comes(drawings: dict[str, figures.Drawing]) -> None:
    """Members of high learning rates are lost between the first and the second evaluation."""
    drawing = drawings["transfer_over_training"]
    table = drawing.table[(drawing.table.rules == "sp") & (drawing.table.optimizer == "adamw")].set_index("step")
    assert np.isfinite(table.transfer_regret[20]) and np.isinf(table.transfer_regret[[40, 60]]).all()
    crosses = [line for ax in drawing.figure.axes for line in ax.lines if line.get_marker() == "x"]
    assert sum(len(line.get_xdata()) for line in crosses) == np.isinf(drawing.table.transfer_regret).sum()
    assert "at width 128: SP (AdamW, SGD) by more heads, diverges" in title_of(drawing)


def test_panels_of_transfer_over_training_hold_every_slope(drawings: dict[str, figures.Drawing]) -> None:
    drawing = drawings["transfer_over_training"]
    slopes, regrets, *_ = drawing.figure.axes
    ends = drawing.table[drawing.table.optimizer == "adamw"][["slope_low", "slope_high"]].to_numpy()
    low, high = slopes.get_ylim()
    assert low <= np.nanmin(ends) and np.nanmax(ends) <= high
    assert [int(tick) for ax in (slopes, regrets) for tick in ax.get_xticks()] == 2 * [20, 40, 60]


def test_one_evaluation_does_not_show_a_development() -> None:
    once = study(training={"steps": 60, "warmup_steps": 6, "evaluate_every": 60})
    with pytest.raises(UserError, match=r"evaluated more than once.*evaluate_every"):
        figures.transfer_over_training(in_memory(once, "lr_sweep"))


# The paper's losses


def test_the_papers_losses_are_as_printed(drawings: dict[str, figures.Drawing]) -> None:
    table = drawings["published_losses"].table
    paper = table[table.source == "paper"].set_index(["optimizer", "rules", "width"])
    assert len(paper) == 20
    assert paper.loss["sgd", "mup", 768] == 3.0076 and paper.loss["adamw", "liu_gu", 1536] == 2.7449
    assert paper.minus_sp["sgd", "liu_gu", 256] == pytest.approx(0.05)
    assert paper.minus_base["adamw", "sp", 1024] == pytest.approx(2.8613 - 3.4525)
    assert paper.multiple["sgd", "sp", 1024] == 4
    assert paper[["minus_sp_low", "minus_base_high"]].isna().all(axis=None)
    assert "SGD: paper −0.05 to −0.04 (its runs of one model differ by 0.09)" in title_of(drawings["published_losses"])


def test_our_differences_are_paired_by_seed(lr_sweep: xr.Dataset) -> None:
    """What a seed adds to every loss at every rule set and width leaves differences and intervals as they are."""
    shifted = lr_sweep.assign(val_loss=lr_sweep.val_loss + 0.05 * lr_sweep.seed)
    before, after = (figures.published_losses(dataset).table for dataset in (lr_sweep, shifted))
    assert (after.loss - before.loss)[after.source == "this study"].to_numpy() == pytest.approx(0.05, abs=5e-3)
    names = ["minus_sp", "minus_sp_low", "minus_base", "minus_base_high"]
    assert after[names].to_numpy() == pytest.approx(before[names].to_numpy(), abs=1e-2, nan_ok=True)


def test_both_budgets_are_stated(drawings: dict[str, figures.Drawing]) -> None:
    keys = [text.get_text() for text in texts_of(drawings["published_losses"])]
    (paper,) = (key for key in keys if key.startswith("arXiv 2606.04048"))
    (ours,) = (key for key in keys if key.startswith("this study"))
    assert "9.83 B tokens" in paper and "FineWeb-Edu" in paper and "1 seed," in paper and "no intervals" in paper
    assert "widths 32–128" in ours and "3 seeds" in ours and "Python standard library" in ours


def test_a_corpus_is_called_by_its_name(lr_sweep: xr.Dataset) -> None:
    settings = json.loads(lr_sweep.attrs["settings"])
    settings["corpus"] |= {"source": "huggingface", "dataset": "HuggingFaceFW/fineweb-edu"}
    other = lr_sweep.assign_attrs(settings=json.dumps(settings))
    assert study_setting(other, "heads", "adamw").corpus == "HuggingFaceFW/fineweb-edu"
    assert study_setting(lr_sweep, "heads", "adamw").corpus == "Python standard library"


# Tables


def test_rules_are_what_the_paper_prints() -> None:
    """Where the paper speaks (growth by head_dim), `liu_gu` and `mup` agree with it, the code's variants apart."""
    table = tables.scaling_rules()
    spoken = table[(table.paper != "") & ~table.paper.str.contains("code")]
    assert len(spoken) >= 15
    pd.testing.assert_series_equal(spoken.liu_gu, spoken.paper, check_names=False)
    original = table[table.paper_original_mup != ""]
    pd.testing.assert_series_equal(original.mup, original.paper_original_mup, check_names=False)
    theirs = table.set_index(["growth", "parameters", "multiplier"]).loc["head_dim"]
    assert theirs.loc[("W_a, W_b", "sgd_learning_rate"), ["liu_gu", "gdn_mup"]].to_list() == ["m^-1/2", "m^-1"]


def test_variants_say_what_they_multiply_otherwise() -> None:
    table = tables.variants().set_index(["variant", "of", "multiplier", "parameters", "growth by"])
    where = "more heads or larger heads"
    sp, liu_gu, mixer = (RULE_TITLES[name] for name in ("sp_released", "liu_gu_released", "liu_gu_released_mixer"))
    found = {key: tuple(row) for key, row in zip(table.index, table.to_numpy(), strict=True)}
    matrices = "q, k, v, g, o, MLP, W_a, W_b, readout"
    assert found[sp, "SP", "init std", matrices, where] == ("m⁻¹ᐟ²", "1")
    assert found[liu_gu, "Liu & Gu", "AdamW weight decay", "embedding", where] == ("1", "none")
    assert found[mixer, liu_gu, "AdamW learning rate", "o", where] == ("m⁻¹", "m⁻²")
    assert found["gdn-mup, λ constant", "gdn-mup", "AdamW weight decay", matrices, where] == ("m", "1")
    assert {key[0] for key in found} == {rules.title for rules in RULE_SETS.values() if rules.variant_of}
    assert len([key for key in found if key[0] == sp]) == 1


@pytest.mark.parametrize("growth", ["heads", "head_dim"])
def test_parameter_groups_grow_as_the_model_does(growth: Any) -> None:
    language_model = pytest.importorskip("gdn_mup.model.language_model")
    model = ModelSettings()
    base, target = (language_model.parameter_table(model_shape(model, width, growth, 512)) for width in (32, 128))
    declared = {
        (group.part, 4.0 ** group.fan_in[i], 4.0 ** group.fan_out[i])
        for group in (*tables.PARAMETER_GROUPS, tables._MIXER_OUTPUT)
        for i in [list(GROWTH_TITLES).index(growth)]
    }
    found = set()
    for name, info in base.items():
        grown = growth_between(info, target[name], 4.0)
        found.add((info.part, grown.fan_in, grown.fan_out))
    assert found == declared


def test_tables_are_written_three_times(lr_sweep: xr.Dataset, tmp_path: Path) -> None:
    table = tables.optima(lr_sweep)
    tables.save(table, tmp_path / "optima", tables.printed_optima(table))
    read = pd.read_csv(tmp_path / "optima.csv")
    assert read.log2_learning_rate.to_numpy() == pytest.approx(table.log2_learning_rate, nan_ok=True, rel=1e-5)
    markdown = (tmp_path / "optima.md").read_text("utf-8")
    assert "original μP" in markdown and "diverges" in markdown and "gdn_mup" not in markdown
    tex = (tmp_path / "optima.tex").read_text("utf-8")
    assert tex.count(r"\\") == len(table) + 1
    assert r"Liu \& Gu" in tex and r"\toprule" in tex and tex.isascii()


def test_metrics_of_transfer_say_why_they_are_missing(lr_sweep: xr.Dataset, tmp_path: Path) -> None:
    table = tables.transfer_metrics(lr_sweep)
    tables.save(table, tmp_path / "metrics", tables.printed_transfer_metrics(table))
    rows = table.set_index(["growth", "optimizer", "rules"])
    planted = rows.loc["heads", "adamw", "gdn_mup"]
    assert planted.slope_low <= 0 <= planted.slope_high
    assert planted.fit_error_low == 0.0
    assert planted.loss_penalty_low <= 0 <= planted.loss_penalty_high
    assert rows.loc["heads", "adamw", "sp"].no_loss_penalty == "this is SP"
    for name in ("slope", "fit_error", "robustness_exponent", "loss_penalty"):
        assert ((table[f"no_{name}"] == "") == table[name].notna()).all()
    assert len(tables.transfer_metrics(lr_sweep.sel(width=[32]))) == len(table)
    assert "–" in (tmp_path / "metrics.md").read_text("utf-8")
    assert (tmp_path / "metrics.tex").read_text("utf-8").isascii()


def test_scaling_rules_and_verdicts_are_plain_tex(lr_sweep: xr.Dataset, tmp_path: Path) -> None:
    rules, verdicts = tables.scaling_rules(), tables.verdicts({"lr_sweep": lr_sweep})
    tables.save(rules, tmp_path / "rules", tables.printed_scaling_rules(rules))
    tables.save(verdicts, tmp_path / "verdicts", tables.printed_verdicts(verdicts))
    for name in ("rules", "verdicts"):
        assert (tmp_path / f"{name}.tex").read_text("utf-8").isascii(), name
    assert "m$^{-1/2}$" in (tmp_path / "rules.tex").read_text("utf-8")


# Notebooks


def notebooks() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_notebook_runs_by_itself(
    path: Path,
    lr_sweep: xr.Dataset,
    both_modes: xr.Dataset,
    coordinates: xr.Dataset,
    multiplier: xr.Dataset,
    clipping: xr.Dataset,
    tuning: xr.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With its default parameters, from its own folder, as when opened in Jupyter."""
    (tmp_path / "Snakefile").touch()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "results").mkdir()  # with what figures of several studies are drawn from
    (tmp_path / "results/reference").symlink_to(Path(__file__).parents[1] / "results/reference")
    monkeypatch.chdir(tmp_path / "notebooks")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    if "lr_sweep =" in code[0]:
        sweeps = both_modes if path.stem == "growth_modes" else lr_sweep
        datasets.write(sweeps, tmp_path / "results/laptop/datasets/lr_sweep.nc")
    if "coordinates =" in code[0]:
        datasets.write(coordinates, tmp_path / "results/laptop/datasets/coordinates.nc")
    if "multiplier =" in code[0]:
        datasets.write(multiplier, tmp_path / "results/laptop/datasets/multiplier.nc")
    if "clipping =" in code[0]:
        datasets.write(clipping, tmp_path / "results/laptop/datasets/clipping.nc")
    if "tuning =" in code[0]:
        datasets.write(tuning, tmp_path / "results/laptop/datasets/tuning.nc")
    names: dict[str, Any] = {}
    for cell in code:
        exec(cell, names)
    written = {file.suffix for file in (tmp_path / "results").rglob(f"{path.stem}.*")} - {".nc"}
    assert written in ({".svg", ".png", ".csv"}, {".csv", ".md", ".tex"})


def test_study_never_imports_torch() -> None:
    modules = "figures, tables, claims, optimum, datasets, dynamics, multiplier, tuning"
    code = f"import sys; from gdn_mup.study import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_verdicts_need_no_drawing() -> None:
    code = "import sys; from gdn_mup.study import claims, tables; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_panels_of_an_optimizer_share_an_axis_that_fits_its_optima(everything: dict[str, figures.Drawing]) -> None:
    figure, table = everything["optimum_vs_width"]
    for j, optimizer in enumerate(OPTIMIZER_TITLES):
        panels = figure.axes[j :: len(OPTIMIZER_TITLES)]
        low, high = panels[0].get_ylim()
        assert {ax.get_ylim() for ax in panels} == {(low, high)}
        optima = table[table.optimizer == optimizer]
        assert low < optima.optimum_low.min() and optima.optimum_high.max() < high
        assert optima.optimum_high.max() - optima.optimum_low.min() > 0.8 * (high - low)
    for ax in figure.axes:
        assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


def test_an_interval_far_above_all_regrets_leaves_its_panel(both_modes: xr.Dataset) -> None:
    """Where seeds disagree about the edge of divergence; the others keep an axis on which they are seen."""
    unsure = both_modes.sel(rules=["gdn_mup"]).copy(deep=True)
    place = {"growth": "head_dim", "width": 128, "seed": 2}
    unsure.val_loss.loc[place] = unsure.val_loss.loc[place].where(unsure.learning_rate < 2.0**-4.5, 6.0)
    drawing = figures.growth_modes(unsure)
    ceiling = drawing.figure.axes[2].get_ylim()[1]
    assert {ax.get_ylim()[1] for ax in drawing.figure.axes[2:]} == {ceiling}
    farthest = drawing.table.regret_high.replace(np.inf, np.nan).max()
    others = drawing.table.regret_high[drawing.table.regret_high < farthest]
    assert farthest > ceiling > max(drawing.table.transfer_regret.max(), others.max())
    assert f"to {farthest:.1f}" in {text.get_text() for text in texts_of(drawing)}


def test_every_rule_set_has_a_look_of_its_own() -> None:
    for looks in (style.RULE_COLOURS, style.RULE_MARKERS, style.RULE_SIGNS):
        assert list(looks) == list(RULE_SETS)
        assert len(set(looks.values())) == len(RULE_SETS)
    assert list(RULE_SETS) == list(datasets.NAME_ORDER["rules"])
