"""What all figures share: style, colours, titles, axes and legends, and how a figure is saved.

Width is always an ordered colour, darker for wider; rule sets have their own colours and markers.
"""

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
from matplotlib import rcParamsDefault
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullLocator
from numpy.typing import NDArray

from gdn_mup.files import replacing
from gdn_mup.study.titles import RULE_TITLES

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

_COLOURBLIND = sns.color_palette("colorblind")
# Each rule set's place in the palette, brightness, marker, and that marker in text. A variant is a darker shade.
_LOOKS: dict[str, tuple[int, float, str, str]] = {
    "sp": (3, 1.0, "o", "●"),
    "sp_released": (3, 0.6, "h", "⬢"),
    "mup": (0, 1.0, "s", "■"),
    "yang_hu": (4, 1.0, "P", "✚"),
    "liu_gu": (1, 1.0, "D", "◆"),
    "liu_gu_released": (1, 0.6, "d", "♦"),
    "liu_gu_released_mixer": (1, 0.35, "X", "✖"),
    "gdn_mup": (2, 1.0, "^", "▲"),
    "gdn_mup_constant_decay": (2, 0.6, "v", "▼"),
    "gdn_mup_hidden_decay": (2, 0.35, "<", "◀"),
}
RULE_COLOURS = {
    name: to_hex(tuple(shade * channel for channel in _COLOURBLIND[colour]))
    for name, (colour, shade, _, _) in _LOOKS.items()
}
RULE_MARKERS = {name: marker for name, (*_, marker, _) in _LOOKS.items()}
RULE_SIGNS = {name: sign for name, (*_, sign) in _LOOKS.items()}


class Drawing(NamedTuple):
    """A figure and the table of what it shows."""

    figure: Figure
    table: pd.DataFrame


@contextmanager
def _style() -> Iterator[None]:
    """Only what is said here and matplotlib's own defaults hold in this block: no matplotlibrc of the user."""
    defaults = {name: value for name, value in rcParamsDefault.items() if name not in ("backend", "interactive")}
    with plt.rc_context():
        plt.rcParams.update(defaults | STYLE)
        yield


def save(figure: Figure, table: pd.DataFrame, stem: Path | str) -> None:
    """Write `stem`.svg, .png (300 dpi) and .csv, each to a temporary name and renamed when complete."""
    stem = Path(stem)
    with _style():
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
        with _style():
            drawing = draw(*arguments, **options)
            # Lay out now, while the style holds: every later drawing of the figure would find the same layout again.
            # Twice, since panels of another size may have other ticks.
            for _ in range(2):
                drawing.figure.canvas.draw()
            drawing.figure.set_layout_engine("none")
            plt.close(drawing.figure)
        return drawing

    return drawn


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


def label_left(row: Iterable[Axes], text: str) -> None:
    """Label the vertical axis that a row of panels shares, at the first that is drawn."""
    first = next(ax for ax in row if _drawn(ax))
    first.set_ylabel(text)
    first.tick_params(labelleft=True)


def label_below(rows: NDArray[np.object_], text: str) -> None:
    """Label the horizontal axes that columns of panels [rows, columns] share, at the last that is drawn in each."""
    for column in rows.T:
        last = next(ax for ax in reversed(column) if _drawn(ax))
        last.set_xlabel(text)
        last.tick_params(labelbottom=True)


def _drawn(ax: Axes) -> bool:
    return ax.axison and ax.figure is not None  # neither empty nor removed


def title(figure: Figure, text: str) -> None:
    """The finding, broken into lines that fit the figure."""
    characters = int(13.5 * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.fill(line, characters, break_on_hyphens=False) for line in text.splitlines()))


def unbroken(text: str) -> str:
    """The text with spaces at which no title is broken into lines."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def power_text(rate: float) -> str:
    exponent = np.log2(rate)
    return f"$2^{{{exponent:.0f}}}$" if float(exponent).is_integer() else f"$2^{{{exponent:.1f}}}$"


def power_axis(axis: Any) -> None:
    """Ticks of an axis in log₂ units as powers of two, at whole exponents, five or so; at half ones on short axes."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(MultipleLocator(max(1, round((high - low) / 5)) if high - low > 2 else 0.5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{value:g}}}$"))


def width_axis(ax: Axes, widths: Sequence[int]) -> None:
    """Ticks at the widths that were run, on an axis in log₂ units."""
    ax.set_xticks(np.log2(sorted(widths)), [str(width) for width in sorted(widths)])
    ax.xaxis.set_minor_locator(NullLocator())


def rule_keys(rules: Iterable[str]) -> list[Line2D]:
    """Keys of lines with markers, one for each rule set."""
    return [
        Line2D([], [], color=RULE_COLOURS[n], marker=RULE_MARKERS[n], mec="white", mew=0.5, ms=5, label=RULE_TITLES[n])
        for n in rules
    ]


def legend_beside(figure: Figure, handles: Sequence[Artist], free: Sequence[SubplotSpec], title: str = "") -> None:
    """A column of keys in the place of the first panel that is not needed; a line of them below if every panel is."""
    if not free:
        legend(figure, handles, title)
        return
    ax = figure.add_subplot(free[0])
    ax.set_axis_off()
    keys = ax.legend(handles=handles, title=title or None, loc="center left", alignment="left", title_fontsize=7)
    keys.set_in_layout(False)  # it may be wider than a panel: beside it there is none


def legend(figure: Figure, handles: Sequence[Artist], title: str = "") -> None:
    """Keys below the panels, the title at their left, in as many lines as they need."""
    keys: list[Artist] = [*([Line2D([], [], ls="none", label=title)] if title else []), *handles]
    for lines in range(1, len(keys) + 1):
        number = -(-len(keys) // lines)
        columns = [keys[i::number] for i in range(number)]
        # A column is as wide as its longest label.
        characters = sum(max(len(str(key.get_label())) for key in column) + 5 for column in columns)
        if characters <= 17 * figure.get_figwidth():
            break
    figure.legend(
        handles=[key for column in columns for key in column],  # matplotlib fills column after column
        loc="outside lower center",
        ncols=number,
        columnspacing=1.1,
        handlelength=1.5,
        handletextpad=0.5,
    )
