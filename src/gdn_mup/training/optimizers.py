"""AdamW and SGD over members: torch's own fused optimizers, one parameter group a rule and member.

A member's slice of a parameter is a tensor of its own to the optimizer, so that each has its own learning
rate, ε and weight decay, and a member that diverges touches nobody.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gdn_mup.scaling.apply import ModelScaling
from gdn_mup.scaling.rules import Scaling
from gdn_mup.training.config import OptimizerName, TrainingSettings


class MemberOptimizer:
    """One optimizer for all members.

    `parameters` maps names to tensors [M, ...]; `scalings` and `learning_rates` have one entry a member,
    the learning rate being that at the base width.
    """

    def __init__(
        self,
        optimizer: OptimizerName,
        parameters: Mapping[str, Tensor],
        scalings: Sequence[ModelScaling],
        learning_rates: Sequence[float],
        training: TrainingSettings,
    ) -> None:
        self._slices: list[tuple[Tensor, Tensor, int]] = []
        groups: dict[tuple[int, Scaling, bool], list[Tensor]] = defaultdict(list)
        for name, parameter in parameters.items():
            for member, scaling in enumerate(scalings):
                piece = parameter.detach()[member]
                self._slices.append((piece, parameter, member))
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

    def step(self, factor: float) -> None:
        """One update from the parameters' gradients at `factor` times the peak learning rates."""
        for piece, parameter, member in self._slices:
            assert parameter.grad is not None
            piece.grad = parameter.grad[member]
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self._optimizer.step()

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
