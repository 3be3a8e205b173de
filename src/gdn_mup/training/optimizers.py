"""AdamW and SGD over members, with clipping: torch's own fused optimizers, one parameter group a rule and member.

A member's slice of a parameter is a tensor of its own to the optimizer, so that each has its own learning
rate, ε and weight decay, and a member that diverges touches nobody.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gdn_mup.model.language_model import LanguageModel
from gdn_mup.scaling.apply import ModelScaling
from gdn_mup.scaling.rules import Scaling
from gdn_mup.training.clipping import clip, gradient_norms
from gdn_mup.training.config import OptimizerName, TrainingSettings


class Optimizer(Protocol):
    """What a trainer asks of its optimizer."""

    def step(self, factor: float) -> Tensor:
        """Clip and take one update at `factor` times the peak learning rates; norms [M] before clipping."""

    def state(self) -> dict[str, Tensor]:
        """Momenta and step counts as flat named tensors, for a checkpoint."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""


class MemberOptimizer:
    """One optimizer for all members of a model.

    `scalings` and `learning_rates` have one entry a member, the learning rate being that at the base width;
    `norm_weights` are those of `clipping.norm_weights`.
    """

    def __init__(
        self,
        optimizer: OptimizerName,
        model: LanguageModel,
        scalings: Sequence[ModelScaling],
        learning_rates: Sequence[float],
        norm_weights: Mapping[str, Tensor],
        training: TrainingSettings,
    ) -> None:
        self._model, self._norm_weights, self._training = model, norm_weights, training
        self._slices: list[tuple[Tensor, str, int]] = []
        groups: dict[tuple[int, Scaling, bool], list[Tensor]] = defaultdict(list)
        for name, weight in model.weights.items():
            for member, scaling in enumerate(scalings):
                piece = weight[member]
                self._slices.append((piece, name, member))
                rule = scaling.parameters[name]._replace(init_std=1.0)  # the init is not the optimizer's
                groups[member, rule, piece.dim() > 1].append(piece)
        options = [
            {
                "params": pieces,
                "lr": learning_rates[member] * rule.learning_rate,
                # Gains and gate scalars (vectors) do not decay, as in fla and most language models.
                "weight_decay": training.weight_decay * rule.weight_decay if decays else 0.0,
                **({"eps": training.epsilon * rule.epsilon} if optimizer == "adamw" else {}),
            }
            for (member, rule, decays), pieces in groups.items()
        ]
        if optimizer == "adamw":
            betas = (training.momentum, training.beta2)
            self._optimizer: torch.optim.Optimizer = torch.optim.AdamW(options, betas=betas, fused=True)
        else:
            nesterov = training.momentum > 0
            self._optimizer = torch.optim.SGD(options, momentum=training.momentum, nesterov=nesterov, fused=True)
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]

    def step(self, factor: float) -> Tensor:
        """Clip and take one update at `factor` times the peak learning rates; norms [M] before clipping."""
        gradients = self._model.gradients()  # views: clipping shows in them
        norms = gradient_norms(gradients, self._norm_weights)
        if self._training.clipping != "none":
            stored = {name: tensor.grad for name, tensor in self._model.tensors.items() if tensor.grad is not None}
            clip(stored, norms, self._training.clip_norm)
        for piece, name, member in self._slices:
            piece.grad = gradients[name][member]
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self._optimizer.step()
        return norms

    def state(self) -> dict[str, Tensor]:
        """Momenta and step counts as flat named tensors, for a checkpoint."""
        entries = self._optimizer.state_dict()["state"]
        return {
            f"{index}.{key}": value
            for index, entry in entries.items()
            for key, value in entry.items()
            if isinstance(value, Tensor)
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        entries: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            entries[int(index)][key] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": dict(entries), "param_groups": groups})
