"""Where a training step's time goes on one GPU: every kernel of a recorded step, by its share of the time.

    python benchmarks/step_profile.py --width 256 --members 10

Ours, or a peer of `benchmarks/throughput.py`. What a step takes longer than its kernels, the GPU waits for its host.
"""

import argparse
from collections import defaultdict

import torch
from throughput import BATCH, Case, fla_step, our_step
from torch.profiler import ProfilerActivity, profile

STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--who", choices=("ours", "fla eager", "fla compiled"), default="ours")
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences of 512 tokens (default: %(default)s)")
    arguments = parser.parse_args()
    case = Case(arguments.who, arguments.width, arguments.members if arguments.who == "ours" else 1, arguments.batch)
    step = (our_step if case.who == "ours" else fla_step)(case)
    for index in range(10):
        step(index)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for index in range(STEPS):
            step(10 + index)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        times[event.name].append(event.device_time)
    total = sum(map(sum, times.values())) / STEPS
    print(f"{case.name}: {total / 1e3:.2f} ms of kernels a step")
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        share = sum(each) / STEPS
        if share > total / 500:
            print(f"{share / 1e3:8.3f} ms {share / total:6.1%} {len(each) / STEPS:6.1f} × {name[:110]}")


if __name__ == "__main__":
    main()
