"""Whether the best learning rate of one's own model stays where it is: a small sweep at two widths."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from gdn_mup.checks.coordinates import Loss, Setup, loss_of
from gdn_mup.errors import UserError
from gdn_mup.modules.scaling import Scaling
from gdn_mup.modules.survey import MakeModel
from gdn_mup.modules.users import users
from gdn_mup.study.equivalence import VerdictName, judge_transfer
from gdn_mup.study.estimates import Estimate, Interval
from gdn_mup.study.optimum import Optimum, find_optimum, slope_against_width, transfer_regret


class Verdict(NamedTuple):
    """Whether the best learning rate of the least width is good enough at the others.

    `move`: octaves from the least to the largest width with an optimum, and its `interval`. `costs`: of the least
    width's best learning rate against each width's own, in nats. `text` and `reason`: in words.
    """

    optima: dict[int, Optimum]
    move: float
    interval: Interval
    costs: dict[int, Estimate]
    verdict: VerdictName
    text: str
    reason: str


def lr_sweep(
    make_model: MakeModel,
    widths: Sequence[int],
    batches: Iterable[Any],
    learning_rates: Sequence[float],
    *,
    loss: Loss | None = None,
    setup: Setup | None = None,
    steps: int = 100,
    seeds: Sequence[int] = (0, 1, 2),
    **between: Any,
) -> xr.Dataset:
    """Train every learning rate at every width on the same batches: AdamW by the rules, linear warm-up over a tenth.

    Arguments are those of `coordinate_check`; `setup` gets a scaling and a model for the learning rate 1, which is
    multiplied. Returns train_loss (seed, width, learning_rate): the mean over the last tenth of the steps, NaN where
    training diverged (a loss that is not finite, or larger at the end than at the start).
    """
    ordered = sorted(set(widths))
    if len(ordered) < 2 or len(learning_rates) < 4:
        raise UserError("widths, learning_rates: give two widths or more and four learning rates or more")
    with users("batches"):
        batches = list(islice(batches, steps))
    if not batches:
        raise UserError("batches: none: give one or more")
    between = {"call": lambda model: loss_of(model, batches[0], loss)} | between
    shape = (len(seeds), len(ordered), len(learning_rates))
    result = xr.DataArray(
        np.full(shape, np.nan),
        coords={"seed": list(seeds), "width": ordered, "learning_rate": list(learning_rates)},
        dims=("seed", "width", "learning_rate"),
        attrs={"units": "nats", "long_name": "mean training loss over the last tenth of the steps"},
    )
    warmup, tail = max(1, steps // 10), max(1, steps // 10)
    for width in ordered:
        scaling = Scaling.between(make_model, ordered[0], width, **between)
        for seed in seeds:
            for rate in learning_rates:
                torch.manual_seed(seed)
                with users(f"make_model({width})"):
                    model = make_model(width)
                with users("setup") if setup else nullcontext():
                    optimizer = (setup or _adamw)(model, scaling)
                schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, rate, warmup))
                losses = []
                for step in range(steps):
                    optimizer.zero_grad()
                    value = loss_of(model, batches[step % len(batches)], loss)
                    with users("loss"):
                        value.backward()
                    losses.append(float(value.detach()))
                    if not np.isfinite(losses[-1]):
                        break
                    with users("optimizer"):
                        optimizer.step()
                    schedule.step()
                last = float(np.mean(losses[-tail:]))
                if np.isfinite(last) and last <= losses[0]:
                    result.loc[{"seed": seed, "width": width, "learning_rate": rate}] = last
    return xr.Dataset({"train_loss": result}, attrs={"title": "Learning-rate sweep", "base_width": ordered[0]})


_TEXTS: dict[VerdictName, str] = {
    "reproduced": "it stays",
    "not reproduced": "it moves",
    "inconclusive": "no move is established, nor that it stays: more seeds or steps would tell",
}


def judge(dataset: xr.Dataset) -> Verdict:
    """Where the optimum is at each width, and whether that of the least one will do; margins are those of the study."""
    rates = np.log2(dataset.learning_rate.values.astype(float))
    losses = dataset.train_loss.transpose("width", "seed", "learning_rate").values
    widths = [int(width) for width in dataset.width.values]
    found = [find_optimum(rates, losses[i], np.random.default_rng(i)) for i in range(len(widths))]
    optima = dict(zip(widths, found, strict=True))
    slope, wider = slope_against_width(widths, found), slope_against_width(widths[1:], found[1:])
    costs = {width: transfer_regret(optima[width], found[0]) for width in widths[1:]}
    verdict, reason = judge_transfer(slope, wider, costs)
    if slope.reason:
        return Verdict(optima, np.nan, slope.interval, costs, verdict, f"cannot be said: {slope.reason}", reason)
    doublings = float(np.log2(slope.widths[-1] / slope.widths[0]))
    interval = Interval(*(end * doublings for end in slope.interval))
    return Verdict(optima, slope.value * doublings, interval, costs, verdict, _TEXTS[verdict], reason)


def _rate(rate: float, warmup: int, step: int) -> float:
    return rate * min(1.0, (step + 1) / (warmup + 1))


def _adamw(model: torch.nn.Module, scaling: Scaling) -> torch.optim.Optimizer:
    scaling.initialize(model)
    return torch.optim.AdamW(scaling.parameter_groups(model, "adamw", 1.0))
