"""`gdn-mup sweep --reuse`: what is taken over, what is trained, and what is refused."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import numpy as np
import pytest
import xarray as xr
import yaml
from command_line import gdn_mup
from reliability import ends_as
from workflow_copy import TINY, TINY_EXPERIMENT

from gdn_mup.study.datasets import open_dataset, open_job, write

# Under AdamW mup and liu_gu are the same runs.
COARSE = TINY_EXPERIMENT | {
    **{"optimizer": "adamw", "rules": ["sp", "liu_gu"], "learning_rates": {"log2_first": -8, "log2_last": -6}},
}
FINE = COARSE | {
    "rules": ["mup", "gdn_mup", "sp"],
    "learning_rates": {"log2_first": -8, "log2_last": -6, "log2_step": 0.5},
    "seeds": [0, 1],
}
CURVES = ("train_loss", "val_loss", "grad_norm", "diverged")


class Study(NamedTuple):
    """A study file and its corpus, in a folder of their own."""

    path: Path
    corpus: Path

    def sweep(
        self, output: Path, *reuse: Path, width: int = 32, seed: int = 0, growth: str = "heads"
    ) -> CompletedProcess[str]:
        """Run one job of it."""
        files = ("--study", self.path, "--corpus", self.corpus, "--output", output, "--device", "cpu")
        job = ("--growth", growth, "--optimizer", "adamw", "--width", width, "--seed", seed)
        return gdn_mup("sweep", *files, *job, *(option for path in reuse for option in ("--reuse", path)))

    def swept(self, output: Path, *reuse: Path, **job: object) -> xr.Dataset:
        """The file of one job of it."""
        done = self.sweep(output, *reuse, **job)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stderr
        return open_job(output, "lr_sweep")


def study(folder: Path, tokens: Path, sweep: dict, **sections: dict) -> Study:
    folder.mkdir(exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**TINY, **sections, "sweeps": [sweep, sweep | {"growth": "head_dim"}]}))
    return Study(path, tokens)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("coarse")
    made = study(folder, folder / "corpus", COARSE)
    assert gdn_mup("corpus", "--study", made.path, "--output", made.corpus).returncode == 0
    return made


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory, coarse: Study) -> Study:
    return study(tmp_path_factory.mktemp("fine"), coarse.corpus, FINE)


@pytest.fixture(scope="module")
def from_elsewhere(coarse: Study) -> Path:
    """A job of the coarse study as another machine could have trained it, so that its runs are told from ours."""
    path = coarse.path.with_name("job.nc")
    job = coarse.swept(path)
    job = job.assign(val_loss=job.val_loss + 1, seconds=600.0, joules=1200.0)
    job.diverged.loc["sp", 2.0**-6] = 1
    write(job.assign_attrs(device="a GPU", commit="0123456789ab"), path)
    return path


@pytest.fixture(scope="module")
def trained(fine: Study) -> xr.Dataset:
    """A job of the fine study that trained everything."""
    return fine.swept(fine.path.with_name("trained.nc"))


@pytest.fixture(scope="module")
def joined(fine: Study, from_elsewhere: Path) -> xr.Dataset:
    """The same job, with `from_elsewhere` reused."""
    return fine.swept(fine.path.with_name("joined.nc"), from_elsewhere)


def test_shared_runs_are_taken_over_and_the_others_trained(
    joined: xr.Dataset, trained: xr.Dataset, from_elsewhere: Path
) -> None:
    theirs = open_job(from_elsewhere, "lr_sweep")
    shared = {"learning_rate": theirs.learning_rate.values}
    for name in CURVES:
        for ours, row in (("sp", "sp"), ("mup", "liu_gu")):
            taken = joined[name].sel(rules=ours, **shared)
            np.testing.assert_array_equal(taken, theirs[name].sel(rules=row))
            between = {"rules": ours, "learning_rate": [2.0**-7.5, 2.0**-6.5]}
            np.testing.assert_allclose(joined[name].sel(between), trained[name].sel(between), rtol=1e-5)
        own = joined[name].sel(rules="gdn_mup")
        np.testing.assert_allclose(own, trained[name].sel(rules="gdn_mup"), rtol=1e-5)
    assert joined.members == trained.members == 15
    assert joined.diverged_members == 1 and trained.diverged_members == 0
    assert 600 < joined.seconds < 660  # all of the file's runs are among the job's


def test_a_job_that_reuses_runs_is_like_one_that_trained_them(joined: xr.Dataset, trained: xr.Dataset) -> None:
    assert list(joined.variables) == list(trained.variables)
    for name, variable in trained.variables.items():
        found = joined.variables[name]
        assert (found.dims, found.dtype, found.attrs) == (variable.dims, variable.dtype, variable.attrs), name
    xr.testing.assert_equal(joined.coords.to_dataset(), trained.coords.to_dataset())
    assert joined.attrs.keys() == trained.attrs.keys() | {"reused"}
    for name in ("title", "settings", "settings_hash", "device", "commit", "corpus_sha256"):
        assert joined.attrs[name] == trained.attrs[name], name


def test_where_runs_come_from_goes_into_the_dataset(
    joined: xr.Dataset, trained: xr.Dataset, fine: Study, from_elsewhere: Path, tmp_path: Path
) -> None:
    (source,) = json.loads(joined.attrs["reused"])
    assert source["file"] == str(from_elsewhere) and source["runs"] == 6
    assert source["device"] == "a GPU" and source["commit"] == "0123456789ab"
    again = tmp_path / "again.nc"  # what is taken over from a job that took it over itself
    fine.swept(again, fine.path.with_name("joined.nc"))
    for job in (fine.path.with_name("joined.nc"), again):
        output = tmp_path / "lr_sweep.nc"
        done = gdn_mup("collect", "--study", fine.path, "--kind", "lr_sweep", "--output", output, job)
        assert done.returncode == 0, done.stderr
        collected = open_dataset(output, "lr_sweep").attrs
        assert set(json.loads(collected["device"])) == {"a GPU", trained.attrs["device"]}
        assert "0123456789ab" in json.loads(collected["commit"])


def test_a_job_whose_runs_all_exist_trains_nothing(
    coarse: Study, from_elsewhere: Path, joined: xr.Dataset, tmp_path: Path
) -> None:
    narrow = study(tmp_path / "narrow", coarse.corpus, COARSE | {"rules": ["liu_gu"]})
    job = narrow.swept(tmp_path / "job.nc", from_elsewhere)
    theirs = open_job(from_elsewhere, "lr_sweep").sel(rules=["liu_gu"])
    xr.testing.assert_equal(job[[*CURVES]], theirs[[*CURVES]])
    assert job.seconds == 300 and job.joules == 600 and job.members == 3 and job.diverged_members == 0
    assert job.attrs["device"] == "a GPU"


def test_at_the_base_width_the_growth_mode_makes_no_difference(coarse: Study, fine: Study, tmp_path: Path) -> None:
    heads = coarse.swept(tmp_path / "heads.nc", width=16)
    job = fine.swept(tmp_path / "head_dim.nc", tmp_path / "heads.nc", width=16, growth="head_dim")
    assert json.loads(job.attrs["reused"])[0]["runs"] == 3 and job.members == 5 and job.growth == "head_dim"
    for rules in job.rules:
        np.testing.assert_array_equal(
            job.val_loss.sel(rules=rules, learning_rate=heads.learning_rate), heads.val_loss.sel(rules="sp")
        )


def test_runs_of_other_settings_are_refused(coarse: Study, fine: Study, from_elsewhere: Path, tmp_path: Path) -> None:
    def refuses(other: Study, difference: str, **job: object) -> None:
        done = other.sweep(tmp_path / "job.nc", from_elsewhere, **job)  # type: ignore[arg-type]
        ends_as(done, "runs of other settings, to be reused")
        assert f"{from_elsewhere}: {difference}" in done.stderr
        assert not (tmp_path / "job.nc").exists()

    refuses(fine, "seed: 0 is not this job's 1:", seed=1)
    refuses(fine, "width: 32 is not this job's 16:", width=16)
    refuses(fine, "growth: heads is not this job's head_dim:", growth="head_dim")
    changed = study(tmp_path / "changed", coarse.corpus, FINE | {"training": {"weight_decay": 0.1}})
    refuses(changed, "training.weight_decay: 0.0 is not this job's 0.1:")
    corpus = tmp_path / "other" / "corpus"
    other = study(tmp_path / "other", corpus, FINE, corpus=TINY["corpus"] | {"maximum_bytes": 250_000})
    assert gdn_mup("corpus", "--study", other.path, "--output", corpus).returncode == 0
    refuses(other, "corpus.maximum_bytes: 300000 is not this job's 250000:")
    sha256 = open_job(from_elsewhere, "lr_sweep").attrs["corpus_sha256"]
    for sidecar in (corpus / "train.json", corpus / "validation.json"):  # the same settings, but another text
        facts = json.loads(sidecar.read_text())
        facts["settings"]["maximum_bytes"] = TINY["corpus"]["maximum_bytes"]
        sidecar.write_text(json.dumps(facts))
    refuses(fine._replace(corpus=corpus), f"corpus_sha256: {sha256} is not this job's")


def test_a_file_that_is_no_job_of_a_sweep_is_refused(fine: Study, tmp_path: Path) -> None:
    done = fine.sweep(tmp_path / "job.nc", tmp_path / "none.nc")
    assert done.returncode == 2
    cure = "name job files or datasets of learning-rate sweeps"
    assert done.stderr == f"error: {tmp_path}/none.nc: no such file; {cure}\n"
