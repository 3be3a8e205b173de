"""What is off in a coordinate check, and which parameter's rule to look at."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xarray as xr

from gdn_mup.study.width_fit import Exponents, width_exponent

FLAT = 0.25  # an exponent within this of 0 is no growth and no decay
READOUT_DECAY = 0.5  # what a readout does at init to a change of what it reads, beside its own update
EXACT = 0.05  # the same for what carries no noise
_STANDARD_ERRORS = 3


class Finding(NamedTuple):
    """Something that scales as it should not: where, its width exponent with a 95 % interval, and what to look at."""

    where: str
    what: str
    exponent: float
    low: float
    high: float
    look_at: str

    def __str__(self) -> str:
        interval = f" [{self.low:+.2f}, {self.high:+.2f}]" if np.isfinite(self.low) else ""
        exponent = f" ∝ width^{self.exponent:+.2f}{interval}" if np.isfinite(self.exponent) else ""
        return f"{self.where}: {self.what}{exponent}; look at {self.look_at}"


def exponents(dataset: xr.Dataset, variable: str) -> Exponents:
    """Width exponents of a variable with seeds and widths: value, low and high [other dimensions in order]."""
    array = dataset[variable].transpose(..., "seed", "width")
    return width_exponent([int(w) for w in dataset.width.values], array.values)


def findings(dataset: xr.Dataset) -> list[Finding]:
    """Everything that is off, parameters before the outputs that they cause.

    A parameter departs from the rules if its init, its learning rate or its weight decay scales otherwise than they
    say, if its first AdamW update departs from its learning rate (ε bites), or if it is not trained at all: left out of
    the optimizer, or without a gradient. An output is off if it or its change grows with width, or shrinks: by more
    than 0.25 in the exponent and with an interval without 0. Outputs of readouts, to which the rules give an init ∝
    1/width, may shrink as width^-½. The loss is off if it grows.
    """
    return [*_of_parameters(dataset), *_of_outputs(dataset), *_of_the_loss(dataset)]


def _of_parameters(dataset: xr.Dataset) -> Iterator[Finding]:
    widths = [int(w) for w in dataset.width.values]
    names = [str(name) for name in dataset.parameter.values]
    start, first = dataset.weight_rms.sel(step=0), int(dataset.step.values[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        init = _exponents(start / dataset.rule_init_std, widths)
        rate = _exponents((dataset.learning_rate / dataset.rule_learning_rate).expand_dims("seed"), widths)
        last = _exponents((dataset.last_learning_rate / dataset.rule_learning_rate).expand_dims("seed"), widths)
        decay = _exponents((dataset.learning_rate * dataset.weight_decay).expand_dims("seed"), widths)
        # Of entries that have a gradient all along: rows of an embedding that no token asked for are the same anywhere.
        adam = "Adam" in dataset.attrs["optimizer"] and first == 1
        update = _exponents(dataset.update_rms.sel(step=first) / dataset.learning_rate, widths)
    gradient = dataset.gradient_rms.sel(step=first).mean("seed").transpose("parameter", "width").values
    learning_rate = dataset.learning_rate.transpose("parameter", "width").values
    gradients = dataset.gradient_rms.sel(step=dataset.step.values[1:]).transpose("parameter", ...).values
    for i, name in enumerate(names):
        if np.isfinite(learning_rate[i]).all() and _is_without(gradients[i]):
            yield Finding(name, "gets no gradient", np.nan, np.nan, np.nan, "whether the loss depends on it")
            continue
        if (learning_rate[i] == 0).any():
            yield Finding(name, "in no group of the optimizer", np.nan, np.nan, np.nan, "the list of parameters")
            continue
        if _off(init, i, EXACT + _sampling_error(dataset, i)):
            yield _finding(init, i, name, "init over what the rule says", "its initial standard deviation")
        if _off(rate, i, EXACT):
            yield _finding(rate, i, name, "learning rate over what the rule says", "its learning rate")
        elif _off(last, i, EXACT):
            what = "learning rate at the last update over what the rule says"
            yield _finding(last, i, name, what, "what sets it after the optimizer is made: a scheduler, a hook")
        if _off(decay, i, EXACT):
            yield _finding(decay, i, name, "learning rate × weight decay", "its weight decay")
        # A few entries with gradients about as small as ε are no mistake of scaling: this is a matter of degree.
        if adam and (gradient[i] > 0).all() and _off(update, i, FLAT):
            yield _finding(update, i, name, "first update over learning rate", "its ε, larger than its gradient")


def _is_without(gradients: np.ndarray) -> bool:
    """Whether a parameter is not in the graph of any update, or its gradient is 0 in all of two or more."""
    steps = gradients.shape[-1]
    return bool(np.isnan(gradients).all() or (steps > 1 and (np.nan_to_num(gradients) == 0).all()))


def _of_outputs(dataset: xr.Dataset) -> Iterator[Finding]:
    names = [str(name) for name in dataset.module.values]
    last = int(dataset.step.values[-1])
    rms, change = exponents(dataset.sel(step=0), "rms"), exponents(dataset.sel(step=last), "change")
    shrinking = _readers(dataset, _readouts(dataset))
    causes = _Causes(dataset)
    for i, name in enumerate(names):
        decay = READOUT_DECAY if name in shrinking else 0.0
        if _off(rms, i, FLAT, decay):
            yield _finding(rms, i, name, "output at init", causes.at_init(name))
        elif _off(change, i, FLAT, decay):
            yield _finding(change, i, name, f"change of output after {last} updates", causes.of(name))


def _of_the_loss(dataset: xr.Dataset) -> Iterator[Finding]:
    """A loss that grows at init, whatever makes it grow: functions are no modules, and have no line of their own.

    Logits that grow make the loss shrink where they are right by chance: with a weight that is used outside its module
    that is a finding too.
    """
    widths, causes = [int(w) for w in dataset.width.values], _Causes(dataset)
    found = width_exponent(widths, dataset.loss.sel(step=[0]).transpose("step", "seed", "width").values)
    if _off(found, 0, FLAT) and (found.value[0] > 0 or causes.elsewhere):
        yield _finding(found, 0, "(loss)", "loss at init", causes.elsewhere or "what it is computed from")


class _Causes:
    """What to look at where an output is off."""

    def __init__(self, dataset: xr.Dataset) -> None:
        self._dataset = dataset
        self._parameters = [str(name) for name in dataset.parameter.values]
        used = dataset.attrs["used_elsewhere"]
        self.elsewhere = f"{used}, which is used outside its module" if used else ""

    def of(self, name: str) -> str:
        """The parameters of the module itself, or what it reads."""
        module = name.partition("[")[0]
        own = [p for p in self._parameters if p.rpartition(".")[0] == module]
        own = own or [what for what in ("what it reads", self.elsewhere) if what]
        if module in self._dataset.attrs["readouts"].split(", "):
            own = ["its forward multiplier", *own]
        return ", ".join(own)

    def at_init(self, name: str) -> str:
        """The same, or a factor in the code of the module, or before it, where its weight is not to blame."""
        dataset, tied = self._dataset.sel(step=0), name in self._dataset.attrs["readouts"].split(", ")
        read = dataset.input_rms.sel(module=name)
        if tied:
            if abs(self._exponent(read).value[0]) < EXACT:
                return self.of(name)  # not divided by the width: its forward multiplier is not there
            read = read * (dataset.width / dataset.width.min())
        elif f"{name}.weight" in self._parameters:
            weight = {"parameter": f"{name}.weight"}
            size = dataset.weight_rms.sel(weight) * np.sqrt(dataset.rule_fan_in.sel(weight))
            own = self._exponent(dataset.rms.sel(module=name) / (size * read.where(np.isfinite(read), 1.0)))
            if _off(own, 0, FLAT):
                power = round(float(own.value[0]) * 4) / 4
                return (
                    f"a factor ∝ width^{power:+.2g} in the module's own code: undo it, "
                    f"output_multipliers={{{name!r}: lambda base, width: (base / width) ** {power:g}}}"
                )
        before = self._exponent(read)
        if (tied or f"{name}.weight" in self._parameters) and _off(before, 0, FLAT):
            return f"what it reads, ∝ width^{before.value[0]:+.2f} (a factor in the model's own code?), {self.of(name)}"
        return self.of(name)

    def _exponent(self, array: xr.DataArray) -> Exponents:
        widths = [int(w) for w in self._dataset.width.values]
        return width_exponent(widths, array.expand_dims("one").transpose("one", "seed", "width").values)


def _exponents(array: xr.DataArray, widths: list[int]) -> Exponents:
    values = array.transpose("parameter", "seed", "width").values
    return width_exponent(widths, values)


def _sampling_error(dataset: xr.Dataset, i: int) -> float:
    """How far an init of few entries may be off: a standard deviation of n entries is known to 1/√(2n)."""
    fewest = float(dataset.entries.isel(parameter=i).min()) * dataset.sizes["seed"]
    growth = float(dataset.width.max() / dataset.width.min())
    return _STANDARD_ERRORS / float(np.sqrt(2 * fewest) * np.log(growth))


def _off(found: Exponents, i: int, tolerance: float, decay: float = 0.0) -> bool:
    """Whether an exponent lies above `tolerance` or below -(tolerance + decay), and its interval on that side of 0."""
    value, low, high = found.value[i], found.low[i], found.high[i]
    if not np.isfinite(value) or -tolerance - decay <= value <= tolerance:
        return False
    return not np.isfinite(low) or low > 0 or high < 0


def _finding(found: Exponents, i: int, where: str, what: str, look_at: str) -> Finding:
    return Finding(where, what, float(found.value[i]), float(found.low[i]), float(found.high[i]), look_at)


def _readouts(dataset: xr.Dataset) -> set[str]:
    """Modules whose output shrinks at init by the rules: readouts, tied or not, and the model that returns theirs."""
    rule = dataset.rule_init_std.isel(width=-1) / dataset.rule_init_std.isel(width=0)
    width = float(dataset.width[-1] / dataset.width[0])
    own = {str(name).rpartition(".")[0] for name in rule.parameter.values[(rule < width**-0.75).values]}
    readouts = own | {*dataset.attrs["readouts"].split(", "), "(model)"}
    return {name for name in map(str, dataset.module.values) if name.partition("[")[0] in readouts}


def _readers(dataset: xr.Dataset, shrinking: set[str]) -> set[str]:
    """These modules and those that read what they put out, as the second of a low-rank pair of matrices does."""
    sizes = {key: dataset[key].sel(step=0) if key == "rms" else dataset[key] for key in ("rms", "input_rms")}
    read, written = (sizes[key].transpose("module", "seed", "width").values for key in ("input_rms", "rms"))
    names = [str(name) for name in dataset.module.values]
    found = set(shrinking)
    for i, name in enumerate(names):  # in the order in which modules finish: who reads comes later
        sources = [written[j] for j, other in enumerate(names[:i]) if other in found]
        if any(np.allclose(read[i], source, rtol=1e-6, atol=0) for source in sources):
            found.add(name)
    return found
