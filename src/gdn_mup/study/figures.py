"""Figures for print. Every function takes a collected dataset and returns a figure and the table that it shows.

Width is always an ordered colour, darker for wider; rule sets have their own colours and markers. A title says
what the data say, computed from them. `save` writes a figure as svg, png and csv.
"""

import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullLocator

from gdn_mup.errors import UserError
from gdn_mup.scaling.rules import RULE_SETS
from gdn_mup.study.optimum import Optimum, Transfer, signed, transfers

COLUMN_WIDTH = 3.4  # inches: one column of a two-column page
FULL_WIDTH = 7.0

STYLE: Any = {  # matplotlib types the keys of rc_context as literals
    **sns.axes_style("ticks"),
    "font.size": 8,
    "axes.titlesize": 7.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.titlesize": 8.5,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "gdn-mup",  # the same data gives the same bytes
    "savefig.facecolor": "white",
}

GROWTH_TITLES = {"heads": "more heads", "head_dim": "larger heads"}
OPTIMIZER_TITLES = {"adamw": "AdamW", "sgd": "SGD"}
RULE_TITLES = {name: rules.title for name, rules in RULE_SETS.items()}
_COLOURBLIND = sns.color_palette("colorblind")
RULE_COLOURS = dict(zip(RULE_TITLES, (_COLOURBLIND[i] for i in (3, 0, 1, 2)), strict=True))
RULE_MARKERS = dict(zip(RULE_TITLES, "osD^", strict=True))

# What the coordinate check draws; the table that goes with it has every quantity.
COORDINATES = ("alpha_preactivation", "state", "o", "residual", "logits")
COORDINATE_TITLES = {
    "alpha_preactivation": "gate α pre-activation",
    "state": "state S",
    "o": "mixer output o",
    "residual": "residual stream",
    "logits": "logits",
}
OUTSIDE_BLOCKS = -1


class Drawing(NamedTuple):
    """A figure and the table of what it shows."""

    figure: Figure
    table: pd.DataFrame


def from_root(path: Path | str) -> Path:
    """A path relative to the repository's root, wherever inside the repository a notebook was started.

    The root is the nearest folder, from the working directory upward, that holds the Snakefile.
    Absolute paths, and all paths where there is no Snakefile above, are returned as they are.
    """
    path = Path(path)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if not path.is_absolute() and (folder / "Snakefile").is_file():
            return folder / path
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, with its suffix, that takes its place if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(figure: Figure, table: pd.DataFrame, stem: Path | str) -> None:
    """Write `stem`.svg, .png (300 dpi) and .csv, each to a temporary name and renamed when complete."""
    stem = Path(stem)
    with plt.rc_context(STYLE):
        with replacing(stem.with_name(f"{stem.name}.svg")) as path:
            figure.savefig(path, metadata={"Date": None})
        with replacing(stem.with_name(f"{stem.name}.png")) as path:
            figure.savefig(path, dpi=300)
    with replacing(stem.with_name(f"{stem.name}.csv")) as path:
        table.to_csv(path, index=False, float_format="%.6g")


def _styled(draw: Callable[..., Drawing]) -> Callable[..., Drawing]:
    """Draws in the style above, and closes the figure so that a notebook shows it once."""

    @wraps(draw)
    def drawn(*arguments: Any, **options: Any) -> Drawing:
        with plt.rc_context(STYLE):
            drawing = draw(*arguments, **options)
            drawing.figure.canvas.draw()  # settle the layout while the style holds
            plt.close(drawing.figure)
        return drawing

    return drawn


# Learning-rate transfer


@_styled
def lr_transfer(dataset: xr.Dataset, optimizer: str) -> Drawing:
    """Held-out loss against learning rate: a panel per rule set (and row per growth mode), a line per width.

    Thin points are seeds, lines their mean; a bar is the optimum's 95 % interval. Crosses at the top edge mark
    learning rates at which a seed diverged. The table has one row per member.
    Raises UserError if the study has no sweep with this optimizer.
    """
    sweeps = transfers(dataset, optimizer)
    growths, rules = _distinct(s.growth for s in sweeps), _distinct(s.rules for s in sweeps)
    colours = width_colours(width for s in sweeps for width in s.widths)
    figure, axes = plt.subplots(
        len(growths),
        len(rules),
        figsize=(FULL_WIDTH if len(rules) > 1 else COLUMN_WIDTH, 0.75 + 2.3 * len(growths)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    letters = _letters()
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
            _panel_title(ax, next(letters), f"{RULE_TITLES[name]}\n{_slope_label(here[name])}")
            _power_axis(ax.xaxis)
        axes[i, 0].set_ylabel(
            "held-out loss (nats/token)" + (f"\ngrowth by {GROWTH_TITLES[growth]}" if len(growths) > 1 else "")
        )
    for ax in axes[-1]:
        ax.set_xlabel("learning rate\nat the base width")
    _title(figure, f"{OPTIMIZER_TITLES[optimizer]}: {_transfer_finding(sweeps)}")
    handles = [Line2D([], [], color=colours[w], label=f"{w}") for w in colours]
    handles += [
        Line2D([], [], color="0.3", marker="o", mec="white", mew=0.5, ms=5, label="optimum, 95 % interval"),
        Line2D([], [], color="0.3", marker="x", ls="none", label="a seed diverged"),
    ]
    _legend(figure, handles, "width")
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
        diverged = rates[np.isnan(mean)]
        place = np.full(len(diverged), 0.97 - 0.045 * level)
        ax.plot(diverged, place, "x", color=colour, ms=3.5, mew=1, transform=ax.get_xaxis_transform(), zorder=3)
        if optimum.bracketed:
            _interval_bar(ax, optimum, colour)
    base = sweep.optima.get(sweep.base_width)
    if base is not None and base.bracketed:
        ax.axvline(base.log2_learning_rate, color="0.6", lw=0.7, ls=(0, (4, 2)), zorder=0)


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


def _loss_range(sweeps: Iterable[Transfer], octaves: float = 3.0) -> tuple[float, float]:
    """From below the best loss to the highest within so many octaves of a curve's best, with room for crosses."""
    best, far = np.inf, -np.inf
    for sweep in sweeps:
        for losses in sweep.curves.values():
            mean = losses.mean(axis=0, skipna=False).dropna()
            if len(mean):
                near = mean[np.abs(np.log2(mean.index.to_numpy(float) / mean.idxmin())) <= octaves]
                best, far = min(best, mean.min()), max(far, near.max())
    if not np.isfinite(best):
        return 0.0, 1.0
    margin = max(far - best, 0.05)
    return best - 0.08 * margin, far + 0.25 * margin


def _transfer_finding(sweeps: Sequence[Transfer]) -> str:
    """What the slopes say, as one line."""
    several = len({s.growth for s in sweeps}) > 1
    parts = []
    for name in _distinct(s.rules for s in sweeps):
        slopes = [s for s in sweeps if s.rules == name and not s.slope.reason]
        if slopes:
            values = ", ".join(
                signed(s.slope.value) + (f" ({GROWTH_TITLES[s.growth]})" if several else "") for s in slopes
            )
            parts.append(f"{RULE_TITLES[name]} {values}")
    if not parts:
        return "the optimum is bracketed at too few widths to say how it moves"
    joined = "; ".join(parts) if several else ", ".join(parts)
    return f"octaves by which the optimum moves when width doubles\n{joined}"


def _slope_label(sweep: Transfer) -> str:
    if sweep.slope.reason:
        return "optimum not bracketed"
    low, high = sweep.slope.interval
    return f"slope {signed(sweep.slope.value)} [{signed(low)}, {signed(high)}]"


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


@_styled
def optimum_vs_width(dataset: xr.Dataset) -> Drawing:
    """Optimal learning rate against width, a panel per optimizer (and row per growth mode), a line per rule set.

    Bars are 95 % intervals, lines the fits whose slopes the legend gives. A hollow marker is the best learning
    rate of a grid that does not bracket its optimum. The table has one row per optimum.
    """
    sweeps = transfers(dataset)
    growths, optimizers = _distinct(s.growth for s in sweeps), _distinct(s.optimizer for s in sweeps)
    size = (FULL_WIDTH if len(optimizers) > 1 else COLUMN_WIDTH, 0.55 + 2.5 * len(growths))
    figure, axes = plt.subplots(len(growths), len(optimizers), figsize=size, sharex=True, squeeze=False, sharey=False)
    letters = _letters()
    rows = []
    for i, growth in enumerate(growths):
        for j, optimizer in enumerate(optimizers):
            ax = axes[i, j]
            here = [s for s in sweeps if (s.growth, s.optimizer) == (growth, optimizer)]
            if not here:
                ax.set_axis_off()
                continue
            for k, sweep in enumerate(here):
                _optima_of(ax, sweep, shift=0.05 * (k - (len(here) - 1) / 2))
                rows += _optimum_rows(sweep)
            _power_axis(ax.yaxis)
            _width_axis(ax, _distinct(width for s in sweeps for width in s.widths))
            growing = f", growth by {GROWTH_TITLES[growth]}" if len(growths) > 1 else ""
            _panel_title(ax, next(letters), OPTIMIZER_TITLES[optimizer] + growing)
            # Below the data, so that no line runs through it.
            low, high = ax.get_ylim()
            ax.set_ylim(low - 0.17 * (len(here) + 1) / 2 * max(high - low, 1.5), high)
            ax.legend(loc="lower left", title="octaves per doubling", alignment="left", title_fontsize=7)
        axes[i, 0].set_ylabel("best learning rate\n(at the base width)")
    for ax in axes[-1]:
        ax.set_xlabel("width")
    if any(not optimum.bracketed for s in sweeps for optimum in s.optima.values()):
        hollow = Line2D(
            [], [], color="0.3", marker="o", mfc="white", ls="none", label="best of the grid, not bracketed"
        )
        figure.legend(handles=[hollow], loc="outside lower center")
    _title(figure, _stays_finding(sweeps))
    return Drawing(figure, pd.DataFrame(rows))


def _optima_of(ax: Axes, sweep: Transfer, shift: float) -> None:
    colour, marker = RULE_COLOURS[sweep.rules], RULE_MARKERS[sweep.rules]
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
    slope, label = sweep.slope, RULE_TITLES[sweep.rules]
    if slope.reason:
        ax.plot([], [], marker, mfc="white", mec=colour, label=f"{label}: not bracketed")
        return
    ends = np.log2([sweep.widths[0], sweep.widths[-1]])
    low, high = slope.interval
    text = f"{signed(slope.value)} [{signed(low)}, {signed(high)}]"
    ax.plot(ends + shift, slope.intercept + slope.value * ends, color=colour, lw=1)
    ax.plot([], [], color=colour, marker=marker, mec="white", mew=0.5, ms=5, lw=1, label=f"{label}: {text}")


def _optimum_rows(sweep: Transfer) -> list[dict[str, Any]]:
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

    moving = _named((s.optimizer, s.rules) for s in known if 0.0 not in s.slope.interval)
    staying = _named((s.optimizer, s.rules) for s in known if 0.0 in s.slope.interval)
    lines = [f"The optimum moves with width: {moving}."] if moving else []
    lines += [f"No movement seen: {staying}."] if staying else []
    return "\n".join(lines)


def _named(found: Iterable[tuple[str, str]]) -> str:
    """(optimizer, rule set) pairs in words; rule sets that go with the same optimizers stand together."""
    optimizers: dict[str, list[str]] = {}
    for optimizer, rules in _distinct(found):
        optimizers.setdefault(RULE_TITLES[rules], []).append(OPTIMIZER_TITLES[optimizer])
    together: dict[tuple[str, ...], list[str]] = {}
    for rules, names in optimizers.items():
        together.setdefault(tuple(names), []).append(rules)
    return "; ".join(f"{', '.join(rules)} ({', '.join(names)})" for names, rules in together.items())


# Training curves


@_styled
def training_curves(dataset: xr.Dataset) -> Drawing:
    """Training loss against step at the learning rate of the grid nearest the base width's optimum.

    A panel per rule set, a row per (growth, optimizer); lines are means over seeds, bands span them, dots are
    held-out losses. Rule sets whose base optimum is not bracketed use the best of the grid there.
    """
    sweeps = transfers(dataset)
    rows, rules = _distinct((s.growth, s.optimizer) for s in sweeps), _distinct(s.rules for s in sweeps)
    colours = width_colours(width for s in sweeps for width in s.widths)
    figure, axes = plt.subplots(
        len(rows), len(rules), figsize=(FULL_WIDTH, 0.75 + 1.6 * len(rows)), sharex="row", sharey="row", squeeze=False
    )
    letters, frames, wider_is_better = _letters(), [], {}
    for i, (growth, optimizer) in enumerate(rows):
        ceiling, floor = -np.inf, np.inf
        for j, name in enumerate(rules):
            ax = axes[i, j]
            sweep = next((s for s in sweeps if (s.growth, s.optimizer, s.rules) == (growth, optimizer, name)), None)
            rate = _transferred_rate(sweep) if sweep else None
            if sweep is None or rate is None:
                ax.set_axis_off()
                continue
            final = []
            for width in sweep.widths:
                frame = _training_frame(dataset, sweep, width, rate)
                frames.append(frame)
                train = frame[frame.split == "train"].groupby("step").loss
                if train.size().sum():
                    mean = train.mean()
                    ax.plot(mean.index, mean, color=colours[width], lw=1)
                    ax.fill_between(mean.index, train.min(), train.max(), color=colours[width], alpha=0.2, lw=0)
                    ceiling, floor = max(ceiling, mean.iloc[0]), min(floor, train.min().min())
                    if mean.index[-1] < int(dataset.step[-1]) and _diverges(sweep, width, rate):
                        ax.plot(mean.index[-1], mean.iloc[-1], "x", color=colours[width], mew=1.2, ms=5, zorder=4)
                held_out = frame[frame.split == "validation"].groupby("step").loss.mean()
                ax.plot(held_out.index, held_out, "o", color=colours[width], mec="white", mew=0.4, ms=3.5)
                losses = sweep.curves[width]
                final.append(losses[rate].mean(skipna=False) if rate in losses else np.nan)
            if len(final) > 1:
                wider_is_better[optimizer, name, growth] = bool(np.all(np.diff(final) < 0))
            _panel_title(ax, next(letters), f"{RULE_TITLES[name]}, {_power_text(rate)}")
        if np.isfinite(ceiling):
            axes[i, 0].set_ylim(floor - 0.04 * (ceiling - floor), ceiling + 0.05 * (ceiling - floor))
        label = OPTIMIZER_TITLES[optimizer]
        axes[i, 0].set_ylabel(f"{label}, {GROWTH_TITLES[growth]}\nloss (nats/token)")
    for ax in axes[-1]:
        ax.set_xlabel("step (updates)")
    _title(figure, _wider_finding(wider_is_better))
    handles = [Line2D([], [], color=colours[w], label=f"{w}") for w in colours]
    handles += [
        Line2D([], [], color="0.3", label="training (band: seeds)"),
        Line2D([], [], color="0.3", marker="o", ls="none", mec="white", mew=0.4, label="held out"),
        Line2D([], [], color="0.3", marker="x", ls="none", mew=1.2, ms=5, label="a seed diverged"),
    ]
    _legend(figure, handles, "width")
    return Drawing(figure, pd.concat(frames, ignore_index=True))


def _wider_finding(better: dict[tuple[str, str, str], bool]) -> str:
    """Where each wider model ends lower; a rule set counts under an optimizer if it does in every growth mode."""
    pairs = _distinct((optimizer, rules) for optimizer, rules, _ in better)
    holds = [pair for pair in pairs if all(value for key, value in better.items() if key[:2] == pair)]
    fails = [pair for pair in pairs if pair not in holds]
    lines = ["At the base width's best learning rate, wider is better"] if pairs else ["One width only"]
    if holds:
        lines[0] += f":\n{_named(holds)}."
    if fails:
        lines.append(f"Not so at every width: {_named(fails)}." if holds else "")
        lines[0] += "" if holds else f" nowhere throughout: {_named(fails)} fail at some width."
    return "\n".join(filter(None, lines))


def _diverges(sweep: Transfer, width: int, rate: float) -> bool:
    losses = sweep.curves[width]
    return rate in losses and bool(losses[rate].isna().any())


def _transferred_rate(sweep: Transfer) -> float | None:
    """The learning rate of the grid nearest the base width's optimum."""
    losses = sweep.curves.get(sweep.base_width)
    if losses is None:
        return None
    optimum = sweep.optima[sweep.base_width]
    if optimum.bracketed:
        rates = losses.columns.to_numpy(float)
        return float(rates[np.abs(np.log2(rates) - optimum.log2_learning_rate).argmin()])
    mean = losses.mean(axis=0, skipna=False)
    return float(mean.idxmin()) if mean.notna().any() else None


def _training_frame(dataset: xr.Dataset, sweep: Transfer, width: int, rate: float) -> pd.DataFrame:
    """Long table of one member's losses over all seeds: split, seed, step, loss."""
    member = dataset.sel(growth=sweep.growth, optimizer=sweep.optimizer, rules=sweep.rules, width=width)
    member = member.sel(learning_rate=rate).sel(seed=sweep.curves[width].index.to_numpy())
    parts = []
    for split, variable, step in (("train", "train_loss", "step"), ("validation", "val_loss", "evaluation_step")):
        frame = member[variable].to_dataframe(name="loss").reset_index().rename(columns={step: "step"})
        parts.append(frame[["seed", "step", "loss"]].assign(split=split))
    return (
        pd.concat(parts)
        .dropna(subset="loss")
        .assign(growth=sweep.growth, optimizer=sweep.optimizer, rules=sweep.rules, width=width, learning_rate=rate)
        .reindex(columns=["growth", "optimizer", "rules", "width", "learning_rate", "seed", "split", "step", "loss"])
    )


# Coordinate check


def coordinate_table(dataset: xr.Dataset) -> pd.DataFrame:
    """Sizes and width exponents of every activation: one row per measure, quantity, layer, step and width.

    `size` is the geometric mean over seeds, `low` and `high` the least and the most; `relative` is `size` over
    that at the base width; `exponent` is the slope of log size on log width over all widths and seeds (NaN with
    one width).
    """
    base_width = int(dataset.attrs["base_width"])
    keys = ["growth", "optimizer", "rules", "measure", "quantity", "layer", "step"]
    sizes = [
        dataset[measure].to_dataframe(name="size").dropna().query("size > 0").reset_index().assign(measure=measure)
        for measure in ("rms", "change")
    ]
    long = pd.concat(sizes, ignore_index=True)
    if long.empty:
        raise UserError("the dataset has no coordinate check; add one under `coordinate_checks` and run it")
    long["log_size"], long["log_width"] = np.log(long["size"]), np.log(long.width)
    # The least-squares slope of every group at once: covariance over variance.
    groups = long.groupby(keys, sort=False)
    centred = long.log_width - groups.log_width.transform("mean")
    moments = (
        long.assign(product=centred * long.log_size, square=centred**2)
        .groupby(keys, sort=False)[["product", "square"]]
        .sum()
    )
    exponent = (moments["product"] / moments["square"].where(moments["square"] > 0)).rename("exponent")
    sizes_of = long.groupby([*keys, "width"], sort=False)["size"]
    table = pd.DataFrame({"low": sizes_of.min(), "high": sizes_of.max()})
    table["log_size"] = long.groupby([*keys, "width"], sort=False).log_size.mean()
    table = table.reset_index()
    base = table[table.width == base_width].set_index(keys).log_size.rename("base")
    table = table.join(base, on=keys).join(exponent, on=keys)
    table["size"], table["relative"] = np.exp(table.log_size), np.exp(table.log_size - table.base)
    return table[[*keys, "width", "size", "low", "high", "relative", "exponent"]]


@_styled
def coordinate_check(dataset: xr.Dataset, quantities: Sequence[str] = COORDINATES) -> Drawing:
    """Size of activations against width, relative to the base width: a column per quantity, a row per rule set.

    Solid lines are the RMS, dashed lines that of the change since init, in the last block; a colour per step.
    Thin bars span the seeds. A flat line does not depend on width. Numbers are width exponents at the last step.
    The table has every quantity, layer and step. Raises UserError if the dataset holds no coordinate check.
    """
    table = coordinate_table(dataset)
    last_block = table.layer.max()
    shown = table[table.layer.isin((last_block, OUTSIDE_BLOCKS))]
    quantities = [name for name in quantities if name in set(shown.quantity)]
    rows = _distinct(zip(table.growth, table.optimizer, table.rules, strict=True))
    steps = _few(sorted(table.step.unique()))
    colours = dict(zip(steps, (to_hex(c) for c in sns.color_palette("flare", len(steps))), strict=True))
    figure, axes = plt.subplots(
        len(rows),
        len(quantities),
        figsize=(FULL_WIDTH, 0.95 + 1.2 * len(rows)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    experiments = _distinct((growth, optimizer) for growth, optimizer, _ in rows)
    worst: dict[str, float] = {}
    for i, (growth, optimizer, rules) in enumerate(rows):
        here = shown[(shown.growth == growth) & (shown.optimizer == optimizer) & (shown.rules == rules)]
        for j, quantity in enumerate(quantities):
            ax = axes[i, j]
            panel = here[(here.quantity == quantity) & here.step.isin(steps)]
            ax.axhline(0, color="0.8", lw=0.6, zorder=0)
            for (measure, step), line in panel.groupby(["measure", "step"]):
                line = line.sort_values("width")
                ax.plot(
                    np.log2(line.width),
                    np.log2(line.relative),
                    color=colours[step],
                    ls="-" if measure == "rms" else (0, (3, 1.5)),
                    marker="o" if measure == "rms" else "D",
                    ms=2.5,
                    lw=1,
                )
                ax.vlines(
                    np.log2(line.width),
                    np.log2(line.relative * line.low / line["size"]),
                    np.log2(line.relative * line.high / line["size"]),
                    color=colours[step],
                    lw=0.6,
                )
            exponents = panel[panel.step == steps[-1]].groupby("measure").exponent.first()
            text = "\n".join(
                f"{name} {signed(exponents[measure])}"
                for measure, name in (("rms", "RMS"), ("change", "change"))
                if measure in exponents and np.isfinite(exponents[measure])
            )
            ax.text(0.04, 0.97, text, transform=ax.transAxes, va="top", fontsize=7, linespacing=1.15)
            if "change" in exponents and np.isfinite(exponents["change"]):
                worst[rules] = max(worst.get(rules, 0), abs(exponents["change"]))
            if i == 0:
                ax.set_title(COORDINATE_TITLES.get(quantity, quantity))
            if i == len(rows) - 1:
                ax.set_xlabel("width")
        title = RULE_TITLES[rules]
        if len(experiments) > 1:
            title = f"{title}\n{OPTIMIZER_TITLES[optimizer]}, {GROWTH_TITLES[growth]}"
        axes[i, 0].set_ylabel(title)
    _power_axis(axes[0, 0].yaxis)
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(min(low, -1.2), max(high, 1.2) + 0.45 * (max(high, 1.2) - min(low, -1.2)))
    _width_axis(axes[0, 0], sorted(table.width.unique()))
    figure.supylabel("size relative to the base width", fontsize=8)
    found = ", ".join(f"{RULE_TITLES[name]} {value:.2f}" for name, value in worst.items())
    _title(figure, f"Largest width exponent (absolute) of a change after {steps[-1]} steps: {found}")
    handles = [Line2D([], [], color=colours[step], label=f"{step}") for step in steps]
    handles += [
        Line2D([], [], color="0.3", marker="o", ms=2.5, lw=1, label="RMS"),
        Line2D([], [], color="0.3", marker="D", ms=2.5, lw=1, ls=(0, (3, 1.5)), label="RMS of change since init"),
    ]
    _legend(figure, handles, "updates")
    return Drawing(figure, table)


# Parts of drawings


def width_colours(widths: Iterable[int]) -> dict[int, str]:
    """An ordered colour for each width, darker for wider."""
    ordered = sorted(set(widths))
    ramp = sns.color_palette("viridis_r", as_cmap=True)
    # The palest yellow and the blackest purple are left out: both are hard to see as lines.
    places = np.linspace(0.12, 0.95, len(ordered)) if len(ordered) > 1 else [0.6]
    return {width: to_hex(ramp(place)) for width, place in zip(ordered, places, strict=True)}


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _few(steps: Sequence[int], most: int = 4) -> list[int]:
    """At most so many steps, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    places = np.linspace(0, len(steps) - 1, most).round().astype(int)
    return [steps[i] for i in places]


def _letters() -> Iterator[str]:
    return iter("abcdefghijklmnopqrstuvwxyz")


def _panel_title(ax: Axes, letter: str, text: str) -> None:
    ax.set_title(rf"$\mathbf{{{letter}}}$  {text}", loc="left", linespacing=1.3)


def _title(figure: Figure, text: str) -> None:
    """The finding, broken into lines that fit the figure."""
    characters = int(13.5 * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.fill(line, characters) for line in text.splitlines()))


def _power_text(rate: float) -> str:
    exponent = np.log2(rate)
    return f"$2^{{{exponent:.0f}}}$" if float(exponent).is_integer() else f"$2^{{{exponent:.1f}}}$"


def _power_axis(axis: Any) -> None:
    """Ticks of an axis in log₂ units as powers of two, at whole exponents, five or so."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(MultipleLocator(max(1, round((high - low) / 5))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{value:.0f}}}$"))


def _width_axis(ax: Axes, widths: Sequence[int]) -> None:
    """Ticks at the widths that were run, on an axis in log₂ units."""
    ax.set_xticks(np.log2(sorted(widths)), [str(width) for width in sorted(widths)])
    ax.xaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, handles: Sequence[Line2D], title: str) -> None:
    """One line of keys below the panels, its title at the left."""
    heading = Line2D([], [], ls="none", label=title)
    figure.legend(
        handles=[heading, *handles],
        loc="outside lower center",
        ncols=len(handles) + 1,
        columnspacing=1.1,
        handlelength=1.5,
        handletextpad=0.5,
    )
