"""Train members side by side: every (rule set, learning rate, trial) of one width, optimizer and seed.

As many as a core's cache or a GPU's memory holds train at once, as a group, and groups follow one another.
All members see the same batches in the same order, so that differences between learning rates and between
rule sets are paired.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.errors import Interrupted, MachineError, UserError
from gdn_mup.interrupt import noted_signals
from gdn_mup.measurement.evaluation import held_out_losses
from gdn_mup.model.config import GrowthMode, ModelSettings, ModelShape, model_shape
from gdn_mup.model.language_model import LanguageModel, initialize, multiplied, parameter_table
from gdn_mup.progress import Report, silent
from gdn_mup.scaling.apply import ModelScaling, distinct_rules, scale_rule_sets
from gdn_mup.training.checkpoint import Position, load_checkpoint
from gdn_mup.training.clipping import norm_weights
from gdn_mup.training.config import Clipping, OptimizerName, TrainingSettings
from gdn_mup.training.energy import NOTHING, Meter, Spent
from gdn_mup.training.optimizers import MemberOptimizer, Optimizer
from gdn_mup.training.parallel import ALONE, Processes
from gdn_mup.training.schedule import learning_rate_factor
from gdn_mup.training.snapshots import Checkpoints

log = logging.getLogger(__name__)

# Activations of one kind, members × tokens × width, that a core works on at a time. Measured on the laptop
# study: at width 128 groups of 8 members train 12 % faster than 20 at once; at width 32 all at once is best.
ACTIVATIONS_IN_CACHE = 2**18


class Member(NamedTuple):
    """One training run among those trained together. The learning rate is that at the base width."""

    rules: str
    learning_rate: float
    trial: int = 0  # which of the model's multipliers


class Scaled(NamedTuple):
    """A model at one width, and what each rule set makes of it."""

    base: ModelShape
    target: ModelShape
    scalings: dict[str, ModelScaling]  # for the optimizer that trains
    sgd_scalings: dict[str, ModelScaling]  # whose learning rates weigh the width-invariant norm
    trials: tuple[Mapping[str, float], ...] = ({},)  # multipliers on top of a rule set, as `multiplied` takes them

    def scaling(self, member: Member) -> ModelScaling:
        """What a member's rule set and multipliers make of the model."""
        return multiplied(self.scalings[member.rules], parameter_table(self.target), self.trials[member.trial])


class Curves(NamedTuple):
    """What training leaves behind, one row a member. Losses in nats per token."""

    train_loss: np.ndarray  # [M, steps], of each step's batch before its update
    grad_norm: np.ndarray  # [M, steps], as clipping compares it, before clipping
    evaluation_step: np.ndarray  # [E], updates done; from 0 to steps
    val_loss: np.ndarray  # [M, E]
    diverged: np.ndarray  # [M], bool
    spent: Spent
    evaluated_tokens: int  # of each member, in all evaluations


def scaled_model(
    settings: ModelSettings,
    width: int,
    growth: GrowthMode,
    vocabulary_size: int,
    rules: Sequence[str],
    optimizer: OptimizerName,
) -> Scaled:
    """The model at the base and at the target width, their shapes compared under each rule set."""
    base = model_shape(settings, settings.base_width, growth, vocabulary_size)
    target = model_shape(settings, width, growth, vocabulary_size)
    tables = parameter_table(base), parameter_table(target)
    ratio = width / settings.base_width
    return Scaled(
        base,
        target,
        scale_rule_sets(*tables, ratio, rules, optimizer),
        scale_rule_sets(*tables, ratio, rules, "sgd"),
    )


def distinct_members(
    scaled: Scaled, learning_rates: Sequence[float], clipping: Clipping
) -> tuple[list[Member], dict[str, str]]:
    """The members worth training, all trials of each, and for each rule set the one that stands for it.

    Rule sets that coincide are trained once: all do at the base width, and the two whose only difference is their
    SGD learning rates do under AdamW, unless these weigh the norm that clips.
    """
    weighs = clipping == "width_invariant_norm"
    compared = {
        rules: (scaling, scaled.sgd_scalings[rules] if weighs else None) for rules, scaling in scaled.scalings.items()
    }
    stands_for = distinct_rules(compared)
    rules_trained = list(dict.fromkeys(stands_for.values()))
    members = product(rules_trained, learning_rates, range(len(scaled.trials)))
    return [Member(*member) for member in members], stands_for


class Trainer:
    """Members, their optimizer and the data they share; a `step` is `backward`, then `update`, of all of them."""

    def __init__(
        self,
        members: Sequence[Member],
        scaled: Scaled,
        model: ModelSettings,
        training: TrainingSettings,
        optimizer: OptimizerName,
        seed: int,
        tokens: TokenFile,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        processes: Processes = ALONE,
    ) -> None:
        self.training, self.seed, self.tokens, self.device = training, seed, tokens, torch.device(device)
        self.processes, self.micro_batches = processes, 1
        scalings = [scaled.scaling(member) for member in members]
        self.model = LanguageModel(scaled.target, len(members), model.norm_epsilon, device=self.device, dtype=dtype)
        initialize(self.model, scaled.base, model.initial_scale, scalings, seed)
        sgd_scalings = [scaled.sgd_scalings[member.rules] for member in members]
        self.optimizer = self._optimizer(
            optimizer,
            scalings,
            [member.learning_rate for member in members],
            norm_weights(training.clipping, sgd_scalings, list(self.model.weights), self.device),
        )

    def _optimizer(
        self,
        optimizer: OptimizerName,
        scalings: Sequence[ModelScaling],
        learning_rates: Sequence[float],
        norm_weights: Mapping[str, Tensor],
    ) -> Optimizer:
        return MemberOptimizer(optimizer, self.model, scalings, learning_rates, norm_weights, self.training)

    def batch(self, step: int) -> Tensor:
        """Token ids [B, T + 1] of update `step` = 0, 1, …; those of this process, if several share them."""
        return self._ids(step).to(self.device)

    def _ids(self, step: int) -> Tensor:
        ids = self.tokens.batch(self.seed, step, self.training.batch_size, self.training.context_length)
        return self.processes.share(torch.from_numpy(ids))

    def step(self, step: int, factor: float) -> tuple[Tensor, Tensor]:
        """One update on the step's batch: what `backward` and `update` return."""
        return self.backward(step), self.update(factor)

    def backward(self, step: int) -> Tensor:
        """Losses [M] of the step's batch; leaves their gradients on the parameters."""
        losses = self.processes.in_memory(lambda: self._backward(self.batch(step)))
        gradients = (tensor.grad for tensor in self.model.tensors.values())
        self.processes.average(losses, *(gradient for gradient in gradients if gradient is not None))
        return losses

    def _backward(self, batch: Tensor) -> Tensor:
        self.model.zero_grad()
        losses = []
        for part in batch.chunk(self.micro_batches):
            mean = self.model.losses(part) / self.micro_batches
            mean.sum().backward()  # members share nothing, so each gets the gradient of its own loss
            losses.append(mean.detach())
        return torch.stack(losses).sum(0)

    def held_out_losses(self, batches: Tensor) -> Tensor:
        """Mean losses [M] over batches [count, B, T + 1]."""
        mine = self.processes.share(batches).unflatten(1, (self.micro_batches, -1)).flatten(0, 1)
        losses = self.processes.in_memory(lambda: held_out_losses(self.model, mine))
        self.processes.average(losses)
        return losses

    def gradients(self) -> dict[str, Tensor]:
        """The gradients [M, ...] that `backward` left."""
        return self.model.gradients()

    def update(self, factor: float) -> Tensor:
        """Clip and take one update at `factor` times the peak learning rates; norms [M] before clipping."""
        return self.optimizer.step(factor)

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimizer state as flat named tensors, for a checkpoint."""
        optimizer = {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        return {"flat": self.model.flat, **optimizer}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        self.model.flat.copy_(tensors["flat"])
        self.optimizer.load_state(_under("optimizer.", tensors))


def members_in_cache(width: int, tokens_a_step: int) -> int:
    """How many members' activations stay in a core's cache: on a CPU, more at once are slower."""
    return max(1, ACTIVATIONS_IN_CACHE // (width * tokens_a_step))


def train(
    members: Sequence[Member],
    make_trainer: Callable[[Sequence[Member]], Trainer],
    group_size: int,
    width: int,
    training: TrainingSettings,
    validation: TokenFile,
    *,
    checkpoint: Path | None = None,
    settings_hash: str = "",
    checkpoint_seconds: float = 120.0,
    device: torch.device | str = "cpu",
    processes: Processes = ALONE,
    micro_batches: int = 1,
    report: Report = silent,
    report_seconds: float = 0.25,
) -> Curves:
    """Train all members to the end, `group_size` of them at a time, going on from the checkpoint if there is one.

    A group trains through all its steps and is freed before the next one is built. A group that does not fit
    in the device's memory starts again with half the members, a single member with its batches in twice as many
    parts, and so do those after it. After a checkpoint the groups keep the size that they had.

    Args:
        members: whom to train; the curves have them in this order.
        make_trainer: builds the trainer of a group.
        group_size: members of a group; the last one may have fewer.
        width: that of the members, for messages.
        training: their settings.
        validation: tokens of the held-out losses.
        checkpoint: written every `checkpoint_seconds` or less often (`snapshots`), and when training is complete: from
            that one the curves come at once. The caller removes it when the curves are safe.
        settings_hash: which settings the checkpoint belongs to.
        device: whose energy is measured: that of the trainers.
        processes: who trains with this one; every one of them calls this function with the same arguments.
        micro_batches: parts of a batch that follow one another, their gradients added up, to take less memory.
        report: called with the updates done, counted over all members, at most every `report_seconds`, since
            a GPU is waited for each time, and after the last step of a group.

    Raises:
        UserError: a loss or gradient is not finite before the first update; a batch cannot be divided among so many
            processes and parts.
        MachineError: a single member does not fit in the device's memory, with one sequence at a time; the disk cannot
            hold a checkpoint.
        OSError: the checkpoint cannot be written.
        Interrupted: SIGTERM or SIGINT came; it says which checkpoint there is, and how old it is.
    """
    held_out = torch.from_numpy(
        validation.fixed_batches(training.evaluation_batches, training.batch_size, training.context_length)
    )
    evaluation_step = training.evaluation_steps
    curves = {
        "train_loss": torch.full((len(members), training.steps), torch.nan),
        "grad_norm": torch.full((len(members), training.steps), torch.nan),
        "val_loss": torch.full((len(members), len(evaluation_step)), torch.nan),
    }
    position = Position(trained_members=0, group_size=group_size, step=0, micro_batches=micro_batches)
    state: dict[str, Tensor] = {}
    before = NOTHING
    if checkpoint and (saved := processes.leader_first(partial(load_checkpoint, checkpoint, settings_hash))):
        tensors, position = saved
        curves, state = _under("curves.", tensors), _under("group.", tensors)
        before = Spent(float(tensors.pop("seconds")), float(tensors.pop("joules", torch.tensor(torch.nan))))
        before = before if processes.leads else before._replace(joules=0.0)  # one of them counts what all have spent
        tensors.clear()
    _check_division(training.batch_size, processes.count, position.micro_batches)
    meter = Meter(device, before)
    began = last_reported = time.monotonic()
    updates = 0  # since `began`, counted over members
    checkpoints = Checkpoints(checkpoint, settings_hash, checkpoint_seconds) if checkpoint else None

    def spent() -> Spent:
        mine = meter.read()
        return mine._replace(joules=processes.total(mine.joules))

    def everything(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint holds; all processes ask for it, since they add up what they have spent."""
        tensors = {f"curves.{name}": curve for name, curve in curves.items()}
        tensors |= {f"group.{name}": tensor for name, tensor in group.items()}
        return tensors | {name: torch.tensor(n, dtype=torch.float64) for name, n in spent()._asdict().items()}

    def train_group(position: Position, state: dict[str, Tensor]) -> None:
        nonlocal last_reported, updates
        trained, size, start, _ = position
        group = members[trained : trained + size]
        trainer = processes.in_memory(partial(make_trainer, group))
        trainer.micro_batches = position.micro_batches
        if state:
            trainer.load_state(state)
            state.clear()
        if checkpoints and processes.leads:
            checkpoints.announce(trainer.state())
        batches = held_out.to(trainer.device)
        # On the trainer's device, so that a GPU is not waited for after every step.
        own = {name: curve[trained : trained + size].to(trainer.device) for name, curve in curves.items()}

        def bring_over() -> None:
            for name, curve in own.items():
                curves[name][trained : trained + size] = curve

        for step in range(start, training.steps):
            if step in evaluation_step:
                own["val_loss"][:, evaluation_step.index(step)] = trainer.held_out_losses(batches)
            losses, norms = trainer.step(step, learning_rate_factor(step, training))
            own["train_loss"][:, step], own["grad_norm"][:, step] = losses, norms
            if step == 0:
                finite = torch.stack([curve[:, 0] for curve in own.values()]).isfinite().all(0)
                check_untrained(group, finite, width)
            updates += len(group)
            now = time.monotonic()
            if now - last_reported >= report_seconds or step + 1 == training.steps:
                best = _best(losses)
                last_reported = time.monotonic()
                rate = updates * training.batch_size * training.context_length / (last_reported - began)
                done = trained * training.steps + len(group) * (step + 1)
                report(done, f"loss {best:.3f}, {rate:,.0f} tokens/s")
            # Processes that share the work end at the same step, and the first one's clock says when to save.
            due = processes.leads and checkpoints is not None and checkpoints.due()
            interrupted, due = processes.any(bool(asked.signal), due)
            if not (due or interrupted):
                continue
            bring_over()
            tensors, here = everything(trainer.state()), position._replace(step=step + 1)
            lost = 0.0
            if checkpoints and processes.leads and not interrupted:
                checkpoints.save(tensors, here)
            elif checkpoints and processes.leads:
                lost = checkpoints.last(tensors, here, asked.save_until)
            if interrupted:
                processes.any(False)  # the first one is still writing: who ends before it would end it too
                raise ended(asked.signal or "a signal", lost)
        own["val_loss"][:, -1] = trainer.held_out_losses(batches)
        bring_over()

    def ended(name: str, lost: float) -> Interrupted:
        """NaN seconds are lost where there is no checkpoint."""
        return Interrupted(name) if math.isnan(lost) else Interrupted(name, checkpoint, lost)

    def last_words(name: str) -> str:
        return str(ended(name, checkpoints.age() if checkpoints else math.nan))

    with closing(checkpoints) if checkpoints else nullcontext(), noted_signals(last_words) as asked:
        while (trained := position.trained_members) < len(members):
            try:
                train_group(position, state)
                position = position._replace(trained_members=trained + position.group_size, step=0)
                tensors = everything({})
                if checkpoints and processes.leads:
                    checkpoints.replace(tensors, position)
                tensors.clear()
            except torch.OutOfMemoryError:
                size = min(position.group_size, len(members) - trained)
                if size > 1:
                    position = position._replace(group_size=size // 2, step=0)
                    log.warning(
                        "Out of memory: %d members of width %d at once; going on with %d", size, width, size // 2
                    )
                elif parts := _more_micro_batches(training.batch_size // processes.count, position.micro_batches):
                    position = position._replace(group_size=1, step=0, micro_batches=parts)
                    log.warning("Out of memory: 1 member of width %d; going on with batches in %d parts", width, parts)
                else:
                    raise MachineError(
                        f"width {width}: a single member does not fit in the device's memory with one sequence of "
                        f"{training.context_length} tokens at a time; make training.context_length smaller or use a "
                        "device with more memory"
                    ) from None
            state.clear()
            if checkpoints:
                checkpoints.forget()
            # What the group leaves goes back to the device before the next one asks for memory.
            gc.collect()
            torch.cuda.empty_cache()
        if processes.any(bool(asked.signal))[0]:  # too late for a step to see it
            raise ended(asked.signal or "a signal", 0.0)

    # From its first loss that is not finite a member has no losses any more, whatever its arithmetic gives.
    alive = curves["train_loss"].isfinite().cumprod(1).bool()
    curves["train_loss"][~alive] = torch.nan
    curves["grad_norm"][~alive] = torch.nan
    done = torch.tensor(evaluation_step).clamp(max=training.steps) - 1
    alive_then = alive[:, done.clamp(min=0)] & curves["val_loss"].isfinite()
    curves["val_loss"][~alive_then] = torch.nan
    untrained, final = curves["val_loss"][:, 0], curves["val_loss"][:, -1]
    return Curves(
        train_loss=curves["train_loss"].numpy(),
        grad_norm=curves["grad_norm"].numpy(),
        evaluation_step=np.array(evaluation_step),
        val_loss=curves["val_loss"].numpy(),
        diverged=(~(final <= untrained)).numpy(),
        spent=spent(),
        evaluated_tokens=len(evaluation_step) * held_out[..., 1:].numel(),
    )


def check_untrained(members: Sequence[Member], finite: Tensor, width: int) -> None:
    """Raises UserError where `finite` [M] is false of a member that no learning rate has touched yet."""
    if not finite.all():
        member = members[int((~finite).nonzero()[0, 0])]
        trial = f", trial {member.trial}" if member.trial else ""
        raise UserError(
            f"width {width}: rule set {member.rules}{trial}: the model is not finite before the first update, so that "
            "no learning rate is to blame; make model.initial_scale smaller, or model.norm_epsilon larger"
        )


def _check_division(batch_size: int, processes: int, micro_batches: int) -> None:
    if batch_size % (processes * micro_batches):
        raise UserError(
            f"training.batch_size: {batch_size}: cannot be divided among {processes} processes with --micro-batches "
            f"{micro_batches}; their product must be one of its divisors"
        )


def _more_micro_batches(sequences: int, parts: int) -> int | None:
    """At least twice as many parts of so many sequences; None where each has but one already."""
    return next((more for more in range(2 * parts, sequences + 1) if sequences % more == 0), None)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _best(losses: Tensor) -> float:
    finite = losses[losses.isfinite()]
    return float(finite.min()) if len(finite) else float("nan")
