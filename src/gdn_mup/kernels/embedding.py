"""Token embedding of all members, with a deterministic gradient."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit(do_not_specialize=["rows"])
def _gather_kernel(
    tokens, weight, x, weight_stride, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    member = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.load(tokens + row, row < rows, other=0)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)
    value = tl.load(weight + member * weight_stride + token * WIDTH + column, inside, other=0.0)
    tl.store(x + (member * rows + row)[:, None] * WIDTH + column, value, inside)


@triton.jit(do_not_specialize=["rows"])
def _gradient_kernel(
    dx,
    order,
    offsets,
    gradient,
    gradient_stride,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """Sum of dx over the occurrences of one token: rows order[offsets[token]:offsets[token + 1]]."""
    token = tl.program_id(0)
    member = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    first, end = tl.load(offsets + token), tl.load(offsets + token + 1)
    source = dx + member * rows * WIDTH + column[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, ROWS):
        position = start + tl.arange(0, ROWS)
        row = tl.load(order + position, position < end, other=0)
        inside = (position < end)[:, None] & (column < WIDTH)[None, :]
        total += tl.sum(tl.load(source + row[:, None] * WIDTH, inside, other=0.0), 0)
    target = gradient + member * gradient_stride + token.to(tl.int64) * WIDTH + column
    if ADD:
        total += tl.load(target, column < WIDTH, other=0.0)
    tl.store(target, total, column < WIDTH)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, gradient: Tensor, add: bool) -> Tensor:
        members, _, width = weight.shape
        rows = tokens.numel()
        x = torch.empty(members, rows, width, dtype=weight.dtype, device=weight.device)
        block = triton.next_power_of_2(width)
        tile_rows = max(1, 4096 // block)
        _gather_kernel[(triton.cdiv(rows, tile_rows), members)](
            tokens, weight, x, weight.stride(0), rows, WIDTH=width, ROWS=tile_rows, BLOCK=block, num_warps=4
        )
        ctx.save_for_backward(tokens)
        ctx.gradient, ctx.add = gradient, add
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[None, ...]:
        (tokens,) = ctx.saved_tensors
        gradient = ctx.gradient
        members, vocabulary, width = gradient.shape
        # Sorting int32 instead of int64 halves the passes of the radix sort.
        sorted_tokens, order = torch.sort(tokens.to(torch.int32), stable=True)
        ids = torch.arange(vocabulary + 1, dtype=torch.int32, device=tokens.device)
        offsets = torch.searchsorted(sorted_tokens, ids, out_int32=True)
        block = min(triton.next_power_of_2(width), 256)
        _gradient_kernel[(vocabulary, members, triton.cdiv(width, block))](
            dx.contiguous(),
            order,
            offsets,
            gradient,
            gradient.stride(0),
            tokens.numel(),
            WIDTH=width,
            ROWS=max(1, 4096 // block),
            BLOCK=block,
            ADD=ctx.add,
            num_warps=4,
        )
        return None, None, None, None


def embed(tokens: Tensor, weight: Tensor, gradient: Tensor, add: bool = False) -> Tensor:
    """Look the tokens up in every member's embedding.

    Args:
        tokens: token ids ``[N]`` int64 in ``[0, V)``, shared by M members.
        weight: ``[M, V, d]`` float32, any member stride. It must require grad, as the chain of gradients starts here,
            but autograd's gradient of it is None.
        gradient: ``[M, V, d]`` float32, any member stride: where backward writes the gradient instead.
        add: backward adds to `gradient` instead of overwriting it (tied embeddings).

    Returns:
        ``[M, N, d]`` float32.
    """
    x: Tensor = _Embed.apply(tokens, weight, gradient, add)
    return x
