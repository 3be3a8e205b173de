"""Training throughput on one GPU: members side by side, against flash-linear-attention's model and the chip itself.

    python benchmarks/throughput.py [--json benchmarks/records/throughput.json] [--only NAME ...]
    python benchmarks/throughput.py --draw benchmarks/records/throughput.json      (no GPU needed)

Everybody trains the same language model: 4 layers, K = V = 64, heads = width / 64, MLP of 3 widths, vocabulary 4096,
batches of 32 × 512 tokens, bf16 products, AdamW with clipping. The peer is fla's `GatedDeltaNetForCausalLM` as its
users run it, one learning rate at a time: bf16 autocast, fused AdamW, eager or under torch.compile. The roofline is a
large bf16 matrix product and a device copy, measured in the same run. Each case has a process of its own, so that
memory and first steps are its own too. Tokens are drawn by Zipf's law with a fixed seed: speed depends on how often
they occur, not on what they say.

Model FLOPs are those of `gdn_mup.model.flops`. Recomputation does not count.

The delta rule alone, forward and backward: our kernels against fla's on the same tensors, laid out as fla wants them
for fla, without autograd's bookkeeping taken out of either.

Seconds to the first step run from the start of the process, imports included, to the end of the first update: `cold`
with empty caches of Triton, Inductor and TileLang, `warm` with those that the cold process left.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

STARTED = time.monotonic()
LAYERS, HEAD_DIM, VOCABULARY, BATCH, LENGTH = 4, 64, 4096, 32, 512
MODEL = {
    **{"base_width": HEAD_DIM, "layers": LAYERS, "heads": 1, "mlp_ratio": 3.0},
    **{"head_dim": HEAD_DIM, "value_head_dim": HEAD_DIM},
}
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TILELANG_CACHE_DIR": "tilelang"}


class Case(NamedTuple):
    """One measurement: `members` of one width by `who`, batches of `batch` sequences."""

    who: str  # ours, fla eager, fla compiled
    width: int
    members: int = 1
    batch: int = BATCH

    @property
    def name(self) -> str:
        return f"{self.who} width {self.width} members {self.members} batch {self.batch}"


CASES = [
    *(Case("ours", 256, members) for members in (1, 2, 5, 10, 20)),
    *(Case("ours", 1024, members) for members in (1, 2, 4, 8)),
    *(Case("ours", 256, 10, batch) for batch in (8, 16, 64)),
    *(Case(f"fla {mode}", width) for mode in ("eager", "compiled") for width in (256, 1024)),
]
FIRST_STEPS = [Case("ours", 256, 10), Case("ours", 1024, 4), Case("fla eager", 256)]


class ZipfTokens:
    """Stands in for a token file: a few batches, drawn beforehand, so that drawing is not what is measured."""

    vocabulary_size = VOCABULARY

    def __init__(self, batch: int) -> None:
        weights = 1 / (np.arange(VOCABULARY) + 2.7)
        shape = (16, batch, LENGTH + 1)
        self._batches = np.random.default_rng(0).choice(VOCABULARY, shape, p=weights / weights.sum())

    def batch(self, seed: int, step: int, batch: int, length: int) -> np.ndarray:
        return self._batches[step % len(self._batches)]


def our_step(case: Case) -> Callable[[int], object]:
    from gdn_mup.model.config import ModelSettings
    from gdn_mup.training.config import TrainingSettings
    from gdn_mup.training.gpu import GpuTrainer
    from gdn_mup.training.sweep import Member, scaled_model

    model = ModelSettings(**MODEL)
    training = TrainingSettings(steps=1000, warmup_steps=10, batch_size=case.batch, context_length=LENGTH)
    scaled = scaled_model(model, case.width, "heads", VOCABULARY, ["gdn_mup"], "adamw")
    members = [Member("gdn_mup", 2.0 ** (-6 - i / 4)) for i in range(case.members)]
    tokens = ZipfTokens(case.batch)
    trainer = GpuTrainer(members, scaled, model, training, "adamw", 0, tokens, "cuda")  # type: ignore[arg-type]
    return lambda step: trainer.step(step, 1.0)


def fla_step(case: Case) -> Callable[[int], object]:
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    torch.manual_seed(0)
    config = GatedDeltaNetConfig(
        hidden_size=case.width,
        num_hidden_layers=LAYERS,
        num_heads=case.width // HEAD_DIM,
        head_dim=HEAD_DIM,
        expand_v=1.0,
        intermediate_size=3 * case.width,
        vocab_size=VOCABULARY,
    )
    model = GatedDeltaNetForCausalLM(config).cuda().train()
    forward = torch.compile(model) if case.who == "fla compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = ZipfTokens(case.batch)

    def step(index: int) -> torch.Tensor:
        batch = torch.from_numpy(tokens.batch(0, index, case.batch, LENGTH)).cuda()[:, :-1]
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def measure(case: Case, seconds: float, only_first: bool) -> dict[str, Any]:
    """Tokens a second over all members (median of blocks of steps), memory, and seconds to the first step."""
    step = (our_step if case.who == "ours" else fla_step)(case)
    step(0)
    torch.cuda.synchronize()
    result: dict[str, Any] = {**case._asdict(), "first_step_seconds": time.monotonic() - STARTED}
    if only_first:
        return result
    for index in range(1, 6):
        step(index)
    torch.cuda.synchronize()
    began = time.monotonic()
    step(6)
    torch.cuda.synchronize()
    block = max(3, min(50, round(0.3 / (time.monotonic() - began))))
    blocks: list[float] = []
    began, index = time.monotonic(), 7
    while time.monotonic() - began < seconds or len(blocks) < 3:
        start = time.monotonic()
        for _ in range(block):
            step(index)
            index += 1
        torch.cuda.synchronize()
        blocks.append((time.monotonic() - start) / block)
    from gdn_mup.model.config import ModelSettings, model_shape
    from gdn_mup.model.flops import training_flops

    shape = model_shape(ModelSettings(**MODEL), case.width, "heads", VOCABULARY)
    tokens = case.members * case.batch * LENGTH
    step_seconds = statistics.median(blocks)
    return {
        **result,
        "step_seconds": step_seconds,
        "fastest_step_seconds": min(blocks),
        "tokens_per_second": tokens / step_seconds,
        "model_flops_per_second": tokens / step_seconds * training_flops(shape),
        "gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def roofline() -> dict[str, Any]:
    """bf16 matrix product FLOP/s and device copy bytes/s (read and written), on random numbers."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)

    def median_seconds(function: Callable[[], object]) -> float:
        times = []
        for _ in range(30):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times[5:])

    return {
        "matmul_flops_per_second": 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=out)),
        "copy_bytes_per_second": 2 * source.nbytes / median_seconds(lambda: target.copy_(source)),
    }


def delta_rules() -> dict[str, float]:
    """Milliseconds of a forward and a backward pass of the delta rule at width 256 with ten members."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from torch.nn.functional import normalize

    from gdn_mup.model.delta_rule import gated_delta_rule

    sequences, heads = 10 * BATCH, 256 // HEAD_DIM
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(sequences, LENGTH, heads, *shape, device="cuda", generator=generator)

    q, k = (normalize(normal(HEAD_DIM), dim=-1).bfloat16() for _ in range(2))
    v, grad = normal(HEAD_DIM).bfloat16(), normal(HEAD_DIM).bfloat16()
    log_decay, beta = -normal().abs() / 10, normal().sigmoid()

    def folded(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(0, 1).contiguous()

    def milliseconds(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], grad: torch.Tensor) -> float:
        leaves = [x.detach().requires_grad_() for x in tensors]
        times = []
        for _ in range(30):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            torch.autograd.grad(function(*leaves), leaves, grad)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times[10:])

    inputs = [q, k, v, log_decay, beta]
    return {
        "ours": milliseconds(
            lambda *x: gated_delta_rule(*x, backend="triton")[0], [folded(x) for x in inputs], folded(grad)
        ),
        "fla": milliseconds(lambda *x: chunk_gated_delta_rule(*x, scale=1.0)[0], inputs, grad),
    }


def in_own_process(case: Case, seconds: float, only_first: bool = False, caches: Path | None = None) -> dict[str, Any]:
    """`measure` in a process of its own; a case that fails is reported with its last line and skipped."""
    first = ["--first-step"] if only_first else []
    return {**case._asdict(), **_run("--case", json.dumps(case), "--seconds", str(seconds), *first, caches=caches)}


def _run(*arguments: str, caches: Path | None = None) -> dict[str, Any]:
    """What this script prints for these arguments, in a process of its own, or the last line of its complaint."""
    environment = os.environ | ({name: str(caches / folder) for name, folder in CACHES.items()} if caches else {})
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(record: dict[str, Any]) -> str:
    """The record in markdown."""
    peers = {
        case["width"]: case["tokens_per_second"]
        for case in record["cases"]
        if case["who"] == "fla eager" and "failed" not in case
    }
    peak = record["roofline"]["matmul_flops_per_second"]
    ceilings = f"{peak / 1e12:.0f} TFLOP/s bf16 matrix product"
    ceilings += f", {record['roofline']['copy_bytes_per_second'] / 1e12:.2f} TB/s copy"
    lines = [
        f"{record['device']}; torch {record['torch']}, triton {record['triton']}, fla {record['fla']}.",
        f"Ceilings measured in the same run: {ceilings}.",
        "",
        "| | width | members | batch | tokens/s | × fla eager | model FLOP/s ÷ matmul | GiB/member | ms/step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in record["cases"]:
        head = f"| {case['who']} | {case['width']} | {case['members']} | {case['batch']} × {LENGTH} |"
        if "failed" in case:
            lines.append(f"{head} failed: {case['failed']} | | | | |")
            continue
        peer = peers.get(case["width"])
        lines.append(
            f"{head} {case['tokens_per_second'] / 1e6:.2f} M | "
            f"{case['tokens_per_second'] / peer if peer else float('nan'):.1f} | "
            f"{case['model_flops_per_second'] / peak:.0%} | {case['gib'] / case['members']:.1f} | "
            f"{1e3 * case['step_seconds']:.1f} |"
        )
    rules = record["delta_rule"]
    if "ours" in rules:
        lines += ["", "The delta rule alone, both ways, at width 256 with ten members: "]
        lines[-1] += f"{rules['ours']:.2f} ms; fla's kernels {rules['fla']:.2f} ms."
    if record["first_steps"]:
        lines += ["", "| seconds to the first step | width | members | cold | warm |", "|---|---|---|---|---|"]
    for case in record["first_steps"]:
        cold, warm = (f"{case[k]:.0f}" if isinstance(case[k], float) else str(case[k]) for k in ("cold", "warm"))
        lines.append(f"| {case['who']} | {case['width']} | {case['members']} | {cold} | {warm} |")
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any], path: Path) -> None:
    """Tokens a second and share of the matrix product's rate, against members."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="paper")
    cases = pd.DataFrame([case for case in record["cases"] if "failed" not in case and case["batch"] == BATCH])
    cases["width"] = cases["width"].astype(str)
    cases["million tokens/s, all members"] = cases["tokens_per_second"] / 1e6
    peak = record["roofline"]["matmul_flops_per_second"]
    cases["model FLOP/s ÷ matmul FLOP/s"] = cases["model_flops_per_second"] / peak
    ours = cases[cases["who"] == "ours"]
    palette = dict(zip(sorted(ours["width"].unique(), key=int), sns.color_palette("viridis", 2), strict=False))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, y in zip(axes, ours.columns[-2:], strict=True):
        sns.lineplot(ours, x="members", y=y, hue="width", palette=palette, marker="o", ax=axis, legend=axis is axes[0])
        for (who, width), peer in cases[cases["who"] != "ours"].groupby(["who", "width"]):
            style = "--" if who == "fla eager" else ":"
            axis.axhline(peer[y].iloc[0], color=palette.get(width, "gray"), linestyle=style, linewidth=1)
        axis.set(xscale="log", xticks=sorted(ours["members"].unique()), ylim=(0, None))
        axis.set_xticklabels(sorted(ours["members"].unique()))
        axis.minorticks_off()
    axes[0].set_title("a  side by side; dashed: fla eager, dotted: fla compiled, one member", fontsize=8, loc="left")
    axes[1].set_title(f"b  of an {record['device']}'s measured {peak / 1e12:.0f} TFLOP/s", fontsize=8, loc="left")
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here, and FILE's .md and .png")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring each case (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases whose name contains one of these")
    parser.add_argument(
        "--first-steps",
        choices=("all", "ours", "none"),
        default="all",
        help="whose cold and warm first steps to time; fla's takes four minutes (default: %(default)s)",
    )
    parser.add_argument("--continue", dest="go_on", action="store_true", help="measure what the --json record lacks")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw the figure and table of a record, and stop")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--first-step", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--delta-rule", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(*json.loads(arguments.case)), arguments.seconds, arguments.first_step)))
        return 0
    if arguments.delta_rule:
        print(json.dumps(delta_rules()))
        return 0
    if arguments.draw:
        record = json.loads(arguments.draw.read_text())
        arguments.draw.with_suffix(".md").write_text(table(record))
        draw(record, arguments.draw.with_suffix(".png"))
        return 0
    if not torch.cuda.is_available():
        print("error: this benchmark needs an NVIDIA GPU (--draw FILE does not)", file=sys.stderr)
        return 2

    def chosen(cases: list[Case]) -> list[Case]:
        return [case for case in cases if not arguments.only or any(part in case.name for part in arguments.only)]

    from importlib.metadata import version

    made_with = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "fla": version("flash-linear-attention"),
    }
    record: dict[str, Any] = {}
    if arguments.go_on and arguments.json and arguments.json.exists():
        record = json.loads(arguments.json.read_text())
        if before := {name: record[name] for name in made_with if record[name] != made_with[name]}:
            print(f"error: {arguments.json} was measured with {before}: leave --continue out", file=sys.stderr)
            return 2
    if not record:
        record = {**made_with, "roofline": roofline(), "cases": [], "delta_rule": {}, "first_steps": []}
        torch.cuda.empty_cache()

    def lacking(cases: list[Case], measured: list[dict[str, Any]]) -> list[Case]:
        had = [tuple(result[field] for field in Case._fields) for result in measured]
        return [case for case in chosen(cases) if case not in had]

    def keep() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")

    for case in lacking(CASES, record["cases"]):
        record["cases"].append(in_own_process(case, arguments.seconds))
        print(table({**record, "cases": record["cases"][-1:]}).splitlines()[5], flush=True)
        keep()
    if not arguments.only and not record["delta_rule"]:
        record["delta_rule"] = _run("--delta-rule")
        keep()
    for case in lacking(FIRST_STEPS, record["first_steps"]):
        if arguments.first_steps not in ("all", case.who):
            continue
        with tempfile.TemporaryDirectory() as caches:
            runs = [in_own_process(case, 0.0, only_first=True, caches=Path(caches)) for _ in range(2)]
        cold, warm = (run.get("first_step_seconds", run.get("failed")) for run in runs)
        record["first_steps"].append({**case._asdict(), "cold": cold, "warm": warm})
        keep()
    print(table(record))
    if arguments.json:
        arguments.json.with_suffix(".md").write_text(table(record))
    return 1 if any("failed" in case for case in record["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
