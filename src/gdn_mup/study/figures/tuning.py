"""Figure of the random search over multipliers: what the base width's choice gains at each width, and which it is."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

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
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES
from gdn_mup.study.tuning import DEFAULT, Array, Search, searches, tuning_table

CHOSEN, BETTER, WORSE = "C3", "C0", "0.75"  # colours of trials


@styled
def base_width_tuning(dataset: xr.Dataset) -> Drawing:
    """What the base width's choice of multipliers gains at each width, whether trials rank alike, and what was chosen.

    A row per search. Left: gain over trial 0 against width, filled: chosen on all of the base width's seeds, hollow:
    each seed by the choice of others; bars are 95 % intervals over seeds. Middle: gains of all trials at the
    widest width against those at the base width; right: every trial's multipliers, one line each. Circles are the
    choice. Where the base width alone was run, its trials stand in order of gain in place of the first two. The table
    is `tuning_table`'s.
    """
    found = searches(dataset)
    figure = plt.figure(figsize=(FULL_WIDTH, 0.95 + 2.3 * len(found)))
    rows = figure.add_gridspec(len(found), 1)
    letter = letters()
    for i, search in enumerate(found):
        draws = [_gains, _ranks, _multipliers] if len(search.widths) > 1 else [_order, _multipliers]
        panels = rows[i].subgridspec(1, len(draws), width_ratios=[1, 1.05, 1.1] if len(draws) == 3 else [2.05, 1.1])
        for k, (draw, text) in enumerate(zip(draws, _panel_titles(search), strict=True)):
            ax = figure.add_subplot(panels[0, k])
            draw(ax, search)
            panel_title(ax, next(letter), text)
    title(figure, "\n".join(_finding(search, several=len(found) > 1) for search in found))
    key: dict[str, Any] = {"marker": "o", "ls": "none", "ms": 4.5}
    handles = [Line2D([], [], color=CHOSEN, label="base width's choice", **key)]
    if any(len(search.seeds[search.base_width]) > 1 for search in found):
        handles.append(Line2D([], [], color=CHOSEN, mfc="white", label="each seed by the choice of others", **key))
    handles += [
        Line2D([], [], color=BETTER, marker="o", ls="none", ms=3, label="trial better than default (base width)"),
        Line2D([], [], color=WORSE, marker="o", ls="none", ms=3, label="worse"),
    ]
    legend(figure, handles)
    return Drawing(figure, tuning_table(dataset))


def _gains(ax: Axes, search: Search) -> None:
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    for shift, gain, face in ((-0.06, search.gain, CHOSEN), (0.06, search.gain_left_out, "white")):
        place = np.log2(search.widths) + shift
        value, low, high = np.array([gain(width).numbers for width in search.widths]).T
        ax.plot(place, value, "o-", color=CHOSEN, mfc=face, lw=0.8, ms=4.5, zorder=2)
        ax.vlines(place, low, high, color=CHOSEN, lw=1, zorder=1)
    width_axis(ax, search.widths)
    ax.set_xlim(np.log2(search.widths[0]) - 0.3, np.log2(search.widths[-1]) + 0.3)
    ax.set(xlabel="width", ylabel="gain of tuned multipliers\n(nats/token)")


def _ranks(ax: Axes, search: Search) -> None:
    """Gains of trials at the widest width against those at the base width."""
    base, wide = (_gain_of_trials(search, width) for width in (search.base_width, search.widths[-1]))
    shown = np.isfinite(base) & np.isfinite(wide)
    ends = [min(base[shown].min(), wide[shown].min()), max(base[shown].max(), wide[shown].max())]
    ax.plot(ends, ends, color="0.6", lw=0.8, zorder=0)
    ax.axhline(0, color="0.8", lw=0.6, zorder=0)
    ax.axvline(0, color="0.8", lw=0.6, zorder=0)
    for trial in map(int, np.flatnonzero(shown)):
        ax.plot(base[trial], wide[trial], **_mark(search, trial))
    ax.set(xlabel=f"gain at width {search.base_width}", ylabel=f"gain at width {search.widths[-1]}")


def _order(ax: Axes, search: Search) -> None:
    """Gains of trials at the base width, the least first."""
    gains = _gain_of_trials(search, search.base_width)
    ax.axhline(0, color="0.8", lw=0.6, zorder=0)
    finite = np.flatnonzero(np.isfinite(gains))
    for rank, trial in enumerate(map(int, finite[np.argsort(gains[finite])]), start=1):
        ax.plot(rank, gains[trial], **_mark(search, trial))
    value, low, high = search.gain_left_out(search.base_width).numbers
    ax.plot(rank + 0.5, value, "o", color=CHOSEN, mfc="white", ms=4.5)
    ax.vlines(rank + 0.5, low, high, color=CHOSEN, lw=1, zorder=1)
    ax.set(xlabel="trials, in order of gain", ylabel=f"gain at width {search.base_width}\n(nats/token)")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _multipliers(ax: Axes, search: Search) -> None:
    """Every trial's multipliers, a line for each multiplier."""
    names = list(search.multipliers.columns)
    log2 = np.log2(search.multipliers)
    for row, name in enumerate(names):
        ax.plot([log2[name].min(), log2[name].max()], [row, row], color="0.9", lw=0.8, zorder=0)
        for trial in range(1, len(log2)):
            ax.plot(log2[name].iloc[trial], row, **_mark(search, trial))
    ax.axvline(0, color="0.6", lw=0.8, zorder=0)
    ax.set_yticks(range(len(names)), [name.replace("_learning_rate", " LR").replace("_", " ") for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    power_axis(ax.xaxis)
    ax.set_xlabel("multiplier")


def _mark(search: Search, trial: int) -> dict[str, Any]:
    """How a trial is drawn."""
    if trial == search.choice.trial:
        return {"color": CHOSEN, "marker": "o", "ms": 5, "zorder": 3}
    better = _gain_of_trials(search, search.base_width)[trial] > 0
    return {"color": BETTER if better else WORSE, "marker": "o", "ms": 3, "mew": 0, "zorder": 2}


def _gain_of_trials(search: Search, width: int) -> Array:
    """Mean gains [trials]; −∞ for those that diverge."""
    loss = search.transferred(width).mean(axis=0)
    return loss[DEFAULT] - loss


def _panel_titles(search: Search) -> list[str]:
    about = f"{OPTIMIZER_TITLES[search.optimizer]}, {GROWTH_TITLES[search.growth]}, {RULE_TITLES[search.rules]}"
    trials = f"{len(search.multipliers)} trials"
    if len(search.widths) == 1:
        return [f"{about}: {trials}", "multipliers drawn"]
    correlation = search.rank_correlation(search.widths[-1])
    return [about, f"{trials}: rank\ncorrelation {correlation.signed()}", "multipliers drawn"]


def _finding(search: Search, several: bool) -> str:
    """What tuning at the base width gains there and at the widest width."""
    about = (
        f"{OPTIMIZER_TITLES[search.optimizer]}, {GROWTH_TITLES[search.growth]}, {RULE_TITLES[search.rules]}: "
        if several
        else ""
    )
    if search.choice.trial == DEFAULT:
        return f"{about}No multipliers of {len(search.multipliers) - 1} trials are better than 1 at the base width."
    here, wide = search.gain(search.base_width), search.gain(search.widths[-1])
    base, widest = f"width {search.base_width}", f"width {search.widths[-1]}"
    if len(search.widths) == 1:
        seeds = len(search.seeds[search.base_width])
        judged = f"on the {'losses' if seeds > 1 else 'one seed'} that chose it"
        return (
            f"{about}The best of {len(search.multipliers) - 1} random sets of multipliers lowers the loss at {base} "
            f"by {here.value:.2f} nats,\n{judged}; no other width was run."
        )
    if wide.low > 0:
        also = f", and at {widest} by {wide.signed()}"
        return f"{about}Multipliers tuned at {base} lower the loss there by {here.value:.2f} nats{also}."
    there = "lose" if wide.high < 0 else "are not shown to gain"
    return f"{about}Multipliers that gain {here.value:.2f} nats at {base} {there} at {widest}: {wide.signed()}."
