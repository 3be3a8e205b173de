"""Coordinate check: sizes of activations, gradients and updates while a model trains for a few steps.

Sizes are root mean squares over everything but the member axis, on one fixed probe batch. If a
parametrization is right, every size and every change since init keeps its order of magnitude as the width
grows (arXiv 2203.03466, appendix D.1; arXiv 2310.17813). Gates and the state, which are bounded, are
summarised beyond their sizes (`dynamics`).
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from gdn_mup.measurement.dynamics import QUANTILES, gate_and_state
from gdn_mup.model.language_model import OUTSIDE_BLOCKS, LanguageModel
from gdn_mup.progress import Report, silent
from gdn_mup.training.sweep import Member, Trainer, check_untrained


class Place(NamedTuple):
    """Where a quantity or a parameter lives: its name and its block (-1 outside the blocks)."""

    name: str
    layer: int


def activations(model: LanguageModel, probe: Tensor) -> dict[Place, Tensor]:
    """Every recorded activation of the probe batch [B, T], members first."""
    recorded: dict[Place, Tensor] = {}

    def record(quantity: str, layer: int, activation: Tensor) -> None:
        recorded[Place(quantity, layer)] = activation

    with torch.no_grad():
        model.forward(probe, record)
    return recorded


def parameter_place(name: str) -> Place:
    """`0.q` lives in block 0 and is of class `q`; `embedding` lives outside the blocks."""
    layer, _, parameter = name.rpartition(".")
    return Place(parameter, int(layer) if layer else OUTSIDE_BLOCKS)


def member_rms(tensor: Tensor) -> Tensor:
    """Root mean square of [M, ...] over all but the members: [M]."""
    return tensor.flatten(1).double().square().mean(1).sqrt()


def coordinate_check(
    trainer: Trainer, members: Sequence[Member], steps: Sequence[int], probe: Tensor, report: Report = silent
) -> xr.Dataset:
    """Train at a constant learning rate and measure after each number of updates in `steps`, 0 first.

    Returns rms and change (rules, step, layer, quantity); weight_rms, gradient_rms and update_rms
    (rules, step, layer, parameter), gradient and update being those of the update that led to the step,
    the gradient before clipping; and what `dynamics.gate_and_state` summarises (rules, step, layer) or
    (rules, step, layer, quantile).

    Raises UserError if an activation is not finite before the first update.
    """
    model, probe = trainer.model, probe.to(trainer.device)
    at_init = activations(model, probe)
    places = list(at_init)
    parameters = {name: parameter_place(name) for name in model.weights}
    layers = sorted({place.layer for place in places})
    dimensions: dict[str, list[Any]] = {
        "rules": [member.rules for member in members],
        "step": list(steps),
        "layer": layers,
    }
    names = {"quantity": _names(places), "parameter": _names(parameters.values())}
    variables = {variable: _empty(dimensions | {"quantity": names["quantity"]}) for variable in ("rms", "change")} | {
        variable: _empty(dimensions | {"parameter": names["parameter"]})
        for variable in ("weight_rms", "gradient_rms", "update_rms")
    }

    # By position: for the smallest models, looking labels up with `loc` takes longer than training.
    def put(variable: str, step: int, place: Place, values: Tensor) -> None:
        array = variables[variable]
        name = names[str(array.dims[-1])].index(place.name)
        array.values[:, steps.index(step), layers.index(place.layer), name] = values.cpu().numpy()

    def put_dynamics(step: int, layer: int, recorded: dict[Place, Tensor]) -> None:
        log_alpha, beta, state = (recorded[Place(name, layer)] for name in ("log_alpha", "beta", "state"))
        for variable, values in gate_and_state(log_alpha, beta, state, probe.shape[1]).items():
            if variable not in variables:
                variables[variable] = _empty(dimensions | ({"quantile": list(QUANTILES)} if values.dim() > 1 else {}))
            variables[variable].values[:, steps.index(step), layers.index(layer)] = values.cpu().numpy()

    finite = torch.stack([activation.flatten(1).isfinite().all(1) for activation in at_init.values()]).all(0)
    check_untrained(members, finite, model.shape.width)
    for step in range(max(steps) + 1):
        measured = step in steps
        if step > 0:
            before = {name: weight.clone() for name, weight in model.weights.items()} if measured else {}
            trainer.backward(step - 1)
            gradients = {name: gradient.clone() for name, gradient in trainer.gradients().items()} if measured else {}
            trainer.update(1.0)
            for name, place in parameters.items() if measured else ():
                put("gradient_rms", step, place, member_rms(gradients[name]))
                put("update_rms", step, place, member_rms(model.weights[name] - before[name]))
        if measured:
            recorded = activations(model, probe)
            for place, activation in recorded.items():
                put("rms", step, place, member_rms(activation))
                put("change", step, place, member_rms(activation - at_init[place]))
            for layer in range(model.shape.layers):
                put_dynamics(step, layer, recorded)
            for name, place in parameters.items():
                put("weight_rms", step, place, member_rms(model.weights[name]))
        report(step + 1)
    return xr.Dataset(variables)


def _names(places: Iterable[Place]) -> list[str]:
    return list(dict.fromkeys(place.name for place in places))


def _empty(coordinates: dict[str, list[Any]]) -> xr.DataArray:
    shape = [len(values) for values in coordinates.values()]
    return xr.DataArray(np.full(shape, np.nan, np.float32), coords=coordinates, dims=list(coordinates))
