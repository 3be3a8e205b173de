"""A copy of the workflow in a temporary folder, and Snakemake run in it: tests never touch the results of a user."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HANGS = 1800  # seconds after which a process hangs, however busy the machine is

# A corpus of real text and a model that are made and trained in seconds; and what an experiment on it needs.
TINY = {
    "corpus": {
        "maximum_bytes": 300_000,
        "tokenizer_sample_bytes": 200_000,
        "vocabulary_size": 300,
        "validation_fraction": 0.3,
    },
    "model": {"base_width": 16, "layers": 1, "heads": 2, "head_dim": 8, "value_head_dim": 8, "mlp_ratio": 2},
    "training": {"steps": 4, "warmup_steps": 1, "batch_size": 2, "context_length": 16, "evaluation_batches": 1},
}
TINY_EXPERIMENT = {"growth": "heads", "rules": ["sp", "gdn_mup"], "widths": [16, 32], "seeds": [0]}

# A study whose jobs train for seconds, so that they can be caught at it.
LONG_ENOUGH_TO_KILL = {
    **TINY,
    "training": TINY["training"] | {"steps": 600, "warmup_steps": 10},
    "sweeps": [TINY_EXPERIMENT | {"optimizer": "adamw", "learning_rates": {"log2_first": -8, "log2_last": -5}}],
}

SOURCES = (
    *("Snakefile", "config", "environment.yml", "notebooks", "profiles", "pyproject.toml", "results/reference", "src"),
    "workflow",
)


class WorkflowCopy:
    """The files that Snakemake reads, copied to `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir() and not source.is_symlink():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copy(source, folder / name, follow_symlinks=False)

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start Snakemake with its caches inside the copy; the options are those of Popen."""
        command = [sys.executable, "-m", "snakemake", "--nocolor", *arguments]
        environment = os.environ | {"XDG_CACHE_HOME": str(self.folder / ".cache")}
        return subprocess.Popen(command, cwd=self.folder, env=environment, text=True, **options)

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Snakemake to its end; standard error is part of `stdout`."""
        with self.start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
            try:
                output, _ = run.communicate(timeout=HANGS)
            except BaseException:
                run.kill()
                raise
        return subprocess.CompletedProcess(run.args, run.returncode, output)

    def planned(self, *arguments: str) -> Counter[str]:
        """How many jobs of each rule a dry run plans."""
        run = self.snakemake("--dry-run", *arguments)
        assert run.returncode == 0, run.stdout
        return job_counts(run.stdout)

    def touch(self, path: str) -> "Touched":
        """Make one file newer than every product while the `with` block lasts."""
        return Touched(self.folder / path)


class Touched:
    """Context in which a file has just been touched."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        self.before = self.path.stat()
        later = time.time() + 1
        os.utime(self.path, (later, later))

    def __exit__(self, *exception: object) -> None:
        os.utime(self.path, ns=(self.before.st_atime_ns, self.before.st_mtime_ns))


def job_counts(output: str) -> Counter[str]:
    """Snakemake's table of job counts, without `all` and `total`; empty when there is nothing to do."""
    counts: Counter[str] = Counter()
    table = re.search(r"^Job stats:\njob +count\n-+ +-+\n(.*?)^total ", output, flags=re.DOTALL | re.MULTILINE)
    if table:
        counts.update({rule: int(n) for rule, n in (row.split() for row in table[1].splitlines())})
    else:
        assert "Nothing to be done" in output, output
    del counts["all"]
    return counts
