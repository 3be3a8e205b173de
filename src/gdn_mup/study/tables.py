"""Tables, each as csv for programs, Markdown for people and TeX for papers.

Every table is made twice: with numbers (the csv) and, by `printed_*`, in words and signs (Markdown and TeX).
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from gdn_mup.files import replacing
from gdn_mup.scaling.growth import Growth, Part
from gdn_mup.scaling.rules import PRINCIPAL, RULE_SETS, RuleSet
from gdn_mup.study.claims import Evidence, verdict_table
from gdn_mup.study.estimates import Estimate
from gdn_mup.study.losses import best_losses_less
from gdn_mup.study.optimum import transfers
from gdn_mup.study.titles import GROWTH_TITLES, NOT_REPORTED, OPTIMIZER_TITLES, RULE_TITLES, with_unit
from gdn_mup.study.width_fit import asymptotic_loss_penalty, fit_error, robustness_exponent


def save(table: pd.DataFrame, stem: Path | str, printed: pd.DataFrame | None = None) -> None:
    """Write `stem`.csv from `table` and `stem`.md and `stem`.tex from `printed` (by default the same).

    TeX needs the packages booktabs and amsmath. Each file is written to a temporary name and renamed.
    """
    stem = Path(stem)
    printed = table if printed is None else printed
    with replacing(stem.with_name(f"{stem.name}.csv")) as path:
        table.to_csv(path, index=False, float_format="%.6g")
    with replacing(stem.with_name(f"{stem.name}.md")) as path:
        escaped = printed.astype(str).replace({r"\|": r"\\|"}, regex=True)
        path.write_text(escaped.to_markdown(index=False, disable_numparse=True) + "\n", "utf-8")
    with replacing(stem.with_name(f"{stem.name}.tex")) as path:
        path.write_text(_tex(printed), "utf-8")


# Scaling rules


class ParameterGroup(NamedTuple):
    """Parameters that share a row: which of their two sides grow with width, as powers of m = d/d₀.

    Powers are given for each growth mode (heads, head_dim).
    """

    title: str
    part: Part
    fan_in: tuple[int, int]
    fan_out: tuple[int, int]


# What grows in the language model of `gdn_mup.model`; a test compares this with its shapes.
PARAMETER_GROUPS = (
    ParameterGroup("q, k, v, g, o, MLP", Part.HIDDEN, fan_in=(1, 1), fan_out=(1, 1)),
    ParameterGroup("W_a, W_b", Part.GATE_PROJECTION, fan_in=(1, 1), fan_out=(1, 0)),
    ParameterGroup("A_log, dt_bias", Part.GATE_SCALAR, fan_in=(0, 0), fan_out=(1, 0)),
    ParameterGroup("short conv", Part.SHORT_CONV, fan_in=(0, 0), fan_out=(1, 1)),
    ParameterGroup("norm of the mixer's output o", Part.NORM, fan_in=(0, 0), fan_out=(0, 1)),
    ParameterGroup("other norms", Part.NORM, fan_in=(0, 0), fan_out=(1, 1)),
    ParameterGroup("embedding", Part.EMBEDDING, fan_in=(0, 0), fan_out=(1, 1)),
    ParameterGroup("readout", Part.READOUT, fan_in=(1, 1), fan_out=(0, 0)),
)
# W_o has rules of its own in a variant alone, and stands among the hidden matrices above.
_MIXER_OUTPUT = ParameterGroup("o", Part.MIXER_OUTPUT, fan_in=(1, 1), fan_out=(1, 1))

# arXiv 2606.04048, text and released code, as powers of m (of d for the init, where the paper prints 1/√d).
# The paper grows head_dim and ties the readout to the embedding, whose logits it multiplies by 1/m.
# group: (init std, AdamW learning rate, SGD learning rate, SGD learning rate of its "original μP")
_AS_PRINTED = {
    "q, k, v, g, o, MLP": ("m^-1/2", "m^-1", "1", "1"),
    "W_a, W_b": ("m^-1/2", "m^-1", "m^-1/2", "1"),
    "A_log, dt_bias": ("1", "1", "m^1/2", "1"),
    "short conv": ("m^-1/2 (code)", "m^-1 (code)", "1", "1"),
    "norm of the mixer's output o": ("1", "m^-1 (code)", "1", "1"),
    "other norms": ("1", "m^-1 (code)", "1", "1"),
    "embedding": ("1", "1", "m", "m"),
}
_MULTIPLIERS = {
    "init_std": ("init std", "adamw", 0),
    "adamw_learning_rate": ("AdamW learning rate", "adamw", 1),
    "sgd_learning_rate": ("SGD learning rate", "sgd", 2),
    "adamw_epsilon": ("AdamW ε", "adamw", None),
    "adamw_weight_decay": ("AdamW weight decay", "adamw", None),
}


def scaling_rules() -> pd.DataFrame:
    """Every multiplier of the principal rule sets as the power of m = d/d₀ that it is, next to the paper's own.

    One row per (growth, parameters, multiplier), computed from the rule sets that training uses; `none` for weight
    decay of parameters that do not decay. The columns
    `paper` and `paper_original_mup` are what arXiv 2606.04048 prints, empty where it prints nothing.
    """
    rows = []
    for i, growth in enumerate(GROWTH_TITLES):
        for group in PARAMETER_GROUPS:
            m = 4.0
            growing = Growth(fan_in=m ** group.fan_in[i], fan_out=m ** group.fan_out[i], width=m)
            for multiplier, (_, _, printed) in _MULTIPLIERS.items():
                row = {
                    "growth": growth,
                    "parameters": group.title,
                    "axes_that_grow": growing.axes.value,
                    "multiplier": multiplier,
                }
                for name in PRINCIPAL:
                    row[name] = _multiplier(name, group.part, growing, multiplier)
                paper = _AS_PRINTED.get(group.title) if growth == "head_dim" else None
                known = paper is not None and printed is not None
                row["paper"] = paper[printed] if known else ""  # type: ignore[index]
                row["paper_original_mup"] = paper[3] if paper and multiplier == "sgd_learning_rate" else ""
                rows.append(row)
    for growth in GROWTH_TITLES:
        m = 4.0
        row = {
            "growth": growth,
            "parameters": "logits, when the readout is the embedding's transpose",
            "axes_that_grow": "",
            "multiplier": "output",
        }
        for name in PRINCIPAL:
            tied = RULE_SETS[name].tied_output(Growth(fan_in=1.0, fan_out=m, width=m))
            row[name] = _power_of_m(float(np.log(tied) / np.log(m)))
        row["paper"] = row["paper_original_mup"] = "m^-1" if growth == "head_dim" else ""
        rows.append(row)
    return pd.DataFrame(rows)


def _multiplier(rules: str, part: Part, growth: Growth, multiplier: str) -> str:
    """One of `_MULTIPLIERS` as a power of m, the growth of the width; `none` for what does not decay."""
    field = multiplier.removeprefix("adamw_").removeprefix("sgd_")
    value = getattr(RULE_SETS[rules].scaling(part, growth, _MULTIPLIERS[multiplier][1]), field)
    return _power_of_m(float(np.log(value) / np.log(growth.width))) if value else "none"


def variants() -> pd.DataFrame:
    """What each variant multiplies otherwise than the rule set that it departs from; one row for each such multiplier.

    Parameters that differ alike stand together. Printed as it is: powers of m with superscript signs.
    """
    rows = [row for rules in RULE_SETS.values() if rules.variant_of for row in _differences(rules)]
    table = pd.DataFrame(rows)
    for joined, separator in (("growth by", " or "), ("parameters", ", ")):
        keys = [name for name in table if name != joined]
        table = table.groupby(keys, sort=False)[joined].agg(separator.join).reset_index()
    return table[list(rows[0])]


def _differences(variant: RuleSet) -> Iterator[dict[str, str]]:
    """A row for each growth mode, parameters and multiplier in which a variant differs."""
    m = 4.0
    for i, growth in enumerate(GROWTH_TITLES.values()):
        for group in (*PARAMETER_GROUPS, _MIXER_OUTPUT):
            growing = Growth(fan_in=m ** group.fan_in[i], fan_out=m ** group.fan_out[i], width=m)
            if group is _MIXER_OUTPUT and variant.row(group.part, growing) == variant.row(Part.HIDDEN, growing):
                continue
            for multiplier, (title, _, _) in _MULTIPLIERS.items():
                names = (variant.variant_of, variant.name)
                there, here = (_superscript(_multiplier(name, group.part, growing, multiplier)) for name in names)
                if there != here:
                    yield {
                        "variant": variant.title,
                        "of": RULE_TITLES[variant.variant_of],
                        "parameters": group.title,
                        "multiplier": title,
                        "growth by": growth,
                        "there": there,
                        "here": here,
                    }


def printed_scaling_rules(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in which nothing happens are left out; growth modes with equal rules are joined."""
    names = list(PRINCIPAL)
    nothing = (table[names] == "1").all(axis=1) & table.paper.isin(("1", ""))
    parameters = list(dict.fromkeys(table.parameters))
    shown = table[~nothing].sort_values("parameters", key=lambda column: column.map(parameters.index), kind="stable")
    keys = ["parameters", "axes_that_grow", "multiplier", *names]
    rows = []
    for _, group in shown.groupby(keys, sort=False):
        first = group.iloc[-1]  # head_dim, where there is one: the mode that the paper prints
        title = _MULTIPLIERS[first.multiplier][0] if first.multiplier in _MULTIPLIERS else "output"
        rows.append(
            {
                "parameters": first.parameters,
                "multiplier": title,
                "growth by": " or ".join(GROWTH_TITLES[growth] for growth in group.growth),
                "axes that grow": first.axes_that_grow or "–",
                **{RULE_TITLES[name]: _superscript(first[name]) for name in names},
                "paper": _superscript(first.paper) or "–",
                "paper, “original μP”": _superscript(first.paper_original_mup) or "–",
            }
        )
    return pd.DataFrame(rows)


# Optima


COMPARED_WITH = ("sp", "liu_gu")  # rule sets that the best losses of the others are held against


def optima(dataset: xr.Dataset) -> pd.DataFrame:
    """Every optimum with its interval, its loss, and what the base width's optimum costs at that width.

    One row per (growth, optimizer, rules, width); NaN and a reason where there is no number. `loss_less_…`: the loss
    less that under another rule set, seeds paired; NaN at the base width, where rule sets are the same model.
    Raises UserError if the study has no sweep.
    """
    sweeps = {(sweep.growth, sweep.optimizer, sweep.rules): sweep for sweep in transfers(dataset)}
    rows = []
    for (growth, optimizer, rules), sweep in sweeps.items():
        others = {name: sweeps.get((growth, optimizer, name)) for name in COMPARED_WITH if name != rules}
        differences = {name: best_losses_less(sweep, other) for name, other in others.items() if other}
        for width, optimum in sweep.optima.items():
            regret = sweep.regrets[width]
            less = {name: differences.get(name, {}).get(width, Estimate()) for name in COMPARED_WITH}
            rows.append(
                {
                    "growth": growth,
                    "optimizer": optimizer,
                    "rules": rules,
                    "width": width,
                    "seeds": len(sweep.curves[width]),
                    "log2_learning_rate": optimum.log2_learning_rate,
                    "log2_learning_rate_low": optimum.interval.low,
                    "log2_learning_rate_high": optimum.interval.high,
                    "loss": optimum.loss,
                    "loss_low": optimum.loss_interval.low,
                    "loss_high": optimum.loss_interval.high,
                    **{
                        f"loss_less_{name}{end}": number
                        for name, estimate in less.items()
                        for end, number in zip(("", "_low", "_high"), estimate.numbers, strict=True)
                    },
                    "transfer_regret": regret.value,
                    "transfer_regret_low": regret.interval.low,
                    "transfer_regret_high": regret.interval.high,
                    "seed_noise": sweep.seed_noise[width],
                    "not_bracketed": optimum.reason,
                    "no_regret": regret.reason,
                }
            )
    return pd.DataFrame(rows)


def printed_optima(table: pd.DataFrame) -> pd.DataFrame:
    """Optima with intervals in brackets."""
    compared = [name for name in COMPARED_WITH if table[f"loss_less_{name}"].notna().any()]
    rows = []
    for row in table.itertuples():
        if row.not_bracketed:
            best = f"not bracketed: {row.not_bracketed}"
        else:
            best = _estimate(row, "log2_learning_rate").signed()
        if row.no_regret:
            regret = "–"
        elif np.isinf(row.transfer_regret):
            regret = "diverges"
        else:
            regret = _estimate(row, "transfer_regret").plain()
        loss = "–" if np.isnan(row.loss) else _estimate(row, "loss").plain()
        less = {}
        for name in compared:
            difference = _estimate(row, f"loss_less_{name}")
            if np.isnan(difference.value):
                words = "–"
            elif difference.low == difference.high:
                words = "the same runs"
            else:
                words = difference.signed()
            less[f"loss less {RULE_TITLES[name]}'s"] = words
        rows.append(
            {
                "growth by": GROWTH_TITLES[row.growth],
                "optimizer": OPTIMIZER_TITLES[row.optimizer],
                "rules": RULE_TITLES[row.rules],
                "width": str(row.width),
                "seeds": str(row.seeds),
                "log₂ LR*": best,
                "loss (nats/token)": loss,
                **less,
                "transfer regret (nats/token)": regret,
            }
        )
    return pd.DataFrame(rows)


def _estimate(row: Any, name: str) -> Estimate:
    """A table's number and its interval."""
    return Estimate.of(*(getattr(row, f"{name}{end}") for end in ("", "_low", "_high")))


# Metrics of transfer


def transfer_metrics(dataset: xr.Dataset) -> pd.DataFrame:
    """How well a learning rate transfers, in numbers: slope and the three metrics of `width_fit`, with intervals.

    One row per (growth, optimizer, rules); NaN and a reason where there is no number. The loss penalty is against SP.
    Raises UserError if the study has no sweep.
    """
    sweeps = {(sweep.growth, sweep.optimizer, sweep.rules): sweep for sweep in transfers(dataset)}
    rows = []
    for (growth, optimizer, rules), sweep in sweeps.items():
        optima = list(sweep.optima.values())
        row: dict[str, object] = {
            "growth": growth,
            "optimizer": optimizer,
            "rules": rules,
            "widths": len(optima),
            "bracketed": sum(optimum.bracketed for optimum in optima),
        }
        reference = sweeps.get((growth, optimizer, "sp"))
        if rules == "sp" or reference is None:
            penalty = Estimate(reason="this is SP" if rules == "sp" else "no sweep under SP")
        else:
            shared = [width for width in sweep.widths if width in reference.optima]
            penalty = asymptotic_loss_penalty(
                shared, [sweep.optima[width] for width in shared], [reference.optima[width] for width in shared]
            )
        estimates: dict[str, Estimate] = {
            "slope": sweep.slope,
            "fit_error": fit_error(sweep.widths, optima),
            "robustness_exponent": robustness_exponent(sweep.widths, optima),
            "loss_penalty": penalty,
        }
        for name, found in estimates.items():
            low, high = found.interval
            row |= {name: found.value, f"{name}_low": low, f"{name}_high": high, f"no_{name}": found.reason}
        rows.append(row)
    return pd.DataFrame(rows)


def printed_transfer_metrics(table: pd.DataFrame) -> pd.DataFrame:
    """Metrics with intervals in brackets."""
    columns = {
        "slope": "slope (octaves per doubling)",
        "fit_error": "fit error (octaves)",
        "robustness_exponent": "robustness exponent",
        "loss_penalty": "asymptotic loss penalty against SP (nats/token)",
    }
    rows = []
    for row in table.itertuples():
        printed = {
            "growth by": GROWTH_TITLES[row.growth],
            "optimizer": OPTIMIZER_TITLES[row.optimizer],
            "rules": RULE_TITLES[row.rules],
            "widths with an optimum": f"{row.bracketed} of {row.widths}",
        }
        for name, title in columns.items():
            printed[title] = "–" if getattr(row, f"no_{name}") else _estimate(row, name).signed()
        rows.append(printed)
    return pd.DataFrame(rows)


# Costs


def printed_costs(table: pd.DataFrame) -> pd.DataFrame:
    """`cost.costs` with units, and words where nothing was reported."""
    rows = []
    for row in table.itertuples():
        joules = with_unit(row.joules, "J")
        if 0 < row.jobs_with_joules < row.jobs:
            joules += f" (of {row.jobs_with_joules} jobs)"
        rows.append(
            {
                "jobs of": row.kind,
                "growth by": GROWTH_TITLES.get(row.growth, ""),
                "optimizer": OPTIMIZER_TITLES.get(row.optimizer, ""),
                "width": row.width,
                "jobs": str(row.jobs),
                "runs": _count(row.members),
                "diverged": _count(row.diverged),
                "tokens": with_unit(row.tokens),
                "FLOPs": with_unit(row.flops),
                "time": with_unit(row.seconds, "s"),
                "time of a job": with_unit(row.seconds_a_job, "s"),
                "energy": joules,
                "device": row.device,
            }
        )
    return pd.DataFrame(rows)


def _count(value: float) -> str:
    return NOT_REPORTED if np.isnan(value) else f"{value:.0f}"


# Verdicts


def verdicts(evidence: Evidence) -> pd.DataFrame:
    """Verdicts on every claim: per growth mode for the claim as a whole, then for each optimizer and rule set."""
    return verdict_table(evidence)


def printed_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """One row per claim and growth mode, and one per optimizer and rule set where a claim speaks of several."""
    shown = table[(table.rules == "all") | (table.groupby(["claim", "growth"]).rules.transform("size") > 2)]
    return pd.DataFrame(
        {
            "claim": [f"{row.claim}. {row.statement}" if row.rules == "all" else "" for row in shown.itertuples()],
            "growth by": shown.growth.map(GROWTH_TITLES).to_list(),
            "optimizer": [OPTIMIZER_TITLES.get(optimizer, "") for optimizer in shown.optimizer],
            "rules": [RULE_TITLES.get(rules, rules) for rules in shown.rules],
            "verdict": shown.verdict.to_list(),
            "reason": shown.reason.to_list(),
        }
    )


# Signs


def _power_of_m(exponent: float) -> str:
    """`m^-1/2` for −0.5, `1` for 0, `m` for 1."""
    fraction = Fraction(exponent).limit_denominator(12)
    return {0: "1", 1: "m"}.get(fraction, f"m^{fraction}")  # type: ignore[call-overload]


def _superscript(text: str) -> str:
    """`m^-1/2` as m^(−½) is printed: with superscript signs, readable without TeX."""
    if "^" not in text:
        return text
    base, rest = text.split("^", 1)
    exponent, *remark = rest.split(" ", 1)
    raised = exponent.translate(str.maketrans("-0123456789/", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹ᐟ"))
    return " ".join([base + raised, *remark])


_TEX_SIGNS = {
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "±": r"$\pm$",
    "–": "--",
    "μ": r"$\mu$",
    "α": r"$\alpha$",
    "ε": r"$\varepsilon$",
    "₂": r"$_2$",
    "₀": r"$_0$",
    "∝": r"$\propto$",
    "√": r"$\surd$",
    "½": r"$\tfrac12$",
    "“": "``",
    "”": "''",
}
_RAISED = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹ᐟ"


def _tex(table: pd.DataFrame) -> str:
    """A booktabs table. Columns of sentences wrap."""

    def cell(value: object) -> str:
        text = "".join(_TEX_SIGNS.get(sign, sign) for sign in str(value))
        return re.sub(
            f"[{_RAISED}]+",
            lambda found: f"$^{{{found[0].translate(str.maketrans(_RAISED, '-0123456789/'))}}}$",
            text,
        )

    texts = table.astype(str)
    widest = texts.apply(lambda column: column.str.len().max())
    columns = "".join("l" if width <= 40 else r"p{0.3\linewidth}" for width in widest)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(map(cell, table.columns)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(cell, row)) + r" \\" for row in texts.itertuples(index=False)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
