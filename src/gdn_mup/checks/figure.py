"""Figure of a coordinate check: outputs at init and their changes against width, what is off in colour."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.lines import Line2D

from gdn_mup.checks.findings import findings
from gdn_mup.study.figures.style import FULL_WIDTH, Drawing, legend, panel_title, styled, width_axis

_MOST_NAMED = 6
_FLOOR = 1e-12


@styled
def draw_check(dataset: xr.Dataset) -> Drawing:
    """One line per module, the geometric mean over seeds relative to the base width; the table has its points."""
    last = int(dataset.step.values[-1])
    off = list(dict.fromkeys(f.where for f in findings(dataset) if f.where in dataset.module.values))
    colours = dict(zip(off, sns.color_palette("colorblind", _MOST_NAMED), strict=False))
    widths = [int(width) for width in dataset.width.values]
    figure, axes = plt.subplots(1, 2, figsize=(FULL_WIDTH, 2.8), sharex=True)
    rows = []
    panels = (("rms", 0, "output at init"), ("change", last, f"change of output after {last} updates"))
    for ax, letter, (variable, step, text) in zip(axes, "ab", panels, strict=True):
        sizes = dataset[variable].sel(step=step).where(lambda size: size > _FLOOR)
        octaves = xr.DataArray(np.log2(sizes)).mean("seed").transpose("module", "width")
        octaves = octaves - octaves.isel(width=0)
        for name in map(str, dataset.module.values):
            line = octaves.sel(module=name).values
            style = {"color": colours[name], "zorder": 3} if name in colours else {"color": "0.75", "lw": 0.7}
            ax.plot(np.log2(widths), line, marker="o" if name in colours else None, **style)
            rows += [
                {
                    "measure": variable,
                    "step": step,
                    "module": name,
                    "width": width,
                    "octaves": value,
                    "off": name in off,
                }
                for width, value in zip(widths, line, strict=True)
            ]
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, -1), max(high, 1))  # small wiggles look small
        ax.axhline(0, color="0.3", lw=0.6, ls=":")
        ax.set_xlabel("width")
        ax.set_ylabel("relative to the base width, octaves")
        width_axis(ax, widths)
        panel_title(ax, letter, text)
    others = f"{len(dataset.module) - len(colours)}{' other' if colours else ''}"
    keys = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in colours.items()]
    legend(figure, [*keys, Line2D([], [], color="0.75", label=f"{others} modules")])
    return Drawing(figure, pd.DataFrame(rows))
