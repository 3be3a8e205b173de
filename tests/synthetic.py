"""Studies with a known truth: job files whose loss curves and coordinate sizes are made up from formulae."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from gdn_mup.study import datasets
from gdn_mup.study.datasets import DatasetKind
from gdn_mup.study.plan import ClippingCheck, Job, Log2Ranges, MultiplierCheck, Study, Tuning, settings_hash

BASE_WIDTH = 32
BEST_AT_BASE = -5.3  # log₂ of the best learning rate at the base width, off the grid

# Octaves per doubling of width by which the optimum moves.
SLOPES = {"sp": -1.0, "mup": 0.0, "liu_gu": 0.0, "gdn_mup": 0.0}

# Under each clipping: octaves per doubling of width by which the optimum moves, and the norm's width exponents at init
# and late in training.
CLIPPINGS = {"none": (0.0, 0.5, 0.5), "global_norm": (0.5, 0.5, 0.5), "width_invariant_norm": (0.0, 0.0, 0.0)}

# What every check costs.
COSTS = {"seconds": 3.0, "joules": 40.0, "members": 2, "diverged_members": 0, "tokens": 5000, "evaluated_tokens": 1000}

# Width exponents of the coordinate sizes.
EXPONENTS = {"sp": 0.5, "mup": 0.0, "liu_gu": 0.0, "gdn_mup": 0.0}


def excess_loss(octaves: np.ndarray) -> np.ndarray:
    """Loss above the best, this many octaves above the best learning rate: gentle below, steep above.

    0.14 nats one octave below and 0.19 one octave above, as in sweeps of real models.
    """
    below, above, softness = 0.45, 0.8, 0.8  # nats per octave far from the minimum; octaves

    def curve(u: np.ndarray) -> np.ndarray:
        return softness * (below * np.logaddexp(0, -u / softness) + above * np.logaddexp(0, u / softness))

    minimum = np.float64(softness * np.log(below / above))
    return curve(octaves + minimum) - curve(minimum)


def study(**changes: Any) -> Study:
    """A study of three widths and three seeds: AdamW and SGD, growth by heads. `changes` are its sections."""
    rules = list(SLOPES)
    adamw = {"growth": "heads", "optimizer": "adamw", "rules": rules, "widths": [32, 64, 128], "seeds": [0, 1, 2]}
    sections: dict[str, Any] = {
        "model": {"base_width": BASE_WIDTH, "heads": 2, "head_dim": 16, "value_head_dim": 16},
        "training": {"steps": 60, "warmup_steps": 6, "evaluate_every": 20},
        "sweeps": [
            adamw | {"learning_rates": {"log2_first": -11, "log2_last": -2, "log2_step": 0.5}},
            adamw | {"optimizer": "sgd", "learning_rates": {"log2_first": -8, "log2_last": 0, "log2_step": 0.5}},
        ],
        "coordinate_checks": [adamw | {"learning_rate": 0.01}],
        "multiplier_checks": [adamw | {"learning_rate": 0.01}],
        "clipping_checks": [
            adamw
            | {
                "optimizer": "sgd",
                "rules": ["gdn_mup"],
                "learning_rates": {"log2_first": -9, "log2_last": -1, "log2_step": 0.5},
            }
        ],
        "tunings": [
            adamw
            | {
                "rules": ["gdn_mup"],
                "learning_rates": {"log2_first": -6, "log2_last": -5},
                "log2_ranges": dict.fromkeys(Log2Ranges.model_fields, (0, 0))
                | {"embedding_learning_rate": (-3, 3), "readout_init": (-2, 2)},
            }
        ],
    }
    return Study.model_validate(sections | changes)


def with_base_seeds(*seeds: int) -> Study:
    """That study, its sweeps with further seeds at the base width."""
    return study(sweeps=[sweep.model_dump(mode="json") | {"base_seeds": seeds} for sweep in study().sweeps])


def job_file(
    plan: Study,
    job: Job,
    slopes: dict[str, float] = SLOPES,
    best_at_base: float = BEST_AT_BASE,
    noise: float = 0.005,
    clippings: dict[str, tuple[float, float, float]] = CLIPPINGS,
    penalty: float = 0.0,
    transfers: bool = True,
    early_slopes: dict[str, float] | None = None,
) -> xr.Dataset:
    """What a job of the study would have written.

    `early_slopes` are those at every evaluation before the last, `slopes` where they are None.
    `penalty` is what a doubling of width costs `gdn_mup` in nats. If not `transfers`, the multiplier that helps at
    the base width harms at others.
    """
    random = np.random.default_rng([job.seed, job.width, len(job.optimizer)])
    if job.kind == "clipping":
        dataset = _clipping(plan, job, random, clippings, best_at_base, noise)
    else:
        make = {
            "lr_sweep": partial(_lr_sweep, penalty=penalty, early_slopes=early_slopes),
            "coordinates": _coordinates,
            "multiplier": _multiplier,
            "tuning": partial(_tuning, penalty=penalty, transfers=transfers),
        }[job.kind]
        dataset = make(plan, job, random, slopes, best_at_base, noise)
    dataset = dataset.assign({name: COSTS[name] for name in COSTS if name not in dataset})
    dataset = dataset.assign_coords(growth=job.growth, optimizer=job.optimizer, width=job.width, seed=job.seed)
    dataset.attrs |= {
        "settings_hash": settings_hash(plan.settings_of(job)),
        "corpus_sha256": "0" * 64,
        "vocabulary_size": 512,
        "commit": "0123abc",
        "device": "cpu",
    }
    return dataset


def _tuning(
    plan: Study,
    job: Job,
    random: np.random.Generator,
    slopes: dict[str, float],
    best_at_base: float,
    noise: float,
    penalty: float,
    transfers: bool,
) -> xr.Dataset:
    """The embedding's learning rate is best at four times its default, by 0.24 nats; the readout's init is idle."""
    tuning = plan.experiment_of(job)
    assert isinstance(tuning, Tuning)
    rates = np.array(tuning.learning_rates.values)
    multipliers = np.array([list(trial.values()) for trial in tuning.multipliers])
    embedding = np.log2(multipliers[:, list(tuning.multipliers[0]).index("embedding_learning_rate")])
    best = 2.0 if transfers or job.width == BASE_WIDTH else -2.0
    gain = 0.06 * (best**2 - (embedding - best) ** 2)
    doublings = np.log2(job.width / BASE_WIDTH)
    final = 3.4 - (0.12 - penalty) * doublings - gain[:, None] + excess_loss(np.log2(rates) - best_at_base)
    final = final + random.normal(0, 0.01) + random.normal(0, noise, final.shape)
    member = ("rules", "trial", "learning_rate")
    return xr.Dataset(
        {
            "final_loss": (member, final[None].repeat(len(tuning.rules), 0).astype(np.float32)),
            "diverged": (member, np.zeros((len(tuning.rules), *final.shape), np.int8)),
            "multipliers": (("trial", "hyperparameter"), multipliers),
            "seconds": 12.5,
        },
        coords={
            "rules": list(tuning.rules),
            "trial": np.arange(tuning.trials),
            "learning_rate": rates,
            "hyperparameter": list(tuning.multipliers[0]),
        },
    )


def _lr_sweep(
    plan: Study,
    job: Job,
    random: np.random.Generator,
    slopes: dict[str, float],
    best_at_base: float,
    noise: float,
    penalty: float = 0.0,
    early_slopes: dict[str, float] | None = None,
) -> xr.Dataset:
    sweep = plan.experiment_of(job)
    training = plan.training_of(sweep)
    rates = np.array(sweep.learning_rates.values)  # type: ignore[union-attr]
    steps = np.arange(1, training.steps + 1)
    evaluations = np.arange(0, training.steps + 1, training.evaluate_every)
    shape = (len(sweep.rules), len(rates))
    doublings = np.log2(job.width / BASE_WIDTH)
    # Rule sets coincide at the base width: one noise for all of them there.
    drawn = random.normal(0, noise, shape)
    drawn = np.broadcast_to(drawn[:1], shape) if job.width == BASE_WIDTH else drawn
    seed_offset = random.normal(0, 0.01)
    train, val = np.full((*shape, len(steps)), np.nan), np.full((*shape, len(evaluations)), np.nan)
    diverged = np.zeros(shape, np.int8)
    for i, rules in enumerate(sweep.rules):
        at_base = np.log2(rates) - best_at_base
        octaves = at_base - slopes[rules] * doublings
        floor = 3.4 - 0.12 * doublings + seed_offset + drawn[i] + penalty * doublings * (rules == "gdn_mup")
        final = floor + excess_loss(octaves)
        early = floor + excess_loss(at_base - (early_slopes or slopes)[rules] * doublings)
        for j in range(len(rates)):
            decay = np.exp(-6 * steps / training.steps)
            train[i, j] = final[j] + (6.2 - final[j]) * decay + random.normal(0, 0.02, len(steps))
            val[i, j] = early[j] + (6.2 - early[j]) * np.exp(-6 * evaluations / training.steps)
            val[i, j, -1] = final[j]
            if octaves[j] > 2.2:
                diverged[i, j] = 1
                train[i, j, len(steps) // 3 :] = np.nan
                val[i, j, evaluations > len(steps) // 3] = np.nan
    return xr.Dataset(
        {
            "train_loss": (("rules", "learning_rate", "step"), train.astype(np.float32)),
            "val_loss": (("rules", "learning_rate", "evaluation_step"), val.astype(np.float32)),
            "grad_norm": (("rules", "learning_rate", "step"), np.ones_like(train, np.float32)),
            "diverged": (("rules", "learning_rate"), diverged),
            "seconds": 12.5,
            "joules": np.nan,
            "members": (1 if job.width == BASE_WIDTH else len(sweep.rules)) * len(rates),
            "diverged_members": diverged[: 1 if job.width == BASE_WIDTH else None].sum(),
            "tokens": training.steps * training.batch_size * training.context_length,
            "evaluated_tokens": 1000,
        },
        coords={
            "rules": list(sweep.rules),
            "learning_rate": rates,
            "step": steps,
            "evaluation_step": evaluations,
        },
    )


def _coordinates(
    plan: Study, job: Job, random: np.random.Generator, slopes: dict[str, float], best_at_base: float, noise: float
) -> xr.Dataset:
    check = plan.experiment_of(job)
    steps = np.array(check.steps)  # type: ignore[union-attr]
    layers = np.arange(-1, plan.model.layers)
    outside = ["embedding", "final_norm", "logits"]
    inside = ["q", "alpha_preactivation", "state", "o", "mixer_output", "mlp_output", "residual"]
    quantities, parameters = [*inside, *outside], ["embedding", "q", "dt_bias", "readout"]
    m = job.width / BASE_WIDTH
    rms = np.full((len(check.rules), len(steps), len(layers), len(quantities)), np.nan)
    change = rms.copy()
    for i, rules in enumerate(check.rules):
        for k, quantity in enumerate(quantities):
            here = layers == -1 if quantity in outside else layers >= 0
            size = 0.3 * (1 + k) * np.exp(random.normal(0, 0.03, (len(steps), here.sum())))
            moved = 0.05 * np.sqrt(steps)[:, None] * m ** EXPONENTS[rules] * size
            rms[i][:, here, k] = np.hypot(size, moved)
            change[i][:, here, k] = moved
    weights = np.ones((len(check.rules), len(steps), len(layers), len(parameters)))
    gradients = weights.copy()
    gradients[:, 0] = np.nan
    activation, parameter = ("rules", "step", "layer", "quantity"), ("rules", "step", "layer", "parameter")
    gate, quantile = ("rules", "step", "layer"), ("rules", "step", "layer", "quantile")
    # A seed's gates and state are off by a factor from init on; the rank falls by the time of the last step.
    half_life = 20 * np.exp(random.normal(0, 0.3)) * np.ones((len(check.rules), len(steps), len(layers), 1))
    half_life = half_life * np.array([0.1, 1.0, 10.0])
    fall = np.array([EXPONENTS[rules] for rules in check.rules])[:, None] * steps / max(1, steps.max())
    rank = 6 * np.exp(random.normal(0, 0.3)) * np.repeat((m**-fall)[..., None], len(layers), -1)
    rank[..., 0] = half_life[..., 0, :] = np.nan  # outside the blocks
    alpha = 0.5 ** (1 / half_life)
    return xr.Dataset(
        {
            "rms": (activation, rms.astype(np.float32)),
            "change": (activation, change.astype(np.float32)),
            "weight_rms": (parameter, weights.astype(np.float32)),
            "gradient_rms": (parameter, gradients.astype(np.float32)),
            "update_rms": (parameter, gradients.astype(np.float32)),
            "alpha_mean": (gate, alpha.mean(-1)),
            "alpha_quantile": (quantile, alpha),
            "beta_mean": (gate, 0.5 + 0 * rank),
            "beta_quantile": (quantile, 0.5 + 0 * alpha),
            "half_life_quantile": (quantile, half_life),
            "effective_rank": (gate, rank),
            "relative_rank": (gate, rank / plan.model.head_dim),
        },
        coords={
            "rules": list(check.rules),
            "step": steps,
            "layer": layers,
            "quantity": quantities,
            "parameter": parameters,
            "quantile": [0.05, 0.5, 0.95],
        },
        attrs={"learning_rate": check.learning_rate},  # type: ignore[union-attr]
    )


def _multiplier(
    plan: Study, job: Job, random: np.random.Generator, slopes: dict[str, float], best_at_base: float, noise: float
) -> xr.Dataset:
    """Every output of the norm has the same mean(o²); the change is what a smaller ε makes of it."""
    check = plan.experiment_of(job)
    assert isinstance(check, MultiplierCheck)
    labels = {
        "rules": list(check.rules),
        "init": list(check.inits),
        "kernel_scale": list(check.kernel_scales),
        "epsilon": list(check.epsilons),
        "step": list(check.steps),
    }
    sizes = {"study": 1e-2, "usual": 1e-6, "one": 1.0, "inverse_root": 1 / plan.model.head_dim}
    shape = [len(values) for values in labels.values()]
    square = np.array([[sizes[init] * sizes[scale] for scale in check.kernel_scales] for init in check.inits])
    square = square[:, :, None, None] * np.exp(random.normal(0, 0.1, shape))
    epsilon = np.array(check.epsilons)[:, None]
    change = np.sqrt((square + epsilon) / (square + epsilon / job.width)) - 1 + 1e-15
    layers, parameters, condition = np.arange(plan.model.layers), ["q", "o", "readout"], tuple(labels)
    by_layer = ((*condition, "layer"), np.repeat(square[..., None], len(layers), -1))
    return xr.Dataset(
        {
            "multiplier": job.width**0.5,
            "mean_square": by_layer,
            "median_square": by_layer,
            "low_square": by_layer,
            "share_below_epsilon": (by_layer[0], (by_layer[1] < epsilon[..., None]).astype(float)),
            "loss": (condition, np.full(shape, 6.0)),
            "loss_change": (condition, 0.01 * change),
            "trained_loss_change": (condition, 0.02 * change),
            "gradient_change": (condition, change),
            "class_gradient_change": ((*condition, "parameter"), np.repeat(change[..., None], len(parameters), -1)),
        },
        coords={**labels, "layer": layers, "parameter": parameters},
        attrs={"learning_rate": check.learning_rate},
    )


def _clipping(
    plan: Study,
    job: Job,
    random: np.random.Generator,
    clippings: dict[str, tuple[float, float, float]],
    best_at_base: float,
    noise: float,
) -> xr.Dataset:
    """A sweep for each clipping; norms are powers of width that fall in training, to below the clipping norm."""
    check = plan.experiment_of(job)
    assert isinstance(check, ClippingCheck)
    each = []
    for clipping in check.clippings:
        slope, first, late = clippings[clipping]
        sweep = _lr_sweep(plan, job, random, dict.fromkeys(check.rules, slope), best_at_base, noise)
        done = (sweep.step - 1) / (sweep.sizes["step"] - 1)
        norm = 2 * 0.1**done * (job.width / BASE_WIDTH) ** (first + (late - first) * done)
        drawn = xr.DataArray(np.exp(random.normal(0, 0.02, sweep.train_loss.shape)), dims=sweep.train_loss.dims)
        each.append(sweep.assign(grad_norm=(norm * drawn).where(sweep.train_loss.notnull())))
    dataset = xr.concat(each, xr.Variable("clipping", list(check.clippings)))
    names = list(datasets.JOB_VARIABLES["clipping"])
    added = {name: dataset[name].sum(skipna=False) for name in datasets.COSTS}
    added |= {name: dataset[name][0] for name in ("tokens", "evaluated_tokens")}
    dataset = dataset.assign(added)[names]
    return dataset.transpose("rules", "clipping", "learning_rate", ...)


def in_memory(plan: Study, kind: DatasetKind, **truth: Any) -> xr.Dataset:
    """The collected dataset of a study whose every job has run, without touching a disk."""
    return datasets.combine([job_file(plan, job, **truth) for job in plan.jobs(kind)], kind, plan)


def write_jobs(plan: Study, kind: DatasetKind, folder: Path, **truth: Any) -> list[Path]:
    """Every job file of a kind, as the study would lay them out under `folder`."""
    paths = []
    for job in plan.jobs(kind):
        datasets.write(job_file(plan, job, **truth), folder / job.path)
        paths.append(folder / job.path)
    return paths
