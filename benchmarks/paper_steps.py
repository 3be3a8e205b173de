"""The first 200 steps of study `paper`, of its smallest and its largest width: that they fit, and what they take.

    python benchmarks/paper_steps.py [--device 2xcuda] [--widths 256 --widths 1536]
    python benchmarks/paper_steps.py --rehearse      (a minute on two CPU cores: the same commands, toy sizes)

Shapes, batches, optimizer and warm-up are those of the study; learning rates are warmed up over 2,000 steps, of which
these are the first, so that the updates are those of a whole run. One member trains, rule set liu_gu, at about the
middle of the study's grid. Tokens are drawn by Zipf's law, as in two_gpus.py.
"""

import json
import math
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from two_gpus import MICRO_BATCHES, ROOT, paper_study, run_job, write_study

from gdn_mup.study.plan import load_study
from gdn_mup.study.provenance import processor
from gdn_mup.training.devices import parse_device

STEPS = 200
PEAK = -8.0  # log₂ of the learning rate


def first_steps(width: int, rehearse: bool) -> dict[str, Any]:
    """The study, its AdamW sweep cut to one member and to its first steps."""
    steps, whole = 4 if rehearse else STEPS, load_study(ROOT / "config/studies/paper.yaml").training.warmup_steps
    # Warm-up reaches (step + 1)/(warmup_steps + 1) of the peak: the same line, drawn to where these steps end.
    return paper_study(width, steps, steps - 1, PEAK + math.log2(steps / (whole + 1)), rehearse)


def measure(
    device: Annotated[str, typer.Option(help="As of `gdn-mup sweep`.")] = "cuda",
    widths: Annotated[list[int], typer.Option(help="Widths of the study.")] = [256, 1536],  # noqa: B006
    micro_batches: Annotated[int, typer.Option(help="Parts of a batch, over all GPUs.")] = MICRO_BATCHES,
    output: Annotated[Path, typer.Option(help="Write the record as JSON here.")] = Path(
        "benchmarks/records/paper_steps.json"
    ),
    rehearse: Annotated[bool, typer.Option(help="Toy sizes on the CPU; nothing is written.")] = False,
) -> None:
    """Train and print seconds, tokens/s and losses."""
    if not rehearse and not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU; try --rehearse for the same commands on a CPU")
    kind, number = parse_device("cpu" if rehearse else device)
    record: dict[str, Any] = {
        "device": processor() if rehearse else f"{number} × {torch.cuda.get_device_name()}",
        "torch": torch.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "widths": {},
    }
    table = Table("width", "s/step", "tokens/s", "loss, first", "loss, last", title=record["device"])
    for width in widths:
        study = first_steps(width, rehearse)
        training = study["training"]
        with tempfile.TemporaryDirectory() as folder:
            path = write_study(Path(folder), "first_steps", study)
            job = run_job(path, 42, kind, number, micro_batches // number)
        losses, seconds = job.train_loss.values.ravel(), float(job.seconds)
        tokens = training["steps"] * training["batch_size"] * training["context_length"]
        record["widths"][width] = {
            "steps": training["steps"],
            "seconds_per_step": seconds / training["steps"],
            "tokens_per_second": tokens / seconds,
            "losses": [round(float(loss), 4) for loss in losses],
        }
        rates = f"{seconds / training['steps']:.2f}", f"{tokens / seconds:,.0f}"
        table.add_row(str(width), *rates, f"{losses[0]:.3f}", f"{losses[-1]:.3f}")
        if not rehearse:  # after each, since the widest takes a quarter of an hour
            output.write_text(json.dumps(record, indent=2) + "\n")
    Console().print(table)


if __name__ == "__main__":
    typer.run(measure)
