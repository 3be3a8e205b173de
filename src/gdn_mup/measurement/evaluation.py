"""Losses, one per member."""

import torch
from torch import Tensor

from gdn_mup.model.language_model import LanguageModel


@torch.no_grad()
def held_out_losses(model: LanguageModel, batches: Tensor) -> Tensor:
    """Mean over fixed batches [count, B, T + 1], the same for every member: [M]."""
    return torch.stack([model.losses(batch) for batch in batches]).mean(0)
