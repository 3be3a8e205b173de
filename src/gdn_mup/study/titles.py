"""What growth modes, optimizers and rule sets are called in figures, tables and verdicts."""

from collections.abc import Iterable

from gdn_mup.scaling.rules import RULE_SETS

GROWTH_TITLES = {"heads": "more heads", "head_dim": "larger heads"}
OPTIMIZER_TITLES = {"adamw": "AdamW", "sgd": "SGD"}
RULE_TITLES = {name: rules.title for name, rules in RULE_SETS.items()}


def named(found: Iterable[tuple[str, str]]) -> str:
    """(optimizer, rule set) pairs in words; rule sets that go with the same optimizers stand together."""
    optimizers: dict[str, list[str]] = {}
    for optimizer, rules in dict.fromkeys(found):
        optimizers.setdefault(RULE_TITLES[rules], []).append(OPTIMIZER_TITLES[optimizer])
    together: dict[tuple[str, ...], list[str]] = {}
    for rules, names in optimizers.items():
        together.setdefault(tuple(names), []).append(rules)
    return "; ".join(f"{', '.join(rules)} ({', '.join(names)})" for names, rules in together.items())
