"""Mistakes in applying the rules, planted one at a time: whether a coordinate check finds each, and names the cause.

`pytest -s tests/test_planted_mistakes.py` prints the detection table.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from module_examples import CONTEXT, TRANSFORMER_AXES, VOCABULARY, Gated, Transformer
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from gdn_mup import Scaling
from gdn_mup.checks.coordinates import coordinate_check
from gdn_mup.checks.findings import Finding, findings

WIDTHS, SEEDS = (64, 128, 256), (0, 1)
RATE = 2.0**-8


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batches() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (8, CONTEXT), generator=random) for _ in range(4)]


def check(make: Callable[[int], nn.Module], setup: Callable[[nn.Module, Scaling], Optimizer]) -> list[Finding]:
    axes = {} if make is Gated else TRANSFORMER_AXES
    return findings(coordinate_check(make, WIDTHS, batches(), loss=loss, setup=setup, seeds=SEEDS, axes=axes))


def counts(found: list[Finding]) -> str:
    """How many findings are about parameters, and how many about outputs."""
    outputs = sum("output" in finding.what or finding.where == "(loss)" for finding in found)
    return f"{len(found) - outputs} | {outputs}"


# Setups: what is right, and what is not.


def right(model: nn.Module, scaling: Scaling) -> Optimizer:
    scaling.initialize(model)
    return AdamW(scaling.parameter_groups(model, "adamw", RATE, weight_decay=0.1))


def right_sgd(model: nn.Module, scaling: Scaling) -> Optimizer:
    scaling.initialize(model)
    return SGD(scaling.parameter_groups(model, "sgd", 0.05), momentum=0.9, nesterov=True)


def split(optimizer: Optimizer, model: nn.Module, name: str) -> dict[str, Any]:
    """A group of its own for one parameter."""
    parameter = model.get_parameter(name)
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    group["params"] = [p for p in group["params"] if p is not parameter]
    optimizer.add_param_group({**group, "params": [parameter]})
    return optimizer.param_groups[-1]


def hidden_rate_unscaled(model: nn.Module, scaling: Scaling) -> Optimizer:
    optimizer = right(model, scaling)
    split(optimizer, model, "mlp.0.weight")["lr"] = RATE
    return optimizer


def one_rate_for_all(model: nn.Module, scaling: Scaling) -> Optimizer:
    scaling.initialize(model)
    return AdamW(model.parameters(), lr=RATE)


def one_rate_for_all_sgd(model: nn.Module, scaling: Scaling) -> Optimizer:
    scaling.initialize(model)
    return SGD(model.parameters(), lr=0.05)


def embedding_as_hidden(model: nn.Module, scaling: Scaling) -> Optimizer:
    optimizer = right(model, scaling)
    split(optimizer, model, "tokens.weight")["lr"] *= scaling.base / scaling.target
    return optimizer


def init_forgotten(model: nn.Module, scaling: Scaling) -> Optimizer:
    scaling.add_multipliers(model)
    return AdamW(scaling.parameter_groups(model, "adamw", RATE))


def hidden_init_constant(model: nn.Module, scaling: Scaling) -> Optimizer:
    optimizer = right(model, scaling)
    with torch.no_grad():
        model.values.weight.normal_(std=0.05)
    return optimizer


def multiplier_forgotten(model: nn.Module, scaling: Scaling) -> Optimizer:
    optimizer = right(model, scaling)
    scaling.remove_multipliers(model, fold=False)
    return optimizer


def epsilon_bites(model: nn.Module, scaling: Scaling) -> Optimizer:
    optimizer = right(model, scaling)
    for group in optimizer.param_groups:
        group["eps"] = 1e-3
    return optimizer


def gate_as_hidden(model: nn.Module, scaling: Scaling) -> Optimizer:
    optimizer = right(model, scaling)
    with torch.no_grad():
        model.gates.weight.mul_((scaling.target / scaling.base) ** 0.5)
    return optimizer


def decay_uncompensated(model: nn.Module, scaling: Scaling) -> Optimizer:
    optimizer = right(model, scaling)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    return optimizer


def left_out(model: nn.Module, scaling: Scaling) -> Optimizer:
    optimizer = right(model, scaling)
    split(optimizer, model, "queries.weight")["params"].clear()
    return optimizer


def branch_grows(model: nn.Module, scaling: Scaling) -> Optimizer:
    factor = (scaling.target / scaling.base) ** 0.5
    model.mlp.register_forward_hook(lambda module, args, output: output * factor)
    return right(model, scaling)


class Planted(NamedTuple):
    """A mistake, in which model, and what must be named."""

    mistake: str
    make: Callable[[int], nn.Module]
    setup: Callable[[nn.Module, Scaling], Optimizer]
    where: str
    look_at: str


TIED = partial(Transformer, tied=True)
PLANTED = [
    Planted("a hidden matrix's learning rate left unscaled", Transformer, hidden_rate_unscaled, "mlp.0.weight", "rate"),
    Planted("one learning rate for everything, AdamW", Transformer, one_rate_for_all, "queries.weight", "rate"),
    Planted("one learning rate for everything, SGD", Transformer, one_rate_for_all_sgd, "tokens.weight", "rate"),
    Planted("the embedding's learning rate scaled as a hidden one", TIED, embedding_as_hidden, "tokens.weight", "rate"),
    Planted("the init forgotten", Transformer, init_forgotten, "head.weight", "initial"),
    Planted(
        "a hidden matrix with one standard deviation", Transformer, hidden_init_constant, "values.weight", "initial"
    ),
    Planted("the tied readout's multiplier forgotten", TIED, multiplier_forgotten, "head", "multiplier"),
    Planted("ε left unscaled, and biting", Transformer, epsilon_bites, "mlp.2.weight", "ε"),
    Planted("a gate treated as hidden under head_dim growth", Gated, gate_as_hidden, "gates.weight", "initial"),
    Planted("weight decay not compensated", Transformer, decay_uncompensated, "mlp.0.weight", "decay"),
    Planted("a matrix left out of the optimizer", Transformer, left_out, "queries.weight", "list"),
    Planted("a branch that grows with width in the forward pass", Transformer, branch_grows, "mlp", "reads"),
]


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[list[str]]:
    lines = ["| planted mistake | what names it | parameters off | outputs off |", "|---|---|---|---|"]
    yield lines
    print("\n" + "\n".join(lines))


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.mistake)
def test_every_planted_mistake_is_found_and_its_cause_is_named(planted: Planted, table: list[str]):
    found = check(planted.make, planted.setup)
    named = [finding for finding in found if finding.where == planted.where and planted.look_at in finding.look_at]
    first = named[0] if named else "not found"
    table.append(f"| {planted.mistake} | {first} | {counts(found)} |")
    assert named, found


@pytest.mark.parametrize(
    ("make", "setup"),
    [
        (Transformer, right),
        (TIED, right),
        (Gated, right),
        (Transformer, right_sgd),
        (TIED, right_sgd),
        (Gated, right_sgd),
    ],
    ids=["transformer", "tied", "gated", "transformer-sgd", "tied-sgd", "gated-sgd"],
)
def test_nothing_is_found_where_nothing_is_wrong(make, setup, table: list[str]):
    found = check(make, setup)
    table.append(f"| none: {getattr(make, '__name__', 'tied Transformer')}, {setup.__name__} | | {counts(found)} |")
    assert not found
