"""Figure of the paper's printed losses beside this study's, as differences, since budgets differ."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gdn_mup.study.estimates import signed_range
from gdn_mup.study.figures.style import (
    FULL_WIDTH,
    RULE_COLOURS,
    RULE_MARKERS,
    Drawing,
    distinct,
    legend,
    letters,
    panel_title,
    styled,
    title,
    unbroken,
)
from gdn_mup.study.published import PAPER, PAPER_SETTING, SOURCE, STUDY, Setting, loss_differences, study_setting
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES

_DASHED = (0, (3, 1.5))
_SHIFT = 0.05  # octaves of width between rule sets
_DIFFERENCES = {"minus_sp": "less SP's, same width", "minus_base": "less that at base width"}


@styled
def published_losses(dataset: xr.Dataset) -> Drawing:
    """Best losses less SP's (upper row) and less those at the base width (lower row), the paper's beside ours.

    A column per (growth mode, optimizer) of this study, a line per rule set against width / base width. Hollow and
    dashed: as arXiv 2606.04048 prints them, one seed, no errors. Filled: ours, means over seeds, paired, with 95 %
    intervals. The table has both, with the losses themselves. The last line of keys states both budgets.
    """
    table = loss_differences(dataset)
    ours, paper = table[table.source == STUDY], table[table.source == PAPER]
    columns = distinct(zip(ours.growth, ours.optimizer, strict=True))
    figure = plt.figure(figsize=(FULL_WIDTH, 4.9))
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 0.04])
    axes = grid[0].subgridspec(2, len(columns)).subplots(sharex="col", sharey="row", squeeze=False)
    letter = letters()
    for row, (name, label) in zip(axes, _DIFFERENCES.items(), strict=True):
        for ax, (growth, optimizer) in zip(row, columns, strict=True):
            theirs = paper[paper.optimizer == optimizer]
            here = ours[(ours.growth == growth) & (ours.optimizer == optimizer)]
            ax.axhline(0, color="0.7", lw=0.8, zorder=0)
            rules = [rule for rule in RULE_TITLES if rule != "sp" or name == "minus_base"]
            for k, rule in enumerate(rules):
                shift = _SHIFT * (k - (len(rules) - 1) / 2)
                _line(ax, theirs[theirs.rules == rule], name, shift)
                _line(ax, here[here.rules == rule], name, shift)
            mine = f"ours by {GROWTH_TITLES[growth]}"
            if here[name].isna().all():
                mine = "ours without SP" if name == "minus_sp" else "ours without the base width"
            comma = ", " if len(columns) <= 2 else "\n"
            panel_title(ax, next(letter), f"{OPTIMIZER_TITLES[optimizer]}{comma}{mine}")
            multiples = sorted({*theirs.multiple, *here.multiple})
            ax.set_xticks(np.log2(multiples), [f"{multiple:g}" for multiple in multiples])
        row[0].set_ylabel(f"best loss (nats/token)\n{label}")
    for ax in axes[1]:
        ax.set_xlabel("width / base width")
    title(figure, _finding(table))
    _budgets(figure.add_subplot(grid[1]), dataset, paper, ours)
    legend(
        figure,
        [Line2D([], [], label=RULE_TITLES[rule], **_look(rule)) for rule in RULE_TITLES if rule in set(table.rules)],
    )
    return Drawing(figure, table)


def _look(rules: str) -> dict[str, Any]:
    return {"color": RULE_COLOURS[rules], "marker": RULE_MARKERS[rules], "mec": "white", "mew": 0.5, "ms": 5, "lw": 1.2}


def _line(ax: Axes, line: pd.DataFrame, name: str, shift: float) -> None:
    """Differences of one source and rule set against the multiple of the base width."""
    if line.empty:
        return
    x, look = np.log2(line.multiple) + shift, _look(line.rules.iloc[0])
    if line.source.iloc[0] == PAPER:
        look |= {"ls": _DASHED, "mfc": "white", "mec": look["color"], "ms": 4, "lw": 0.9}
    else:
        ax.vlines(x, line[f"{name}_low"], line[f"{name}_high"], color=look["color"], lw=1.2, zorder=2)
    ax.plot(x, line[name], zorder=3, **look)


def _budgets(ax: Axes, dataset: xr.Dataset, paper: pd.DataFrame, ours: pd.DataFrame) -> None:
    """One line of keys per source and budget."""
    dark: dict[str, Any] = {"color": "0.3", "marker": "o", "ms": 4.5, "lw": 1.1}
    hollow = dark | {"mfc": "white", "ls": _DASHED}
    theirs = f"{SOURCE}: {_budget(PAPER_SETTING, paper.width)}, {GROWTH_TITLES[PAPER_SETTING.growth]}"
    settings = [
        study_setting(dataset, growth, optimizer)
        for growth, optimizer in distinct(zip(ours.growth, ours.optimizer, strict=True))
    ]
    seeds = [setting.seeds for setting in settings]
    budgets = distinct(_budget(setting, ours.width, *seeds) for setting in settings)
    handles = [Line2D([], [], label=theirs, **hollow)]
    handles += [Line2D([], [], label=f"this study: {budget}", **dark) for budget in budgets]
    ax.set_axis_off()
    ax.legend(handles=handles, loc="center", borderpad=0)


def _budget(setting: Setting, widths: pd.Series, *seeds: int) -> str:
    """What models were trained on; `seeds`: how many, of each of several sweeps."""
    fewest, most = min(seeds, default=setting.seeds), max(seeds, default=setting.seeds)
    count = f"{fewest} to {most} seeds" if fewest < most else f"{most} seed{'s' * (most > 1)}"
    with_intervals = "95 %" if most > 1 else "no"
    tokens = f"{_count(setting.tokens)} tokens"
    spanned = f"widths {widths.min()}–{widths.max()}, {setting.layers} layers"
    return f"{setting.corpus}, {tokens}, {spanned}, {count}, {with_intervals} intervals"


def _count(number: float) -> str:
    for size, sign in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {sign}"
    return f"{number:g}"


def _finding(table: pd.DataFrame) -> str:
    """Differences to SP at the widest width, and what the paper's rule sets differ by where they are one model."""
    lines = ["Best loss less SP's at the widest width, over rule sets, in nats"]
    base = table[(table.source == PAPER) & (table.multiple == 1)].groupby("optimizer").loss
    apart = base.max() - base.min()
    for optimizer in distinct(table[table.source == STUDY].optimizer):
        parts = []
        for source, here in table[table.optimizer == optimizer].groupby("source", sort=False):
            compared = here[(here.rules != "sp") & here.minus_sp.notna()]
            widest = compared[compared.width == compared.groupby("growth").width.transform("max")]
            if len(widest):
                parts.append(f"{source} {signed_range(widest.minus_sp)}")
                if source == PAPER and apart[optimizer] > 0:
                    parts[-1] += f" (its runs of one model differ by {apart[optimizer]:.2f})"
        lines.append(unbroken(f"{OPTIMIZER_TITLES[optimizer]}: {'; '.join(parts)}"))
    return "\n".join(lines)
