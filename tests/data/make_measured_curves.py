"""Mean loss curves and their noise, from sweeps that were run, for tests/loss_curves.py.

python tests/data/make_measured_curves.py lr_sweep.nc JOB.nc... > tests/data/measured_curves.csv

`lr_sweep.nc` is the collected dataset of the study `laptop` (widths 32 to 256, three seeds); the jobs are sweeps of
one seed on an H200 (SGD, width 128, 1000 steps of 16 thousand tokens; with four kinds of clipping). Curves without a
finite loss on both sides of their best one are left out.

A run's departure from the mean over seeds is taken to be a seed's own slow curve plus a noise that is the run's alone.
Half the mean square difference between departures at learning rates half an octave apart is that noise's variance plus
what the slow curve changes by; it is averaged over both neighbours. Jobs of one seed get the noise that the laptop's
SGD sweeps have on average, as far from the best learning rate.
"""

import sys
from collections import defaultdict

import numpy as np
import pandas as pd
import xarray as xr

SEED_EFFECT = {"adamw": 0.031, "sgd": 0.052}  # nats: standard deviation of a seed's mean offset near the optimum
OVER = 4.0  # octaves over which it forgets: the variogram of AdamW's departures rises to the seed effect at that rate
LEAST = 0.008  # nats: what the variogram of AdamW's departures tends to at no distance


def rows(name: str, group: str, places: np.ndarray, mean: np.ndarray, noise: np.ndarray, effect: float) -> pd.DataFrame:
    table = pd.DataFrame({"curve": name, "group": group, "log2_learning_rate": places, "loss": mean})
    return table.assign(noise=noise, seed_effect=effect)


def final(sweep: xr.Dataset) -> xr.DataArray:
    return sweep.val_loss.isel(evaluation_step=-1).where(sweep.diverged == 0)


def main(collected: str, jobs: list[str]) -> None:
    found, by_octave = [], defaultdict(list)
    dataset = xr.open_dataset(collected).isel(growth=0)
    for optimizer in ("adamw", "sgd"):
        for rules in map(str, dataset.rules.values):
            for width in map(int, dataset.width.values):
                losses = final(dataset.sel(optimizer=optimizer, rules=rules, width=width))
                losses = losses.dropna("learning_rate", how="all").transpose("seed", "learning_rate")
                if not losses.size or (rules != "sp" and width == int(dataset.base_width)):  # the same models there
                    continue
                places, values = np.log2(losses.learning_rate.values), losses.values.astype(float)
                mean = values.mean(axis=0)
                if not 0 < mean.argmin() < len(mean) - 1:
                    continue
                change = (np.diff(values - mean, axis=1) ** 2).sum(axis=0) / (len(values) - 1) / 2
                local = np.array([change[max(0, i - 1) : i + 1].mean() for i in range(len(mean))])
                slow = SEED_EFFECT[optimizer] ** 2 * (1 - np.exp(-0.5 / OVER))
                noise = np.sqrt(np.maximum(local - slow, LEAST**2))
                found.append(
                    rows(f"{optimizer} {rules} {width}", optimizer, places, mean, noise, SEED_EFFECT[optimizer])
                )
                if optimizer == "sgd":
                    for octave, one in zip(places - places[mean.argmin()], noise, strict=True):
                        by_octave[round(2 * octave)].append(one**2)
    for job in jobs:
        losses = final(xr.open_dataset(job)).sel(rules="gdn_mup").dropna("learning_rate")
        places, mean = np.log2(losses.learning_rate.values), losses.values.astype(float)
        if not 0 < mean.argmin() < len(mean) - 1 or not np.allclose(np.diff(places), 0.5):
            continue
        steps = np.clip(np.rint(2 * (places - places[mean.argmin()])), min(by_octave), max(by_octave))
        noise = np.sqrt([np.mean(by_octave[step]) for step in steps])
        found.append(rows(f"sgd h200 {job[-4]}", "h200", places, mean, noise, SEED_EFFECT["sgd"]))
    pd.concat(found).round(4).to_csv(sys.stdout, index=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
