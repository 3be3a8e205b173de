"""Where a file's numbers come from: commit, versions, device, time."""

import importlib.metadata
import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gdn_mup.study.plan import settings_hash

PACKAGES = ("gdn-mup", "torch", "triton", "flash-linear-attention", "numpy", "xarray", "tokenizers")


def provenance(settings: dict[str, Any], device: str) -> dict[str, str]:
    """Attributes for a job's file. Lists and mappings are JSON, since netCDF attributes are flat."""
    return {
        "settings": json.dumps(settings, sort_keys=True),
        "settings_hash": settings_hash(settings),
        "commit": _commit(),
        "versions": json.dumps(_versions()),
        "device": device,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The CPU as the machine names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # optional on this machine
    return versions


def _commit() -> str:
    """The commit of the code that runs, `+` if it was changed since; `unknown` outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here))
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
