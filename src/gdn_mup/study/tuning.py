"""What multipliers found at the base width are worth at other widths: gains, ranks of trials, regrets.

At every width the same random trials were trained. The base width alone chooses: for each trial the learning rate,
then the trial, of the lowest mean loss over seeds. Other widths are judged at these, the *transferred* ones, against
trial 0, which has no multipliers and a learning rate chosen in the same way.

Luck can pass for a gain in two ways. At the base width the winner is judged by the losses that it won on. At other
widths the models are others, but a seed means the same batches in the same order there, and a trial that they favour
at one width they may favour at all. `Search.gain_left_out` is free of both: it judges each seed by the choice that the
base width's other seeds make.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from gdn_mup.errors import UserError
from gdn_mup.study.estimates import TAIL, Estimate, over_seeds

Array = NDArray[np.float64]

DEFAULT = 0  # the trial without multipliers


class Choice(NamedTuple):
    """A trial, and for every trial the learning rate at which it was best, as an index into the grid."""

    trial: int
    rates: NDArray[np.intp]

    def transferred(self, losses: Array) -> Array:
        """Losses [seeds, trials] at these learning rates, of losses [seeds, trials, learning rates]."""
        return losses[:, np.arange(len(self.rates)), self.rates]


def choose(losses: Array) -> Choice:
    """The best trial and learning rates by the mean over seeds of losses [seeds, trials, learning rates]."""
    mean = losses.mean(axis=0)
    return Choice(int(mean.min(axis=1).argmin()), mean.argmin(axis=1))


@dataclass(frozen=True)
class Search:
    """The random search of one (growth, optimizer, rules).

    `losses` are final held-out ones by width, [seeds, trials, learning rates], infinite where training diverged;
    `seeds` says by width which seeds were run. `multipliers` [trials × those that were tuned].
    """

    growth: str
    optimizer: str
    rules: str
    base_width: int
    learning_rates: Array
    multipliers: pd.DataFrame
    seeds: dict[int, tuple[int, ...]]
    losses: dict[int, Array]

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that were run, ascending."""
        return tuple(self.losses)

    @property
    def choice(self) -> Choice:
        """What the base width chooses."""
        return choose(self.losses[self.base_width])

    def transferred(self, width: int) -> Array:
        """Losses [seeds, trials] at the learning rates that the base width chose for each trial."""
        return self.choice.transferred(self.losses[width])

    def gain(self, width: int, trial: int | None = None) -> Estimate:
        """By how much a trial's loss lies below trial 0's, paired by seed; by default the chosen trial's."""
        losses = self.transferred(width)
        return _paired(losses[:, DEFAULT], losses[:, self.choice.trial if trial is None else trial])

    def gain_left_out(self, width: int) -> Estimate:
        """`gain`, each seed's by the choice of the base width's other seeds; NaN where it has no others."""
        base, base_seeds = self.losses[self.base_width], np.array(self.seeds[self.base_width])
        without, chosen = [], []
        for seed, losses in zip(self.seeds[width], self.losses[width], strict=True):
            others = base[base_seeds != seed]
            if len(others) == 0:
                return Estimate()
            choice = choose(others)
            (transferred,) = choice.transferred(losses[None])
            without.append(transferred[DEFAULT])
            chosen.append(transferred[choice.trial])
        return _paired(np.array(without), np.array(chosen))

    def rank_correlation(self, width: int) -> Estimate:
        """Spearman's, between the mean losses of trials at the base width and at another; diverged ones rank last.

        The interval is over trials, by Bonett and Wright's standard error of Fisher's transform (Psychometrika 65,
        2000, 23-28); NaN with fewer than five trials.
        """
        base, here = (self.transferred(w).mean(axis=0) for w in (self.base_width, width))
        if len(np.unique(base)) < 2 or len(np.unique(here)) < 2:
            return Estimate()
        value = float(stats.spearmanr(base, here).statistic)
        if len(base) < 5:
            return Estimate(value)
        centre = np.arctanh(np.clip(value, -0.999, 0.999))  # a correlation of ±1 has no finite transform
        half_width = stats.norm.isf(TAIL) * np.sqrt((1 + value**2 / 2) / (len(base) - 3))
        return Estimate.of(value, *np.tanh([centre - half_width, centre + half_width]))

    def regret(self, width: int) -> Estimate:
        """What the base width's choice costs against the best trial and learning rate at a width, paired by seed.

        The best was chosen by these very losses, so that this is more than a search there would save.
        """
        there = choose(self.losses[width])
        return _paired(
            self.transferred(width)[:, self.choice.trial], there.transferred(self.losses[width])[:, there.trial]
        )


def _paired(losses: Array, others: Array) -> Estimate:
    """Mean of losses - others over seeds; without ends if some diverged, and infinite if those are on one side."""
    diverged = not np.isfinite(losses).all(), not np.isfinite(others).all()
    if any(diverged):
        return Estimate({(True, False): np.inf, (False, True): -np.inf}.get(diverged, np.nan))
    return over_seeds(losses - others)


def searches(dataset: xr.Dataset) -> list[Search]:
    """Every random search of a collected `tuning` dataset whose base width was run. Raises UserError if none was."""
    found = [
        search
        for growth in map(str, dataset.growth.values)
        for optimizer in map(str, dataset.optimizer.values)
        for rules in map(str, dataset.rules.values)
        if (search := _search(dataset, growth, optimizer, rules)) is not None
    ]
    if not found:
        raise UserError("the dataset has no search at the base width; add one under `tunings` and run it")
    return found


def _search(dataset: xr.Dataset, growth: str, optimizer: str, rules: str) -> Search | None:
    """One search; None if its base width was not run."""
    one = dataset.sel(growth=growth, optimizer=optimizer, rules=rules).transpose(
        "width", "seed", "trial", "learning_rate", ...
    )
    ran = one.diverged.notnull().values
    trials, rates = ran.any(axis=(0, 1, 3)), ran.any(axis=(0, 1, 2))
    final = one.final_loss.where(one.diverged == 0, np.inf).values[:, :, trials][..., rates].astype(np.float64)
    seeds = {int(width): ran[i].any(axis=(1, 2)) for i, width in enumerate(one.width.values) if ran[i].any()}
    base_width = int(dataset.attrs["base_width"])
    if base_width not in seeds:
        return None
    # The same in every job: those that were not run are NaN.
    multipliers = one.multipliers.max(["width", "seed"]).isel(trial=trials).to_pandas()
    widths = [int(width) for width in one.width.values]
    return Search(
        growth=growth,
        optimizer=optimizer,
        rules=rules,
        base_width=base_width,
        learning_rates=one.learning_rate.values[rates],
        multipliers=multipliers.loc[:, multipliers.nunique() > 1],
        seeds={width: tuple(map(int, one.seed.values[ran_here])) for width, ran_here in seeds.items()},
        losses={width: final[widths.index(width)][ran_here] for width, ran_here in seeds.items()},
    )


def tuning_table(dataset: xr.Dataset) -> pd.DataFrame:
    """One row per search, width and trial: loss and gain at the transferred learning rate, and its multipliers.

    Rows of the base width's choice also have the gain with each seed left out of the choice, the rank correlation of
    trials with the base width's, and the regret. Intervals are 95 %.
    """
    rows = []
    for search in searches(dataset):
        choice = search.choice
        for width in search.widths:
            loss = search.transferred(width).mean(axis=0)
            for trial in range(len(search.multipliers)):
                row = {
                    "growth": search.growth,
                    "optimizer": search.optimizer,
                    "rules": search.rules,
                    "width": width,
                    "trial": trial,
                    "chosen": trial == choice.trial,
                    "learning_rate": search.learning_rates[choice.rates[trial]],
                    "loss": loss[trial],
                    **_columns("gain", search.gain(width, trial)),
                }
                if trial == choice.trial:
                    row |= _columns("gain_left_out", search.gain_left_out(width))
                    row |= _columns("rank_correlation", search.rank_correlation(width))
                    row |= _columns("regret", search.regret(width))
                rows.append(row | search.multipliers.iloc[trial].to_dict())
    return pd.DataFrame(rows)


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), estimate.numbers, strict=True))
