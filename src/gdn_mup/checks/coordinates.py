"""Coordinate check of any nn.Module: train a few steps at several widths, and record what every module puts out.

If init, learning rates and multipliers are right, every output and every change of it keeps its size as the width
grows (arXiv 2203.03466, appendix D.1). What the rules say is recorded beside what was found, so that `findings` can
tell which parameter departs from them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from gdn_mup.errors import UserError
from gdn_mup.modules.names import plain, unwrapped
from gdn_mup.modules.scaling import Scaling
from gdn_mup.modules.survey import MakeModel

Loss = Callable[[nn.Module, Any], Tensor]
Setup = Callable[[nn.Module, Scaling], torch.optim.Optimizer]

LEARNING_RATE = 2.0**-8
_MEANINGS = {
    "rms": "root mean square of a module's output",
    "change": "root mean square of the change of a module's output since init",
    "weight_rms": "root mean square of a parameter",
    "gradient_rms": "root mean square of the gradient of the update before this step",
    "update_rms": "root mean square of the update before this step",
    "entries": "number of entries of a parameter",
    "learning_rate": "learning rate of a parameter",
    "epsilon": "ε of a parameter",
    "weight_decay": "weight decay of a parameter",
    "rule_learning_rate": "learning rate over the base width's, by the rules",
    "rule_init_std": "root mean square at init over the base width's, by the rules",
    "loss": "loss of the batch that leads to the next step",
}


def coordinate_check(
    make_model: MakeModel,
    widths: Sequence[int],
    batches: Sequence[Any],
    *,
    loss: Loss | None = None,
    setup: Setup | None = None,
    learning_rate: float = LEARNING_RATE,
    steps: Sequence[int] = (1, 2, 4),
    seeds: Sequence[int] = (0, 1, 2),
    **between: Any,
) -> xr.Dataset:
    """Train the models of all widths, two or more, on the same batches and measure before and after some updates.

    Args:
        make_model: from a width to the model with its own init, drawn from torch's generator.
        batches: what `loss` takes; update t uses the t-th, starting over at the end. The first is the probe.
        loss: from model and batch to a scalar. Left out, a batch of token ids [sequences, tokens] or a dict is given
            to a model that returns a loss, as transformers' and fla's do.
        setup: gives a fresh model its init and returns its optimizer; left out, that of `Scaling`, AdamW.
        learning_rate: of the base width, the least; without `setup`.
        steps: numbers of updates after which to measure, beside 0.
        between: options of `Scaling.between`.

    Returns, as root mean squares over all entries: rms and change since init (seed, width, step, module), weight_rms,
    gradient_rms and update_rms (seed, width, step, parameter), the latter two those of the update that led to the
    step; the optimizer's learning_rate, epsilon and weight_decay (width, parameter), and as multiples of the base
    width's what the rules ask for: rule_init_std, rule_learning_rate; entries, how many there are; loss (seed, width,
    step).
    """
    ordered = sorted(set(widths))
    if len(ordered) < 2:
        raise UserError(f"widths: {list(widths)}: give two or more")
    if not batches:
        raise UserError("batches: none: give one or more")
    measured = [0, *sorted(set(steps) - {0})]
    cells: dict[tuple[str, tuple[str, ...]], dict[tuple[Any, ...], float]] = {}

    def put(variable: str, dimensions: str, at: tuple[Any, ...], value: float) -> None:
        cells.setdefault((variable, tuple(dimensions.split())), {})[at] = value

    order: dict[str, None] = {}
    optimizer_name = ""
    for width in ordered:
        scaling = Scaling.between(make_model, ordered[0], width, **between)
        for seed in seeds:
            torch.manual_seed(seed)
            model = make_model(width)
            optimizer = (setup or _as_the_rules_say(learning_rate))(model, scaling)
            optimizer_name = type(optimizer).__name__
            if seed == seeds[0]:
                for variable, name, value in _hyperparameters(model, scaling, optimizer):
                    put(variable, "width parameter", (width, name), value)
            parameters = {plain(name): p for name, p in unwrapped(model).named_parameters()}
            start = outputs(model, batches[0], loss)
            for step in range(max(measured) + 1):
                before: dict[str, Tensor] = {}
                if step > 0:
                    optimizer.zero_grad()
                    objective = loss_of(model, batches[(step - 1) % len(batches)], loss)
                    objective.backward()
                    if step - 1 in measured:
                        put("loss", "seed width step", (seed, width, step - 1), float(objective.detach()))
                    if step in measured:
                        before = {name: p.detach().clone() for name, p in parameters.items()}
                        for name, p in parameters.items():
                            gradient = _rms(p.grad) if p.grad is not None else 0.0
                            put("gradient_rms", "seed width step parameter", (seed, width, step, name), gradient)
                    optimizer.step()
                if step not in measured:
                    continue
                for name, tensor in (outputs(model, batches[0], loss) if step else start).items():
                    order.setdefault(name)
                    at = (seed, width, step, name)
                    put("rms", "seed width step module", at, _rms(tensor))
                    put("change", "seed width step module", at, _rms(tensor - start[name]))
                for name, p in parameters.items():
                    at = (seed, width, step, name)
                    put("weight_rms", "seed width step parameter", at, _rms(p))
                    if step:
                        put("update_rms", "seed width step parameter", at, _rms(p.detach() - before[name]))
    dataset = xr.Dataset({name: _array(dims, values) for (name, dims), values in cells.items()})
    dataset = dataset.sel(module=[name for name in order if name in dataset.module.values])
    for key, array in dataset.data_vars.items():
        array.attrs |= {"long_name": _MEANINGS[str(key)], "units": "nats" if key == "loss" else "1"}
    dataset.attrs |= {
        "title": "Coordinate check",
        "base_width": ordered[0],
        "optimizer": optimizer_name,
        "readouts": ", ".join(scaling.readouts),
    }
    return dataset


def outputs(model: nn.Module, batch: Any, loss: Loss | None) -> dict[str, Tensor]:
    """What every module puts out for a batch, in the order in which they finish; the first tensor of several."""
    found: dict[str, Tensor] = {}
    hooks = []
    inner = unwrapped(model)
    for name, module in inner.named_modules():

        def record(_: nn.Module, __: Any, output: Any, name: str = plain(name)) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() > 1:
                found[name or "(model)"] = tensor.detach().clone()

        hooks.append(module.register_forward_hook(record))
    was_training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            loss_of(model, batch, loss)
    finally:
        inner.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """The loss of a batch, moved to the model's device; UserError if nobody has said how to compute it."""
    batch = _moved(batch, next(model.parameters()).device)
    if loss is not None:
        return loss(model, batch)
    if isinstance(batch, Tensor) and not batch.is_floating_point():
        batch = {"input_ids": batch, "labels": batch}
    value = getattr(model(**batch), "loss", None) if isinstance(batch, Mapping) else None
    if value is None:
        raise UserError(
            "loss: None: the model returns none for a batch of token ids or a dict: give loss=lambda model, batch: ..."
        )
    return value


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    return tuple(_moved(value, device) for value in batch) if isinstance(batch, tuple | list) else batch


def _as_the_rules_say(learning_rate: float) -> Setup:
    def setup(model: nn.Module, scaling: Scaling) -> torch.optim.Optimizer:
        scaling.initialize(model)
        return torch.optim.AdamW(scaling.parameter_groups(model, "adamw", learning_rate))

    return setup


def _hyperparameters(
    model: nn.Module, scaling: Scaling, optimizer: torch.optim.Optimizer
) -> list[tuple[str, str, float]]:
    """What the optimizer does to each parameter, and what the rules ask for: (variable, parameter, value)."""
    rule = scaling.multipliers("sgd" if isinstance(optimizer, torch.optim.SGD) else "adamw")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rows = []
    for name, parameter in scaling.parameters_of(model).items():
        group, law = groups.get(id(parameter), {}), scaling.entries[name].base_law
        trained = parameter.requires_grad
        rows += [
            ("entries", name, parameter.numel()),
            ("learning_rate", name, float(group.get("lr", 0.0 if trained else np.nan))),
            ("epsilon", name, float(group.get("eps", np.nan))),
            ("weight_decay", name, float(group.get("weight_decay", np.nan))),
            ("rule_learning_rate", name, rule[name].learning_rate if trained else np.nan),
            ("rule_init_std", name, scaling.init_size(name) if law is not None and law.centred else np.nan),
        ]
    return rows


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def _array(dimensions: tuple[str, ...], values: Mapping[tuple[Any, ...], float]) -> xr.DataArray:
    axes = [list(dict.fromkeys(at[i] for at in values)) for i in range(len(dimensions))]
    axes = [sorted(axis) if dimension == "step" else axis for dimension, axis in zip(dimensions, axes, strict=True)]
    places = [{label: i for i, label in enumerate(axis)} for axis in axes]
    array = np.full([len(axis) for axis in axes], np.nan)
    for at, value in values.items():
        array[tuple(place[label] for place, label in zip(places, at, strict=True))] = value
    return xr.DataArray(array, coords=dict(zip(dimensions, axes, strict=True)), dims=dimensions)
