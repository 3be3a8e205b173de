"""AdamW and SGD over members, with clipping: torch's own fused updates, one call a rule and member.

A member's slice of a parameter is a tensor of its own to the update, so that each has its own learning
rate, ε and weight decay, and a member that diverges touches nobody.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# The functions, not the classes: those import torch.compile's machinery, which takes two seconds, for nothing.
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

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


class _Group(NamedTuple):
    """Slices that one call updates: those of one member under one rule."""

    places: list[tuple[str, int]]  # of each slice: its parameter and its member
    slices: list[Tensor]
    momenta: list[Tensor]
    squares: list[Tensor]  # AdamW's mean squares; SGD has none
    steps: list[Tensor]  # AdamW's updates done, a scalar each
    learning_rate: float  # at its peak
    weight_decay: float
    epsilon: float


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
        adaptive = optimizer == "adamw"
        self._update = self._adamw if adaptive else self._sgd
        places: dict[tuple[int, Scaling], list[tuple[str, int]]] = defaultdict(list)
        for name in model.weights:
            for member, scaling in enumerate(scalings):
                rule = scaling.parameters[name]._replace(init_std=1.0)  # the init is not the optimizer's
                places[member, rule].append((name, member))
        self._groups = []
        for (member, rule), group in places.items():
            slices = [model.weights[name][member] for name, member in group]
            self._groups.append(
                _Group(
                    places=group,
                    slices=slices,
                    momenta=[torch.zeros_like(piece) for piece in slices],
                    squares=[torch.zeros_like(piece) for piece in slices] if adaptive else [],
                    steps=[torch.zeros((), device=model.flat.device) for _ in slices] if adaptive else [],
                    learning_rate=learning_rates[member] * rule.learning_rate,
                    weight_decay=training.weight_decay * rule.weight_decay,
                    epsilon=training.epsilon * rule.epsilon,
                )
            )

    def step(self, factor: float) -> Tensor:
        """Clip and take one update at `factor` times the peak learning rates; norms [M] before clipping."""
        gradients = self._model.gradients()  # views: clipping shows in them
        norms = gradient_norms(gradients, self._norm_weights)
        if self._training.clipping != "none":
            stored = {name: tensor.grad for name, tensor in self._model.tensors.items() if tensor.grad is not None}
            clip(stored, norms, self._training.clip_norm)
        for group in self._groups:
            self._update(group, [gradients[name][member] for name, member in group.places], factor)
        return norms

    def _adamw(self, group: _Group, gradients: list[Tensor], factor: float) -> None:
        adamw(
            group.slices,
            gradients,
            group.momenta,
            group.squares,
            [],  # AMSGrad's largest squares
            group.steps,
            fused=True,
            amsgrad=False,
            beta1=self._training.momentum,
            beta2=self._training.beta2,
            lr=group.learning_rate * factor,
            weight_decay=group.weight_decay,
            eps=group.epsilon,
            maximize=False,
        )

    def _sgd(self, group: _Group, gradients: list[Tensor], factor: float) -> None:
        sgd(
            group.slices,
            gradients,
            list(group.momenta),  # a list of tensors or None, to the type checker
            fused=True,
            weight_decay=group.weight_decay,
            momentum=self._training.momentum,
            lr=group.learning_rate * factor,
            dampening=0.0,
            nesterov=self._training.momentum > 0,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """Momenta and step counts as flat named tensors, for a checkpoint."""
        return {
            f"{number}.{kind}.{i}": tensor
            for number, group in enumerate(self._groups)
            for kind, tensors in (("momentum", group.momenta), ("square", group.squares), ("step", group.steps))
            for i, tensor in enumerate(tensors)
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
