"""The operations of the language model in PyTorch: any device and dtype, with gradients.

A model is a short sequence of them, and other functions of the same names may stand in for these. Every
parameter has the members as its first axis, and a member's parameters reach that member's activations only.

Shapes below: M members, B sequences, T tokens, N = B·T, d width, H heads, K head dim, V value head dim.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn_mup.model.config import ModelShape
from gdn_mup.model.delta_rule import gated_delta_rule

if TYPE_CHECKING:
    from gdn_mup.model.language_model import LanguageModel

RecordAtLayer = Callable[[str, Tensor], None]


def operands(model: "LanguageModel") -> dict[str, torch.nn.Parameter]:
    """What these operations take as parameters: the model's stored tensors."""
    return model.tensors


def embed(tokens: Tensor, embedding: Tensor) -> Tensor:
    """Token ids [B, T], which all members share, in each member's [M, vocabulary, d] -> [M, N, d]."""
    return embedding[:, tokens.flatten()]


def add_norm(x: Tensor, delta: Tensor | None, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + delta (x where there is no delta), and its RMSNorm with each member's gain [M, d]; all [M, N, d]."""
    if delta is not None:
        x = x + delta
    return x, rms_norm(x, gain, epsilon)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Each member's own linear map: [M, N, fan_in] with [M, fan_out, fan_in] -> [M, N, fan_out]."""
    return _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    """Written out because autograd would make the transpose of the weight's gradient, and then copy it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return torch.bmm(grad, weight), torch.bmm(grad.mT, x)


def mixer(
    y: Tensor,
    conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    o_norm: Tensor,
    shape: ModelShape,
    batch: int,
    length: int,
    epsilon: float,
    record: RecordAtLayer | None = None,
    output_multiplier: Tensor | None = None,
) -> Tensor:
    """The gated delta rule of arXiv 2412.06464 as arXiv 2606.04048 uses it, between its two linear maps.

    Args:
        y: the projected input [M, N, R], whose columns are q | k | v | g | alpha | beta | padding.
        conv: taps [M, 2·H·K + H·V, size] of q, k and v.
        A_log, dt_bias: [M, H].
        o_norm: gain [M, V].
        record: called with the name and value of every activation that a coordinate check measures.
        output_multiplier: each member's factor [M] on the delta rule's output o before its norm; 1 without it.

    Returns:
        the normalised and gated output [M, N, H·V].
    """
    members, heads, key_dim, value_dim = y.shape[0], shape.heads, shape.head_dim, shape.value_head_dim
    keys, values = heads * key_dim, heads * value_dim
    channels = 2 * keys + values
    padding = y.shape[-1] - channels - values - 2 * heads
    # One split, since its gradient is one concatenation.
    qkv, output_gate, alpha, beta, _ = y.split((channels, values, heads, heads, padding), dim=-1)
    convolved = F.silu(short_conv(qkv.unflatten(1, (batch, length)), conv))  # [M, B, T, channels]

    def per_head(channels: Tensor, size: int) -> Tensor:
        """[M, B, T, H·size] -> [M, B, H, T, size]"""
        return channels.unflatten(-1, (heads, size)).transpose(2, 3)

    q, k, v = convolved.split((keys, keys, values), dim=-1)
    q_head, k_head, v_head = per_head(q, key_dim), per_head(k, key_dim), per_head(v, value_dim)
    q_unit, k_unit = l2_norm(q_head), l2_norm(k_head)

    # Gates, one number per token and head: α = exp(log_alpha) forgets, β writes.
    alpha_preactivation = alpha + dt_bias[:, None]
    log_alpha = -A_log.exp()[:, None] * F.softplus(alpha_preactivation)
    writing = beta.sigmoid()

    def folded_gate(per_token: Tensor) -> Tensor:
        """[M, N, H] -> [M·B·H, T]"""
        return per_token.unflatten(1, (batch, length)).transpose(2, 3).reshape(-1, length)

    o, state = gated_delta_rule(
        q_unit.reshape(-1, length, key_dim),
        k_unit.reshape(-1, length, key_dim),
        v_head.reshape(-1, length, value_dim),
        folded_gate(log_alpha),
        folded_gate(writing),
        output_final_state=record is not None,
    )
    o = o.view(members, batch, heads, length, value_dim).transpose(2, 3)  # [M, B, T, H, V]
    if output_multiplier is not None:
        o = o * output_multiplier.view(members, 1, 1, 1, 1)
    normed = rms_norm(o, o_norm, epsilon) * F.silu(
        output_gate.unflatten(1, (batch, length)).unflatten(-1, (heads, value_dim))
    )
    if record and state is not None:
        q_projected, k_projected, v_projected = qkv.split((keys, keys, values), dim=-1)
        for quantity, activation in {
            "q_projected": q_projected,
            "k_projected": k_projected,
            "v_projected": v_projected,
            "q_conv": q,
            "k_conv": k,
            "v_conv": v,
            "q": q_unit,
            "k": k_unit,
            "alpha_preactivation": alpha_preactivation,
            "beta_preactivation": beta,
            "alpha": log_alpha.exp(),
            "log_alpha": log_alpha,
            "beta": writing,
            "state": state.view(members, batch, heads, key_dim, value_dim),
            "o": o,
            "o_normed": normed,
        }.items():
            record(quantity, activation)
    return normed.reshape(members, batch * length, values)


def swiglu(y: Tensor) -> Tensor:
    """SiLU(gate) ⊙ up, where y [M, N, 2·mlp] has the columns gate | up: [M, N, mlp]."""
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def cross_entropy(h: Tensor, readout: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy [M] in nats per token: h [M, N, d], readout [M, vocabulary, d], targets [N]."""
    members = h.shape[0]
    logits = linear(h, readout)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.repeat(members), reduction="none")
    return losses.view(members, -1).mean(1)


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x / √(mean(x²) + ε) over the last axis, times each member's gain [M, size]; x is [M, ..., size]."""
    gain = gain.view(gain.shape[0], *[1] * (x.dim() - 2), gain.shape[1])
    return _Normalize.apply(x, x.shape[-1], epsilon) * gain


def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """x / √(Σ x² + ε) over the last axis, as fla normalises q and k."""
    return _Normalize.apply(x, 1, epsilon)


class _Normalize(torch.autograd.Function):
    """y = r x with r = (Σ x² / count + ε)^−½ over the last axis.

    Written out because its gradient, r (∂y − y ⟨y, ∂y⟩ / count), takes half of the passes that autograd takes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, epsilon: float) -> Tensor:
        factor = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / count + epsilon).rsqrt()
        y = x * factor
        ctx.count = count
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        y, factor = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True) / ctx.count
        return torch.addcmul(grad, y, along, value=-1).mul_(factor), None, None


def short_conv(x: Tensor, taps: Tensor) -> Tensor:
    """Causal depthwise convolution over time: x [M, B, T, C], taps [M, C, size] -> [M, B, T, C].

    The last tap multiplies the current token, the first the oldest, as in fla.
    """
    return _ShortConv.apply(x, taps)


class _ShortConv(torch.autograd.Function):
    """Written out because autograd would keep and pass over a padded copy of x for every tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        weights = taps[:, None, None].unbind(-1)  # the oldest tap first, each [M, 1, 1, C]
        out = x * weights[-1]
        for delay, weight in enumerate(reversed(weights[:-1]), start=1):
            out[:, :, delay:].addcmul_(x[:, :, :-delay], weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = ctx.saved_tensors
        weights = taps[:, None, None].unbind(-1)
        grad_x = grad * weights[-1]
        grad_taps = [(grad * x).sum((1, 2))]
        for delay, weight in enumerate(reversed(weights[:-1]), start=1):
            grad_x[:, :, :-delay].addcmul_(grad[:, :, delay:], weight)
            grad_taps.append((grad[:, :, delay:] * x[:, :, :-delay]).sum((1, 2)))
        return grad_x, torch.stack(grad_taps[::-1], -1)
