"""A Gated DeltaNet language model with a leading axis of *members*.

Every parameter has shape [members, ...]: the members are models of one shape that differ in their
rule set or learning rate, see the same batches, and never touch each other. A linear layer of all
members is one batched matrix product; the delta rule, which has no parameters, sees members × batch ×
heads as its batch. All parameters of a member lie in one row of one buffer.

Shapes below: M members, P elements a row, B sequences, T tokens, d width.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gdn_mup.model import operations
from gdn_mup.model.config import InitialScale, ModelShape
from gdn_mup.scaling.apply import ModelScaling
from gdn_mup.scaling.growth import ParameterInfo, Part
from gdn_mup.scaling.rules import Scaling

Record = Callable[[str, int, Tensor], None]
USUAL_STD = 0.02  # `initializer_range` of fla's models, as of GPT-2
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
        "o": linear(d, values, Part.MIXER_OUTPUT),
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


# Parameters that share a stored tensor, so that one matrix product or one convolution reads all of them.
STACKED = {
    "in_proj": ("q", "k", "v", "g", "alpha_projection", "beta_projection"),
    "conv": ("q_conv", "k_conv", "v_conv"),
    "mlp_in": ("mlp_gate", "mlp_up"),
}
ALIGNMENT = 64  # elements: every stored tensor starts at a multiple of it, 256 bytes in float32
IN_PROJ_ROWS = 16  # `in_proj` is padded to a multiple of so many rows, which GPU matrix products ask for


class StoredTensor(NamedTuple):
    """Where a stored tensor starts in a member's row, in elements, and its shape without the members."""

    offset: int
    shape: tuple[int, ...]


class StoredParameter(NamedTuple):
    """The stored tensor that a parameter is part of, where it starts in a member's row, and its elements."""

    tensor: str
    offset: int
    size: int


class Layout(NamedTuple):
    """How one member's parameters lie in one row of `size` elements; what nothing owns is padding, and zero."""

    tensors: dict[str, StoredTensor]
    parameters: dict[str, StoredParameter]
    size: int

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Every stored tensor's part of rows [M, size], as a view [M, *its shape]."""
        return {
            name: flat[:, offset : offset + math.prod(shape)].unflatten(1, shape)
            for name, (offset, shape) in self.tensors.items()
        }


def parameter_layout(shape: ModelShape) -> Layout:
    """Stored tensors in the order of `parameter_table`, stacked parameters as rows below each other."""
    table = parameter_table(shape)
    stored_in = {parameter: tensor for tensor, parameters in STACKED.items() for parameter in parameters}
    stacks: dict[str, list[str]] = {}
    for name in table:
        layer, dot, parameter = name.rpartition(".")
        stacks.setdefault(layer + dot + stored_in.get(parameter, parameter), []).append(name)

    tensors: dict[str, StoredTensor] = {}
    parameters: dict[str, StoredParameter] = {}
    end = 0
    for tensor, names in stacks.items():
        start = end
        for name in names:
            parameters[name] = StoredParameter(tensor, end, math.prod(table[name].shape))
            end += parameters[name].size
        rows, *columns = (sum(table[name].shape[0] for name in names), *table[names[0]].shape[1:])
        if tensor.endswith("in_proj"):
            rows = _round_up(rows, IN_PROJ_ROWS)
        tensors[tensor] = StoredTensor(start, (rows, *columns))
        end = _round_up(start + math.prod(tensors[tensor].shape), ALIGNMENT)
    return Layout(tensors, parameters, end)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class LanguageModel:
    """Members of one shape, each with its own parameters and its own multiplier on the logits.

    Attributes:
        layout: where everything is in a member's row of P elements.
        flat: all parameters [M, P], one row a member.
        tensors: the stored tensors, views [M, ...] of `flat` that gradients are taken of.
        weights: every parameter of `parameter_table`, as a view [M, *shape] of `flat` without gradients.
        logits_multiplier: [M].
        output_multiplier: [M], on the delta rule's output before its norm; None, for 1, unless it is studied.
        operations: what computes the losses: the module `model.operations`, or an object with the same functions.
    """

    def __init__(
        self,
        shape: ModelShape,
        members: int,
        norm_epsilon: float = 1e-5,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shape, self.members, self.norm_epsilon = shape, members, norm_epsilon
        self.operations: Any = operations
        self.layout, self._table = parameter_layout(shape), parameter_table(shape)
        self.flat = torch.zeros(members, self.layout.size, dtype=dtype, device=device)
        self.tensors = {name: nn.Parameter(view) for name, view in self.layout.views(self.flat).items()}
        self.weights = self._by_parameter({name: tensor.detach() for name, tensor in self.tensors.items()})
        self.logits_multiplier = torch.ones(members, dtype=dtype, device=device)
        self.output_multiplier: Tensor | None = None

    def _by_parameter(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Views [M, *shape] of stored tensors [M, ...], one for every parameter."""
        views = {}
        for name, info in self._table.items():
            tensor, offset, size = self.layout.parameters[name]
            start = offset - self.layout.tensors[tensor].offset
            views[name] = stored[tensor].view(self.members, -1)[:, start : start + size].unflatten(1, info.shape)
        return views

    def gradients(self) -> dict[str, Tensor]:
        """Every parameter's gradient [M, *shape], a view into its stored tensor's."""
        return self._by_parameter(
            {name: tensor.grad for name, tensor in self.tensors.items() if tensor.grad is not None}
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for tensor in self.tensors.values():
            tensor.grad = None

    def forward(self, tokens: Tensor, record: Record | None = None) -> Tensor:
        """Logits [M, B, T, vocabulary] for token ids [B, T], which all members share, by `model.operations`.

        `record(quantity, layer, activation)` is called with every activation that a coordinate check
        measures; each has the members as its first axis.
        """
        h = self._trunk(operations, self.tensors, tokens, record)
        logits = operations.linear(h, self.tensors[self._readout])
        if record:
            record("logits", OUTSIDE_BLOCKS, logits)
        return logits.unflatten(1, tuple(tokens.shape))

    def losses(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy [M] in nats per token of token ids [B, T + 1]: each predicts the next."""
        ops = self.operations
        operands = ops.operands(self)
        h = self._trunk(ops, operands, batch[:, :-1])
        return ops.cross_entropy(h, operands[self._readout], batch[:, 1:].flatten())

    @property
    def _readout(self) -> str:
        return "embedding" if self.shape.tied_embeddings else "readout"

    def _trunk(self, ops: Any, operands: Mapping[str, Any], tokens: Tensor, record: Record | None = None) -> Tensor:
        """From token ids [B, T] to what the readout reads, [M, B·T, d]; `operands` are the stored tensors."""
        shape, epsilon = self.shape, self.norm_epsilon
        batch, length = tokens.shape
        x, delta = ops.embed(tokens, operands["embedding"]), None
        if record:
            record("embedding", OUTSIDE_BLOCKS, x)
        for layer in range(shape.layers):
            block = {
                name.removeprefix(f"{layer}."): operand
                for name, operand in operands.items()
                if name.startswith(f"{layer}.")
            }
            record_here = partial(_record_at, record, layer) if record else None
            x, h = ops.add_norm(x, delta, block["mixer_norm"], epsilon)
            if record and layer > 0:
                record("residual", layer - 1, x)
            y = ops.linear(h, block["in_proj"])
            gates = block["conv"], block["A_log"], block["dt_bias"], block["o_norm"]
            o = ops.mixer(y, *gates, shape, batch, length, epsilon, record_here, self.output_multiplier)
            delta = ops.linear(o, block["o"])
            if record:
                record("mixer_output", layer, delta)
            x, h = ops.add_norm(x, delta, block["mlp_norm"], epsilon)
            hidden = ops.swiglu(ops.linear(h, block["mlp_in"]))
            delta = ops.linear(hidden, block["mlp_down"])
            if record:
                record("mlp_hidden", layer, hidden)
                record("mlp_output", layer, delta)
        x, h = ops.add_norm(x, delta, operands["final_norm"], epsilon)
        if record:
            record("residual", shape.layers - 1, x)
            record("final_norm", OUTSIDE_BLOCKS, h)
        # The multiplier of an untied readout is 1 under every rule set.
        return h * self.logits_multiplier[:, None, None].to(h.dtype) if shape.tied_embeddings else h


def _record_at(record: Record, layer: int, quantity: str, activation: Tensor) -> None:
    record(quantity, layer, activation)


def multiplied(
    scaling: ModelScaling, table: Mapping[str, ParameterInfo], multipliers: Mapping[str, float]
) -> ModelScaling:
    """The scaling of a rule set with constants, the same at every width, on top.

    `multipliers` are named `<group>_init` and `<group>_learning_rate`, a group being a field of `InitialScale`; those
    absent are 1. Weight decay stays as it is, so that decoupled decay, learning rate × weight decay, follows
    the learning rate, as it does under any other change of it.
    """

    def of(name: str, info: ParameterInfo) -> Scaling:
        rule, group = scaling.parameters[name], _group(name, info.part)
        return rule._replace(
            init_std=rule.init_std * multipliers.get(f"{group}_init", 1.0),
            learning_rate=rule.learning_rate * multipliers.get(f"{group}_learning_rate", 1.0),
        )

    return scaling._replace(parameters={name: of(name, info) for name, info in table.items()})


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
        draw = _draw(name, info, tuple(weight.shape[1:]), scale, generator).to(weight.device)
        for member, scaling in enumerate(members):
            # Scalars and gains (A_log, dt_bias, norms) have init multiplier 1 under every rule set.
            weight[member] = draw * scaling.parameters[name].init_std
    model.logits_multiplier.copy_(torch.tensor([scaling.logits for scaling in members]))


@torch.no_grad()
def initialize_as_usual(model: LanguageModel, members: Sequence[int], seed: int) -> None:
    """Give these members (rows) the init of most language models: one standard deviation whatever the width.

    It is that of every matrix and short convolution of fla's GatedDeltaNet models. Gains and gate scalars stay as
    `initialize` left them, and the random numbers are those of `initialize`.
    """
    for name, weight in model.weights.items():
        if weight.dim() > 2:
            generator = torch.Generator().manual_seed(_stream(seed, name))
            weight[list(members)] = (torch.randn(weight.shape[1:], generator=generator) * USUAL_STD).to(weight)


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
        case Part.MIXER_OUTPUT if scale.mixer_output is not None:
            std = scale.mixer_output / math.sqrt(base.fan_in)
        case _:
            std = getattr(scale, _group(name, base.part)) / math.sqrt(base.fan_in)
    return torch.randn(shape, generator=generator) * std


def _group(name: str, part: Part) -> str:
    """The field of `InitialScale` that a parameter falls under; empty for gains and gate scalars."""
    if part is Part.HIDDEN:
        return "residual" if name.endswith(".mlp_down") else "hidden"
    return {
        Part.MIXER_OUTPUT: "residual",
        Part.GATE_PROJECTION: "gate",
        Part.SHORT_CONV: "short_conv",
        Part.EMBEDDING: "embedding",
        Part.READOUT: "readout",
    }.get(part, "")


def _stream(seed: int, name: str) -> int:
    """A random stream of its own for every (seed, parameter), the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
