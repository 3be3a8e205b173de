"""Training members side by side against training them one after another, in tokens/s.

    python benchmarks/members.py [--study config/studies/laptop.yaml] [--width 64] [--members 10] [--threads 2]

Both are timed in turns, on the same batches of the study's corpus settings; a ratio of the medians is printed.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from gdn_mup.corpus.build import build_corpus
from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.study.plan import load_study
from gdn_mup.study.provenance import processor
from gdn_mup.training.sweep import Member, Trainer, scaled_model


def benchmark(
    study: Annotated[Path, typer.Option(help="Whose model, batch size and context length to use.")] = Path(
        "config/studies/laptop.yaml"
    ),
    width: Annotated[int, typer.Option(help="Width of the members.")] = 64,
    members: Annotated[int, typer.Option(help="How many learning rates.")] = 10,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option(help="Turns; the median counts.")] = 7,
    steps: Annotated[int, typer.Option(help="Updates a turn.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Write the record as JSON here too.")] = None,
) -> None:
    """Time both ways and print the ratio."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    loaded = load_study(study)
    with tempfile.TemporaryDirectory() as folder:
        build_corpus(loaded.corpus.model_copy(update={"maximum_bytes": 2_000_000}), Path.cwd(), Path(folder))
        tokens = TokenFile.open(Path(folder) / "train.tokens")
    scaled = scaled_model(loaded.model, width, "heads", tokens.vocabulary_size, ["gdn_mup"], "adamw")
    everyone = [Member("gdn_mup", 2.0**-10 * 2 ** (i / 2)) for i in range(members)]

    def trainer(of: list[Member]) -> Trainer:
        return Trainer(of, scaled, loaded.model, loaded.training, "adamw", 0, tokens)

    together, apart = trainer(everyone), [trainer([member]) for member in everyone]

    def seconds(trainers: list[Trainer]) -> float:
        began = time.perf_counter()
        for each in trainers:
            for step in range(steps):
                each.step(step, 1.0)
        return time.perf_counter() - began

    seconds([together]), seconds(apart)  # warm-up
    turns = [(seconds([together]), seconds(apart)) for _ in range(repeats)]
    side_by_side, one_by_one = (statistics.median(times) for times in zip(*turns, strict=True))
    done = members * steps * loaded.training.batch_size * loaded.training.context_length
    record = {
        "study": study.stem,
        "width": width,
        "members": members,
        "tokens_a_step": loaded.training.batch_size * loaded.training.context_length,
        "threads": threads,
        "device": processor(),
        "torch": torch.__version__,
        "side_by_side_tokens_per_second": done / side_by_side,
        "one_after_another_tokens_per_second": done / one_by_one,
        "ratio": one_by_one / side_by_side,
    }
    table = Table("training", "tokens/s", "ratio", title=f"{members} members, width {width}, {threads} threads")
    table.add_row("one after another", f"{done / one_by_one:,.0f}", "1.00")
    table.add_row("side by side", f"{done / side_by_side:,.0f}", f"{record['ratio']:.2f}")
    Console().print(table)
    if output:
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(benchmark)
