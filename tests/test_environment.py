"""pyproject.toml, requirements.lock, environment.yml and what is installed say the same."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from workflow_copy import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK_LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCKED = [Requirement(line) for line in LOCK_LINES]
PEERS = [
    Requirement(line) for line in (ROOT / "requirements-peers.txt").read_text().splitlines() if not line.startswith("#")
]
WANTED = [Requirement(text) for text in PROJECT["dependencies"]] + [
    Requirement(text) for extra in PROJECT["optional-dependencies"].values() for text in extra
]


def locked_versions(name: str) -> list[Version]:
    """Every version of a package in the lock: one, or one for each range of Python versions."""
    lines = [line for line in LOCKED if canonicalize_name(line.name) == canonicalize_name(name)]
    return [Version(specifier.version) for line in lines for specifier in line.specifier]


def test_every_line_of_the_lock_is_an_exact_version():
    for requirement in LOCKED:
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), str(requirement)
        assert requirement.url is None


def test_the_lock_names_no_machine_and_leaves_the_choice_of_torch_build_open():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and "/home" not in text and "--index" not in text
    cuda = {r.name for r in LOCKED if r.name.startswith(("nvidia-", "cuda-"))}
    assert cuda == {"nvidia-ml-py"}  # no library of CUDA
    assert locked_versions("torch") == [Version("2.13.0")]
    assert "triton==3.7.1 ; sys_platform == 'linux'" in LOCK_LINES


@pytest.mark.parametrize("requirement", WANTED, ids=lambda requirement: requirement.name)
def test_the_lock_holds_what_pyproject_asks_for(requirement: Requirement):
    versions = locked_versions(requirement.name)
    assert versions, f"{requirement.name} is not in requirements.lock: run `make lock`"
    assert all(version in requirement.specifier for version in versions)


def test_what_is_installed_is_what_is_locked():
    here = [r for r in LOCKED if r.marker is None or r.marker.evaluate()]
    assert len({canonicalize_name(r.name) for r in here}) == len(here), "two versions of one package on this machine"
    different = {}
    for requirement in here:
        installed = Version(importlib.metadata.version(requirement.name))
        if Version(installed.public) not in requirement.specifier:
            different[str(requirement)] = str(installed)
    assert not different, f"run `make environment`: {different}"


def test_conda_installs_the_lock_and_this_package():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    python, pip, packages = environment["dependencies"]
    assert pip == "pip"
    assert packages == {"pip": ["-r requirements.lock", "-e ."]}
    allowed = SpecifierSet(python.removeprefix("python").strip())
    wanted = SpecifierSet(PROJECT["requires-python"])
    for minor in range(8, 20):
        assert f"3.{minor}" not in allowed or f"3.{minor}" in wanted
    header = (ROOT / "requirements.lock").read_text().splitlines()[0]
    first, last = re.search(r"Python (3\.\d+) to (3\.\d+)", header).groups()
    assert first in allowed and last in allowed
    assert f"3.{int(first[2:]) - 1}" not in allowed and f"3.{int(last[2:]) + 1}" not in allowed


def test_the_lock_resolves_nothing_twice_and_conflicts_with_nothing():
    run = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    problems = [line for line in run.stdout.splitlines() if "gdn-mup" in line or "torch" in line or "snakemake" in line]
    # Peers are installed without what they ask for, on purpose: requirements-peers.txt says why.
    problems = [line for line in problems if line.split()[0] not in {peer.name for peer in PEERS}]
    assert not problems, problems
