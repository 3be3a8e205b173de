"""The rules `gdn_mup` for any nn.Module: what to multiply, and why, between a base width and a target width.

Which axes grow comes from comparing the shapes of two models, what is fan-in and fan-out from the modules' types, and
the multipliers from the table of `scaling.rules`. Names decide nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gdn_mup.errors import UserError
from gdn_mup.modules import forward, groups, initialization, table
from gdn_mup.modules.compare import Entry, Part, compare
from gdn_mup.modules.fans import Kind
from gdn_mup.modules.names import matching, plain, unwrapped
from gdn_mup.modules.parts import Split
from gdn_mup.modules.survey import MakeModel, survey
from gdn_mup.scaling import rules
from gdn_mup.scaling.depth import Place, depth_scaling
from gdn_mup.scaling.growth import Axes

RULES = rules.GDN_MUP
Optimizer = Literal["adamw", "sgd", "muon"]


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
        output_multipliers: Mapping[str, float] | None = None,
        depth: Depth | None = None,
    ) -> "Scaling":
        """Compare the models of two widths, built without memory for their values.

        Args:
            make_model: from a width to the model, with its own init. Only the width may differ between its models.
            parts: for fused layers, by pattern of the module's name: a function from the module that holds the layer
                to the sizes of its parts, in rows (or `Rows` where they interleave), or `"whole"`.
            axes: for bare parameters, by pattern of their name: a word for each axis, `out`, `in` (summed over) or
                `stack` (copies side by side), or just `vector`.
            output_multipliers: factors on the output of modules, by pattern of their name.
            depth: depth scaling, off by default.

        Raises UserError, with the cure, if a model cannot be built or its shapes leave a rule open.
        """
        for name, width in (("base", base), ("target", target)):
            if not isinstance(width, int) or width < 1:
                raise UserError(f"{name}: {width!r}: use a width of 1 or more")
        surveys = {
            w: survey(make_model, w, axes or {}) for w in {base, target, *([2 * base] if base == target else [])}
        }
        probe = surveys[target if target != base else 2 * base]
        entries = compare(surveys[base], surveys[target], probe, parts or {})
        if base == probe.width or all(part.axes is Axes.NONE for entry in entries.values() for part in entry.parts):
            raise UserError(
                f"make_model: its models of width {base} and {probe.width} have equal shapes: use the width"
            )
        _check_used("parts", parts, (h.path for s in probe.parameters.values() for h in s.holders))
        _check_used("axes", axes, entries)
        model = surveys[target].model
        outputs = _outputs(model, output_multipliers or {})
        forward.check_softmax_attention(surveys[base].model, model, outputs)
        readouts = {path: RULES.tied_output(e.parts[0].growth) for e in entries.values() for path in e.readouts}
        places = _places(model, entries, depth) if depth else dict.fromkeys(entries, Place.OUTSIDE)
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

    def init_size(self, name: str) -> float:
        """The multiplier of a parameter's root mean square at init: over all its parts."""
        entry, parts = self.entries[name], self.part_multipliers(name, "adamw")
        return initialization.size(entry, [part.init_std for part in parts])

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


def _outputs(model: nn.Module, multipliers: Mapping[str, float]) -> dict[str, float]:
    paths = [path for path, _ in model.named_modules()]
    _check_used("output_multipliers", multipliers, paths)
    return {path: factor for pattern, factor in multipliers.items() for path in matching(paths, pattern)}


def _check_used(argument: str, patterns: Mapping[str, Any] | None, names: Iterator[str] | Any) -> None:
    known = list(names)
    for pattern in patterns or {}:
        if not any(matching(known, pattern)):
            raise UserError(f"{argument}: {pattern!r} is the name of nothing in the model; there is {known[-1]!r}")


def _places(model: nn.Module, entries: Mapping[str, Entry], depth: Depth) -> dict[str, Place]:
    """Blocks are the modules of a ModuleList or Sequential as long as the depth."""
    stacks = [
        path + "."
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == depth.target
    ]
    if not stacks:
        raise UserError(f"depth: the model has no ModuleList of {depth.target} blocks: set depth.target to its depth")
    _check_used("depth.branch_outputs", dict.fromkeys(depth.branch_outputs), entries)

    def place(name: str) -> Place:
        if not name.startswith(tuple(stacks)):
            return Place.OUTSIDE
        writes = any(any(matching([name], pattern)) for pattern in depth.branch_outputs)
        return Place.BRANCH_OUTPUT if writes else Place.INSIDE

    return {name: place(name) for name in entries}
