"""What checkpoints cost: the same training without and with them, in turns, on one GPU.

    python benchmarks/checkpoints.py [--json benchmarks/records/checkpoints.json] [--folder FOLDER]

The model is that of `benchmarks/throughput.py`. Each checkpoint's cost is the difference in training time divided by
how many there were, so it holds whatever slows training while one is written. Its share of a job is that cost over the
interval that the engine chooses.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from throughput import BATCH, LENGTH, MODEL, VOCABULARY, ZipfTokens

from gdn_mup.model.config import ModelSettings
from gdn_mup.training.config import TrainingSettings
from gdn_mup.training.gpu import GpuTrainer
from gdn_mup.training.snapshots import Checkpoints
from gdn_mup.training.sweep import Member, scaled_model, train


class Case(NamedTuple):
    """`members` of one width for so many steps, which take about half a minute."""

    width: int
    members: int
    steps: int


CASES = [Case(256, 10, 1800), Case(1024, 4, 500), Case(1024, 18, 120)]
SECONDS = 8.0  # between checkpoints here; the engine stretches it if it has to


class Tokens(ZipfTokens):
    """Also held-out batches."""

    def fixed_batches(self, count: int, batch: int, length: int) -> Any:
        return self._batches[:count]


def train_once(case: Case, checkpoint: Path | None) -> tuple[float, int, int, float]:
    """Tokens/s once it runs, checkpoints written, bytes of one, and the interval at the end."""
    model = ModelSettings(**MODEL)
    training = TrainingSettings(
        steps=case.steps, warmup_steps=10, batch_size=BATCH, context_length=LENGTH, evaluate_every=case.steps,
        evaluation_batches=1,
    )  # fmt: skip
    scaled = scaled_model(model, case.width, "heads", VOCABULARY, ["gdn_mup"], "adamw")
    members = [Member("gdn_mup", 2.0 ** (-6 - i / 8)) for i in range(case.members)]
    tokens, moments, written, sizes = Tokens(BATCH), [], [], []

    def make(group: Sequence[Member]) -> GpuTrainer:
        trainer = GpuTrainer(group, scaled, model, training, "adamw", 0, tokens, "cuda")  # type: ignore[arg-type]
        sizes.append(sum(tensor.nbytes for tensor in trainer.state().values()))
        return trainer

    save, made = Checkpoints.save, []

    def counted(self: Checkpoints, *arguments: Any) -> None:
        written.append(time.monotonic())
        made.append(self)
        save(self, *arguments)

    Checkpoints.save = counted  # type: ignore[method-assign]
    try:
        train(
            members, make, case.members, case.width, training, tokens, checkpoint=checkpoint,  # type: ignore[arg-type]
            settings_hash="benchmark", checkpoint_seconds=SECONDS, device="cuda",
            report=lambda done, status="": moments.append((time.monotonic(), done)),
        )  # fmt: skip
    finally:
        Checkpoints.save = save  # type: ignore[method-assign]
    (began, first), (ended, last) = next(m for m in moments if m[1] > case.members * 20), moments[-1]
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    interval = made[-1]._interval if made else SECONDS
    return (last - first) * BATCH * LENGTH / (ended - began), len(written), sizes[0], interval


def measure(case: Case, folder: Path) -> dict[str, Any]:
    without, with_them, counts, interval = [], [], [], 0.0
    for turn in range(3):
        rate, count, size, interval_now = train_once(case, folder / "job.checkpoint" if turn == 1 else None)
        (with_them if turn == 1 else without).append(rate)
        if turn == 1:
            counts, interval = [count], interval_now
    tokens = case.members * case.steps * BATCH * LENGTH
    base = statistics.mean(without)
    each = (tokens / with_them[0] - tokens / base) / max(counts[0], 1)
    result = {
        **case._asdict(), "gigabytes": round(size / 1e9, 2), "tokens_per_second_without": [round(x) for x in without],
        "tokens_per_second_with": round(with_them[0]), "ratio": round(with_them[0] / base, 4),
        "checkpoints": counts[0], "seconds_lost_to_each": round(each, 3),
        "share_at_default_interval": round(each / max(120.0, interval), 4),
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: a temporary folder)")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = [measure(CASES[i], Path(folder)) for i in arguments.cases]
    record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
