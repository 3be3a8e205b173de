"""The rule sets, as tables.

Each row says by which power of its growth a parameter's initial standard deviation, learning rate and
the optimizer's ε are multiplied between the base and the target width. All multipliers are 1 at the base width.
A rule set also says which parameters decay, at any width. Those that agree on it are at the base width the same model,
trained in the same way.

- `sp`: standard parametrization: init ∝ 1/√fan-in, one learning rate for everything
- `mup`: what arXiv 2606.04048 (Liu and Gu) calls "original μP": by what a parameter is for
- `yang_hu`: μP as published, arXiv 2203.03466 (Yang, Hu and others), Table 3, and as microsoft/mup: by which axes grow
- `liu_gu`: the rules of arXiv 2606.04048, whose text covers growth by `head_dim`
- `gdn_mup`: ours: by which axes grow, in either growth mode; `yang_hu` but for AdamW's ε

Under SGD `yang_hu` and `gdn_mup` are the same rules. `mup` is not μP as published: there A_log, dt_bias, gains and
convolutions get a learning rate ∝ their fan-out, and under growth by `head_dim` W_a and W_b are readouts.

A variant departs from one of these in a single point, which a study puts to the test, or is the code that Liu and Gu
released (github.com/lauyikfung/gated_delta_net_mup, bb1ccf1), where that differs from their text:

- `sp_released`: every matrix has the same standard deviation at every width
- `liu_gu_released`: short convolutions and norms as hidden matrices, the embedding does not decay; model/gdn.py
- `liu_gu_released_mixer`: in model/gdn-mup.py the mixer's output is multiplied by 1/m besides
- `gdn_mup_constant_decay`: weight decay λ itself is kept, so that learning rate × λ falls with width
- `gdn_mup_hidden_decay`: embedding, readout and short convolutions do not decay
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from gdn_mup.scaling.growth import Axes, Growth, Part


class Power(NamedTuple):
    """r_in^fan_in · r_out^fan_out · m^width."""

    fan_in: float = 0.0
    fan_out: float = 0.0
    width: float = 0.0

    def __call__(self, growth: Growth) -> float:
        """The multiplier at a given growth."""
        return float(growth.fan_in**self.fan_in * growth.fan_out**self.fan_out * growth.width**self.width)


# The vocabulary of the tables below. m is the growth of the width, r_in and r_out those of the two fans.
ONE = Power()
PER_FAN_IN = Power(fan_in=-1)
PER_SQRT_FAN_IN = Power(fan_in=-0.5)
PER_FAN_OUT = Power(fan_out=-1)
FAN_OUT = Power(fan_out=1)
FAN_OUT_PER_FAN_IN = Power(fan_in=-1, fan_out=1)
SQRT_FAN_OUT_PER_FAN_IN = Power(fan_in=-0.5, fan_out=0.5)
SQRT_FAN_IN_PER_FAN_OUT = Power(fan_in=0.5, fan_out=-0.5)
PER_WIDTH = Power(width=-1)
PER_SQRT_WIDTH = Power(width=-0.5)
SQRT_WIDTH = Power(width=0.5)
WIDTH = Power(width=1)


# Gains and gate scalars do not decay, as in fla and most language models.
MATRICES = frozenset(Part) - {Part.NORM, Part.GATE_SCALAR}


class Scaling(NamedTuple):
    """Multipliers of one parameter at one width, under one rule set and one optimizer.

    `weight_decay` is 0 for a parameter that does not decay.
    """

    init_std: float
    learning_rate: float
    epsilon: float
    weight_decay: float


class Row(NamedTuple):
    """How one kind of parameter scales.

    Muon's update is orthogonal: its spectral norm, the learning rate, must be ∝ √(fan-out/fan-in) (arXiv 2310.17813).
    Its ε is added to the Frobenius norm of the gradient. A row without it is for parameters that AdamW trains.

    `multiplier` is one on what the parameter computes. It is folded into the parameter: aW is a matrix whose init is a
    times that of W, and whose updates are a times as large under AdamW and Muon, a² times under SGD (arXiv
    2203.03466, Lemma J.1). All else is given for W.
    """

    init_std: Power
    adamw_learning_rate: Power
    sgd_learning_rate: Power
    adamw_epsilon: Power = ONE
    muon_learning_rate: Power | None = None
    muon_epsilon: Power | None = None
    multiplier: Power = ONE

    def scaling(self, growth: Growth, optimizer: str, keeps_decay: bool) -> Scaling:
        """The multipliers at a growth for `adamw`, `sgd` or `muon` (AdamW's where Muon has no rule)."""
        learning_rate, epsilon = {
            "adamw": (self.adamw_learning_rate, self.adamw_epsilon),
            "sgd": (self.sgd_learning_rate, ONE),
            "muon": (self.muon_learning_rate or self.adamw_learning_rate, self.muon_epsilon or self.adamw_epsilon),
        }[optimizer]
        rate, folded = learning_rate(growth), self.multiplier(growth)
        update = folded**2 if optimizer == "sgd" else folded  # of aW, over that of W
        return Scaling(
            init_std=self.init_std(growth) * folded,
            learning_rate=rate * update,
            epsilon=epsilon(growth) / folded if optimizer != "sgd" else 1.0,
            weight_decay=(1 / rate if keeps_decay else 1.0) / update,
        )


@dataclass(frozen=True)
class RuleSet:
    """A table of rows, looked up by the parameter's part or by the axes that grow.

    `tied_output` multiplies the logits when the readout is the embedding's transpose.
    `keeps_decay` scales weight decay by 1/(learning-rate multiplier), so that decoupled decay,
    learning rate × weight decay, does not depend on width.
    `decays` are the parameters that decay at all, at the base width too.
    `variant_of` names the rule set that this one departs from in a single point.
    """

    name: str
    title: str
    source: str
    rows: Mapping[Part | Axes, Row]
    tied_output: Power
    keeps_decay: bool
    decays: frozenset[Part] = MATRICES
    variant_of: str = ""

    @property
    def family(self) -> str:
        """The principal rule set that this one is, or goes back to: `sp` for all that is not meant to transfer."""
        return RULE_SETS[self.variant_of].family if self.variant_of else self.name

    def row(self, part: Part, growth: Growth) -> Row:
        """The row that a parameter falls under; the mixer's output is hidden unless it has a row of its own."""
        if growth.axes in self.rows:
            return self.rows[growth.axes]
        return self.rows.get(part, self.rows[Part.HIDDEN])

    def scaling(self, part: Part, growth: Growth, optimizer: str) -> Scaling:
        """The multipliers of a parameter for `adamw`, `sgd` or, in the table by axes, `muon`."""
        scaling = self.row(part, growth).scaling(growth, optimizer, self.keeps_decay)
        return scaling if part in self.decays else scaling._replace(weight_decay=0.0)


SP = RuleSet(
    name="sp",
    title="SP",
    source="standard parametrization",
    rows={part: Row(PER_SQRT_FAN_IN, ONE, ONE) for part in Part},
    tied_output=ONE,
    keeps_decay=False,
)

MUP = RuleSet(
    name="mup",
    title="original μP",  # the paper's words; `mup` stands in published files
    source='arXiv 2606.04048, "original μP"; untied readout: arXiv 2203.03466, Table 3',
    rows={
        # part                        init std         AdamW LR   SGD LR
        Part.HIDDEN:          Row(PER_SQRT_FAN_IN, PER_WIDTH, ONE),
        Part.GATE_PROJECTION: Row(PER_SQRT_FAN_IN, PER_WIDTH, ONE),
        Part.GATE_SCALAR:     Row(ONE,             ONE,       ONE),
        Part.SHORT_CONV:      Row(ONE,             ONE,       ONE),
        Part.NORM:            Row(ONE,             ONE,       ONE),
        Part.EMBEDDING:       Row(ONE,             ONE,       WIDTH),
        Part.READOUT:         Row(PER_WIDTH,       PER_WIDTH, PER_WIDTH),
    },
    tied_output=PER_WIDTH,
    keeps_decay=False,
)  # fmt: skip

LIU_GU = RuleSet(
    name="liu_gu",
    title="Liu & Gu",
    source="arXiv 2606.04048, text; untied readout: arXiv 2203.03466, Table 3",
    rows={
        # part                        init std         AdamW LR   SGD LR
        Part.HIDDEN:          Row(PER_SQRT_FAN_IN, PER_WIDTH, ONE),
        Part.GATE_PROJECTION: Row(PER_SQRT_FAN_IN, PER_WIDTH, PER_SQRT_WIDTH),
        Part.GATE_SCALAR:     Row(ONE,             ONE,       SQRT_WIDTH),
        Part.SHORT_CONV:      Row(ONE,             ONE,       ONE),
        Part.NORM:            Row(ONE,             ONE,       ONE),
        Part.EMBEDDING:       Row(ONE,             ONE,       WIDTH),
        Part.READOUT:         Row(PER_WIDTH,       PER_WIDTH, PER_WIDTH),
    },
    tied_output=PER_WIDTH,
    keeps_decay=False,
)  # fmt: skip

GDN_MUP = RuleSet(
    name="gdn_mup",
    title="gdn-mup",
    source="from shapes (this project)",
    rows={
        # axes that grow     init std         AdamW LR    SGD LR              AdamW ε      Muon LR, Muon ε
        Axes.BOTH:    Row(PER_SQRT_FAN_IN, PER_FAN_IN, FAN_OUT_PER_FAN_IN, PER_FAN_OUT,
                          SQRT_FAN_OUT_PER_FAN_IN, SQRT_FAN_IN_PER_FAN_OUT),
        Axes.FAN_OUT: Row(ONE,             ONE,        FAN_OUT,            PER_FAN_OUT),
        Axes.FAN_IN:  Row(PER_FAN_IN,      PER_FAN_IN, PER_FAN_IN,         ONE),
        Axes.NONE:    Row(ONE,             ONE,        ONE,                ONE),
    },
    tied_output=PER_FAN_OUT,
    keeps_decay=True,
)  # fmt: skip

# Table 3 as microsoft/mup applies it: gains, convolutions and, where heads grow, A_log and dt_bias are vector-like,
# with learning rate × fan-out under SGD; what only reads the width is a readout, here without a multiplier 1/m. Its
# AdamW keeps learning rate × weight decay.
YANG_HU = replace(
    GDN_MUP,
    name="yang_hu",
    title="μP (Yang & Hu)",
    source="arXiv 2203.03466, Table 3, and microsoft/mup",
    rows={
        axes: row._replace(adamw_epsilon=ONE, muon_learning_rate=None, muon_epsilon=None)
        for axes, row in GDN_MUP.rows.items()
    },
)

SP_RELEASED = replace(
    SP,
    name="sp_released",
    title="SP, released code",
    source="code of arXiv 2606.04048: standard deviation 0.02 at every width",
    rows={part: Row(ONE, ONE, ONE) for part in Part},
    variant_of="sp",
)

LIU_GU_RELEASED = replace(
    LIU_GU,
    name="liu_gu_released",
    title="Liu & Gu, released code",
    source="code of arXiv 2606.04048, model/gdn.py",
    rows={
        **LIU_GU.rows,
        Part.SHORT_CONV: Row(PER_SQRT_WIDTH, PER_WIDTH, ONE),
        Part.NORM:       Row(ONE,            PER_WIDTH, ONE),
    },
    decays=MATRICES - {Part.EMBEDDING},
    variant_of="liu_gu",
)  # fmt: skip

LIU_GU_RELEASED_MIXER = replace(
    LIU_GU_RELEASED,
    name="liu_gu_released_mixer",
    title="Liu & Gu, released code, mixer × 1/m",
    source="code of arXiv 2606.04048, model/gdn-mup.py",
    rows={**LIU_GU_RELEASED.rows, Part.MIXER_OUTPUT: LIU_GU.rows[Part.HIDDEN]._replace(multiplier=PER_WIDTH)},
    variant_of="liu_gu_released",
)

# The two questions about weight decay that shapes do not settle.
GDN_MUP_CONSTANT_DECAY = replace(
    GDN_MUP, name="gdn_mup_constant_decay", title="gdn-mup, λ constant", variant_of="gdn_mup", keeps_decay=False
)
GDN_MUP_HIDDEN_DECAY = replace(
    GDN_MUP,
    name="gdn_mup_hidden_decay",
    title="gdn-mup, hidden λ alone",
    variant_of="gdn_mup",
    decays=frozenset({Part.HIDDEN, Part.MIXER_OUTPUT, Part.GATE_PROJECTION}),
)

RULE_SETS: dict[str, RuleSet] = {
    rules.name: rules
    for rules in (
        *(SP, SP_RELEASED),
        *(MUP, YANG_HU),
        *(LIU_GU, LIU_GU_RELEASED, LIU_GU_RELEASED_MIXER),
        *(GDN_MUP, GDN_MUP_CONSTANT_DECAY, GDN_MUP_HIDDEN_DECAY),
    )
}
# Those that tables set side by side.
PRINCIPAL = tuple(name for name, rules in RULE_SETS.items() if not rules.variant_of)
