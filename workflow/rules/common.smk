# Everything in Python that the rules need: what a study asks for, and the settings that each job depends on.
import glob
import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import NoReturn, get_args

from snakemake.cli import parse_config

from gdn_mup.corpus.patterns import matching_files
from gdn_mup.errors import UserError, end
from gdn_mup.model.config import GrowthMode
from gdn_mup.study.comparison import Comparison, load_comparison
from gdn_mup.study.plan import Job, Study, load_study
from gdn_mup.study.regime import regime_in_words
from gdn_mup.training.config import OptimizerName
from gdn_mup.training.devices import parse_device
from gdn_mup.training.gpu_slots import usable_gpus

# Jobs find the commands of the environment that Snakemake runs in, activated or not.
os.environ.update(PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]))

# Two jobs of one thread beat one job of two: a small model leaves a second thread mostly waiting.
# Snakemake hands this on as OMP_NUM_THREADS and its kin.
TRAINING_THREADS = 1

# Of sweeps, searches and clipping checks, whose jobs are the longest: they start first, so that no core waits at the end
# for one that began last.
LONG_JOB = 1

KINDS = ("lr_sweep", "coordinates", "multiplier", "tuning", "clipping")  # of experiments, and of their datasets
EVIDENCE = tuple(kind for kind in KINDS if kind != "clipping")  # what the claims are judged on


STUDY_NAME = r"[A-Za-z0-9_-]+"


wildcard_constraints:
    study=STUDY_NAME,
    growth="|".join(get_args(GrowthMode)),
    optimizer="|".join(get_args(OptimizerName)),
    width=r"\d+",
    seed=r"\d+",
    comparison=r"[A-Za-z0-9_-]+",


@cache
def get_study(name: str) -> Study:
    """The study of that name; its file's first mistake, as one line, ends the run."""
    path = f"config/studies/{name}.yaml"
    if not re.fullmatch(STUDY_NAME, name):
        stop(UserError(f"{path}: a study's name is of letters, digits, `-` and `_`; rename the file"))
    if (read := str(get_value(name))) != name:
        stop(UserError(f"{path}: Snakemake reads this name as {read}; rename the file, e.g. study_{name}.yaml"))
    try:
        return load_study(path)
    except (UserError, OSError) as error:
        stop(error)


def get_value(text: str):
    """What Snakemake takes for the value in `--config study=text`: numbers and truth values where it can."""
    return parse_config([f"study={text}"])["study"]


def stop(error: Exception) -> NoReturn:
    """End the run as `gdn-mup` does: one line, and its exit code."""
    end(error)
    raise error


def get_corpus_files(wildcards) -> list[str]:
    """What a corpus is made of: the user's own documents, or the packages. When one changes, it is built again."""
    if get_study(wildcards.study).corpus.source == "pypi":
        return [f"results/{wildcards.study}/corpus/downloads/packages.json"]
    try:
        return [str(path) for path in matching_files(get_study(wildcards.study).corpus.files, Path())]
    except UserError as error:
        stop(error)


def get_corpus_threads(wildcards) -> int:
    """The tokenizer takes what there is; only for a streamed dataset does it matter."""
    return 16 if get_study(wildcards.study).corpus.source == "huggingface" else 2


def get_corpus_runtime(wildcards) -> int:
    """Minutes: a streamed dataset may hold tens of gigabytes, at some 2.5 MB/s a core."""
    return 1440 if get_study(wildcards.study).corpus.source == "huggingface" else 30


def get_corpus_settings(wildcards) -> dict:
    return get_study(wildcards.study).corpus.model_dump(mode="json")


def get_job_settings(kind: str):
    """For `params`: exactly the settings that one job depends on, so that a changed key reruns only what it touches."""

    def get_settings(wildcards) -> dict:
        job = Job(kind, wildcards.growth, wildcards.optimizer, int(wildcards.width), int(wildcards.seed))
        try:
            return get_study(wildcards.study).settings_of(job)
        except UserError as error:
            stop(error)

    return get_settings


@cache
def count_usable_gpus() -> int:
    """GPUs of this machine that jobs may use."""
    try:
        return len(usable_gpus())
    except UserError as error:
        stop(error)


for key in config:
    if key not in ("study", "device", "runs"):
        stop(UserError(f"config: {key}: unknown key; use study, device or runs"))
STUDY = str(config["study"])
for path in sorted(Path("config/studies").glob("*.yaml")):
    value = get_value(path.stem)
    if path.stem != STUDY and type(value) is type(config["study"]) and value == config["study"]:
        stop(UserError(f"{path}: Snakemake reads this name as {value}; rename the file, e.g. study_{path.name}"))
if config["runs"] not in ("own", "reference"):
    stop(UserError(f"config: runs: {config['runs']!r}: use own or reference"))
PUBLISHED = config["runs"] == "reference"  # datasets are the published ones, not those of this machine's own jobs
try:
    DEVICE = parse_device(str(config["device"]), "config: device")
except UserError as error:
    stop(error)
if workflow.is_main_process and workflow.nodes is None:
    # As many jobs run at once as this machine has GPUs, unless `--resources gpu=N` says otherwise; each takes one of its
    # own (training/gpu_slots.py).
    if DEVICE.kind != "cpu" and "gpu" not in workflow.global_resources and count_usable_gpus():
        workflow.register_resource("gpu", count_usable_gpus())
elif workflow.is_main_process and DEVICE.kind == "auto":
    stop(UserError("config: device: 'auto': jobs run on other machines than this one; use cuda or cpu"))


def get_gpus(wildcards) -> int:
    """GPUs that a training job asks for: with device `auto` one, where this machine has any."""
    return DEVICE.number if DEVICE.kind == "cuda" or DEVICE.kind == "auto" and count_usable_gpus() else 0


def get_training_memory(wildcards) -> int:
    """MB of main memory; CUDA's libraries alone take some."""
    return 6000 * get_gpus(wildcards) or 1500 * DEVICE.number


def get_job_files(kind: str):
    """For `input`: the files of every job of that kind, the widest first."""

    def get_files(wildcards) -> list[str]:
        return [f"results/{wildcards.study}/{job.path}" for job in get_study(wildcards.study).jobs(kind)]

    return get_files


def check_base_width(path: str, study: Study) -> None:
    """Stop if nothing of a published dataset was run at the base width."""
    import xarray

    with xarray.open_dataset(path, engine="h5netcdf") as dataset:
        missing = json.loads(dataset.attrs["missing_jobs"])
    if all(job.path in missing for job in study.jobs("lr_sweep") if job.width == study.model.base_width):
        stop(
            UserError(
                f"{path}: nothing was run at the base width ({study.model.base_width}) yet, whose best learning rate "
                "every figure carries upward; open the dataset with xarray, or run the study"
            )
        )


def get_kinds(name: str) -> list[str]:
    """The kinds of datasets that there are of a study: those of its experiments, or those that are published."""
    if not PUBLISHED:
        return [kind for kind in KINDS if get_study(name).jobs(kind)]
    kinds = [kind for kind in KINDS if os.path.isfile(f"results/reference/{name}/{kind}.nc")]
    if not kinds:
        published = sorted({os.path.basename(os.path.dirname(path)) for path in glob.glob("results/reference/*/*.nc")})
        stop(
            UserError(
                f"config: runs: no datasets of study {name} are published in results/reference/{name}; "
                f"there are those of: {', '.join(published) or 'none'}"
            )
        )
    if "lr_sweep" in kinds:
        check_base_width(f"results/reference/{name}/lr_sweep.nc", get_study(name))
    return kinds


def get_datasets(kinds: tuple[str, ...]):
    """For `input`: the datasets of these kinds that the study has, by kind."""

    def get_files(wildcards) -> dict[str, str]:
        name = wildcards.study
        return {kind: f"results/{name}/datasets/{kind}.nc" for kind in get_kinds(name) if kind in kinds}

    return get_files


def get_parameters_of(kinds: tuple[str, ...]):
    """As `get_parameters`, with an empty path for those of these kinds of experiments that the study does not have."""

    def get_them(wildcards, input, output) -> list[str]:
        missing = [f"{kind}=" for kind in kinds if kind not in input.keys()]
        return [*missing, *get_parameters(wildcards, input, output)]

    return get_them


def get_parameters(wildcards, input, output) -> list[str]:
    """A notebook's parameters: the datasets that it is given, and where its products go (a path without suffix)."""
    datasets = [f"{name}={input[name]}" for name in KINDS if name in input.keys()]
    return [*datasets, f"output={os.path.splitext(output.csv)[0]}"]


def get_regime(wildcards) -> str:
    """For captions: how long a study's models train for their size."""
    return regime_in_words(get_study(wildcards.study))


@cache
def get_comparison(name: str) -> Comparison:
    """The comparison of that name; its file's first mistake, as one line, ends the run."""
    try:
        return load_comparison(f"config/comparisons/{name}.yaml")
    except (UserError, OSError) as error:
        stop(error)


def get_compared_datasets(wildcards) -> dict[str, str]:
    """For `input`: the learning-rate sweeps of every study that a comparison names, by study."""
    studies = get_comparison(wildcards.comparison).studies
    return {name: f"results/{name}/datasets/lr_sweep.nc" for name in studies}


def get_transfer_labels(wildcards) -> dict[str, str]:
    """How the report names a transfer figure."""
    title = {"adamw": "AdamW", "sgd": "SGD"}[wildcards.optimizer]
    return {"figure": f"Learning-rate transfer, {title}"}


def has_both_growth_modes(study: Study) -> bool:
    """Whether any rule set has learning-rate sweeps in both growth modes under the same optimizer."""
    swept = [(sweep.optimizer, rules) for sweep in study.sweeps for rules in sweep.rules]
    return len(set(swept)) < len(swept)


def shows_training(study: Study) -> bool:
    """Whether any learning-rate sweep is evaluated more than once after init."""
    return any(len(study.training_of(sweep).evaluation_steps) > 2 for sweep in study.sweeps)


def get_products(name: str) -> list[str]:
    """Every figure and table for which the study has the experiments."""
    study, kinds = get_study(name), get_kinds(name)
    figures, tables = [], ["scaling_rules"]
    if "coordinates" in kinds:
        figures += ["coordinate_check", "gate_dynamics"]
        if any(len(check.widths) > 1 for check in study.coordinate_checks):
            figures += ["predicted_exponents", "gate_gradients"]
    if "multiplier" in kinds:
        figures += ["norm_epsilon"]
    if "clipping" in kinds:
        figures += ["clipping"]
    if "tuning" in kinds:
        figures += ["base_width_tuning"]
    if "lr_sweep" in kinds:
        figures += [f"lr_transfer_{sweep.optimizer}" for sweep in study.sweeps]
        figures += ["optimum_vs_width", "loss_vs_width", "training_curves", "published_losses", "clipped_updates"]
        if has_both_growth_modes(study):
            figures += ["growth_modes"]
        if shows_training(study):
            figures += ["transfer_over_training"]
        tables += ["optima", "transfer_metrics"]
    if set(kinds) & set(EVIDENCE):
        tables += ["verdicts"]
    if kinds:
        tables += ["cost"]
    return [
        f"results/{name}/{product}"
        for product in [
            *(f"figures/{figure}.{suffix}" for figure in dict.fromkeys(figures) for suffix in ("svg", "png", "csv")),
            *(f"tables/{table}.{suffix}" for table in tables for suffix in ("csv", "md", "tex", "html")),
        ]
    ]
