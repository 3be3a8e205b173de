"""A study file becomes the list of jobs that it asks for.

A *job* is one (growth, optimizer, width, seed); its *members*, trained together, are every
(rule set, learning rate, trial) of that experiment. Nothing here imports torch: the workflow reads plans all the time.
"""

import hashlib
import json
import random
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.errors import UserError
from gdn_mup.model.config import GrowthMode, InitName, KernelScale, ModelSettings, model_shape
from gdn_mup.settings import LARGEST_COUNT, Octaves, Seed, Settings, Size
from gdn_mup.study.yaml_file import read_yaml
from gdn_mup.training.config import Clipping, OptimizerName, TrainingSettings

RuleSetName = Literal[
    "sp", "sp_released", "mup", "yang_hu", "liu_gu", "liu_gu_released", "liu_gu_released_mixer",
    "gdn_mup", "gdn_mup_constant_decay", "gdn_mup_hidden_decay",
]  # fmt: skip

# Kinds of jobs, and the section of a study file that asks for each.
SECTIONS = {
    "coordinates": "coordinate_checks",
    "multiplier": "multiplier_checks",
    "clipping": "clipping_checks",
    "lr_sweep": "sweeps",
    "tuning": "tunings",
}


class LearningRateGrid(Settings):
    """Learning rates 2^first, 2^(first + step), …, 2^last."""

    log2_first: Octaves = Field(description="log₂ of the smallest learning rate.")
    log2_last: Octaves = Field(description="log₂ of the largest learning rate.")
    log2_step: float = Field(1.0, ge=0.01, description="Octaves between neighbours.")

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if self.log2_last < self.log2_first:
            raise ValueError(f"the grid falls: log2_last {self.log2_last} is below log2_first {self.log2_first}")
        steps = self._steps
        if abs(steps - round(steps)) * self.log2_step > 1e-3:  # octaves: ends and step may be rounded
            before, after = (self.log2_first + n * self.log2_step for n in (int(steps), int(steps) + 1))
            raise ValueError(
                f"steps of {self.log2_step:g} from log2_first {self.log2_first:g} miss log2_last {self.log2_last:g}; "
                f"end at {before:g} or {after:g}"
            )
        return self

    @property
    def _steps(self) -> float:
        return (self.log2_last - self.log2_first) / self.log2_step

    @property
    def values(self) -> tuple[float, ...]:
        """The learning rates at the base width, ascending."""
        return tuple(2.0 ** (self.log2_first + i * self.log2_step) for i in range(round(self._steps) + 1))


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"named twice: {list(values)}")
    return values


class Experiment(Settings):
    """What sweeps and coordinate checks share: which models, under which rules."""

    growth: GrowthMode = Field(description="What grows with width: the number of heads, or K and V of a head.")
    optimizer: OptimizerName = Field(description="AdamW, or SGD with Nesterov momentum.")
    rules: tuple[RuleSetName, ...] = Field(min_length=1, description="Rule sets, trained side by side.")
    widths: tuple[Size, ...] = Field(min_length=1, description="Ascending; the base width among them.")
    seeds: tuple[Seed, ...] = Field(min_length=1, description="A seed sets the init and the order of the data.")
    training: dict[str, Any] = Field({}, description="Keys of `training` that this experiment overrides.")

    @field_validator("widths")
    @classmethod
    def _ascending(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if list(widths) != sorted(set(widths)):
            raise ValueError(f"widths must be ascending, not {list(widths)}")
        return widths

    _named_once = field_validator("rules", "seeds")(_distinct)

    def seeds_at(self, width: int, base_width: int) -> tuple[int, ...]:
        """Seeds that are run at a width."""
        return self.seeds


class Sweep(Experiment):
    """A learning-rate sweep at every width."""

    base_seeds: tuple[Seed, ...] = Field(
        (),
        description="Further seeds of the base width alone: every width's transfer regret hangs on its optimum, and it "
        "costs the least.",
    )
    learning_rates: LearningRateGrid

    _base_seeds_once = field_validator("base_seeds")(_distinct)

    @field_validator("base_seeds")
    @classmethod
    def _further(cls, base_seeds: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if both := sorted(set(base_seeds) & set(info.data.get("seeds", ()))):
            raise ValueError(f"{both} are among `seeds`, with which the base width is run as it is")
        return base_seeds

    def seeds_at(self, width: int, base_width: int) -> tuple[int, ...]:
        """Seeds that are run at a width."""
        return (*self.seeds, *self.base_seeds) if width == base_width else self.seeds


class ClippingCheck(Experiment):
    """A learning-rate sweep under each way to clip gradients."""

    optimizer: OptimizerName = Field("sgd", description="AdamW, or SGD with Nesterov momentum.")
    rules: tuple[RuleSetName, ...] = Field(("gdn_mup",), min_length=1, description="Rule sets, trained side by side.")
    learning_rates: LearningRateGrid
    clippings: tuple[Clipping, ...] = Field(
        get_args(Clipping), min_length=1, description="What `training.clipping` is, each in a training of its own."
    )

    _clippings_once = field_validator("clippings")(_distinct)

    @field_validator("training")
    @classmethod
    def _no_other_clipping(cls, training: dict[str, Any]) -> dict[str, Any]:
        if "clipping" in training:
            raise ValueError(f"clipping {training['clipping']!r} has no effect here: name it in `clippings`")
        return training


StepsDone = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]


class Measurement(Experiment):
    """What is measured on a probe batch, at chosen steps of a short training."""

    learning_rate: float = Field(gt=0, le=1e30, description="At the base width; constant over the steps.")
    steps: tuple[StepsDone, ...] = Field((0, 1, 2, 4, 8), min_length=1, description="Updates done when measured.")
    probe_sequences: Size = Field(4, description="Sequences in the fixed probe batch.")

    @field_validator("steps")
    @classmethod
    def _steps_ascend(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if list(steps) != sorted(set(steps)) or steps[0] != 0:
            raise ValueError(f"steps must be ascending and start at 0 (the init), not {list(steps)}")
        return steps


class CoordinateCheck(Measurement):
    """Sizes of activations, gradients and updates."""


class MultiplierCheck(Measurement):
    """The model with and without a multiplier √width on the delta rule's output before its RMSNorm."""

    optimizer: OptimizerName = Field("adamw", description="AdamW, or SGD with Nesterov momentum.")
    steps: tuple[StepsDone, ...] = Field((0, 4), min_length=1, description="Updates done when measured.")
    epsilons: tuple[float, ...] = Field(
        (0.0, 1e-6, 1e-5), min_length=1, description="ε of every RMSNorm, each in a training of its own; 0 is allowed."
    )
    inits: tuple[InitName, ...] = Field(
        get_args(InitName),
        min_length=1,
        description="`study`: `model.initial_scale` under each rule set; `usual`: standard deviation 0.02 everywhere.",
    )
    kernel_scales: tuple[KernelScale, ...] = Field(
        get_args(KernelScale), min_length=1, description="What multiplies q: 1 (`one`) or K^−½ (`inverse_root`)."
    )

    @field_validator("epsilons")
    @classmethod
    def _epsilons_ascend(cls, epsilons: tuple[float, ...]) -> tuple[float, ...]:
        if list(epsilons) != sorted(set(epsilons)) or epsilons[0] < 0:
            raise ValueError(f"epsilons must be ascending and not negative, not {list(epsilons)}")
        return epsilons

    _conditions_once = field_validator("inits", "kernel_scales")(_distinct)


Log2Range = tuple[Octaves, Octaves]


class Log2Ranges(Settings):
    """Between which powers of 2 each multiplier is drawn; where both are 0 it is not tuned.

    An `_init` multiplies the standard deviation that `model.initial_scale` gives, a `_learning_rate` the rule set's.
    """

    embedding_init: Log2Range = Field((-2.0, 2.0), description="Init of the embedding.")
    embedding_learning_rate: Log2Range = Field((-2.0, 4.0), description="Learning rate of the embedding.")
    hidden_init: Log2Range = Field((-3.0, 1.0), description="Init of q, k, v, g and the MLP's input matrices.")
    hidden_learning_rate: Log2Range = Field((0.0, 0.0), description="Their learning rate.")
    residual_init: Log2Range = Field((-3.0, 1.0), description="Init of the matrices that write to the residual stream.")
    residual_learning_rate: Log2Range = Field((0.0, 0.0), description="Their learning rate.")
    gate_init: Log2Range = Field((-2.0, 2.0), description="Init of the projections of α and β (W_a, W_b).")
    gate_learning_rate: Log2Range = Field((0.0, 0.0), description="Their learning rate.")
    readout_init: Log2Range = Field((-4.0, 1.0), description="Init of the readout, where embeddings are not tied.")
    readout_learning_rate: Log2Range = Field((-1.0, 3.0), description="Its learning rate.")

    @field_validator("*")
    @classmethod
    def _ascends(cls, ends: Log2Range) -> Log2Range:
        if ends[1] < ends[0]:
            raise ValueError(f"the range falls: {list(ends)}")
        return ends

    @model_validator(mode="after")
    def _something_is_tuned(self) -> Self:
        if all(low == high for _, (low, high) in self):
            raise ValueError("nothing is tuned: give some multiplier a range")
        return self


class Tuning(Experiment):
    """A random search over multipliers that no rule set fixes: the same trials at every width."""

    rules: tuple[RuleSetName, ...] = Field(("gdn_mup",), min_length=1, description="Rule sets, trained side by side.")
    learning_rates: LearningRateGrid
    trials: int = Field(
        16, gt=1, le=10_000, description="Sets of multipliers; in trial 0 all are 1, the others are drawn."
    )
    search_seed: int = Field(0, description="Seed of the draws; the number of trials does not change them.")
    log2_ranges: Log2Ranges = Log2Ranges()

    @property
    def multipliers(self) -> tuple[dict[str, float], ...]:
        """Every trial's multipliers by name, log-uniform in their ranges."""
        # A stream for each multiplier: another range, or none, leaves the draws of the others as they are.
        draws = {name: (ends, random.Random(f"{self.search_seed}/{name}")) for name, ends in self.log2_ranges}
        drawn = [
            {name: 2.0 ** stream.uniform(*ends) for name, (ends, stream) in draws.items()}
            for _ in range(self.trials - 1)
        ]
        return (dict.fromkeys(draws, 1.0), *drawn)


class Job(NamedTuple):
    """One training process and the one file that it writes."""

    kind: str  # a key of SECTIONS
    growth: GrowthMode
    optimizer: OptimizerName
    width: int
    seed: int

    @property
    def path(self) -> str:
        """Where its file lies inside `results/<study>/`."""
        return f"jobs/{self.kind}/{self.growth}_{self.optimizer}_width{self.width}_seed{self.seed}.nc"


AnyExperiment = Sweep | ClippingCheck | CoordinateCheck | MultiplierCheck | Tuning


class Study(Settings):
    """A study file: one corpus, one model family, and its experiments: checks, sweeps and searches."""

    corpus: CorpusSettings = CorpusSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    coordinate_checks: tuple[CoordinateCheck, ...] = ()
    multiplier_checks: tuple[MultiplierCheck, ...] = ()
    clipping_checks: tuple[ClippingCheck, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    tunings: tuple[Tuning, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for kind, section in SECTIONS.items():
            seen: set[tuple[str, str]] = set()
            for i, experiment in enumerate(self.experiments(kind)):
                where = f"{section}[{i}]"
                key = (experiment.growth, experiment.optimizer)
                if key in seen:
                    raise ValueError(f"{where}: a second entry for growth `{key[0]}` and optimizer `{key[1]}`")
                seen.add(key)
                if self.model.base_width not in experiment.widths:
                    raise ValueError(
                        f"{where}.widths: {list(experiment.widths)} lacks the base width {self.model.base_width}"
                    )
                for width in experiment.widths:
                    try:
                        model_shape(self.model, width, experiment.growth, self.corpus.vocabulary_size)
                    except ValueError as error:
                        raise ValueError(f"{where}.widths: {error}") from None
                try:
                    self.training_of(experiment)
                except ValidationError as error:
                    raise ValueError(f"{where}.training.{_first_problem(error)}") from None
        return self

    def experiments(self, kind: str) -> tuple[AnyExperiment, ...]:
        """The study's experiments whose jobs are of this kind."""
        experiments: tuple[AnyExperiment, ...] = getattr(self, SECTIONS[kind])
        return experiments

    def training_of(self, experiment: Experiment) -> TrainingSettings:
        """The study's training settings with the experiment's own on top."""
        return TrainingSettings.model_validate(self.training.model_dump() | experiment.training, strict=True)

    def experiment_of(self, job: Job) -> AnyExperiment:
        """The experiment that a job belongs to."""
        for experiment in self.experiments(job.kind):
            if (experiment.growth, experiment.optimizer) == (job.growth, job.optimizer):
                seeds = experiment.seeds_at(job.width, self.model.base_width)
                if job.width not in experiment.widths or job.seed not in seeds:
                    break
                return experiment
        raise UserError(
            f"the study has no {job.kind} job growth={job.growth} optimizer={job.optimizer} "
            f"width={job.width} seed={job.seed}; `gdn-mup plan` lists those it has"
        )

    def jobs(self, kind: str) -> list[Job]:
        """Every job of a kind, widest first, so that the longest start first."""
        jobs = [
            Job(kind, experiment.growth, experiment.optimizer, width, seed)
            for experiment in self.experiments(kind)
            for width in experiment.widths
            for seed in experiment.seeds_at(width, self.model.base_width)
        ]
        return sorted(jobs, key=lambda job: (-job.width, job))

    def models_of(self, job: Job) -> int:
        """Models that a job trains for each of its rule sets: learning rates, trials, and ways to clip or to start."""
        experiment = self.experiment_of(job)
        if isinstance(experiment, MultiplierCheck):  # with and without the multiplier
            return 2 * len(experiment.inits) * len(experiment.kernel_scales) * len(experiment.epsilons)
        if isinstance(experiment, CoordinateCheck):
            return 1
        models = len(experiment.learning_rates.values)
        if isinstance(experiment, ClippingCheck):
            models *= len(experiment.clippings)
        return models * experiment.trials if isinstance(experiment, Tuning) else models

    def tokens_of(self, job: Job) -> tuple[int, int]:
        """Tokens that each model of a job goes through forward and backward, and those that it is evaluated on."""
        experiment = self.experiment_of(job)
        training = self.training_of(experiment)
        batch = training.batch_size * training.context_length
        if isinstance(experiment, MultiplierCheck):  # two gradients for each pair of models, and two forward passes
            measured = len(experiment.steps) * experiment.probe_sequences * training.context_length
            return max(experiment.steps) * batch + measured, measured
        if isinstance(experiment, CoordinateCheck):
            measured = (len(experiment.steps) + 1) * experiment.probe_sequences * training.context_length
            return max(experiment.steps) * batch, measured
        evaluations = len({*range(0, training.steps, training.evaluate_every), training.steps})
        return training.steps * batch, evaluations * training.evaluation_batches * batch

    def settings_of(self, job: Job) -> dict[str, Any]:
        """Exactly the settings that the job's result depends on: what its hash and its reruns hang on."""
        experiment = self.experiment_of(job)
        own = experiment.model_dump(mode="json", exclude={"training", "widths", "seeds", "base_seeds"})
        return {
            **own,
            "width": job.width,
            "seed": job.seed,
            "corpus": self.corpus.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "training": self.training_of(experiment).model_dump(mode="json"),
        }


def settings_hash(settings: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that change when any setting does."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def load_study(path: Path | str) -> Study:
    """Read and check a study file.

    Raises UserError with one line: file, key, value, and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        others = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such study file; there are: {', '.join(others) or 'none'}")
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a study file is a mapping of sections, not {_shown(raw)}")
    try:
        return Study.model_validate(raw, strict=True)  # no text for a number, no `true` for 1
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    """Pydantic's first complaint as one line: key, value, and what is allowed."""
    problem = error.errors()[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    key = key if key.isprintable() else repr(key)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; config/README.md lists the known ones{more}"
    message = problem["msg"].removeprefix("Value error, ")
    if not key or problem["type"] == "value_error" or problem["type"] == "missing":
        return f"{key}: {message}{more}".removeprefix(": ")
    cure = _CURES.get(problem["type"], "")
    return f"{key}: {_shown(problem['input'])}: {message}{cure}{more}"


# By pydantic's names: how a value of the right type is written.
_CURES = {
    "int_type": "; write it in digits, such as 400, 1_000_000 or 1e6",
    "float_type": "; write it in digits, such as 0.5 or 1e-5",
    "bool_type": "; write true or false",
    "string_type": "; put it in quotes",
    "tuple_type": "; write a list, [a, b]",
}


def _shown(value: Any) -> str:
    return reprlib.repr(list(value) if isinstance(value, tuple) else value)
