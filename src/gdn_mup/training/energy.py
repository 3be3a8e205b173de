"""Seconds and joules that a piece of work takes, as the device counts them.

A GPU's energy is that of NVML's counter (package nvidia-ml-py), a processor's that of its packages' RAPL counters
(Intel and AMD, on Linux, where they may be read). Both count the whole device, whoever else uses it meanwhile. Where
there is no counter joules are NaN: they are never estimated.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

POWERCAP = Path("/sys/class/powercap")


class Spent(NamedTuple):
    """Wall time and energy; NaN joules where the device does not report them."""

    seconds: float
    joules: float


NOTHING = Spent(0.0, 0.0)


class Counter(NamedTuple):
    """A counter of energy that runs on by itself."""

    read: Callable[[], float]  # joules
    period: float = math.inf  # joules after which it starts again from 0


class Meter:
    """Adds up seconds and joules from where it is made, on top of what was spent before."""

    def __init__(self, device: torch.device | str, before: Spent = NOTHING) -> None:
        self._counters = energy_counters(torch.device(device))
        self._joules = before.joules if self._counters else math.nan
        self._began = time.monotonic() - before.seconds
        self._last = [counter.read() for counter in self._counters]

    def read(self) -> Spent:
        """What is spent so far. To be read more often than a counter starts again: a quarter of an hour will do."""
        for i, counter in enumerate(self._counters):
            now = counter.read()
            self._joules += now - self._last[i] + (counter.period if now < self._last[i] else 0.0)
            self._last[i] = now
        return Spent(time.monotonic() - self._began, self._joules)


def energy_counters(device: torch.device) -> list[Counter]:
    """The counters of a device; none where it has none, or this process may not read them."""
    return _nvml(device) if device.type == "cuda" else _rapl()


def _nvml(device: torch.device) -> list[Counter]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        # By its UUID: CUDA may see fewer devices than there are, and in another order.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # none of its kind, or a part of a GPU
        return []
    return [Counter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]


def _rapl() -> list[Counter]:
    counters = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        try:
            if not (zone / "name").read_text().startswith("package"):  # a part of a package, or more than the processor
                continue
            counter = Counter(
                lambda path=zone / "energy_uj": int(path.read_text()) / 1e6,  # type: ignore[misc]
                int((zone / "max_energy_range_uj").read_text()) / 1e6,
            )
            counter.read()
        except (OSError, ValueError):  # for root alone, as a rule
            return []
        counters.append(counter)
    return counters
