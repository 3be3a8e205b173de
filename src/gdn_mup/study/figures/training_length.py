"""Figure of transfer against training length, over several studies."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gdn_mup.errors import UserError
from gdn_mup.study.equivalence import LOSS_MARGIN, SLOPE_MARGIN
from gdn_mup.study.estimates import signed
from gdn_mup.study.figures.style import (
    FULL_WIDTH,
    RULE_COLOURS,
    RULE_MARKERS,
    RULE_SIGNS,
    Drawing,
    distinct,
    label_below,
    legend,
    letters,
    panel_title,
    rule_keys,
    styled,
    title,
)
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES
from gdn_mup.study.training_length import training_length

_PANELS = {  # column of the table: title, label, margin
    "slope": ("slope", "octaves per doubling", SLOPE_MARGIN),
    "cost": ("cost of the transferred learning rate", "nats/token", LOSS_MARGIN),
    "loss_less_sp": ("best loss less SP's", "nats/token", None),
}
_CEILING = 4 * LOSS_MARGIN  # nats: costs beyond are written, not drawn
_SHIFT = 0.05  # octaves, from one rule set to the next


@styled
def transfer_against_training_length(datasets: Mapping[str, xr.Dataset]) -> Drawing:
    """Slope, cost of the transferred learning rate and gap to SP against tokens per parameter of the widest model.

    datasets: collected learning-rate sweeps by study. A row of panels per (growth, optimizer) that was run at two
    lengths or more, a line per rule set; bars are 95 % intervals, shaded is what the margins of the claims allow.
    Raises UserError if nothing was run at two lengths, or if studies differ in more than length.
    """
    table = training_length(datasets)
    table = table[table.slope.notna()]  # a study of one width says nothing yet
    table = table[table.groupby(["growth", "optimizer"]).tokens.transform("nunique") > 1]
    if table.empty:
        raise UserError("no sweep was run at two training lengths; name studies that differ in `training.steps`")
    places = distinct(table[["growth", "optimizer"]].itertuples(index=False, name=None))
    size = (FULL_WIDTH, 1.1 + 1.7 * len(places))
    figure, axes = plt.subplots(len(places), len(_PANELS), figsize=size, squeeze=False, sharex="row")
    letter = letters()
    for row, (growth, optimizer) in zip(axes, places, strict=True):
        here = table[(table.growth == growth) & (table.optimizer == optimizer)]
        for ax, (name, (words, label, margin)) in zip(row, _PANELS.items(), strict=True):
            _panel(ax, here, name, margin)
            ax.set_ylabel(label)
            first = name == "slope"
            place = f"{OPTIMIZER_TITLES[optimizer]}, {GROWTH_TITLES[growth]}:\n" if first else "\n"
            panel_title(ax, next(letter), f"{place}{words}")
    label_below(axes, "tokens per parameter\n(tokens a run)")
    title(figure, _finding(table))
    handles = rule_keys([name for name in RULE_TITLES if name in set(table.rules)])
    handles.append(Line2D([], [], color="0.3", marker="|", ls="none", ms=9, label="95 % interval"))
    legend(figure, handles)
    return Drawing(figure, table)


def _panel(ax: Axes, here: pd.DataFrame, name: str, margin: float | None) -> None:
    if margin is not None:
        ax.axhspan(-margin if name == "slope" else 0, margin, color="0.93", lw=0, zorder=0)
    ax.axhline(0, color="0.4", lw=0.8, ls=(0, (4, 2)), zorder=1)
    drawn = [rules for rules in RULE_TITLES if here[here.rules == rules][name].notna().any()]
    for k, rules in enumerate(drawn):
        line = here[here.rules == rules].dropna(subset=[name])
        x = np.log2(line.tokens_per_parameter) + _SHIFT * (k - (len(drawn) - 1) / 2)
        ax.plot(x, line[name], color=RULE_COLOURS[rules], marker=RULE_MARKERS[rules], mec="white", mew=0.5, lw=1, ms=5)
        ax.vlines(x, line[f"{name}_low"], line[f"{name}_high"], color=RULE_COLOURS[rules], lw=1.4)
    if name == "cost" and here[name].max() > _CEILING:
        _above(ax, here)
    ticks = here.drop_duplicates("tokens").sort_values("tokens")
    labels = [f"{row.tokens_per_parameter:.2g}\n({row.tokens / 1e6:.3g} M)" for row in ticks.itertuples()]
    ax.set_xticks(np.log2(ticks.tokens_per_parameter), labels)
    ax.margins(x=0.25)


def _above(ax: Axes, here: pd.DataFrame) -> None:
    """Costs too large for the panel, as numbers at its upper edge, so that small ones can be read."""
    ax.set_ylim(-0.05 * _CEILING, _CEILING)
    for row in here[here.cost > _CEILING].itertuples():
        text = "diverges" if np.isinf(row.cost) else f"{row.cost:.2f}"
        ax.annotate(
            f"{RULE_SIGNS[row.rules]} {text} ↑", (np.log2(row.tokens_per_parameter), _CEILING), (4, 0),
            textcoords="offset points", va="top", fontsize=7, color=RULE_COLOURS[row.rules],
        )  # fmt: skip


def _finding(table: pd.DataFrame) -> str:
    """The gap to SP at the shortest and the longest training, and whether slopes stay within the margin."""
    lines = []
    for (growth, optimizer), here in table.groupby(["growth", "optimizer"], sort=False):
        mup = here[here.loss_less_sp.notna()]
        if mup.tokens.nunique() > 1:
            ends = [mup[mup.tokens == tokens].loss_less_sp for tokens in (mup.tokens.min(), mup.tokens.max())]
            least, most = (f"{_millions(tokens)}" for tokens in (mup.tokens.min(), mup.tokens.max()))
            lines.append(
                f"{OPTIMIZER_TITLES[str(optimizer)]}, {GROWTH_TITLES[str(growth)]}: the gap to SP goes from "
                f"{_range(ends[0])} nats at {least} tokens\nto {_range(ends[1])} nats at {most} tokens"
            )
    inside = table[(table.rules != "sp") & table.slope.notna()]
    kept = bool((inside.slope_low >= -SLOPE_MARGIN).all() and (inside.slope_high <= SLOPE_MARGIN).all())
    lines.append(
        f"Slopes of μP rule sets are {'all' if kept else 'not all'} within ±{SLOPE_MARGIN} octaves per doubling"
    )
    return "\n".join(lines)


def _range(values: Sequence[float] | pd.Series) -> str:
    ordered = sorted(values)
    ends = list(dict.fromkeys([signed(ordered[-1]), signed(ordered[0])]))
    return " to ".join(ends)


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.3g} M"
