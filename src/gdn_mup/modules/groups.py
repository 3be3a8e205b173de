"""Parameter groups for torch's optimizers."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from gdn_mup.errors import UserError
from gdn_mup.modules import forward
from gdn_mup.modules.fans import Kind
from gdn_mup.modules.names import plain, unwrapped

if TYPE_CHECKING:
    from gdn_mup.modules.scaling import Optimizer, Scaling

Groups = list[dict[str, Any]]


class Hyperparameters(NamedTuple):
    """What is tuned at the base width."""

    learning_rate: float
    weight_decay: float
    epsilon: float
    adamw_learning_rate: float | None
    muon_epsilon: float
    adjust_lr_fn: str


class MuonGroups(NamedTuple):
    """Groups for torch.optim.Muon, and for torch.optim.AdamW beside it."""

    muon: Groups
    adamw: Groups


def parameter_groups(
    scaling: "Scaling",
    model: nn.Module,
    optimizer: "Optimizer",
    base: Hyperparameters,
    decay: str | Callable[[str, Tensor], bool],
) -> Groups | MuonGroups:
    """See `Scaling.parameter_groups`."""
    if optimizer not in ("adamw", "sgd", "muon"):
        raise UserError(f"optimizer: {optimizer!r}: use 'adamw', 'sgd' or 'muon'")
    if optimizer == "muon" and base.adamw_learning_rate is None:
        raise UserError("adamw_learning_rate: None: Muon trains matrices alone; give the learning rate of the rest")
    parameters = scaling.trained_parameters_of(model)
    if optimizer != "sgd":
        _refuse_sparse(model)
    forward.check(model, scaling.readouts, scaling.outputs)
    multipliers = scaling.multipliers(optimizer)
    by_muon: Groups = []
    others: Groups = []
    for name, parameter in parameters.items():
        entry, multiplier = scaling.entries[name], multipliers[name]
        decays = (
            {"weights": entry.kind is not Kind.VECTOR, "all": True}[decay]
            if isinstance(decay, str)
            else (decay(name, parameter))
        )
        muon = optimizer == "muon" and scaling.trained_by_muon(name)
        rate = base.learning_rate if muon or base.adamw_learning_rate is None else base.adamw_learning_rate
        rate *= multiplier.learning_rate
        weight_decay = base.weight_decay * multiplier.weight_decay if decays else 0.0
        if muon:
            own = _own_adjustment(entry.base_shape, base.adjust_lr_fn) / _own_adjustment(entry.shape, base.adjust_lr_fn)
            group = {
                "lr": rate * own,
                "weight_decay": weight_decay / own,
                "eps": base.muon_epsilon * multiplier.epsilon,
            }
            _add(by_muon, parameter, group | {"adjust_lr_fn": base.adjust_lr_fn})
        elif optimizer == "sgd":
            _add(others, parameter, {"lr": rate, "weight_decay": weight_decay})
        else:
            group = {"lr": rate, "weight_decay": weight_decay, "eps": base.epsilon * multiplier.epsilon}
            _add(others, parameter, group)
    return MuonGroups(by_muon, others) if optimizer == "muon" else others


def _refuse_sparse(model: nn.Module) -> None:
    """AdamW takes no sparse gradients."""
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise UserError(
                f"model: {plain(path) or 'it'}: sparse: True: AdamW takes no sparse gradients: use sparse=False"
            )


def _own_adjustment(shape: Sequence[int], adjust_lr_fn: str) -> float:
    """What torch.optim.Muon multiplies the learning rate of a matrix by, up to a constant."""
    rows, columns = shape
    return math.sqrt(max(1, rows / columns) if adjust_lr_fn == "original" else max(rows, columns))


def _add(groups: Groups, parameter: nn.Parameter, options: dict[str, Any]) -> None:
    for group in groups:
        alike = {key: value for key, value in group.items() if key != "params"} == options
        if alike and _layout(group["params"][0]) == _layout(parameter):
            group["params"].append(parameter)
            return
    groups.append({"params": [parameter], **options})


def _layout(parameter: Any) -> Any:
    """What torch's optimizers, which step whole groups at once, cannot mix: sharded parameters and plain ones."""
    return getattr(parameter, "device_mesh", None)
