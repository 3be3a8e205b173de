"""Figure of gradient clipping: the norms that it compares, and the best learning rate, against width."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from gdn_mup.study.clipping import (
    LATE,
    PLACES,
    ClippedSweeps,
    clipped_sweeps,
    geometric_mean,
    norm_exponents,
    norms,
)
from gdn_mup.study.estimates import Estimate, over_seeds, signed, signed_range
from gdn_mup.study.figures.style import (
    FULL_WIDTH,
    Drawing,
    legend,
    letters,
    panel_title,
    power_axis,
    styled,
    title,
    width_axis,
)
from gdn_mup.study.figures.transfer import optima_against_width
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES

# What clipping compares, in the order in which it is drawn. Without clipping it is the raw norm.
CLIPPING_TITLES = {"none": "no clipping", "global_norm": "raw norm", "width_invariant_norm": "width-invariant norm"}
CLIPPING_COLOURS = {"none": "0.35", "global_norm": "C3", "width_invariant_norm": "C0"}
CLIPPING_MARKERS = {"none": "s", "global_norm": "o", "width_invariant_norm": "^"}
STAGES = {"first": "first update", "late": f"last {100 * LATE:.0f} % of the updates"}


@styled
def clipping_against_width(dataset: xr.Dataset) -> Drawing:
    """Norms and optima against width, a line per clipping; a row per growth, optimizer and rule set.

    Left and middle: the norm that clipping compares, at the first update and late in training; points are geometric
    means over seeds, bars span them, numbers are width exponents with 95 % intervals, dashed lines the predicted ones
    from the base width on, the dotted line is the norm above which gradients are clipped. Right: the best learning rate
    with its 95 % interval, and the slope that the legend gives; hollow markers are not bracketed. The table has one
    row per clipping, width and stage. Raises UserError if nothing was run.
    """
    found = clipped_sweeps(dataset)
    table = norms(dataset, found)
    exponents = norm_exponents(dataset, table)
    size = (FULL_WIDTH, 1.0 + 2.6 * len(found))
    figure, axes = plt.subplots(len(found), 3, figsize=size, sharex=True, squeeze=False)
    letter = letters()
    for row, sweeps in zip(axes, found, strict=True):
        row[1].sharey(row[0])
        where = _words(sweeps.place)
        for ax, (stage, when) in zip(row, STAGES.items(), strict=False):
            here = _at(table, sweeps.place)
            fits = _at(exponents, sweeps.place)
            _norm_panel(ax, here[here.stage == stage], fits[fits.stage == stage], sweeps, dataset.attrs["base_width"])
            panel_title(ax, next(letter), f"norm, {when}\n{where}")
        _room_below(row[:2], len(sweeps.sweeps))
        row[0].set_ylabel("gradient norm, before clipping")
        ax = row[2]
        for k, (clipping, sweep) in enumerate(sweeps.sweeps.items()):
            shift = 0.06 * (k - (len(sweeps.sweeps) - 1) / 2)
            look = CLIPPING_COLOURS[clipping], CLIPPING_MARKERS[clipping]
            optima_against_width(ax, sweep, shift, *look)
        power_axis(ax.yaxis)
        _room_below([ax], len(sweeps.sweeps))
        ax.legend(loc="lower left", title="octaves per doubling", alignment="left", title_fontsize=7)
        ax.set_ylabel("best learning rate\n(at the base width)")
        panel_title(ax, next(letter), f"optimum\n{where}")
    widths = sorted(table.width.unique())
    for ax in axes[-1]:
        width_axis(ax, widths)
        ax.set_xlabel("width")
    title(figure, "\n".join([_norms_finding(exponents), _optima_finding(found)]))
    shown = [name for name in CLIPPING_TITLES if name in set(table.clipping)]
    handles = [
        Line2D([], [], color=CLIPPING_COLOURS[name], marker=CLIPPING_MARKERS[name], mec="white", mew=0.4, ms=4.5,
               label=CLIPPING_TITLES[name]) for name in shown
    ]  # fmt: skip
    handles += [
        Line2D([], [], color="0.5", lw=0.8, ls="--", label="predicted slope"),
        Line2D([], [], color="0.5", lw=0.8, ls=":", label="clipped above"),
    ]
    legend(figure, handles)
    return Drawing(figure, _printed(table, exponents, found))


def _norm_panel(ax: Axes, here: pd.DataFrame, fits: pd.DataFrame, sweeps: ClippedSweeps, base_width: int) -> None:
    """One stage: a line per clipping in log₂ units, the slopes predicted of it, and the exponents measured."""
    clippings = list(sweeps.sweeps)
    for k, clipping in enumerate(clippings):
        colour, shift = CLIPPING_COLOURS[clipping], 0.06 * (k - (len(clippings) - 1) / 2)
        by_width = here[here.clipping == clipping].dropna(subset="norm").groupby("width").norm
        widths = np.array(sorted(by_width.groups), float)
        fit = fits[fits.clipping == clipping].iloc[0]
        exponent = Estimate.of(fit.exponent, fit.low, fit.high)
        label = exponent.signed() if np.isfinite(fit.exponent) else "diverges"
        if len(widths):
            x, y = np.log2(widths), np.log2([geometric_mean(by_width.get_group(w).to_numpy()) for w in widths])
            ax.vlines(x + shift, np.log2(by_width.min()), np.log2(by_width.max()), color=colour, lw=1)
            if base_width in widths:
                start = y[list(widths).index(base_width)]
                for predicted in {fit.predicted_low, fit.predicted_high}:
                    line = start + predicted * (x - np.log2(base_width))
                    ax.plot(x, line, color=colour, lw=0.8, ls="--", zorder=0)
            ax.plot(x + shift, y, color=colour, marker=CLIPPING_MARKERS[clipping], mec="white", mew=0.4, ms=4.5)
        ax.plot([], [], color=colour, marker=CLIPPING_MARKERS[clipping], mec="white", mew=0.4, ms=4.5, label=label)
    ax.axhline(np.log2(sweeps.clip_norm), color="0.5", lw=0.8, ls=":", zorder=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{2**value:.3g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.legend(loc="lower left", title="width exponent", alignment="left", title_fontsize=7)


def _room_below(panels: Sequence[Axes], rows: int) -> None:
    """Make room for a legend of so many rows below the data of panels that share their vertical axis."""
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(high - (high - low) / (1 - 0.08 * (rows + 1) - 0.04), high)


def _norms_finding(exponents: pd.DataFrame) -> str:
    """How the raw and the invariant norm grow, first and late, as the range over all that was run."""
    parts = []
    for clipping, name in (("none", "raw"), ("width_invariant_norm", "width-invariant")):
        part = exponents[(exponents.clipping == clipping) & np.isfinite(exponents.exponent)]
        if clipping == "none" and part.empty:
            part = exponents[(exponents.clipping == "global_norm") & np.isfinite(exponents.exponent)]
        stages = [part[part.stage == stage].exponent for stage in STAGES]
        if all(len(stage) for stage in stages):
            parts.append(f"{name} {signed_range(stages[0])} | {signed_range(stages[1])}")
    if not parts:
        return "Norms were measured at too few widths to say how they grow."
    return f"Width exponent of the norm, at init | late: {'; '.join(parts)}."


def _optima_finding(found: list[ClippedSweeps]) -> str:
    """By which clippings the optimum moves with width, beyond its interval."""
    several = len(found) > 1
    said: dict[str, list[str]] = {"moves": [], "stays": [], "unknown": []}
    for sweeps in found:
        for clipping, sweep in sweeps.sweeps.items():
            where = f", {_words(sweeps.place)}" if several else ""
            name = CLIPPING_TITLES[clipping]
            if sweep.slope.reason:
                said["unknown"].append(f"{name}{where}")
            else:
                moves = 0.0 not in sweep.slope.interval
                said["moves" if moves else "stays"].append(f"{name} ({signed(sweep.slope.value)}{where})")
    heads = {
        "moves": "The best learning rate moves with width, in octaves per doubling",
        "stays": "No movement of it is established"
        if said["moves"]
        else "No movement of the best learning rate is established",
        "unknown": "Not bracketed",
    }
    return "\n".join(f"{heads[key]}: {', '.join(names)}." for key, names in said.items() if names)


def _printed(table: pd.DataFrame, exponents: pd.DataFrame, found: list[ClippedSweeps]) -> pd.DataFrame:
    """One row per clipping, width and stage: the norm over seeds, its exponent, and the optimum."""
    optima = {(*sweeps.place, name): sweep for sweeps in found for name, sweep in sweeps.sweeps.items()}
    keys = [*PLACES, "clipping", "width", "learning_rate", "stage"]
    rows: list[dict[str, Any]] = []
    for key, part in table.groupby(keys, sort=False):
        row: dict[str, Any] = dict(zip(keys, key, strict=True))
        sweep = optima[row["growth"], row["optimizer"], row["rules"], row["clipping"]]
        optimum = sweep.optima[row["width"]]
        norm = over_seeds(np.log(part.norm.dropna().to_numpy()))
        rows.append(
            {
                **row,
                **dict(zip(("norm", "norm_low", "norm_high"), np.exp(norm.numbers), strict=True)),
                "clipped_share": part.clipped.mean(),
                "optimum_log2_learning_rate": optimum.log2_learning_rate,
                "optimum_low": optimum.interval.low,
                "optimum_high": optimum.interval.high,
                "best_loss": optimum.loss,
                "not_bracketed": optimum.reason,
                "slope": sweep.slope.value,
                "slope_low": sweep.slope.interval.low,
                "slope_high": sweep.slope.interval.high,
            }
        )
    renamed = exponents.rename(columns={"low": "exponent_low", "high": "exponent_high"})
    return pd.DataFrame(rows).merge(renamed, on=[*PLACES, "clipping", "stage"])


def _at(table: pd.DataFrame, place: tuple[str, str, str]) -> pd.DataFrame:
    return table[(table[PLACES] == list(place)).all(axis=1)]


def _words(place: tuple[str, str, str]) -> str:
    growth, optimizer, rules = place
    return f"{RULE_TITLES[rules]}, {OPTIMIZER_TITLES[optimizer]}, {GROWTH_TITLES[growth]}"
