"""Job files become one labelled dataset per study and kind, such as `lr_sweep.nc` and `coordinates.nc`.

A job file holds the members of one (growth, optimizer, width, seed); a dataset holds every job of a study,
with those four as dimensions. Both have the same variables, both carry units, long names and provenance.
What a study has not run (yet) is NaN, and named in the attribute `missing_jobs`.
"""

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr

from gdn_mup.errors import UserError
from gdn_mup.files import replacing
from gdn_mup.model.config import GrowthMode, InitName, KernelScale
from gdn_mup.study.plan import Job, Log2Ranges, RuleSetName, Study, settings_hash
from gdn_mup.training.config import Clipping, OptimizerName

DatasetKind = Literal["lr_sweep", "coordinates", "multiplier", "clipping", "tuning"]

_CONDITION = ("rules", "init", "kernel_scale", "epsilon", "step")  # of a model with and without the multiplier

# What a job cost. A file that lacks one of these has not reported it.
COSTS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("seconds", "joules", "members", "diverged_members", "tokens", "evaluated_tokens"), ()
)

# Variables of a job file and their dimensions, `COSTS` aside.
_OWN_VARIABLES: dict[DatasetKind, dict[str, tuple[str, ...]]] = {
    "lr_sweep": {
        "train_loss": ("rules", "learning_rate", "step"),
        "val_loss": ("rules", "learning_rate", "evaluation_step"),
        "grad_norm": ("rules", "learning_rate", "step"),
        "diverged": ("rules", "learning_rate"),
    },
    "coordinates": {
        "rms": ("rules", "step", "layer", "quantity"),
        "change": ("rules", "step", "layer", "quantity"),
        "weight_rms": ("rules", "step", "layer", "parameter"),
        "gradient_rms": ("rules", "step", "layer", "parameter"),
        "update_rms": ("rules", "step", "layer", "parameter"),
        "alpha_mean": ("rules", "step", "layer"),
        "alpha_quantile": ("rules", "step", "layer", "quantile"),
        "beta_mean": ("rules", "step", "layer"),
        "beta_quantile": ("rules", "step", "layer", "quantile"),
        "half_life_quantile": ("rules", "step", "layer", "quantile"),
        "effective_rank": ("rules", "step", "layer"),
        "relative_rank": ("rules", "step", "layer"),
    },
    "multiplier": {
        "multiplier": (),
        "mean_square": (*_CONDITION, "layer"),
        "median_square": (*_CONDITION, "layer"),
        "low_square": (*_CONDITION, "layer"),
        "share_below_epsilon": (*_CONDITION, "layer"),
        "loss": _CONDITION,
        "loss_change": _CONDITION,
        "trained_loss_change": _CONDITION,
        "gradient_change": _CONDITION,
        "class_gradient_change": (*_CONDITION, "parameter"),
    },
    "clipping": {
        "val_loss": ("rules", "clipping", "learning_rate", "evaluation_step"),
        "grad_norm": ("rules", "clipping", "learning_rate", "step"),
        "diverged": ("rules", "clipping", "learning_rate"),
    },
    "tuning": {
        "final_loss": ("rules", "trial", "learning_rate"),
        "diverged": ("rules", "trial", "learning_rate"),
        "multipliers": ("trial", "hyperparameter"),
        "seconds": (),
    },
}
JOB_VARIABLES = {kind: variables | COSTS for kind, variables in _OWN_VARIABLES.items()}

JOB_COORDINATES = ("growth", "optimizer", "width", "seed")  # scalars in a job file, dimensions in a dataset

DIMENSION_ORDER = (
    *("growth", "optimizer", "rules", "width", "seed", "clipping", "trial", "learning_rate"),
    *("init", "kernel_scale", "epsilon", "step", "evaluation_step"),
    *("layer", "quantity", "parameter", "hyperparameter", "quantile"),
)

# Named values keep the order in which the study file's types list them; numbers ascend.
NAME_ORDER: dict[str, tuple[str, ...]] = {
    "growth": get_args(GrowthMode),
    "optimizer": get_args(OptimizerName),
    "rules": get_args(RuleSetName),
    "clipping": get_args(Clipping),
    "init": get_args(InitName),
    "kernel_scale": get_args(KernelScale),
    "hyperparameter": tuple(Log2Ranges.model_fields),
}

# name: (long_name, units). The one place where a variable or coordinate is described.
DESCRIPTIONS: dict[str, tuple[str, str]] = {
    "growth": ("what grows with width: the number of heads or the size of a head", "1"),
    "optimizer": ("optimizer", "1"),
    "rules": ("rule set: how init and learning rates scale with width", "1"),
    "width": ("width of the residual stream", "1"),
    "seed": ("seed of the init and of the order of the data", "1"),
    "clipping": ("norm by which gradients are clipped: none, the raw one, or the width-invariant one", "1"),
    "learning_rate": ("peak learning rate at the base width", "1"),
    "trial": ("set of multipliers on a rule set's init and learning rates; in trial 0 all are 1", "1"),
    "init": ("initial standard deviations: the study's own, or 0.02 for every matrix at every width", "1"),
    "kernel_scale": ("what multiplies q in the delta rule: 1 or K^-1/2", "1"),
    "epsilon": ("ε of every RMSNorm", "1"),
    "step": ("updates, counted from 1 in a sweep; updates done in a check of sizes", "update"),
    "evaluation_step": ("updates done before the held-out evaluation", "update"),
    "layer": ("block, counted from 0; -1 outside the blocks", "1"),
    "quantity": ("activation or state", "1"),
    "parameter": ("parameter class", "1"),
    "hyperparameter": ("init standard deviation or learning rate of a group of parameters", "1"),
    "quantile": ("quantile over tokens and heads", "1"),
    "train_loss": (
        "mean cross-entropy of the step's batch before its update; NaN from divergence on",
        "nat/token",
    ),
    "val_loss": ("mean cross-entropy on the held-out batches", "nat/token"),
    "final_loss": ("mean cross-entropy on the held-out batches after training; NaN if diverged", "nat/token"),
    "grad_norm": ("gradient norm that clipping compares, before clipping", "1"),
    "diverged": ("1 if a loss was not finite or the final loss exceeds the untrained model's", "1"),
    "seconds": ("wall time of training and measuring in the job", "s"),
    "joules": ("energy of the whole device in that time; NaN where it does not report it", "J"),
    "members": ("models trained; rule sets that coincide share theirs", "1"),
    "diverged_members": ("models whose training diverged, of `members`", "1"),
    "tokens": ("tokens that each member went through forward and backward", "token"),
    "evaluated_tokens": ("tokens that each member went through forward alone", "token"),
    "rms": ("root mean square on the probe batch", "1"),
    "change": ("root mean square of the difference from the init on the probe batch", "1"),
    "weight_rms": ("root mean square of the parameter", "1"),
    "gradient_rms": ("root mean square of the gradient of the update that led to this step", "1"),
    "update_rms": ("root mean square of the update that led to this step", "1"),
    "alpha_mean": ("α, by which a state is multiplied at a token; mean over tokens and heads", "1"),
    "alpha_quantile": ("α, by which a state is multiplied at a token; quantiles over tokens and heads", "1"),
    "beta_mean": ("β, the share of a value that is overwritten at a token; mean over tokens and heads", "1"),
    "beta_quantile": ("β, the share of a value that is overwritten at a token; quantiles over tokens and heads", "1"),
    "half_life_quantile": ("half-life of the memory, ln 2 / −ln α; quantiles over tokens and heads", "token"),
    "effective_rank": (
        "exp(entropy of the normalised singular values) of the state S after the last token; mean over heads and "
        "sequences",
        "1",
    ),
    "relative_rank": ("`effective_rank` over the largest rank that a state can have, min(K, V, tokens)", "1"),
    "multiplier": ("multiplier on the delta rule's output o before its RMSNorm, √width", "1"),
    "mean_square": (
        "mean(o²) before the norm, without the multiplier; mean over tokens and heads",
        "1",
    ),
    "median_square": ("mean(o²) before the norm, without the multiplier; median over tokens and heads", "1"),
    "low_square": ("mean(o²) before the norm, without the multiplier; 1 % quantile over tokens and heads", "1"),
    "share_below_epsilon": ("share of (token, head) with mean(o²) < ε, without the multiplier", "1"),
    "loss": ("mean cross-entropy of the probe batch without the multiplier", "nat/token"),
    "loss_change": ("change of the loss when the multiplier is inserted, same parameters", "nat/token"),
    "trained_loss_change": ("loss after training with the multiplier minus after training without", "nat/token"),
    "gradient_change": ("‖change of the gradient when the multiplier is inserted‖ / ‖gradient‖, same parameters", "1"),
    "multipliers": ("factor on what a rule set gives, the same at every width", "1"),
    "class_gradient_change": ("`gradient_change` of one parameter class, all its layers together", "1"),
}

# Attributes that say where a job's numbers come from and need not agree between the jobs of a dataset.
PROVENANCE = ("commit", "versions", "device", "created")
# Attributes of a job that its dataset keeps, under a name of the job's own; its settings are in the study's.
_OF_A_JOB = (*PROVENANCE, "settings_hash", "reused", "learning_rate")
_JOB = "job_"
# Attributes that must agree: losses on different text or different batches cannot be compared.
_SHARED = ("corpus_sha256", "vocabulary_size")


def describe(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset with `long_name` and `units` on every variable and coordinate it has.

    Works for job files and for collected datasets. Raises KeyError for a variable that `DESCRIPTIONS` lacks.
    """
    described = dataset.copy()
    for name in described.variables:
        long_name, units = DESCRIPTIONS[str(name)]
        described[name].attrs.update(long_name=long_name, units=units)
    return described


def write(dataset: xr.Dataset, path: Path | str) -> None:
    """Write a compressed netCDF-4 file, to a temporary name and renamed when complete. Raises OSError."""
    described = describe(dataset)
    encoding: dict[Hashable, dict[str, Any]] = {
        name: {"zlib": True, "complevel": 4, "shuffle": True}
        for name, variable in described.variables.items()
        if variable.ndim > 0 and variable.dtype.kind in "fiub"  # scalars and strings cannot be chunked
    }
    # In memory first: HDF5 does not end cleanly on a disk that is full.
    content = described.to_netcdf(engine="h5netcdf", encoding=encoding)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


def open_dataset(path: Path | str, kind: DatasetKind) -> xr.Dataset:
    """Load a collected dataset of a study into memory.

    Raises UserError if the file is missing, is not netCDF, or is not a dataset of this kind.
    """
    variables = {name: _collected_dimensions(dimensions) for name, dimensions in JOB_VARIABLES[kind].items()}
    cure = f"`gdn-mup collect --kind {kind}` writes it"
    dataset = _read(Path(path), kind, variables, cure)
    if "base_width" not in dataset.attrs:
        raise UserError(f"{path}: lacks the attribute base_width; {cure}")
    return dataset


def open_job(path: Path | str, kind: DatasetKind, cure: str = "delete it and run the workflow again") -> xr.Dataset:
    """Load a job file into memory. Raises UserError like `open_dataset`."""
    job = _read(Path(path), kind, JOB_VARIABLES[kind], cure)
    absent = [name for name in JOB_COORDINATES if name not in job.coords]
    if absent or "settings_hash" not in job.attrs:
        raise UserError(f"{path}: lacks {', '.join(absent) or 'the attribute settings_hash'}; {cure}")
    if kind == "lr_sweep" and bool(job.members.isnull()) and "settings" in job.attrs:
        job = job.assign(_counted(job))
    return job


def kind_of(path: Path | str) -> DatasetKind:
    """Of a collected dataset. Raises UserError if the file is none."""
    path = Path(path)
    if path.is_file() and _is_collected(path):
        with xr.open_dataset(path, engine="h5netcdf") as dataset:
            if (kind := dataset.attrs.get("kind")) in JOB_VARIABLES:
                return kind
    raise UserError(f"{path}: not a dataset of a study; name one such as results/reference/h200/lr_sweep.nc")


def open_jobs(
    path: Path | str, kind: DatasetKind, cure: str = "delete it and run the workflow again"
) -> list[xr.Dataset]:
    """The job of a job file, or every job that a collected dataset holds, as their files have them.

    Numbers are those of the dataset, which keeps them in float32. Raises UserError like `open_dataset`.
    """
    if Path(path).is_file() and _is_collected(Path(path)):
        return list(_jobs_in(open_dataset(path, kind), Path(path), kind))
    return [open_job(path, kind, cure)]


def collect(paths: Sequence[Path | str], kind: DatasetKind, study: Study) -> xr.Dataset:
    """Every job of a kind as one dataset with growth, optimizer, width and seed as dimensions.

    Paths are those of job files, and of datasets that were collected before, whose jobs are taken where no file has
    them. A partial study is collected as far as it goes: what is missing is NaN and listed in `missing_jobs`.
    Raises UserError if a file cannot be read, is of another kind, was run with other settings than the
    study's, was trained on another corpus than its fellows, or describes the same job as another file.
    """
    if not paths:
        raise UserError(f"no {kind} job files to collect; `gdn-mup plan` lists those the study asks for")
    collected = [path for path in map(Path, paths) if path.is_file() and _is_collected(path)]
    jobs: dict[Job, tuple[Path, xr.Dataset]] = {}
    for path in (path for path in map(Path, paths) if path not in collected):
        dataset = open_job(path, kind)
        job = job_of(dataset, kind)
        _check_settings(path, job, dataset, study)
        if job in jobs:
            raise UserError(f"{path}: the same job as {jobs[job][0]}; give only one of the two")
        jobs[job] = (path, dataset)
    for path in collected:
        for dataset in _jobs_in(open_dataset(path, kind), path, kind):
            job = job_of(dataset, kind)
            _check_settings(path, job, dataset, study)
            jobs.setdefault(job, (path, dataset))
    _check_shared(jobs.values())

    return combine([dataset for _, dataset in jobs.values()], kind, study)


def combine(job_datasets: Sequence[xr.Dataset], kind: DatasetKind, study: Study) -> xr.Dataset:
    """`collect` for job files that are in memory already, all of them the study's."""
    by_job = {job_of(dataset, kind): dataset for dataset in job_datasets}
    planned = study.jobs(kind)
    ordered = [by_job[job] for job in planned if job in by_job]
    missing = [job.path for job in planned if job not in by_job]
    collected = xr.Dataset(
        {name: _stack(name, kind, ordered) for name in JOB_VARIABLES[kind]},
        attrs=_attributes(ordered, kind, study, missing),
    )
    if kind in ("coordinates", "multiplier"):  # trained at one learning rate
        rates = _empty(("growth", "optimizer"), _labels(ordered))
        for dataset in ordered:
            rates.loc[_position(dataset, ("growth", "optimizer"))] = dataset.attrs["learning_rate"]
        collected["learning_rate"] = rates
    return describe(collected)


def _is_collected(path: Path) -> bool:
    """Whether a file is a dataset of a study, not of one job."""
    try:
        with xr.open_dataset(path, engine="h5netcdf") as dataset:
            return "base_width" in dataset.attrs
    except Exception:  # whoever reads it whole says what is wrong
        return False


def _jobs_in(dataset: xr.Dataset, path: Path, kind: DatasetKind) -> Iterator[xr.Dataset]:
    study = Study.model_validate(json.loads(dataset.attrs["settings"]))
    kept = {name: value for name, value in dataset.attrs.items() if str(name).startswith(_JOB)}
    if not kept:
        raise UserError(f"{path}: does not say of its jobs where they come from; name the job files themselves")
    for name, value in kept.items():
        attributes = json.loads(value)
        where = attributes.pop("job")
        job = dataset.sel(where)
        for dimension in job.dims:  # what others have and this job has not
            there = [
                variable.notnull().any([name for name in variable.dims if name != dimension]).values
                for variable in job.values()
                if dimension in variable.dims
            ]
            job = job.isel({dimension: np.logical_or.reduce(there)})
        wanted = Job(kind, **where)
        settings = study.settings_of(wanted)
        if attributes["settings_hash"] != settings_hash(settings):
            raise UserError(f"{path}: {name}: not of the study whose settings the dataset has; collect it again")
        if "diverged" in job:
            job["diverged"] = job.diverged.astype(np.int8)
        variables = {name: job[name].transpose(*dimensions) for name, dimensions in JOB_VARIABLES[kind].items()}
        shared = {name: dataset.attrs[name] for name in _SHARED if name in dataset.attrs}
        yield xr.Dataset(variables, attrs=attributes | shared | {"settings": json.dumps(settings, sort_keys=True)})


def _read(path: Path, kind: str, variables: Mapping[str, tuple[str, ...]], cure: str) -> xr.Dataset:
    if not path.is_file():
        raise UserError(f"{path}: no such file; {cure}")
    try:
        dataset = xr.load_dataset(path, engine="h5netcdf")
    except Exception as error:  # h5py, h5netcdf and xarray each raise their own for a broken file
        raise UserError(f"{path}: not a readable netCDF-4 file ({type(error).__name__}); {cure}") from None
    unreported = [name for name in COSTS if name not in dataset and set(variables[name]) <= dataset.sizes.keys()]
    dataset = dataset.assign({name: _empty(variables[name], dataset.coords) for name in unreported})
    for name, dimensions in variables.items():
        if name not in dataset.data_vars:
            raise UserError(f"{path}: not a {kind} file: it has no variable `{name}`; {cure}")
        if dataset[name].dims != dimensions:
            found = ", ".join(map(str, dataset[name].dims))
            raise UserError(f"{path}: `{name}` has dimensions ({found}), not ({', '.join(dimensions)}); {cure}")
    return dataset


def _counted(sweep: xr.Dataset) -> dict[str, int]:
    """The counts among `COSTS` of a sweep's file that has none, from its losses and settings.

    Rule sets that coincide were trained once and have the same losses.
    """
    training = json.loads(sweep.attrs["settings"])["training"]
    losses = sweep.train_loss.transpose("rules", ...).values
    first = list({rules.tobytes(): i for i, rules in reversed(list(enumerate(losses)))}.values())
    batch = training["batch_size"] * training["context_length"]
    return {
        "members": len(first) * sweep.sizes["learning_rate"],
        "diverged_members": int(sweep.diverged.transpose("rules", ...).values[first].sum()),
        "evaluated_tokens": sweep.sizes["evaluation_step"] * training["evaluation_batches"] * batch,
    }


def job_of(dataset: xr.Dataset, kind: DatasetKind) -> Job:
    """Which job of a study a job's dataset is."""
    growth, optimizer = (str(dataset[name].item()) for name in ("growth", "optimizer"))
    return Job(kind, growth, optimizer, int(dataset.width), int(dataset.seed))  # type: ignore[arg-type]


def _check_settings(path: Path, job: Job, dataset: xr.Dataset, study: Study) -> None:
    try:
        expected = settings_hash(study.settings_of(job))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    found = dataset.attrs["settings_hash"]
    if found != expected:
        raise UserError(
            f"{path}: settings_hash {found} is not the study's {expected}: it was run with other settings; "
            "delete it and run the workflow again, or collect with the study file it was run with"
        )


def _check_shared(jobs: Iterable[tuple[Path, xr.Dataset]]) -> None:
    (first_path, first), *others = jobs
    for path, dataset in others:
        for name in _SHARED:
            if dataset.attrs.get(name) != first.attrs.get(name):
                raise UserError(
                    f"{path}: {name} {dataset.attrs.get(name)} differs from {first.attrs.get(name)} in "
                    f"{first_path}: trained on another corpus; delete the one that is out of date and rerun it"
                )


def _collected_dimensions(job_dimensions: Iterable[str]) -> tuple[str, ...]:
    wanted = {*job_dimensions, *JOB_COORDINATES}
    return tuple(name for name in DIMENSION_ORDER if name in wanted)


def _labels(datasets: Sequence[xr.Dataset]) -> dict[str, np.ndarray]:
    """The union of each coordinate's values over all jobs, in the order of the dataset."""
    labels: dict[str, np.ndarray] = {}
    for name in DIMENSION_ORDER:
        values = [value for d in datasets if name in d.coords for value in np.atleast_1d(d[name].values).tolist()]
        distinct = list(dict.fromkeys(values))
        if name in NAME_ORDER:
            distinct.sort(key=NAME_ORDER[name].index)
        elif distinct and not isinstance(distinct[0], str):
            distinct.sort()
        labels[name] = np.array(distinct, dtype=object if distinct and isinstance(distinct[0], str) else None)
    return labels


def _empty(dimensions: Sequence[str], labels: Mapping[Any, Any], dtype: Any = np.float64) -> xr.DataArray:
    coordinates = {name: np.asarray(labels[name]) for name in dimensions}
    shape = [len(values) for values in coordinates.values()]
    return xr.DataArray(np.full(shape, np.nan, dtype), coords=coordinates, dims=list(dimensions))


def _position(dataset: xr.Dataset, dimensions: Iterable[str]) -> dict[str, Any]:
    return {name: dataset[name].values if dataset[name].ndim else dataset[name].item() for name in dimensions}


def _stack(name: str, kind: DatasetKind, datasets: Sequence[xr.Dataset]) -> xr.DataArray:
    """One variable of all jobs: the outer join of their coordinates, NaN where nothing was run."""
    dimensions = _collected_dimensions(JOB_VARIABLES[kind][name])
    dtype = np.float64 if name in COSTS else np.float32  # float32 would round token counts
    stacked = _empty(dimensions, _labels(datasets), dtype)
    for dataset in datasets:
        stacked.loc[_position(dataset, dimensions)] = dataset[name].values
    return stacked


def _attributes(datasets: Sequence[xr.Dataset], kind: DatasetKind, study: Study, missing: list[str]) -> dict[str, Any]:
    """Attributes of a dataset. Lists and mappings are JSON, since netCDF attributes are flat."""
    settings = study.model_dump(mode="json")
    attributes: dict[str, Any] = {
        "title": {
            "lr_sweep": "Learning-rate sweeps of Gated Delta Networks over width",
            "coordinates": "Coordinate sizes of Gated Delta Networks over width",
            "multiplier": "Gated Delta Networks with and without a multiplier before the output norm",
            "clipping": "Learning-rate sweeps of Gated Delta Networks over width, by how gradients are clipped",
            "tuning": "Random search over multipliers of Gated Delta Networks, the same trials at every width",
        }[kind],
        "kind": kind,
        "base_width": study.model.base_width,
        "settings": json.dumps(settings, sort_keys=True),
        "settings_hash": settings_hash(settings),
        "missing_jobs": json.dumps(missing),
    }
    for dataset in datasets:  # an attribute each, since netCDF's end at 64 kB
        where = {name: dataset[name].item() for name in JOB_COORDINATES}
        own = {name: value for name, value in dataset.attrs.items() if name in _OF_A_JOB}
        attributes[_JOB + Path(job_of(dataset, kind).path).stem] = json.dumps({"job": where, **own})
    for name in _SHARED:
        if name in datasets[0].attrs:
            attributes[name] = datasets[0].attrs[name]
    sources = [source for dataset in datasets for source in _sources(dataset.attrs)]
    for name in PROVENANCE:
        values = sorted({str(source[name]) for source in sources if name in source})
        if values:
            attributes[name] = values[0] if len(values) == 1 else json.dumps(values)
    return attributes


def _sources(attributes: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The provenance of a job, and of the runs that it took over from others' files."""
    yield attributes
    for reused in json.loads(attributes.get("reused", "[]")):
        yield from _sources(reused)
