"""Rules applied: from the parameters of a base and a target model to multipliers, one per parameter."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gdn_mup.scaling.growth import ParameterInfo, growth_between
from gdn_mup.scaling.rules import RULE_SETS, Scaling


class ModelScaling(NamedTuple):
    """Everything a rule set changes between the base and the target width."""

    parameters: dict[str, Scaling]
    logits: float  # multiplies the logits; differs from 1 only when embeddings are tied


def scale_model(
    base: Mapping[str, ParameterInfo],
    target: Mapping[str, ParameterInfo],
    width: float,
    rules: str,
    optimizer: str,
) -> ModelScaling:
    """Multipliers for every parameter of `target`, grown from `base` by a factor `width`.

    The readout is tied if the model has no parameter whose part is READOUT. Raises ValueError if the two
    models do not have the same parameters: rules are found by comparing shapes pairwise.
    """
    if base.keys() != target.keys():
        only = sorted(base.keys() ^ target.keys())
        raise ValueError(f"base and target model differ in their parameters: {', '.join(only)}")
    rule_set = RULE_SETS[rules]
    growths = {name: growth_between(base[name], target[name], width) for name in target}
    scalings = {name: rule_set.scaling(target[name].part, growth, optimizer) for name, growth in growths.items()}
    parts = {info.part: name for name, info in target.items()}
    tied = next((name for part, name in parts.items() if part.name == "EMBEDDING"), None)
    if tied is None or any(part.name == "READOUT" for part in parts):
        return ModelScaling(scalings, 1.0)
    return ModelScaling(scalings, rule_set.tied_output(growths[tied]))


def distinct_rules(scalings: Mapping[str, object]) -> dict[str, str]:
    """For each rule set, the first one whose scalings are equal: such members need training only once.

    At the base width this maps every rule set to the first.
    """
    return {
        rules: next(other for other, candidate in scalings.items() if candidate == own)
        for rules, own in scalings.items()
    }


def scale_rule_sets(
    base: Mapping[str, ParameterInfo],
    target: Mapping[str, ParameterInfo],
    width: float,
    rules: Sequence[str],
    optimizer: str,
) -> dict[str, ModelScaling]:
    """`scale_model` for several rule sets."""
    return {name: scale_model(base, target, width, name, optimizer) for name in rules}
