"""Figures of learning-rate transfer: loss against learning rate, and the optimum against width."""

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gdn_mup.study.estimates import Estimate, signed
from gdn_mup.study.figures.style import (
    COLUMN_WIDTH,
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
    power_axis,
    styled,
    title,
    width_axis,
    width_colours,
)
from gdn_mup.study.optimum import Optimum, Transfer, transfers
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES, named

_BASE_LINE: dict[str, Any] = {"color": "0.6", "lw": 0.7, "ls": (0, (4, 2))}  # marks the base width's optimum
_LEAVES: dict[str, Any] = {
    "marker": "^",
    "ls": "none",
    "ms": 3.5,
    "mew": 0,
    "clip_on": False,
    "zorder": 5,
    "in_layout": False,
}


@styled
def lr_transfer(dataset: xr.Dataset, optimizer: str) -> Drawing:
    """Held-out loss against learning rate: a panel per rule set (and row per growth mode), a line per width.

    Thin points are seeds, lines their mean; a bar is the optimum's 95 % interval. Panels show the valleys: an arrowhead
    at the top edge is where a line leaves, a cross below it a learning rate at which a seed diverged. The table has one
    row per member.
    Raises UserError if the study has no sweep with this optimizer.
    """
    sweeps = transfers(dataset, optimizer)
    growths, rules = distinct(s.growth for s in sweeps), distinct(s.rules for s in sweeps)
    colours = width_colours(width for s in sweeps for width in s.widths)
    figure, axes = plt.subplots(
        len(growths),
        len(rules),
        figsize=(FULL_WIDTH if len(rules) > 1 else COLUMN_WIDTH, 0.75 + 2.3 * len(growths)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    letter = letters()
    for i, growth in enumerate(growths):
        here = {s.rules: s for s in sweeps if s.growth == growth}
        floor, ceiling = _loss_range(here.values())
        for j, name in enumerate(rules):
            ax = axes[i, j]
            if name not in here:
                ax.set_axis_off()
                continue
            _loss_curves(ax, here[name], colours, ceiling)
            ax.set_ylim(floor, ceiling)
            panel_title(ax, next(letter), f"{RULE_TITLES[name]}\n{slope_text(here[name])}")
            power_axis(ax.xaxis)
        growing = f"\ngrowth by {GROWTH_TITLES[growth]}" if len(growths) > 1 else ""
        label_left(axes[i], f"held-out loss (nats/token){growing}")
    label_below(axes, "learning rate\nat the base width")
    growing = f", growth by {GROWTH_TITLES[growths[0]]}" if len(growths) == 1 else ""
    title(figure, f"{OPTIMIZER_TITLES[optimizer]}{growing}: {_transfer_finding(sweeps)}")
    handles = [Line2D([], [], color=colours[w], label=f"{w}") for w in colours]
    handles += [
        Line2D([], [], color="0.3", marker="o", mec="white", mew=0.5, ms=5, label="optimum, 95 % interval"),
        Line2D([], [], **_BASE_LINE, label="base width's optimum"),
        Line2D([], [], color="0.3", marker=".", ms=3, alpha=0.5, mew=0, ls="none", label="seed"),
    ]
    if any(losses.isna().any(axis=None) for s in sweeps for losses in s.curves.values()):
        handles.append(Line2D([], [], color="0.3", marker="x", ls="none", label="diverged"))
    legend(figure, handles, "width")
    return Drawing(figure, _member_table(sweeps))


def _loss_curves(ax: Axes, sweep: Transfer, colours: dict[int, str], ceiling: float) -> None:
    # Crosses of different widths sit below one another, so that none hides another.
    for level, (width, losses) in enumerate(sweep.curves.items()):
        colour, optimum = colours[width], sweep.optima[width]
        rates = np.log2(losses.columns.to_numpy(float))
        mean = losses.mean(axis=0, skipna=False).to_numpy()
        ax.plot(rates, mean, color=colour, zorder=2)
        for _, values in losses.iterrows():
            ax.plot(rates, values, ".", color=colour, ms=3, alpha=0.5, mew=0, zorder=1)
        leaves = _crossings(rates, mean, ceiling)
        ax.plot(leaves, np.ones_like(leaves), transform=ax.get_xaxis_transform(), **_LEAVES, color=colour)
        diverged = rates[np.isnan(mean)]
        place = np.full(len(diverged), 0.97 - 0.045 * level)
        ax.plot(diverged, place, "x", color=colour, ms=3.5, mew=1, transform=ax.get_xaxis_transform(), zorder=3)
        if optimum.bracketed:
            _interval_bar(ax, optimum, colour)
    base = sweep.optima.get(sweep.base_width)
    if base is not None and base.bracketed:
        ax.axvline(base.log2_learning_rate, **_BASE_LINE, zorder=0)


def _crossings(x: np.ndarray, y: np.ndarray, height: float) -> np.ndarray:
    """Where the line through these points crosses a height."""
    with np.errstate(invalid="ignore", divide="ignore"):
        between = (y[:-1] - height) * (y[1:] - height) < 0
        crossings = x[:-1] + np.diff(x) * (height - y[:-1]) / np.diff(y)
    return np.asarray(crossings[between])


def _interval_bar(ax: Axes, optimum: Optimum, colour: str) -> None:
    best, (low, high) = optimum.log2_learning_rate, optimum.interval
    ax.errorbar(
        best,
        optimum.loss,
        xerr=[[best - low], [high - best]],
        color=colour,
        elinewidth=1.2,
        capsize=3,
        capthick=1.2,
        zorder=4,
    )
    ax.plot(best, optimum.loss, "o", color=colour, mec="white", mew=0.5, ms=4, zorder=5)


def _loss_range(sweeps: Iterable[Transfer], octaves: float = 2.0) -> tuple[float, float]:
    """The losses of the valleys, with room for crosses above.

    From below the best loss to the highest within so many octaves below a curve's best learning rate: above it, losses
    may rise to divergence, and count only where there are none below.
    """
    best, far = np.inf, -np.inf
    for sweep in sweeps:
        for losses in sweep.curves.values():
            mean = losses.mean(axis=0, skipna=False).dropna()
            if mean.empty:
                continue
            away = np.log2(mean.index.to_numpy(float) / mean.idxmin())
            below, above = (mean[(side >= 0) & (side <= octaves)] for side in (-away, away))
            best, far = min(best, mean.min()), max(far, (below if len(below) > 1 else above).max())
    if not np.isfinite(best):
        return 0.0, 1.0
    margin = max(far - best, 0.05)
    return best - 0.08 * margin, far + 0.25 * margin


def _transfer_finding(sweeps: Sequence[Transfer]) -> str:
    """What the slopes say, a line per growth mode."""
    known = [s for s in sweeps if not s.slope.reason]
    if not known:
        return "the optimum is bracketed at too few widths to say how it moves"
    growths = distinct(s.growth for s in known)
    lines = ["octaves by which the optimum moves when width doubles"]
    for growth in growths:
        slopes = ", ".join(f"{RULE_TITLES[s.rules]} {signed(s.slope.value)}" for s in known if s.growth == growth)
        lines.append(f"{GROWTH_TITLES[growth]}: {slopes}" if len(growths) > 1 else slopes)
    return "\n".join(lines)


def slope_text(sweep: Transfer) -> str:
    """The slope and its interval, in octaves per doubling of width."""
    if sweep.slope.reason:
        return f"optimum {_why_no_slope(sweep)}"
    return f"slope {sweep.slope.signed()}"


def _why_no_slope(sweep: Transfer) -> str:
    return "not bracketed" if len(sweep.widths) > 1 else f"at width {sweep.widths[0]} only"


def regret_text(regret: Estimate) -> str:
    """A regret that has a number, and its interval, in nats per token."""
    return "diverges" if np.isinf(regret.value) else regret.plain(2)


def _member_table(sweeps: Sequence[Transfer]) -> pd.DataFrame:
    frames = []
    for s in sweeps:
        for width, losses in s.curves.items():
            long = losses.reset_index().melt("seed", value_name="val_loss")
            optimum = s.optima[width]
            frames.append(
                long.assign(
                    growth=s.growth,
                    optimizer=s.optimizer,
                    rules=s.rules,
                    width=width,
                    diverged=long.val_loss.isna().astype(int),
                    optimum_log2_learning_rate=optimum.log2_learning_rate,
                    optimum_low=optimum.interval.low,
                    optimum_high=optimum.interval.high,
                )
            )
    first = ["growth", "optimizer", "rules", "width", "seed", "learning_rate"]
    table = pd.concat(frames, ignore_index=True)
    return table[first + [name for name in table.columns if name not in first]]


# Optimum against width


@styled
def optimum_vs_width(dataset: xr.Dataset) -> Drawing:
    """Optimal learning rate against width, a column per optimizer (and row per growth mode), a line per rule set.

    Bars are 95 % intervals, lines the fits whose slopes the keys beside a panel give. Panels of one optimizer share
    their vertical axis; grid lines are an octave apart. A hollow marker is the best learning rate of a grid that does
    not bracket its optimum. The table has one row per optimum.
    """
    sweeps = transfers(dataset)
    growths, optimizers = distinct(s.growth for s in sweeps), distinct(s.optimizer for s in sweeps)
    size = (FULL_WIDTH, 0.75 + 1.9 * len(growths))
    figure, axes = plt.subplots(
        len(growths), len(optimizers), figsize=size, squeeze=False, sharex=True, sharey="col"
    )  # fmt: skip
    letter = letters()
    rows = []
    for i, growth in enumerate(growths):
        for j, optimizer in enumerate(optimizers):
            ax = axes[i, j]
            here = [s for s in sweeps if (s.growth, s.optimizer) == (growth, optimizer)]
            if not here:
                ax.set_axis_off()
                continue
            for k, sweep in enumerate(here):
                look = RULE_COLOURS[sweep.rules], RULE_MARKERS[sweep.rules], RULE_TITLES[sweep.rules]
                optima_against_width(ax, sweep, 0.05 * (k - (len(here) - 1) / 2), *look)
                rows += optimum_rows(sweep)
            growing = f", growth by {GROWTH_TITLES[growth]}" if len(growths) > 1 else ""
            panel_title(ax, next(letter), OPTIMIZER_TITLES[optimizer] + growing)
            ax.legend(
                loc="center left", bbox_to_anchor=(1, 0.5), title="octaves per doubling\n[95 % interval]",
                alignment="left", title_fontsize=7, labelspacing=0.7,
            )  # fmt: skip
    width_axis(axes[0, 0], distinct(width for s in sweeps for width in s.widths))
    for column in axes.T:
        power_axis(column[0].yaxis)
        for ax in column:
            ax.grid(axis="y", color="0.92", lw=0.6)
    for row in axes:
        label_left(row, "best learning rate\n(at the base width)")
    label_below(axes, "width")
    handles = [Line2D([], [], color="0.3", marker="|", ls="none", ms=9, label="95 % interval of an optimum")]
    if any(not optimum.bracketed for s in sweeps for optimum in s.optima.values()):
        handles.append(
            Line2D([], [], color="0.3", marker="o", mfc="white", ls="none", label="best of the grid, not bracketed")
        )
    legend(figure, handles)
    title(figure, _stays_finding(sweeps))
    return Drawing(figure, pd.DataFrame(rows))


def optima_against_width(ax: Axes, sweep: Transfer, shift: float, colour: Any, marker: str, label: str = "") -> None:
    """Optima with their intervals and the line of their slope, whose numbers follow the label, in log₂ units."""
    for width, optimum in sweep.optima.items():
        x = np.log2(width) + shift
        if optimum.bracketed:
            y = optimum.log2_learning_rate
            ax.vlines(x, *optimum.interval, color=colour, lw=1.4)
            ax.plot(x, y, marker, color=colour, mec="white", mew=0.5, ms=5, zorder=3)
        else:
            losses = sweep.curves[width].mean(axis=0, skipna=False)
            if losses.notna().any():
                ax.plot(x, np.log2(losses.idxmin()), marker, mfc="white", mec=colour, ms=5, zorder=3)
    slope = sweep.slope
    if slope.reason:
        ax.plot([], [], marker, mfc="white", mec=colour, label=f"{label}\n{_why_no_slope(sweep)}".lstrip())
        return
    ends = np.log2([slope.widths[0], slope.widths[-1]])
    ax.plot(ends + shift, slope.intercept + slope.value * ends, color=colour, lw=1)
    ax.plot(
        [],
        [],
        color=colour,
        marker=marker,
        mec="white",
        mew=0.5,
        ms=5,
        lw=1,
        label=f"{label}\n{slope.signed()}".lstrip(),
    )


def optimum_rows(sweep: Transfer) -> list[dict[str, Any]]:
    """One row per optimum, with the slope that they give."""
    return [
        {
            "growth": sweep.growth,
            "optimizer": sweep.optimizer,
            "rules": sweep.rules,
            "width": width,
            "optimum_log2_learning_rate": optimum.log2_learning_rate,
            "optimum_low": optimum.interval.low,
            "optimum_high": optimum.interval.high,
            "not_bracketed": optimum.reason,
            "slope": sweep.slope.value,
            "slope_low": sweep.slope.interval.low,
            "slope_high": sweep.slope.interval.high,
        }
        for width, optimum in sweep.optima.items()
    ]


def _stays_finding(sweeps: Sequence[Transfer]) -> str:
    known = [s for s in sweeps if not s.slope.reason]
    if not known:
        return "The optimum is bracketed at too few widths to say how it moves"
    moving = named((s.optimizer, s.rules) for s in known if 0.0 not in s.slope.interval)
    staying = named((s.optimizer, s.rules) for s in known if 0.0 in s.slope.interval)
    lines = [f"The optimum moves with width: {moving}."] if moving else []
    lines += [f"Movement not established: {staying}."] if staying else []
    return "\n".join(lines)
