"""How transfer depends on training length: sweeps of several studies, put together by tokens a run.

Studies of the same length become one, such as μP's on a fine grid and SP's on the wide one that its optimum needs.
Everything but length must be the same: text, model, and how a run is trained.
"""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd
import xarray as xr

from gdn_mup.errors import UserError
from gdn_mup.study.clipping import experiment_training
from gdn_mup.study.estimates import Estimate
from gdn_mup.study.losses import best_losses_less
from gdn_mup.study.optimum import Transfer, transfer, transfers
from gdn_mup.study.regime import parameters_at, tokens_a_run

LENGTH = ("steps", "warmup_steps", "evaluate_every")  # what may differ between runs that are compared


def by_length(datasets: Mapping[str, xr.Dataset]) -> dict[int, xr.Dataset]:
    """Collected learning-rate sweeps of several studies, put together by tokens a run, ascending.

    Raises UserError, with study, key and value, if studies differ in more than length.
    """
    first, reference = next(iter(datasets.items()))
    facts = _facts(reference)
    parts: dict[int, list[xr.Dataset]] = {}
    for name, dataset in datasets.items():
        own = _facts(dataset)
        for key in facts.keys() & own.keys():
            if own[key] != facts[key]:
                raise UserError(
                    f"study {name}: {key}: {own[key]} is not the {facts[key]} of study {first}: only runs that differ "
                    f"in {', '.join(LENGTH)} alone can be compared by length; take it out of `studies`"
                )
        facts |= own
        lengths = {
            tokens_a_run(experiment_training(dataset, "sweeps", str(growth), str(optimizer)))
            for growth in dataset.growth.values
            for optimizer in dataset.optimizer.values
        }
        if len(lengths) > 1:
            raise UserError(f"study {name}: its sweeps train on {sorted(lengths)} tokens; give each a study of its own")
        parts.setdefault(lengths.pop(), []).append(dataset)
    return {tokens: _joined(parts[tokens]) for tokens in sorted(parts)}


def training_length(datasets: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """How well learning rates transfer, and what μP gains on SP, by tokens a run: a row per growth, optimizer, rules.

    `slope`, `slope_beyond_base` (without the base width), in octaves per doubling; `cost` of the base width's best
    learning rate at `width`, the widest with a number, and `loss_less_sp`, the best loss there less SP's, by the seeds
    that both have (`seeds`), in nats per token; each with 95 % intervals. `tokens_per_parameter` at that width.
    """
    rows = []
    for tokens, dataset in by_length(datasets).items():
        for sweep in transfers(dataset):
            known = [width for width in sweep.widths if sweep.optima[width].bracketed]
            width = known[-1] if known else sweep.widths[-1]
            gap, seeds = _less_sp(dataset, sweep, width)
            base = sweep.optima.get(sweep.base_width)
            estimates = {
                "slope": sweep.slope,
                "slope_beyond_base": sweep.slope_beyond_base,
                "cost": sweep.regrets[width],
                "loss_less_sp": gap,
                "best_log2_learning_rate": Estimate(base.log2_learning_rate, base.interval) if base else Estimate(),
            }
            row: dict[str, Any] = {
                "growth": sweep.growth,
                "optimizer": sweep.optimizer,
                "rules": sweep.rules,
                "tokens": tokens,
                "width": width,
                "tokens_per_parameter": tokens / parameters_at(dataset, sweep.growth, width),
                "seeds": seeds,
            }
            for name, estimate in estimates.items():
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), estimate.numbers, strict=True))
            rows.append(row)
    return pd.DataFrame(rows)


def _less_sp(dataset: xr.Dataset, sweep: Transfer, width: int) -> tuple[Estimate, int]:
    """The best loss at a width less that under SP, and by how many seeds: those that both have."""
    reference = transfer(dataset, sweep.growth, sweep.optimizer, "sp")
    if sweep.rules == "sp" or reference is None or width not in reference.curves or width == sweep.base_width:
        return Estimate(reason="no SP to compare with"), 0  # at the base width rule sets are one model
    shared = sweep.curves[width].index.intersection(reference.curves[width].index)
    both = dataset.sel(seed=shared.to_numpy(), width=[sweep.base_width, width])
    found = [transfer(both, sweep.growth, sweep.optimizer, rules) for rules in (sweep.rules, "sp")]
    if len(shared) == 0 or any(one is None for one in found):
        return Estimate(reason="no seed that both have"), 0
    differences = best_losses_less(found[0], found[1])  # type: ignore[arg-type]
    return differences.get(width, Estimate(reason="not bracketed under both")), len(shared)


def _joined(parts: list[xr.Dataset]) -> xr.Dataset:
    """Sweeps of one length as one dataset, NaN where nothing was run; what two studies have, the first gives."""
    joined = parts[0][["val_loss", "diverged"]]
    for part in parts[1:]:
        joined = joined.combine_first(part[["val_loss", "diverged"]])
    return joined.assign_attrs(parts[0].attrs)


def _facts(dataset: xr.Dataset) -> dict[str, Any]:
    """What must agree between studies that are compared, by key."""
    study = json.loads(dataset.attrs["settings"])
    facts = {f"model.{key}": value for key, value in study["model"].items()}
    facts |= {name: dataset.attrs[name] for name in ("corpus_sha256", "vocabulary_size") if name in dataset.attrs}
    for sweep in study["sweeps"]:
        own = study["training"] | sweep["training"]
        where = f"{sweep['growth']} {sweep['optimizer']}"
        facts |= {f"training.{key} ({where})": value for key, value in own.items() if key not in LENGTH}
    return facts
