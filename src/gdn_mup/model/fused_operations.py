"""The operations of `model.operations` as fused Triton kernels and batched matrix products, for training on a GPU.

Products read 16-bit copies of the float32 parameters; the residual stream, norms, gates and every sum stay in
float32. Gradients of parameters do not pass through autograd: each operation's backward overwrites its part of one
buffer, so that nothing has to be zeroed or added up, and the optimizer reads one row a member.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gdn_mup.kernels import delta_rule, embedding, heads, loss, matmul, mlp, norm
from gdn_mup.model.config import ModelShape

if TYPE_CHECKING:
    from gdn_mup.model.language_model import LanguageModel


class Operand(NamedTuple):
    """A stored tensor [M, ...] as the kernels take it."""

    value: Tensor  # float32
    half: Tensor  # what matrix products read
    gradient: Tensor  # float32, overwritten by each backward


class FusedOperations:
    """The operations for one model; `dtype` is that of matrix products and of most activations."""

    def __init__(self, model: "LanguageModel", dtype: torch.dtype = torch.bfloat16) -> None:
        self._dtype, self._tied = dtype, model.shape.tied_embeddings
        self.gradient = torch.zeros_like(model.flat)
        self._half = torch.zeros_like(model.flat, dtype=dtype)
        halves, gradients = (model.layout.views(flat) for flat in (self._half, self.gradient))
        # Parameters require grad, so the chain of gradients begins at the embedding; into none of them does it lead.
        self._operands = {
            name: Operand(tensor, halves[name], gradients[name]) for name, tensor in model.tensors.items()
        }

    def operands(self, model: "LanguageModel") -> dict[str, Operand]:
        """Every stored tensor as it is now: copies the parameters to 16 bits, and shows where the gradients are."""
        self._half.copy_(model.flat)
        for name, tensor in model.tensors.items():
            tensor.grad = self._operands[name].gradient
        return self._operands

    def embed(self, tokens: Tensor, weight: Operand) -> Tensor:
        return embedding.embed(tokens.flatten(), weight.value, weight.gradient, add=self._tied)

    def add_norm(self, x: Tensor, delta: Tensor | None, gain: Operand, epsilon: float) -> tuple[Tensor, Tensor]:
        return norm.add_norm(x, delta, gain.value, gain.gradient, epsilon, self._dtype)

    def linear(self, x: Tensor, weight: Operand) -> Tensor:
        return matmul.linear(x, weight.half, weight.gradient)

    def mixer(
        self,
        y: Tensor,
        conv: Operand,
        A_log: Operand,
        dt_bias: Operand,
        o_norm: Operand,
        shape: ModelShape,
        batch: int,
        length: int,
        epsilon: float,
        record: Callable[[str, Tensor], None] | None = None,
        output_multiplier: Tensor | None = None,
    ) -> Tensor:
        if record is not None:
            raise ValueError("fused operations record nothing: use model.operations")
        if output_multiplier is not None:
            raise ValueError("fused operations have no multiplier on the delta rule's output: use model.operations")
        y = y.unflatten(1, (batch, length))
        return _Mixer.apply(y, (conv, A_log, dt_bias, o_norm), shape, epsilon)

    def swiglu(self, y: Tensor) -> Tensor:
        return mlp.swiglu(y)

    def cross_entropy(self, h: Tensor, readout: Operand, targets: Tensor) -> Tensor:
        return loss.linear_cross_entropy(h, readout.half, readout.gradient, targets)


class _Mixer(torch.autograd.Function):
    """Short convolution, L2 norms, gates, delta rule and gated norm: y [M, B, T, R] -> [M, B·T, H·V].

    One function, so that all of y's gradient is written into one tensor by those who have a part in it.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, parameters: tuple[Operand, Operand, Operand, Operand], shape: ModelShape, epsilon: float
    ) -> Tensor:
        conv, A_log, dt_bias, o_norm = parameters
        sizes = shape.heads, shape.head_dim, shape.value_head_dim
        ctx.parameters, ctx.sizes, ctx.epsilon = parameters, sizes, epsilon
        q, k, v, log_decay, beta = heads.heads_forward(y, conv.value, A_log.value, dt_bias.value, *sizes)
        trains = ctx.needs_input_grad[0]
        o, _, saved = delta_rule.forward(q, k, v, log_decay, beta, save=trains)
        if trains and saved is not None:
            ctx.save_for_backward(y, q, k, log_decay, beta, o, *saved)
        return heads.gated_norm_forward(o, y, o_norm.value, *sizes, epsilon)

    @staticmethod
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor, None, None, None]:
        y, q, k, log_decay, beta, o, *saved = ctx.saved_tensors
        conv, A_log, dt_bias, o_norm = ctx.parameters
        sizes: tuple[int, int, int] = ctx.sizes
        dy = torch.empty_like(y)
        do = heads.gated_norm_backward(d_normed, o, y, o_norm.value, *sizes, ctx.epsilon, dy, o_norm.gradient)
        rest = q, k, log_decay, beta, delta_rule.Saved(*saved)
        dq, dk, dv, d_log_decay, d_beta, _ = delta_rule.backward(do, None, *rest)
        heads.heads_backward(
            dq, dk, dv, d_log_decay, d_beta, y, conv.value, A_log.value, dt_bias.value, *sizes, dy,
            conv.gradient, A_log.gradient, dt_bias.gradient,
        )  # fmt: skip
        return dy, None, None, None
