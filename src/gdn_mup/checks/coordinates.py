"""Coordinate check of any nn.Module: train a few steps at several widths, and record what every module puts out.

If init, learning rates and multipliers are right, every output and every change of it keeps its size as the width
grows (arXiv 2203.03466, appendix D.1). What the rules say is recorded beside what was found, so that `findings` can
tell which parameter departs from them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from gdn_mup.errors import UserError
from gdn_mup.modules.forward import uses
from gdn_mup.modules.names import plain, unwrapped
from gdn_mup.modules.outputs import tensors_in
from gdn_mup.modules.scaling import Scaling
from gdn_mup.modules.survey import MakeModel
from gdn_mup.modules.users import users

Loss = Callable[[nn.Module, Any], Tensor]
Setup = Callable[[nn.Module, Scaling], torch.optim.Optimizer]

LEARNING_RATE = 2.0**-8
_MEANINGS = {
    "rms": "root mean square of a module's output",
    "input_rms": "root mean square of a module's input at init",
    "change": "root mean square of the change of a module's output since init",
    "weight_rms": "root mean square of a parameter",
    "gradient_rms": "root mean square of the gradient of the update before this step",
    "update_rms": "root mean square of the update before this step",
    "entries": "number of entries of a parameter",
    "learning_rate": "learning rate of a parameter",
    "last_learning_rate": "learning rate of a parameter at the last update",
    "epsilon": "ε of a parameter",
    "weight_decay": "weight decay of a parameter",
    "rule_learning_rate": "learning rate over the base width's, by the rules",
    "rule_init_std": "root mean square at init over the base width's, by the rules",
    "rule_fan_in": "fan-in over the base width's",
    "loss": "loss of the batch that leads to the next step",
}


def coordinate_check(
    make_model: MakeModel,
    widths: Sequence[int],
    batches: Iterable[Any],
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
        batches: what `loss` takes; update t uses the t-th, starting over at the end. The first is the probe. Of more
            batches than updates, or endless ones, no more are taken.
        loss: from model and batch to a scalar. Left out, a batch of token ids [sequences, tokens] or a dict is given
            to a model that returns a loss, as transformers' and fla's do.
        setup: gives a fresh model its init and returns its optimizer; left out, that of `Scaling`, AdamW.
        learning_rate: of the base width, the least; without `setup`.
        steps: numbers of updates after which to measure, beside 0.
        between: options of `Scaling.between`.

    Returns, as root mean squares over all entries: rms and change since init (seed, width, step, module), input_rms
    (seed, width, module), weight_rms, gradient_rms and update_rms (seed, width, step, parameter), the latter two those
    of the update that led to the step, NaN where a parameter got no gradient; the optimizer's learning_rate (at the
    first and at the last update), epsilon and weight_decay (width, parameter), and as multiples of the base width's
    what the rules ask for: rule_init_std, rule_learning_rate, rule_fan_in; entries, how many there are; loss (seed,
    width, step). A module that returns several tensors has a line for each, such as `block[1]` or `block['h']`.

    Raises UserError for what `Scaling` refuses, and for whatever is raised by code of the user's own, with file and
    line.
    """
    ordered = sorted(set(widths))
    if len(ordered) < 2:
        raise UserError(f"widths: {list(widths)}: give two or more")
    measured = [0, *sorted(set(steps) - {0})]
    with users("batches"):
        batches = list(islice(batches, max(*measured, 1)))
    if not batches:
        raise UserError("batches: none: give one or more")
    between = {"call": lambda model: loss_of(model, batches[0], loss)} | between
    cells: dict[tuple[str, tuple[str, ...]], dict[tuple[Any, ...], float]] = {}

    def put(variable: str, dimensions: str, at: tuple[Any, ...], value: float) -> None:
        cells.setdefault((variable, tuple(dimensions.split())), {})[at] = value

    order: dict[str, None] = {}
    optimizer_name = ""
    elsewhere: list[str] = []
    base_rms: dict[str, float] = {}
    for width in ordered:
        scaling = Scaling.between(make_model, ordered[0], width, **between)
        base_rms = base_rms or {name: scaling.init_rms(name) for name in scaling.entries}
        for seed in seeds:
            torch.manual_seed(seed)
            with users(f"make_model({width})"):
                model = make_model(width)
            with users("setup") if setup else nullcontext():
                optimizer = (setup or _as_the_rules_say(learning_rate))(model, scaling)
            optimizer_name = type(optimizer).__name__
            if seed == seeds[0]:
                for variable, name, value in _hyperparameters(model, scaling, optimizer, base_rms):
                    put(variable, "width parameter", (width, name), value)
            parameters = {plain(name): p for name, p in unwrapped(model).named_parameters()}
            start = outputs(model, batches[0], loss)
            for name in start.tensors:
                put("input_rms", "seed width module", (seed, width, name), start.inputs.get(name, np.nan))
            for step in range(max(measured) + 1):
                before: dict[str, Tensor] = {}
                if step > 0:
                    optimizer.zero_grad()
                    with _calls(model) as calls:
                        objective = loss_of(model, batches[(step - 1) % len(batches)], loss)
                    if (width, seed, step) == (ordered[0], seeds[0], 1):
                        elsewhere = _used_elsewhere(model, objective, calls)
                    with users("loss"):
                        objective.backward()
                    if step - 1 in measured:
                        put("loss", "seed width step", (seed, width, step - 1), float(objective.detach()))
                    if step in measured:
                        before = {name: p.detach().clone() for name, p in parameters.items()}
                        for name, p in parameters.items():
                            gradient = _rms(p.grad) if p.grad is not None else np.nan
                            put("gradient_rms", "seed width step parameter", (seed, width, step, name), gradient)
                    if step == max(measured) and seed == seeds[0]:
                        for name, rate in _learning_rates(parameters, optimizer).items():
                            put("last_learning_rate", "width parameter", (width, name), rate)
                    with users("optimizer"):
                        optimizer.step()
                if step not in measured:
                    continue
                found = outputs(model, batches[0], loss).tensors if step else start.tensors
                for name, tensor in found.items():
                    order.setdefault(name)
                    at = (seed, width, step, name)
                    put("rms", "seed width step module", at, _rms(tensor))
                    first = start.tensors.get(name, tensor)
                    alike = first.shape == tensor.shape  # experts see other tokens every time
                    put("change", "seed width step module", at, _rms(tensor - first) if alike else np.nan)
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
        "used_elsewhere": ", ".join(elsewhere),
    }
    return dataset


class Outputs(NamedTuple):
    """What modules put out, in the order in which they finish, and the root mean square of what they read."""

    tensors: dict[str, Tensor]
    inputs: dict[str, float]


def outputs(model: nn.Module, batch: Any, loss: Loss | None) -> Outputs:
    """What every module puts out for a batch. Of several tensors the first has the module's name."""
    found = Outputs({}, {})
    hooks = []
    inner = unwrapped(model)
    for name, module in inner.named_modules():

        def record(_: nn.Module, args: Any, output: Any, name: str = plain(name) or "(model)") -> None:
            read = next((t for _, t in tensors_in(args) if _is_numbers(t)), None)
            if read is not None:
                found.inputs[name] = _rms(read)
            written = [(label, t) for label, t in tensors_in(output) if _is_numbers(t)]
            known = {id(t) for t in kept}
            for i, (label, tensor) in enumerate(written):
                if i == 0 or id(tensor) not in known:
                    found.tensors[name if i == 0 else f"{name}{label}"] = tensor.detach().clone()
            kept.extend(tensor for _, tensor in written)

        hooks.append(module.register_forward_hook(record))
    kept: list[Tensor] = []  # so that no two have the same identity
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


def _is_numbers(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > 1


@contextmanager
def _calls(model: nn.Module) -> Iterator[Counter[str]]:
    """How often each module is called meanwhile."""
    calls: Counter[str] = Counter()
    hooks = []
    for name, module in unwrapped(model).named_modules(remove_duplicate=False):

        def count(_: nn.Module, __: Any, name: str = plain(name)) -> None:
            calls[name] += 1

        hooks.append(module.register_forward_pre_hook(count))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _used_elsewhere(model: nn.Module, objective: Tensor, calls: Counter[str]) -> list[str]:
    """Weights of layers that the loss uses more often than their layers are called: `F.linear(h, embedding.weight)`."""
    modules: dict[str, Any] = dict(unwrapped(model).named_modules(remove_duplicate=False))
    holders: dict[int, list[str]] = {}
    for path, module in modules.items():
        within = isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)
        if isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd) and not within:
            holders.setdefault(id(module.weight), []).append(path)
    weights = {plain(path): modules[path].weight for path, *_ in holders.values()}
    used = uses([objective], weights)
    called = {plain(path): sum(calls[plain(p)] for p in (path, *others)) for path, *others in holders.values()}
    return [f"{path}.weight".lstrip(".") for path in weights if used[path].total() > called[path]]


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """The loss of a batch, moved to the model's device; UserError if nobody has said how to compute it."""
    batch = _moved(batch, next(model.parameters()).device)
    if loss is not None:
        with users("loss"):
            value: Any = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"loss: returned {shape}: return one number, as a tensor")
        return value
    if isinstance(batch, Tensor) and not batch.is_floating_point():
        batch = {"input_ids": batch, "labels": batch}
    with users("model"):
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
    model: nn.Module, scaling: Scaling, optimizer: torch.optim.Optimizer, base_rms: Mapping[str, float]
) -> list[tuple[str, str, float]]:
    """What the optimizer does to each parameter, and what the rules ask for: (variable, parameter, value)."""
    rule = scaling.multipliers("sgd" if isinstance(optimizer, torch.optim.SGD) else "adamw")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parameters = scaling.parameters_of(model)
    rows = [("learning_rate", name, rate) for name, rate in _learning_rates(parameters, optimizer).items()]
    for name, parameter in parameters.items():
        group, entry, trained = groups.get(id(parameter), {}), scaling.entries[name], parameter.requires_grad
        size = scaling.init_rms(name) / base_rms[name] if trained and base_rms[name] else np.nan
        rows += [
            ("entries", name, parameter.numel()),
            ("epsilon", name, float(group.get("eps", np.nan))),
            ("weight_decay", name, float(group.get("weight_decay", np.nan))),
            ("rule_learning_rate", name, rule[name].learning_rate if trained else np.nan),
            ("rule_init_std", name, size),
            ("rule_fan_in", name, entry.parts[0].growth.fan_in),
        ]
    return rows


def _learning_rates(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What each parameter is trained with: 0 if it is in no group, NaN if it is frozen."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {
        name: float(groups.get(id(p), {}).get("lr", 0.0 if p.requires_grad else np.nan))
        for name, p in parameters.items()
    }


def _rms(tensor: Tensor) -> float:
    """Over all entries: of complex ones the absolute value, of sparse ones with the zeros."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        values = tensor.coalesce().values()
        return float((values.abs().double().square().sum() / max(tensor.numel(), 1)).sqrt())
    return float(tensor.abs().double().square().mean().sqrt())


def _array(dimensions: tuple[str, ...], values: Mapping[tuple[Any, ...], float]) -> xr.DataArray:
    axes = [list(dict.fromkeys(at[i] for at in values)) for i in range(len(dimensions))]
    axes = [sorted(axis) if dimension == "step" else axis for dimension, axis in zip(dimensions, axes, strict=True)]
    places = [{label: i for i, label in enumerate(axis)} for axis in axes]
    array = np.full([len(axis) for axis in axes], np.nan)
    for at, value in values.items():
        array[tuple(place[label] for place, label in zip(places, at, strict=True))] = value
    return xr.DataArray(array, coords=dict(zip(dimensions, axes, strict=True)), dims=dimensions)
