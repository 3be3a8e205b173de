"""Figure of the loss against width, at the learning rate that transfers and at each width's own best."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gdn_mup.study.figures.style import (
    FULL_WIDTH,
    RULE_COLOURS,
    RULE_MARKERS,
    Drawing,
    distinct,
    legend_beside,
    letters,
    panel_title,
    styled,
    title,
    unbroken,
    width_axis,
)
from gdn_mup.study.losses import OWN_BEST, TRANSFERRED, loss_table
from gdn_mup.study.optimum import Regret, Transfer, transfers
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES

_DASHED = (0, (3, 1.5))
_SHIFT = 0.06  # octaves of width by which the two lines of a panel are moved apart


@styled
def loss_vs_width(dataset: xr.Dataset) -> Drawing:
    """Held-out loss against width, a panel per rule set (and row per growth mode and optimizer).

    Filled points: at the learning rate transferred from the base width; hollow ones: at the width's own best. Bars are
    95 % intervals over seeds, the grey line is SP at its own best. A cross at the top edge is a width at which training
    diverges at the transferred learning rate. The table has one row per point.
    """
    table = loss_table(dataset)
    rows = dict(list(table.groupby(["growth", "optimizer"], sort=False)))
    columns = table.groupby(["growth", "optimizer"]).rules.nunique().max()
    size = (FULL_WIDTH, 0.8 + 1.75 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, sharey="row", squeeze=False)
    letter, free, diverges = letters(), [], False
    for ((growth, optimizer), here), panels in zip(rows.items(), axes, strict=True):
        rules = [name for name in RULE_TITLES if name in set(here.rules)]
        reference = here[(here.rules == "sp") & (here.learning_rate == OWN_BEST)]
        for ax, name in zip(panels, rules, strict=False):
            panel = here[here.rules == name]
            if name != "sp":
                ax.plot(np.log2(reference.width), reference.loss.where(np.isfinite), color="0.7", lw=1, zorder=0)
            for way, shift in ((OWN_BEST, _SHIFT), (TRANSFERRED, -_SHIFT)):
                diverges |= _losses(ax, panel[panel.learning_rate == way], way, name, shift)
            width_axis(ax, sorted(panel.width.unique()))
            panel_title(ax, next(letter), RULE_TITLES[name])
        for ax in panels[len(rules) :]:
            free.append(ax.get_subplotspec())
            ax.remove()
        panels[0].set_ylabel(f"{OPTIMIZER_TITLES[optimizer]}, {GROWTH_TITLES[growth]}\nheld-out loss (nats/token)")
    for ax in figure.axes:
        ax.set_xlabel("width")
    title(figure, _cost_finding(transfers(dataset)))
    handles = [
        Line2D([], [], color="0.3", marker="o", mec="white", mew=0.5, ms=5, label="at the transferred\nlearning rate"),
        Line2D([], [], color="0.3", marker="o", mfc="white", ls=_DASHED, ms=4.5, label="at the width's own best"),
        Line2D([], [], color="0.3", lw=1.2, marker="|", ls="none", ms=9, label="95 % interval over seeds"),
    ]
    if table.rules.nunique() > 1 and "sp" in set(table.rules):
        handles.append(Line2D([], [], color="0.7", lw=1, label="SP at its own best"))
    if diverges:
        handles.append(Line2D([], [], color="0.3", marker="x", ls="none", mew=1.2, ms=5, label="diverges"))
    legend_beside(figure, handles, free)
    return Drawing(figure, table)


def _losses(ax: Axes, line: pd.DataFrame, way: str, rules: str, shift: float) -> bool:
    """One line of a panel; whether training diverges anywhere on it."""
    x, colour = np.log2(line.width.to_numpy(float)) + shift, RULE_COLOURS[rules]
    transferred = way == TRANSFERRED
    face, edge = (colour, "white") if transferred else ("white", colour)
    loss = line.loss.where(np.isfinite(line.loss)).to_numpy()
    ax.plot(x, loss, color=colour, lw=1.2 if transferred else 0.9, ls="-" if transferred else _DASHED, zorder=2)
    ax.vlines(x, line.low, line.high, color=colour, lw=1.2 if transferred else 0.9, zorder=2)
    ax.plot(
        x, loss, RULE_MARKERS[rules], color=colour, mfc=face, mec=edge, mew=0.6, ms=5 if transferred else 4, zorder=3
    )
    diverged = x[np.isinf(line.loss)]
    top = np.full(len(diverged), 0.97)
    ax.plot(diverged, top, "x", color=colour, mew=1.2, ms=5, transform=ax.get_xaxis_transform(), zorder=3)
    return len(diverged) > 0


def _cost_finding(sweeps: Sequence[Transfer]) -> str:
    """What the transferred learning rate costs at the widest width, under each rule set."""
    lines = ["Cost of the transferred learning rate at the widest width, in nats, with 95 % intervals"]
    for growth, optimizer in distinct((s.growth, s.optimizer) for s in sweeps):
        here = [s for s in sweeps if (s.growth, s.optimizer) == (growth, optimizer)]
        several = f", {GROWTH_TITLES[growth]}" if len({s.growth for s in sweeps}) > 1 else ""
        for width in distinct(s.widths[-1] for s in here):
            costs = [
                unbroken(f"{RULE_TITLES[s.rules]} {_cost(s.regrets[width])}") for s in here if s.widths[-1] == width
            ]
            lines.append(f"{OPTIMIZER_TITLES[optimizer]}{several}, width {width}: {', '.join(costs)}")
    return "\n".join(lines)


def _cost(regret: Regret) -> str:
    if regret.reason:
        return "unknown"
    if np.isinf(regret.value):
        return "diverges"
    low, high = regret.interval
    return f"{regret.value:.2f} [{low:.2f}, {high:.2f}]"
