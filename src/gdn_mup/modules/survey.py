"""What there is to know about a model of one width without computing anything: shapes, fans, laws of the init."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gdn_mup.errors import UserError
from gdn_mup.modules.fans import Fans, Kind, declared_fans, fans
from gdn_mup.modules.init_law import InitRecorder, Law
from gdn_mup.modules.names import matching

MakeModel = Callable[[int], nn.Module]


class Holder(NamedTuple):
    """A module that has a parameter, under which attribute, and the module that holds it in turn."""

    path: str
    module: nn.Module
    attribute: str
    parent: nn.Module

    @property
    def is_bias(self) -> bool:
        """Whether it is a vector with one entry for each row of the weight beside it."""
        return isinstance(self.module, nn.Linear | nn.modules.conv._ConvNd) and self.attribute != "weight"


class Surveyed(NamedTuple):
    """One parameter at one width. `fans` is None if no holder's type says what it does."""

    shape: tuple[int, ...]
    fans: Fans | None
    law: Law | None
    holders: tuple[Holder, ...]

    @property
    def kind(self) -> Kind | None:
        """What it does with its input, if that can be said."""
        return self.fans.kind if self.fans else None

    @property
    def tied_readouts(self) -> tuple[str, ...]:
        """Linear layers that multiply by this embedding."""
        if self.kind is not Kind.LOOKUP:
            return ()
        return tuple(holder.path for holder in self.holders if isinstance(holder.module, nn.Linear))


class Survey(NamedTuple):
    """A model of one width. Its tensors have shapes and no values."""

    width: int
    model: nn.Module
    parameters: dict[str, Surveyed]


def survey(make_model: MakeModel, width: int, axes: Mapping[str, str]) -> Survey:
    """Build the model of a width without memory for its values. `axes` names those of bare parameters, by pattern.

    Raises UserError if the model cannot be built so.
    """
    recorder = InitRecorder()
    with torch.random.fork_rng(devices=[]), recorder:
        try:
            model = make_model(width)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            raise UserError(
                f"make_model({width}): {type(error).__name__}: {reason}; it must build a model without reading any "
                "tensor's values (load checkpoints afterwards)"
            ) from error
        if not isinstance(model, nn.Module):
            raise UserError(f"make_model({width}): returned {type(model).__name__}: it must return an nn.Module")
        parameters: dict[str, Surveyed] = {}
        for names, parameter in _with_all_names(model):
            holders = tuple(_holder(model, name) for name in names)
            declared = next((axes[pattern] for pattern in axes if any(matching(names, pattern))), None)
            try:
                found = declared_fans(declared, parameter.shape) if declared else _agreed_fans(holders, parameter)
            except ValueError as error:
                raise UserError(f"axes: {names[0]}: {error}") from None
            shape, law = tuple(parameter.shape), recorder.law(parameter)
            parameters[names[0]] = Surveyed(shape, found, law, holders)
    return Survey(width, model, parameters)


def _with_all_names(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Every parameter once, with every name it has."""
    named: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(named.values())


def _holder(model: nn.Module, name: str) -> Holder:
    path, _, attribute = name.rpartition(".")
    parent = model.get_submodule(path.rpartition(".")[0])
    return Holder(path, model.get_submodule(path), attribute, parent)


def _agreed_fans(holders: tuple[Holder, ...], parameter: Tensor) -> Fans | None:
    """The fans that every holder gives; those of the embedding where linear layers share it; None on disagreement."""
    found = [fans(holder.module, holder.attribute, parameter.shape) for holder in holders]
    lookups = [f for f in found if f is not None and f.kind is Kind.LOOKUP]
    linears = sum(isinstance(holder.module, nn.Linear) for holder in holders)
    if lookups and len(lookups) + linears == len(found):
        return lookups[0]
    return found[0] if len(set(found)) == 1 else None
