"""The claims, and what a study's datasets say about each.

A claim is judged once per growth mode, optimizer and rule set, and combined per growth mode: reproduced if every
rule set it speaks of is, not reproduced if any is refuted. A verdict always carries the numbers that it rests on. To
add a claim, append it to `CLAIMS` with the function that judges it.

What does not matter is not called a difference: see `equivalence`, where the margins stand with their reasons. What a
design cannot answer is "not tested": where no effect is predicted under SP either, its absence says nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from gdn_mup.scaling.rules import RULE_SETS
from gdn_mup.study.clipping import clipped_in_words, is_clipped
from gdn_mup.study.cost import sweep_cost
from gdn_mup.study.equivalence import (
    EXPONENT_MARGIN,
    LOSS_MARGIN,
    SLOPE_MARGIN,
    VERDICT_OF,
    VerdictName,
    against,
    combined,
    judge_transfer,
)
from gdn_mup.study.estimates import Estimate, over_seeds, signed
from gdn_mup.study.exponents import TOLERANCE, exponents, pooled_gate_gradients, predicted_growth
from gdn_mup.study.losses import best_losses_less
from gdn_mup.study.multiplier import multiplier_verdict
from gdn_mup.study.optimum import Transfer, transfer, transfers
from gdn_mup.study.plan import SECTIONS
from gdn_mup.study.titles import OPTIMIZER_TITLES, with_unit
from gdn_mup.study.tuning import searches

# A study's collected datasets by kind, such as "lr_sweep" (`DatasetKind`). One that is absent was not run.
Evidence = Mapping[str, xr.Dataset]

MUP_RULES = ("mup", "liu_gu", "gdn_mup")  # named in every verdict, also where they were not run


def mup_rules(dataset: xr.Dataset) -> tuple[str, ...]:
    """Rule sets that are meant to transfer: those above, and whatever others were run that are no SP."""
    others = (str(name) for name in dataset.rules.values if not str(name).startswith("sp"))
    return tuple(dict.fromkeys((*MUP_RULES, *others)))


CARRIED = ("mixer_output", "mlp_output", "residual")  # what blocks add to the residual stream, and what it carries
TRUNK = (*CARRIED, "final_norm", "logits")  # what every block reads and writes, and what comes of it
PREACTIVATIONS = ("alpha_preactivation", "beta_preactivation")  # of the gates


def standard(_: xr.Dataset) -> tuple[str, ...]:
    """The rule set of claims on standard parametrization."""
    return ("sp",)


@dataclass(frozen=True)
class Verdict:
    """What the sweeps of one growth mode say on a claim; with `rules`, what those of one rule set say."""

    claim: str
    growth: str
    optimizer: str
    rules: str  # empty: the claim as a whole
    verdict: VerdictName
    reason: str
    same_runs_as: str = ""  # a rule set whose runs these are too: two names of one measurement


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


def of_sweeps(
    optimizer: str,
    rules: Callable[[xr.Dataset], Sequence[str]],
    judge: Callable[[xr.Dataset, Transfer], tuple[VerdictName, str]],
) -> Judge:
    """Judges each rule set's sweep under one optimizer, in every growth mode. `rules`: of a dataset, which."""

    @from_dataset("lr_sweep")
    def verdicts(claim: str, dataset: xr.Dataset) -> list[Verdict]:
        found = []
        for growth in map(str, dataset.growth.values):
            named = rules(dataset)
            for name in named:
                sweep = transfer(dataset, growth, optimizer, name)
                judged = judge(dataset, sweep) if sweep else ("not tested", "the study has no such sweep")
                twin = _same_runs(dataset, growth, optimizer, name, named)
                found.append(Verdict(claim, growth, optimizer, name, *judged, same_runs_as=twin))
        return found

    return verdicts


def _same_runs(dataset: xr.Dataset, growth: str, optimizer: str, name: str, rules: Sequence[str]) -> str:
    """The first rule set named whose runs are those of this one at every width beyond the base; empty if none's are."""
    mine = transfer(dataset, growth, optimizer, name)
    for other in rules[: rules.index(name)]:
        theirs = transfer(dataset, growth, optimizer, other)
        if not mine or not theirs or len(mine.widths) < 2 or mine.widths != theirs.widths:
            continue
        if all(mine.curves[width].equals(theirs.curves[width]) for width in mine.widths):
            return other
    return ""


def optimum_moves(dataset: xr.Dataset, sweep: Transfer) -> tuple[VerdictName, str]:
    """The optimum falls with width by more than would pass for staying; not tested where no fall is predicted."""
    slope, clipped = sweep.slope, _clipped(dataset, sweep)
    numbers = f"no slope: {slope.reason}" if slope.reason else _slope_in_words(sweep)
    own = is_clipped(dataset, sweep)
    growth = predicted_growth(sweep.rules, sweep.optimizer, sweep.growth, own)
    if growth <= EXPONENT_MARGIN:
        return "not tested", (
            f"no fall is predicted: what an update changes in the residual stream goes as width^{signed(growth)} under "
            f"this clipping{clipped}. For the record, {numbers}"
        )
    if slope.reason:
        return "inconclusive", numbers
    if slope.high < -SLOPE_MARGIN:
        return "reproduced", f"{numbers}, below −{SLOPE_MARGIN}{clipped}"
    if slope.low > -SLOPE_MARGIN:
        return "not reproduced", f"{numbers}: a fall of {SLOPE_MARGIN} is excluded{clipped}"
    return "inconclusive", f"{numbers}, which reaches across −{SLOPE_MARGIN}{clipped}"


def optimum_transfers(dataset: xr.Dataset, sweep: Transfer) -> tuple[VerdictName, str]:
    """The base width's best learning rate is good enough at every width, and does not move by more than the margin."""
    regrets = {width: sweep.regrets[width] for width in _wider(sweep)}
    if not regrets:
        return "inconclusive", f"only width {sweep.base_width} was run"
    verdict, reason = judge_transfer(sweep.slope, sweep.slope_beyond_base, regrets)
    return verdict, f"{reason}{_not_bracketed(sweep)}{_clipped(dataset, sweep)}"


def wider_is_better(sweep: Transfer) -> tuple[VerdictName, str]:
    """At the learning rate transferred from the base width, every doubling of width lowers the loss."""
    base = sweep.optima.get(sweep.base_width)
    if base is None or base.reason:
        return "inconclusive", f"no optimum at the base width: {base.reason if base else 'not run'}"
    if not _wider(sweep):
        return "inconclusive", f"only width {sweep.base_width} was run"
    steps = []
    for narrow, wide in pairwise(sweep.widths):
        gain = _paired_gain(sweep, narrow, wide, base.log2_learning_rate)
        if np.isinf(gain.value):
            return "not reproduced", f"width {wide}: training diverges at the transferred learning rate"
        one = "" if np.isfinite([gain.low, gain.high]).all() else " (one seed)"
        steps.append((gain, f"{narrow} to {wide}: {gain.plain()} nats{one}"))
    reason = "loss falls at the transferred learning rate, " + ", ".join(text for _, text in steps)
    if all(gain.low > 0 for gain, _ in steps):
        return "reproduced", reason
    if any(gain.high < -LOSS_MARGIN for gain, _ in steps):
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
            verdict = combined([wider[0], "reproduced" if "reproduced" in names else combined(names)])
            reason = "; ".join(reason for _, reason in [wider, *best])
            twin = _same_runs(dataset, sweep.growth, sweep.optimizer, sweep.rules, mup_rules(dataset))
            found.append(Verdict(claim, sweep.growth, sweep.optimizer, sweep.rules, verdict, reason, twin))
    return found


@from_dataset("coordinates")
def changes_keep_their_size(claim: str, dataset: xr.Dataset) -> list[Verdict]:
    """Changes in training: under μP none grows or vanishes with width, under SP some grow where predicted."""
    table = exponents(dataset)
    shown = table.name.isin((*TRUNK, *PREACTIVATIONS))
    table = table[(table.measure == "change") & shown & (table.step == table.step.max())]
    found = []
    for (growth, optimizer, rules), part in table.groupby(["growth", "optimizer", "rules"], sort=False):
        verdict, reason = _sp_grows(part) if rules == "sp" else _keeps_its_size(part)
        found.append(Verdict(claim, growth, optimizer, rules, verdict, reason))
    return found


def _keeps_its_size(part: pd.DataFrame) -> tuple[VerdictName, str]:
    rows = list(part.itertuples())
    standings = [against(_exponent(row), EXPONENT_MARGIN) for row in rows]
    verdict = combined(VERDICT_OF[standing] for standing in standings)
    ends = sorted(rows, key=lambda row: row.exponent)
    said = ", ".join(f"{_exponent(row).signed()} ({row.name})" for row in (ends[0], ends[-1]))
    reason = f"width exponents of the changes after {rows[0].step} updates are {said} and between, "
    if verdict == "reproduced":
        return verdict, f"{reason}within ±{EXPONENT_MARGIN}"
    wanted, where = ("beyond", "beyond") if verdict == "not reproduced" else ("open", "reaching across")
    names = dict.fromkeys(row.name for row, standing in zip(rows, standings, strict=True) if standing == wanted)
    return verdict, f"{reason}{where} ±{EXPONENT_MARGIN}: {', '.join(names)}"


def _sp_grows(part: pd.DataFrame) -> tuple[VerdictName, str]:
    carried = part[part.name.isin(CARRIED)]
    top = carried.loc[carried.exponent.idxmax()]
    reason = (
        f"largest exponent of a change in the residual stream after {top.step} updates: "
        f"{_exponent(top).signed()} ({top['name']})"
    )
    expected = carried[carried.predicted_low > EXPONENT_MARGIN]
    if expected.empty:
        logits = part[part.name == "logits"]
        also = ""
        if (logits.predicted_low > EXPONENT_MARGIN).any():
            one = logits.iloc[0]
            also = f"; logits, predicted {signed(one.predicted_low)}, have {_exponent(one).signed()}"
        return "not tested", f"no change is predicted to grow under this clipping. For the record, {reason}{also}"
    if (expected.low > EXPONENT_MARGIN).any():
        return "reproduced", reason
    return ("inconclusive" if (expected.high > EXPONENT_MARGIN).any() else "not reproduced"), reason


@from_dataset("coordinates")
def gates_are_independent(claim: str, dataset: xr.Dataset) -> list[Verdict]:
    """Whether gates' gradients scale as sums of terms of independent signs, in the first update and in late ones."""
    table = pooled_gate_gradients(dataset)
    table = table[(table.independent != table.aligned) & table.rules.isin(mup_rules(dataset))]
    found = []
    for (growth, optimizer, rules), part in table.groupby(["growth", "optimizer", "rules"], sort=False):
        ends = [part.loc[part.step.idxmin()], part.loc[part.step.idxmax()]]
        verdict = combined(_independent(row) for row in ends)
        first, last = (f"^{_exponent(row).signed()} in update {row.step}" for row in ends)
        reason = (
            f"the gates' gradients ∝ width{first}, {last}; {signed(ends[0].independent)} if independent, "
            f"{signed(ends[0].aligned)} if aligned"
        )
        found.append(Verdict(claim, growth, optimizer, rules, verdict, reason))
    return found


def _independent(row: pd.Series) -> VerdictName:
    """Widths are finite: a premise holds within `TOLERANCE` of the interval, as in every comparison of exponents."""
    holds = {name: row.low - TOLERANCE <= row[name] <= row.high + TOLERANCE for name in ("independent", "aligned")}
    if not holds["independent"]:
        return "not reproduced"
    return "inconclusive" if holds["aligned"] else "reproduced"


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
        judged = of_sweeps(optimizer, lambda _: ("gdn_mup",), optimum_transfers)(claim, evidence)
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
        verdict, why = optimum_transfers(dataset, sweep)
        if not known:
            verdict, reason = "inconclusive", "the jobs did not report what they cost"
        elif verdict == "reproduced" and any(much <= little for little, much, _, _ in known.values()):
            verdict = "not reproduced"
        twin = _same_runs(dataset, sweep.growth, sweep.optimizer, sweep.rules, mup_rules(dataset))
        found.append(Verdict(claim, sweep.growth, sweep.optimizer, sweep.rules, verdict, f"{reason}; {why}", twin))
    return found


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="C1",
        statement="Under AdamW and standard parametrization, the best learning rate falls with width.",
        decided_by=f"slope of log₂ LR* against log₂ width: interval below −{SLOPE_MARGIN} octaves per doubling",
        judge=of_sweeps("adamw", standard, optimum_moves),
    ),
    Claim(
        id="C2",
        statement="Under AdamW and μP, the base width's best learning rate is good enough at every width.",
        decided_by=(
            f"what it costs against each width's own best: intervals below {LOSS_MARGIN} nats; slope: interval within "
            f"±{SLOPE_MARGIN} octaves per doubling; refuted by an interval beyond"
        ),
        judge=of_sweeps("adamw", mup_rules, optimum_transfers),
    ),
    Claim(
        id="C3",
        statement="Under SGD and standard parametrization, the best learning rate falls with width.",
        decided_by="as C1, where a fall is predicted under the run's own clipping",
        judge=of_sweeps("sgd", standard, optimum_moves),
    ),
    Claim(
        id="C4",
        statement="Under SGD and μP, the base width's best learning rate is good enough at every width.",
        decided_by="as C2",
        judge=of_sweeps("sgd", mup_rules, optimum_transfers),
    ),
    Claim(
        id="C5",
        statement="Under μP what training changes neither grows nor vanishes with width; under SP some of it grows.",
        decided_by=(
            f"width exponents of the changes of {', '.join((*TRUNK, *PREACTIVATIONS))} at the last step: μP, all "
            f"intervals within ±{EXPONENT_MARGIN}; SP, one of {', '.join(CARRIED)} above {EXPONENT_MARGIN}, where "
            "growth is predicted under the run's own clipping"
        ),
        judge=changes_keep_their_size,
    ),
    Claim(
        id="C6",
        statement="A gate's gradient is a sum over its head's channels of terms of independent signs, in training too.",
        decided_by=(
            "width exponent of the gates' gradients, A_log and dt_bias taken as one, in the first and in the last "
            f"update, growth by head dim: each interval, widened by {TOLERANCE}, contains that of independent terms "
            "(−½ below aligned ones) and not that of aligned ones"
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
            f"{LOSS_MARGIN} nats, refuted above; all paired by seed"
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
            whole = combined(verdict.verdict for verdict in tested)
            several = len({verdict.optimizer for verdict in each}) > 1
            reasons = [
                f"{f'{OPTIMIZER_TITLES[v.optimizer]}, ' if several else ''}{RULE_SETS[v.rules].title}: {v.verdict}"
                + (f" (the same runs as {RULE_SETS[v.same_runs_as].title})" if v.same_runs_as else "")
                for v in each
            ]
            if len(each) < 2:
                reasons = [verdict.reason for verdict in each] or ["no experiment of the study decides it"]
            optimizer = "" if several or not each else each[0].optimizer
            verdicts += [Verdict(claim.id, growth, optimizer, "", whole, "; ".join(reasons)), *each]
    return verdicts


def count_tests(verdicts: Sequence[Verdict]) -> int:
    """Verdicts that rest on an interval, each measurement counted once.

    Wholes follow from their parts; C8 and C10 ask again what C2 and C4 have asked.
    """
    parts: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        parts.setdefault((verdict.claim, verdict.growth), []).append(verdict)
    each = [v for found in parts.values() for v in (found[1:] if len(found) > 1 else found)]
    tested = [v for v in each if v.verdict != "not tested" and not v.same_runs_as]
    return sum(v.claim not in ("C8", "C10") for v in tested)


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


def _of_mup(dataset: xr.Dataset) -> list[Transfer]:
    """The sweeps of rule sets that are meant to transfer."""
    return [sweep for sweep in transfers(dataset) if sweep.rules in mup_rules(dataset)]


def _wider(sweep: Transfer) -> list[int]:
    return [width for width in sweep.widths if width != sweep.base_width]


def _slope_in_words(sweep: Transfer) -> str:
    return f"slope {sweep.slope.signed()} octaves per doubling{_not_bracketed(sweep)}"


def _not_bracketed(sweep: Transfer) -> str:
    """Which widths are not in the slope."""
    without = [str(width) for width in sweep.widths if width not in sweep.slope.widths]
    return f" (no optimum at width {', '.join(without)})" if without and not sweep.slope.reason else ""


def _clipped(dataset: xr.Dataset, sweep: Transfer) -> str:
    """Under SGD, how many updates were clipped: there it sets an update's size."""
    return f"; {clipped_in_words(dataset, sweep)}" if sweep.optimizer == "sgd" else ""


def _paired_gain(sweep: Transfer, narrow: int, wide: int, log2_rate: float) -> Estimate:
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
        return Estimate(np.inf)
    return over_seeds(gains)


def _best_losses(sweep: Transfer, reference: Transfer) -> tuple[VerdictName, str]:
    """At the widest width where both have an optimum: the best loss less the reference's, seeds paired."""
    differences = best_losses_less(sweep, reference)
    if not differences:
        return "inconclusive", "no width with an optimum under both"
    width, difference = list(differences.items())[-1]
    reason = f"best loss at width {width} less SP's: {difference.signed()} nats"
    if all(len(sweep.curves[each]) < 2 for each in differences):
        return "inconclusive", f"{reason}, one seed: the interval does not know how seeds differ"
    return _no_worse(difference), reason


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
    reason = f"multipliers tuned at width {search.base_width} gain {gain.plain()} nats at {width}"
    curve = reference.curves.get(width)
    seeds = [seed for seed in search.seeds[width] if curve is not None and seed in curve.index]
    if curve is None or len(seeds) < 2 or not _trained_alike(evidence, sweep):
        return [("inconclusive", f"{reason}, and no sweep under SP was trained alike")]
    best = curve.loc[seeds].mean(axis=0, skipna=False).idxmin()
    rows = [search.seeds[width].index(seed) for seed in seeds]
    tuned = search.transferred(width)[rows, search.choice.trial]
    difference = over_seeds(tuned - curve.loc[seeds, best].to_numpy(np.float64))
    return [(_no_worse(difference), f"{reason}, and the loss less SP's best is then {difference.signed()}")]


def _no_worse(difference: Estimate) -> VerdictName:
    """A loss less another is not above the margin. Any amount below is as well."""
    if difference.high <= LOSS_MARGIN:
        return "reproduced"
    return "not reproduced" if difference.low > LOSS_MARGIN else "inconclusive"


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


def _exponent(row: Any) -> Estimate:
    return Estimate.of(row.exponent, row.low, row.high)
