"""SwiGLU: silu(gate) · up."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(u, z, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(WIDTH, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    source = u + row * (2 * WIDTH) + column
    gate = tl.load(source, inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, inside, other=0.0).to(tl.float32)
    tl.store(z + row * WIDTH + column, gate * tl.sigmoid(gate) * up, inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(dz, u, du, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(WIDTH, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    source = row * (2 * WIDTH) + column
    gate = tl.load(u + source, inside, other=0.0).to(tl.float32)
    up = tl.load(u + source + WIDTH, inside, other=0.0).to(tl.float32)
    gradient = tl.load(dz + row * WIDTH + column, inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(du + source, gradient * up * (sigmoid + silu * (1.0 - sigmoid)), inside)
    tl.store(du + source + WIDTH, gradient * silu, inside)


def _grid(rows: int, width: int) -> tuple[tuple[int], int, int]:
    """Programs, and rows and columns of each one's tile: columns that divide the width, if it has such a factor."""
    block = min(width & -width, 1024)
    if block < 32:
        block = min(triton.next_power_of_2(width), 1024)
    tile_rows = 4096 // block
    return (triton.cdiv(rows, tile_rows) * triton.cdiv(width, block),), tile_rows, block


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        members, tokens, width = u.shape[0], u.shape[1], u.shape[2] // 2
        z = u.new_empty(members, tokens, width)
        grid, tile_rows, block = _grid(members * tokens, width)
        _forward_kernel[grid](u, z, members * tokens, WIDTH=width, ROWS=tile_rows, BLOCK=block, num_warps=4)
        ctx.save_for_backward(u)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        members, tokens, width = dz.shape
        du = torch.empty_like(u)
        grid, tile_rows, block = _grid(members * tokens, width)
        _backward_kernel[grid](
            dz.contiguous(), u, du, members * tokens, WIDTH=width, ROWS=tile_rows, BLOCK=block, num_warps=4
        )
        return du


def swiglu(u: Tensor) -> Tensor:
    """``silu(gate) · up`` of ``u [M, N, 2F]``, gate first: ``[M, N, F]`` in u's type. Backward gives u's gradient."""
    z: Tensor = _SwiGLU.apply(u)
    return z
