"""The rules `gdn_mup` for any nn.Module: what to multiply, and why, between a base width and a target width.

Which axes grow comes from comparing the shapes of two models, what is fan-in and fan-out from the modules' types, and
the multipliers from the table of `scaling.rules`. Names decide nothing.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gdn_mup.errors import UserError
from gdn_mup.modules import attention, forward, groups, initialization, table
from gdn_mup.modules.compare import Entry, Part, compare
from gdn_mup.modules.fans import Kind
from gdn_mup.modules.names import matching, plain, resolve, unused, unwrapped
from gdn_mup.modules.observe import Call, Pass, observe
from gdn_mup.modules.parts import Split
from gdn_mup.modules.refusals import Refusal, listed
from gdn_mup.modules.survey import MakeModel, Survey, refuse_lazy, survey
from gdn_mup.scaling import rules
from gdn_mup.scaling.depth import Place, depth_scaling
from gdn_mup.scaling.growth import Axes

RULES = rules.GDN_MUP
Optimizer = Literal["adamw", "sgd", "muon"]
Multiplier = float | Callable[[int, int], float]
_WIDER = 8  # times the larger width, at least: beyond what sizes are rounded to


class Depth(NamedTuple):
    """Depth scaling by CompleteP: blocks at the base and here, and the parameters that write to the residual stream.

    `branch_outputs` are patterns of parameter names, such as `*.o_proj.weight`; α = 1 is CompleteP.
    """

    base: int
    target: int
    branch_outputs: tuple[str, ...]
    alpha: float = 1.0


@dataclass(frozen=True)
class Scaling:
    """Multipliers for every parameter of the models that `make_model` builds, from width `base` to width `target`.

    `entries` says of each parameter how it grows, `multipliers(optimizer)` what follows, `print(scaling)` both.
    """

    base: int
    target: int
    entries: Mapping[str, Entry]
    places: Mapping[str, Place]
    depth: Depth | None = None
    readouts: Mapping[str, float] = field(default_factory=dict)  # tied readouts: what multiplies their input
    outputs: Mapping[str, float] = field(default_factory=dict)  # modules whose output is multiplied, as asked for

    @classmethod
    def between(
        cls,
        make_model: MakeModel,
        base: int,
        target: int,
        *,
        parts: Mapping[str, Split | str] | None = None,
        axes: Mapping[str, str] | None = None,
        output_multipliers: Mapping[str, Multiplier] | None = None,
        depth: Depth | None = None,
        call: Call | None = None,
    ) -> "Scaling":
        """Compare the models of two widths, built without memory for their values.

        Args:
            make_model: from a width to the model, with its own init. Only the width may differ between its models.
            parts: for fused layers, by pattern of the module's name: a function from the module that holds the layer
                to the sizes of its parts, in rows (or `Rows` where they interleave), or `"whole"`.
            axes: for bare parameters, by pattern of their name: a word for each axis, `out`, `in` (summed over) or
                `stack` (copies side by side), or just `vector`.
            output_multipliers: factors on the output of modules, by pattern of their name; also functions from base
                and target width to the factor.
            depth: depth scaling, off by default.
            call: runs a model once, as training does: `lambda model: model(ids)`. Models are called without values,
                to see what softmax attention does; left out, inputs are guessed.

        Raises UserError if a model cannot be built, or, with all that shapes leave open and a cure for each.
        """
        for name, width in (("base", base), ("target", target)):
            if not isinstance(width, int) or width < 1:
                raise UserError(f"{name}: {width!r}: use a width of 1 or more")
        first, here, wide = _family(make_model, base, target)
        arguments: dict[str, Mapping[str, Any]] = {"parts": parts or {}, "axes": axes or {}}
        entries, refused = compare(first, here, wide, arguments["parts"], arguments["axes"])
        multiplied = {
            pattern: factor(base, target) if callable(factor) else factor
            for pattern, factor in (output_multipliers or {}).items()
        }
        paths = [path for path, _ in here.model.named_modules()]
        outputs = resolve(multiplied, paths)
        passes = (observe(first.model, call), observe(here.model, call))
        refused += _unknown_names(here, arguments | {"output_multipliers": multiplied})
        refused += _lost_multipliers(here.model, passes[1], multiplied)
        refused += attention.refusals(make_model, (first, here), passes, outputs, call)
        if refused:
            raise UserError(listed(refused, _names(here), partial(_still_refused, (first, here, wide), arguments)))
        if base == wide.width or all(part.axes is Axes.NONE for entry in entries.values() for part in entry.parts):
            raise UserError(
                f"make_model: its models of width {base} and {wide.width} have equal shapes: use the width, and train "
                "what grows"
            )
        readouts = {path: RULES.tied_output(e.parts[0].growth) for e in entries.values() for path in e.readouts}
        places = _places(here.model, entries, depth) if depth else dict.fromkeys(entries, Place.OUTSIDE)
        return cls(base, target, entries, places, depth, readouts, outputs)

    def part_multipliers(self, name: str, optimizer: Optimizer) -> list[rules.Scaling]:
        """Multipliers of every part of a parameter; most have one."""
        entry = self.entries[name]
        if optimizer == "sgd" and self.depth:
            raise UserError("depth: CompleteP's rules are for AdamW: leave depth out, or use optimizer='adamw'")
        rule = "adamw" if optimizer == "muon" and not self.trained_by_muon(name) else optimizer
        return [self._multipliers(entry, part, rule, self.places[name]) for part in entry.parts]

    def multipliers(self, optimizer: Optimizer) -> dict[str, rules.Scaling]:
        """Multipliers of every parameter, the init's being that of its first part.

        Raises UserError if parts of one parameter need learning rates of their own.
        """
        return {name: self._merged(name, optimizer) for name in self.entries}

    def init_rms(self, name: str) -> float:
        """The root mean square of a parameter after `initialize`, of what is known of its init; NaN if some is not."""
        return initialization.rms(self, name)

    def trained_by_muon(self, name: str) -> bool:
        """Whether Muon trains a parameter: matrices both of whose sides grow. AdamW trains the others."""
        entry = self.entries[name]
        return entry.kind is Kind.MATRIX and len(entry.shape) == 2 and entry.axes is Axes.BOTH

    def initialize(
        self,
        model: nn.Module,
        std: float | Mapping[str, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Give a model of the target width the init that the rules ask for, and its forward multipliers.

        Its own init is kept and rescaled: from the standard deviation that it has at this width to what it has at the
        base width, times the rule's multiplier. A model that is so already is left alone. `std` draws weights from
        normal distributions instead: a standard deviation at the base width, for all matrices, lookup tables and
        convolutions or by pattern of the parameter's name. Frozen parameters, buffers, gains and constants stay.

        Raises UserError if a parameter has neither its own init nor the rescaled one (it has been trained or loaded).
        """
        initialization.initialize(self, model, std, generator)
        self.add_multipliers(model)

    def add_multipliers(self, model: nn.Module) -> None:
        """Only the forward multipliers: for a model whose parameters are loaded."""
        self.parameters_of(model)
        forward.add(model, self.readouts, self.outputs)

    def remove_multipliers(self, model: nn.Module, fold: bool = True) -> None:
        """Take the forward multipliers away; with `fold` the model still computes the same, without hooks.

        A tied readout gets a weight of its own, so that the multiplier can go into it.
        """
        forward.remove(model, self.readouts, self.outputs, fold)

    def parameter_groups(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        learning_rate: float,
        *,
        weight_decay: float = 0.0,
        epsilon: float = 1e-8,
        decay: Literal["weights", "all"] | Callable[[str, Tensor], bool] = "weights",
        adamw_learning_rate: float | None = None,
        muon_epsilon: float = 1e-7,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
    ) -> Any:
        """Groups for torch.optim.AdamW or SGD, from the hyperparameters of the base width.

        For `muon` a pair, `muon` for torch.optim.Muon and `adamw` for torch.optim.AdamW, whose learning rate is
        `adamw_learning_rate`. `decay` says what decays: weights but not vectors, all, or what a function of name and
        parameter says. Every group has its lr, weight_decay and, but for SGD, eps. Frozen parameters are left out.

        Raises UserError if the model is not of the target's shapes or has not got its forward multipliers.
        """
        return groups.parameter_groups(
            self,
            model,
            optimizer,
            groups.Hyperparameters(
                learning_rate, weight_decay, epsilon, adamw_learning_rate, muon_epsilon, adjust_lr_fn
            ),
            decay,
        )

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters under the names of the entries; UserError if it is another model."""
        refuse_lazy(model, "model")
        found = {plain(name): parameter for name, parameter in unwrapped(model).named_parameters()}
        if found.keys() != self.entries.keys():
            only = sorted(found.keys() ^ self.entries.keys())
            where = "the model" if only[0] in found else "make_model's"
            raise UserError(
                f"model: {only[0]} is a parameter of {where} alone: give the model that make_model({self.target}) "
                "builds, tied weights tied"
            )
        for name, parameter in found.items():
            if tuple(parameter.shape) != self.entries[name].shape:
                raise UserError(
                    f"model: {name} has shape {tuple(parameter.shape)}, and {self.entries[name].shape} at width "
                    f"{self.target}: give a model of the target width"
                )
        return found

    def trained_parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Those of them that are not frozen; UserError if make_model freezes them, so that no rule is known."""
        trained = {name: p for name, p in self.parameters_of(model).items() if p.requires_grad}
        thawed = [name for name in trained if not self.entries[name].trained]
        if thawed:
            raise UserError(
                f"model: {', '.join(thawed)}: trained here, and frozen in make_model's, so that it has no rule: "
                "freeze and unfreeze in make_model"
            )
        return trained

    def __str__(self) -> str:
        return table.text(self, "adamw")

    def table(self, optimizer: Optimizer = "adamw") -> str:
        """What `print` shows, for another optimizer."""
        return table.text(self, optimizer)

    def _multipliers(self, entry: Entry, part: Part, optimizer: str, place: Place) -> rules.Scaling:
        scaling = RULES.rows[part.axes].scaling(part.growth, optimizer, RULES.keeps_decay)
        if not self.depth:
            return scaling
        by_depth = depth_scaling(self.depth.target / self.depth.base, place, self.depth.alpha)
        return rules.Scaling(*(a * b for a, b in zip(scaling, by_depth, strict=True)))

    def _merged(self, name: str, optimizer: Optimizer) -> rules.Scaling:
        scalings = self.part_multipliers(name, optimizer)
        if len({scaling.learning_rate for scaling in scalings}) > 1:
            rates = ", ".join(f"{scaling.learning_rate:.4g}" for scaling in scalings)
            raise UserError(
                f"{name}: its parts need learning rates of their own under {optimizer} (× {rates}), and an optimizer "
                "gives a parameter one: use optimizer='adamw', or let the parts grow alike"
            )
        return scalings[0]._replace(epsilon=min(scaling.epsilon for scaling in scalings))


def _family(make_model: MakeModel, base: int, target: int) -> tuple[Survey, Survey, Survey]:
    """Models of both widths, and a wider one that shows which axes grow where rounding hides it between them."""
    surveys = {width: survey(make_model, width) for width in sorted({base, target})}
    wide = base
    while wide < _WIDER * max(base, target):
        wide *= 2
    for width in (wide, 2 * base):
        with suppress(UserError):  # a family may have few widths
            wider = survey(make_model, width)
            if wider.parameters.keys() == surveys[target].parameters.keys():  # not deeper, either
                return surveys[base], surveys[target], wider
    return surveys[base], surveys[target], surveys[target]


def _names(here: Survey) -> dict[str, Collection[str]]:
    """What a pattern may match, by argument."""
    return {
        "parts": list(dict.fromkeys(h.path for found in here.parameters.values() for h in found.holders)),
        "axes": list(here.names()),
        "output_multipliers": [path for path, _ in here.model.named_modules()],
    }


def _unknown_names(here: Survey, arguments: Mapping[str, Mapping[str, Any]]) -> list[Refusal]:
    """Patterns that match nothing."""
    return [
        Refusal((argument,), f"{pattern!r} is the name of nothing in the model; there is {list(names)[-1]!r}")
        for argument, names in _names(here).items()
        for pattern in unused(arguments[argument], names)
    ]


def _lost_multipliers(model: nn.Module, seen: Pass, multiplied: Mapping[str, float]) -> list[Refusal]:
    """Multipliers on modules that are not called, or return no tensor."""
    modules, refused = dict(model.named_modules()), []
    for pattern in multiplied:
        paths = matching(modules, pattern)
        uncalled = [
            path for path in paths if _is_never_called(modules, path) or (seen.complete and not seen.calls[path])
        ]
        if paths and len(uncalled) == len(paths):
            refused.append(
                Refusal(
                    ("output_multipliers",),
                    f"{pattern!r}: {paths[0]} is not called when the model runs, so that its multiplier would be lost",
                    otherwise="name a module that is called, or, if training calls it, say how: call=lambda model: ...",
                )
            )
        for path in paths:
            if seen.returns.get(path, "Tensor") not in ("Tensor", "Parameter"):
                refused.append(
                    Refusal(
                        ("output_multipliers",),
                        f"{pattern!r}: {path} returns a {seen.returns[path]}, which has no one factor",
                        otherwise="name a module that returns a tensor",
                        group=("returns", pattern),
                    )
                )
    return refused


def _is_never_called(modules: Mapping[str, nn.Module], path: str) -> bool:
    """torch's attention multiplies by its projection's weight itself."""
    parent, _, child = path.rpartition(".")
    return isinstance(modules.get(parent), nn.MultiheadAttention) and child == "out_proj"


def _still_refused(
    surveys: tuple[Survey, Survey, Survey],
    arguments: Mapping[str, Mapping[str, Any]],
    argument: str,
    said: Mapping[str, str],
) -> list[Refusal]:
    """What would be refused if this were said too."""
    if argument not in arguments:
        return []  # multipliers are tried on a model with values, before they are offered
    tried = {**arguments, argument: {**arguments[argument], **said}}
    return compare(*surveys, tried["parts"], tried["axes"])[1]


def _places(model: nn.Module, entries: Mapping[str, Entry], depth: Depth) -> dict[str, Place]:
    """Blocks are the modules of a ModuleList or Sequential as long as the depth."""
    stacks = [
        path + "."
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == depth.target
    ]
    if not stacks:
        raise UserError(f"depth: the model has no ModuleList of {depth.target} blocks: set depth.target to its depth")
    for pattern in unused(depth.branch_outputs, list(entries)):
        raise UserError(
            f"depth.branch_outputs: {pattern!r} is the name of nothing in the model; there is {list(entries)[-1]!r}"
        )
    written = {name for pattern in depth.branch_outputs for name in matching(entries, pattern)}

    def place(name: str) -> Place:
        if not name.startswith(tuple(stacks)):
            return Place.OUTSIDE
        return Place.BRANCH_OUTPUT if name in written else Place.INSIDE

    return {name: place(name) for name in entries}
