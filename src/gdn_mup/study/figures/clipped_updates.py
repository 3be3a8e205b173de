"""Figure of how many updates are clipped, against width: what decides whether an optimum under SGD can move at all."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from gdn_mup.study.clipping import clipped_share
from gdn_mup.study.figures.style import (
    FULL_WIDTH,
    RULE_COLOURS,
    RULE_MARKERS,
    Drawing,
    distinct,
    label_below,
    label_left,
    legend,
    letters,
    panel_title,
    rule_keys,
    styled,
    title,
    width_axis,
)
from gdn_mup.study.optimum import transferred_rate, transfers
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES

_SHIFT = 0.05  # doublings of width, from one rule set to the next


@styled
def clipped_updates(dataset: xr.Dataset) -> Drawing:
    """Share of a run's updates whose gradient was clipped, at the learning rate transferred from the base width.

    dataset: a collected `lr_sweep`. A panel per (growth, optimizer), a line per rule set; bars reach from the least to
    the most of the seeds. The table has a row per rule set, width and seed.
    """
    table = _table(dataset)
    places = distinct(table[["growth", "optimizer"]].itertuples(index=False, name=None))
    columns = min(4, len(places))
    rows = -(-len(places) // columns)
    size = (FULL_WIDTH, 1.0 + 1.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    letter = letters()
    for ax, (growth, optimizer) in zip(axes.flat, places, strict=False):
        _panel(ax, table[(table.growth == growth) & (table.optimizer == optimizer)])
        panel_title(ax, next(letter), f"{OPTIMIZER_TITLES[optimizer]},\n{GROWTH_TITLES[growth]}")
    for ax in list(axes.flat)[len(places) :]:
        ax.set_axis_off()
    label_below(axes, "width")
    label_left(axes[0], "updates clipped (%)")
    title(figure, _finding(table))
    legend(figure, rule_keys([name for name in RULE_TITLES if name in set(table.rules)]))
    return Drawing(figure, table)


def _table(dataset: xr.Dataset) -> pd.DataFrame:
    rows = []
    for sweep in transfers(dataset):
        rate = transferred_rate(sweep)
        if rate is None:
            continue
        share = clipped_share(dataset, sweep.growth, sweep.optimizer, sweep.rules).sel(learning_rate=rate)
        rows += [
            {
                "growth": sweep.growth,
                "optimizer": sweep.optimizer,
                "rules": sweep.rules,
                "width": width,
                "seed": int(seed),
                "learning_rate": rate,
                "clipped_share": float(share.sel(width=width, seed=seed)),
            }
            for width, losses in sweep.curves.items()
            for seed in losses.index
        ]
    columns = ["growth", "optimizer", "rules", "width", "seed", "learning_rate", "clipped_share"]
    return pd.DataFrame(rows, columns=columns)


def _panel(ax: Axes, here: pd.DataFrame) -> None:
    drawn = distinct(here.rules)
    for k, rules in enumerate(drawn):
        share = 100 * here[here.rules == rules].groupby("width").clipped_share.agg(["mean", "min", "max"])
        x = np.log2(share.index.to_numpy(float)) + _SHIFT * (k - (len(drawn) - 1) / 2)
        ax.plot(
            x, share["mean"], color=RULE_COLOURS[rules], marker=RULE_MARKERS[rules], mec="white", mew=0.5, lw=1, ms=5
        )
        ax.vlines(x, share["min"], share["max"], color=RULE_COLOURS[rules], lw=1.4)
    ax.set_ylim(-4, 104)
    width_axis(ax, distinct(here.width))


def _finding(table: pd.DataFrame) -> str:
    lines = ["Updates clipped at the base width's best learning rate, from the narrowest to the widest model"]
    for optimizer, here in table.groupby("optimizer", sort=False):
        ends = [100 * here[here.width == width].clipped_share for width in (here.width.min(), here.width.max())]
        least, most = (_percent(share) for share in ends)
        lines.append(f"{OPTIMIZER_TITLES[str(optimizer)]}: {least} at {here.width.min()}, {most} at {here.width.max()}")
    return "\n".join(lines)


def _percent(shares: pd.Series) -> str:
    ends = dict.fromkeys(f"{share:.0f}" for share in (shares.min(), shares.max()))
    return f"{' to '.join(ends)} %"
