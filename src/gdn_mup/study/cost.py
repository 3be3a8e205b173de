"""What a study cost, and what one will cost: tokens, model FLOPs, seconds and joules, runs that failed included.

FLOPs are counted from the model's shape (`model/flops.py`); seconds and joules are those that jobs measured
(`training/energy.py`). Jobs that ran at the same time on one processor each counted all of its energy. What has not
run yet is predicted to go at the FLOP/s of learning-rate sweeps that have, of models of about its size.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from gdn_mup.errors import UserError
from gdn_mup.model.config import ModelSettings, ModelShape, model_shape
from gdn_mup.model.flops import forward_flops, training_flops
from gdn_mup.study.plan import SECTIONS, Job, Study

Array = NDArray[np.float64]

COSTS = ("tokens", "flops", "seconds", "joules")
_JOB = ["growth", "optimizer", "width", "seed"]


def job_costs(dataset: xr.Dataset) -> pd.DataFrame:
    """One row per job of a collected dataset: growth, optimizer, width, seed, and what it cost.

    `members` are the runs that it trained and `diverged` those of them that failed; `tokens` went forward and backward,
    in all its members together; `flops` count those and the tokens of evaluations. What a job has not reported is NaN.
    """
    names = ["members", "diverged_members", "tokens", "evaluated_tokens", "seconds", "joules"]
    table = dataset[names].expand_dims([name for name in _JOB if name not in dataset.dims])
    jobs = table.to_dataframe(dim_order=_JOB).dropna(how="all").reset_index()
    shapes = _shapes(dataset, jobs)
    both, forward = ([count(shape) for shape in shapes] for count in (training_flops, forward_flops))
    flops = jobs.members.astype(float) * (jobs.tokens.astype(float) * both + jobs.evaluated_tokens * forward)
    jobs = jobs.assign(flops=flops, tokens=jobs.members * jobs.tokens).drop(columns="evaluated_tokens")
    return jobs.rename(columns={"diverged_members": "diverged"})


def _shapes(dataset: xr.Dataset, jobs: pd.DataFrame) -> list[ModelShape]:
    """The model of each of a dataset's jobs."""
    settings = json.loads(dataset.attrs["settings"])
    model = ModelSettings.model_validate(settings["model"])
    vocabulary = int(dataset.attrs.get("vocabulary_size", settings["corpus"]["vocabulary_size"]))
    return [model_shape(model, int(job.width), job.growth, vocabulary) for job in jobs.itertuples()]


def costs(datasets: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """The study's costs: a row per kind, growth, optimizer and width, and one, of kind `total`, for all of them.

    Columns: `jobs`; `members`, `diverged`, `tokens`, `flops`, `seconds`, `joules` of all these jobs together;
    `seconds_a_job`, a mean; `jobs_with_joules`, those that `joules` is the sum of; `device`. NaN where no job reported.
    Raises UserError if there is no dataset.
    """
    if not datasets:
        raise UserError("a study without experiments costs nothing; add one to the study file")
    rows: list[dict[str, Any]] = []
    everything = []
    for kind, dataset in datasets.items():
        jobs = job_costs(dataset).assign(device=_devices(dataset))
        everything.append(jobs)
        for (growth, optimizer, width), part in jobs.groupby(_JOB[:3], sort=False):
            rows.append({"kind": kind, "growth": growth, "optimizer": optimizer, "width": str(width), **_sum(part)})
    total = {"kind": "total", "growth": "", "optimizer": "", "width": "", **_sum(pd.concat(everything))}
    return pd.DataFrame([*rows, total])


def planned_costs(study: Study, rules_trained: Callable[[Job], int], measured: xr.Dataset) -> pd.DataFrame:
    """What a study will cost: a row per kind, growth, optimizer and width, and one, of kind `total`, for all of them.

    `rules_trained`: how many of a job's rule sets are trained, since those that coincide are trained once. `measured`:
    learning-rate sweeps that were run, collected; between their models' FLOPs per token, FLOP/s is interpolated on
    logarithmic axes, and beyond them it is the nearest's. Columns as of `costs`, of which `seconds` and `joules` are
    predicted.
    """
    sizes, flop_rate, power = _measured_rates(measured)
    rows = []
    for kind in SECTIONS:
        for job in study.jobs(kind):
            shape = model_shape(study.model, job.width, job.growth, study.corpus.vocabulary_size)
            tokens, evaluated = study.tokens_of(job)
            members = rules_trained(job) * study.models_of(job)
            # Not a whole number: those of 64 bits end at 9 EFLOPs, which is one job of eight layers at width 1024.
            flops = float(members * (tokens * training_flops(shape) + evaluated * forward_flops(shape)))
            size = math.log(forward_flops(shape))
            seconds = flops / math.exp(np.interp(size, sizes, np.log(flop_rate)))
            costs = {"members": members, "diverged": 0, "tokens": members * tokens, "flops": flops, "seconds": seconds}
            rows.append({**job._asdict(), **costs, "joules": seconds * float(np.interp(size, sizes, power))})
    if not rows:
        raise UserError("a study without experiments costs nothing; add one to the study file")
    jobs = pd.DataFrame(rows).assign(device=_devices(measured))
    places = ["kind", *_JOB[:3]]
    by_place = [
        {**dict(zip(places, map(str, place), strict=True)), **_sum(part)}
        for place, part in jobs.groupby(places, sort=False)
    ]
    return pd.DataFrame([*by_place, {**dict.fromkeys(places, ""), "kind": "total", **_sum(jobs)}])


def _measured_rates(measured: xr.Dataset) -> tuple[Array, Array, Array]:
    """Sizes of the models that were run (log FLOPs of a token's forward pass), their FLOP/s, and watts or NaN."""
    jobs = job_costs(measured)
    if not (jobs.seconds > 0).any():
        raise UserError("the measured dataset has no job that says how long it took; give one of finished sweeps")
    sizes = [math.log(forward_flops(shape)) for shape in _shapes(measured, jobs)]
    by_size = jobs.assign(size=sizes)[["size", "flops", "seconds", "joules"]].groupby("size").sum(min_count=1)
    seconds = by_size.seconds.to_numpy(np.float64)
    return by_size.index.to_numpy(np.float64), by_size.flops.to_numpy() / seconds, by_size.joules.to_numpy() / seconds


class Cost(NamedTuple):
    """What some training cost; NaN is not reported."""

    flops: float
    seconds: float
    joules: float


def sweep_cost(dataset: xr.Dataset, growth: str, optimizer: str, width: int, learning_rates: int) -> Cost:
    """Of so many learning rates under one rule set, at one width: a share of what a job of it cost, mean over seeds."""
    jobs = job_costs(dataset)
    jobs = jobs[(jobs.growth == growth) & (jobs.optimizer == optimizer) & (jobs.width == width)]
    return Cost(*((jobs[name] * learning_rates / jobs.members).mean(skipna=False) for name in Cost._fields))


def _sum(jobs: pd.DataFrame) -> dict[str, Any]:
    """What these jobs cost together."""
    # Numbers of which all are missing stay missing; of energy, the jobs that reported it count.
    counted = {name: jobs[name].sum(min_count=len(jobs)) for name in ("members", "diverged", *COSTS[:3])}
    return {
        "jobs": len(jobs),
        **counted,
        "joules": jobs.joules.sum(min_count=1),
        "jobs_with_joules": int(jobs.joules.notna().sum()),
        "seconds_a_job": jobs.seconds.mean(),
        "device": ", ".join(dict.fromkeys(jobs.device)),
    }


def _devices(dataset: xr.Dataset) -> str:
    device = str(dataset.attrs.get("device", "unknown"))
    return ", ".join(json.loads(device)) if device.startswith("[") else device
