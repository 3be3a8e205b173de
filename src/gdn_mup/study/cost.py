"""What a study cost: tokens, model FLOPs, seconds and joules of every kind of job, runs that failed included.

FLOPs are counted from the model's shape (`model/flops.py`); seconds and joules are those that jobs measured
(`training/energy.py`). Jobs that ran at the same time on one processor each counted all of its energy.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
import xarray as xr

from gdn_mup.errors import UserError
from gdn_mup.model.config import ModelSettings, model_shape
from gdn_mup.model.flops import forward_flops, training_flops

COSTS = ("tokens", "flops", "seconds", "joules")
_JOB = ["growth", "optimizer", "width", "seed"]


def job_costs(dataset: xr.Dataset) -> pd.DataFrame:
    """One row per job of a collected dataset: growth, optimizer, width, seed, and what it cost.

    `members` are the runs that it trained and `diverged` those of them that failed; `tokens` went forward and backward,
    in all its members together; `flops` count those and the tokens of evaluations. What a job has not reported is NaN.
    """
    settings = json.loads(dataset.attrs["settings"])
    model = ModelSettings.model_validate(settings["model"])
    vocabulary = int(dataset.attrs.get("vocabulary_size", settings["corpus"]["vocabulary_size"]))
    names = ["members", "diverged_members", "tokens", "evaluated_tokens", "seconds", "joules"]
    table = dataset[names].expand_dims([name for name in _JOB if name not in dataset.dims])
    jobs = table.to_dataframe(dim_order=_JOB).dropna(how="all").reset_index()
    shapes = [model_shape(model, int(job.width), job.growth, vocabulary) for job in jobs.itertuples()]
    both, forward = ([count(shape) for shape in shapes] for count in (training_flops, forward_flops))
    flops = jobs.members * (jobs.tokens * both + jobs.evaluated_tokens * forward)
    jobs = jobs.assign(flops=flops, tokens=jobs.members * jobs.tokens).drop(columns="evaluated_tokens")
    return jobs.rename(columns={"diverged_members": "diverged"})


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
