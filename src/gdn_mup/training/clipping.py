"""Gradient clipping, each member by its own norm."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gdn_mup.scaling.apply import ModelScaling
from gdn_mup.training.config import Clipping


def norm_weights(
    clipping: Clipping, sgd_scalings: Sequence[ModelScaling], names: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """What each parameter's ‖g‖² weighs in each member's norm: name -> [M].

    The raw global norm weighs all alike, and is not invariant to width: ‖g‖ of a readout grows as √d. The
    width-invariant norm weighs ‖g‖² by the parameter's SGD learning-rate multiplier, whichever optimizer
    is used: it is the gradient norm in the equivalent parametrization whose multipliers are all 1.
    """
    weigh = clipping == "width_invariant_norm"
    return {
        name: torch.tensor([s.parameters[name].learning_rate if weigh else 1.0 for s in sgd_scalings], device=device)
        for name in names
    }


def gradient_norms(gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Each member's norm [M] of gradients [M, ...]."""
    squares = [gradient.flatten(1).square().sum(1) * weights[name] for name, gradient in gradients.items()]
    return torch.stack(squares).sum(0).sqrt()


def clip(gradients: Mapping[str, Tensor], norms: Tensor, clip_norm: float) -> None:
    """Scale down, in place, the gradients of members whose norm [M] exceeds `clip_norm`.

    A member whose norm is not finite gets NaN gradients: it has diverged, and nobody else notices.
    """
    factors = (clip_norm / norms).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
