"""How many members fit on a GPU, by measurement: two small groups take a few steps, and a line through their peaks."""

import gc
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gdn_mup.training.sweep import Member, Trainer

log = logging.getLogger(__name__)

SHARE = 0.9  # of the free memory: what a line through two points may miss, and fragments
PROBE_STEPS = 4  # enough to reach the recorded graph


def members_that_fit(
    members: Sequence[Member], make_trainer: Callable[[Sequence[Member]], Trainer], batches: Tensor
) -> int:
    """The largest group of `members` that the current GPU holds, as groups of one and of two predict it; at least 1.

    `batches` [count, B, T + 1] are those of the held-out losses. Groups come out equal: three groups of seven rather
    than nine, nine and three. Where not even one member fits, training it will say so.
    """
    if len(members) < 3:
        return len(members)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    try:
        one, two = (_peak(make_trainer, members[:count], batches) for count in (1, 2))
    except torch.OutOfMemoryError:  # perhaps not even one, unless its batches are divided
        return 1
    each = max(two - one, 1)
    fit = max(1, min(len(members), int((SHARE * free - (one - each)) / each)))
    groups = -(-len(members) // fit)
    size = -(-len(members) // groups)
    log.info(
        "%.2f GiB a member, %.0f GiB free: %d members in %d group%s of %d",
        each / 2**30, free / 2**30, len(members), groups, "s" if groups > 1 else "", size,
    )  # fmt: skip
    return size


def _peak(make_trainer: Callable[[Sequence[Member]], Trainer], members: Sequence[Member], batches: Tensor) -> int:
    """Bytes of the GPU that a group takes at most, beyond what this process holds already."""
    held = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(members)
    trainer.held_out_losses(batches.to(trainer.device))
    for step in range(PROBE_STEPS):
        trainer.step(step, 0.0)
    trainer.held_out_losses(batches.to(trainer.device))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_reserved() - held
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    return peak
