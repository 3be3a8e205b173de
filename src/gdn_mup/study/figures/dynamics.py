"""Figure of the gates and the state over training."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from gdn_mup.study.dynamics import BETA, HALF_LIFE, RANK, Quantity, gate_dynamics, of
from gdn_mup.study.figures.style import (
    FULL_WIDTH,
    Drawing,
    distinct,
    legend,
    letters,
    panel_title,
    power_axis,
    styled,
    title,
    width_colours,
)
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES

QUANTITY_TITLES = {RANK: "rank of S", HALF_LIFE: "median half-life", BETA: "mean β"}
_LEAST_RANGE = {True: 1.0, False: 0.1}  # of an axis, by whether it shows ratios (octaves) or differences


@styled
def gate_and_state_dynamics(dataset: xr.Dataset, rules: Sequence[str] = ("sp", "gdn_mup")) -> Drawing:
    """Changes of the state's effective rank, of the memory's half-life and of β since init, against updates done.

    A row per quantity and rule set, a column per (growth, optimizer), a line per width, the layers of a model pooled.
    Rows of one quantity share their vertical axis, which the lines set: bands, 95 % intervals over seeds, may leave
    the panel. Of `rules` those are drawn that were run, all of them if none was; the table has every rule set.
    """
    table = gate_dynamics(dataset)
    columns = distinct(zip(table.growth, table.optimizer, strict=True))
    ran = [name for name in RULE_TITLES if name in set(table.rules)]
    drawn = [name for name in rules if name in ran] or ran
    shown = table[table.rules.isin(drawn)]
    rows = [(quantity, name) for quantity in QUANTITY_TITLES for name in drawn]
    colours = width_colours(shown.width)
    size = (FULL_WIDTH, 1.3 + 1.02 * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, sharex=True, sharey="row", squeeze=False)
    letter = letters()
    for i, (quantity, name) in enumerate(rows):
        of_quantity = of(shown, quantity)
        for ax, (growth, optimizer) in zip(axes[i], columns, strict=True):
            here = (of_quantity.growth == growth) & (of_quantity.optimizer == optimizer) & (of_quantity.rules == name)
            _lines(ax, of_quantity[here], colours, quantity.ratio)
            heading = f"{OPTIMIZER_TITLES[optimizer]}, {GROWTH_TITLES[growth]}" if i == 0 else ""
            panel_title(ax, next(letter), heading)
        _vertical_axis(axes[i, 0], of_quantity, quantity)
        axes[i, 0].set_ylabel(f"{QUANTITY_TITLES[quantity]}\n{RULE_TITLES[name]}", fontsize=7)
    steps = sorted(shown.step.unique())
    for ax in axes[-1]:
        ax.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)  # an octave from 0 to 1
        ax.set_xlim(-0.15, 1.15 * steps[-1])
        ax.set_xticks(steps, [str(step) for step in steps])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("updates")
    figure.align_ylabels()
    figure.supylabel("change since init: factor for effective rank and half-life, difference for β", fontsize=8)
    title(figure, _finding(shown))
    handles: list[Artist] = [
        Line2D([], [], color=colour, marker="o", ms=3, label=str(width)) for width, colour in colours.items()
    ]
    handles.append(Patch(color="0.3", alpha=0.2, lw=0, label="95 % interval over seeds"))
    legend(figure, handles, "width")
    return Drawing(figure, table)


def _lines(ax: Axes, panel: pd.DataFrame, colours: dict[int, str], ratio: bool) -> None:
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    for width, line in panel.groupby("width"):
        line = line.sort_values("step")
        change, low, high = (
            np.log2(line[name]) if ratio else line[name] for name in ("change", "change_low", "change_high")
        )
        ax.fill_between(line.step, low, high, color=colours[width], alpha=0.15, lw=0)
        ax.plot(line.step, change, color=colours[width], marker="o", ms=2.2, lw=1)


def _vertical_axis(ax: Axes, of_quantity: pd.DataFrame, quantity: Quantity) -> None:
    """The same for every row of a quantity: as far as its lines go, whatever their intervals."""
    change = np.log2(of_quantity.change) if quantity.ratio else of_quantity.change
    change = change[np.isfinite(change)]
    least = _LEAST_RANGE[quantity.ratio]
    low, high = min(change.min(), -least / 2), max(change.max(), least / 2)
    margin = 0.15 * (high - low)
    ax.set_ylim(low - margin, high + margin)
    if quantity.ratio:
        power_axis(ax.yaxis)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(4))


def _finding(shown: pd.DataFrame) -> str:
    """By what factor the state's rank changes in the widest models, and whether half-lives change."""
    widest = shown[shown.width == shown.width.max()]
    last = widest[widest.step == widest.groupby(["growth", "optimizer"]).step.transform("max")]
    steps = distinct(last.step)
    when = f"after {steps[0]} updates" if len(steps) == 1 else "at the last step"
    ranks = of(last, RANK).groupby(["optimizer", "rules"], sort=False).change
    by_optimizer: dict[str, list[str]] = {}
    for (optimizer, name), changes in ranks:  # over growth modes
        ends = distinct(f"{change:.2f}" for change in (changes.min(), changes.max()))
        by_optimizer.setdefault(OPTIMIZER_TITLES[optimizer], []).append(f"{RULE_TITLES[name]} {' to '.join(ends)}")
    lines = [
        f"Effective rank of the state at width {last.width.iloc[0]} {when}, over that at init:",
        "; ".join(f"{optimizer}: {', '.join(found)}" for optimizer, found in by_optimizer.items()) + ".",
    ]
    half_lives = of(last, HALF_LIFE).dropna(subset="change_low")
    if len(half_lives):
        moved = ((half_lives.change_low > 1) | (half_lives.change_high < 1)).sum()
        lines.append(
            f"The median half-life is established to have changed in {moved} of these {len(half_lives)} cases."
        )
    return "\n".join(lines)
