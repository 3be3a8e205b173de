"""Runs that other sweeps have trained: a job takes them over and trains what is left.

A study on a finer grid, or with one rule set more, asks for many runs that exist already, to the letter. Which they are
is decided by settings and corpus, and by exact equality of learning rates.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from gdn_mup.errors import UserError
from gdn_mup.study.datasets import PROVENANCE, open_jobs

Run = tuple[str, float]  # a rule set that stands for all that coincide with it, and a learning rate


def open_sweep(path: Path, settings: Mapping[str, Any], corpus: Mapping[str, Any]) -> xr.Dataset:
    """A sweep whose runs may be those of a job with these settings: a job file's, or one that a dataset holds.

    Args:
        path: of the file.
        settings: the job's, as `Study.settings_of`.
        corpus: `corpus_sha256` and `vocabulary_size` of what the job trains on.

    Raises:
        UserError: not such a file, or all it has differs in more than rule sets and learning rates; the message is
            about the sweep that differs least.
    """
    ours = _facts(settings, corpus)
    differences: list[list[str]] = []
    for sweep in open_jobs(path, "lr_sweep", "name job files or datasets of learning-rate sweeps"):
        theirs = _facts(json.loads(sweep.attrs.get("settings", "{}")), sweep.attrs)
        differ = [key for key in ours | theirs if theirs.get(key) != ours.get(key)]
        if not differ:
            return sweep
        differences.append([f"{key}: {theirs.get(key)} is not this job's {ours.get(key)}" for key in differ])
    raise UserError(
        f"{path}: {min(differences, key=len)[0]}: its runs are others; reuse files that differ from "
        "the job in rules and learning_rates alone"
    )


def take_over(
    sweeps: Mapping[Path, xr.Dataset], runs: Sequence[Run], stands_for: Mapping[str, str]
) -> tuple[list[xr.Dataset], list[Run]]:
    """Those of the runs that the sweeps have, and those that are left to train.

    A sweep becomes a dataset of runs by `member`, with `rules` and `learning_rate` of the job that takes them over, and
    with their share of the sweep's cost. Its attributes say where they come from. Of several sweeps that have a
    run the first one gives it.

    Args:
        sweeps: as `open_sweep` gives them, by their path.
        runs: of the job.
        stands_for: for each rule set, the one that is trained for all that coincide with it.
    """
    taken, left = [], list(runs)
    for path, sweep in sweeps.items():
        row_of = {stands_for.get(rules): rules for rules in sweep.rules.values.tolist()}
        theirs = [run for run in left if run[0] in row_of and run[1] in sweep.learning_rate.values]
        if not theirs:
            continue
        left = [run for run in left if run not in theirs]
        rules, learning_rates = zip(*theirs, strict=True)
        rows = xr.Variable("member", [row_of[name] for name in rules])
        part = sweep.sel(rules=rows, learning_rate=xr.Variable("member", list(learning_rates)))
        share = len(theirs) / sweep.members
        part = part.assign(seconds=sweep.seconds * share, joules=sweep.joules * share)
        part = part.assign_coords(rules=("member", list(rules)))
        source = {name: sweep.attrs[name] for name in (*PROVENANCE, "reused") if name in sweep.attrs}
        part.attrs = {"file": str(path), "runs": len(theirs), **source}
        taken.append(part)
    return taken, left


def join(trained: xr.Dataset, taken: Sequence[xr.Dataset]) -> xr.Dataset:
    """Runs by `member`: first those that were trained, if any, then those taken over. Costs are those of all.

    The attribute `reused` is JSON: file, number of runs and provenance of each that was taken from.
    """
    parts = [part for part in (trained, *taken) if part.sizes["member"]]  # who has trained nothing, spent nothing
    curves = [name for name, variable in trained.items() if "member" in variable.dims]
    joined = xr.concat([part[curves].reset_coords(drop=True) for part in parts], "member")
    joined.attrs = {"reused": json.dumps([part.attrs for part in taken])}
    return joined.assign(
        seconds=sum(float(part.seconds) for part in parts),
        joules=sum(float(part.joules) for part in parts),
        members=joined.sizes["member"],
        diverged_members=int(joined.diverged.sum()),
        tokens=trained.tokens,
        evaluated_tokens=trained.evaluated_tokens,
    )


def _facts(settings: Mapping[str, Any], corpus: Mapping[str, Any]) -> dict[str, Any]:
    """What the runs of a job depend on, rule sets and learning rates aside, by dotted key."""
    facts = dict(_flat({name: value for name, value in settings.items() if name not in ("rules", "learning_rates")}))
    if "width" in facts and facts["width"] == facts.get("model.base_width"):
        facts.pop("growth", None)  # nothing has grown
    return facts | {name: corpus.get(name) for name in ("corpus_sha256", "vocabulary_size")}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
