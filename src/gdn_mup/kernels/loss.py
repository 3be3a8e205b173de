"""Readout and cross-entropy together, so that the logits of only one member exist at a time."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn_mup.kernels.matmul import write_product

# Vocabularies up to this size are read once, in one block; larger ones twice, block by block.
_LARGEST_BLOCK = 8192


@triton.jit(do_not_specialize=["rows"])
def _cross_entropy_kernel(
    logits,
    targets,
    losses,
    rows,
    VOCABULARY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """Each row's loss; WITH_GRADIENT replaces the logits by (softmax - onehot) / rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = row < rows
    target = tl.load(targets + row, row_inside, other=0)[:, None]
    base = logits + row.to(tl.int64)[:, None] * VOCABULARY
    weight = 1.0 / rows
    if VOCABULARY <= BLOCK:
        column = tl.arange(0, BLOCK)[None, :]
        column_inside = column < VOCABULARY
        inside = row_inside[:, None] & column_inside
        value = tl.load(base + column, inside, other=0.0).to(tl.float32)
        highest = tl.max(tl.where(column_inside, value, -float("inf")), 1)
        exponential = tl.where(column_inside, tl.exp(value - highest[:, None]), 0.0)
        total = tl.sum(exponential, 1)
        at_target = tl.sum(tl.where(column == target, value, 0.0), 1)
        if WITH_GRADIENT:
            gradient = exponential * (weight / total)[:, None] - tl.where(column == target, weight, 0.0)
            tl.store(base + column, gradient, inside)
    else:
        highest = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        at_target = tl.zeros([ROWS], tl.float32)
        for start in range(0, VOCABULARY, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            column_inside = column < VOCABULARY
            inside = row_inside[:, None] & column_inside
            value = tl.load(base + column, inside, other=0.0).to(tl.float32)
            raised = tl.maximum(highest, tl.max(tl.where(column_inside, value, -float("inf")), 1))
            exponential = tl.where(column_inside, tl.exp(value - raised[:, None]), 0.0)
            total = total * tl.exp(highest - raised) + tl.sum(exponential, 1)
            at_target += tl.sum(tl.where(column == target, value, 0.0), 1)
            highest = raised
        if WITH_GRADIENT:
            for start in range(0, VOCABULARY, BLOCK):
                column = start + tl.arange(0, BLOCK)[None, :]
                inside = row_inside[:, None] & (column < VOCABULARY)
                value = tl.load(base + column, inside, other=0.0).to(tl.float32)
                gradient = tl.exp(value - highest[:, None]) * (weight / total)[:, None]
                tl.store(base + column, gradient - tl.where(column == target, weight, 0.0), inside)
    tl.store(losses + row, tl.log(total) + (highest - at_target), row_inside)


def _losses(
    h: Tensor, readout: Tensor, targets: Tensor, dh: Tensor | None = None, readout_gradient: Tensor | None = None
) -> Tensor:
    """Mean loss of each member ``[M]``; fills `dh` and `readout_gradient` if they are given."""
    members, rows, _ = h.shape
    vocabulary = readout.shape[1]
    block = min(triton.next_power_of_2(vocabulary), _LARGEST_BLOCK)
    tile_rows = max(1, 4096 // block)
    logits = h.new_empty(rows, vocabulary)  # one buffer for all members
    losses = torch.empty(members, rows, dtype=torch.float32, device=h.device)
    for member in range(members):
        torch.mm(h[member], readout[member].t(), out=logits)
        _cross_entropy_kernel[(triton.cdiv(rows, tile_rows),)](
            logits,
            targets,
            losses[member],
            rows,
            VOCABULARY=vocabulary,
            ROWS=tile_rows,
            BLOCK=block,
            WITH_GRADIENT=dh is not None,
            num_warps=4 if block <= 4096 else 8,
        )
        if dh is not None and readout_gradient is not None:
            torch.mm(logits, readout[member], out=dh[member])
            write_product(logits.t()[None], h[member : member + 1], readout_gradient[member : member + 1])
    return losses.mean(1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, readout: Tensor, readout_gradient: Tensor, targets: Tensor) -> Tensor:
        dh = torch.empty_like(h)
        losses = _losses(h, readout, targets, dh, readout_gradient)
        ctx.save_for_backward(dh)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        (dh,) = ctx.saved_tensors
        return dh, None, None, None


def linear_cross_entropy(h: Tensor, readout: Tensor, readout_gradient: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of ``h @ readoutᵀ`` against the targets, for each member.

    The gradients are those of ``losses.sum()``: they are computed along with the losses, `readout_gradient` is
    overwritten at once, and backward gives h's gradient whatever gradient the losses receive. Without grad mode, or
    if h requires none, only the losses are computed.

    Args:
        h: normed residual stream ``[M, N, d]`` of M members and N tokens.
        readout: ``[M, V, d]`` in h's type, any member stride; data to autograd.
        readout_gradient: ``[M, V, d]`` float32, any member stride.
        targets: token ids ``[N]`` int64 in ``[0, V)``, shared by members.

    Returns:
        losses in nats, ``[M]`` float32. NaN or infinite logits make the loss of their member NaN or infinite.
    """
    if torch.is_grad_enabled() and h.requires_grad:
        losses: Tensor = _LinearCrossEntropy.apply(h, readout, readout_gradient, targets)
        return losses
    return _losses(h, readout, targets)
