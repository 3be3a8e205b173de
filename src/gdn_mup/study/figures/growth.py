"""Figure of growth by more heads beside growth by larger heads: where the optimum goes and what transferring costs."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gdn_mup.errors import UserError
from gdn_mup.study.figures.style import (
    FULL_WIDTH,
    RULE_COLOURS,
    RULE_MARKERS,
    Drawing,
    distinct,
    legend,
    letters,
    panel_title,
    power_axis,
    styled,
    title,
    unbroken,
    width_axis,
)
from gdn_mup.study.figures.transfer import optima_against_width, optimum_rows, slope_text
from gdn_mup.study.optimum import Transfer, signed, transfers
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES

_LINE = 9.0  # points: a line of text in a panel
_OFF = 1e3  # nats: where the interval of a regret that may be divergence ends, off every panel
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
                _regrets(lower, sweep, shift)
            width_axis(lower, distinct(width for s in here for width in s.widths))
            lower.set_xlabel("width")
            panel_title(upper, next(letter), f"{OPTIMIZER_TITLES[optimizer]}, {GROWTH_TITLES[growth]}")
        for j, growth in enumerate(GROWTH_TITLES):
            _slopes(panels[0, j], [s for s in both if s.growth == growth], make_room=j == 0)
        power_axis(panels[0, 0].yaxis)
        panels[1, 0].set_ylim(*_regret_range(both))
    for ax in axes[1]:
        panel_title(ax, next(letter), "")
    axes[0, 0].set_ylabel("best learning rate\n(at the base width)")
    axes[1, 0].set_ylabel("transfer regret\n(nats/token)")
    title(figure, _finding(sweeps))
    handles = [
        Line2D([], [], color=RULE_COLOURS[n], marker=RULE_MARKERS[n], mec="white", mew=0.5, ms=5, label=RULE_TITLES[n])
        for n in rules
    ]
    handles.append(Line2D([], [], color="0.3", marker="|", ls="none", ms=9, label="95 % interval"))
    if any(not optimum.bracketed for s in sweeps for optimum in s.optima.values()):
        handles.append(Line2D([], [], color="0.3", marker="o", mfc="white", ls="none", label="not bracketed"))
    if any(np.isinf(regret.value) for s in sweeps for regret in s.regrets.values()):
        handles.append(Line2D([], [], color="0.3", marker="x", ls="none", mew=1.2, ms=5, label="diverges"))
    legend(figure, handles)
    return Drawing(figure, _table(sweeps))


def _regrets(ax: Axes, sweep: Transfer, shift: float) -> None:
    """Transfer regret of one rule set against width; where it has no number, its line is broken."""
    colour, marker = RULE_COLOURS[sweep.rules], RULE_MARKERS[sweep.rules]
    x = np.log2(sweep.widths) + shift
    regrets = [sweep.regrets[width] for width in sweep.widths]
    values = np.array([regret.value for regret in regrets])
    finite = np.where(np.isfinite(values), values, np.nan)
    ends = np.nan_to_num([regret.interval for regret in regrets], nan=np.nan, posinf=_OFF)
    ax.plot(x, finite, color=colour, lw=1, marker=marker, mec="white", mew=0.5, ms=5, zorder=3)
    ax.vlines(x, *ends.T, color=colour, lw=1.4, zorder=2)
    diverged = x[np.isinf(values)]
    top = np.full(len(diverged), 0.97)
    ax.plot(diverged, top, "x", color=colour, mew=1.2, ms=5, transform=ax.get_xaxis_transform(), zorder=3)


def _regret_range(sweeps: Sequence[Transfer]) -> tuple[float, float]:
    """From below 0 to above the largest finite regret and the end of every finite interval."""
    ends = [end for s in sweeps for r in s.regrets.values() for end in (r.value, r.interval.high)]
    top = max([0.01, *(end for end in ends if np.isfinite(end))])
    return -0.06 * top, 1.15 * top


def _slopes(ax: Axes, sweeps: Sequence[Transfer], make_room: bool) -> None:
    """Slopes below the data, each in its rule set's colour, for which the axis is made longer."""
    if make_room:
        low, high = ax.get_ylim()
        ax.set_ylim(high - (high - low) / (1 - 0.09 * (len(sweeps) + 1)), high)
    lines = [("octaves per doubling", "0.15")]
    lines += [(slope_text(s).removeprefix("slope "), RULE_COLOURS[s.rules]) for s in sweeps]
    for k, (text, colour) in enumerate(reversed(lines)):
        ax.annotate(text, (0, 0), (4, 3 + _LINE * k), "axes fraction", "offset points", color=colour, fontsize=7)


def _finding(sweeps: Sequence[Transfer]) -> str:
    """Slopes under either growth mode, a line per optimizer."""
    lines = ["Octaves by which the optimum moves when width doubles, by more heads | by larger heads"]
    for optimizer in distinct(s.optimizer for s in sweeps):
        here = [s for s in sweeps if s.optimizer == optimizer]
        parts = []
        for name in distinct(s.rules for s in here):
            found = {s.growth: s.slope for s in here if s.rules == name}
            slopes = ["unknown" if found[g].reason else signed(found[g].value) for g in GROWTH_TITLES]
            parts.append(unbroken(f"{RULE_TITLES[name]} {' | '.join(slopes)}"))
        lines.append(f"{OPTIMIZER_TITLES[optimizer]}: {', '.join(parts)}")
    return "\n".join(lines)


def _table(sweeps: Sequence[Transfer]) -> pd.DataFrame:
    rows = []
    for sweep in sweeps:
        for row in optimum_rows(sweep):
            regret = sweep.regrets[row["width"]]
            low, high = regret.interval
            rows.append(row | {"transfer_regret": regret.value, "regret_low": low, "regret_high": high})
    return pd.DataFrame(rows)
