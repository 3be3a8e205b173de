"""Does a multiplier on the delta rule's output, before its RMSNorm, do anything?

The text of arXiv 2606.04048 inserts √d between the delta rule and its norm. RMSNorm(c·o) with ε is RMSNorm(o) with
ε / c², so that neither the function nor a gradient changes but through ε: not at all at ε = 0, and as much as
ε weighs against mean(o²) elsewhere. Here the multiplier is really inserted, and the models are compared in float64,
where a change of 1e-12 is still told from rounding.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import xarray as xr
from torch import Tensor

from gdn_mup.measurement.coordinates import Place, activations, parameter_place
from gdn_mup.model.config import InitName, KernelScale
from gdn_mup.model.language_model import LanguageModel, initialize_as_usual
from gdn_mup.progress import Report, silent
from gdn_mup.training.sweep import Member, Trainer, check_untrained

LOW_QUANTILE = 0.01
SQUARES = ("mean_square", "median_square", "low_square", "share_below_epsilon")


class Condition(NamedTuple):
    """One model that is compared with itself; all conditions are members trained side by side."""

    member: Member
    init: InitName
    kernel_scale: KernelScale


def multiplier_check(
    make_trainer: Callable[[Sequence[Member], float], Trainer],
    members: Sequence[Member],
    inits: Sequence[InitName],
    kernel_scales: Sequence[KernelScale],
    epsilons: Sequence[float],
    steps: Sequence[int],
    probe: Tensor,
    report: Report = silent,
) -> xr.Dataset:
    """Train every condition without and with the multiplier √width, at a constant learning rate, and compare.

    Args:
        make_trainer: builds the trainer, in float64, of these members with this ε in every RMSNorm.
        members: a rule set and a learning rate each.
        epsilons: ε, each with trainings of its own.
        steps: updates done when measured, ascending from 0.
        probe: token ids [B, T + 1] on which everything is measured.
        report: called with the updates done, counted over `epsilons`.

    Returns:
        over (rules, init, kernel_scale, epsilon, step): `loss` and, at the same parameters, the changes that inserting
        the multiplier makes: `loss_change`, `gradient_change` and, by parameter, `class_gradient_change`;
        `trained_loss_change` between the two trainings; by layer `mean_square`, `median_square`, `low_square` and
        `share_below_epsilon` of mean(o²) over a head's values, as the norm of the model without multiplier sees it;
        `multiplier`.

    Raises:
        UserError: a loss is not finite before the first update.
    """
    conditions = [Condition(*c) for c in itertools.product(members, inits, kernel_scales)]
    measured: list[list[dict[str, Tensor]]] = []  # by ε, by step
    for done, epsilon in enumerate(epsilons):
        plain, multiplied = (_trainer(make_trainer, conditions, epsilon) for _ in range(2))
        multiplier = math.sqrt(plain.model.shape.width)
        scales = _kernel_scales(conditions, plain.model.shape.head_dim)
        plain.model.output_multiplier, multiplied.model.output_multiplier = scales, scales * multiplier
        measured.append([])
        for step in range(max(steps) + 1):
            if step > 0:
                plain.step(step - 1, 1.0)
                multiplied.step(step - 1, 1.0)
            if step in steps:
                changes = _insert(plain.model, multiplier, probe)
                if step == 0:
                    untrained = [condition.member for condition in conditions]
                    check_untrained(untrained, changes["loss"].isfinite(), plain.model.shape.width)
                with torch.no_grad():
                    changes["trained_loss_change"] = multiplied.model.losses(probe) - changes["loss"]
                measured[-1].append(changes | _squares(plain.model, probe[:, :-1], epsilon))
            report(done * (max(steps) + 1) + step + 1)
    names = list(dict.fromkeys(parameter_place(name).name for name in plain.model.weights))
    coordinates = {
        "rules": [member.rules for member in members],
        "init": list(inits),
        "kernel_scale": list(kernel_scales),
        "epsilon": list(epsilons),
        "step": list(steps),
        "layer": list(range(plain.model.shape.layers)),
        "parameter": names,
    }
    last = {name: "layer" for name in SQUARES} | {"class_gradient_change": "parameter"}
    variables = {}
    for name in measured[0][0]:
        values = torch.stack([torch.stack([at_step[name] for at_step in at_epsilon], 1) for at_epsilon in measured], 1)
        by_condition = values.unflatten(0, (len(members), len(inits), len(kernel_scales)))
        dimensions = [*list(coordinates)[:5], *([last[name]] if name in last else [])]
        variables[name] = (dimensions, by_condition.numpy())
    return xr.Dataset({**variables, "multiplier": multiplier}, coordinates)


def _trainer(
    make_trainer: Callable[[Sequence[Member], float], Trainer], conditions: Sequence[Condition], epsilon: float
) -> Trainer:
    trainer = make_trainer([condition.member for condition in conditions], epsilon)
    usual = [row for row, condition in enumerate(conditions) if condition.init == "usual"]
    initialize_as_usual(trainer.model, usual, trainer.seed)
    return trainer


def _kernel_scales(conditions: Sequence[Condition], head_dim: int) -> Tensor:
    """What the delta rule's kernel multiplies q by, [M]; and so o, which is linear in q."""
    scales = {"one": 1.0, "inverse_root": head_dim**-0.5}
    return torch.tensor([scales[condition.kernel_scale] for condition in conditions], dtype=torch.float64)


def _insert(model: LanguageModel, multiplier: float, probe: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of the model as it is, and with the multiplier on top; changes by member [M, ...]."""
    as_it_is = model.output_multiplier
    assert as_it_is is not None
    loss, gradients = _gradients(model, probe)
    model.output_multiplier = as_it_is * multiplier
    loss_then, gradients_then = _gradients(model, probe)
    model.output_multiplier = as_it_is

    names = list(dict.fromkeys(parameter_place(name).name for name in gradients))
    size, change = torch.zeros(2, model.members, len(names), dtype=loss.dtype)  # squares, by parameter class
    for name, gradient in gradients.items():
        column = names.index(parameter_place(name).name)
        size[:, column] += gradient.flatten(1).square().sum(1)
        change[:, column] += (gradients_then[name] - gradient).flatten(1).square().sum(1)
    return {
        "loss": loss,
        "loss_change": loss_then - loss,
        "gradient_change": (change.sum(1) / size.sum(1)).sqrt(),
        "class_gradient_change": (change / size).sqrt(),  # NaN where a class has no gradient
    }


def _gradients(model: LanguageModel, probe: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses = model.losses(probe)
    losses.sum().backward()
    gradients = model.gradients()
    model.zero_grad()
    return losses.detach(), gradients


def _squares(model: LanguageModel, tokens: Tensor, epsilon: float) -> dict[str, Tensor]:
    """mean(o²) of every (token, head) before the norm, summed up for each member and layer: [M, layers]."""
    recorded = activations(model, tokens)
    squares = torch.stack(
        [recorded[Place("o", layer)].square().mean(-1).flatten(1) for layer in range(model.shape.layers)], 1
    )
    summaries = (
        squares.mean(-1),
        squares.median(-1).values,
        squares.quantile(LOW_QUANTILE, -1),
        (squares < epsilon).double().mean(-1),
    )
    return dict(zip(SQUARES, summaries, strict=True))
