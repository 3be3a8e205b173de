"""Losses, one per member."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn_mup.model.language_model import LanguageModel


def member_losses(model: LanguageModel, batch: Tensor) -> Tensor:
    """Mean cross-entropy [M] in nats per token of token ids [B, T + 1]: each predicts the next."""
    logits = model(batch[:, :-1])
    targets = batch[:, 1:].flatten().repeat(model.members)
    return F.cross_entropy(logits.flatten(0, 2), targets, reduction="none").view(model.members, -1).mean(1)


@torch.no_grad()
def held_out_losses(model: LanguageModel, batches: Tensor) -> Tensor:
    """Mean over fixed batches [count, B, T + 1], the same for every member: [M]."""
    return torch.stack([member_losses(model, batch) for batch in batches]).mean(0)
