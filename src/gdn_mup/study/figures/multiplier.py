"""Figure of the multiplier before the output norm: what it changes at which ε, and how large mean(o²) is."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from scipy import stats

from gdn_mup.study.estimates import over_seeds
from gdn_mup.study.figures.style import (
    FULL_WIDTH,
    Drawing,
    legend,
    letters,
    panel_title,
    styled,
    title,
    width_axis,
    width_colours,
)
from gdn_mup.study.multiplier import CONDITION, ROUNDING, multiplier_table
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES

LINEAR = 0.01  # the figure's axis of changes is linear below, so that it can show none at all

INIT_TITLES = {"study": "study's init", "usual": "usual init"}
INIT_COLOURS = {"study": "C0", "usual": "C3"}
INIT_MARKERS = {"study": "o", "usual": "^"}
SCALE_TITLES = {"one": "1", "inverse_root": "$K^{-1/2}$"}
SCALE_LINES = {"one": "-", "inverse_root": (0, (3, 1.5))}


@styled
def norm_epsilon(dataset: xr.Dataset) -> Drawing:
    """What the multiplier changes, against ε, and how large mean(o²) is, both at init; a row per growth and optimizer.

    Left, a panel per init: relative change of all gradients, a line per width. Right: mean(o²) against width beside ε,
    a line per init. Lines are geometric means over seeds, bars their 95 % intervals; dashed lines are the kernel
    scale K^-1/2. Where a study has several rule sets the last is drawn; the table has everything.
    """
    table = multiplier_table(dataset)
    shown = table[(table.step == 0) & (table.rules == str(dataset.rules.values.ravel()[-1]))]
    rows = list(shown[["growth", "optimizer"]].drop_duplicates().itertuples(index=False, name=None))
    inits = [init for init in INIT_TITLES if init in set(shown.init)]
    colours = width_colours(shown.width)
    several = shown.optimizer.nunique() > 1
    figure, axes = plt.subplots(
        len(rows),
        len(inits) + 1,
        figsize=(FULL_WIDTH, 0.85 + 2.1 * len(rows)),
        sharex="col",
        sharey="col",
        squeeze=False,
    )
    letter = letters()
    for (growth, optimizer), panels in zip(rows, axes, strict=True):
        here = shown[(shown.growth == growth) & (shown.optimizer == optimizer)]
        growing = GROWTH_TITLES[growth] + (f", {OPTIMIZER_TITLES[optimizer]}" if several else "")
        for ax, init in zip(panels, inits, strict=False):
            _changes(ax, here[here.init == init], colours)
            panel_title(ax, next(letter), f"{INIT_TITLES[init]}, {growing}")
        panels[0].set_ylabel("relative change\nof the gradient")
        _sizes(panels[-1], here)
        panel_title(panels[-1], next(letter), f"size of o, {growing}")
        panels[-1].set_ylabel("mean(o²)")
    for ax in axes[-1, :-1]:
        ax.set_xlabel("ε of the norm")
    axes[-1, -1].set_xlabel("width")
    title(figure, _finding(shown))
    handles = [Line2D([], [], color=colours[width], label=f"{width}") for width in colours]
    handles += [
        Line2D([], [], color=INIT_COLOURS[init], marker=INIT_MARKERS[init], label=INIT_TITLES[init]) for init in inits
    ]
    scales = [scale for scale in SCALE_TITLES if scale in set(shown.kernel_scale)]
    handles += [Line2D([], [], color="0.3", ls=SCALE_LINES[s], label=f"kernel × {SCALE_TITLES[s]}") for s in scales]
    legend(figure, handles, "width")
    return Drawing(figure, table)


def _changes(ax: Axes, changes: pd.DataFrame, colours: dict[int, str]) -> None:
    """Changes against ε, at one position for each ε: 0 has none on a logarithmic axis."""
    epsilons = sorted(changes.epsilon.unique())
    for (scale, width), line in changes.groupby(["kernel_scale", "width"], sort=False):
        # Widths side by side, so that no bar hides another; nothing leads from 0 to the smallest ε.
        shift = 0.1 * (list(colours).index(width) - (len(colours) - 1) / 2)
        for zero in (True, False):
            part = [epsilon for epsilon in epsilons if (epsilon == 0) == zero]
            positions = [epsilons.index(epsilon) + shift for epsilon in part]
            _line(ax, positions, [line[line.epsilon == e].gradient_change for e in part], colours[width], scale)
    at_zero = changes.gradient_change[changes.epsilon == 0]
    if len(at_zero):
        text = f"at most\n{_scientific(at_zero.max())}"
        ax.annotate(text, (epsilons.index(0), LINEAR), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    ax.set_yscale("symlog", linthresh=LINEAR, linscale=0.5)
    ax.set_yticks([0, 0.01, 0.1, 1, 10], ["0", "1 %", "10 %", "100 %", "1000 %"])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(-LINEAR / 4, 20)
    ax.set_xlim(-0.5, len(epsilons) - 0.5)
    ax.set_xticks(range(len(epsilons)), [_scientific(epsilon) for epsilon in epsilons])


def _sizes(ax: Axes, sizes: pd.DataFrame) -> None:
    """mean(o²) against width, and the ε above which it should be."""
    smallest = sizes[sizes.epsilon == sizes.epsilon.min()]
    for (init, scale), line in smallest.groupby(["init", "kernel_scale"], sort=False):
        widths = sorted(line.width.unique())
        squares = [line[line.width == width].mean_square for width in widths]
        _line(ax, list(np.log2(widths)), squares, INIT_COLOURS[init], scale, INIT_MARKERS[init])
    for epsilon in sorted(sizes.epsilon[sizes.epsilon > 0].unique()):
        ax.axhline(epsilon, color="0.4", lw=0.8, ls=(0, (1, 1.5)), zorder=0)
        ax.annotate(
            f"ε = {_scientific(epsilon)}", (1, epsilon), (2, 0), ("axes fraction", "data"), "offset points",
            fontsize=7, color="0.4", ha="left", va="center",
        )  # fmt: skip
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    width_axis(ax, sorted(sizes.width.unique()))


def _line(ax: Axes, x: list[float], samples: list[pd.Series], colour: str, scale: str, marker: str = "o") -> None:
    """Geometric means of samples over seeds, and their intervals where there are several seeds."""
    smallest = np.finfo(float).tiny  # its logarithm stands for that of 0
    intervals = [over_seeds(np.log(np.maximum(sample.to_numpy(float), smallest))).numbers for sample in samples]
    if not intervals:
        return
    value, low, high = np.exp(np.array(intervals)).T
    ax.plot(x, value, marker, color=colour, ls=SCALE_LINES[scale], lw=1, mec="white", mew=0.4)
    ax.vlines(x, low, high, color=colour, lw=0.9)


def _scientific(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.0e}".split("e")
    factor = "" if mantissa == "1" else rf"{mantissa}\times"
    return f"${factor}10^{{{int(exponent)}}}$"


def _finding(shown: pd.DataFrame) -> str:
    """What the multiplier changes, at ε = 0 and at the largest ε."""
    lines = []
    at_zero = shown[shown.epsilon == 0]
    if len(at_zero):
        largest = at_zero.largest_change.max()
        kept = "no gradient beyond rounding" if largest < ROUNDING else f"gradients by up to {100 * largest:.2g} %"
        lines.append(f"With ε = 0 a multiplier before the norm changes {kept}.")
    epsilon = shown.epsilon.max()
    if epsilon > 0:
        means = shown[shown.epsilon == epsilon].groupby([*CONDITION[:3], "init", "kernel_scale", "width"])
        mean = means.gradient_change.agg(stats.gmean).groupby("init")
        parts = [
            f"by {100 * mean.min()[init]:.0f}–{100 * mean.max()[init]:.0f} % ({INIT_TITLES[init]})"
            for init in INIT_TITLES
            if init in mean.groups
        ]
        lines.append(f"With ε = {_scientific(epsilon)} it does at init: {', '.join(parts)}.")
    return "\n".join(lines)
