"""Figure of the coordinate check: how large the changes are that training makes, against width."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gdn_mup.errors import UserError
from gdn_mup.study.estimates import signed
from gdn_mup.study.figures.style import (
    FULL_WIDTH,
    RULE_COLOURS,
    RULE_MARKERS,
    RULE_SIGNS,
    Drawing,
    distinct,
    legend,
    letters,
    panel_title,
    power_axis,
    styled,
    title,
    width_axis,
)
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES, named
from gdn_mup.study.width_fit import width_exponent

# What the coordinate check draws, along the path of a token; the table that goes with it has every quantity.
COORDINATES = ("alpha_preactivation", "state", "mixer_output", "residual", "logits")
COORDINATE_TITLES = {
    "alpha_preactivation": "gate pre-activation",
    "state": "state S",
    "mixer_output": "mixer output",
    "residual": "residual stream",
    "logits": "logits",
}
# Width exponents of sizes that should not be width-independent. An entry of a key or query of length one is
# d_k^-1/2, and an entry of S, a sum of k vᵀ, is that times an entry of v: Sᵀ q then keeps its size.
EXPECTED_EXPONENTS = {("head_dim", quantity): -0.5 for quantity in ("q", "k", "state")}
FLAT = 0.25  # a fitted width exponent within this of the expected one is not called growth or decay
# Rows of the coordinate check that reach farther than the second are cut off at the first: a line that explodes does
# not flatten the others.
MOST_OCTAVES, FARTHEST_OCTAVES = 4.0, 6.0
OUTSIDE_BLOCKS = -1
_MARGIN = 0.4  # octaves of width on either side of the data


def coordinate_table(dataset: xr.Dataset) -> pd.DataFrame:
    """Sizes and width exponents of every activation: one row per measure, quantity, layer, step and width.

    `size` is the geometric mean over seeds, `low` and `high` the least and the most; `relative` is `size` over
    that at the base width; `exponent`, with its 95 % interval, is that of `width_fit.width_exponent` (NaN with one
    width).
    """
    base_width = int(dataset.attrs["base_width"])
    keys = ["growth", "optimizer", "rules", "measure", "quantity", "layer", "step"]
    sizes = [
        dataset[measure].to_dataframe(name="size").dropna().query("size > 0").reset_index().assign(measure=measure)
        for measure in ("rms", "change")
    ]
    long = pd.concat(sizes, ignore_index=True)
    if long.empty:
        raise UserError("the dataset has no coordinate check; add one under `coordinate_checks` and run it")
    long["log_size"] = np.log(long["size"])
    by_seed = long.set_index([*keys, "seed", "width"])["size"].unstack(["seed", "width"])
    seeds, widths = sorted(long.seed.unique()), sorted(long.width.unique())
    by_seed = by_seed.reindex(columns=pd.MultiIndex.from_product([seeds, widths]))
    fitted = width_exponent(widths, by_seed.to_numpy().reshape(-1, len(seeds), len(widths)))
    names = ("exponent", "exponent_low", "exponent_high")
    exponents = pd.DataFrame(dict(zip(names, fitted, strict=True)), index=by_seed.index)
    sizes_of = long.groupby([*keys, "width"], sort=False)["size"]
    table = pd.DataFrame({"low": sizes_of.min(), "high": sizes_of.max()})
    table["log_size"] = long.groupby([*keys, "width"], sort=False).log_size.mean()
    table = table.reset_index()
    base = table[table.width == base_width].set_index(keys).log_size.rename("base")
    table = table.join(base, on=keys).join(exponents, on=keys)
    table["size"], table["relative"] = np.exp(table.log_size), np.exp(table.log_size - table.base)
    return table[[*keys, "width", "size", "low", "high", "relative", *names]]


@styled
def coordinate_check(dataset: xr.Dataset, quantities: Sequence[str] = COORDINATES) -> Drawing:
    """RMS of an activation's change since init against width, after the last update, over that at the base width.

    A column per quantity (in the last block, or outside the blocks), a row per (growth, optimizer) with its own
    vertical axis, a line per rule set, shifted sideways so that equal ones are seen. Bars span the seeds, numbers
    are fitted width exponents, the grey line is the dependence on width that a quantity should have. An arrow is a line
    that leaves its panel, and the number beside it how far it goes. The table
    has every quantity, measure, layer and step. Raises UserError if the dataset holds no change to draw.
    """
    table = coordinate_table(dataset)
    shown = _last_changes(table, quantities)
    rows = distinct(zip(shown.growth, shown.optimizer, strict=True))
    columns = [name for name in quantities if name in set(shown.quantity)]
    rules = [name for name in RULE_TITLES if name in set(shown.rules)]
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(FULL_WIDTH, 1.25 + 1.38 * len(rows)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    letter = letters()
    for i, (growth, optimizer) in enumerate(rows):
        here = shown[(shown.growth == growth) & (shown.optimizer == optimizer)]
        lines = here.rules.nunique() if len(here.width.unique()) > 1 else 0
        floor, ceiling = _octave_range(here, int(here.width.min()), 0.11 * lines)
        axes[i, 0].set_ylim(floor, ceiling)
        for j, quantity in enumerate(columns):
            ax = axes[i, j]
            panel = here[here.quantity == quantity]
            _coordinate_lines(ax, panel, rules, EXPECTED_EXPONENTS.get((growth, quantity), 0.0))
            panel_title(ax, next(letter), COORDINATE_TITLES.get(quantity, quantity) if i == 0 else "")
        power_axis(axes[i, 0].yaxis)
        axes[i, 0].set_ylabel(f"{OPTIMIZER_TITLES[optimizer]}\n{GROWTH_TITLES[growth]}")
    widths = sorted(shown.width.unique())
    width_axis(axes[0, 0], widths)
    axes[0, 0].set_xlim(np.log2(widths[0]) - _MARGIN, np.log2(widths[-1]) + _MARGIN)
    for ax in axes[-1]:
        ax.set_xlabel("width")
    updates = shown.step.unique()
    when = f"after {updates[0]} updates" if len(updates) == 1 else "at the last step"
    label = f"RMS of the change {when}, relative to base width"
    figure.align_ylabels()
    figure.supylabel(textwrap.fill(label, int(13.5 * figure.get_figheight())), fontsize=8)
    title(figure, _growth_finding(shown))
    handles = [
        Line2D([], [], color=RULE_COLOURS[name], marker=RULE_MARKERS[name], mec="white", mew=0.4, ms=4.5, lw=1)
        for name in rules
    ]
    for handle, name in zip(handles, rules, strict=True):
        handle.set_label(RULE_TITLES[name])
    if shown.exponent.notna().any():
        handles.append(Line2D([], [], ls="none", label="+0.50: change ∝ width$^{0.50}$"))
    handles.append(Line2D([], [], color="0.6", lw=0.8, label="width-independent"))
    legend(figure, handles)
    return Drawing(figure, table)


def _last_changes(table: pd.DataFrame, quantities: Sequence[str]) -> pd.DataFrame:
    """The rows of the table that the figure draws: these quantities, in the last block, at the last step."""
    keep = (table.measure == "change") & table.layer.isin((table.layer.max(), OUTSIDE_BLOCKS))
    shown = table[keep & table.quantity.isin(quantities) & table.relative.notna()]
    shown = shown[shown.step == shown.groupby(["growth", "optimizer"]).step.transform("max")]
    if shown.empty:
        raise UserError("the coordinate checks have no step after 0 at the base width; add one to their `steps`")
    return shown


def _octave_range(shown: pd.DataFrame, first_width: int, text: float) -> tuple[float, float]:
    """Limits of a row in log₂ units: the data and an octave either side of 1, but cut off where lines explode.

    Lines start at 1 and fan out, so the larger side has a free corner at the left; it is made tall enough for
    text of that share of the panel's height, clear of the bars at the first width.
    """
    low = np.log2(shown.relative * shown.low / shown["size"])
    high = np.log2(shown.relative * shown.high / shown["size"])
    below, above = (
        octaves if octaves <= FARTHEST_OCTAVES else MOST_OCTAVES
        for octaves in (max(-low.min(), 0.8), max(high.max(), 0.8))
    )
    margin = 0.06 * (below + above)
    below, above = below + margin, above + margin
    first = shown.width == first_width
    if above >= below:
        above = max(above, (text * below + high[first].max() + margin) / (1 - text))
    else:
        below = max(below, (text * above - low[first].min() + margin) / (1 - text))
    return -below, above


def _coordinate_lines(ax: Axes, panel: pd.DataFrame, rules: Sequence[str], expected: float) -> None:
    """One panel: a line and an exponent per rule set."""
    ends = np.log2([panel.width.min(), panel.width.max()])
    ax.plot(ends, expected * (ends - ends[0]), color="0.6", lw=0.8, zorder=0)
    floor, ceiling = ax.get_ylim()
    exponents = []
    for k, name in enumerate(rules):
        line = panel[panel.rules == name].sort_values("width")
        if line.empty:
            continue
        colour = RULE_COLOURS[name]
        x = np.log2(line.width.to_numpy(float)) + 0.05 * (ends[1] - ends[0] + 2 * _MARGIN) * (k - (len(rules) - 1) / 2)
        y = np.log2(line.relative.to_numpy())
        size = line["size"].to_numpy()
        # Later lines are thinner: where two coincide the first shows on both sides of the second.
        ax.plot(x, y, color=colour, lw=1.7 - 0.3 * k, zorder=2)
        ax.vlines(x, y + np.log2(line.low / size), y + np.log2(line.high / size), color=colour, lw=0.9, zorder=3)
        ax.plot(x, y, RULE_MARKERS[name], color=colour, mec="white", mew=0.4, ms=4.5, zorder=4)
        beyond = np.flatnonzero((y > ceiling) | (y < floor))
        if len(beyond) and beyond[0] > 0:
            _leaving(ax, x, y, int(beyond[0]), ceiling if y[beyond[0]] > ceiling else floor, colour)
        if np.isfinite(exponent := line.exponent.iloc[0]):
            exponents.append((colour, f"{RULE_SIGNS[name]} {signed(exponent)}"))
    rising = ceiling >= -floor
    for k, (colour, text) in enumerate(exponents):
        lines_from_edge = k if rising else k - len(exponents) + 1
        ax.annotate(
            text,
            (0, 1 if rising else 0),
            (2, (-1 if rising else 1) - 8 * lines_from_edge),
            "axes fraction",
            "offset points",
            color=colour,
            fontsize=7,
            va="top" if rising else "bottom",
        )


def _leaving(ax: Axes, x: np.ndarray, y: np.ndarray, beyond: int, edge: float, colour: Any) -> None:
    """An arrow where a line leaves the panel on its way to its point number `beyond`, and how far it goes."""
    inside = beyond - 1
    at = x[inside] + (x[beyond] - x[inside]) * (edge - y[inside]) / (y[beyond] - y[inside])
    head = {"arrowstyle": "-|>,head_length=0.6,head_width=0.35", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
    ax.annotate(
        "", (at, edge), (x[inside], y[inside]), arrowprops=head | {"color": colour, "lw": 0}, annotation_clip=False
    )
    farthest = y[beyond:][np.abs(y[beyond:]).argmax()]
    ax.annotate(
        f"to $2^{{{farthest:.0f}}}$",
        (at, edge),
        (5, 0),  # to its right: the exponents are written on its left
        textcoords="offset points",
        color=colour,
        fontsize=7,
        ha="left",
        va="top" if edge > 0 else "bottom",
    )


def _growth_finding(shown: pd.DataFrame) -> str:
    """Under which rule sets a change surely grows with width, more than expected, and the steepest growth and fall."""
    fitted = shown.dropna(subset="exponent").drop_duplicates(["growth", "optimizer", "rules", "quantity"])
    if fitted.empty:
        return "One width only: no dependence on width to see"
    expected = [EXPECTED_EXPONENTS.get(key, 0.0) for key in zip(fitted.growth, fitted.quantity, strict=True)]
    # Where two widths and one seed leave no interval, the exponent alone has to do.
    surely = fitted.exponent_low.fillna(fitted.exponent) - expected
    fitted = fitted.assign(excess=fitted.exponent - expected, surely=surely)
    most = fitted.groupby(["optimizer", "rules"], sort=False).surely.max()
    growing = named(pair for pair, excess in most.items() if excess > FLAT)
    others = named(pair for pair, excess in most.items() if excess <= FLAT)
    lines = []
    if growing:
        steepest = fitted.exponent[fitted.excess.where(fitted.surely > FLAT).idxmax()]
        lines.append(f"Changes grow with width (exponent above {FLAT}), up to width$^{{{steepest:+.2f}}}$: {growing}.")
        lines += [f"No growth is established: {others}."] if others else []
    else:
        lines.append(f"No growth of a change with width (exponent above {FLAT}) is established: {others}.")
    if fitted.excess.min() < -FLAT:
        least = fitted.loc[fitted.excess.idxmin()]
        place = [COORDINATE_TITLES.get(least.quantity, least.quantity), RULE_TITLES[least.rules]]
        place += [OPTIMIZER_TITLES[least.optimizer]]
        place += [GROWTH_TITLES[least.growth]] if fitted.growth.nunique() > 1 else []
        lines.append(f"Steepest fall: width$^{{{least.exponent:.2f}}}$ ({', '.join(place)}).")
    return "\n".join(lines)
