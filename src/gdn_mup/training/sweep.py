"""Train members side by side: every (rule set, learning rate) of one width, optimizer and seed.

All members see the same batches in the same order, so that differences between learning rates and between
rule sets are paired.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.measurement.evaluation import held_out_losses, member_losses
from gdn_mup.model.config import GrowthMode, ModelSettings, ModelShape, model_shape
from gdn_mup.model.language_model import LanguageModel, initialize, parameter_table
from gdn_mup.progress import Report, silent
from gdn_mup.scaling.apply import ModelScaling, distinct_rules, scale_rule_sets
from gdn_mup.training.checkpoint import load_checkpoint, save_checkpoint
from gdn_mup.training.clipping import clip, gradient_norms, norm_weights
from gdn_mup.training.config import OptimizerName, TrainingSettings
from gdn_mup.training.optimizers import MemberOptimizer
from gdn_mup.training.schedule import learning_rate_factor

# Activations of one kind, members × tokens × width, that a core works on at a time. Measured on the laptop
# study: at width 128 groups of 8 members train 12 % faster than 20 at once; at width 32 all at once is best.
ACTIVATIONS_IN_CACHE = 2**18


class Member(NamedTuple):
    """One training run among those trained together. The learning rate is that at the base width."""

    rules: str
    learning_rate: float


class Scaled(NamedTuple):
    """A model at one width, and what each rule set makes of it."""

    base: ModelShape
    target: ModelShape
    scalings: dict[str, ModelScaling]  # for the optimizer that trains
    sgd_scalings: dict[str, ModelScaling]  # whose learning rates weigh the width-invariant norm


class Curves(NamedTuple):
    """What training leaves behind, one row a member. Losses in nats per token."""

    train_loss: np.ndarray  # [M, steps], of each step's batch before its update
    grad_norm: np.ndarray  # [M, steps], as clipping compares it, before clipping
    evaluation_step: np.ndarray  # [E], updates done; from 0 to steps
    val_loss: np.ndarray  # [M, E]
    diverged: np.ndarray  # [M], bool
    seconds: float


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


def distinct_members(scaled: Scaled, learning_rates: Sequence[float]) -> tuple[list[Member], dict[str, str]]:
    """The members worth training, and for each rule set the one that stands for it.

    Rule sets that coincide, as all do at the base width, are trained once.
    """
    both = {rules: (scaled.scalings[rules], scaled.sgd_scalings[rules]) for rules in scaled.scalings}
    stands_for = distinct_rules(both)
    rules_trained = list(dict.fromkeys(stands_for.values()))
    return [Member(rules, rate) for rules in rules_trained for rate in learning_rates], stands_for


class Trainer:
    """Members, their optimizer and the data they share: `backward`, then `update`, for all of them at once."""

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
    ) -> None:
        self.training, self.seed, self.tokens, self.device = training, seed, tokens, torch.device(device)
        scalings = [scaled.scalings[member.rules] for member in members]
        self.model = LanguageModel(scaled.target, len(members), model.norm_epsilon)
        initialize(self.model, scaled.base, model.initial_scale, scalings, seed)
        self.model.to(self.device)
        self.optimizer = MemberOptimizer(
            optimizer, self.model.weights, scalings, [m.learning_rate for m in members], training
        )
        sgd_scalings = [scaled.sgd_scalings[member.rules] for member in members]
        self._norm_weights = norm_weights(training.clipping, sgd_scalings, list(self.model.weights), self.device)

    def batch(self, step: int) -> Tensor:
        """Token ids [B, T + 1] of update `step` = 0, 1, …"""
        ids = self.tokens.batch(self.seed, step, self.training.batch_size, self.training.context_length)
        return torch.from_numpy(ids).to(self.device)

    def backward(self, step: int) -> Tensor:
        """Losses [M] of the step's batch; leaves their gradients on the parameters."""
        self.model.zero_grad(set_to_none=True)
        losses = member_losses(self.model, self.batch(step))
        losses.sum().backward()  # members share nothing, so each gets the gradient of its own loss
        return losses.detach()

    def gradients(self) -> dict[str, Tensor]:
        """The gradients [M, ...] that `backward` left."""
        return {name: weight.grad for name, weight in self.model.weights.items() if weight.grad is not None}

    def update(self, factor: float) -> Tensor:
        """Clip and take one update at `factor` times the peak learning rates; norms [M] before clipping."""
        gradients = self.gradients()
        norms = gradient_norms(gradients, self._norm_weights)
        if self.training.clipping != "none":
            clip(gradients, norms, self.training.clip_norm)
        self.optimizer.step(factor)
        return norms

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimizer state as flat named tensors, for a checkpoint."""
        weights = {f"weights.{name}": weight.detach() for name, weight in self.model.weights.items()}
        return weights | {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        for name, weight in self.model.weights.items():
            weight.copy_(tensors[f"weights.{name}"])
        self.optimizer.load_state(_under("optimizer.", tensors))


def group_members(members: Sequence[Member], width: int, tokens_a_step: int) -> list[Sequence[Member]]:
    """Members in groups whose activations stay in a core's cache: on a CPU, more at once are slower."""
    size = max(1, ACTIVATIONS_IN_CACHE // (width * tokens_a_step))
    return [members[i : i + size] for i in range(0, len(members), size)]


def train(
    groups: Sequence[Trainer],
    validation: TokenFile,
    *,
    checkpoint: Path | None = None,
    settings_hash: str = "",
    checkpoint_seconds: float = 120.0,
    report: Report = silent,
) -> Curves:
    """Train all groups to the end, step by step together, going on from the checkpoint if there is one.

    Groups have the same settings, seed and tokens; the curves have the members of all of them in order.
    The checkpoint is written every `checkpoint_seconds` and removed when training is complete.
    """
    training, members = groups[0].training, sum(group.model.members for group in groups)
    held_out = torch.from_numpy(
        validation.fixed_batches(training.evaluation_batches, training.batch_size, training.context_length)
    ).to(groups[0].device)
    evaluation_step = sorted({*range(0, training.steps, training.evaluate_every), training.steps})
    curves = {
        "train_loss": torch.full((members, training.steps), torch.nan),
        "grad_norm": torch.full((members, training.steps), torch.nan),
        "val_loss": torch.full((members, len(evaluation_step)), torch.nan),
        "seconds": torch.zeros((), dtype=torch.float64),
    }
    start = 0
    if checkpoint and (saved := load_checkpoint(checkpoint, settings_hash)):
        tensors, start = saved
        curves = _under("curves.", tensors)
        for i, group in enumerate(groups):
            group.load_state(_under(f"group{i}.", tensors))

    def evaluate() -> Tensor:
        return torch.cat([held_out_losses(group.model, held_out) for group in groups])

    tokens_a_step = members * training.batch_size * training.context_length
    before, began = float(curves["seconds"]), time.monotonic()
    last_saved = began
    for step in range(start, training.steps):
        if step in evaluation_step:
            curves["val_loss"][:, evaluation_step.index(step)] = evaluate()
        factor = learning_rate_factor(step, training)
        results = [(group.backward(step), group.update(factor)) for group in groups]
        losses, norms = (torch.cat(parts) for parts in zip(*results, strict=True))
        curves["train_loss"][:, step], curves["grad_norm"][:, step] = losses, norms
        now = time.monotonic()
        curves["seconds"].fill_(before + now - began)
        rate = (step + 1 - start) * tokens_a_step / (now - began)
        report(step + 1, f"loss {_best(losses):.3f}, {rate:,.0f} tokens/s")
        if checkpoint and now - last_saved >= checkpoint_seconds:
            last_saved = now
            tensors = {f"curves.{name}": curve for name, curve in curves.items()}
            for i, group in enumerate(groups):
                tensors |= {f"group{i}.{name}": tensor for name, tensor in group.state().items()}
            save_checkpoint(checkpoint, tensors, settings_hash, step + 1)
    curves["val_loss"][:, -1] = evaluate()
    if checkpoint:
        checkpoint.unlink(missing_ok=True)

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
        seconds=before + time.monotonic() - began,
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _best(losses: Tensor) -> float:
    finite = losses[losses.isfinite()]
    return float(finite.min()) if len(finite) else float("nan")
