"""The command line by hand: what it teaches, what it writes, and what it says when the input is wrong.

Commands run in this process, the last of each kind of ending in one of its own in tests/test_faults.py.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import gdn_mup
from workflow_copy import HANGS, ROOT, TINY, TINY_EXPERIMENT

from gdn_mup.errors import EXIT_MACHINE
from gdn_mup.study.datasets import open_dataset, open_job
from gdn_mup.study.plan import SECTIONS, load_study

STUDY = {
    **TINY,
    "coordinate_checks": [
        TINY_EXPERIMENT | {"optimizer": "sgd", "learning_rate": 0.1, "steps": [0, 1]},
    ],
    "multiplier_checks": [
        TINY_EXPERIMENT | {"learning_rate": 0.01, "steps": [0, 1]},
    ],
    "clipping_checks": [
        TINY_EXPERIMENT | {"learning_rates": {"log2_first": -2, "log2_last": 0}, "training": {"clip_norm": 0.5}},
    ],
    "tunings": [
        TINY_EXPERIMENT | {"optimizer": "adamw", "learning_rates": {"log2_first": -6, "log2_last": -6}, "trials": 3},
    ],
    "sweeps": [
        TINY_EXPERIMENT | {"optimizer": "adamw", "learning_rates": {"log2_first": -8, "log2_last": -6}},
    ],
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "tiny.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


@pytest.fixture(scope="module")
def made(study: Path) -> dict[str, Path]:
    """Corpus, jobs and datasets of the tiny study, made by hand."""
    folder = study.parent
    paths = {"corpus": folder / "corpus"}
    assert gdn_mup("corpus", "--study", study, "--output", paths["corpus"]).returncode == 0
    commands = {
        "lr_sweep": ("sweep", "adamw"),
        "coordinates": ("coordinates", "sgd"),
        "multiplier": ("multiplier", "adamw"),
        "clipping": ("clipping", "sgd"),
        "tuning": ("tune", "adamw"),
    }
    for kind, (command, optimizer) in commands.items():
        jobs = []
        for width in (16, 32):
            jobs.append(folder / f"{kind}{width}.nc")
            options = ("--growth", "heads", "--optimizer", optimizer, "--width", width, "--seed", 0)
            done = gdn_mup(command, "--study", study, "--corpus", paths["corpus"], *options, "--output", jobs[-1])
            assert done.returncode == 0, done.stderr
        paths[f"{kind} job"] = jobs[-1]
        paths[kind] = folder / f"{kind}.nc"
        done = gdn_mup("collect", "--study", study, "--kind", kind, "--output", paths[kind], *jobs)
        assert done.returncode == 0, done.stderr
    return paths


def test_sweeps_become_a_dataset(made: dict[str, Path]) -> None:
    dataset = open_dataset(made["lr_sweep"], "lr_sweep")
    assert dict(dataset.sizes) | {"evaluation_step": 2} == {
        **{"growth": 1, "optimizer": 1, "rules": 2, "width": 2, "seed": 1, "learning_rate": 3},
        **{"step": 4, "evaluation_step": 2},
    }
    assert np.isfinite(dataset.val_loss).all()
    base = dataset.val_loss.sel(width=16)
    np.testing.assert_array_equal(base.sel(rules="sp"), base.sel(rules="gdn_mup"))
    wide = dataset.val_loss.sel(width=32, evaluation_step=4)
    assert (wide.sel(rules="sp") != wide.sel(rules="gdn_mup")).all()
    assert (dataset.tokens == 4 * 2 * 16).all() and (dataset.seconds > 0).all()
    assert dataset.members.values.ravel().tolist() == [3, 6]  # at the base width both rule sets are one
    assert (dataset.evaluated_tokens == 2 * 1 * 2 * 16).all()


def test_coordinate_checks_become_a_dataset(made: dict[str, Path]) -> None:
    dataset = open_dataset(made["coordinates"], "coordinates")
    assert dataset.rms.sel(layer=0, quantity="state").notnull().all()
    assert (dataset.update_rms.sel(layer=0, parameter="q", step=1) > 0).all()
    assert (dataset.members == 2).all() and (dataset.diverged_members == 0).all() and (dataset.seconds > 0).all()
    assert (dataset.tokens == 1 * 2 * 16).all() and (dataset.evaluated_tokens == 3 * 4 * 16).all()


def test_multiplier_checks_become_a_dataset(made: dict[str, Path]) -> None:
    dataset = open_dataset(made["multiplier"], "multiplier")
    np.testing.assert_allclose(dataset.multiplier.sel(width=32), 32**0.5)
    assert (dataset.gradient_change.sel(epsilon=0) < 1e-12).all()
    assert (dataset.gradient_change.sel(epsilon=1e-5) > 1e-6).all()
    assert (dataset.members == 2 * 2 * 2 * 2 * 3).all()  # with and without; rules, inits, kernel scales, ε
    assert (dataset.tokens == (1 * 2 + 2 * 4) * 16).all() and (dataset.diverged_members == 0).all()


def test_clipping_checks_become_a_dataset(made: dict[str, Path]) -> None:
    dataset = open_dataset(made["clipping"], "clipping")
    assert dataset.val_loss.dims[-3:] == ("clipping", "learning_rate", "evaluation_step")
    none, raw, invariant = (
        dataset.sel(clipping=name, rules="gdn_mup") for name in ("none", "global_norm", "width_invariant_norm")
    )
    np.testing.assert_allclose(none.grad_norm.sel(step=1), raw.grad_norm.sel(step=1), rtol=1e-6)
    assert (none.grad_norm.sel(step=1) > 0.5).all()  # clipping acts, so that what follows is another
    assert (none.grad_norm.sel(step=3) != raw.grad_norm.sel(step=3)).all()
    np.testing.assert_array_equal(raw.grad_norm.sel(width=16), invariant.grad_norm.sel(width=16))
    at_init = (
        dataset.grad_norm.sel(width=32, step=1, clipping=name) for name in ("global_norm", "width_invariant_norm")
    )
    ratio = next(at_init) / next(at_init)
    assert (ratio.sel(rules="gdn_mup") > 1.02).all()  # the readout weighs half
    np.testing.assert_allclose(ratio.sel(rules="sp"), 1, rtol=1e-6)
    assert (dataset.tokens == 4 * 2 * 16).all() and (dataset.seconds > 0).all()
    assert dataset.members.values.ravel().tolist() == [9, 18]


def test_searches_become_a_dataset(made: dict[str, Path]) -> None:
    dataset = open_dataset(made["tuning"], "tuning").squeeze(["growth", "optimizer", "seed"], drop=True)
    assert dict(dataset.final_loss.sizes) == {"rules": 2, "width": 2, "trial": 3, "learning_rate": 1}
    assert np.isfinite(dataset.final_loss).all() and (dataset.diverged == 0).all()
    # Rule sets coincide at the base width; every other model is one of its own.
    assert [len(np.unique(dataset.final_loss.sel(width=width))) for width in (16, 32)] == [3, 6]
    assert (dataset.multipliers.sel(width=16) == dataset.multipliers.sel(width=32)).all()
    # Trial 0 is what a sweep trains at that learning rate.
    swept = open_dataset(made["lr_sweep"], "lr_sweep").val_loss.squeeze(drop=True)
    untuned = dataset.final_loss.sel(trial=0).squeeze(drop=True)
    np.testing.assert_allclose(untuned, swept.sel(learning_rate=2.0**-6, evaluation_step=4), rtol=1e-5)


@pytest.mark.parametrize("kind", SECTIONS)
def test_job_files_say_where_they_come_from(made: dict[str, Path], kind: str) -> None:
    job = open_job(made[f"{kind} job"], kind)  # type: ignore[arg-type]
    for attribute in ("commit", "settings", "settings_hash", "versions", "device", "corpus_sha256", "created"):
        assert job.attrs[attribute], attribute
    assert all(variable.attrs["long_name"] and variable.attrs["units"] for variable in job.variables.values())


def test_the_same_job_gives_the_same_bits_and_imports_no_compiler(
    made: dict[str, Path], study: Path, tmp_path: Path
) -> None:
    """torch._dynamo, which torch.optim's classes import, would be two seconds of every job."""
    options = ("--growth", "heads", "--optimizer", "adamw", "--width", 32, "--seed", 0, "--output", tmp_path / "j.nc")
    command = ("sweep", "--study", study, "--corpus", made["corpus"], *options)
    process = [sys.executable, "-X", "importtime", "-m", "gdn_mup", *map(str, command)]
    done = subprocess.run(process, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0
    assert "gdn_mup.training.optimizers" in done.stderr
    assert torch.cuda.is_available() or "torch._dynamo" not in done.stderr
    first, again = open_job(made["lr_sweep job"], "lr_sweep"), open_job(tmp_path / "j.nc", "lr_sweep")
    for name in ("train_loss", "val_loss", "grad_norm", "diverged"):
        np.testing.assert_array_equal(first[name], again[name])


def test_nothing_is_left_beside_the_outputs(made: dict[str, Path]) -> None:
    folder = made["lr_sweep"].parent
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_help_teaches_the_commands_in_order() -> None:
    text = gdn_mup("--help").stdout
    for word in ("snakemake --cores all", "gdn-mup plan", "gdn-mup sweep", "gdn-mup rules", "coordinates", "collect"):
        assert word in text
    assert gdn_mup("--version").stdout.strip() == "0.1.0"


def test_rules_are_shown_next_to_the_papers() -> None:
    text = gdn_mup("rules", "--growth", "head_dim").stdout
    assert "W_a, W_b" in text and "Liu" in text and "paper" in text


def test_a_plan_lists_jobs(study: Path) -> None:
    text = gdn_mup("plan", "--study", study).stdout
    assert text.count("lr_sweep") == 2 and text.count("coordinat") == 2


def test_costs_are_predicted_before_and_as_they_turn_out(made: dict[str, Path], study: Path) -> None:
    done = gdn_mup("cost", "--study", study, "--measured", made["lr_sweep"])
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    predicted = {(row[0].strip(), row[3].strip()): row[5].strip() for row in rows}
    jobs = {kind: open_dataset(made[kind], kind) for kind in SECTIONS}
    runs = {
        (kind, str(width)): str(int(job.members.sel(width=width).sum()))
        for kind, job in jobs.items()
        for width in (16, 32)
    }
    assert predicted == runs | {("total", ""): str(sum(map(int, runs.values())))}
    plan = load_study(study)
    for kind, job in jobs.items():
        tokens, evaluated = plan.tokens_of(plan.jobs(kind)[0])
        assert (job.tokens == tokens).all() and (job.evaluated_tokens == evaluated).all(), kind


def test_bad_input_is_one_line_and_exit_code_2(made: dict[str, Path], study: Path, tmp_path: Path) -> None:
    corpus = ("--study", study, "--corpus", made["corpus"], "--growth", "heads", "--optimizer", "adamw")
    nowhere = ("--study", study, "--corpus", tmp_path, "--growth", "heads", "--optimizer", "adamw")
    out = ("--output", tmp_path / "out.nc")
    cases = {
        ("plan", "--study", tmp_path / "none.yaml"): "none.yaml: no such study file",
        ("sweep", *corpus, "--width", 24, "--seed", 0, *out): "width=24 seed=0; `gdn-mup plan` lists",
        ("sweep", *corpus, "--width", 16, "--seed", 9, *out): "seed=9",
        ("sweep", *nowhere, "--width", 16, "--seed", 0, *out): "train.tokens",
        ("collect", "--study", study, "--kind", "lr", *out, made["lr_sweep job"]): "--kind: 'lr'",
        ("collect", "--study", study, "--kind", "lr_sweep", *out, tmp_path / "no.nc"): "no.nc: no such file",
        ("rules", "--growth", "depth"): "--growth: 'depth'",
    }
    for arguments, expected in cases.items():
        done = gdn_mup(*arguments)
        assert done.returncode == 2, (arguments, done)
        assert expected in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_a_width_that_does_not_exist_is_caught_before_training(study: Path, tmp_path: Path) -> None:
    wrong = yaml.safe_load(study.read_text())
    wrong["sweeps"][0]["widths"] = [16, 20]
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    done = gdn_mup("plan", "--study", tmp_path / "wrong.yaml")
    assert done.returncode == 2 and "sweeps[0].widths: width 20" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_a_gpu_where_there_is_none_says_so(study: Path, made: dict[str, Path], tmp_path: Path) -> None:
    job = ("--growth", "heads", "--optimizer", "adamw", "--width", 16, "--seed", 0, "--output", tmp_path / "job.nc")
    done = gdn_mup("sweep", "--study", study, "--corpus", made["corpus"], *job, "--device", "cuda")
    assert done.returncode == EXIT_MACHINE
    assert (
        done.stderr == "error: --device: cuda: torch finds no NVIDIA GPU here; use --device cpu, or see `nvidia-smi`\n"
    )
    assert not list(tmp_path.iterdir())


def test_warm_up_without_anything_to_do_says_what_it_does() -> None:
    done = gdn_mup("warm-up")
    assert done.returncode == 2
    assert done.stderr == "error: warm-up: nothing to do; give --study, --pack or --unpack\n"
