"""Depth scaling: CompleteP (N. Dey et al., arXiv 2505.01618, Table 1), for AdamW.

Its residual blocks compute x + m^(−α) · F(x) with m = depth / base depth. Here the multiplier m^(−α) is folded into
the matrix that writes to the residual stream, which changes neither the function nor its training: W' = c W has c times
the init, c times the learning rate, and ε and weight decay divided by c.
"""

from enum import Enum

from gdn_mup.scaling.rules import Scaling


class Place(Enum):
    """Where a parameter stands."""

    OUTSIDE = "outside the blocks"
    INSIDE = "inside a block"
    BRANCH_OUTPUT = "writes to the residual stream"


def depth_scaling(growth: float, place: Place, alpha: float) -> Scaling:
    """What a depth that has grown by a factor changes, beside what the width does."""
    if place is Place.OUTSIDE:
        return Scaling(1.0, 1.0, 1.0, 1.0)
    learning_rate, epsilon = growth ** (alpha - 1), growth**-alpha
    if place is Place.INSIDE:
        return Scaling(1.0, learning_rate, epsilon, 1.0)
    fold = growth**-alpha
    return Scaling(fold, learning_rate * fold, epsilon / fold, 1 / fold)
