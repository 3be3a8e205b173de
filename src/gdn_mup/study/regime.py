"""How long models train for their size: tokens per parameter, which every caption of a study carries.

Best learning rates fall with training length, and what one parametrization gains on another shrinks (J. Bjorck et al.,
arXiv 2409.19913), so that a finding without it says little about longer runs.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gdn_mup.model.config import ModelSettings, model_shape
from gdn_mup.study.plan import Study, Sweep

if TYPE_CHECKING:  # the workflow reads studies all the time, and no dataset
    import xarray as xr


def tokens_a_run(training: Mapping[str, Any]) -> int:
    """Tokens that a run trains on."""
    return int(training["steps"] * training["batch_size"] * training["context_length"])


def parameters_at(dataset: "xr.Dataset", growth: Any, width: int) -> int:
    """Parameters of a collected dataset's model."""
    settings = json.loads(dataset.attrs["settings"])
    model = ModelSettings.model_validate(settings["model"])
    vocabulary = int(dataset.attrs.get("vocabulary_size", settings["corpus"]["vocabulary_size"]))
    return model_shape(model, width, growth, vocabulary).parameters


def regime_in_words(study: Study) -> str:
    """Tokens of a run, and how many that are per parameter at the narrowest and at the widest width of the sweeps.

    Empty if the study has no sweep.
    """
    if not study.sweeps:
        return ""
    runs = sorted({tokens_a_run(study.training_of(sweep).model_dump()) for sweep in study.sweeps})
    ratios = [(width, _ratio(study, sweep, width)) for sweep in study.sweeps for width in sweep.widths]
    (narrow, most), (wide, least) = max(ratios, key=lambda pair: pair[1]), min(ratios, key=lambda pair: pair[1])
    tokens = " or ".join(_millions(count) for count in runs)
    return (
        f"Trained on {tokens} tokens a run: {most:.2g} per parameter at width {narrow}, {least:.2g} at width {wide}. "
        "Findings hold for that; best learning rates and differences between rule sets change with longer training."
    )


def _ratio(study: Study, sweep: Sweep, width: int) -> float:
    shape = model_shape(study.model, width, sweep.growth, study.corpus.vocabulary_size)
    return tokens_a_run(study.training_of(sweep).model_dump()) / shape.parameters


def _millions(tokens: int) -> str:
    if tokens < 1e6:
        return f"{tokens:,}"
    return f"{tokens / 1e9:.3g} billion" if tokens >= 1e9 else f"{tokens / 1e6:.3g} million"
