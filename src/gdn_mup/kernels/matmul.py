"""Matrix products over members: the vendor's, with float32 gradients written where the optimizer reads them."""

from typing import Any

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Each member's own linear map: x [M, N, fan_in] with weight [M, fan_out, fan_in] -> [M, N, fan_out].

    x and weight are of one type; weight is data to autograd, with any member stride. Backward overwrites
    gradient [M, fan_out, fan_in] float32 with the weight's.
    """
    y: Tensor = _Linear.apply(x, weight, gradient)
    return y


def write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out [M, n, m] float32 = a [M, n, k] · b [M, k, m], whatever type a and b have."""
    # The mixed product on CUDA checks neither.
    assert out.dtype == torch.float32 and out.shape == (a.shape[0], a.shape[1], b.shape[2])
    if a.dtype == torch.float32:
        torch.bmm(a, b, out=out)
    else:
        torch.bmm(a, b, out_dtype=torch.float32, out=out)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        return torch.bmm(x, weight.mT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        write_product(dy.mT, x, ctx.gradient)
        return torch.bmm(dy, weight), None, None
