"""What there is to know about a model of one width without computing anything: shapes, fans, laws of the init."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gdn_mup.errors import UserError
from gdn_mup.modules.fans import Fans, Kind, computed_by, declared_fans, fans
from gdn_mup.modules.init_law import Filled, InitRecorder, Region
from gdn_mup.modules.names import resolve
from gdn_mup.modules.refusals import Refusal
from gdn_mup.modules.users import users

MakeModel = Callable[[int], nn.Module]


class Holder(NamedTuple):
    """A module that has a parameter, under which attribute, and the module that holds it in turn."""

    path: str
    module: nn.Module
    attribute: str
    parent: nn.Module

    @property
    def name(self) -> str:
        """The parameter's name."""
        return f"{self.path}.{self.attribute}".lstrip(".")

    @property
    def is_bias(self) -> bool:
        """Whether it is a vector with one entry for each row of the weight beside it."""
        return isinstance(self.module, nn.Linear | nn.modules.conv._ConvNd) and self.attribute == "bias"


class Surveyed(NamedTuple):
    """One parameter at one width. `fans` is None if no holder's type says what it does."""

    shape: tuple[int, ...]
    fans: Fans | None
    filled: Filled
    holders: tuple[Holder, ...]
    trained: bool

    @property
    def kind(self) -> Kind | None:
        """What it does with its input, if that can be said."""
        return self.fans.kind if self.fans else None

    @property
    def computed_by(self) -> str | None:
        """What computes a weight from it, instead of multiplying by it."""
        return next(filter(None, (computed_by(h.module, h.attribute) for h in self.holders)), None)

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

    def names(self) -> dict[str, str]:
        """Every name that a parameter has, and the first of them, which is its key."""
        return {holder.name: key for key, found in self.parameters.items() for holder in found.holders}

    def declaring(self, axes: Mapping[str, str]) -> tuple["Survey", list[Refusal]]:
        """The same with what the user says of axes, by pattern of the name, and what cannot be so."""
        keys, refused = self.names(), []
        said = {keys[name]: words for name, words in resolve(axes, keys).items()}
        parameters = {}
        for key, found in self.parameters.items():
            declared = _agreed_fans(found)
            if key in said:
                try:
                    declared = declared_fans(said[key], found.shape)
                except ValueError as error:
                    refused.append(Refusal((key,), f"axes: {error}"))
            parameters[key] = found._replace(fans=declared)
        return self._replace(parameters=parameters), refused


def survey(make_model: MakeModel, width: int) -> Survey:
    """Build the model of a width without memory for its values.

    Raises UserError if the model cannot be built so.
    """
    recorder = InitRecorder()
    with torch.random.fork_rng(devices=[]), recorder:
        with users(f"make_model({width})"):
            model = make_model(width)
        if not isinstance(model, nn.Module):
            raise UserError(f"make_model({width}): returned {type(model).__name__}: it must return an nn.Module")
        refuse_lazy(model, f"make_model({width})")
        parameters = {
            names[0]: Surveyed(
                tuple(parameter.shape),
                None,
                recorder.filled(parameter),
                tuple(_holder(model, name) for name in names),
                parameter.requires_grad,
            )
            for names, parameter in _with_all_names(model)
        }
    return Survey(width, model, parameters)


def refuse_lazy(model: nn.Module, what: str) -> None:
    """Raise UserError if parameters of the model wait for a first input to have shapes."""
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise UserError(
            f"{what}: {lazy[0]} has no shape before the first input{_more(lazy)}: call the model once in make_model "
            "before it is returned, on an input of its own"
        )


_K = TypeVar("_K")


def sharing(parameters: Iterable[tuple[_K, Tensor]]) -> list[tuple[_K, _K]]:
    """Pairs of different parameters over the same memory: an optimizer would take each for itself."""
    found, seen = [], dict[int, list[tuple[_K, Region, int]]]()
    for key, parameter in parameters:
        tensor: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        memory = tensor.detach().untyped_storage()
        if not memory.nbytes() or not tensor.numel():
            continue
        region, size = Region.of(tensor.detach()), tensor.element_size()
        others = seen.setdefault(memory._cdata, [])
        found += [
            (other, key)
            for other, theirs, their_size in others
            if region.offset * size < theirs.end * their_size and theirs.offset * their_size < region.end * size
        ]
        others.append((key, region, size))
    return found


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


def _agreed_fans(parameter: Surveyed) -> Fans | None:
    """The fans that every holder gives; those of the embedding where linear layers share it; None on disagreement."""
    found = [fans(holder.module, holder.attribute, parameter.shape) for holder in parameter.holders]
    lookups = [f for f in found if f is not None and f.kind is Kind.LOOKUP]
    linears = sum(
        isinstance(holder.module, nn.Linear) and f is not None and f.kind is Kind.MATRIX
        for holder, f in zip(parameter.holders, found, strict=True)
    )
    if lookups and len(lookups) + linears == len(found):
        return lookups[0]
    return found[0] if len(set(found)) == 1 else None


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
