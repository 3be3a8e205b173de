"""The package as pip installs it: sdist, a wheel made from it, and only what the wheel itself asks for."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import BytesParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from workflow_copy import ROOT

from gdn_mup import __version__

pytestmark = pytest.mark.slow

TINY = """\
corpus: {maximum_bytes: 300_000, tokenizer_sample_bytes: 60_000, vocabulary_size: 260, validation_fraction: 0.3}
model: {base_width: 16, layers: 1, heads: 2, head_dim: 8, value_head_dim: 8}
training: {steps: 2, batch_size: 2, context_length: 16, warmup_steps: 1}
sweeps:
  - growth: heads
    optimizer: adamw
    rules: [sp, gdn_mup]
    widths: [16, 32]
    seeds: [0]
    learning_rates: {log2_first: -7, log2_last: -6}
"""


WITHOUT_CHECKOUT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: str | Path, cwd: Path) -> str:
    """Its output; fails with everything that it printed."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=WITHOUT_CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the sdist, as `pip install` of the sdist would: nothing else is at hand."""
    folder = tmp_path_factory.mktemp("package")
    run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder)
    source = folder / sdist.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and, linked, the packages that it says it needs, no others."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for needed in closure(wheel):
        for file in needed.files or ():
            top = file.parts[0]
            if top != ".." and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(needed.locate_file(top))))
    return python


def closure(wheel: Path) -> list[Distribution]:
    """What a wheel requires without its extras, and what that requires, as it is installed here."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        wanted = BytesParser().parsebytes(archive.read(name)).get_all("Requires-Dist", [])
    found: dict[str, Distribution] = {}
    while wanted:
        requirement = Requirement(wanted.pop())
        extras = ["", *requirement.extras]
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if requirement.name in found:
            continue
        try:
            found[requirement.name] = distribution(requirement.name)
        except PackageNotFoundError:  # a library of CUDA, which a CPU build of torch names too
            continue
        wanted += found[requirement.name].requires or []
    return list(found.values())


def test_the_sdist_holds_what_a_reader_needs_and_no_results(wheel: Path) -> None:
    (source,) = (path for path in wheel.parent.iterdir() if path.is_dir())
    for name in (
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Snakefile",
        "config/studies/laptop.yaml",
        "src/gdn_mup/cli.py",
    ):
        assert (source / name).exists(), name
    assert not (source / "site").exists() and not (source / ".venv").exists()


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packaged = {name for name in names if ".dist-info/" not in name}
    tracked = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/gdn_mup").rglob("*.py")}
    assert packaged == tracked
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_environment_has_neither_the_workflow_nor_this_checkout(python: Path, tmp_path: Path) -> None:
    for name in ("snakemake", "papermill", "seaborn", "pytest", "jupyterlab", "transformers", "tabulate"):
        done = subprocess.run([python, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True)
        assert "ModuleNotFoundError" in done.stderr, name
    where = run(python, "-c", "import gdn_mup; print(gdn_mup.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parent.parent)


def test_the_command_works_without_snakemake(python: Path, tmp_path: Path) -> None:
    assert run(python, "-m", "gdn_mup", "--version", cwd=tmp_path).strip() == __version__
    assert run(python.with_name("gdn-mup"), "--version", cwd=tmp_path).strip() == __version__
    assert "A_log, dt_bias" in run(python, "-m", "gdn_mup", "rules", cwd=tmp_path)


def test_text_becomes_a_dataset_without_snakemake(python: Path, tmp_path: Path) -> None:
    """Corpus, plan, one job for each width, and the dataset of both: every import that they need is declared."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = (python, "-m", "gdn_mup")
    study = ("--study", "tiny.yaml")
    run(*command, "corpus", *study, "--output", "corpus", cwd=tmp_path)
    assert "lr_sweep" in run(*command, "plan", *study, cwd=tmp_path)
    options = ("--corpus", "corpus", "--growth", "heads", "--optimizer", "adamw", "--seed", "0", "--device", "cpu")
    for width in ("16", "32"):
        run(*command, "sweep", *study, *options, "--width", width, "--output", f"{width}.nc", cwd=tmp_path)
    run(*command, "collect", *study, "--kind", "lr_sweep", "--output", "all.nc", "16.nc", "32.nc", cwd=tmp_path)
    widths = "import xarray; print(xarray.open_dataset('all.nc').width.values.tolist())"
    assert run(python, "-c", widths, cwd=tmp_path).strip() == "[16, 32]"


def test_the_rules_are_at_hand_for_any_module(python: Path, tmp_path: Path) -> None:
    program = (
        "from torch import nn; from gdn_mup import Scaling\n"
        "print(Scaling.between(lambda width: nn.Sequential(nn.Linear(4, width), nn.Linear(width, width)), 32, 64))"
    )
    assert "0.7071" in run(python, "-c", program, cwd=tmp_path)
