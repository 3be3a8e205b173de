"""The command line: what the workflow's rules call, and what works by hand."""

import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from gdn_mup import __version__
from gdn_mup.checks import commands
from gdn_mup.errors import TRACEBACK, MachineError, UserError, end
from gdn_mup.interrupt import raised_signals
from gdn_mup.output_lock import alone_at

if TYPE_CHECKING:  # torch and xarray take seconds to import: only the commands that train pay for them
    import pandas as pd
    import xarray as xr
    from rich.console import Console

    from gdn_mup.progress import Report
    from gdn_mup.study.plan import Job, Study
    from gdn_mup.training.config import TrainingSettings
    from gdn_mup.training.energy import Spent
    from gdn_mup.training.parallel import Processes

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="How the hyperparameters of Gated Delta Networks scale with width.\n\n"
    "The workflow runs these commands for you: `snakemake --cores all`. By hand, one job of a study is\n\n"
    "`gdn-mup corpus --study config/studies/smoke.yaml --output /tmp/corpus`\n\n"
    "`gdn-mup plan --study config/studies/smoke.yaml`\n\n"
    "`gdn-mup sweep --study config/studies/smoke.yaml --corpus /tmp/corpus --growth heads --optimizer adamw "
    "--width 32 --seed 0 --output /tmp/job.nc`\n\n"
    "Start with `gdn-mup rules` to see how each rule set scales each parameter.\n\n"
    "A command that fails says why in one line. Its exit code is 2 (bad input), 3 (the machine: disk, memory, GPU, "
    f"network) or 75 (interrupted: run it again); {TRACEBACK}=1 adds the traceback.",
)

logger = logging.getLogger(__name__)

# Kinds of jobs; a coordinate check measures in float32, sizes as small as a gate's gradient.
TRAINED_BY_KERNELS = ("lr_sweep", "clipping", "tuning")
CHECKPOINT_SECONDS = 120.0

StudyFile = Annotated[Path, typer.Option("--study", help="Study file, such as config/studies/laptop.yaml.")]
Output = Annotated[Path, typer.Option(help="Written when complete; an existing file is replaced.")]
CorpusFolder = Annotated[Path, typer.Option("--corpus", help="Folder that `gdn-mup corpus` wrote.")]
GrowthOption = Annotated[str, typer.Option(help="`heads` or `head_dim`: what grows with width.")]
OptimizerOption = Annotated[str, typer.Option(help="`adamw` or `sgd`.")]
WidthOption = Annotated[int, typer.Option(help="Width of the residual stream.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the init and of the order of the data.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Where a killed job leaves off and goes on; beside the output by default.")
]
CheckpointSeconds = Annotated[
    float, typer.Option(min=0, help="Seconds between checkpoints: what a job that is killed loses at most.")
]
MicroBatches = Annotated[
    int,
    typer.Option(
        min=1,
        help="Parts of a batch that follow one another, to take less memory. GPUs that run out of it take more parts.",
    ),
]
Reuse = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Sweep of this or another study, as a job file or in a dataset, that differs from this job in rules and "
        "learning_rates alone: what it has of this job's runs is not trained again. May be given several times.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; the libraries' own choice by default.")]
Device = Annotated[
    str,
    typer.Option(
        help="`cpu`, `cuda`, or `auto`: an NVIDIA GPU if there is one. `2xcuda`: two that train one job together."
    ),
]


def main() -> None:
    """Run the command line. What fails is one line on standard error, with the exit codes of docs/reliability.md."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # Greek letters and × on a terminal that has none
    os.environ["MPLBACKEND"] = "agg"  # figures are files here, whatever backend the user has for windows
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        with raised_signals():
            app()
    except BaseException as error:
        end(error)
        raise


def _one_at_a_time(kind: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Commands that make `output`, each alone.

    A job of this kind that another process has made meanwhile is taken as it is.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**arguments: Any) -> None:
            if os.environ.get("RANK", "0") != "0":  # of several processes that make it together the first one has it
                return command(**arguments)
            with alone_at(arguments["output"]) as made:
                if made and kind and "RANK" not in os.environ and _is_job(kind, **arguments):
                    logger.info("%s: another process has just made it, by the same settings", arguments["output"])
                else:
                    command(**arguments)

        return run

    return decorate


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


app.command(context_settings=commands.MORE_WIDTHS)(commands.check)
app.command(context_settings=commands.MORE_WIDTHS)(commands.transfer)


@app.command()
def plan(study: StudyFile) -> None:
    """List the jobs that a study asks for, with the members that each trains side by side."""
    from rich.table import Table

    from gdn_mup.study.plan import SECTIONS, Measurement, load_study, settings_hash

    loaded = load_study(study)
    table = Table("kind", "growth", "optimizer", "width", "seed", "members", "steps", "settings", title=str(study))
    for kind in SECTIONS:
        for job in loaded.jobs(kind):
            experiment = loaded.experiment_of(job)
            members = len(experiment.rules) * loaded.models_of(job)
            steps = (
                max(experiment.steps) if isinstance(experiment, Measurement) else loaded.training_of(experiment).steps
            )
            cells = (*job, members, steps, settings_hash(loaded.settings_of(job)))
            table.add_row(*map(str, cells))
    _console().print(table)


@app.command()
def cost(
    study: StudyFile,
    measured: Annotated[
        Path, typer.Option(help="A dataset of learning-rate sweeps that were run: how fast the device is.")
    ] = Path("results/reference/h200/lr_sweep.nc"),
) -> None:
    """Predict what a study costs: its FLOPs, counted, and hours and energy at the speed of sweeps that were run.

    Coordinate and multiplier checks, which train in float32 and float64, take several times what is predicted.
    """
    from gdn_mup.study.cost import planned_costs
    from gdn_mup.study.datasets import open_dataset
    from gdn_mup.study.plan import load_study
    from gdn_mup.study.tables import printed_costs

    loaded = load_study(study)
    dataset = open_dataset(measured, "lr_sweep")
    table = planned_costs(loaded, lambda job: _rules_trained(loaded, job), dataset)
    printed = printed_costs(table).drop(columns=["diverged", "device"])
    speed = f"{table.device.iloc[0]} at widths {dataset.width.values.min()} to {dataset.width.values.max()}"
    _show(printed, f"{study}, at the speed of {speed}")


def _rules_trained(study: "Study", job: "Job") -> int:
    """How many rule sets of a job are trained; those that coincide are trained once."""
    from gdn_mup.training.sweep import distinct_members, scaled_model

    experiment = study.experiment_of(job)
    if job.kind not in TRAINED_BY_KERNELS:
        return len(experiment.rules)
    scaled = scaled_model(
        study.model, job.width, job.growth, study.corpus.vocabulary_size, experiment.rules, job.optimizer
    )
    members, _ = distinct_members(scaled, [0.0], study.training_of(experiment).clipping)
    return len(members)


@app.command()
def rules(
    growth: Annotated[str | None, typer.Option(help="Only `heads` or only `head_dim`.")] = None,
) -> None:
    """Show how each rule set scales each parameter, as powers of m = width / base width, next to the paper's."""
    from gdn_mup.study.tables import printed_scaling_rules, scaling_rules, variants

    table = scaling_rules()
    if growth is not None:
        if growth not in set(table.growth):
            raise UserError(f"--growth: {growth!r}: use {' or '.join(dict.fromkeys(table.growth))}")
        table = table[table.growth == growth]
    printed = printed_scaling_rules(table)
    _show(printed, "Multipliers between the base width and m times that width")
    _show(variants(), "Variants: what they multiply otherwise")


@app.command()
@_one_at_a_time()
def corpus(
    study: StudyFile,
    output: Annotated[Path, typer.Option(help="Folder for tokenizer, tokens and their sidecars.")],
) -> None:
    """From text to tokens: deduplicate, split by document, learn the vocabulary, encode."""
    from gdn_mup.corpus.build import build_corpus
    from gdn_mup.study.plan import load_study

    build_corpus(load_study(study).corpus, Path.cwd(), output)


@app.command()
@_one_at_a_time()
def fetch(
    study: StudyFile,
    output: Annotated[Path, typer.Option(help="Folder for the packages and packages.json.")],
) -> None:
    """Fetch the packages that a study's corpus is made of (source `pypi`); those already there stay."""
    from gdn_mup.corpus.pypi import fetch as fetch_packages
    from gdn_mup.study.plan import load_study

    settings = load_study(study).corpus
    if settings.source != "pypi":
        raise UserError(f"{study}: corpus.source: {settings.source!r}: only source `pypi` has packages to fetch")
    fetch_packages(Path(settings.requirements), output)


@app.command()
@_one_at_a_time("lr_sweep")
def sweep(
    study: StudyFile,
    corpus: CorpusFolder,
    growth: GrowthOption,
    optimizer: OptimizerOption,
    width: WidthOption,
    seed: SeedOption,
    output: Output,
    reuse: Reuse = None,
    checkpoint: Checkpoint = None,
    checkpoint_seconds: CheckpointSeconds = CHECKPOINT_SECONDS,
    micro_batches: MicroBatches = 1,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Train every rule set and learning rate of one width, side by side, on the same batches."""
    planned = _planned(study, "lr_sweep", growth, optimizer, width, seed)
    ready = _prepare(planned, corpus, threads, device, output, reuse or ())
    checkpoint = checkpoint or _checkpoint_beside(output)
    swept = _whole_sweep(planned, ready, checkpoint, checkpoint_seconds, micro_batches)
    _write_job(swept.isel(trial=0), planned, ready, output, [checkpoint])


@app.command()
@_one_at_a_time("tuning")
def tune(
    study: StudyFile,
    corpus: CorpusFolder,
    growth: GrowthOption,
    optimizer: OptimizerOption,
    width: WidthOption,
    seed: SeedOption,
    output: Output,
    checkpoint: Checkpoint = None,
    checkpoint_seconds: CheckpointSeconds = CHECKPOINT_SECONDS,
    micro_batches: MicroBatches = 1,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Train every trial of a random search over multipliers at one width, side by side, on the same batches."""
    import pandas as pd

    from gdn_mup.study.datasets import JOB_VARIABLES

    planned = _planned(study, "tuning", growth, optimizer, width, seed)
    ready = _prepare(planned, corpus, threads, device, output)
    checkpoint = checkpoint or _checkpoint_beside(output)
    trained = _whole_sweep(planned, ready, checkpoint, checkpoint_seconds, micro_batches)
    multipliers = pd.DataFrame(planned.experiment.multipliers).rename_axis(index="trial", columns="hyperparameter")
    final = trained.val_loss.isel(evaluation_step=-1, drop=True).where(trained.diverged == 0)
    dataset = trained.assign(final_loss=final, multipliers=multipliers)
    _write_job(dataset[list(JOB_VARIABLES["tuning"])], planned, ready, output, [checkpoint])


@app.command()
@_one_at_a_time("coordinates")
def coordinates(
    study: StudyFile,
    corpus: CorpusFolder,
    growth: GrowthOption,
    optimizer: OptimizerOption,
    width: WidthOption,
    seed: SeedOption,
    output: Output,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Measure the sizes of activations, gradients and updates of one width over a few steps."""
    import numpy as np
    import torch

    from gdn_mup.measurement.coordinates import coordinate_check
    from gdn_mup.model.language_model import OUTSIDE_BLOCKS
    from gdn_mup.progress import progress
    from gdn_mup.training.energy import Meter
    from gdn_mup.training.sweep import Member

    planned = _planned(study, "coordinates", growth, optimizer, width, seed)
    check, training = planned.experiment, planned.training
    ready = _prepare(planned, corpus, threads, device, output)
    members = [Member(rules, check.learning_rate) for rules in check.rules]
    trainer = ready.make_trainer(members)
    probe = ready.validation.fixed_batches(1, check.probe_sequences, training.context_length)[0, :, :-1]
    meter = Meter(ready.device)
    with progress(_title(planned.job), max(check.steps) + 1) as report:
        sizes = coordinate_check(trainer, members, check.steps, torch.from_numpy(probe), report)
    sizes.attrs["learning_rate"] = check.learning_rate
    ended = sizes.rms.isel(step=-1).sel(quantity="logits", layer=OUTSIDE_BLOCKS)
    costs = _costs(
        meter.read(),
        members=len(members),
        diverged_members=int((~np.isfinite(ended)).sum()),
        tokens=planned.study.tokens_of(planned.job),
    )
    _write_job(sizes.assign(costs), planned, ready, output)


@app.command()
@_one_at_a_time("multiplier")
def multiplier(
    study: StudyFile,
    corpus: CorpusFolder,
    growth: GrowthOption,
    width: WidthOption,
    seed: SeedOption,
    output: Output,
    optimizer: OptimizerOption = "adamw",
    threads: Threads = None,
) -> None:
    """Compare a model with itself with √width inserted before the delta rule's output norm, in float64 on the CPU."""
    import numpy as np
    import torch

    from gdn_mup.measurement.multiplier import multiplier_check
    from gdn_mup.progress import progress
    from gdn_mup.training.energy import Meter
    from gdn_mup.training.sweep import Member, Trainer

    planned = _planned(study, "multiplier", growth, optimizer, width, seed)
    check, training = planned.experiment, planned.training
    ready = _prepare(planned, corpus, threads, "cpu", output)
    probe = ready.validation.fixed_batches(1, check.probe_sequences, training.context_length)[0]

    def make_trainer(members: Sequence[Member], epsilon: float) -> Trainer:
        model = planned.study.model.model_copy(update={"norm_epsilon": epsilon})
        trainer: Trainer = ready.make_trainer(members, model=model, dtype=torch.float64)
        return trainer

    meter = Meter(ready.device)
    with progress(_title(planned.job), len(check.epsilons) * (max(check.steps) + 1)) as report:
        changes = multiplier_check(
            make_trainer,
            [Member(rules, check.learning_rate) for rules in check.rules],
            check.inits,
            check.kernel_scales,
            check.epsilons,
            check.steps,
            torch.from_numpy(probe),
            report,
        )
    changes.attrs["learning_rate"] = check.learning_rate
    last = changes.isel(step=-1)
    ended = np.stack([last.loss, last.loss + last.trained_loss_change])  # of the models without and with multiplier
    costs = _costs(
        meter.read(),
        members=ended.size,
        diverged_members=int((~np.isfinite(ended)).sum()),
        tokens=planned.study.tokens_of(planned.job),
    )
    _write_job(changes.assign(costs), planned, ready, output)


@app.command()
@_one_at_a_time("clipping")
def clipping(
    study: StudyFile,
    corpus: CorpusFolder,
    growth: GrowthOption,
    width: WidthOption,
    seed: SeedOption,
    output: Output,
    optimizer: OptimizerOption = "sgd",
    checkpoint_seconds: CheckpointSeconds = CHECKPOINT_SECONDS,
    micro_batches: MicroBatches = 1,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Train a learning-rate sweep of one width under each way to clip gradients, on the same batches."""
    import xarray as xr

    from gdn_mup.progress import progress
    from gdn_mup.study.datasets import COSTS, JOB_VARIABLES

    planned = _planned(study, "clipping", growth, optimizer, width, seed)
    check = planned.experiment
    ready = _prepare(planned, corpus, threads, device, output)
    checkpoints = [_checkpoint_beside(output, f".{name}") for name in check.clippings]
    swept: list[xr.Dataset] = []
    with progress(_title(planned.job), len(check.clippings), shown=ready.processes.leads) as report:
        for name, checkpoint in zip(check.clippings, checkpoints, strict=True):
            training = planned.training.model_copy(update={"clipping": name})
            part_report = _part_of(report, len(swept), name)
            part = _sweep(planned, ready, training, part_report, checkpoint, checkpoint_seconds, micro_batches)
            swept.append(part.isel(trial=0))
    dataset = xr.concat(swept, xr.Variable("clipping", list(check.clippings)))
    # Every member has its own tokens, and the rest adds up.
    spent = {name: dataset[name].sum(skipna=False) for name in COSTS} | {
        name: dataset[name][0] for name in ("tokens", "evaluated_tokens")
    }
    dataset = dataset.assign(spent)[list(JOB_VARIABLES["clipping"])].transpose("rules", "clipping", ...)
    _write_job(dataset, planned, ready, output, checkpoints)


@app.command("warm-up")
def warm_up(
    study: Annotated[
        Path | None, typer.Option("--study", help="Compile the kernels of every sweep and search of this study.")
    ] = None,
    pack: Annotated[Path | None, typer.Option(help="Write this machine's compiled kernels to this file.")] = None,
    unpack: Annotated[Path | None, typer.Option(help="First add the kernels of such a file to this machine's.")] = None,
) -> None:
    """Compile a study's GPU kernels ahead of training, and carry them to other machines in one file.

    A file serves machines with the same GPU model and the same version of Triton; elsewhere kernels compile anew.
    """
    if not (study or pack or unpack):
        raise UserError("warm-up: nothing to do; give --study, --pack or --unpack")
    from gdn_mup.kernels import cache

    console = _console()
    if unpack:
        console.print(f"{cache.unpack(unpack)} kernels from {unpack} to {cache.cache_folder()}")
    if study:
        import torch

        if not torch.cuda.is_available():
            raise MachineError(
                "--study: kernels are compiled for the GPU at hand, and torch finds none (see `nvidia-smi`)"
            )
        from gdn_mup.progress import progress
        from gdn_mup.study.plan import load_study
        from gdn_mup.training.gpu import compile_kernels
        from gdn_mup.training.sweep import scaled_model

        loaded = load_study(study)
        jobs = {job[1:4]: job for kind in TRAINED_BY_KERNELS for job in loaded.jobs(kind)}
        with progress(f"compiling for {study}", len(jobs)) as report:
            for done, job in enumerate(jobs.values(), start=1):
                experiment = loaded.experiment_of(job)
                scaled = scaled_model(
                    loaded.model, job.width, job.growth, loaded.corpus.vocabulary_size, experiment.rules, job.optimizer
                )
                compile_kernels(scaled, loaded.model, loaded.training_of(experiment), job.optimizer)
                report(done, f"width {job.width}")
    if pack:
        console.print(f"{cache.pack(pack)} kernels from {cache.cache_folder()} to {pack}")


@app.command()
@_one_at_a_time()
def collect(
    study: StudyFile,
    kind: Annotated[str, typer.Option(help="`lr_sweep`, `coordinates`, `multiplier`, `clipping` or `tuning`.")],
    output: Output,
    jobs: Annotated[
        list[Path], typer.Argument(help="Job files of that kind, or datasets, which give what no file has.")
    ],
) -> None:
    """Gather job files into the study's dataset, with growth, optimizer, width and seed as dimensions."""
    from gdn_mup.study.datasets import collect as collect_jobs
    from gdn_mup.study.datasets import write
    from gdn_mup.study.plan import SECTIONS, load_study

    if kind not in SECTIONS:
        raise UserError(f"--kind: {kind!r}: use {', '.join(SECTIONS)}")
    write(collect_jobs(jobs, kind, load_study(study)), output)  # type: ignore[arg-type]


@app.command()
def extract(
    datasets: Annotated[list[Path], typer.Argument(help="Datasets, such as results/reference/h200/lr_sweep.nc.")],
    output: Annotated[Path, typer.Option(help="Folder of the study's results, such as results/h200.")],
) -> None:
    """Write a dataset's jobs as files again, where the workflow takes them instead of training. Keeps what is there."""
    from gdn_mup.study.datasets import job_of, kind_of, open_jobs, write

    for path in datasets:
        kind = kind_of(path)
        jobs = open_jobs(path, kind)
        new = [(job, file) for job in jobs if not (file := output / job_of(job, kind).path).exists()]
        for job, file in new:
            write(job, file)
        print(f"{path}: {len(new)} of {len(jobs)} jobs written to {output / 'jobs' / kind}")


def _show(table: "pd.DataFrame", title: str) -> None:
    """Print a table of texts."""
    from rich.table import Table

    shown = Table(*table.columns, title=title)
    for row in table.itertuples(index=False):
        shown.add_row(*map(str, row))
    _console().print(shown)


def _console() -> "Console":
    """A terminal's width where there is one; wide lines for a pipe or a file."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def _title(job: "Job") -> str:
    return f"{job.kind}: {job.growth}, {job.optimizer}, width {job.width}, seed {job.seed}"


class _Planned(NamedTuple):
    """A job of a study."""

    study: "Study"
    job: "Job"
    experiment: Any  # of the kind's own class
    training: "TrainingSettings"
    settings: dict[str, Any]


def _planned(study: Path, kind: str, growth: str, optimizer: str, width: int, seed: int) -> _Planned:
    """Raises UserError if the study asks for no such job."""
    from gdn_mup.study.plan import Job, load_study

    loaded = load_study(study)
    job = Job(kind, growth, optimizer, width, seed)  # type: ignore[arg-type]
    experiment = loaded.experiment_of(job)
    return _Planned(loaded, job, experiment, loaded.training_of(experiment), loaded.settings_of(job))


def _is_job(
    kind: str, study: Path, corpus: Path, growth: str, optimizer: str, width: int, seed: int, output: Path, **_: Any
) -> bool:
    """Whether a file is that of this job, trained on this corpus."""
    from gdn_mup.corpus.tokens import open_corpus
    from gdn_mup.study.datasets import open_job
    from gdn_mup.study.plan import settings_hash

    planned = _planned(study, kind, growth, optimizer, width, seed)
    try:
        found = open_job(output, kind).attrs  # type: ignore[arg-type]
    except UserError:
        return False
    facts = (settings_hash(planned.settings), open_corpus(corpus)[0].sha256)
    return (found["settings_hash"], found.get("corpus_sha256")) == facts


class _Ready(NamedTuple):
    """What a job needs before it trains."""

    scaled: Any
    tokens: Any
    validation: Any
    make_trainer: Callable[..., Any]  # of members, and of what is not as in the study
    group_size: Callable[[Any], int]  # how many of these members train at once
    device: str  # `cpu` or `cuda`
    device_name: str
    processes: "Processes"  # who trains this job together
    taken: Sequence["xr.Dataset"]  # runs of other sweeps


def _prepare(
    planned: _Planned, corpus: Path, threads: int | None, device: str, output: Path, reuse: Sequence[Path] = ()
) -> _Ready:
    """Open and check all that a job depends on, the place of its output too: what fails, fails before it trains."""
    from functools import partial

    import torch

    from gdn_mup.corpus.tokens import open_corpus
    from gdn_mup.files import check_writable
    from gdn_mup.study.plan import Tuning
    from gdn_mup.study.provenance import processor
    from gdn_mup.training.allocator import keep_freed_memory
    from gdn_mup.training.devices import parse_device
    from gdn_mup.training.parallel import join_processes
    from gdn_mup.training.sweep import Trainer, members_in_cache, scaled_model

    study, job, experiment, training, _ = planned
    wanted = parse_device(device)
    tokens, validation = open_corpus(corpus)
    for part in (tokens, validation):
        part.check_settings(study.corpus)
    taken, left = _take_over(planned, tokens, reuse)
    if not left:
        wanted = parse_device("cpu")  # nothing trains, and no GPU is taken
    processes = join_processes(wanted.number if job.kind in TRAINED_BY_KERNELS else 1)
    cuda = _use_cuda(wanted.kind, processes)
    if cuda:
        processes = processes.with_gpus()
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    torch.set_flush_denormal(True)  # a vanishing gradient must not slow the arithmetic down
    scaled = scaled_model(study.model, job.width, job.growth, tokens.vocabulary_size, experiment.rules, job.optimizer)
    if isinstance(experiment, Tuning):
        scaled = scaled._replace(trials=experiment.multipliers)
    trainer = Trainer
    if cuda and job.kind in TRAINED_BY_KERNELS:
        from gdn_mup.training.gpu import GpuTrainer

        trainer = GpuTrainer
    make_trainer = partial(
        trainer,
        scaled=scaled,
        model=study.model,
        training=training,
        optimizer=job.optimizer,
        seed=job.seed,
        tokens=tokens,
        device="cuda" if cuda else "cpu",
        processes=processes,
    )

    def group_size(members: Any) -> int:
        if not cuda:
            return members_in_cache(job.width, training.batch_size * training.context_length // processes.count)
        from gdn_mup.training.memory import members_that_fit

        batches = validation.fixed_batches(1, training.batch_size, training.context_length)
        return processes.smallest(members_that_fit(members, make_trainer, torch.from_numpy(batches)))

    check_writable(output)
    name = torch.cuda.get_device_name() if cuda else processor()
    if not left:
        # of the runs, none of which was trained here
        name = ", ".join(sorted({str(part.attrs.get("device", "unknown")) for part in taken}))
    kind = "cuda" if cuda else "cpu"
    return _Ready(scaled, tokens, validation, make_trainer, group_size, kind, name, processes, taken)


def _take_over(planned: _Planned, tokens: Any, files: Sequence[Path]) -> tuple[list["xr.Dataset"], bool]:
    """The runs of a job that files of other sweeps have, and whether any are left to train."""
    if not files:
        return [], True
    from gdn_mup.scaling.rules import RULE_SETS
    from gdn_mup.study.reuse import open_sweep, take_over
    from gdn_mup.training.sweep import distinct_members, scaled_model

    study, job, experiment, training, settings = planned
    corpus = {"corpus_sha256": tokens.sha256, "vocabulary_size": tokens.vocabulary_size}
    sweeps = {path: open_sweep(path, settings, corpus) for path in files}
    # Behind the job's rule sets all others, since a file's may coincide with one of the job's.
    rules = tuple(dict.fromkeys((*experiment.rules, *RULE_SETS)))
    scaled = scaled_model(study.model, job.width, job.growth, tokens.vocabulary_size, rules, job.optimizer)
    members, stands_for = distinct_members(scaled, experiment.learning_rates.values, training.clipping)
    runs = [(member.rules, member.learning_rate) for member in members if member.rules in experiment.rules]
    taken, left = take_over(sweeps, runs, stands_for)
    return taken, bool(left)


def _use_cuda(device: str, processes: "Processes") -> bool:
    """Whether to train on a GPU; if so, the first process holds one for each from here on, and CUDA sees no others."""
    import torch

    from gdn_mup.training.gpu_slots import OLDEST_GPU, free_gpus, take_gpus

    if device == "cpu":
        return False
    slots = take_gpus(processes.count) if processes.leads else []
    if visible := processes.tell(os.environ.get("CUDA_VISIBLE_DEVICES", "")):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    found = torch.cuda.is_available()
    suitable = found and torch.cuda.get_device_capability() >= OLDEST_GPU
    if device == "cuda" and not found:
        raise MachineError("--device: cuda: torch finds no NVIDIA GPU here; use --device cpu, or see `nvidia-smi`")
    if device == "cuda" and not suitable:
        raise MachineError(
            f"--device: cuda: {torch.cuda.get_device_name()} has no bfloat16 matrix products; use an NVIDIA GPU of "
            "compute capability 8.0 or more (Ampere, 2020), or --device cpu"
        )
    if not suitable:
        free_gpus(slots)
    return suitable


def _checkpoint_beside(output: Path, part: str = "") -> Path:
    """Where a job leaves off and goes on: hidden, and none of the workflow's files."""
    return output.with_name(f".{output.name}{part}.checkpoint")


def _sweep(
    planned: _Planned,
    ready: _Ready,
    training: "TrainingSettings",
    report: "Report",
    checkpoint: Path,
    checkpoint_seconds: float,
    micro_batches: int,
) -> "xr.Dataset":
    """Every rule set, trial and learning rate of a job: those that others have trained, and the rest, trained here.

    Training goes on from the checkpoint if there is one; the last one is for `_write_job` to remove. `report` is told
    the share that is done.
    """
    from functools import partial

    from gdn_mup.study.plan import settings_hash
    from gdn_mup.study.reuse import join
    from gdn_mup.training.sweep import Member, distinct_members, train

    learning_rates = planned.experiment.learning_rates.values
    members, stands_for = distinct_members(ready.scaled, learning_rates, training.clipping)
    reused = [
        Member(str(rules), float(learning_rate))
        for part in ready.taken
        for rules, learning_rate in zip(part.rules.values, part.learning_rate.values, strict=True)
    ]
    left = [member for member in members if member not in reused]
    settings = planned.settings  # of the checkpoint, which no other choice of members may go on from
    if reused:
        settings = settings | {"left": left}
        report(float(not left), f"{len(reused)} of {len(members)} runs are taken over")
    updates = training.steps * len(left)
    curves = train(
        left,
        partial(ready.make_trainer, training=training),
        ready.group_size(left),
        planned.job.width,
        training,
        ready.validation,
        settings_hash=settings_hash(settings),
        device=ready.device,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        micro_batches=micro_batches,
        processes=ready.processes,
        report=lambda done, status="": report(done / updates, status),
    )
    runs = _runs(curves, training)
    if reused:
        runs = join(runs, ready.taken)
    return _sweep_dataset(runs, [*left, *reused], stands_for, len(ready.scaled.trials), learning_rates)


def _whole_sweep(
    planned: _Planned, ready: _Ready, checkpoint: Path, checkpoint_seconds: float, micro_batches: int
) -> "xr.Dataset":
    """`_sweep` of a job that is nothing else, with a progress bar."""
    from gdn_mup.progress import progress

    with progress(_title(planned.job), 1, shown=ready.processes.leads) as report:
        return _sweep(planned, ready, planned.training, report, checkpoint, checkpoint_seconds, micro_batches)


def _part_of(report: "Report", before: int, name: str) -> "Report":
    """Reports one of several equal parts of a work, of which so many are done before."""
    return lambda done, status="": report(before + done, f"{name}: {status}")


def _runs(curves: Any, training: Any) -> "xr.Dataset":
    """Curves by member, and what they cost."""
    import numpy as np
    import xarray as xr

    return xr.Dataset(
        {
            "train_loss": (("member", "step"), curves.train_loss),
            "val_loss": (("member", "evaluation_step"), curves.val_loss),
            "grad_norm": (("member", "step"), curves.grad_norm),
            "diverged": ("member", curves.diverged.astype(np.int8)),
            **_costs(
                curves.spent,
                members=len(curves.diverged),
                diverged_members=int(curves.diverged.sum()),
                tokens=(training.steps * training.batch_size * training.context_length, curves.evaluated_tokens),
            ),
        },
        coords={"step": np.arange(1, training.steps + 1), "evaluation_step": curves.evaluation_step},
    )


def _sweep_dataset(
    runs: "xr.Dataset",
    members: Any,
    stands_for: dict[str, str],
    trials: int,
    learning_rates: tuple[float, ...],
) -> "xr.Dataset":
    """Runs by (rules, trial, learning_rate): a rule set that coincides with another gets that one's members."""
    import xarray as xr

    position = {member: row for row, member in enumerate(members)}
    rows = [
        [[position[trained, rate, trial] for rate in learning_rates] for trial in range(trials)]
        for trained in stands_for.values()
    ]
    swept = runs.isel(member=xr.Variable(("rules", "trial", "learning_rate"), rows))
    return swept.assign_coords(rules=list(stands_for), learning_rate=list(learning_rates))


def _costs(spent: "Spent", *, members: int, diverged_members: int, tokens: tuple[int, int]) -> dict[str, float]:
    """The variables of a job file that say what it cost; tokens are those of each member, as `Study.tokens_of`."""
    counted = {"members": members, "diverged_members": diverged_members}
    return {**spent._asdict(), **counted, "tokens": tokens[0], "evaluated_tokens": tokens[1]}


def _write_job(
    dataset: "xr.Dataset", planned: _Planned, ready: _Ready, output: Path, checkpoints: Sequence[Path] = ()
) -> None:
    """Add the job's coordinates and provenance, and write its file; only then its checkpoints are no longer needed.

    Of processes that have trained it together the first one does.
    """
    if not ready.processes.leads:
        return
    from gdn_mup.study.datasets import write
    from gdn_mup.study.provenance import provenance

    job = planned.job
    dataset = dataset.assign_coords(growth=job.growth, optimizer=job.optimizer, width=job.width, seed=job.seed)
    dataset.attrs |= {
        "title": _title(job),
        **provenance(planned.settings, ready.device_name),
        "corpus_sha256": ready.tokens.sha256,
        "vocabulary_size": ready.tokens.vocabulary_size,
    }
    write(dataset, output)
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
