"""Figures of width exponents: predicted against measured, and the gates' gradients over training."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from gdn_mup.study.estimates import signed
from gdn_mup.study.exponents import GATES, exponents, gate_gradients
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
)
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES

GATE_TITLES = {
    "dt_bias": "dt_bias",
    "A_log": "A_log",
    "alpha_projection": "$W_a$",
    "beta_projection": "$W_b$",
}
_FARTHEST = 2.0  # axes end here: what saturates beyond is in the table


@styled
def predicted_exponents(dataset: xr.Dataset) -> Drawing:
    """Measured width exponents against predicted ones, a column per (growth, optimizer), a colour per rule set.

    Upper row: init and the first update, for which they are derived; lower row: the last step. A point is one
    quantity or parameter of one block; bars are 95 % intervals, horizontal ones the range between two answers of
    the derivation. Filled points agree, crosses differ. The table has every quantity, layer and step.
    """
    table = exponents(dataset)
    first, last = _first_steps(table), table[table.step == table.step.max()]
    columns = distinct(zip(table.growth, table.optimizer, strict=True))
    rules = [name for name in RULE_TITLES if name in set(table.rules)]
    figure, axes = plt.subplots(
        2, len(columns), figsize=(FULL_WIDTH, 4.6), sharex=True, sharey=True, squeeze=False
    )  # fmt: skip
    letter = letters()
    stages = [("init and first update", first), (f"after {table.step.max()} updates", last)]
    for row, (stage, part) in zip(axes, stages, strict=True):
        for ax, (growth, optimizer) in zip(row, columns, strict=True):
            here = part[(part.growth == growth) & (part.optimizer == optimizer)]
            ax.plot([-_FARTHEST, _FARTHEST], [-_FARTHEST, _FARTHEST], color="0.6", lw=0.8, zorder=0)
            for name in rules:
                _points(ax, here[here.rules == name], RULE_COLOURS[name], RULE_MARKERS[name])
            decided = here[here.agreement != "undecided"]
            share = f"{(decided.agreement == 'agrees').sum()} of {len(decided)} agree"
            panel_title(ax, next(letter), f"{OPTIMIZER_TITLES[optimizer]}, {GROWTH_TITLES[growth]}\n{share}")
        row[0].set_ylabel(f"measured, {stage}")
    for ax in axes[-1]:
        ax.set(xlabel="predicted exponent", xlim=(-_FARTHEST, _FARTHEST), ylim=(-_FARTHEST, _FARTHEST))
        ax.xaxis.set_major_locator(MultipleLocator(1))
    title(figure, _agreement_finding(first, last, _widths(dataset)))
    handles = [
        Line2D([], [], color=RULE_COLOURS[name], marker=RULE_MARKERS[name], ls="none", ms=4, label=RULE_TITLES[name])
        for name in rules
    ]
    handles.append(Line2D([], [], color="0.3", marker="x", ls="none", ms=4, label="differs"))
    legend(figure, handles)
    return Drawing(figure, table)


@styled
def gate_gradient_exponents(dataset: xr.Dataset) -> Drawing:
    """Width exponent of the gates' gradients against updates done, a row per (growth, optimizer), a line per rule set.

    Bars are 95 % intervals over seeds; grey lines are the two premises: terms of independent signs (dashed, that of
    arXiv 2606.04048) and aligned terms (solid). Lines and bars may leave the panels. The table has every exponent.
    """
    table = gate_gradients(dataset)
    rows = distinct(zip(table.growth, table.optimizer, strict=True))
    gates = [name for name in GATES if name in set(table.parameter)]
    rules = [name for name in RULE_TITLES if name in set(table.rules)]
    size = (FULL_WIDTH, 0.9 + 1.35 * len(rows))
    figure, axes = plt.subplots(len(rows), len(gates), figsize=size, sharex=True, sharey="row", squeeze=False)
    letter = letters()
    for i, (growth, optimizer) in enumerate(rows):
        here = table[(table.growth == growth) & (table.optimizer == optimizer)]
        for ax, gate in zip(axes[i], gates, strict=True):
            panel = here[here.parameter == gate]
            # SP's are half a power higher: its readout does not shrink.
            premises = panel.sort_values("rules", key=lambda rules: rules == "sp").iloc[0]
            ax.axhline(premises.independent, color="0.5", lw=0.9, ls="--", zorder=0)
            ax.axhline(premises.aligned, color="0.5", lw=0.9, zorder=0)
            for name in rules:
                line = panel[panel.rules == name].sort_values("step")
                look: Any = {"color": RULE_COLOURS[name]}
                step = line.step * 2 ** (0.15 * (rules.index(name) - (len(rules) - 1) / 2))  # side by side
                ax.vlines(step, line.low, line.high, lw=0.8, alpha=0.6, zorder=1, **look)
                ax.plot(step, line.exponent, marker=RULE_MARKERS[name], ms=3.5, mec="white", mew=0.3, lw=1, **look)
            ax.set_xscale("log", base=2)
            ax.set_ylim(-1.75, 1.25)
            panel_title(ax, next(letter), GATE_TITLES[gate] if i == 0 else "")
        axes[i, 0].set_ylabel(f"{OPTIMIZER_TITLES[optimizer]}\n{GROWTH_TITLES[growth]}")
    steps = sorted(table.step.unique())
    for ax in axes[-1]:
        ax.set_xticks(steps, [str(step) for step in steps])
        ax.set_xlabel("update")
    figure.align_ylabels()
    figure.supylabel("width exponent of the gradient", fontsize=8)
    title(figure, _premise_finding(table, _widths(dataset)))
    handles = [
        Line2D([], [], color=RULE_COLOURS[name], marker=RULE_MARKERS[name], ms=4, lw=1, label=RULE_TITLES[name])
        for name in rules
    ]
    handles += [
        Line2D([], [], color="0.5", lw=0.9, ls="--", label="independent signs (μP)"),
        Line2D([], [], color="0.5", lw=0.9, label="aligned signs (μP)"),
    ]
    legend(figure, handles)
    return Drawing(figure, table)


def _first_steps(table: pd.DataFrame) -> pd.DataFrame:
    """Sizes at init, and changes, gradients and updates of the first update that was measured."""
    at_init = table.measure.isin(["rms", "weight_rms"])
    first_update = table[table.step > 0].step.min()
    return table[at_init & (table.step == 0) | ~at_init & (table.step == first_update)]


def _points(ax: Axes, part: pd.DataFrame, colour: str, marker: str) -> None:
    middle = (part.predicted_low + part.predicted_high) / 2
    spread = (part.predicted_high - part.predicted_low) / 2
    shown = part.assign(x=middle, spread=spread)[np.isfinite(middle) & np.isfinite(part.low)]
    for agrees, sign in ((True, marker), (False, "x")):
        some = shown[(shown.agreement == "agrees") == agrees]
        some = some if agrees else some[some.agreement == "differs"]
        errors = [some.exponent - some.low, some.high - some.exponent]
        ax.errorbar(
            some.x, some.exponent, yerr=errors, xerr=some.spread, fmt=sign, color=colour, ms=3, lw=0.5, alpha=0.6
        )  # fmt: skip


def _widths(dataset: xr.Dataset) -> str:
    return f"widths {int(dataset.width.min())} to {int(dataset.width.max())}"


def _agreement_finding(first: pd.DataFrame, last: pd.DataFrame, widths: str) -> str:
    def share(part: pd.DataFrame) -> str:
        decided = part[part.agreement != "undecided"]
        return (
            f"{100 * (decided.agreement == 'agrees').mean():.0f} % of {len(decided)}" if len(decided) else "none of 0"
        )

    return (
        f"As predicted: {share(first)} exponents at {widths}, at init and in the first update,\n"
        f"{share(last)} after {int(last.step.max())} updates"
    )


def _premise_finding(table: pd.DataFrame, widths: str) -> str:
    """The mean exponents of the first and last step, where the premises differ, and how many tell them apart."""
    differ = table[(table.independent != table.aligned) & (table.rules != "sp")]
    if differ.empty:
        return "Gate gradients: both premises predict the same exponents here"
    lines = []
    for optimizer, part in differ.groupby("optimizer", sort=False):
        first, last = (part[part.step == step] for step in (part.step.min(), part.step.max()))
        known = last.dropna(subset=["low", "high"])
        decide = (known.low > known.independent) | (known.high < known.aligned)
        apart = f", where {decide.sum()} of {len(known)} intervals tell the premises apart" if len(known) else ""
        means = [f"{signed(each.exponent.mean())} in update {each.step.iloc[0]}" for each in (first, last)]
        lines.append(f"{OPTIMIZER_TITLES[optimizer]}: {', '.join(means)}{apart}")
    growth = GROWTH_TITLES[differ.growth.iloc[0]]
    return "\n".join([f"Mean width exponent of gate gradients, μP rule sets, {growth}, {widths}", *lines])
