"""One job on several devices: processes that torchrun has started train it together.

Each holds all members and takes its part of every batch. Gradients are averaged over the processes before they are
clipped, so that all take the same update and stay the same, bit for bit.
"""

import atexit
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gdn_mup.errors import UserError

PATIENCE = timedelta(days=1)  # of processes that wait for the first one, which may wait for free GPUs

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among those of its job; by default it is the only one, and nothing is exchanged."""

    rank: int = 0
    count: int = 1
    gpus: dist.ProcessGroup | None = None  # who exchanges tensors on GPUs; those on the CPU all exchange

    @property
    def leads(self) -> bool:
        """Whether it is this one that writes files and reports progress."""
        return self.rank == 0

    def share(self, sequences: Tensor) -> Tensor:
        """This process's part of sequences [..., B, T + 1]: [..., B / count, T + 1]."""
        return sequences.chunk(self.count, -2)[self.rank]

    def average(self, *tensors: Tensor) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.gpus if tensor.is_cuda else None)
                tensor.div_(self.count)

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any process."""
        if self.count == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised]

    def total(self, number: float) -> float:
        """The sum of a number over the processes."""
        return float(self._reduced(number, dist.ReduceOp.SUM))

    def smallest(self, number: int) -> int:
        """The least of a number over the processes."""
        return int(self._reduced(number, dist.ReduceOp.MIN))

    def in_memory(self, compute: Callable[[], Result]) -> Result:
        """What it computes; torch.OutOfMemoryError if any process runs out of memory, so that none waits for it."""
        if self.count == 1:
            return compute()
        try:
            result = compute()
        except torch.OutOfMemoryError:
            self.any(True)
            raise
        if self.any(False)[0]:
            raise torch.OutOfMemoryError("another process of the job ran out of memory")
        return result

    def leader_first(self, act: Callable[[], Result]) -> Result:
        """Act in the first process, and when it is done in the others."""
        if self.leads:
            result = act()
        if self.count > 1:
            dist.barrier()
        return result if self.leads else act()

    def tell(self, text: str) -> str:
        """The first process's text, in all of them."""
        if self.count == 1:
            return text
        texts = [text]
        dist.broadcast_object_list(texts)
        return texts[0]

    def with_gpus(self) -> "Processes":
        """These processes, each with a GPU of its own among those that CUDA sees, on which tensors are exchanged."""
        if self.count == 1:
            return self
        torch.cuda.set_device(self.rank)
        return replace(self, gpus=dist.new_group(backend="nccl"))

    def _reduced(self, number: float, operation: dist.ReduceOp.RedOpType) -> float:
        if self.count == 1:
            return number
        reduced = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(reduced, operation)
        return float(reduced)


ALONE = Processes()


def join_processes(wanted: int = 1) -> Processes:
    """This process among those that torchrun started with it; the only one without torchrun.

    If more are wanted than there are, the process starts anew as torchrun, which runs its command so many times.

    Raises:
        UserError: torchrun started another number of processes than are wanted, or on several machines.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 and wanted > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={wanted}"]
        os.execv(sys.executable, [sys.executable, *torchrun, "-m", "gdn_mup", *sys.argv[1:]])
    if count not in (1, wanted):
        raise UserError(f"torchrun: {count} processes: this job and its --device ask for {wanted}")
    if count == 1:
        return ALONE
    if os.environ.get("LOCAL_WORLD_SIZE") != str(count):
        raise UserError("torchrun: --nnodes: the processes of a job must be on one machine")
    # On the CPU at first: CUDA starts when it is known which GPUs the job has.
    dist.init_process_group("gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    processes = Processes(int(os.environ["RANK"]), count)
    if not processes.leads:
        logging.getLogger().setLevel(logging.ERROR)  # all say the same
    return processes
