"""The losses that the paper prints, and how far this study's agree with them.

Corpus, number of tokens and sizes differ, so losses themselves cannot be compared. What can be: how much lower or
higher each rule set ends than SP at the same multiple of the base width, and how far it falls from the base width.
"""

import json
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from gdn_mup.study.estimates import over_seeds
from gdn_mup.study.losses import best_losses
from gdn_mup.study.optimum import transfers

SOURCE = "arXiv 2606.04048"
PAPER, STUDY = "paper", "this study"

# Lowest losses over the learning rates of a sweep, in nats per token, by width. "μP" under AdamW and "theirs" under
# SGD are `liu_gu`, "original μP" is `mup`. At the base width, 256, all of them are the same model.
_WIDTHS = {"adamw": (256, 512, 1024, 1536), "sgd": (256, 512, 768, 1024)}
_LOSSES = {
    ("adamw", "sp"): (3.4525, 3.1107, 2.8613, 2.7554),
    ("adamw", "liu_gu"): (3.4525, 3.1142, 2.8593, 2.7449),
    ("sgd", "sp"): (3.3990, 3.1699, 3.1094, 3.0821),
    ("sgd", "mup"): (3.3590, 3.0667, 3.0076, 3.0407),
    ("sgd", "liu_gu"): (3.4490, 3.1606, 3.0830, 3.0345),
}


class Setting(NamedTuple):
    """What losses were trained on."""

    corpus: str
    tokens: float  # of one run
    growth: str
    layers: int
    seeds: int


# 480 sequences of 1024 tokens a step, 20 000 steps; 6 heads of growing head dim; seed 42.
PAPER_SETTING = Setting(corpus="FineWeb-Edu", tokens=480 * 1024 * 20_000, growth="head_dim", layers=8, seeds=1)

CORPUS_TITLES = {"stdlib": "Python standard library", "files": "own files", "pypi": "Python packages"}


def printed_losses() -> pd.DataFrame:
    """The paper's losses, a row per optimizer, rule set and width, as printed."""
    return pd.DataFrame(
        [
            {"optimizer": optimizer, "rules": rules, "width": width, "loss": loss}
            for (optimizer, rules), losses in _LOSSES.items()
            for width, loss in zip(_WIDTHS[optimizer], losses, strict=True)
        ]
    )


def study_setting(dataset: xr.Dataset, growth: str, optimizer: str) -> Setting:
    """What the sweeps of this study with one growth mode and optimizer were trained on."""
    settings = json.loads(dataset.attrs["settings"])
    corpus = settings["corpus"]
    here = dataset.sel(growth=growth, optimizer=optimizer)
    run = here.tokens.notnull()
    wider = run.sel(width=run.width != dataset.attrs["base_width"])
    paired = wider if wider.any() else run  # seeds of the base width alone have nothing to be compared with
    return Setting(
        corpus=corpus.get("dataset") or CORPUS_TITLES.get(corpus["source"], corpus["source"]),
        tokens=float(here.tokens.max()),
        growth=growth,
        layers=settings["model"]["layers"],
        seeds=int(paired.any("width").sum()),
    )


def loss_differences(dataset: xr.Dataset) -> pd.DataFrame:
    """Best losses less SP's at the same width and less the rule set's own at the base width: the paper's and ours.

    One row per source, growth, optimizer, rule set and width, in nats per token; `multiple` is width / base width.
    `minus_sp` is loss − SP's loss, `minus_base` loss − loss at the base width; ours are means over seeds, each seed's
    losses paired, with 95 % intervals (`*_low`, `*_high`), at the best learning rate of the mean over seeds. The paper
    has one seed and prints no errors.
    """
    return pd.concat([_differences_of_the_paper(), _differences_of(dataset)], ignore_index=True)


def _differences_of_the_paper() -> pd.DataFrame:
    printed = printed_losses()
    sp = printed[printed.rules == "sp"].set_index(["optimizer", "width"]).loss.rename("sp")
    return printed.assign(
        source=PAPER,
        growth=PAPER_SETTING.growth,
        multiple=printed.width / printed.groupby("optimizer").width.transform("min"),
        minus_sp=printed.loss - printed.join(sp, on=["optimizer", "width"]).sp,
        minus_base=printed.loss - printed.groupby(["optimizer", "rules"]).loss.transform("first"),
    ).reindex(columns=["source", "growth", "optimizer", "rules", "width", "multiple", "loss", "minus_sp", "minus_base"])


def _differences_of(dataset: xr.Dataset) -> pd.DataFrame:
    base_width = int(dataset.attrs["base_width"])
    best = {
        (sweep.growth, sweep.optimizer, sweep.rules, width): _finite(best_losses(sweep, width))
        for sweep in transfers(dataset)
        for width in sweep.widths
    }
    not_run = pd.Series(dtype=np.float64)
    rows = []
    for (growth, optimizer, rules, width), losses in best.items():
        row = {
            "source": STUDY,
            "growth": growth,
            "optimizer": optimizer,
            "rules": rules,
            "width": width,
            "multiple": width / base_width,
            "loss": losses.mean(),
        }
        others = {
            "minus_sp": best.get((growth, optimizer, "sp", width), not_run),
            "minus_base": best.get((growth, optimizer, rules, base_width), not_run),
        }
        for name, other in others.items():
            paired = (losses - other).dropna().to_numpy(np.float64)
            row[name], row[f"{name}_low"], row[f"{name}_high"] = over_seeds(paired).numbers
        rows.append(row)
    return pd.DataFrame(rows)


def _finite(losses: pd.Series) -> pd.Series:
    """Infinite losses, of training that diverges, have no differences."""
    return losses.where(np.isfinite(losses))
