"""A Gated DeltaNet language model with a leading axis of *members*.

Every parameter has shape [members, ...]: the members are models of one shape that differ in their
rule set or learning rate, see the same batches, and never touch each other. A linear layer of all
members is one batched matrix product; the delta rule, which has no parameters, sees members × batch ×
heads as its batch.

Shapes below: M members, B sequences, T tokens, d width, H heads, K head dim, V value head dim.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn_mup.model.config import InitialScale, ModelShape
from gdn_mup.model.delta_rule import gated_delta_rule
from gdn_mup.scaling.apply import ModelScaling
from gdn_mup.scaling.growth import ParameterInfo, Part

Record = Callable[[str, int, Tensor], None]
RecordAtLayer = Callable[[str, Tensor], None]
OUTSIDE_BLOCKS = -1  # the layer under which embedding, final norm and logits are recorded


def parameter_table(shape: ModelShape) -> dict[str, ParameterInfo]:
    """Every parameter of one member by name, as the scaling rules see it.

    Names are `parameter` outside the blocks and `layer.parameter` inside them.
    """
    d, vocabulary, mlp = shape.width, shape.vocabulary_size, shape.mlp_width
    keys, values = shape.heads * shape.head_dim, shape.heads * shape.value_head_dim

    def linear(fan_out: int, fan_in: int, part: Part) -> ParameterInfo:
        return ParameterInfo((fan_out, fan_in), fan_out, fan_in, part)

    def vector(size: int, part: Part) -> ParameterInfo:
        return ParameterInfo((size,), size, 1, part)

    def conv(channels: int) -> ParameterInfo:
        return ParameterInfo((channels, shape.conv_size), channels, shape.conv_size, Part.SHORT_CONV)

    block = {
        "mixer_norm": vector(d, Part.NORM),
        "q": linear(keys, d, Part.HIDDEN),
        "k": linear(keys, d, Part.HIDDEN),
        "v": linear(values, d, Part.HIDDEN),
        "g": linear(values, d, Part.HIDDEN),
        "alpha_projection": linear(shape.heads, d, Part.GATE_PROJECTION),
        "beta_projection": linear(shape.heads, d, Part.GATE_PROJECTION),
        "q_conv": conv(keys),
        "k_conv": conv(keys),
        "v_conv": conv(values),
        "A_log": vector(shape.heads, Part.GATE_SCALAR),
        "dt_bias": vector(shape.heads, Part.GATE_SCALAR),
        "o_norm": vector(shape.value_head_dim, Part.NORM),
        "o": linear(d, values, Part.HIDDEN),
        "mlp_norm": vector(d, Part.NORM),
        "mlp_gate": linear(mlp, d, Part.HIDDEN),
        "mlp_up": linear(mlp, d, Part.HIDDEN),
        "mlp_down": linear(d, mlp, Part.HIDDEN),
    }
    table = {"embedding": ParameterInfo((vocabulary, d), d, vocabulary, Part.EMBEDDING)}
    for layer in range(shape.layers):
        table |= {f"{layer}.{name}": info for name, info in block.items()}
    table["final_norm"] = vector(d, Part.NORM)
    if not shape.tied_embeddings:
        table["readout"] = linear(vocabulary, d, Part.READOUT)
    return table


class LanguageModel(nn.Module):
    """Members of one shape, each with its own parameters and its own multiplier on the logits.

    `weights[name]` has shape [M, *parameter_table(shape)[name].shape], float32 unless told otherwise.
    """

    def __init__(
        self, shape: ModelShape, members: int, norm_epsilon: float = 1e-5, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.shape, self.members, self.norm_epsilon = shape, members, norm_epsilon
        # ParameterDict forbids dots: names are kept as they are, registered with an underscore.
        self.weights: dict[str, nn.Parameter] = {}
        for name, info in parameter_table(shape).items():
            parameter = nn.Parameter(torch.zeros(members, *info.shape, dtype=dtype))
            self.weights[name] = parameter
            self.register_parameter(name.replace(".", "_"), parameter)
        self.logits_multiplier: Tensor
        self.register_buffer("logits_multiplier", torch.ones(members, dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LanguageModel":
        super()._apply(fn, recurse)
        self.weights = {name: getattr(self, name.replace(".", "_")) for name in self.weights}
        return self

    def forward(self, tokens: Tensor, record: Record | None = None) -> Tensor:
        """Logits [M, B, T, vocabulary] for token ids [B, T], which all members share.

        `record(quantity, layer, activation)` is called with every activation that a coordinate check
        measures; each has the members as its first axis.
        """
        batch, length = tokens.shape
        x = self.weights["embedding"][:, tokens.flatten()]  # [M, B·T, d]
        if record:
            record("embedding", OUTSIDE_BLOCKS, x)
        for layer in range(self.shape.layers):
            block = {
                name.removeprefix(f"{layer}."): weight
                for name, weight in self.weights.items()
                if name.startswith(f"{layer}.")
            }
            record_here = partial(_record_at, record, layer) if record else None
            x = x + self._mixer(block, x, batch, length, record_here)
            x = x + self._mlp(block, x, record_here)
            if record:
                record("residual", layer, x)
        x = rms_norm(x, self.weights["final_norm"], self.norm_epsilon)
        readout = self.weights.get("readout", self.weights["embedding"])
        logits = linear(x * self.logits_multiplier[:, None, None], readout)
        if record:
            record("final_norm", OUTSIDE_BLOCKS, x)
            record("logits", OUTSIDE_BLOCKS, logits)
        return logits.unflatten(1, (batch, length))

    def _mixer(
        self,
        block: dict[str, nn.Parameter],
        x: Tensor,
        batch: int,
        length: int,
        record: RecordAtLayer | None,
    ) -> Tensor:
        """The gated delta rule of arXiv 2412.06464 as arXiv 2606.04048 uses it: [M, B·T, d] -> same."""
        heads, key_dim, value_dim = self.shape.heads, self.shape.head_dim, self.shape.value_head_dim
        keys, values = heads * key_dim, heads * value_dim
        x = rms_norm(x, block["mixer_norm"], self.norm_epsilon)

        # q, k and v share one matrix product, and so do the two gates: [M, B·T, 2·keys + values], [M, B·T, 2·heads].
        qkv = linear(x, torch.cat([block["q"], block["k"], block["v"]], dim=1))
        gates = linear(x, torch.cat([block["alpha_projection"], block["beta_projection"]], dim=1))
        alpha, beta = gates.chunk(2, dim=-1)
        output_gate = linear(x, block["g"])
        taps = torch.cat([block["q_conv"], block["k_conv"], block["v_conv"]], dim=1)
        convolved = F.silu(short_conv(qkv.unflatten(1, (batch, length)), taps))  # [M, B, T, channels]

        def per_head(channels: Tensor, size: int) -> Tensor:
            """[M, B, T, H·size] -> [M, B, H, T, size]"""
            return channels.unflatten(-1, (heads, size)).transpose(2, 3)

        q, k, v = convolved.split((keys, keys, values), dim=-1)
        q_head, k_head, v_head = per_head(q, key_dim), per_head(k, key_dim), per_head(v, value_dim)
        q_unit, k_unit = l2_norm(q_head), l2_norm(k_head)

        # Gates, one number per token and head: α = exp(log_alpha) forgets, β writes.
        alpha_preactivation = alpha + block["dt_bias"][:, None]
        log_alpha = -block["A_log"].exp()[:, None] * F.softplus(alpha_preactivation)
        writing = beta.sigmoid()

        def folded_gate(per_token: Tensor) -> Tensor:
            """[M, B·T, H] -> [M·B·H, T]"""
            return per_token.unflatten(1, (batch, length)).transpose(2, 3).reshape(-1, length)

        o, state = gated_delta_rule(
            q_unit.reshape(-1, length, key_dim),
            k_unit.reshape(-1, length, key_dim),
            v_head.reshape(-1, length, value_dim),
            folded_gate(log_alpha),
            folded_gate(writing),
            output_final_state=record is not None,
        )
        o = o.view(self.members, batch, heads, length, value_dim).transpose(2, 3)  # [M, B, T, H, V]
        normed = rms_norm(o, block["o_norm"], self.norm_epsilon) * F.silu(
            output_gate.unflatten(1, (batch, length)).unflatten(-1, (heads, value_dim))
        )
        output = linear(normed.reshape(self.members, batch * length, values), block["o"])

        if record is None or state is None:
            return output
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
            "state": state.view(self.members, batch, heads, key_dim, value_dim),
            "o": o,
            "o_normed": normed,
            "mixer_output": output,
        }.items():
            record(quantity, activation)
        return output

    def _mlp(self, block: dict[str, nn.Parameter], x: Tensor, record: RecordAtLayer | None) -> Tensor:
        """The gated MLP, W_down (SiLU(W_gate x) ⊙ W_up x): [M, B·T, d] -> same."""
        x = rms_norm(x, block["mlp_norm"], self.norm_epsilon)
        hidden = F.silu(linear(x, block["mlp_gate"])) * linear(x, block["mlp_up"])
        output = linear(hidden, block["mlp_down"])
        if record:
            record("mlp_hidden", hidden)
            record("mlp_output", output)
        return output


def _record_at(record: Record, layer: int, quantity: str, activation: Tensor) -> None:
    record(quantity, layer, activation)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Each member's own linear map: [M, N, fan_in] with [M, fan_out, fan_in] -> [M, N, fan_out]."""
    return torch.bmm(x, weight.transpose(1, 2))


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


@torch.no_grad()
def initialize(
    model: LanguageModel, base: ModelShape, scale: InitialScale, members: Sequence[ModelScaling], seed: int
) -> None:
    """Draw every parameter once per seed and give each member its own standard deviation.

    Members share their random numbers, so that rule sets and learning rates are compared on one init;
    where rule sets coincide (at the base width) the parameters are bit for bit the same.
    Raises ValueError if `members` does not have one scaling for each member of the model.
    """
    if len(members) != model.members:
        raise ValueError(f"{len(members)} scalings for {model.members} members")
    base_table = parameter_table(base)
    for name, weight in model.weights.items():
        info = base_table[name]
        generator = torch.Generator().manual_seed(_stream(seed, name))
        draw = _draw(name, info, tuple(weight.shape[1:]), scale, generator)
        for member, scaling in enumerate(members):
            # Scalars and gains (A_log, dt_bias, norms) have init multiplier 1 under every rule set.
            weight[member] = draw * scaling.parameters[name].init_std
    model.logits_multiplier.copy_(torch.tensor([scaling.logits for scaling in members]))


def _draw(
    name: str, base: ParameterInfo, shape: tuple[int, ...], scale: InitialScale, generator: torch.Generator
) -> Tensor:
    """One member's parameter with the standard deviation it has at the base width."""
    match base.part:
        case Part.NORM:
            return torch.ones(shape)
        case Part.GATE_SCALAR if name.endswith("A_log"):
            # GDN's own: A uniform on (0, 16), kept away from 0 where its logarithm ends.
            return torch.rand(shape, generator=generator).mul(16).clamp(min=1e-4).log()
        case Part.GATE_SCALAR:
            # GDN's own: softplus(dt_bias) log-uniform on (0.001, 0.1).
            low, high = math.log(1e-3), math.log(1e-1)
            step = (torch.rand(shape, generator=generator) * (high - low) + low).exp()
            return step + torch.log(-torch.expm1(-step))
        case Part.EMBEDDING:
            std = scale.embedding
        case Part.READOUT:
            std = scale.readout / math.sqrt(base.fan_in)
        case Part.GATE_PROJECTION:
            std = scale.gate / math.sqrt(base.fan_in)
        case Part.SHORT_CONV:
            std = 1 / math.sqrt(base.fan_in)
        case Part.HIDDEN:
            writes_residual = name.endswith((".o", ".mlp_down"))
            std = (scale.residual if writes_residual else scale.hidden) / math.sqrt(base.fan_in)
    return torch.randn(shape, generator=generator) * std


def _stream(seed: int, name: str) -> int:
    """A random stream of its own for every (seed, parameter), the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
