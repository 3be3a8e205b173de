"""Residual addition and RMSNorm in one pass: x ← x + delta, h = gain · x / rms(x)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Warps of the backward kernel over all members: what runs at once on the 132 multiprocessors of an H100 or H200.
_BACKWARD_WARPS = 16 * 132


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,
    delta,
    gain,
    x_new,
    h,
    rstd,
    gain_stride,
    rows,
    epsilon,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    member = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    row_inside, column_inside = row < rows, column < WIDTH
    inside = row_inside[:, None] & column_inside[None, :]
    flat_row = member * rows + row
    offset = flat_row[:, None] * WIDTH + column[None, :]

    value = tl.load(x + offset, inside, other=0.0)
    if HAS_DELTA:
        value += tl.load(delta + offset, inside, other=0.0).to(tl.float32)
        tl.store(x_new + offset, value, inside)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + epsilon)
    tl.store(rstd + flat_row, inverse, row_inside)
    scale = tl.load(gain + member * gain_stride + column, column_inside, other=0.0)
    tl.store(h + offset, value * inverse[:, None] * scale[None, :], inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dx_new,
    dh,
    x_new,
    rstd,
    gain,
    dx,
    ddelta,
    partial,
    gain_stride,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DX_NEW: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    member = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    column_inside = column < WIDTH
    scale = tl.load(gain + member * gain_stride + column, column_inside, other=0.0)
    dgain = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        row_inside = row < rows
        inside = row_inside[:, None] & column_inside[None, :]
        flat_row = member * rows + row
        offset = flat_row[:, None] * WIDTH + column[None, :]
        inverse = tl.load(rstd + flat_row, row_inside, other=0.0)[:, None]
        normed = tl.load(x_new + offset, inside, other=0.0) * inverse
        gradient = tl.load(dh + offset, inside, other=0.0).to(tl.float32)
        if HAS_DX_NEW:  # asked for before the sums below wait
            passed = tl.load(dx_new + offset, inside, other=0.0)
        dgain += gradient * normed
        gradient *= scale[None, :]
        along = tl.sum(gradient * normed, 1)[:, None] / WIDTH
        gradient = (gradient - along * normed) * inverse
        if HAS_DX_NEW:
            gradient += passed
        tl.store(dx + offset, gradient, inside)
        if HAS_DELTA:
            tl.store(ddelta + offset, gradient, inside)
    slot = member * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial + slot * WIDTH + column, tl.sum(dgain, 0), column_inside)


def _tile(width: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile that spans the width and has about so many elements."""
    block = triton.next_power_of_2(width)
    return max(1, elements // block), block


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        gain: Tensor,
        gain_gradient: Tensor,
        epsilon: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        members, rows, width = x.shape
        x_new = x if delta is None else torch.empty_like(x)
        h = torch.empty_like(x, dtype=dtype)
        rstd = x.new_empty(members, rows)
        tile_rows, block = _tile(width, 4096)
        _forward_kernel[(triton.cdiv(rows, tile_rows), members)](
            x,
            x if delta is None else delta,
            gain,
            x_new,
            h,
            rstd,
            gain.stride(0),
            rows,
            epsilon,
            WIDTH=width,
            ROWS=tile_rows,
            BLOCK=block,
            HAS_DELTA=delta is not None,
            num_warps=4,
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_new, rstd, gain)
        ctx.gain_gradient = gain_gradient
        ctx.delta_dtype = None if delta is None else delta.dtype
        return x_new, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_new: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x_new, rstd, gain = ctx.saved_tensors
        has_delta = ctx.delta_dtype is not None
        if dh is None:  # nothing came through the norm
            ctx.gain_gradient.zero_()
            ddelta = dx_new.to(ctx.delta_dtype) if has_delta and dx_new is not None else None
            return dx_new, ddelta, None, None, None, None
        members, rows, width = x_new.shape
        dx = torch.empty_like(x_new)
        ddelta = torch.empty_like(x_new, dtype=ctx.delta_dtype) if has_delta else None
        tile_rows, block = _tile(width, 2048)
        warps = 4 if block <= 2048 else 8
        programs = min(max(1, _BACKWARD_WARPS // (warps * members)), triton.cdiv(rows, tile_rows))
        partial = x_new.new_empty(members, programs, width)
        _backward_kernel[(programs, members)](
            dx if dx_new is None else dx_new.contiguous(),
            dh.contiguous(),
            x_new,
            rstd,
            gain,
            dx,
            dx if ddelta is None else ddelta,
            partial,
            gain.stride(0),
            rows,
            WIDTH=width,
            ROWS=tile_rows,
            BLOCK=block,
            HAS_DX_NEW=dx_new is not None,
            HAS_DELTA=has_delta,
            num_warps=warps,
        )
        torch.sum(partial, 1, out=ctx.gain_gradient)
        return dx, ddelta, None, None, None, None


def add_norm(
    x: Tensor, delta: Tensor | None, gain: Tensor, gain_gradient: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalise the sum.

    Args:
        x: residual stream ``[M, N, d]`` float32 of M members and N tokens; must require grad.
        delta: what is added to it ``[M, N, d]``, usually of `dtype`; None adds nothing.
        gain: RMSNorm gains ``[M, d]`` float32, any member stride; data to autograd.
        gain_gradient: ``[M, d]`` float32, any member stride; backward overwrites it.
        epsilon: ε under the root.
        dtype: element type of h.

    Returns:
        ``x + delta`` float32 (x itself without delta) and ``h = gain · x_new · rsqrt(mean(x_new²) + ε)`` in `dtype`.
        Backward gives the gradients of x (float32) and delta (its own type).
    """
    x_new, h = _AddNorm.apply(x, delta, gain, gain_gradient, epsilon, dtype)
    return x_new, h
