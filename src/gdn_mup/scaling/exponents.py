"""Predicted width exponents of every size in a Gated DeltaNet, at init and in its first update.

The *size* of an array is the root mean square of its entries, written as a power of the width d: size a
means Θ(d^a). The network is written once, as a chain of the steps of `Propagation`; learning rates and
initial sizes come from the tables of `rules.py`, and no rule set is known here by name.

**Sums.** Only sums over axes that grow change an exponent. A sum of n terms of size d^a has size √n · d^a
if its terms are *independent* (random signs) and n · d^a if they are *aligned* (one sign). Several paths
into the same array add up to the largest of them: they combine by `max`. Tokens, vocabulary, layers and the
taps of the convolution do not grow, so that sums over them cost nothing.

**Forward.** At init a matrix is independent of what it reads: y = W x is a sum of √fan-in · W · x. The
exceptions are said where they occur.

**Backward.** The same, transposed: ∂x = Wᵀ ∂y is √fan-out · W · ∂y. The gradient of a matrix, ∂y xᵀ, is
summed over tokens only.

**Update.** SGD: learning rate × gradient. AdamW: the learning rate itself, since its first update is the
sign of the gradient, as long as ε is far below the gradient. Weight decay is left out.

**Change.** A change Δx reaches y in two ways, of which the larger counts. As any vector does, by the forward
gain of the step. And coherently: updates follow the negative gradient, and so does the part of Δx that they
cause, its *lean*. What this part does to y follows from the chain rule alone, as both sides of

    Σ ∂y Δy  =  Σ (contribution of y to ∂x) Δx

are the first-order change of the loss through this step. With Δx along ∂x of size `lean`, of which the
share |contribution| / |∂x| goes through this step, and entry counts n_x and n_y,

    lean_y = lean_x · (|contribution| / |∂x|) · (|contribution| / |∂y|) · n_x / n_y.

For the update of a matrix this is the aligned sum over fan-in: ΔW x = learning rate · ∂y · xᵀx. For a
readout it is W Δx = W Wᵀ ∂logits, aligned over fan-in as well: the reason why its init must shrink as 1/d.
For a square matrix it is no larger than what W does to any Δx.

Two questions have more than one answer, and each answer can be asked for.

`premise`   A gate scales a whole head, so that its gradient is the inner product ⟨v, ∂o⟩ over the head's
            value channels; q and k receive theirs through the same product. At init its terms have
            "independent" signs (the premise of arXiv 2606.04048). If training has "aligned" them the
            product is larger by √V, which matters where V grows (`head_dim`). The same holds for the gain of
            o's norm, which all heads share, where heads grow (`heads`). Only gradient that comes straight
            from the loss, not through the gates of a later layer, is taken to be aligned.
`response`  "finite": the learning rate is fixed and the width goes to infinity, so that changes that grow
            saturate in norms and sigmoids, and products of two changes count. "linear": the learning rate is
            so small that every change is proportional to it. The two differ only where some change grows
            with width, which is what a good parametrization excludes.

Exponents are asymptotic; where a path with a smaller power has the larger coefficient, it is what shows at
widths of hundreds or thousands. What is known of that:

- E[SiLU]² / E[SiLU²] is only 0.1 to 0.3, so that q·k at init is Θ(1) once the head dim is far above ten, and
  falls as K^−½ before. Where o is small, the ε of its norm matters; norms are taken without ε here.
- Sums over tokens are free only for widths above the number of tokens in a batch.
- A gate is one of many readers of the residual stream, and moves o by little. Growth of W_a x or W_b x that
  comes from the coherent part of Δx (`head_dim`, W_a and W_b initialised with 1/√d), and all that follows
  from it in the linear response, is not visible at widths up to a thousand: measured exponents of
  the pre-activations' change under AdamW and `mup` are 0 to 0.2 and rising, where ½ is predicted.
- That ΔW x' is an aligned sum needs x' to overlap with the x that made ΔW. Once x' is saturated the overlap
  is small, and exponents above 1 in the finite response are reached late.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gdn_mup.scaling.growth import Growth, Part
from gdn_mup.scaling.rules import RULE_SETS, RuleSet

Premise = Literal["independent", "aligned"]
Response = Literal["finite", "linear"]

ZERO = -math.inf  # the exponent of what is exactly zero
OUTSIDE_BLOCKS = -1  # the layer of embedding, final norm, logits and readout


@dataclass(eq=False)
class Coordinate:
    """Width exponents of an array: its entries' size and their number, gradient and change.

    `signal` is the part of the gradient that has not come through a gate, `lean` the part of the change
    along the negative gradient.
    """

    size: float
    entries: float
    gradient: float = ZERO
    signal: float = ZERO
    change: float = ZERO
    lean: float = ZERO


@dataclass(eq=False)
class Parameter(Coordinate):
    """A parameter: also the exponents of its fans and of its learning rates."""

    fan_in: float = 0.0
    fan_out: float = 0.0
    learning_rate: float = 0.0
    sgd_learning_rate: float = 0.0  # weighs the width-invariant norm, whichever optimizer trains

    @property
    def gradient_norm(self) -> float:
        """Frobenius norm of the gradient: the root of the number of entries times their size."""
        return self.entries / 2 + self.gradient


class Edge(NamedTuple):
    """How one array enters a step: the exponents of the step's gain in both directions."""

    source: Coordinate
    forward: float  # Δy = forward + Δsource
    backward: float  # ∂source = backward + ∂y
    summed: float = 0.0  # ∂source is an inner product over this many entries, aligned if the premise says so


class Step(NamedTuple):
    """One operation: what it makes, from what, and what happens when changes are large."""

    result: Coordinate
    edges: tuple[Edge, ...]
    second_order: float = ZERO  # Δy of the product of two changes = second_order + the sum of both changes
    bound: float = math.inf  # the largest Δy there can be


@dataclass(eq=False)
class Propagation:
    """Width exponents through one network, under one rule set and optimizer.

    Call the steps in the order of the forward pass, then `update` once. A parameter's fans are given as
    exponents: 1 for a fan proportional to the width, 0 for one that does not grow.
    """

    rules: RuleSet
    optimizer: str
    premise: Premise = "independent"
    response: Response = "finite"
    parameters: list[Parameter] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def parameter(self, part: Part, fan_in: float = 0.0, fan_out: float = 0.0) -> Parameter:
        """A parameter with the init and the learning rate that the rule set gives its shape."""
        growth = _growth(fan_in, fan_out)
        scaling = self.rules.scaling(part, growth, self.optimizer)
        parameter = Parameter(
            size=_exponent(scaling.init_std),
            entries=fan_in + fan_out,
            fan_in=fan_in,
            fan_out=fan_out,
            learning_rate=_exponent(scaling.learning_rate),
            sgd_learning_rate=_exponent(self.rules.scaling(part, growth, "sgd").learning_rate),
        )
        self.parameters.append(parameter)
        return parameter

    # The steps a network is made of.

    def lookup(self, table: Parameter) -> Coordinate:
        """A token's row of a table: nothing is summed in either direction."""
        return self.scaled(table, 0.0)

    def scaled(self, x: Coordinate, exponent: float) -> Coordinate:
        """x times a constant of size d^exponent."""
        y = Coordinate(x.size + exponent, x.entries)
        return self._add_step(y, Edge(x, forward=exponent, backward=exponent))

    def linear(self, weight: Parameter, x: Coordinate, tied: bool = False) -> Coordinate:
        """y = W x; `tied`: W is the transpose of the embedding.

        y_i = Σ_j W_ij x_j and ∂x_j = Σ_i W_ij ∂y_i are independent sums, ∂W_ij = ∂y_i x_j is none. Tied, x
        (the normalised residual stream) contains the embedding of the current token, so that this token's
        logit is an aligned sum over fan-in. ΔW Δx is aligned as ΔW x is.
        """
        fan_in, fan_out = (weight.fan_out, weight.fan_in) if tied else (weight.fan_in, weight.fan_out)
        y = Coordinate(weight.size + x.size + (fan_in if tied else fan_in / 2), entries=fan_out)
        return self._add_step(
            y,
            Edge(weight, forward=x.size + fan_in / 2, backward=x.size),
            Edge(x, forward=weight.size + fan_in / 2, backward=weight.size + fan_out / 2),
            second_order=fan_in,
        )

    def product(self, x: Coordinate, factor: Coordinate, shared_over: float = 0.0) -> Coordinate:
        """y = factor · x entry by entry, where one entry of `factor` serves d^shared_over entries of x.

        ∂factor is the inner product ⟨x, ∂y⟩ over the entries it serves, which the premise is about. Norm
        gains and gates are such products, and depthwise convolutions with their few taps.
        """
        y = Coordinate(x.size + factor.size, x.entries)
        return self._add_step(
            y,
            Edge(x, forward=factor.size, backward=factor.size),
            Edge(factor, forward=x.size, backward=x.size + shared_over / 2, summed=shared_over),
            second_order=0.0,
        )

    def overlap(self, a: Coordinate, b: Coordinate, axis: float) -> Coordinate:
        """The inner product of two SiLU outputs over an axis of d^axis entries.

        SiLU's outputs have a positive mean, so that this sum is aligned already at init; a gradient,
        ∂a_j = b_j ∂y, is a single term.
        """
        y = Coordinate(a.size + b.size + axis, a.entries - axis)
        return self._add_step(
            y,
            Edge(a, forward=b.size + axis / 2, backward=b.size),
            Edge(b, forward=a.size + axis / 2, backward=a.size),
            second_order=axis,
        )

    def normalized(self, x: Coordinate, size: float) -> Coordinate:
        """x rescaled to a given size: 0 for RMSNorm, −½ of the axis for the L2 norm over it.

        Its derivative is the factor size / |x| and a projection. A change larger than x itself turns the
        direction round completely, and no more.
        """
        gain = size - x.size
        return self._add_step(Coordinate(size, x.entries), Edge(x, gain, gain), bound=size)

    def activation(self, x: Coordinate) -> Coordinate:
        """An entry-wise function of slope Θ(1) that keeps the size: SiLU, ReLU, softplus.

        Also exp of a parameter of size Θ(1); should its change grow, the exponent is a lower bound.
        """
        return self._add_step(Coordinate(x.size, x.entries), Edge(x, 0.0, 0.0))

    def sigmoid(self, x: Coordinate) -> Coordinate:
        """A value between 0 and 1, of size 1 even if x is small: β = σ(x), α = exp(x) for x < 0.

        The slope is Θ(1) as long as x is not large, which no rule set makes it at init.
        """
        return self._add_step(Coordinate(0.0, x.entries), Edge(x, 0.0, 0.0), bound=0.0)

    def tanh(self, x: Coordinate) -> Coordinate:
        """A bounded function that keeps small sizes."""
        return self._add_step(Coordinate(min(x.size, 0.0), x.entries), Edge(x, 0.0, 0.0), bound=0.0)

    def add(self, x: Coordinate, z: Coordinate) -> Coordinate:
        """x + z: the larger of the two; the gradient reaches both."""
        y = Coordinate(max(x.size, z.size), x.entries)
        return self._add_step(y, Edge(x, 0.0, 0.0), Edge(z, 0.0, 0.0))

    def _add_step(self, y: Coordinate, *edges: Edge, second_order: float = ZERO, bound: float = math.inf) -> Coordinate:
        self.steps.append(Step(y, edges, second_order, bound))
        return y

    # What a training step does.

    def update(self, output: Coordinate, clipping: str = "none") -> None:
        """Back from ∂loss/∂output = Θ(1), one update of every parameter, and forward again.

        The gradient of cross-entropy with respect to the logits, softmax minus one-hot, is Θ(1) whatever
        their size. Clipping by a norm that grows divides SGD's update by that growth; AdamW's first update
        does not feel it.
        """
        output.gradient = output.signal = 0.0
        for step in reversed(self.steps):
            for edge in step.edges:
                x, y = edge.source, step.result
                x.gradient = max(x.gradient, self._contribution(edge, y))
                if not edge.summed:
                    x.signal = max(x.signal, y.signal + edge.backward)

        clipped = 0.0 if clipping == "none" else max(0.0, self.clip_norms()[clipping])
        for parameter in self.parameters:
            parameter.change = parameter.learning_rate
            if self.optimizer == "sgd":
                parameter.change += parameter.gradient - clipped
            parameter.lean = parameter.change

        for step in self.steps:
            self._change(step)

    def _contribution(self, edge: Edge, y: Coordinate) -> float:
        """The gradient that an array receives from one of the steps that read it."""
        contribution = y.gradient + edge.backward
        if self.premise == "aligned":
            contribution = max(contribution, y.signal + edge.backward + edge.summed / 2)
        return contribution

    def _change(self, step: Step) -> None:
        """The change of a step's result, by both ways of the module's docstring."""
        y = step.result
        for edge in step.edges:
            x = edge.source
            contribution = self._contribution(edge, y)
            lean = x.lean + 2 * contribution - x.gradient - y.gradient + x.entries - y.entries
            if contribution > ZERO:
                y.lean = max(y.lean, lean)
            y.change = max(y.change, x.change + edge.forward)
        y.change = max(y.change, y.lean)
        if self.response == "finite":
            product = sum(edge.source.change for edge in step.edges) + step.second_order
            y.change = min(max(y.change, product), step.bound)
            y.lean = min(y.lean, y.change)

    def clip_norms(self) -> dict[str, float]:
        """Exponents of the norms that clipping may compare, after `update`.

        A squared norm is a sum over parameters, hence the largest counts; the width-invariant one weighs
        each square by the parameter's SGD learning-rate multiplier.
        """
        return {
            "global_norm": max(p.gradient_norm for p in self.parameters),
            "width_invariant_norm": max(p.gradient_norm + p.sgd_learning_rate / 2 for p in self.parameters),
        }


class Prediction(NamedTuple):
    """Width exponents, by (quantity, layer) or (parameter class, layer) as the coordinate check names them.

    `rms` is at init, `change` after the first update. `weight` is at init, `gradient` and `update` are those
    of the first update. `clip_norm` has the keys `global_norm` and `width_invariant_norm`.
    """

    rms: dict[tuple[str, int], float]
    change: dict[tuple[str, int], float]
    weight: dict[tuple[str, int], float]
    gradient: dict[tuple[str, int], float]
    update: dict[tuple[str, int], float]
    clip_norm: dict[str, float]


def predict(
    rules: str | RuleSet,
    optimizer: str,
    growth_mode: str,
    tied: bool = False,
    premise: Premise = "independent",
    response: Response = "finite",
    clipping: str = "none",
    layers: int = 2,
) -> Prediction:
    """Exponents of the Gated DeltaNet language model of `model.language_model`.

    `rules` is the name of a rule set or a rule set of one's own; `optimizer` is `adamw` or `sgd`,
    `growth_mode` `heads` or `head_dim`, `clipping` `none`, `global_norm` or `width_invariant_norm`. Layers
    inside the model agree as a rule; the first one may differ, since it reads the embedding alone.
    """
    rule_set = RULE_SETS[rules] if isinstance(rules, str) else rules
    network = Propagation(rule_set, optimizer, premise, response)
    quantities: dict[tuple[str, int], Coordinate] = {}
    parameters: dict[tuple[str, int], Parameter] = {}

    embedding = network.parameter(Part.EMBEDDING, fan_out=1)
    parameters["embedding", OUTSIDE_BLOCKS] = embedding
    x = quantities["embedding", OUTSIDE_BLOCKS] = network.lookup(embedding)
    for layer in range(layers):
        block_parameters, block_quantities, x = _block(network, x, growth_mode)
        parameters |= {(name, layer): parameter for name, parameter in block_parameters.items()}
        quantities |= {(name, layer): quantity for name, quantity in block_quantities.items()}
    gain = parameters["final_norm", OUTSIDE_BLOCKS] = network.parameter(Part.NORM, fan_out=1)
    x = network.product(network.normalized(x, 0.0), gain)
    quantities["final_norm", OUTSIDE_BLOCKS] = x
    if tied:
        logits = network.linear(embedding, x, tied=True)
        logits = network.scaled(logits, _exponent(rule_set.tied_output(_growth(0.0, 1.0))))
    else:
        readout = parameters["readout", OUTSIDE_BLOCKS] = network.parameter(Part.READOUT, fan_in=1)
        logits = network.linear(readout, x)
    quantities["logits", OUTSIDE_BLOCKS] = logits
    network.update(logits, clipping)

    return Prediction(
        rms={key: quantity.size for key, quantity in quantities.items()},
        change={key: quantity.change for key, quantity in quantities.items()},
        weight={key: parameter.size for key, parameter in parameters.items()},
        gradient={key: parameter.gradient for key, parameter in parameters.items()},
        update={key: parameter.change for key, parameter in parameters.items()},
        clip_norm=network.clip_norms(),
    )


def _block(
    network: Propagation, residual: Coordinate, growth_mode: str
) -> tuple[dict[str, Parameter], dict[str, Coordinate], Coordinate]:
    """One block: the gated delta rule, then the gated MLP. Parameters and quantities by name, and its output."""
    heads, head_dim = {"heads": (1.0, 0.0), "head_dim": (0.0, 1.0)}[growth_mode]
    hidden = {"fan_in": 1.0, "fan_out": 1.0}
    p = {
        "mixer_norm": network.parameter(Part.NORM, fan_out=1),
        **{name: network.parameter(Part.HIDDEN, **hidden) for name in ("q", "k", "v", "g")},
        "o": network.parameter(Part.MIXER_OUTPUT, **hidden),
        "alpha_projection": network.parameter(Part.GATE_PROJECTION, fan_in=1, fan_out=heads),
        "beta_projection": network.parameter(Part.GATE_PROJECTION, fan_in=1, fan_out=heads),
        "A_log": network.parameter(Part.GATE_SCALAR, fan_out=heads),
        "dt_bias": network.parameter(Part.GATE_SCALAR, fan_out=heads),
        **{f"{name}_conv": network.parameter(Part.SHORT_CONV, fan_out=1) for name in ("q", "k", "v")},
        "o_norm": network.parameter(Part.NORM, fan_out=head_dim),
        "mlp_norm": network.parameter(Part.NORM, fan_out=1),
        **{name: network.parameter(Part.HIDDEN, **hidden) for name in ("mlp_gate", "mlp_up", "mlp_down")},
    }
    c: dict[str, Coordinate] = {}

    # Mixer: projections, short convolution, SiLU; q and k on the unit sphere of their head.
    x = network.product(network.normalized(residual, 0.0), p["mixer_norm"])
    for name in ("q", "k", "v"):
        c[f"{name}_projected"] = network.linear(p[name], x)
        c[f"{name}_conv"] = network.activation(network.product(c[f"{name}_projected"], p[f"{name}_conv"]))
    for name in ("q", "k"):
        c[name] = network.normalized(c[f"{name}_conv"], 0.0 - head_dim / 2)

    # Gates, one of each per head: log α = −exp(A_log) · softplus(W_a x + dt_bias), β = σ(W_b x).
    c["alpha_preactivation"] = network.add(network.linear(p["alpha_projection"], x), p["dt_bias"])
    softplus = network.activation(c["alpha_preactivation"])
    c["log_alpha"] = network.product(softplus, network.activation(p["A_log"]))
    c["alpha"] = network.sigmoid(c["log_alpha"])
    c["beta_preactivation"] = network.linear(p["beta_projection"], x)
    c["beta"] = network.sigmoid(c["beta_preactivation"])

    # Recurrence: S is a sum over tokens of writes β v kᵀ, each shrunk since by α and by (I − β k kᵀ) ≤ 1,
    # and o = S q reads them as v · (k·q). Tokens do not grow, hence one write stands for all of them.
    # The read is what carries gradients; it sees v's value channels through one number per head.
    write = network.product(c["alpha"], c["beta"])
    c["state"] = network.product(network.product(c["v_conv"], write, shared_over=head_dim), c["k"])
    read = network.product(network.overlap(c["k"], c["q"], axis=head_dim), write)
    c["o"] = network.product(c["v_conv"], read, shared_over=head_dim)

    # Output: o's norm, whose gain all heads share, the output gate SiLU(W_g x), and W_o.
    normed = network.product(network.normalized(c["o"], 0.0), p["o_norm"], shared_over=heads)
    c["o_normed"] = network.product(normed, network.activation(network.linear(p["g"], x)))
    c["mixer_output"] = network.linear(p["o"], c["o_normed"])
    residual = network.add(residual, c["mixer_output"])

    # MLP.
    x = network.product(network.normalized(residual, 0.0), p["mlp_norm"])
    gate = network.activation(network.linear(p["mlp_gate"], x))
    c["mlp_hidden"] = network.product(gate, network.linear(p["mlp_up"], x))
    c["mlp_output"] = network.linear(p["mlp_down"], c["mlp_hidden"])
    c["residual"] = network.add(residual, c["mlp_output"])
    return p, c, c["residual"]


# Power tables give multipliers; at a growth of 4, whose roots are exact in binary, exponents are their log₄.
_REFERENCE_GROWTH = 4.0


def _growth(fan_in: float, fan_out: float) -> Growth:
    """The growth of a parameter whose fans grow with these exponents."""
    return Growth(_REFERENCE_GROWTH**fan_in, _REFERENCE_GROWTH**fan_out, _REFERENCE_GROWTH)


def _exponent(multiplier: float) -> float:
    return math.log2(multiplier) / math.log2(_REFERENCE_GROWTH)
