"""The first 200 steps of study `paper`, of its smallest and its largest width: that they fit, and what they take.

    python benchmarks/paper_steps.py [--corpus results/h200/corpus] [--device 2xcuda] [--widths 256 --widths 1536]

Shapes, batches, optimizer and warm-up are those of the study; learning rates are warmed up over 2,000 steps, of which
these are the first, so that the updates are those of a whole run. One member trains, rule set liu_gu, at the middle of
the study's grid. The tokens are those of any corpus at hand, whose vocabulary is smaller; the model's is the study's.
"""

import json
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table
from two_gpus import MICRO_BATCHES, ROOT, run_job

from gdn_mup.corpus.tokens import Sidecar
from gdn_mup.training.devices import parse_device

STEPS = 200
PEAK = -8.0  # log₂ of the learning rate, about the middle of the study's


def first_steps(width: int) -> dict[str, Any]:
    """The study, its one sweep cut to a member and to its first steps."""
    study = yaml.safe_load((ROOT / "config/studies/paper.yaml").read_text())
    sweep = next(s for s in study["sweeps"] if width in s["widths"] and s["optimizer"] == "adamw")
    # Warm-up reaches (step + 1)/(warmup_steps + 1) of the peak: the same line, drawn to where these steps end.
    whole, part = study["training"]["warmup_steps"] + 1, STEPS
    log2_peak = PEAK + float(torch.log2(torch.tensor(part / whole)))
    sweep |= {"rules": ["liu_gu"], "widths": sorted({256, width})}
    sweep |= {"learning_rates": {"log2_first": log2_peak, "log2_last": log2_peak}}
    training = study["training"] | {"steps": STEPS, "warmup_steps": part - 1, "evaluation_batches": 1}
    return {"corpus": study["corpus"], "model": study["model"], "training": training, "sweeps": [sweep]}


def measure(
    corpus: Annotated[Path, typer.Option(help="Folder that `gdn-mup corpus` wrote.")] = Path("results/h200/corpus"),
    device: Annotated[str, typer.Option(help="As of `gdn-mup sweep`.")] = "cuda",
    widths: Annotated[list[int], typer.Option(help="Widths of the study.")] = [256, 1536],  # noqa: B006
    micro_batches: Annotated[int, typer.Option(help="Parts of a batch, over all GPUs.")] = MICRO_BATCHES,
    output: Annotated[Path, typer.Option(help="Write the record as JSON here.")] = Path(
        "benchmarks/records/paper_steps.json"
    ),
) -> None:
    """Train and print seconds, tokens/s and losses."""
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU")
    number = parse_device(device).number
    record: dict[str, Any] = {
        "device": f"{number} × {torch.cuda.get_device_name()}",
        "torch": torch.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": STEPS,
        "widths": {},
    }
    table = Table("width", "s/step", "tokens/s", "loss, first", "loss, last", title=record["device"])
    for width in widths:
        study = first_steps(width)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "first_steps.yaml"
            path.write_text(yaml.safe_dump(study))
            copy = path.with_suffix("")
            copy.mkdir()
            shutil.copy(corpus / "tokenizer.json", copy)
            for part in ("train", "validation"):
                (copy / f"{part}.tokens").symlink_to((corpus / f"{part}.tokens").resolve())
                sidecar = Sidecar.model_validate_json((corpus / f"{part}.json").read_text())
                larger = sidecar.model_copy(update={"vocabulary_size": study["corpus"]["vocabulary_size"]})
                (copy / f"{part}.json").write_text(larger.model_dump_json())
            job = run_job(path, 42, device.split("x")[-1], number, micro_batches // number)
        losses, seconds = job.train_loss.values.ravel(), float(job.seconds)
        tokens = STEPS * study["training"]["batch_size"] * study["training"]["context_length"]
        record["widths"][width] = {
            "seconds_per_step": seconds / STEPS,
            "tokens_per_second": tokens / seconds,
            "losses": [round(float(loss), 4) for loss in losses],
        }
        table.add_row(
            str(width), f"{seconds / STEPS:.2f}", f"{tokens / seconds:,.0f}", f"{losses[0]:.2f}", f"{losses[-1]:.2f}"
        )
        output.write_text(json.dumps(record, indent=2) + "\n")
    Console().print(table)


if __name__ == "__main__":
    typer.run(measure)
