"""Width exponents of a coordinate check, measured against predicted.

Measured: the slope of log size on log width with its 95 % interval over seeds (`width_fit.width_exponent`), for every
activation and every change of one, and for the weights, gradients and updates of every parameter, after every number of
updates that the check recorded. Predicted: `scaling.exponents`, derived for init and the first update. Where the
derivation has two answers, the prediction is the range between them:

- gates' gradients under growth by head dim: a sum of V terms of independent signs (the premise of arXiv 2606.04048),
  or of aligned ones;
- changes: the limit of small learning rates, or of large widths at the check's own;
- updates under SGD with clipping: a gradient that is clipped, or one that is not.

Under a good parametrization training goes on as it began, so that the same exponents are held against later steps.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import xarray as xr

from gdn_mup.errors import UserError
from gdn_mup.scaling.exponents import Prediction, Premise, Response, predict
from gdn_mup.study.width_fit import width_exponent

Agreement = Literal["agrees", "differs", "undecided"]

TOLERANCE = 0.15  # widths are finite: second-largest powers of width show by so much (tests/test_exponents.py)
WIDEST = 0.6  # an interval wider than this cannot tell neighbouring powers of width, half a power apart

# What a coordinate check measures: the dimension of its names, and the field of a `Prediction`.
MEASURES = {
    "rms": ("quantity", "rms"),
    "change": ("quantity", "change"),
    "weight_rms": ("parameter", "weight"),
    "gradient_rms": ("parameter", "gradient"),
    "update_rms": ("parameter", "update"),
}
GATES = ("dt_bias", "A_log", "alpha_projection", "beta_projection")
_SCALARS = ("dt_bias", "A_log")  # both sum the gradients of W_a x + dt_bias over tokens
PREMISES: tuple[Premise, ...] = get_args(Premise)


def exponents(dataset: xr.Dataset) -> pd.DataFrame:
    """Every exponent of a collected `coordinates` dataset, one row each.

    Columns: growth, optimizer, rules, measure, name, layer, step; `exponent`, `low`, `high` as measured;
    `predicted_low`, `predicted_high`; `agreement`: whether the interval meets the predicted range, widened by
    `TOLERANCE`, with "undecided" where it is too wide to tell or there is none.
    Raises UserError if fewer than two widths were run.
    """
    if dataset.sizes.get("width", 0) < 2:
        raise UserError("a coordinate check of one width has no exponents; give it more `widths`")
    tables = []
    for measure, (names, field) in MEASURES.items():
        fitted = _fitted(dataset[measure], ("growth", "optimizer", "rules", names, "layer", "step"))
        tables.append(fitted.rename(columns={names: "name"}).assign(measure=measure, field=field))
    table = pd.concat(tables, ignore_index=True)
    if table.empty:
        raise UserError("the coordinate checks have no size at two widths; see their `widths`")
    ranges = _predicted(dataset, table)
    nowhere = (np.nan, np.nan)
    ends = [
        ranges[row.growth, row.optimizer, row.rules, _field(row)].get((row.name, row.layer), nowhere)
        for row in table.itertuples(index=False)
    ]
    table[["predicted_low", "predicted_high"]] = ends
    table["agreement"] = [_agreement(row) for row in table.itertuples(index=False)]
    columns = ["growth", "optimizer", "rules", "measure", "name", "layer", "step", "exponent", "low", "high"]
    return table[[*columns, "predicted_low", "predicted_high", "agreement"]]


def gate_gradients(dataset: xr.Dataset) -> pd.DataFrame:
    """Exponents of the gates' gradients over training, the layers of a model pooled, beside both premises.

    One row per growth, optimizer, rules, parameter (dt_bias, A_log, W_a, W_b) and step after 0; columns `independent`
    and `aligned` hold what each premise predicts of an inner layer.
    """
    widths = [int(width) for width in dataset.width.values]
    steps = [step for step in dataset.step.values.tolist() if step > 0]
    gates = [name for name in GATES if name in dataset.parameter.values]
    if len(widths) < 2 or not steps or not gates:
        raise UserError("gate gradients need a coordinate check with two `widths` or more and a step after 0")
    gradient = dataset.gradient_rms.sel(step=steps, parameter=gates)
    # Layers share the batch but not their gates: their mean log size is one measurement of a seed.
    pooled = np.exp(np.log(gradient.where(gradient > 0)).mean("layer"))
    table = _fitted(pooled, ("growth", "optimizer", "rules", "parameter", "step"))
    for premise in PREMISES:
        table[premise] = [
            predict(row.rules, row.optimizer, row.growth, premise=premise).gradient[row.parameter, 1]
            for row in table.itertuples()
        ]
    return table


def pooled_gate_gradients(dataset: xr.Dataset) -> pd.DataFrame:
    """`gate_gradients` of all gates together: one row per growth, optimizer, rules and step after 0.

    Each measurement counts once: A_log and dt_bias, whose gradients are sums of the same products, are one.
    """
    single = gate_gradients(dataset)
    steps = [step for step in dataset.step.values.tolist() if step > 0]
    gates = [name for name in GATES if name in dataset.parameter.values]
    gradient = dataset.gradient_rms.sel(step=steps, parameter=gates)
    sizes = np.log(gradient.where(gradient > 0)).mean("layer")
    scalars = [name for name in gates if name in _SCALARS]
    apart = [sizes.sel(parameter=[name]) for name in gates if name not in _SCALARS]
    together = [sizes.sel(parameter=scalars).mean("parameter", skipna=False).expand_dims(parameter=["scalars"])]
    pooled = np.exp(xr.concat([*apart, *together * bool(scalars)], "parameter").mean("parameter", skipna=False))
    keys = ["growth", "optimizer", "rules", "step"]
    premises = single.groupby(keys, sort=False)[list(PREMISES)].mean().reset_index()
    return _fitted(pooled, ("growth", "optimizer", "rules", "step")).merge(premises, on=keys)


def predicted_growth(rules: str, optimizer: str, growth: str, clipped: str) -> float:
    """The exponent of what an update changes in the residual stream; the least of several answers.

    `clipped`: the norm by which every update is clipped, or "none".
    """
    answers = [
        predict(rules, optimizer, growth, premise=premise, response=response, clipping=clipped).change
        for premise in PREMISES
        for response in get_args(Response)
    ]
    return min(max(value for (name, _), value in change.items() if name == "residual") for change in answers)


def _fitted(sizes: xr.DataArray, keys: tuple[str, ...]) -> pd.DataFrame:
    """Exponents of sizes that have the dimensions `keys`, seed and width: a row for each that two widths give."""
    fitted = width_exponent(sizes.width.values.tolist(), sizes.transpose(*keys, "seed", "width").values)
    places = pd.MultiIndex.from_product([sizes[key].values.tolist() for key in keys], names=keys)
    ends = {"exponent": fitted.value.ravel(), "low": fitted.low.ravel(), "high": fitted.high.ravel()}
    return pd.DataFrame(ends, index=places).dropna(subset="exponent").reset_index()


def _field(row: Any) -> str:
    """Which prediction: once training has had its part in a size, the larger of what init and updates make of it."""
    return f"later {row.field}" if row.measure in ("rms", "weight_rms") and row.step > 0 else str(row.field)


def _agreement(row: Any) -> Agreement:
    if not (np.isfinite(row.low) and np.isfinite(row.high)):
        return "undecided"
    meets = row.low <= row.predicted_high + TOLERANCE and row.high >= row.predicted_low - TOLERANCE
    if not meets:
        return "differs"
    return "agrees" if row.high - row.low <= WIDEST else "undecided"


def _predicted(dataset: xr.Dataset, table: pd.DataFrame) -> dict[tuple[str, str, str, str], dict[Any, Any]]:
    """(growth, optimizer, rules, field) -> (name, layer) -> (low, high)."""
    study = json.loads(dataset.attrs["settings"])
    layers = int(dataset.layer.max()) + 1
    ranges: dict[tuple[str, str, str, str], dict[Any, Any]] = {}
    for growth, optimizer, rules in table[["growth", "optimizer", "rules"]].drop_duplicates().itertuples(index=False):
        found = list(_predictions(study, growth, optimizer, rules, layers))
        for field in Prediction._fields[:-1]:
            each = [getattr(prediction, field) for prediction in found]
            if field in ("rms", "weight"):
                grown = "change" if field == "rms" else "update"
                later = [getattr(prediction, grown) for prediction in found]
                ranges[growth, optimizer, rules, f"later {field}"] = {
                    key: _ends([max(one[key], two[key]) for one, two in zip(each, later, strict=True)])
                    for key in each[0]
                }
            ranges[growth, optimizer, rules, field] = {key: _ends([one[key] for one in each]) for key in each[0]}
    return ranges


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _predictions(study: dict[str, Any], growth: str, optimizer: str, rules: str, layers: int) -> Iterator[Prediction]:
    """One for every answer that the derivation leaves open."""
    experiments = study["coordinate_checks"]
    training = study["training"] | next(
        check.get("training", {})
        for check in experiments
        if (check["growth"], check["optimizer"]) == (growth, optimizer)
    )
    clippings = {"none", training["clipping"]}
    for premise in PREMISES:
        for response in get_args(Response):
            for clipping in clippings:
                yield predict(
                    rules, optimizer, growth, tied=study["model"]["tied_embeddings"], premise=premise,
                    response=response, clipping=clipping, layers=layers,
                )  # fmt: skip
