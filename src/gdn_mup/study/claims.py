"""Claims about learning-rate transfer, and what a study's sweeps say about each.

A claim is judged once per growth mode and rule set, from the estimates of `optimum`, and combined per growth
mode: reproduced if every rule set it speaks of is, not reproduced if any is refuted. A verdict always carries
the numbers that it rests on. To add a claim, append it to `CLAIMS` with the function that judges it.

Absence of an effect cannot be read off a wide interval, so "does not move" asks for two things: an interval
that contains 0, and one that is narrow enough to tell 0 from what would matter (`SLOPE_TOLERANCE`,
`REGRET_TOLERANCE`). Failing the first refutes the claim, failing the second leaves it inconclusive.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr

from gdn_mup.scaling.rules import RULE_SETS
from gdn_mup.study.optimum import Transfer, signed, transfer

VerdictName = Literal["reproduced", "not reproduced", "inconclusive", "not tested"]

# Octaves per doubling of width. Under SP with AdamW the optimum falls by about 1 (hidden weights want a
# learning rate ∝ 1/width); half of that separates "stays" from "moves as under SP" with nothing between.
SLOPE_TOLERANCE = 0.5

# Nats per token: what missing the optimum by half an octave costs (the same half octave as above), since loss
# curves of these models rise by 0.1 to 0.3 in the octave next to their minimum, roughly as a parabola.
REGRET_TOLERANCE = 0.04

MUP_RULES = ("mup", "liu_gu", "gdn_mup")


@dataclass(frozen=True)
class Verdict:
    """What the sweeps of one growth mode say on a claim; with `rules`, what those of one rule set say."""

    claim: str
    growth: str
    optimizer: str
    rules: str  # empty: the claim as a whole
    verdict: VerdictName
    reason: str


@dataclass(frozen=True)
class Claim:
    """A statement that a study can decide.

    `decided_by` says in words what `judge` computes from one sweep's estimates.
    """

    id: str
    statement: str
    decided_by: str
    optimizer: str
    rules: tuple[str, ...]
    judge: Callable[[Transfer], tuple[VerdictName, str]]


def optimum_moves(sweep: Transfer) -> tuple[VerdictName, str]:
    """The optimum falls with width: the slope's interval lies below 0."""
    slope = sweep.slope
    if slope.reason:
        return "inconclusive", f"no slope: {slope.reason}"
    reason = _slope_in_words(sweep)
    if slope.interval.high < 0:
        return "reproduced", f"{reason}: the interval excludes 0"
    if slope.interval.low > 0:
        return "not reproduced", f"{reason}: the optimum rises with width"
    if slope.interval.low >= -SLOPE_TOLERANCE:
        return "not reproduced", f"{reason}: no fall, and one of {SLOPE_TOLERANCE} is excluded"
    return "inconclusive", f"{reason}: the interval contains 0 and also falls steeper than {SLOPE_TOLERANCE}"


def optimum_transfers(sweep: Transfer) -> tuple[VerdictName, str]:
    """The optimum stays where it is at the base width, and training there costs no more than noise."""
    parts = [_optimum_stays(sweep), *(_within_noise(sweep, width) for width in _wider(sweep))]
    if len(parts) == 1:
        return "inconclusive", f"only width {sweep.base_width} was run"
    verdict = _combined(name for name, _ in parts)
    if verdict == "reproduced":
        worst = max(_wider(sweep), key=lambda width: sweep.regrets[width].interval.high)
        regret = sweep.regrets[worst]
        return verdict, (
            f"{parts[0][1]}; largest transfer regret at width {worst}: {regret.value:.3f} nats "
            f"[{regret.interval.low:.3f}, {regret.interval.high:.3f}], within {_tolerance(sweep, worst):.3f}"
        )
    return verdict, "; ".join(reason for name, reason in parts if name == verdict)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="C1",
        statement="Under AdamW and standard parametrization, the best learning rate falls with width.",
        decided_by="slope of log₂ LR* against log₂ width: its 95 % interval lies below 0",
        optimizer="adamw",
        rules=("sp",),
        judge=optimum_moves,
    ),
    Claim(
        id="C2",
        statement="Under AdamW and μP, the best learning rate of the base width is the best at every width.",
        decided_by=(
            f"slope: interval contains 0 and lies within ±{SLOPE_TOLERANCE} octaves per doubling; transfer "
            f"regret at each width: interval below {REGRET_TOLERANCE} nats or the spread between seeds"
        ),
        optimizer="adamw",
        rules=MUP_RULES,
        judge=optimum_transfers,
    ),
    Claim(
        id="C3",
        statement="Under SGD and standard parametrization, the best learning rate falls with width.",
        decided_by="as C1",
        optimizer="sgd",
        rules=("sp",),
        judge=optimum_moves,
    ),
    Claim(
        id="C4",
        statement="Under SGD and μP, the best learning rate of the base width is the best at every width.",
        decided_by="as C2",
        optimizer="sgd",
        rules=MUP_RULES,
        judge=optimum_transfers,
    ),
)


def judge_all(dataset: xr.Dataset, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """Verdicts on every claim for every growth mode of a collected `lr_sweep` dataset.

    For each claim and growth mode: first the claim as a whole, then one verdict per rule set.
    """
    verdicts: list[Verdict] = []
    for claim in claims:
        for growth in map(str, dataset.growth.values):
            each: list[Verdict] = []
            for rules in claim.rules:
                sweep = transfer(dataset, growth, claim.optimizer, rules)
                judged = claim.judge(sweep) if sweep else ("not tested", "the study has no such sweep")
                each.append(Verdict(claim.id, growth, claim.optimizer, rules, *judged))
            tested = [verdict for verdict in each if verdict.verdict != "not tested"]
            whole = _combined(verdict.verdict for verdict in tested)
            reason = "; ".join(
                f"{RULE_SETS[verdict.rules].title}: {verdict.verdict}" for verdict in each if len(claim.rules) > 1
            )
            reason = reason if tested and reason else each[0].reason
            verdicts += [Verdict(claim.id, growth, claim.optimizer, "", whole, reason), *each]
    return verdicts


def verdict_table(dataset: xr.Dataset, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """`judge_all` as a table, one row per verdict."""
    statements = {claim.id: claim for claim in claims}
    return pd.DataFrame(
        [
            {
                "claim": verdict.claim,
                "statement": statements[verdict.claim].statement,
                "growth": verdict.growth,
                "rules": verdict.rules or "all",
                "verdict": verdict.verdict,
                "reason": verdict.reason,
                "decided_by": statements[verdict.claim].decided_by,
            }
            for verdict in judge_all(dataset, claims)
        ]
    )


def _combined(verdicts: Iterable[VerdictName]) -> VerdictName:
    found = set(verdicts)
    order: tuple[VerdictName, ...] = ("not reproduced", "inconclusive", "reproduced")
    return next((name for name in order if name in found), "not tested")


def _wider(sweep: Transfer) -> list[int]:
    return [width for width in sweep.widths if width != sweep.base_width]


def _slope_in_words(sweep: Transfer) -> str:
    value, (low, high) = sweep.slope.value, sweep.slope.interval
    without = [str(width) for width in sweep.widths if width not in sweep.slope.widths]
    note = f" (no optimum at width {', '.join(without)})" if without else ""
    return f"slope {signed(value)} [{signed(low)}, {signed(high)}] octaves per doubling{note}"


def _optimum_stays(sweep: Transfer) -> tuple[VerdictName, str]:
    slope = sweep.slope
    if slope.reason:
        return "inconclusive", f"no slope: {slope.reason}"
    reason = _slope_in_words(sweep)
    if 0.0 not in slope.interval:
        return "not reproduced", f"{reason}: the interval excludes 0"
    if max(-slope.interval.low, slope.interval.high) > SLOPE_TOLERANCE:
        return "inconclusive", f"{reason}: the interval reaches beyond ±{SLOPE_TOLERANCE}"
    return "reproduced", reason


def _tolerance(sweep: Transfer, width: int) -> float:
    """What counts as noise: the spread between seeds at the best learning rate, if above the constant."""
    spread = sweep.seed_noise[width]
    return max(REGRET_TOLERANCE, spread) if np.isfinite(spread) else REGRET_TOLERANCE


def _within_noise(sweep: Transfer, width: int) -> tuple[VerdictName, str]:
    regret, tolerance = sweep.regrets[width], _tolerance(sweep, width)
    if regret.reason:
        return "inconclusive", f"width {width}: {regret.reason}"
    if np.isinf(regret.value):
        return "not reproduced", f"width {width}: training diverges at the transferred learning rate"
    low, high = regret.interval
    reason = f"width {width}: transfer regret {regret.value:.3f} nats [{low:.3f}, {high:.3f}]"
    if low > tolerance:
        return "not reproduced", f"{reason}, above the tolerance {tolerance:.3f}"
    if high > tolerance:
        return "inconclusive", f"{reason} reaches above the tolerance {tolerance:.3f}"
    return "reproduced", reason
