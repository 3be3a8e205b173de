"""Write requirements.lock: exact versions of every package, for Linux and macOS and every supported Python.

`make lock` runs this: uv, in a throw-away environment, resolves pyproject.toml with all its extras. Versions already
locked stay unless `--upgrade` is given. Three things are then made simpler than uv leaves them:

- A marker that holds wherever the lock is used is dropped; one that amounts to a platform or a Python version says so.
- Packages of CUDA libraries are left out. torch's CUDA build names their exact versions itself, and without them the
  same file installs a CPU build of torch.
- No index and no path is written, so the lock works with whichever index pip is set up to use.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# torch has no builds for Intel Macs.
PLATFORMS = {"linux": ("x86_64", "aarch64"), "darwin": ("arm64",)}
CUDA_LIBRARIES = ("nvidia-", "cuda-")
NO_LIBRARY = "nvidia-ml-py"  # Python alone, and nothing that torch names
HEADER = """\
# Exact versions for Linux and macOS (Apple silicon), Python {first} to {last}: pip install -r requirements.lock
# Made by `make lock` from pyproject.toml; edit that, not this.
# Not here: CUDA's libraries, nvidia-* and cuda-*. torch's CUDA build names their exact versions itself, and without
# them this file installs a CPU build of torch as well.
"""


def environments() -> list[dict[str, str]]:
    """Every machine that the lock is for, as the variables that markers ask about."""
    return [
        {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "sys_platform": platform,
            "platform_system": platform.title(),
            "platform_machine": machine,
            "os_name": "posix",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "extra": "",
        }
        for python in PYTHONS
        for platform, machines in PLATFORMS.items()
        for machine in machines
    ]


def simplest(marker: Marker) -> str:
    """The shortest marker that agrees with `marker` on every environment; empty when it always holds."""
    platforms = ["", *(f"sys_platform == '{platform}'" for platform in PLATFORMS)]
    pythons = ["", *(f"python_version {op} '{python}'" for op in ("<", "==", ">=") for python in PYTHONS[1:])]
    wanted = [marker.evaluate(environment) for environment in environments()]
    for parts in sorted(itertools.product(pythons, platforms), key=lambda parts: len("".join(parts))):
        candidate = " and ".join(filter(None, parts))
        found = [not candidate or Marker(candidate).evaluate(environment) for environment in environments()]
        if found == wanted:
            return candidate
    return str(marker)


def simplified(compiled: str) -> str:
    """uv's output as the lock: one `name==version` a line, with a marker only where it decides something."""
    lines = []
    for line in compiled.splitlines():
        if not line or line.startswith("#") or (line.startswith(CUDA_LIBRARIES) and not line.startswith(NO_LIBRARY)):
            continue
        requirement = Requirement(line)
        marker = simplest(requirement.marker) if requirement.marker else ""
        requirement.marker = None
        lines.append(f"{requirement} ; {marker}" if marker else str(requirement))
    header = HEADER.format(first=PYTHONS[0], last=PYTHONS[-1])
    return header + "\n".join(lines) + "\n"


def main(*options: str) -> None:
    """Rewrite requirements.lock in the current folder; `options` go to `uv pip compile`."""
    lock = Path("requirements.lock")
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(Path(scratch) / "uv", with_pip=True)
        python = Path(scratch) / "uv" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        compiled = Path(scratch) / "compiled.txt"
        if lock.exists():
            compiled.write_text(lock.read_text())
        command = [python, "-m", "uv", "pip", "compile", "pyproject.toml", "--universal", "--all-extras"]
        command += ["--python-version", PYTHONS[0], "--no-annotate", "--no-header", "--output-file", compiled]
        environment = os.environ | {"UV_CACHE_DIR": str(Path(scratch) / "cache")}
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL, env=environment)
        lock.write_text(simplified(compiled.read_text()))
    print(f"{lock}: {sum('==' in line for line in lock.read_text().splitlines())} packages")


if __name__ == "__main__":
    main(*sys.argv[1:])
