"""Which axes of a parameter grow with width, found by comparing its shape at two widths.

Growth decides everything in the rule set `gdn_mup`, and nothing here looks at a parameter's name.
"""

from enum import Enum
from typing import NamedTuple


class Part(Enum):
    """What a parameter is for, declared by the model that owns it: the rows of the paper's table.

    `MIXER_OUTPUT` is a hidden matrix to all rule sets but one.
    """

    HIDDEN = "q, k, v, g, MLP"
    MIXER_OUTPUT = "o"
    GATE_PROJECTION = "W_a, W_b"
    GATE_SCALAR = "A_log, dt_bias"
    SHORT_CONV = "short conv"
    NORM = "norm weights"
    EMBEDDING = "embedding"
    READOUT = "readout"


class ParameterInfo(NamedTuple):
    """A parameter at one width: its shape, and the sizes of its two sides.

    A linear map has (fan_out, fan_in) features; a lookup table maps `fan_in` ids to `fan_out` features;
    a vector has fan-in 1; a depthwise convolution's fan-in is its number of taps.
    """

    shape: tuple[int, ...]
    fan_out: int
    fan_in: int
    part: Part


class Axes(Enum):
    """The four kinds of parameter that differ in how they grow."""

    BOTH = "fan-in and fan-out"
    FAN_OUT = "fan-out only"
    FAN_IN = "fan-in only"
    NONE = "none"


class Growth(NamedTuple):
    """Target size over base size: `fan_in` is r_in, `fan_out` is r_out, `width` is m = d/d₀."""

    fan_in: float
    fan_out: float
    width: float

    @property
    def axes(self) -> Axes:
        """Which axes grow (or shrink: a target narrower than the base is allowed)."""
        if self.fan_in != 1:
            return Axes.BOTH if self.fan_out != 1 else Axes.FAN_IN
        return Axes.FAN_OUT if self.fan_out != 1 else Axes.NONE


def growth_between(base: ParameterInfo, target: ParameterInfo, width: float) -> Growth:
    """How a parameter grows from the base model to the target model, `width` = target width / base width."""
    return Growth(target.fan_in / base.fan_in, target.fan_out / base.fan_out, width)
