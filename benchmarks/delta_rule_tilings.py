"""How each kernel of the delta rule is best cut for each shape of heads, on one GPU: the table in `kernels/tilings.py`.

    python benchmarks/delta_rule_tilings.py [--shapes 64x64 128x128] [--json FILE] [--processes 16]

Every way to cut the work that the chip can hold is compiled (by several processes) and timed on its own; the fastest
of each kernel are put together for each length of a chunk, and the fastest chunk wins. What a way computes is
compared with what the first way computed: one that is wrong is left out, and said.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import normalize

from gdn_mup.kernels import delta_rule
from gdn_mup.kernels.delta_rule import Launch, Tiling

# K × V and rows, length: those of the studies, and those of the paper's widths 256 to 1536
SHAPES = {
    "32x32": (2560, 512), "64x64": (1280, 512), "128x128": (1280, 512), "256x256": (640, 512),
    "32x64": (1536, 1024), "64x128": (768, 1024), "128x256": (384, 1024), "192x384": (384, 1024),
}  # fmt: skip
KERNELS = ("solve", "forward", "backward_state", "backward_inputs")
REPEATS = 4


def ways(kernel: str, key_dim: int, value_dim: int) -> Iterator[Launch]:
    """How a kernel could cut its work."""
    keys = max(16, triton.next_power_of_2(key_dim))
    values = [size for size in (16, 32, 64, 128) if size <= max(16, triton.next_power_of_2(value_dim))]
    if kernel == "solve":
        yield from (Launch(0, warps) for warps in (2, 4, 8))
    elif kernel == "backward_inputs":
        parts = [size for size in (32, 64, 128) if size <= keys and size <= max(64, key_dim)]
        for each, part, warps, stages in itertools.product(values[-2:], parts, (4, 8), (2, 3)):
            yield Launch(each, warps, stages, part)
    else:
        for each, warps, stages in itertools.product(values[-3:], (4, 8), (2, 3, 4)):
            if keys * each <= 2048 * warps:  # the state's elements
                yield Launch(each, warps, stages)


def inputs(shape: str) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    (key_dim, value_dim), (rows, length) = sizes(shape), SHAPES[shape]

    def normal(*last: int) -> Tensor:
        return torch.randn(rows, length, *last, device="cuda", generator=generator)

    q, k = (normalize(normal(key_dim), dim=-1).bfloat16() for _ in range(2))
    v, do = normal(value_dim).bfloat16(), normal(value_dim).bfloat16()
    return {"q": q, "k": k, "v": v, "log_decay": -normal().abs() / 10, "beta": normal().sigmoid(), "do": do}


def sizes(shape: str) -> tuple[int, int]:
    key_dim, value_dim = map(int, shape.split("x"))
    return key_dim, value_dim


def run(tiling: Tiling, tensors: dict[str, Tensor]) -> tuple[Any, Any]:
    """Both ways, cut like this."""
    delta_rule.tiling_of = lambda key_dim, value_dim: tiling
    given = [tensors[name] for name in ("q", "k", "v", "log_decay", "beta")]
    o, _, saved = delta_rule.forward(*given)
    q, k, _, log_decay, beta = given
    return (o, saved), delta_rule.backward(tensors["do"], None, q, k, log_decay, beta, saved)


def compile_way(task: tuple[str, int, str, Launch]) -> str | None:
    """Compile one way of one kernel, in a process of its own; why it cannot be, or None."""
    shape, chunk, kernel, launch = task
    key_dim, value_dim = sizes(shape)
    try:
        torch.cuda.init()
        small = {name: tensor[:2] for name, tensor in _few(key_dim, value_dim).items()}
        run(with_way(default(shape, chunk), kernel, launch), small)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return None


def _few(key_dim: int, value_dim: int) -> dict[str, Tensor]:
    def zeros(*last: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(2, 512, *last, device="cuda", dtype=dtype)

    wide = {name: zeros(dtype=torch.float32) for name in ("log_decay", "beta")}
    return {"q": zeros(key_dim), "k": zeros(key_dim), "v": zeros(value_dim), "do": zeros(value_dim), **wide}


def default(shape: str, chunk: int) -> Tiling:
    """A way that always runs."""
    key_dim, value_dim = (max(16, triton.next_power_of_2(size)) for size in sizes(shape))
    usual = Launch(min(64, value_dim), 8, 2)
    return Tiling(chunk, Launch(0, 4), usual, usual, usual._replace(keys=min(64, key_dim)))


def with_way(tiling: Tiling, kernel: str, launch: Launch) -> Tiling:
    return tiling._replace(**{kernel: launch})


def milliseconds(call: Callable[[], object]) -> float:
    """Median of a call replayed as a graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])


def kernel_times(tiling: Tiling, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Milliseconds of each of the four kernels in one pass both ways."""
    from torch.profiler import ProfilerActivity, profile

    run(tiling, tensors)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            run(tiling, tensors)
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {kernel: [] for kernel in KERNELS}
    for event in profiler.events():
        if (name := event.name.removeprefix("_")) in found:
            found[name].append(event.device_time / 1e3)
    return {kernel: statistics.median(each) for kernel, each in found.items()}


def results(outcome: tuple[Any, Any]) -> list[Tensor]:
    (o, _), gradients = outcome
    return [o, *(x for x in gradients if x is not None)]


def measure(shape: str, failed: dict[tuple[str, int, str, Launch], str]) -> dict[str, Any]:
    tensors = inputs(shape)
    reference = results(run(default(shape, 32), tensors))
    best: dict[str, Any] = {}
    for chunk in (32, 64):
        times: dict[str, dict[Launch, float]] = {kernel: {} for kernel in KERNELS}
        for kernel in KERNELS:
            for launch in ways(kernel, *sizes(shape)):
                if (shape, chunk, kernel, launch) in failed:
                    continue
                tiling = with_way(default(shape, chunk), kernel, launch)
                found = results(run(tiling, tensors))
                off = max(
                    float((x.float() - y.float()).norm() / y.float().norm())
                    for x, y in zip(found, reference, strict=True)
                )
                if not off < 1.2e-2:  # between two ways, each right to 8e-3
                    print(f"{shape} chunk {chunk} {kernel} {launch}: wrong by {off:.1e}", flush=True)
                    continue
                times[kernel][launch] = kernel_times(tiling, tensors)[kernel]
        if not all(times.values()):
            continue
        chosen = {kernel: min(each, key=each.__getitem__) for kernel, each in times.items()}
        tiling = Tiling(chunk, **chosen)
        total = milliseconds(lambda tiling=tiling: run(tiling, tensors))
        for kernel, each in times.items():
            ranked = sorted(each.items(), key=lambda item: item[1])[:3]
            print(f"{shape} chunk {chunk} {kernel}: " + ", ".join(f"{t:.3f} {tuple(w)}" for w, t in ranked), flush=True)
        print(f"{shape} chunk {chunk}: {total:.3f} ms both ways", flush=True)
        if not best or total < best["both_ms"]:
            best = {
                "both_ms": round(total, 3),
                "tiling": tiling,
                "kernels_ms": {k: round(times[k][w], 3) for k, w in chosen.items()},
            }
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int, default=16)
    arguments = parser.parse_args()
    tasks = [
        (shape, chunk, kernel, launch)
        for shape in arguments.shapes
        for chunk in (32, 64)
        for kernel in KERNELS
        for launch in ways(kernel, *sizes(shape))
    ]
    with ProcessPoolExecutor(arguments.processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        outcomes = dict(zip(tasks, pool.map(compile_way, tasks, chunksize=4), strict=True))
    failed = {task: why for task, why in outcomes.items() if why}
    print(f"{len(tasks)} ways, {len(failed)} do not run", file=sys.stderr, flush=True)
    found = {shape: measure(shape, failed) for shape in arguments.shapes}
    for shape, best in found.items():
        print(f"    ({shape.replace('x', ', ')}): {best['tiling']},  # {best['both_ms']} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "shapes": found}, indent=1))


if __name__ == "__main__":
    main()
