"""Clipping against width: exponents, optima and the title follow what is planted, on small grids and few seeds too."""

import numpy as np
import pytest
import xarray as xr
from synthetic import CLIPPINGS, in_memory, study

from gdn_mup.errors import UserError
from gdn_mup.study.clipping import clipped_sweeps, norm_exponents, norms
from gdn_mup.study.figures import Drawing, clipping_against_width


@pytest.fixture(scope="module")
def dataset() -> xr.Dataset:
    return in_memory(study(), "clipping")


def title_of(drawing: Drawing) -> str:
    return " ".join(drawing.figure.get_suptitle().split())


def test_planted_exponents_are_found_and_lie_beside_their_prediction(dataset: xr.Dataset) -> None:
    table = norm_exponents(dataset, norms(dataset, clipped_sweeps(dataset)))
    assert len(table) == 2 * len(CLIPPINGS)
    for clipping, (_, first, late) in CLIPPINGS.items():
        for stage, planted in (("first", first), ("late", late)):
            row = table[(table.clipping == clipping) & (table.stage == stage)].iloc[0]
            assert row.low < planted < row.high and row.high - row.low < 0.15
            assert row.predicted_low == row.predicted_high == (0.0 if clipping == "width_invariant_norm" else 0.5)


def test_late_norms_are_those_of_the_last_updates(dataset: xr.Dataset) -> None:
    """Planted: the first is 2 at the base width, the last a tenth of that; the exponents of both ends differ."""
    turned = in_memory(study(), "clipping", clippings=dict.fromkeys(CLIPPINGS, (0.0, 0.0, 1.0)))
    (sweeps,) = clipped_sweeps(turned)
    table = norms(turned, [sweeps])
    base = table[(table.width == 32) & (table.seed == 0) & (table.clipping == "none")].set_index("stage").norm
    assert base["first"] == pytest.approx(2, rel=0.1) and base["late"] == pytest.approx(0.2 * 10**0.05, rel=0.1)
    exponents = norm_exponents(turned, table).set_index(["clipping", "stage"]).exponent
    assert exponents["none", "first"] == pytest.approx(0, abs=0.05)
    assert exponents["none", "late"] == pytest.approx(0.95, abs=0.05)


def test_the_share_of_clipped_updates_is_counted(dataset: xr.Dataset) -> None:
    """A norm that falls from 2 to 0.2 exponentially is above 1 for log 2 / log 10 of the updates."""
    table = norms(dataset, clipped_sweeps(dataset))
    clipped = table[table.stage == "late"].groupby(["clipping", "width"]).clipped.mean()
    assert clipped["width_invariant_norm"].between(0.25, 0.35).all()
    assert clipped["global_norm", 128] > clipped["global_norm", 32] + 0.2
    assert (clipped["none"] == 0).all()


def test_the_title_says_what_moves(dataset: xr.Dataset) -> None:
    title = title_of(clipping_against_width(dataset))
    assert "at init | late: raw +0.5" in title
    moves, stays = title.split("No movement of it is established")
    assert "moves with width, in octaves per doubling: raw norm (+0." in moves
    assert "no clipping" in stays and "width-invariant norm" in stays
    turned = CLIPPINGS | {"global_norm": (0.0, 0.5, 0.5), "width_invariant_norm": (-1.0, 0.0, 0.0)}
    moves, stays = title_of(clipping_against_width(in_memory(study(), "clipping", clippings=turned))).split(
        "No movement"
    )
    assert "width-invariant norm (−1" in moves and "raw norm" in stays


def test_training_that_diverges_has_no_late_norm(dataset: xr.Dataset) -> None:
    broken = dataset.copy(deep=True)
    broken.grad_norm.loc[{"width": 128, "clipping": "none"}] = dataset.grad_norm.sel(width=128, clipping="none").where(
        dataset.step < 30
    )
    table = norms(broken, clipped_sweeps(broken))
    late = table[(table.stage == "late") & (table.clipping == "none")]
    assert late[late.width == 128].norm.isna().all() and late[late.width < 128].norm.notna().all()
    exponents = norm_exponents(broken, table).set_index(["clipping", "stage"])
    assert exponents.exponent["none", "late"] == pytest.approx(0.5, abs=0.1)  # of the two widths that are left


@pytest.mark.parametrize(
    "selection",
    [{"width": [32]}, {"seed": [0]}, {"clipping": ["none"]}, {"learning_rate": [2.0**-3, 2.0**-2]}],
    ids=["one width", "one seed", "one clipping", "not bracketed"],
)
def test_small_studies_are_drawn(dataset: xr.Dataset, selection: dict[str, list[object]]) -> None:
    drawing = clipping_against_width(dataset.sel(selection))
    assert len(drawing.table) and len(drawing.figure.axes) == 3


def test_a_study_without_the_experiment_is_told_so(dataset: xr.Dataset) -> None:
    with pytest.raises(UserError, match="no clipping check; add one under `clipping_checks`"):
        clipped_sweeps(dataset * np.nan)
