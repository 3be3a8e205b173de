"""Figure of the loss against width, at the learning rate that transfers and at each width's own best."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gdn_mup.study.estimates import Estimate
from gdn_mup.study.figures.style import (
    FULL_WIDTH,
    RULE_COLOURS,
    RULE_MARKERS,
    Drawing,
    distinct,
    label_below,
    label_left,
    legend_beside,
    letters,
    panel_title,
    styled,
    title,
    unbroken,
    width_axis,
)
from gdn_mup.study.figures.transfer import regret_text
from gdn_mup.study.losses import OWN_BEST, TRANSFERRED, loss_table
from gdn_mup.study.optimum import Transfer, transfers
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
    size = (FULL_WIDTH, 1.1 + 1.5 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, sharex=True, sharey="row", squeeze=False)
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
            panel_title(ax, next(letter), RULE_TITLES[name])
        for ax in panels[len(rules) :]:
            free.append(ax.get_subplotspec())
            ax.remove()
        label_left(panels, f"{OPTIMIZER_TITLES[optimizer]}\n{GROWTH_TITLES[growth]}")
    width_axis(axes[0, 0], sorted(table.width.unique()))
    label_below(axes, "width")
    figure.align_ylabels()
    figure.supylabel("held-out loss (nats/token)", fontsize=8)
    title(figure, _cost_finding(transfers(dataset)))
    handles = [
        Line2D([], [], color="0.3", marker="o", mec="white", mew=0.5, ms=5, label="at the transferred learning rate"),
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
    """What the transferred learning rate costs at the widest width: under SP, and the most under another rule set."""
    lines = ["The most that the transferred learning rate costs, in nats [95 % interval]"]
    for optimizer in distinct(s.optimizer for s in sweeps):
        here = [s for s in sweeps if s.optimizer == optimizer]
        widest = max(s.widths[-1] for s in here)
        costs = [(s.rules, s.regrets[widest]) for s in here if s.widths[-1] == widest]
        sp, others = ([cost for cost in costs if (cost[0] == "sp") == is_sp] for is_sp in (True, False))
        parts = [f"SP {_most(sp)[1]}"] if sp else []
        if others:
            rules, cost = _most(others)
            several = len({rules for rules, _ in others}) > 1
            parts.append(f"{'worst other: ' * several}{RULE_TITLES[rules]} {cost}" if rules else f"others {cost}")
        lines.append(unbroken(f"{OPTIMIZER_TITLES[optimizer]}, width {widest}: {'; '.join(parts)}"))
    return "\n".join(lines)


def _most(costs: Sequence[tuple[str, Estimate]]) -> tuple[str, str]:
    """Under which of these rule sets the cost is largest, empty if that is unknown, and the cost in words."""
    known = [(rules, regret) for rules, regret in costs if not regret.reason]
    if not known:
        return "", "unknown"
    rules, most = max(known, key=lambda cost: cost[1].value)
    return rules, regret_text(most)
