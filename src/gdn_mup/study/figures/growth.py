"""Figure of growth by more heads beside growth by larger heads: where the optimum goes and what transferring costs."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gdn_mup.errors import UserError
from gdn_mup.study.estimates import Estimate, signed_range
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
    rule_keys,
    styled,
    title,
    unbroken,
    width_axis,
)
from gdn_mup.study.figures.transfer import optima_against_width, optimum_rows, slope_text
from gdn_mup.study.optimum import Transfer, transfers
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES

_LINE = 9.0  # points: a line of text in a panel
_FAR = 3.0  # an interval leaves its panel if it ends at so many times the largest regret and the median interval
_SHIFT = 0.08  # octaves of width between rule sets


def in_both_modes(sweeps: Sequence[Transfer]) -> list[Transfer]:
    """The sweeps whose optimizer and rule set were run in both growth modes."""
    run = {(s.growth, s.optimizer, s.rules) for s in sweeps}
    return [s for s in sweeps if all((growth, s.optimizer, s.rules) in run for growth in GROWTH_TITLES)]


@styled
def growth_modes(dataset: xr.Dataset) -> Drawing:
    """Optimum (upper row) and transfer regret (lower row) against width, a column per (optimizer, growth mode).

    A line per rule set that was run in both growth modes. Bars are 95 % intervals, numbers are slopes in octaves per
    doubling of width. A cross at the top edge is a width at which training diverges at the transferred learning rate.
    The table has one row per optimum. Raises UserError if no rule set was run in both growth modes.
    """
    sweeps = in_both_modes(transfers(dataset))
    if not sweeps:
        raise UserError(
            "no rule set has learning-rate sweeps in both growth modes; add those of the other under `sweeps`"
        )
    rules = [name for name in RULE_TITLES if name in {s.rules for s in sweeps}]
    pairs = {s.optimizer: [t for t in sweeps if t.optimizer == s.optimizer] for s in sweeps}
    columns = len(GROWTH_TITLES) * len(pairs)
    figure, axes = plt.subplots(2, columns, figsize=(FULL_WIDTH, 4.9), squeeze=False, sharex="col")
    letter = letters()
    floor, ceiling = regret_range([regret for s in sweeps for regret in s.regrets.values()])
    for i, (optimizer, both) in enumerate(pairs.items()):
        panels = axes[:, len(GROWTH_TITLES) * i :]
        for j, growth in enumerate(GROWTH_TITLES):
            upper, lower = panels[:, j]
            if j > 0:  # before anything is drawn, so that the axis spans both
                for ax, first in zip((upper, lower), panels[:, 0], strict=True):
                    ax.sharey(first)
                    ax.tick_params(labelleft=False)
            here = [s for s in both if s.growth == growth]
            for sweep in here:
                shift = _SHIFT * (here.index(sweep) - (len(here) - 1) / 2)
                optima_against_width(upper, sweep, shift, RULE_COLOURS[sweep.rules], RULE_MARKERS[sweep.rules])
                regrets = list(sweep.regrets.values())
                regrets_against(lower, np.log2(sweep.widths) + shift, regrets, sweep.rules, ceiling)
            width_axis(lower, distinct(width for s in here for width in s.widths))
            lower.set_xlabel("width")
            panel_title(upper, next(letter), f"{OPTIMIZER_TITLES[optimizer]}, {GROWTH_TITLES[growth]}")
            _slopes(upper, here)
        power_axis(panels[0, 0].yaxis)
    for ax in axes[1]:
        ax.set_ylim(floor, ceiling)
        ax.tick_params(labelleft=ax is axes[1, 0])
        panel_title(ax, next(letter), "")
    axes[0, 0].set_ylabel("best learning rate\n(at the base width)")
    axes[1, 0].set_ylabel("transfer regret\n(nats/token)")
    title(figure, _finding(sweeps))
    handles = rule_keys(rules)
    handles.append(Line2D([], [], color="0.3", marker="|", ls="none", ms=9, label="95 % interval"))
    if any(not optimum.bracketed for s in sweeps for optimum in s.optima.values()):
        handles.append(Line2D([], [], color="0.3", marker="o", mfc="white", ls="none", label="not bracketed"))
    if any(np.isinf(regret.value) for s in sweeps for regret in s.regrets.values()):
        handles.append(Line2D([], [], color="0.3", marker="x", ls="none", mew=1.2, ms=5, label="diverges"))
    legend(figure, handles)
    return Drawing(figure, _table(sweeps))


def regrets_against(ax: Axes, x: np.ndarray, regrets: Sequence[Estimate], rules: str, ceiling: float) -> None:
    """Transfer regrets of one rule set at places `x` [regrets]; where one has no number, the line is broken."""
    colour, marker = RULE_COLOURS[rules], RULE_MARKERS[rules]
    values = np.array([regret.value for regret in regrets])
    finite = np.where(np.isfinite(values), values, np.nan)
    low, high = np.array([regret.interval for regret in regrets]).T
    ax.plot(x, finite, color=colour, lw=1, marker=marker, mec="white", mew=0.5, ms=5, zorder=3)
    ax.vlines(x, low, np.minimum(high, ceiling), color=colour, lw=1.4, zorder=2)
    for place in np.flatnonzero(np.isfinite(finite) & (high > ceiling)):
        ax.plot(x[place], ceiling, "^", color=colour, ms=4, mew=0, clip_on=False, in_layout=False)
        if np.isfinite(high[place]):
            far = f"to {high[place]:.1f}"
            ax.annotate(far, (x[place], ceiling), (-4, 0), textcoords="offset points", ha="right", va="top", fontsize=7)
    diverged = x[np.isinf(values)]
    top = np.full(len(diverged), 0.97)
    ax.plot(diverged, top, "x", color=colour, mew=1.2, ms=5, transform=ax.get_xaxis_transform(), zorder=3)


def regret_range(regrets: Sequence[Estimate]) -> tuple[float, float]:
    """From below 0 to above the largest finite regret and the ends of intervals, but for those that end far above."""
    finite = [regret for regret in regrets if np.isfinite(regret.value)]
    ends = np.array([regret.interval.high for regret in finite if 0 < regret.interval.high < np.inf])
    usual = max([0.01, *(regret.value for regret in finite), *([np.median(ends)] if len(ends) else [])])
    top = max([usual, *ends[ends <= _FAR * usual]])
    return -0.06 * top, 1.15 * top


def _slopes(ax: Axes, sweeps: Sequence[Transfer]) -> None:
    """Slopes below a panel, each with its rule set's marker and in its colour."""
    lines = [("octaves per doubling", "0.15")]
    lines += [(f"{RULE_SIGNS[s.rules]} {slope_text(s).removeprefix('slope ')}", RULE_COLOURS[s.rules]) for s in sweeps]
    for k, (text, colour) in enumerate(lines):
        ax.annotate(
            text, (0, 0), (0, -6 - _LINE * k), "axes fraction", "offset points", color=colour, fontsize=7, va="top"
        )  # fmt: skip


def _finding(sweeps: Sequence[Transfer]) -> str:
    """Slopes under either growth mode, a line per optimizer: SP's and, where the others are many, their range."""
    lines = ["Octaves by which the optimum moves when width doubles, by more heads | by larger heads"]
    for optimizer in distinct(s.optimizer for s in sweeps):
        here = [s for s in sweeps if s.optimizer == optimizer]
        others = distinct(s.rules for s in here if s.rules != "sp")
        groups = {"SP": ["sp"]} if any(s.rules == "sp" for s in here) else {}
        groups |= {RULE_TITLES[name]: [name] for name in others} if len(others) <= 2 else {"the others": others}
        parts = []
        for name, rules in groups.items():
            slopes = [[s.slope for s in here if s.rules in rules and s.growth == growth] for growth in GROWTH_TITLES]
            known = [[slope.value for slope in each if not slope.reason] for each in slopes]
            ranges = [signed_range(each) if each else "unknown" for each in known]
            parts.append(f"{name} {' | '.join(ranges)}")
        lines.append(unbroken(f"{OPTIMIZER_TITLES[optimizer]}: {', '.join(parts)}"))
    return "\n".join(lines)


def _table(sweeps: Sequence[Transfer]) -> pd.DataFrame:
    rows = []
    for sweep in sweeps:
        for row in optimum_rows(sweep):
            regret = sweep.regrets[row["width"]]
            low, high = regret.interval
            rows.append(row | {"transfer_regret": regret.value, "regret_low": low, "regret_high": high})
    return pd.DataFrame(rows)
