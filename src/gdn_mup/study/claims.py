"""The claims, and what a study's datasets say about each.

A claim is judged once per growth mode, optimizer and rule set, and combined per growth mode: reproduced if every
rule set it speaks of is, not reproduced if any is refuted. A verdict always carries the numbers that it rests on. To
add a claim, append it to `CLAIMS` with the function that judges it.

Absence of an effect cannot be read off a wide interval, so "does not move" asks for two things: an interval
that contains 0, and one that is narrow enough to tell 0 from what would matter (`SLOPE_TOLERANCE`,
`REGRET_TOLERANCE`). Failing the first refutes the claim, failing the second leaves it inconclusive.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from gdn_mup.scaling.rules import RULE_SETS
from gdn_mup.study.cost import sweep_cost
from gdn_mup.study.exponents import GATES, exponents, gate_gradients
from gdn_mup.study.losses import best_losses_less
from gdn_mup.study.multiplier import multiplier_verdict
from gdn_mup.study.optimum import Transfer, signed, transfer, transfers
from gdn_mup.study.plan import SECTIONS
from gdn_mup.study.seeds import over_seeds
from gdn_mup.study.titles import OPTIMIZER_TITLES, with_unit
from gdn_mup.study.tuning import searches

# A study's collected datasets by kind, such as "lr_sweep" (`DatasetKind`). One that is absent was not run.
Evidence = Mapping[str, xr.Dataset]

VerdictName = Literal["reproduced", "not reproduced", "inconclusive", "not tested"]

# Octaves per doubling of width. Under SP with AdamW the optimum falls by about 1 (hidden weights want a
# learning rate ∝ 1/width); half of that separates "stays" from "moves as under SP" with nothing between.
SLOPE_TOLERANCE = 0.5

# Nats per token: what missing the optimum by half an octave costs (the same half octave as above), since loss
# curves of these models rise by 0.1 to 0.3 in the octave next to their minimum, roughly as a parabola.
REGRET_TOLERANCE = 0.04

MUP_RULES = ("mup", "liu_gu", "gdn_mup")

TRUNK = ("mixer_output", "mlp_output", "residual", "final_norm", "logits")  # what every block reads and writes
FLAT = 0.25  # a width exponent up to this is not called growth: half of the smallest power that a wrong rule leaves


@dataclass(frozen=True)
class Verdict:
    """What the sweeps of one growth mode say on a claim; with `rules`, what those of one rule set say."""

    claim: str
    growth: str
    optimizer: str
    rules: str  # empty: the claim as a whole
    verdict: VerdictName
    reason: str


# Judges a claim, whose id it is given.
Judge = Callable[[str, Evidence], list[Verdict]]


@dataclass(frozen=True)
class Claim:
    """A statement that a study can decide.

    `decided_by` says in words what `judge` computes from the datasets: verdicts on single rule sets and optimizers,
    which are combined per growth mode.
    """

    id: str
    statement: str
    decided_by: str
    judge: Judge


def from_dataset(kind: str) -> Callable[[Callable[[str, xr.Dataset], list[Verdict]]], Judge]:
    """Makes a judge of a function that needs one of the datasets; where that was not run, there is no verdict."""

    def decorate(judge: Callable[[str, xr.Dataset], list[Verdict]]) -> Judge:
        @wraps(judge)
        def verdicts(claim: str, evidence: Evidence) -> list[Verdict]:
            return judge(claim, evidence[kind]) if kind in evidence else []

        return verdicts

    return decorate


def of_sweeps(optimizer: str, rules: Sequence[str], judge: Callable[[Transfer], tuple[VerdictName, str]]) -> Judge:
    """Judges each rule set's sweep under one optimizer, in every growth mode."""

    @from_dataset("lr_sweep")
    def verdicts(claim: str, dataset: xr.Dataset) -> list[Verdict]:
        found = []
        for growth in map(str, dataset.growth.values):
            for name in rules:
                sweep = transfer(dataset, growth, optimizer, name)
                judged = judge(sweep) if sweep else ("not tested", "the study has no such sweep")
                found.append(Verdict(claim, growth, optimizer, name, *judged))
        return found

    return verdicts


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


def wider_is_better(sweep: Transfer) -> tuple[VerdictName, str]:
    """At the learning rate transferred from the base width, every doubling of width lowers the loss."""
    base = sweep.optima.get(sweep.base_width)
    if base is None or base.reason:
        return "inconclusive", f"no optimum at the base width: {base.reason if base else 'not run'}"
    if not _wider(sweep):
        return "inconclusive", f"only width {sweep.base_width} was run"
    steps = []
    for narrow, wide in pairwise(sweep.widths):
        gain, low, high = _paired_gain(sweep, narrow, wide, base.log2_learning_rate)
        if np.isinf(gain):
            return "not reproduced", f"width {wide}: training diverges at the transferred learning rate"
        ends = f"[{low:.3f}, {high:.3f}]" if np.isfinite([low, high]).all() else "(one seed)"
        steps.append((low, high, f"{narrow} to {wide}: {gain:.3f} nats {ends}"))
    reason = "loss falls at the transferred learning rate, " + ", ".join(text for _, _, text in steps)
    if all(low > 0 for low, _, _ in steps):
        return "reproduced", reason
    if any(high < 0 for _, high, _ in steps):
        return "not reproduced", reason
    return "inconclusive", f"{reason}: not every step has an interval that excludes 0"


def no_worse_than_sp(claim: str, evidence: Evidence) -> list[Verdict]:
    """Each rule set's best loss at the widest width that is bracketed under both, less that under SP.

    With multipliers tuned at the base width, where a search was run, or without: the best loss is the lower one.
    """
    dataset = evidence.get("lr_sweep")
    if dataset is None:
        return []
    found = []
    for sweep in _of_mup(dataset):
        reference = transfer(dataset, sweep.growth, sweep.optimizer, "sp")
        if reference is not None:
            wider, best = wider_is_better(sweep), [_best_losses(sweep, reference)]
            best += _tuned_losses(evidence, sweep, reference)
            names = [name for name, _ in best]
            verdict = _combined([wider[0], "reproduced" if "reproduced" in names else _combined(names)])
            reason = "; ".join(reason for _, reason in [wider, *best])
            found.append(Verdict(claim, sweep.growth, sweep.optimizer, sweep.rules, verdict, reason))
    return found


@from_dataset("coordinates")
def changes_keep_their_size(claim: str, dataset: xr.Dataset) -> list[Verdict]:
    """Changes of what the residual stream carries: none grows under μP, and under SP some do where predicted."""
    table = exponents(dataset)
    table = table[(table.measure == "change") & table.name.isin(TRUNK) & (table.step == table.step.max())]
    found = []
    for (growth, optimizer, rules), part in table.groupby(["growth", "optimizer", "rules"], sort=False):
        top = part.loc[part.exponent.idxmax()]
        reason = f"largest exponent of a change after {top.step} updates: {_exponent_in_words(top)} ({top['name']})"
        if rules == "sp":
            expected = part[part.predicted_low > FLAT]
            if expected.empty:
                verdict: VerdictName = "not tested"
                reason = "no change is predicted to grow"
            elif (expected.low > FLAT).any():
                verdict = "reproduced"
            else:
                verdict = "inconclusive" if (expected.high > FLAT).any() else "not reproduced"
        elif (part.low > FLAT).any():
            verdict = "not reproduced"
        else:
            verdict = "reproduced" if (part.high <= FLAT).all() else "inconclusive"
        found.append(Verdict(claim, growth, optimizer, rules, verdict, reason))
    return found


@from_dataset("coordinates")
def gates_are_independent(claim: str, dataset: xr.Dataset) -> list[Verdict]:
    """Whether gates' gradients in late training scale as sums of terms of independent signs."""
    table = gate_gradients(dataset)
    table = table[(table.independent != table.aligned) & table.rules.isin(MUP_RULES)]
    found = []
    for (growth, optimizer, rules), part in table.groupby(["growth", "optimizer", "rules"], sort=False):
        first, last = part[part.step == part.step.min()], part[part.step == part.step.max()]
        mean, (low, high) = _pooled(last)
        start, _ = _pooled(first)
        independent, aligned = float(last.independent.iloc[0]), float(last.aligned.iloc[0])
        reason = (
            f"gradients of {', '.join(GATES)} ∝ width^{signed(start)} in update {first.step.iloc[0]}, "
            f"^{signed(mean)} [{signed(low)}, {signed(high)}] in update {last.step.iloc[0]}; "
            f"{signed(independent)} if independent, {signed(aligned)} if aligned"
        )
        holds = {value: low <= value <= high for value in (independent, aligned)}
        nearer = abs(mean - independent) < abs(mean - aligned)
        if holds[independent] and not holds[aligned]:
            verdict: VerdictName = "reproduced"
        elif not holds[independent] and not nearer:
            verdict = "not reproduced"
        else:
            verdict = "inconclusive"
        found.append(Verdict(claim, growth, optimizer, rules, verdict, reason))
    return found


@from_dataset("multiplier")
def multiplier_is_epsilon(claim: str, dataset: xr.Dataset) -> list[Verdict]:
    """Whether a multiplier before the norm of o changes anything that ε does not."""
    return [
        Verdict(claim, growth, "", "", *multiplier_verdict(dataset.sel(growth=[growth])))
        for growth in map(str, dataset.growth.values)
    ]


def either_growth(claim: str, evidence: Evidence) -> list[Verdict]:
    """Whether the optimum of the shape rules transfers, where both growth modes were run under an optimizer."""
    found = []
    for optimizer in OPTIMIZER_TITLES:
        judged = of_sweeps(optimizer, ("gdn_mup",), optimum_transfers)(claim, evidence)
        tested = [verdict for verdict in judged if verdict.verdict != "not tested"]
        if len(tested) == 1:
            only = f"only growth by {tested[0].growth} was run; there: {tested[0].reason}"
            tested = [replace(tested[0], verdict="inconclusive", reason=only)]
        found += tested
    return found


@from_dataset("lr_sweep")
def tuning_small_saves(claim: str, dataset: xr.Dataset) -> list[Verdict]:
    """What a sweep costs at the widest width and at the base width, where the optimum transfers."""
    found = []
    for sweep in _of_mup(dataset):
        if not _wider(sweep):
            continue
        widest = sweep.widths[-1]
        large, small = (
            sweep_cost(dataset, sweep.growth, sweep.optimizer, width, sweep.curves[width].shape[1])
            for width in (widest, sweep.base_width)
        )
        saved = {
            "FLOPs": (small.flops, large.flops, "FLOP", "fewer"),
            "time": (small.seconds, large.seconds, "s", "less"),
            "energy": (small.joules, large.joules, "J", "less"),
        }
        known = {name: cost for name, cost in saved.items() if np.isfinite(cost[:2]).all()}
        parts = [
            f"{max(much / little, little / much):.1f} times {fewer if little <= much else 'more'} {name} "
            f"({with_unit(little, unit)} instead of {with_unit(much, unit)})"
            for name, (little, much, unit, fewer) in known.items()
        ]
        reason = f"a sweep at width {sweep.base_width} takes {', '.join(parts)} than at {widest}"
        seeds = [len(sweep.curves[width]) for width in (sweep.base_width, widest)]
        if seeds[0] != seeds[1]:
            reason += f", each of one seed ({seeds[0]} were run at {sweep.base_width}, {seeds[1]} at {widest})"
        verdict, why = optimum_transfers(sweep)
        if not known:
            verdict, reason = "inconclusive", "the jobs did not report what they cost"
        elif verdict == "reproduced" and any(much <= little for little, much, _, _ in known.values()):
            verdict = "not reproduced"
        found.append(Verdict(claim, sweep.growth, sweep.optimizer, sweep.rules, verdict, f"{reason}; {why}"))
    return found


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="C1",
        statement="Under AdamW and standard parametrization, the best learning rate falls with width.",
        decided_by="slope of log₂ LR* against log₂ width: its 95 % interval lies below 0",
        judge=of_sweeps("adamw", ("sp",), optimum_moves),
    ),
    Claim(
        id="C2",
        statement="Under AdamW and μP, the best learning rate of the base width is the best at every width.",
        decided_by=(
            f"slope: interval contains 0 and lies within ±{SLOPE_TOLERANCE} octaves per doubling; transfer "
            f"regret at each width: interval below {REGRET_TOLERANCE} nats or the spread between seeds"
        ),
        judge=of_sweeps("adamw", MUP_RULES, optimum_transfers),
    ),
    Claim(
        id="C3",
        statement="Under SGD and standard parametrization, the best learning rate falls with width.",
        decided_by="as C1",
        judge=of_sweeps("sgd", ("sp",), optimum_moves),
    ),
    Claim(
        id="C4",
        statement="Under SGD and μP, the best learning rate of the base width is the best at every width.",
        decided_by="as C2",
        judge=of_sweeps("sgd", MUP_RULES, optimum_transfers),
    ),
    Claim(
        id="C5",
        statement="Under μP no change that training makes to the residual stream grows with width; under SP some do.",
        decided_by=(
            f"width exponents of the changes of {', '.join(TRUNK)} at the last step: μP, all intervals below {FLAT}; "
            f"SP, an interval above {FLAT} where growth is predicted"
        ),
        judge=changes_keep_their_size,
    ),
    Claim(
        id="C6",
        statement="A gate's gradient is a sum over its head's channels of terms of independent signs, in training too.",
        decided_by=(
            "pooled width exponent of the gates' gradients in the last update, growth by head dim: its 95 % interval "
            "contains that of independent terms (−½ below aligned ones) and not that of aligned ones"
        ),
        judge=gates_are_independent,
    ),
    Claim(
        id="C7",
        statement="A multiplier √width on o before its RMSNorm has no effect but through the norm's ε.",
        decided_by=(
            "gradients with and without it: the same to rounding at ε = 0, and closer the larger mean(o²) is against ε"
        ),
        judge=multiplier_is_epsilon,
    ),
    Claim(
        id="C8",
        statement="One rule set (gdn_mup) transfers whichever way a network grows: by more heads or by larger ones.",
        decided_by="C2 and C4 for gdn_mup in both growth modes",
        judge=either_growth,
    ),
    Claim(
        id="C9",
        statement="At the transferred learning rate wider is better, and the best loss is not worse than under SP.",
        decided_by=(
            "fall of the loss from each width to the next: intervals above 0; best loss less SP's at "
            "the widest width, with multipliers tuned at the base width or without: interval below "
            f"{REGRET_TOLERANCE} nats; all paired by seed"
        ),
        judge=no_worse_than_sp,
    ),
    Claim(
        id="C10",
        statement="Tuning at the base width costs less than at the target, and finds the same learning rate.",
        decided_by=(
            "FLOPs, seconds and, where measured, joules of a sweep of one seed at the widest and at the base width, "
            "where C2 or C4 holds"
        ),
        judge=tuning_small_saves,
    ),
)


def judge_all(evidence: Evidence, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """Verdicts on every claim, for every growth mode that the datasets hold.

    For each claim and growth mode: first the claim as a whole, then one verdict per optimizer and rule set.
    """
    growths = dict.fromkeys(str(growth) for dataset in evidence.values() for growth in dataset.growth.values)
    verdicts: list[Verdict] = []
    for claim in claims:
        judged = claim.judge(claim.id, evidence)
        for growth in growths:
            each = [verdict for verdict in judged if verdict.growth == growth]
            if [verdict.rules for verdict in each] == [""]:  # it does not speak of rule sets
                verdicts += each
                continue
            tested = [verdict for verdict in each if verdict.verdict != "not tested"]
            whole = _combined(verdict.verdict for verdict in tested)
            several = len({verdict.optimizer for verdict in each}) > 1
            reasons = [
                f"{f'{OPTIMIZER_TITLES[v.optimizer]}, ' if several else ''}{RULE_SETS[v.rules].title}: {v.verdict}"
                for v in each
            ]
            if len(each) < 2:
                reasons = [verdict.reason for verdict in each] or ["no experiment of the study decides it"]
            optimizer = "" if several or not each else each[0].optimizer
            verdicts += [Verdict(claim.id, growth, optimizer, "", whole, "; ".join(reasons)), *each]
    return verdicts


def verdict_table(evidence: Evidence, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """`judge_all` as a table, one row per verdict."""
    statements = {claim.id: claim for claim in claims}
    return pd.DataFrame(
        [
            {
                "claim": verdict.claim,
                "statement": statements[verdict.claim].statement,
                "growth": verdict.growth,
                "optimizer": verdict.optimizer,
                "rules": verdict.rules or "all",
                "verdict": verdict.verdict,
                "reason": verdict.reason,
                "decided_by": statements[verdict.claim].decided_by,
            }
            for verdict in judge_all(evidence, claims)
        ]
    )


def _combined(verdicts: Iterable[VerdictName]) -> VerdictName:
    found = set(verdicts)
    order: tuple[VerdictName, ...] = ("not reproduced", "inconclusive", "reproduced")
    return next((name for name in order if name in found), "not tested")


def _of_mup(dataset: xr.Dataset) -> list[Transfer]:
    """The sweeps of rule sets that are meant to transfer."""
    return [sweep for sweep in transfers(dataset) if sweep.rules in MUP_RULES]


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


def _paired_gain(sweep: Transfer, narrow: int, wide: int, log2_rate: float) -> tuple[float, float, float]:
    """Mean fall of the loss from a width to a wider one at one learning rate, with its interval over seeds.

    Losses are those of the grid's nearest learning rate: the same at both widths.
    """
    losses = []
    for width in (narrow, wide):
        curve = sweep.curves[width]
        rates = np.log2(curve.columns.to_numpy(np.float64))
        losses.append(curve.iloc[:, int(np.abs(rates - log2_rate).argmin())])
    gains = (losses[0] - losses[1]).dropna().to_numpy(np.float64)  # of the seeds that were run at both
    if not np.isfinite(losses[1]).all():
        return np.inf, np.nan, np.nan
    return over_seeds(gains)


def _best_losses(sweep: Transfer, reference: Transfer) -> tuple[VerdictName, str]:
    """At the widest width where both have an optimum: the best loss less the reference's, seeds paired."""
    differences = best_losses_less(sweep, reference)
    if not differences:
        return "inconclusive", "no width with an optimum under both"
    width, (value, low, high) = list(differences.items())[-1]
    reason = f"best loss at width {width} less SP's: {signed(value)} nats [{signed(low)}, {signed(high)}]"
    if all(len(sweep.curves[each]) < 2 for each in differences):
        return "inconclusive", f"{reason}, one seed: the interval does not know how seeds differ"
    if high <= REGRET_TOLERANCE:
        return "reproduced", reason
    return ("not reproduced" if low > 0 else "inconclusive"), reason


def _tuned_losses(evidence: Evidence, sweep: Transfer, reference: Transfer) -> list[tuple[VerdictName, str]]:
    """What multipliers tuned at the base width gain, and the loss with them less the best under SP, paired by seed.

    SP has its best learning rate at that width, and its multipliers at 1. Empty without a search of that rule set.
    """
    dataset = evidence.get("tuning")
    if dataset is None:
        return []
    key = sweep.growth, sweep.optimizer, sweep.rules
    search = next((s for s in searches(dataset) if (s.growth, s.optimizer, s.rules) == key), None)
    if search is None or len(search.widths) < 2:
        return []
    width = search.widths[-1]
    gain = search.gain(width)
    reason = (
        f"multipliers tuned at width {search.base_width} gain {gain.value:.3f} nats [{gain.low:.3f}, {gain.high:.3f}] "
        f"at {width}"
    )
    curve = reference.curves.get(width)
    seeds = [seed for seed in search.seeds[width] if curve is not None and seed in curve.index]
    if curve is None or len(seeds) < 2 or not _trained_alike(evidence, sweep):
        return [("inconclusive", f"{reason}, and no sweep under SP was trained alike")]
    best = curve.loc[seeds].mean(axis=0, skipna=False).idxmin()
    rows = [search.seeds[width].index(seed) for seed in seeds]
    tuned = search.transferred(width)[rows, search.choice.trial]
    difference = over_seeds(tuned - curve.loc[seeds, best].to_numpy(np.float64))
    low, high = difference.low, difference.high
    reason += f", and the loss less SP's best is then {signed(difference.value)} [{signed(low)}, {signed(high)}]"
    if high <= REGRET_TOLERANCE:
        return [("reproduced", reason)]
    return [("not reproduced" if low > 0 else "inconclusive", reason)]


def _trained_alike(evidence: Evidence, sweep: Transfer) -> bool:
    """Whether a search and a sweep used the same text, model and training settings."""

    def settings(kind: str) -> tuple[Any, ...]:
        study = json.loads(evidence[kind].attrs["settings"])
        experiment = next(
            entry
            for entry in study[SECTIONS[kind]]
            if (entry["growth"], entry["optimizer"]) == (sweep.growth, sweep.optimizer)
        )
        text = evidence[kind].attrs.get("corpus_sha256")
        return text, study["model"], study["training"] | experiment["training"]

    return settings("tuning") == settings("lr_sweep")


def _pooled(part: pd.DataFrame) -> tuple[float, tuple[float, float]]:
    """Mean exponent of the gates, and the mean ends of their intervals: they share their seeds."""
    return float(part.exponent.mean()), (float(part.low.mean()), float(part.high.mean()))


def _exponent_in_words(row: pd.Series) -> str:
    return f"{signed(row.exponent)} [{signed(row.low)}, {signed(row.high)}]"
