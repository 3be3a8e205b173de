"""What growth modes, optimizers, rule sets and large numbers are called in figures, tables and verdicts."""

import math
from collections.abc import Iterable

from gdn_mup.scaling.rules import RULE_SETS

GROWTH_TITLES = {"heads": "more heads", "head_dim": "larger heads"}
OPTIMIZER_TITLES = {"adamw": "AdamW", "sgd": "SGD"}
RULE_TITLES = {name: rules.title for name, rules in RULE_SETS.items()}
NOT_REPORTED = "not reported"


def named(found: Iterable[tuple[str, str]]) -> str:
    """(optimizer, rule set) pairs in words; rule sets that go with the same optimizers stand together."""
    optimizers: dict[str, list[str]] = {}
    for optimizer, rules in dict.fromkeys(found):
        optimizers.setdefault(RULE_TITLES[rules], []).append(OPTIMIZER_TITLES[optimizer])
    together: dict[tuple[str, ...], list[str]] = {}
    for rules, names in optimizers.items():
        together.setdefault(tuple(names), []).append(rules)
    return "; ".join(f"{', '.join(rules)} ({', '.join(names)})" for names, rules in together.items())


def with_unit(value: float, unit: str = "") -> str:
    """Three digits and an SI prefix: `4.51 T`, `12.3 kJ`; seconds as they are, or hours; words for NaN."""
    if math.isnan(value):
        return NOT_REPORTED
    if unit == "s" and value >= 7200:
        return f"{value / 3600:,.0f} h" if value >= 360_000 else f"{value / 3600:.3g} h"
    if unit == "s":
        return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"
    value = float(f"{value:.3g}")  # 999.9 is 1 k
    power = min(max(math.floor(math.log10(value) / 3), 0), 7) if value > 0 else 0
    return f"{value / 1000**power:.3g} {' kMGTPEZ'[power].strip()}{unit}".rstrip()
