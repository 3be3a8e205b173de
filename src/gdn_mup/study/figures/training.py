"""Figure of losses in the course of training."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from gdn_mup.study.figures.style import (
    FULL_WIDTH,
    Drawing,
    distinct,
    label_below,
    label_left,
    legend_beside,
    letters,
    panel_title,
    power_text,
    styled,
    title,
    width_colours,
)
from gdn_mup.study.optimum import Transfer, transferred_rate, transfers
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES, named


@styled
def training_curves(dataset: xr.Dataset) -> Drawing:
    """Training loss against step at the learning rate of the grid nearest the base width's optimum.

    A panel per rule set, a row per (growth, optimizer); lines are means over seeds, bands span them, dots are
    held-out losses. Training losses, each of one batch, are running means over 4 % of the steps; the table has
    them as they are. Seeds that were run at the base width alone are left out: the more seeds, the wider the band.
    Rule sets whose base optimum is not bracketed use the best of the grid there.
    """
    sweeps = transfers(dataset)
    rows = {
        key: [s for name in RULE_TITLES for s in sweeps if (s.growth, s.optimizer, s.rules) == (*key, name)]
        for key in distinct((s.growth, s.optimizer) for s in sweeps)
    }
    columns = max(map(len, rows.values()))
    colours = width_colours(width for s in sweeps for width in s.widths)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(FULL_WIDTH, 0.75 + 1.65 * len(rows)), sharex="row", sharey="row", squeeze=False
    )
    window = max(1, dataset.sizes["step"] // 25)
    letter, frames, wider_is_better, free, crosses = letters(), [], {}, [], False
    for i, ((growth, optimizer), here) in enumerate(rows.items()):
        ceiling, floor = -np.inf, np.inf
        rates = [(sweep, rate) for sweep in here if (rate := transferred_rate(sweep)) is not None]
        for ax in axes[i, len(rates) :]:
            free.append(ax.get_subplotspec())
            ax.remove()
        for ax, (sweep, rate) in zip(axes[i], rates, strict=False):
            final = []
            for width in sweep.widths:
                losses = _comparable(sweep, width)
                frame = _training_frame(dataset, sweep, width, rate, losses.index.to_numpy())
                frames.append(frame)
                train = _running_means(frame[frame.split == "train"], window)
                if train.size().sum():
                    mean = train.mean()
                    ax.plot(mean.index, mean, color=colours[width], lw=1)
                    ax.fill_between(mean.index, train.min(), train.max(), color=colours[width], alpha=0.2, lw=0)
                    ceiling, floor = max(ceiling, mean.iloc[0]), min(floor, train.min().min())
                    if mean.index[-1] < int(dataset.step[-1]) and _diverges(losses, rate):
                        crosses = True
                        ax.plot(mean.index[-1], mean.iloc[-1], "x", color=colours[width], mew=1.2, ms=5, zorder=4)
                held_out = frame[frame.split == "validation"].groupby("step").loss.mean()
                if len(held_out):
                    ceiling = max(ceiling, held_out.iloc[0])  # at init
                ax.plot(held_out.index, held_out, "o", color=colours[width], mec="white", mew=0.4, ms=3.5)
                final.append(losses[rate].mean(skipna=False) if rate in losses else np.nan)
            if len(final) > 1:
                wider_is_better[optimizer, sweep.rules, growth] = bool(np.all(np.diff(final) < 0))
            panel_title(ax, next(letter), f"{RULE_TITLES[sweep.rules]}\nlearning rate {power_text(rate)}")
        if np.isfinite(ceiling):
            _loss_axis(axes[i, 0], floor, ceiling)
        label_left(axes[i], f"{OPTIMIZER_TITLES[optimizer]}\n{GROWTH_TITLES[growth]}")
    label_below(axes, "step (updates)")
    for ax in axes[:, 0]:
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    figure.align_ylabels()
    figure.supylabel("loss (nats/token)", fontsize=8)
    title(figure, _wider_finding(wider_is_better))
    means = f", means over {window} steps" if window > 1 else ""
    handles = [Line2D([], [], color=colours[w], label=f"{w}") for w in colours]
    handles += [
        Line2D([], [], color="0.3", label=f"training{means} (band: seeds)"),
        Line2D([], [], color="0.3", marker="o", ls="none", mec="white", mew=0.4, label="held out"),
    ]
    if crosses:
        handles.append(Line2D([], [], color="0.3", marker="x", ls="none", mew=1.2, ms=5, label="a seed diverged"))
    legend_beside(figure, handles, free, "width")
    return Drawing(figure, pd.concat(frames, ignore_index=True))


def _running_means(train: pd.DataFrame, window: int) -> Any:
    """A seed's losses as means over the steps around each (fewer at the ends), grouped by step."""
    wide = train.pivot(index="step", columns="seed", values="loss")
    smooth = wide.rolling(window, center=True, min_periods=1).mean().where(wide.notna())
    return smooth.melt(value_name="loss", ignore_index=False).dropna().groupby("step").loss


def _loss_axis(ax: Axes, floor: float, ceiling: float) -> None:
    """A logarithmic axis, on which the end of training has room beside its start."""
    margin = (ceiling / floor) ** 0.04
    ax.set_yscale("log", base=2)
    ax.set_ylim(floor / margin, ceiling * margin)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _wider_finding(better: dict[tuple[str, str, str], bool]) -> str:
    """Where each wider model ends lower; a rule set counts under an optimizer if it does in every growth mode."""
    pairs = distinct((optimizer, rules) for optimizer, rules, _ in better)
    holds = [pair for pair in pairs if all(value for key, value in better.items() if key[:2] == pair)]
    fails = [pair for pair in pairs if pair not in holds]
    lines = ["At the base width's best learning rate, wider is better"] if pairs else ["One width only"]
    if holds:
        lines[0] += f":\n{named(holds)}."
    if fails:
        lines.append(f"Not so at every width: {named(fails)}." if holds else "")
        lines[0] += "" if holds else f" nowhere throughout: {named(fails)} fail at some width."
    return "\n".join(filter(None, lines))


def _comparable(sweep: Transfer, width: int) -> pd.DataFrame:
    """The curves of a width, without seeds that were run at the base width alone, where there are others."""
    losses = sweep.curves[width]
    wider = [curve.index for other, curve in sweep.curves.items() if other != sweep.base_width]
    shared = losses.index.isin(np.concatenate(wider)) if wider else np.zeros(len(losses), bool)
    return losses[shared] if shared.any() else losses


def _diverges(losses: pd.DataFrame, rate: float) -> bool:
    return rate in losses and bool(losses[rate].isna().any())


def _training_frame(
    dataset: xr.Dataset, sweep: Transfer, width: int, rate: float, seeds: NDArray[np.int64]
) -> pd.DataFrame:
    """Long table of one member's losses: split, seed, step, loss."""
    member = dataset.sel(growth=sweep.growth, optimizer=sweep.optimizer, rules=sweep.rules, width=width)
    member = member.sel(learning_rate=rate).sel(seed=seeds)
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
