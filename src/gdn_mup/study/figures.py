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

# What the coordinate check draws, along the path of a token; the table that goes with it has every quantity.
COORDINATES = ("alpha_preactivation", "state", "mixer_output", "residual", "logits")
COORDINATE_TITLES = {
    "alpha_preactivation": "gate pre-activation",
    "state": "state S",
    "mixer_output": "mixer output",
    "residual": "residual stream",
    "logits": "logits",
}
# Width exponents of sizes that should not be width-independent. An entry of a key or query of length one is
# d_k^-1/2, and an entry of S, a sum of k vᵀ, is that times an entry of v: Sᵀ q then keeps its size.
EXPECTED_EXPONENTS = {("head_dim", quantity): -0.5 for quantity in ("q", "k", "state")}
FLAT = 0.25  # a fitted width exponent within this of the expected one is not called growth or decay
MOST_OCTAVES = 4.0  # the coordinate check cuts lines off here: one that explodes does not flatten the others
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


def styled(draw: Callable[..., Drawing]) -> Callable[..., Drawing]:
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


@styled
def lr_transfer(dataset: xr.Dataset, optimizer: str) -> Drawing:
    """Held-out loss against learning rate: a panel per rule set (and row per growth mode), a line per width.

    Thin points are seeds, lines their mean; a bar is the optimum's 95 % interval. Crosses at the top edge mark
    learning rates at which a seed diverged. The table has one row per member.
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
            panel_title(ax, next(letter), f"{RULE_TITLES[name]}\n{_slope_label(here[name])}")
            _power_axis(ax.xaxis)
        axes[i, 0].set_ylabel(
            "held-out loss (nats/token)" + (f"\ngrowth by {GROWTH_TITLES[growth]}" if len(growths) > 1 else "")
        )
    for ax in axes[-1]:
        ax.set_xlabel("learning rate\nat the base width")
    title(figure, f"{OPTIMIZER_TITLES[optimizer]}: {_transfer_finding(sweeps)}")
    handles = [Line2D([], [], color=colours[w], label=f"{w}") for w in colours]
    handles += [
        Line2D([], [], color="0.3", marker="o", mec="white", mew=0.5, ms=5, label="optimum, 95 % interval"),
        Line2D([], [], color="0.3", marker="x", ls="none", label="a seed diverged"),
    ]
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
    for name in distinct(s.rules for s in sweeps):
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


@styled
def optimum_vs_width(dataset: xr.Dataset) -> Drawing:
    """Optimal learning rate against width, a panel per optimizer (and row per growth mode), a line per rule set.

    Bars are 95 % intervals, lines the fits whose slopes the legend gives. A hollow marker is the best learning
    rate of a grid that does not bracket its optimum. The table has one row per optimum.
    """
    sweeps = transfers(dataset)
    growths, optimizers = distinct(s.growth for s in sweeps), distinct(s.optimizer for s in sweeps)
    size = (FULL_WIDTH if len(optimizers) > 1 else COLUMN_WIDTH, 0.55 + 2.5 * len(growths))
    figure, axes = plt.subplots(len(growths), len(optimizers), figsize=size, sharex=True, squeeze=False, sharey=False)
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
                _optima_of(ax, sweep, shift=0.05 * (k - (len(here) - 1) / 2))
                rows += _optimum_rows(sweep)
            _power_axis(ax.yaxis)
            _width_axis(ax, distinct(width for s in sweeps for width in s.widths))
            growing = f", growth by {GROWTH_TITLES[growth]}" if len(growths) > 1 else ""
            panel_title(ax, next(letter), OPTIMIZER_TITLES[optimizer] + growing)
            # Below the data, so that no line or bar runs through it: a share of the axis for its title and rows.
            low, high = ax.get_ylim()
            ax.set_ylim(high - (high - low) / (1 - 0.085 * (len(here) + 1) - 0.04), high)
            ax.legend(loc="lower left", title="octaves per doubling", alignment="left", title_fontsize=7)
        axes[i, 0].set_ylabel("best learning rate\n(at the base width)")
    for ax in axes[-1]:
        ax.set_xlabel("width")
    if any(not optimum.bracketed for s in sweeps for optimum in s.optima.values()):
        hollow = Line2D(
            [], [], color="0.3", marker="o", mfc="white", ls="none", label="best of the grid, not bracketed"
        )
        figure.legend(handles=[hollow], loc="outside lower center")
    title(figure, _stays_finding(sweeps))
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
    lines += [f"Movement not established: {staying}."] if staying else []
    return "\n".join(lines)


def _named(found: Iterable[tuple[str, str]]) -> str:
    """(optimizer, rule set) pairs in words; rule sets that go with the same optimizers stand together."""
    optimizers: dict[str, list[str]] = {}
    for optimizer, rules in distinct(found):
        optimizers.setdefault(RULE_TITLES[rules], []).append(OPTIMIZER_TITLES[optimizer])
    together: dict[tuple[str, ...], list[str]] = {}
    for rules, names in optimizers.items():
        together.setdefault(tuple(names), []).append(rules)
    return "; ".join(f"{', '.join(rules)} ({', '.join(names)})" for names, rules in together.items())


# Training curves


@styled
def training_curves(dataset: xr.Dataset) -> Drawing:
    """Training loss against step at the learning rate of the grid nearest the base width's optimum.

    A panel per rule set, a row per (growth, optimizer); lines are means over seeds, bands span them, dots are
    held-out losses. Training losses, each of one batch, are running means over 4 % of the steps; the table has
    them as they are. Rule sets whose base optimum is not bracketed use the best of the grid there.
    """
    sweeps = transfers(dataset)
    rows, rules = distinct((s.growth, s.optimizer) for s in sweeps), distinct(s.rules for s in sweeps)
    colours = width_colours(width for s in sweeps for width in s.widths)
    figure, axes = plt.subplots(
        len(rows), len(rules), figsize=(FULL_WIDTH, 0.75 + 1.65 * len(rows)), sharex="row", sharey="row", squeeze=False
    )
    window = max(1, dataset.sizes["step"] // 25)
    letter, frames, wider_is_better, free, crosses = letters(), [], {}, [], False
    for i, (growth, optimizer) in enumerate(rows):
        ceiling, floor = -np.inf, np.inf
        for j, name in enumerate(rules):
            ax = axes[i, j]
            sweep = next((s for s in sweeps if (s.growth, s.optimizer, s.rules) == (growth, optimizer, name)), None)
            rate = _transferred_rate(sweep) if sweep else None
            if sweep is None or rate is None:
                free.append(ax.get_subplotspec())
                ax.remove()
                continue
            final = []
            for width in sweep.widths:
                frame = _training_frame(dataset, sweep, width, rate)
                frames.append(frame)
                train = _running_means(frame[frame.split == "train"], window)
                if train.size().sum():
                    mean = train.mean()
                    ax.plot(mean.index, mean, color=colours[width], lw=1)
                    ax.fill_between(mean.index, train.min(), train.max(), color=colours[width], alpha=0.2, lw=0)
                    ceiling, floor = max(ceiling, mean.iloc[0]), min(floor, train.min().min())
                    if mean.index[-1] < int(dataset.step[-1]) and _diverges(sweep, width, rate):
                        crosses = True
                        ax.plot(mean.index[-1], mean.iloc[-1], "x", color=colours[width], mew=1.2, ms=5, zorder=4)
                held_out = frame[frame.split == "validation"].groupby("step").loss.mean()
                ax.plot(held_out.index, held_out, "o", color=colours[width], mec="white", mew=0.4, ms=3.5)
                losses = sweep.curves[width]
                final.append(losses[rate].mean(skipna=False) if rate in losses else np.nan)
            if len(final) > 1:
                wider_is_better[optimizer, name, growth] = bool(np.all(np.diff(final) < 0))
            panel_title(ax, next(letter), f"{RULE_TITLES[name]}\nη = {_power_text(rate)}")
        if np.isfinite(ceiling):
            axes[i, 0].set_ylim(floor - 0.04 * (ceiling - floor), ceiling + 0.05 * (ceiling - floor))
        label = OPTIMIZER_TITLES[optimizer]
        axes[i, 0].set_ylabel(f"{label}, {GROWTH_TITLES[growth]}\nloss (nats/token)")
    for ax in axes[-1]:
        ax.set_xlabel("step (updates)")
    title(figure, _wider_finding(wider_is_better))
    handles = [Line2D([], [], color=colours[w], label=f"{w}") for w in colours]
    handles += [
        Line2D([], [], color="0.3", label="training (band: seeds)"),
        Line2D([], [], color="0.3", marker="o", ls="none", mec="white", mew=0.4, label="held out"),
    ]
    if crosses:
        handles.append(Line2D([], [], color="0.3", marker="x", ls="none", mew=1.2, ms=5, label="a seed diverged"))
    if free:
        ax = figure.add_subplot(free[0])
        ax.set_axis_off()
        ax.legend(handles=handles, title="width", loc="center left", alignment="left", title_fontsize=7)
    else:
        legend(figure, handles, "width")
    return Drawing(figure, pd.concat(frames, ignore_index=True))


def _running_means(train: pd.DataFrame, window: int) -> Any:
    """A seed's losses as means over the steps around each (fewer at the ends), grouped by step."""
    wide = train.pivot(index="step", columns="seed", values="loss")
    smooth = wide.rolling(window, center=True, min_periods=1).mean().where(wide.notna())
    return smooth.melt(value_name="loss", ignore_index=False).dropna().groupby("step").loss


def _wider_finding(better: dict[tuple[str, str, str], bool]) -> str:
    """Where each wider model ends lower; a rule set counts under an optimizer if it does in every growth mode."""
    pairs = distinct((optimizer, rules) for optimizer, rules, _ in better)
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


@styled
def coordinate_check(dataset: xr.Dataset, quantities: Sequence[str] = COORDINATES) -> Drawing:
    """RMS of an activation's change since init against width, after the last update, over that at the base width.

    A column per quantity (in the last block, or outside the blocks), a row per (growth, optimizer) with its own
    vertical axis, a line per rule set, shifted sideways so that equal ones are seen. Bars span the seeds, numbers
    are fitted width exponents, the grey line is the dependence on width that a quantity should have. The table
    has every quantity, measure, layer and step. Raises UserError if the dataset holds no change to draw.
    """
    table = coordinate_table(dataset)
    shown = _last_changes(table, quantities)
    rows = distinct(zip(shown.growth, shown.optimizer, strict=True))
    columns = [name for name in quantities if name in set(shown.quantity)]
    rules = [name for name in RULE_TITLES if name in set(shown.rules)]
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(FULL_WIDTH, 1.25 + 1.38 * len(rows)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    letter = letters()
    for i, (growth, optimizer) in enumerate(rows):
        here = shown[(shown.growth == growth) & (shown.optimizer == optimizer)]
        lines = here.rules.nunique() if len(here.width.unique()) > 1 else 0
        floor, ceiling = _octave_range(here, int(here.width.min()), 0.11 * lines)
        axes[i, 0].set_ylim(floor, ceiling)
        for j, quantity in enumerate(columns):
            ax = axes[i, j]
            panel = here[here.quantity == quantity]
            _coordinate_lines(ax, panel, rules, EXPECTED_EXPONENTS.get((growth, quantity), 0.0))
            panel_title(ax, next(letter), COORDINATE_TITLES.get(quantity, quantity) if i == 0 else "")
        _power_axis(axes[i, 0].yaxis)
        axes[i, 0].set_ylabel(f"{OPTIMIZER_TITLES[optimizer]}\n{GROWTH_TITLES[growth]}")
    widths = sorted(shown.width.unique())
    _width_axis(axes[0, 0], widths)
    axes[0, 0].set_xlim(np.log2(widths[0]) - 0.4, np.log2(widths[-1]) + 0.4)
    for ax in axes[-1]:
        ax.set_xlabel("width")
    updates = shown.step.unique()
    when = f"after {updates[0]} updates" if len(updates) == 1 else "at the last step"
    label = f"RMS of the change {when}, relative to base width"
    figure.supylabel(textwrap.fill(label, int(13.5 * figure.get_figheight())), fontsize=8)
    title(figure, _growth_finding(shown))
    handles = [
        Line2D([], [], color=RULE_COLOURS[name], marker=RULE_MARKERS[name], mec="white", mew=0.4, ms=4.5, lw=1)
        for name in rules
    ]
    for handle, name in zip(handles, rules, strict=True):
        handle.set_label(RULE_TITLES[name])
    handles.append(Line2D([], [], color="0.6", lw=0.8, label="width-independent training"))
    legend(figure, handles)
    return Drawing(figure, table)


def _last_changes(table: pd.DataFrame, quantities: Sequence[str]) -> pd.DataFrame:
    """The rows of the table that the figure draws: these quantities, in the last block, at the last step."""
    keep = (table.measure == "change") & table.layer.isin((table.layer.max(), OUTSIDE_BLOCKS))
    shown = table[keep & table.quantity.isin(quantities) & table.relative.notna()]
    shown = shown[shown.step == shown.groupby(["growth", "optimizer"]).step.transform("max")]
    if shown.empty:
        raise UserError("the coordinate checks have no step after 0 at the base width; add one to their `steps`")
    return shown


def _octave_range(shown: pd.DataFrame, first_width: int, text: float) -> tuple[float, float]:
    """Limits of a row in log₂ units: the data and an octave either side of 1, but cut off where lines explode.

    Lines start at 1 and fan out, so the larger side has a free corner at the left; it is made tall enough for
    text of that share of the panel's height, clear of the bars at the first width.
    """
    low = np.log2(shown.relative * shown.low / shown["size"])
    high = np.log2(shown.relative * shown.high / shown["size"])
    below = min(max(-low.min(), 0.8), MOST_OCTAVES)
    above = min(max(high.max(), 0.8), MOST_OCTAVES)
    margin = 0.06 * (below + above)
    below, above = below + margin, above + margin
    first = shown.width == first_width
    if above >= below:
        above = max(above, (text * below + high[first].max() + margin) / (1 - text))
    else:
        below = max(below, (text * above - low[first].min() + margin) / (1 - text))
    return -below, above


def _coordinate_lines(ax: Axes, panel: pd.DataFrame, rules: Sequence[str], expected: float) -> None:
    """One panel: a line and an exponent per rule set."""
    ends = np.log2([panel.width.min(), panel.width.max()])
    ax.plot(ends, expected * (ends - ends[0]), color="0.6", lw=0.8, zorder=0)
    floor, ceiling = ax.get_ylim()
    exponents = []
    for k, name in enumerate(rules):
        line = panel[panel.rules == name].sort_values("width")
        if line.empty:
            continue
        colour = RULE_COLOURS[name]
        x = np.log2(line.width.to_numpy(float)) + 0.14 * (k - (len(rules) - 1) / 2)
        y = np.log2(line.relative.to_numpy())
        size = line["size"].to_numpy()
        # Later lines are thinner: where two coincide the first shows on both sides of the second.
        ax.plot(x, y, color=colour, lw=1.7 - 0.3 * k, zorder=2)
        ax.vlines(x, y + np.log2(line.low / size), y + np.log2(line.high / size), color=colour, lw=0.9, zorder=3)
        ax.plot(x, y, RULE_MARKERS[name], color=colour, mec="white", mew=0.4, ms=4.5, zorder=4)
        beyond = np.flatnonzero((y > ceiling) | (y < floor))
        if len(beyond) and beyond[0] > 0:
            _leaving(ax, x, y, int(beyond[0]), ceiling if y[beyond[0]] > ceiling else floor, colour)
        if np.isfinite(exponent := line.exponent.iloc[0]):
            exponents.append((colour, signed(exponent)))
    rising = ceiling >= -floor
    for k, (colour, text) in enumerate(exponents):
        lines_from_edge = k if rising else k - len(exponents) + 1
        ax.annotate(
            text,
            (0, 1 if rising else 0),
            (2, (-1 if rising else 1) - 8 * lines_from_edge),
            "axes fraction",
            "offset points",
            color=colour,
            fontsize=7,
            va="top" if rising else "bottom",
        )


def _leaving(ax: Axes, x: np.ndarray, y: np.ndarray, beyond: int, edge: float, colour: Any) -> None:
    """An arrow where a line leaves the panel on its way to its point number `beyond`, and how far it goes."""
    inside = beyond - 1
    at = x[inside] + (x[beyond] - x[inside]) * (edge - y[inside]) / (y[beyond] - y[inside])
    head = {"arrowstyle": "-|>,head_length=0.6,head_width=0.35", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
    ax.annotate(
        "", (at, edge), (x[inside], y[inside]), arrowprops=head | {"color": colour, "lw": 0}, annotation_clip=False
    )
    farthest = y[beyond:][np.abs(y[beyond:]).argmax()]
    ax.annotate(
        f"to $2^{{{farthest:.0f}}}$",
        (at, edge),
        (-6, 0),
        textcoords="offset points",
        color=colour,
        fontsize=7,
        ha="right",
        va="top" if edge > 0 else "bottom",
    )


def _growth_finding(shown: pd.DataFrame) -> str:
    """Under which rule sets a change grows with width, by more than expected, and the steepest growth and fall."""
    fitted = shown.dropna(subset="exponent").drop_duplicates(["growth", "optimizer", "rules", "quantity"])
    if fitted.empty:
        return "One width only: no dependence on width to see"
    expected = [EXPECTED_EXPONENTS.get(key, 0.0) for key in zip(fitted.growth, fitted.quantity, strict=True)]
    fitted = fitted.assign(excess=fitted.exponent - expected)
    most = fitted.groupby(["optimizer", "rules"], sort=False).excess.max()
    growing = _named(pair for pair, excess in most.items() if excess > FLAT)
    others = _named(pair for pair, excess in most.items() if excess <= FLAT)
    lines = []
    if growing:
        steepest = f"width$^{{{fitted.exponent[fitted.excess.idxmax()]:+.2f}}}$"
        lines.append(f"Changes grow with width (exponent above {FLAT}), up to {steepest}: {growing}.")
        lines += [f"None grows: {others}."] if others else []
    else:
        lines.append(f"No change grows with width (exponent above {FLAT}): {others}.")
    if fitted.excess.min() < -FLAT:
        least = fitted.loc[fitted.excess.idxmin()]
        place = [COORDINATE_TITLES.get(least.quantity, least.quantity), RULE_TITLES[least.rules]]
        place += [OPTIMIZER_TITLES[least.optimizer]]
        place += [GROWTH_TITLES[least.growth]] if fitted.growth.nunique() > 1 else []
        lines.append(f"Steepest fall: width$^{{{least.exponent:.2f}}}$ ({', '.join(place)}).")
    return "\n".join(lines)


# Parts of drawings


def width_colours(widths: Iterable[int]) -> dict[int, str]:
    """An ordered colour for each width, darker for wider."""
    ordered = sorted(set(widths))
    ramp = sns.color_palette("viridis_r", as_cmap=True)
    # The palest yellow and the blackest purple are left out: both are hard to see as lines.
    places = np.linspace(0.12, 0.95, len(ordered)) if len(ordered) > 1 else [0.6]
    return {width: to_hex(ramp(place)) for width, place in zip(ordered, places, strict=True)}


def distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def letters() -> Iterator[str]:
    return iter("abcdefghijklmnopqrstuvwxyz")


def panel_title(ax: Axes, letter: str, text: str) -> None:
    ax.set_title(rf"$\mathbf{{{letter}}}$  {text}", loc="left", linespacing=1.3)


def title(figure: Figure, text: str) -> None:
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


def legend(figure: Figure, handles: Sequence[Line2D], title: str = "") -> None:
    """One line of keys below the panels, its title at the left."""
    heading = [Line2D([], [], ls="none", label=title)] if title else []
    figure.legend(
        handles=[*heading, *handles],
        loc="outside lower center",
        ncols=len(handles) + 1,
        columnspacing=1.1,
        handlelength=1.5,
        handletextpad=0.5,
    )
