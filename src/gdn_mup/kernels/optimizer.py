"""AdamW, SGD and gradient norms over all members at once, each parameter of each member by its own coefficients.

Parameters, gradients and momenta are `[M, P]`, P a multiple of 64: all parameters of a member in one row.
`index [P]` int16 says which parameter an element belongs to, and a coefficient is `[M, parameters]`. The arithmetic
is that of torch.optim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_LINE: tl.constexpr = tl.constexpr(64)  # P is a multiple of it: then loads are 16 bytes wide, whatever P is


@triton.jit(do_not_specialize=["lines"])
def _squared_norms(gradient_ptr, index_ptr, weight_ptr, partial_ptr, lines, parameters: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    size = lines * _LINE
    member = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    gradient = tl.load(gradient_ptr + member * size + i, mask=inside, other=0.0)
    index = tl.load(index_ptr + i, mask=inside, other=0)
    weight = tl.load(weight_ptr + member * parameters + index)
    tl.store(partial_ptr + member * tl.num_programs(0) + tl.program_id(0), tl.sum(weight * gradient * gradient, 0))


@triton.jit(do_not_specialize=["lines"])
def _adamw(value_ptr, gradient_ptr, mean_ptr, square_ptr, index_ptr, learning_rate_ptr, weight_decay_ptr, epsilon_ptr,
           clip_ptr, scalars_ptr, beta1, beta2, lines, parameters: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    size = lines * _LINE
    member = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    at = member * size + i
    index = tl.load(index_ptr + i, mask=inside, other=0) + member * parameters
    factor, correction1, correction2 = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    learning_rate = tl.load(learning_rate_ptr + index) * factor
    value = tl.load(value_ptr + at, mask=inside, other=0.0)
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0) * tl.load(clip_ptr + member)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    value -= learning_rate * tl.load(weight_decay_ptr + index) * value
    mean += (1.0 - beta1) * (gradient - mean)
    square = beta2 * square + (1.0 - beta2) * gradient * gradient
    denominator = tl.sqrt(square) / tl.sqrt(correction2) + tl.load(epsilon_ptr + index)
    value -= learning_rate / correction1 * mean / denominator
    tl.store(value_ptr + at, value, mask=inside)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)


@triton.jit(do_not_specialize=["lines"])
def _sgd(value_ptr, gradient_ptr, mean_ptr, index_ptr, learning_rate_ptr, weight_decay_ptr, clip_ptr, scalars_ptr,
         momentum, lines, parameters: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    size = lines * _LINE
    member = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    at = member * size + i
    index = tl.load(index_ptr + i, mask=inside, other=0) + member * parameters
    learning_rate = tl.load(learning_rate_ptr + index) * tl.load(scalars_ptr)
    value = tl.load(value_ptr + at, mask=inside, other=0.0)
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0) * tl.load(clip_ptr + member)
    gradient += tl.load(weight_decay_ptr + index) * value
    mean = momentum * tl.load(mean_ptr + at, mask=inside, other=0.0) + gradient
    value -= learning_rate * (gradient + momentum * mean)
    tl.store(value_ptr + at, value, mask=inside)
    tl.store(mean_ptr + at, mean, mask=inside)


def gradient_norms(gradient: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """√(Σ weight · gradient²) of each member: [M] from gradient [M, P] and weight [M, parameters]."""
    members, size = gradient.shape
    partial = gradient.new_empty(members, triton.cdiv(size, _BLOCK))
    _squared_norms[partial.shape[1], members](
        gradient, index, weight, partial, size // 64, parameters=weight.shape[1], BLOCK=_BLOCK
    )
    return partial.sum(1).sqrt()


def adamw_step(
    values: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    index: Tensor,
    learning_rate: Tensor,
    weight_decay: Tensor,
    epsilon: Tensor,
    clip: Tensor,
    scalars: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """One step of AdamW, in place on values, mean and square [M, P].

    learning_rate, weight_decay and epsilon [M, parameters] are those at the peak of the schedule; clip [M] multiplies a
    member's gradient; scalars = (schedule's factor, 1 - beta1^step, 1 - beta2^step) live on the device, so that a
    captured step can be replayed with new ones.
    """
    members, size = values.shape
    _adamw[triton.cdiv(size, _BLOCK), members](
        values, gradient, mean, square, index, learning_rate, weight_decay, epsilon, clip, scalars, beta1, beta2,
        size // 64, parameters=learning_rate.shape[1], BLOCK=_BLOCK,
    )  # fmt: skip


def sgd_step(
    values: Tensor,
    gradient: Tensor,
    mean: Tensor,
    index: Tensor,
    learning_rate: Tensor,
    weight_decay: Tensor,
    clip: Tensor,
    scalars: Tensor,
    momentum: float,
) -> None:
    """One step of SGD with Nesterov momentum, in place on values and mean [M, P]; scalars[0] is the schedule's factor.

    Without momentum it is plain SGD. Other arguments as for `adamw_step`.
    """
    members, size = values.shape
    _sgd[triton.cdiv(size, _BLOCK), members](
        values, gradient, mean, index, learning_rate, weight_decay, clip, scalars, momentum, size // 64,
        parameters=learning_rate.shape[1], BLOCK=_BLOCK,
    )  # fmt: skip


def parameter_index(counts: list[tuple[int, int]], size: int, device: torch.device) -> Tensor:
    """index [size] int16 from each parameter's (offset, count) in a member's row; padding belongs to the last."""
    index = torch.full((size,), len(counts) - 1, dtype=torch.int16)
    for parameter, (offset, count) in enumerate(counts):
        index[offset : offset + count] = parameter
    return index.to(device)
