"""A scaling as a table of text: every parameter, how it grows, what is multiplied, and why."""

import re
from typing import TYPE_CHECKING

from gdn_mup.modules.compare import Entry
from gdn_mup.modules.fans import Kind
from gdn_mup.modules.names import as_range
from gdn_mup.scaling.depth import Place
from gdn_mup.scaling.growth import Axes

if TYPE_CHECKING:
    from gdn_mup.modules.scaling import Optimizer, Scaling

HEADER = ("parameter", "shape", "axes that grow", "role", "init std", "LR", "weight decay", "ε", "why")
_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD", "muon": "Muon, AdamW"}


def text(scaling: "Scaling", optimizer: "Optimizer") -> str:
    """One line for each parameter; blocks that agree share their lines, as `layers.0-11.q_proj.weight`."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, entry in scaling.entries.items():
        lines.setdefault((re.sub(r"\d+", "#", name), *_cells(scaling, entry, optimizer)), []).append(name)
    rows = [HEADER, *((as_range(names), *cells) for (_, *cells), names in lines.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    title = (
        f"gdn_mup, {_OPTIMIZERS[optimizer]}: width {scaling.base} -> {scaling.target}; init std, LR, weight decay and "
        "ε are multiples of the base width's"
    )
    multipliers = [
        f"{path}: its input × {factor:.4g} (tied to the embedding)" for path, factor in scaling.readouts.items()
    ] + [f"{path}: its output × {factor:.4g} (as asked for)" for path, factor in scaling.outputs.items()]
    return "\n".join([title, *body, *multipliers])


def _cells(scaling: "Scaling", entry: Entry, optimizer: "Optimizer") -> tuple[str, ...]:
    parts = scaling.part_multipliers(entry.name, optimizer)

    def column(field: str) -> str:
        return " | ".join(dict.fromkeys(f"{getattr(part, field):.4g}" for part in parts))

    keeps = entry.kind is Kind.VECTOR and not (entry.law is not None and entry.law.centred)
    init = "own" if keeps else column("init_std")
    return (
        "×".join(map(str, entry.shape)) or "scalar",
        " | ".join(dict.fromkeys(_axes(part.axes) for part in entry.parts)),
        " | ".join(dict.fromkeys(_role(entry.kind, part.axes) for part in entry.parts)),
        init,
        column("learning_rate"),
        column("weight_decay") if entry.kind is not Kind.VECTOR else "none",
        column("epsilon") if optimizer != "sgd" else "",
        _why(scaling, entry, optimizer),
    )


def _axes(axes: Axes) -> str:
    return {Axes.BOTH: "in, out", Axes.FAN_OUT: "out", Axes.FAN_IN: "in", Axes.NONE: "none"}[axes]


def _role(kind: Kind, axes: Axes) -> str:
    if kind is Kind.VECTOR:
        return "vector"
    names = {Axes.BOTH: "hidden", Axes.FAN_OUT: "input", Axes.FAN_IN: "readout", Axes.NONE: "fixed"}
    return names[axes]


def _why(scaling: "Scaling", entry: Entry, optimizer: "Optimizer") -> str:
    growths = dict.fromkeys((part.growth.fan_in, part.growth.fan_out) for part in entry.parts)
    reasons = [f"{entry.module}: " + " | ".join(f"fan-in ×{i:.4g}, fan-out ×{o:.4g}" for i, o in growths)]
    reasons += entry.notes
    if optimizer == "muon":
        reasons.append("Muon" if scaling.trained_by_muon(entry.name) else "AdamW")
    if (place := scaling.places[entry.name]) is not Place.OUTSIDE and scaling.depth:
        reasons.append(place.value)
    return "; ".join(reasons)
