"""Gradient clipping against width: the norms that it compares, and where it puts the best learning rate.

The raw norm of a readout's gradient grows as √width, so that a clipping norm tuned at the base width clips more in
wider models; the width-invariant norm weighs each parameter so that its own does not (`training/clipping.py`).
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from gdn_mup.errors import UserError
from gdn_mup.scaling.exponents import predict
from gdn_mup.study.exponents import PREMISES
from gdn_mup.study.optimum import Transfer, transfer, transferred_rate
from gdn_mup.study.width_fit import width_exponent

LATE = 0.1  # the last updates, as a share of all, over which a late norm is averaged
PLACES = ["growth", "optimizer", "rules"]


class ClippedSweeps(NamedTuple):
    """The learning-rate sweeps of one (growth, optimizer, rules), by clipping.

    `learning_rate` is that at which norms are compared: the lowest of those nearest the base width's optima, so that
    it suits every clipping there (the lowest of all where none is known). Gradients are scaled down to `clip_norm`.
    """

    sweeps: dict[str, Transfer]
    learning_rate: float
    clip_norm: float

    @property
    def place(self) -> tuple[str, str, str]:
        """Growth, optimizer and rule set."""
        first = next(iter(self.sweeps.values()))
        return first.growth, first.optimizer, first.rules


def clipped_sweeps(dataset: xr.Dataset) -> list[ClippedSweeps]:
    """Every sweep of a collected `clipping` dataset. Raises UserError if nothing was run."""
    found = []
    for growth in map(str, dataset.growth.values):
        for optimizer in map(str, dataset.optimizer.values):
            for rules in map(str, dataset.rules.values):
                each = {
                    str(name): transfer(dataset.sel(clipping=name), growth, optimizer, rules)
                    for name in dataset.clipping.values
                }
                sweeps = {name: sweep for name, sweep in each.items() if sweep}
                rates = [rate for sweep in sweeps.values() if (rate := transferred_rate(sweep)) is not None]
                if sweeps:
                    lowest = min(float(losses.columns[0]) for s in sweeps.values() for losses in s.curves.values())
                    training = experiment_training(dataset, "clipping_checks", growth, optimizer)
                    found.append(ClippedSweeps(sweeps, min(rates, default=lowest), float(training["clip_norm"])))
    if not found:
        raise UserError("the dataset has no clipping check; add one under `clipping_checks` and run it")
    return found


def norms(dataset: xr.Dataset, sweeps: Sequence[ClippedSweeps]) -> pd.DataFrame:
    """The norm that each clipping compares, before it clips, at the learning rate of `ClippedSweeps`.

    One row per growth, optimizer, rules, clipping, width, seed and stage: "first", of the first update, at init;
    "late", the geometric mean over the last updates, NaN where training diverged. `clipped` is the share of all updates
    whose norm exceeds the clipping norm (0 without clipping).
    """
    rows = []
    for found in sweeps:
        growth, optimizer, rules = found.place
        here = dataset.grad_norm.sel(growth=growth, optimizer=optimizer, rules=rules, learning_rate=found.learning_rate)
        for clipping, sweep in found.sweeps.items():
            for width, losses in sweep.curves.items():
                for seed in losses.index:
                    norm = here.sel(clipping=clipping, width=width, seed=seed).dropna("step").values
                    planned = here.sizes["step"]
                    late = norm[-max(1, round(LATE * planned)) :]
                    for stage, size in (("first", norm[0] if len(norm) else np.nan), ("late", geometric_mean(late))):
                        rows.append(
                            {
                                **dict(zip(PLACES, found.place, strict=True)),
                                "clipping": clipping,
                                "width": width,
                                "seed": int(seed),
                                "learning_rate": found.learning_rate,
                                "stage": stage,
                                "norm": size if stage == "first" or len(norm) == planned else np.nan,
                                "clipped": 0.0 if clipping == "none" else float(np.mean(norm > found.clip_norm)),
                            }
                        )
    return pd.DataFrame(rows)


def norm_exponents(dataset: xr.Dataset, table: pd.DataFrame) -> pd.DataFrame:
    """Width exponents of `norms`, one row per growth, optimizer, rules, clipping and stage.

    `exponent` with its 95 % interval `low`, `high` over seeds; `predicted_low`, `predicted_high` by
    `scaling.exponents`: of the first update, and, late, the range between gates whose gradients are sums of
    independent and of aligned terms.
    """
    tied = json.loads(dataset.attrs["settings"])["model"]["tied_embeddings"]
    rows = []
    for key, part in table.groupby([*PLACES, "clipping", "stage"], sort=False):
        growth, optimizer, rules, clipping, stage = map(str, key)
        sizes = part.pivot(index="seed", columns="width", values="norm")
        fitted = width_exponent([int(width) for width in sizes.columns], sizes.to_numpy())
        compared = "width_invariant_norm" if clipping == "width_invariant_norm" else "global_norm"
        predicted = [
            predict(rules, optimizer, growth, tied=tied, premise=premise).clip_norm[compared]
            for premise in (PREMISES if stage == "late" else PREMISES[:1])
        ]
        rows.append(
            {
                **dict(zip([*PLACES, "clipping", "stage"], key, strict=True)),
                **{name: float(value) for name, value in fitted._asdict().items() if name != "value"},
                "exponent": float(fitted.value),
                "predicted_low": min(predicted),
                "predicted_high": max(predicted),
            }
        )
    return pd.DataFrame(rows)


def clipped_share(dataset: xr.Dataset, growth: str, optimizer: str, rules: str) -> xr.DataArray:
    """The share of a sweep's updates that were clipped [width, seed, learning_rate]; NaN where nothing was run.

    dataset: a collected `lr_sweep`. Updates after a divergence are none.
    """
    training = experiment_training(dataset, "sweeps", growth, optimizer)
    norm = dataset.grad_norm.sel(growth=growth, optimizer=optimizer, rules=rules)
    known = norm.notnull()
    clipped = norm > (np.inf if training["clipping"] == "none" else training["clip_norm"])
    return (clipped.sum("step") / known.sum("step").where(known.any("step"))).transpose(
        "width", "seed", "learning_rate"
    )


def clipped_by_width(dataset: xr.Dataset, sweep: Transfer) -> dict[int, float]:
    """`clipped_share` at the learning rate transferred from the base width, mean over seeds, by width."""
    rate = transferred_rate(sweep)
    if rate is None:
        return {}
    share = clipped_share(dataset, sweep.growth, sweep.optimizer, sweep.rules).sel(learning_rate=rate).mean("seed")
    return {width: float(share.sel(width=width)) for width in sweep.widths}


def is_clipped(dataset: xr.Dataset, sweep: Transfer) -> str:
    """The norm by which most updates are clipped at the widest width, "none" if most are not."""
    shares = clipped_by_width(dataset, sweep)
    most = bool(shares) and list(shares.values())[-1] > 0.5
    training = experiment_training(dataset, "sweeps", sweep.growth, sweep.optimizer)
    return str(training["clipping"]) if most else "none"


def clipped_in_words(dataset: xr.Dataset, sweep: Transfer) -> str:
    """The share of updates clipped at the transferred learning rate, from the base width to the widest."""
    shares = clipped_by_width(dataset, sweep)
    if not shares:
        return "share of updates clipped unknown: no learning rate to compare at"
    values = " ".join(f"{100 * share:.0f}" for share in shares.values())
    return f"{values} % of updates clipped at widths {', '.join(map(str, shares))}"


def experiment_training(dataset: xr.Dataset, section: str, growth: str, optimizer: str) -> dict[str, Any]:
    """The training settings of one of the study's experiments."""
    study = json.loads(dataset.attrs["settings"])
    overrides = {(each["growth"], each["optimizer"]): each["training"] for each in study[section]}
    return dict(study["training"] | overrides.get((growth, optimizer), {}))


def geometric_mean(values: np.ndarray) -> float:
    """NaN of nothing."""
    return float(np.exp(np.log(values).mean())) if len(values) else np.nan
