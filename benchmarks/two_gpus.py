"""Two GPUs against one, on one machine: many jobs, one to a GPU, and one job that both GPUs train together.

    python benchmarks/two_gpus.py [--output benchmarks/records/two_gpus.json] [--only jobs | together]
    python benchmarks/two_gpus.py --rehearse      (a minute on two CPU cores: the same commands, toy sizes)

Jobs: seeds of one learning-rate sweep (width 256, 26 members of 32 × 512 tokens a step), as many at once as GPUs are
used, each in a process of its own that takes a free GPU by itself; imports, memory probes and the file are part of the
time, kernels are compiled before. The ratio is that of tokens/s, all jobs together.

Together: width 1536 of the study `paper`, 480 × 1024 tokens a step, one member, by one GPU and by two (`2xcuda`). Each
is run for two numbers of steps, and the difference counts, so that what comes before and after does not. Losses of the
longer runs are compared, step by step.

Tokens are drawn by Zipf's law with a fixed seed: speed depends on how often they occur, not on what they say.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
import xarray as xr
import yaml
from rich.console import Console
from rich.table import Table

from gdn_mup.corpus.tokens import Sidecar
from gdn_mup.study.datasets import open_job
from gdn_mup.study.plan import load_study
from gdn_mup.study.provenance import processor

ROOT = Path(__file__).parent.parent
TOKENS = 4_000_000
JOBS, JOB_STEPS = 4, 600
SHORT, LONG = 8, 24  # steps of the job that is trained together
MICRO_BATCHES = 16  # of that job's batches, shared out among those that train it: 30 sequences at a time for each


def jobs_study(rehearse: bool) -> dict[str, Any]:
    """The sweep whose seeds are the jobs."""
    study = yaml.safe_load((ROOT / "config/studies/h200.yaml").read_text())
    sweep = next(s for s in study["sweeps"] if (s["growth"], s["optimizer"]) == ("heads", "adamw"))
    training = study["training"] | {"steps": JOB_STEPS, "warmup_steps": 60}
    sweep |= {"rules": ["sp", "gdn_mup"], "widths": [128, 256], "seeds": list(range(JOBS))}
    if rehearse:
        sweep |= {"widths": [128], "seeds": [0, 1], "learning_rates": {"log2_first": -8, "log2_last": -7}}
        training |= {"steps": 10, "warmup_steps": 1, "batch_size": 2, "context_length": 32, "evaluation_batches": 1}
    return {"corpus": study["corpus"], "model": study["model"], "training": training, "sweeps": [sweep]}


def paper_study(width: int, steps: int, warmup_steps: int, log2_rate: float, rehearse: bool) -> dict[str, Any]:
    """Study `paper`, its AdamW sweep cut to one member of a width and to a few steps."""
    study = yaml.safe_load((ROOT / "config/studies/paper.yaml").read_text())
    sweep = next(s for s in study["sweeps"] if width in s["widths"] and s["optimizer"] == "adamw")
    sweep |= {"rules": ["liu_gu"], "widths": sorted({study["model"]["base_width"], width})}
    sweep |= {"learning_rates": {"log2_first": log2_rate, "log2_last": log2_rate}}
    training = study["training"] | {"steps": steps, "warmup_steps": warmup_steps, "evaluation_batches": 1}
    if rehearse:
        training |= {"batch_size": 16, "context_length": 32}
        study["corpus"]["vocabulary_size"] = 500
        study["model"]["layers"] = 1
    return {"corpus": study["corpus"], "model": study["model"], "training": training, "sweeps": [sweep]}


def together_study(rehearse: bool, steps: int) -> dict[str, Any]:
    """The paper's largest model, for a few steps of one member."""
    return paper_study(256 if rehearse else 1536, steps, warmup_steps=4, log2_rate=-8, rehearse=rehearse)


def write_study(folder: Path, name: str, study: dict[str, Any]) -> Path:
    """The study's file, and a corpus of its vocabulary beside it."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(study))
    corpus = folder / name
    corpus.mkdir()
    tokenizer = b"{}"  # nobody reads it, but a corpus has one
    (corpus / "tokenizer.json").write_bytes(tokenizer)
    vocabulary = study["corpus"]["vocabulary_size"]
    likelihood = 1 / np.arange(1, vocabulary + 1)
    drawn = np.random.default_rng(0).choice(vocabulary, TOKENS, p=likelihood / likelihood.sum()).astype("<u2")
    for part in ("train", "validation"):
        (corpus / f"{part}.tokens").write_bytes(drawn.tobytes())
        sidecar = Sidecar(
            source="Zipf's law",
            settings={},
            tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
            vocabulary_size=vocabulary,
            dtype="uint16",
            tokens=TOKENS,
            documents=1,
            bytes=TOKENS,
            sha256=hashlib.sha256(drawn.tobytes()).hexdigest(),
        )
        (corpus / f"{part}.json").write_text(sidecar.model_dump_json())
    return path


def run_job(study: Path, seed: int, device: str, processes: int = 1, micro_batches: int = 1) -> xr.Dataset:
    """The sweep of the study's last width, by one process or by several."""
    (sweep,) = yaml.safe_load(study.read_text())["sweeps"]
    output = study.with_name(f"{study.stem}-{seed}.nc")
    which = ["--growth", sweep["growth"], "--optimizer", sweep["optimizer"], "--width", sweep["widths"][-1]]
    files = ["--study", study, "--corpus", study.with_suffix(""), "--output", output]
    command = [sys.executable, "-m", "gdn_mup", "sweep", *which, *files]
    command += ["--seed", seed, "--device", device if processes == 1 else f"{processes}x{device}", "--threads", 1]
    command += ["--micro-batches", micro_batches]
    done = subprocess.run([*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    dataset = open_job(output, "lr_sweep")
    output.unlink()
    return dataset


def measure_jobs(folder: Path, device: str, rehearse: bool) -> dict[str, Any]:
    """Tokens/s of all jobs, by the number of jobs at once."""
    study = write_study(folder, "jobs", jobs_study(rehearse))
    seeds = load_study(study).sweeps[0].seeds
    if device == "cuda":
        subprocess.run([sys.executable, "-m", "gdn_mup", "warm-up", "--study", str(study)], cwd=ROOT, check=True)
    rates = {}
    for at_once in (1, 2):
        began = time.monotonic()
        with ThreadPoolExecutor(at_once) as pool:
            jobs = list(pool.map(lambda seed: run_job(study, seed, device), seeds))
        tokens = sum(float(job.tokens * job.members) for job in jobs)
        rates[at_once] = tokens / (time.monotonic() - began)
    return {
        "jobs": len(seeds),
        "members": int(jobs[0].members),
        "tokens_per_second": rates,
        "ratio": rates[2] / rates[1],
    }


def measure_together(folder: Path, device: str, rehearse: bool) -> dict[str, Any]:
    """Tokens/s of one job, by the number of processes that train it, and how far their losses are apart."""
    studies = {
        steps: write_study(folder, f"together{steps}", together_study(rehearse, steps)) for steps in (SHORT, LONG)
    }
    training = load_study(studies[LONG]).training
    done = {
        processes: {
            steps: run_job(study, 42, device, processes, MICRO_BATCHES // processes) for steps, study in studies.items()
        }
        for processes in (1, 2)
    }
    tokens = (LONG - SHORT) * training.batch_size * training.context_length
    seconds = {count: float(runs[LONG].seconds - runs[SHORT].seconds) for count, runs in done.items()}
    one, two = (done[count][LONG].train_loss.values for count in (1, 2))
    return {
        "width": int(done[1][LONG].width),
        "tokens_a_step": training.batch_size * training.context_length,
        "tokens_per_second": {count: tokens / spent for count, spent in seconds.items()},
        "ratio": seconds[1] / seconds[2],
        "largest_relative_difference_of_losses": float(np.abs(two / one - 1).max()),
    }


def benchmark(
    output: Annotated[Path, typer.Option(help="Write the record as JSON here.")] = Path(
        "benchmarks/records/two_gpus.json"
    ),
    only: Annotated[str | None, typer.Option(help="`jobs` or `together` alone; nothing is written.")] = None,
    rehearse: Annotated[bool, typer.Option(help="Toy sizes on the CPU; nothing is written.")] = False,
) -> None:
    """Time both and print the ratios."""
    device: Literal["cpu", "cuda"] = "cpu" if rehearse else "cuda"
    if device == "cuda" and torch.cuda.device_count() < 2:
        sys.exit("needs two NVIDIA GPUs that CUDA may see; try --rehearse for the same commands on a CPU")
    os.environ["OMP_NUM_THREADS"] = "1"
    record: dict[str, Any] = {
        "device": processor() if rehearse else f"2 × {torch.cuda.get_device_name()}",
        "torch": torch.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in {"jobs": measure_jobs, "together": measure_together}.items():
            if only in (None, name):
                record[name] = measure(Path(folder), device, rehearse)
    table = Table("", "one", "two", "ratio", title=f"tokens/s, {record['device']}")
    for name in ("jobs", "together"):
        if name in record:
            rates = (f"{rate:,.0f}" for rate in record[name]["tokens_per_second"].values())
            table.add_row(name, *rates, f"{record[name]['ratio']:.2f}")
    Console().print(table)
    if "together" in record:
        print(f"losses differ by at most {record['together']['largest_relative_difference_of_losses']:.1e}, relative")
    if not rehearse and only is None:
        output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(benchmark)
