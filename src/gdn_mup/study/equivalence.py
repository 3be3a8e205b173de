"""What is too small to matter, and the test that a difference is: the margins of every claim and of `gdn-mup transfer`.

Enough seeds refute that two things are equal, always. What can be asked is whether they differ by less than matters:
yes, if the 95 % interval of their difference lies within a margin; no, if it lies beyond; else more data would tell. A
difference that is established but within the margin is a number to report, not a refutation (D. J. Schuirmann, Journal
of Pharmacokinetics and Biopharmaceutics 15, 1987; with 95 % intervals the test errs in at most 2.5 % of cases).

Margins are set for the question, not for the data: they do not widen with the noise between seeds, and are the same for
every width, optimizer, rule set and study. Those of loss and slope are older than the runs of `h200_4x`.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from gdn_mup.study.estimates import Estimate

VerdictName = Literal["reproduced", "not reproduced", "inconclusive", "not tested"]
Standing = Literal["within", "beyond", "open"]

# Nats per token. What half an octave off the optimum costs: loss curves of these models rise by 0.1 to 0.3 nats
# in the octave beside their minimum, roughly as a parabola. It is at most half of what doubling the width gains from
# 128 to 1024 (0.09 to 0.3), and half of what the paper's rules gain on SP at width 1024 and 39 M tokens (0.08).
LOSS_MARGIN = 0.04

# Octaves of learning rate per doubling of width. Under SP with AdamW the optimum falls by 1 (hidden matrices want
# a learning rate ∝ 1/width); half of that separates "stays" from "moves as under SP", with nothing between. What a
# slope inside it costs at these widths is for the margin of the loss to say.
SLOPE_MARGIN = 0.5

# A power of width. Half of the smallest power that a wrong rule leaves, a root of the width.
EXPONENT_MARGIN = 0.25


def against(estimate: Estimate, margin: float) -> Standing:
    """Whether an estimate's interval lies within ±margin, beyond it on one side, or reaches across ("open")."""
    if -margin <= estimate.low and estimate.high <= margin:
        return "within"
    return "beyond" if estimate.low > margin or estimate.high < -margin else "open"


def combined(verdicts: Iterable[VerdictName]) -> VerdictName:
    """Of several statements that must all hold: refuted if any is, else inconclusive if any is."""
    found = set(verdicts)
    order: tuple[VerdictName, ...] = ("not reproduced", "inconclusive", "reproduced")
    return next((name for name in order if name in found), "not tested")


VERDICT_OF: dict[Standing, VerdictName] = {
    "within": "reproduced",
    "beyond": "not reproduced",
    "open": "inconclusive",
}


def judge_transfer(slope: Estimate, wider: Estimate, regrets: Mapping[int, Estimate]) -> tuple[VerdictName, str]:
    """Whether the base width's best learning rate is good enough at every width, and does not move.

    Args:
        slope: of log₂ of the best learning rate, octaves per doubling of width.
        wider: the same without the base width: a trend goes on there, a step at the base width does not.
        regrets: what the base width's best learning rate costs, by width, the base width left out.
    """
    parts = [judge_slope(slope, wider), *(_judge_cost(width, regret) for width, regret in regrets.items())]
    verdict = combined(name for name, _ in parts)
    if verdict == "reproduced":
        worst = max(regrets, key=lambda width: regrets[width].high)
        cost = f"it costs at most {regrets[worst].plain()} nats (width {worst}), within {LOSS_MARGIN}"
        return verdict, f"{cost}; {parts[0][1]}"
    return verdict, "; ".join(reason for i, (name, reason) in enumerate(parts) if name == verdict or i == 0)


def judge_slope(slope: Estimate, wider: Estimate) -> tuple[VerdictName, str]:
    """Whether the best learning rate moves by less than the margin, with what is known of a drift inside it."""
    if slope.reason:
        return "inconclusive", f"no slope: {slope.reason}"
    standing = against(slope, SLOPE_MARGIN)
    where = {"within": "within", "beyond": "beyond", "open": "reaching beyond"}[standing]
    reason = f"slope {slope.signed()} octaves per doubling, {where} ±{SLOPE_MARGIN}"
    if 0.0 not in slope.interval and not wider.reason:
        goes_on = 0.0 not in wider.interval and wider.value * slope.value > 0
        trend = "a trend, which goes on" if goes_on else "a drift, with no trend established"
        reason += f"; {trend} without the base width: {wider.signed()}"
    return VERDICT_OF[standing], reason


def _judge_cost(width: int, regret: Estimate) -> tuple[VerdictName, str]:
    if regret.reason:
        return "inconclusive", f"width {width}: {regret.reason}"
    if np.isinf(regret.value):
        return "not reproduced", f"width {width}: training diverges at the transferred learning rate"
    standing = against(regret, LOSS_MARGIN)
    where = {"within": "within", "beyond": "beyond", "open": "which reaches beyond"}[standing]
    return VERDICT_OF[standing], f"width {width}: it costs {regret.plain()} nats, {where} {LOSS_MARGIN}"
