"""Job files become datasets, partial studies included; broken files become one line that names the cure."""

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from synthetic import in_memory, job_file, study, write_jobs

from gdn_mup.errors import UserError
from gdn_mup.study import datasets
from gdn_mup.study.plan import SECTIONS, Study


@pytest.fixture(scope="module")
def plan() -> Study:
    """Two widths and two seeds of one experiment of each kind: four small files of each."""
    small = {"growth": "heads", "optimizer": "adamw", "rules": ["sp", "mup"], "widths": [32, 64], "seeds": [0, 1]}
    return study(
        sweeps=[small | {"learning_rates": {"log2_first": -8, "log2_last": -4}}],
        coordinate_checks=[small | {"learning_rate": 0.01}],
        multiplier_checks=[small | {"learning_rate": 0.01}],
        clipping_checks=[small | {"learning_rates": {"log2_first": -8, "log2_last": -4}}],
        tunings=[small | {"learning_rates": {"log2_first": -6, "log2_last": -5}, "trials": 4}],
    )


@pytest.fixture(scope="module")
def folder(plan: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for kind in SECTIONS:
        write_jobs(plan, kind, folder)
    return folder


def job_paths(plan: Study, folder: Path, kind: str) -> list[Path]:
    return [folder / job.path for job in plan.jobs(kind)]


@pytest.mark.parametrize("kind", SECTIONS)
def test_collected_dataset_survives_the_disk(plan: Study, folder: Path, tmp_path: Path, kind: str) -> None:
    collected = datasets.collect(job_paths(plan, folder, kind), kind, plan)
    datasets.write(collected, tmp_path / "collected.nc")
    read = datasets.open_dataset(tmp_path / "collected.nc", kind)
    xr.testing.assert_equal(read, collected)
    for name in read.variables:
        assert read[name].attrs["long_name"] and read[name].attrs["units"], name
    assert read.attrs["base_width"] == 32
    assert sum(name.startswith("job_") for name in read.attrs) == 4
    assert json.loads(read.attrs["settings"])["model"]["base_width"] == 32
    assert [path.name for path in tmp_path.iterdir()] == ["collected.nc"]  # no temporary file left behind


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_dataset_gives_its_jobs_back(plan: Study, folder: Path, tmp_path: Path, kind: str) -> None:
    """As files, that are collected again and reused; a file is taken before what a dataset has of the same job."""
    paths = job_paths(plan, folder, kind)
    first, second = tmp_path / "first.nc", tmp_path / "second.nc"
    datasets.write(datasets.collect(paths, kind, plan), first)
    for path, job in zip(paths, datasets.open_jobs(first, kind), strict=True):
        expected = datasets.open_job(path, kind)
        for name, variable in expected.data_vars.items():
            np.testing.assert_array_equal(job[name], variable.astype(job[name].dtype))
        for name in {"settings_hash", "commit", "device", "created", "corpus_sha256"} & expected.attrs.keys():
            assert job.attrs[name] == expected.attrs[name]
        assert json.loads(job.attrs["settings"]) == plan.settings_of(datasets.job_of(expected, kind))
    datasets.write(datasets.collect([first], kind, plan), second)
    xr.testing.assert_identical(datasets.open_dataset(second, kind), datasets.open_dataset(first, kind))
    part = datasets.collect(paths[:1], kind, plan)
    datasets.write(part, second)
    xr.testing.assert_equal(datasets.collect([second, *paths[1:]], kind, plan), datasets.open_dataset(first, kind))


def test_values_land_at_their_labels(plan: Study, folder: Path) -> None:
    collected = datasets.collect(job_paths(plan, folder, "lr_sweep"), "lr_sweep", plan)
    assert collected.val_loss.dims == (
        *("growth", "optimizer", "rules", "width", "seed", "learning_rate", "evaluation_step"),
    )
    for job in plan.jobs("lr_sweep"):
        here = {"growth": job.growth, "optimizer": job.optimizer, "width": job.width, "seed": job.seed}
        one = collected.sel(here)
        written = job_file(plan, job)
        for name in ("train_loss", "val_loss", "diverged"):
            np.testing.assert_array_equal(one[name].values, written[name].values)
        assert one.tokens.item() == written.tokens.item()


def test_sweeps_of_different_grids_are_joined_with_nan(plan: Study) -> None:
    both = in_memory(study(), "lr_sweep")
    # Learning rate 2^-11 is AdamW's alone, 2^0 is SGD's.
    assert both.diverged.sel(optimizer="sgd", learning_rate=2.0**-11).isnull().all()
    assert both.diverged.sel(optimizer="adamw", learning_rate=1.0).isnull().all()
    assert both.diverged.sel(optimizer="sgd", learning_rate=1.0).notnull().all()


def test_partial_study_names_what_is_missing(plan: Study, folder: Path) -> None:
    paths = job_paths(plan, folder, "lr_sweep")
    collected = datasets.collect(paths[1:], "lr_sweep", plan)
    assert json.loads(collected.attrs["missing_jobs"]) == [plan.jobs("lr_sweep")[0].path]
    absent = plan.jobs("lr_sweep")[0]
    assert collected.seconds.sel(width=absent.width, seed=absent.seed).isnull().all()
    assert collected.seconds.notnull().sum() == 3


def test_base_seeds_are_missing_at_the_base_width_alone(plan: Study) -> None:
    sweep = plan.sweeps[0].model_dump(mode="json")
    more = study(sweeps=[sweep | {"base_seeds": [5, 6]}])
    run = [job_file(more, job) for job in more.jobs("lr_sweep") if job.seed < 6]
    collected = datasets.combine(run, "lr_sweep", more)
    assert json.loads(collected.attrs["missing_jobs"]) == ["jobs/lr_sweep/heads_adamw_width32_seed6.nc"]
    assert collected.seconds.notnull().sum("seed").squeeze().to_series().to_dict() == {32: 3, 64: 2}


def test_provenance_that_differs_is_kept(plan: Study) -> None:
    jobs = [job_file(plan, job) for job in plan.jobs("lr_sweep")]
    jobs[0].attrs["device"] = "gpu"
    assert json.loads(datasets.combine(jobs, "lr_sweep", plan).attrs["device"]) == ["cpu", "gpu"]


def test_job_of_other_settings_is_refused(plan: Study, folder: Path) -> None:
    changed = study(**plan.model_dump(mode="json", include=set(SECTIONS.values())), training={"steps": 80})
    path = job_paths(plan, folder, "lr_sweep")[0]
    with pytest.raises(UserError, match=rf"{path.name}: settings_hash \w+ is not the study's .*delete it"):
        datasets.collect([path], "lr_sweep", changed)


def test_job_of_another_kind_is_refused(plan: Study, folder: Path) -> None:
    path = job_paths(plan, folder, "coordinates")[0]
    with pytest.raises(UserError, match="not a lr_sweep file: it has no variable `train_loss`"):
        datasets.collect([path], "lr_sweep", plan)


def test_job_that_the_study_lacks_is_refused(plan: Study, folder: Path) -> None:
    path = next(path for path in job_paths(plan, folder, "lr_sweep") if "seed1" in path.name)
    fewer = plan.model_copy(update={"sweeps": (plan.sweeps[0].model_copy(update={"seeds": (0,)}),)})
    with pytest.raises(UserError, match=rf"{path.name}: the study has no lr_sweep job .*seed=1"):
        datasets.collect([path], "lr_sweep", fewer)


def test_same_job_twice_is_refused(plan: Study, folder: Path) -> None:
    path = job_paths(plan, folder, "lr_sweep")[0]
    with pytest.raises(UserError, match="the same job as"):
        datasets.collect([path, path], "lr_sweep", plan)


def test_jobs_of_different_corpora_are_refused(plan: Study, tmp_path: Path) -> None:
    paths = []
    for i, job in enumerate(plan.jobs("lr_sweep")[:2]):
        dataset = job_file(plan, job)
        dataset.attrs["corpus_sha256"] = str(i) * 64
        paths.append(tmp_path / f"{i}.nc")
        datasets.write(dataset, paths[-1])
    with pytest.raises(UserError, match=r"1\.nc: corpus_sha256 1+ differs from 0+ in .*0\.nc"):
        datasets.collect(paths, "lr_sweep", plan)


def test_nothing_to_collect(plan: Study) -> None:
    with pytest.raises(UserError, match="no lr_sweep job files"):
        datasets.collect([], "lr_sweep", plan)


def test_unreadable_files_are_named_with_the_cure(plan: Study, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.nc: no such file; `gdn-mup collect --kind lr_sweep` writes it"):
        datasets.open_dataset(tmp_path / "absent.nc", "lr_sweep")
    (tmp_path / "text.nc").write_text("not netCDF")
    with pytest.raises(UserError, match=r"text\.nc: not a readable netCDF-4 file"):
        datasets.open_dataset(tmp_path / "text.nc", "lr_sweep")
    job = job_paths(plan, folder, "lr_sweep")[0]
    with pytest.raises(UserError, match=r"`train_loss` has dimensions \(rules, learning_rate, step\), not"):
        datasets.open_dataset(job, "lr_sweep")


def test_failed_write_leaves_the_old_file(plan: Study, tmp_path: Path) -> None:
    path = tmp_path / "kept.nc"
    path.write_text("before")
    broken = job_file(plan, plan.jobs("lr_sweep")[0])
    broken["train_loss"].attrs["not serialisable"] = object()
    with pytest.raises(TypeError):
        datasets.write(broken, path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["kept.nc"]


def test_variable_without_description_is_refused(plan: Study) -> None:
    with pytest.raises(KeyError, match="surprise"):
        datasets.describe(xr.Dataset({"surprise": 1.0}))
