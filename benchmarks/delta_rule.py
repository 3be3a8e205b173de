"""Time the chunked PyTorch delta rule against its pure PyTorch peers, on the CPU.

    python benchmarks/delta_rule.py [--threads 2] [--repeats 9] [--json FILE]

Peers: transformers' chunked version (the one Qwen3-Next runs without kernels), fla's `naive_chunk` and its
step-by-step `naive_recurrent`. Everybody gets the same tensors, laid out [batch, T, heads, dim] as the peers want
them, so that folding the heads into our rows is part of our time. One measurement is a forward and a backward
pass to the gradients of q, k, v, log-decay and beta. Within a repeat the implementations take turns, so that a
busy machine slows all of them; the table shows medians. Before a shape is timed, outputs and gradients are compared
with `naive_recurrent`, and the benchmark fails (exit code 1) if ours differ by more than 1e-5 (relative, by norm).
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from gdn_mup.model.delta_rule import gated_delta_rule

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fla says that there is no GPU; none is needed here
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
    from transformers.models.qwen3_next import modeling_qwen3_next

# Undecorated: the decorated function hands over to fla's CUDA kernel wherever fla imports.
transformers_chunk = modeling_qwen3_next.torch_chunk_gated_delta_rule.__wrapped__

OURS, NAIVE_CHUNK, RECURRENT = "gdn_mup", "fla naive_chunk", "fla naive_recurrent"
SLOW = {NAIVE_CHUNK: 3, RECURRENT: 3}  # repeats at most: references, written to be read
TOLERANCE = 1e-5


class Shape(NamedTuple):
    """Sizes of one measurement; batch is members × sequences."""

    name: str
    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int


SHAPES = [
    Shape("reference", batch=8, length=256, heads=4, key_dim=32, value_dim=64),
    Shape("10 members × 8, 2 heads", batch=80, length=128, heads=2, key_dim=16, value_dim=16),
    Shape("10 members × 8, 8 heads", batch=80, length=128, heads=8, key_dim=16, value_dim=16),
    Shape("10 members × 8, 4 heads", batch=80, length=128, heads=4, key_dim=32, value_dim=32),
]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(shape: Shape) -> Inputs:
    """q, k, v [batch, T, heads, dim] and log_decay, beta [batch, T, heads], distributed as in a fresh model."""
    generator = torch.Generator().manual_seed(0)

    def normal(*last: int) -> Tensor:
        return torch.randn(shape.batch, shape.length, shape.heads, *last, generator=generator)

    q, k = (functional.normalize(functional.silu(normal(shape.key_dim)), dim=-1) for _ in range(2))
    v = functional.silu(normal(shape.value_dim))
    return q, k, v, -functional.softplus(normal() - 2), normal().sigmoid()


def ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    batch, heads = q.shape[0], q.shape[2]
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, log_decay, beta))
    o, _ = gated_delta_rule(*rows, scale=q.shape[-1] ** -0.5, backend="torch")
    return o.unflatten(0, (batch, heads)).transpose(1, 2)


def peer(function: Callable[..., tuple[Tensor, Tensor | None]], *names: str) -> Callable[..., Tensor]:
    """The peers order g and beta differently and name q, k, v differently: always call them by keyword."""

    def call(*inputs: Tensor) -> Tensor:
        return function(**dict(zip(names, inputs, strict=True)))[0]

    return call


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    OURS: ours,
    "transformers chunk": peer(transformers_chunk, "query", "key", "value", "g", "beta"),
    NAIVE_CHUNK: peer(naive_chunk_gated_delta_rule, "q", "k", "v", "g", "beta"),
    RECURRENT: peer(naive_recurrent_gated_delta_rule, "q", "k", "v", "g", "beta"),
}


def forward_backward(implementation: Callable[..., Tensor], inputs: Inputs, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of the five inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = implementation(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, grad)]


def largest_difference(results: list[Tensor], reference: list[Tensor]) -> float:
    """The largest relative difference, by norm, over the output and each gradient."""
    pairs = zip(results, reference, strict=True)
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


def measure(shape: Shape, repeats: int) -> dict[str, dict[str, float]]:
    """Median and fastest seconds of each implementation, and its difference from the step-by-step reference."""
    inputs = make_inputs(shape)
    grad = torch.randn_like(inputs[2])
    first = {name: forward_backward(f, inputs, grad) for name, f in IMPLEMENTATIONS.items()}  # also warms up
    differences = {name: largest_difference(result, first[RECURRENT]) for name, result in first.items()}
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for repeat in range(repeats):
        for name, implementation in IMPLEMENTATIONS.items():
            if repeat >= SLOW.get(name, repeats):
                continue
            start = time.perf_counter()
            forward_backward(implementation, inputs, grad)
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(times), "fastest": min(times), "difference": differences[name]}
        for name, times in seconds.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    console = Console()
    measured: dict[Shape, dict[str, dict[str, float]]] = {}
    for shape in SHAPES:
        results = measured[shape] = measure(shape, arguments.repeats)
        name, *sizes = shape
        table = Table(title=f"{name}: " + " ".join(f"{k} {n}" for k, n in zip("BTHKV", sizes, strict=True)))
        table.add_column("forward + backward")
        for heading in ("median ms", "fastest ms", "ours / theirs", "difference"):
            table.add_column(heading, justify="right")
        for name, result in results.items():
            table.add_row(
                name,
                f"{1e3 * result['median']:.1f}",
                f"{1e3 * result['fastest']:.1f}",
                "" if name == OURS else f"{results[OURS]['median'] / result['median']:.2f}",
                "reference" if name == RECURRENT else f"{result['difference']:.0e}",
            )
        console.print(table)

    if arguments.json:
        record = {
            "threads": arguments.threads,
            "repeats": arguments.repeats,
            "torch": torch.__version__,
            "results": [
                {**shape._asdict(), "implementation": name, **result}
                for shape, results in measured.items()
                for name, result in results.items()
            ],
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    # `not <=` rather than `>`: NaN must fail.
    wrong = [shape.name for shape, results in measured.items() if not results[OURS]["difference"] <= TOLERANCE]
    if wrong:
        console.print(f"[red]Ours differs from {RECURRENT} by more than {TOLERANCE:g} at: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
