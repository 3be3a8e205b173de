"""One job to a GPU: where a machine has several, a job takes free ones and holds them until its process ends.

Snakemake counts GPUs but does not say which. So each has a slot: a lock (flock) on a file of this machine and user,
which the kernel frees when the process ends, by SIGKILL too. Batch systems that assign GPUs themselves are left alone.
Nothing here imports torch: CUDA reads CUDA_VISIBLE_DEVICES once, when it starts.
"""

import csv
import fcntl
import glob
import logging
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gdn_mup.errors import MachineError, UserError

log = logging.getLogger(__name__)

OLDEST_GPU = (8, 0)  # compute capability: Ampere, the first with bfloat16 matrix products
FOLDER_VARIABLE = "GDN_MUP_GPU_SLOTS"
SECONDS_TO_ANSWER = 30  # of nvidia-smi, which takes one or two, a minute at most where a driver wakes many GPUs

# What a driver without nvidia-smi still shows, in containers too: a folder for each GPU, or (WSL) a device.
DRIVER_FILES = ("/proc/driver/nvidia/gpus/*", "/dev/dxg")


class Gpu(NamedTuple):
    """A GPU, or the part of one that MIG makes a device of its own."""

    device: str  # in CUDA_VISIBLE_DEVICES: an index, a UUID, or how a UUID begins
    slot: str  # the same for the same device, however it was named

    @property
    def is_part(self) -> bool:
        """Whether it is a part of a GPU: it trains jobs of its own, but none together with others."""
        return self.slot.startswith("MIG-")


class _Listed(NamedTuple):
    """A GPU as the driver lists it."""

    position: str  # its index
    uuid: str
    capability: tuple[int, ...]  # empty where the driver does not tell
    parts: tuple[str, ...]  # UUIDs of its MIG devices


def usable_gpus() -> list[Gpu]:
    """The GPUs that jobs of this process may have: those in CUDA_VISIBLE_DEVICES, or all that are new enough.

    Without an NVIDIA driver there are none, whatever CUDA_VISIBLE_DEVICES says. An index there is taken to be the
    driver's, which is CUDA's own on machines whose GPUs are alike. A GPU that MIG has divided is none, as for CUDA:
    under its own index or UUID it is its first part.

    Raises:
        MachineError: nvidia-smi does not answer.
    """
    listed = _listed()
    if not listed and not any(glob.glob(pattern) for pattern in DRIVER_FILES):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        suitable = [gpu for gpu in listed if not gpu.capability or gpu.capability >= OLDEST_GPU]
        return [Gpu(uuid, uuid) for gpu in suitable for uuid in gpu.parts or (gpu.uuid,)]
    first_part = {gpu.uuid: gpu.parts[0] for gpu in listed if gpu.parts}
    by_index = {gpu.position: gpu.uuid for gpu in listed}
    uuids = [uuid for gpu in listed for uuid in (gpu.uuid, *gpu.parts)]
    gpus: dict[str, Gpu] = {}
    for device in (entry.strip() for entry in visible.split(",")):
        if re.fullmatch(r"\d+", device):
            slot = by_index.get(device, "" if listed else f"{_allocation()}index-{device}")
        elif device.startswith(("GPU-", "MIG-")):
            slot = next((uuid for uuid in uuids if uuid.startswith(device)), "" if listed else device)
        else:
            slot = ""
        if not slot:  # as in CUDA, what follows an entry that names no device does not count
            break
        slot = first_part.get(slot, slot)
        gpus.setdefault(slot, Gpu(slot if slot.startswith("MIG-") else device, slot))
    return list(gpus.values())


def take_gpus(count: int = 1) -> list[int]:
    """Take `count` free GPUs for this process, waiting until there are so many, and let CUDA see no others.

    To be called before CUDA starts. Returns the open files whose locks hold the slots: they last until they are
    closed, here and in processes that inherit them. None are needed, and [] is returned, where the batch system has
    assigned the GPUs or where there are none.

    Raises:
        UserError: there are GPUs, but fewer than `count`, or parts of GPUs, which cannot train together; the folder of
            the slots is not this user's alone.
        MachineError: nvidia-smi does not answer.
    """
    if _assigned_by_batch_system(count):
        return []
    gpus = usable_gpus()
    if not gpus:
        return []
    if count > 1 and any(gpu.is_part for gpu in gpus):
        whole = sum(not gpu.is_part for gpu in gpus)
        if whole < count:
            raise UserError(
                f"--device: {count} GPUs are asked for, and this process may use {whole} beside parts of GPUs (MIG), "
                "which cannot train one job together; use --device cuda, one part for each job"
            )
        gpus = [gpu for gpu in gpus if not gpu.is_part]
    if len(gpus) < count:
        raise UserError(f"{count} GPUs are asked for, and this process may use {len(gpus)}; ask for {len(gpus)}")
    folder = _slot_folder()
    waiting = False
    while len(taken := _lock(folder, gpus, count)) < count:
        if not waiting:
            log.info("Waiting: %s", "every GPU is taken" if count == 1 else f"fewer than {count} GPUs are free")
            waiting = True
        time.sleep(random.uniform(0.1, 0.5))  # two that wait for two GPUs each must not stay in step
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.device for gpu in taken)
    log.info("Took GPU %s", os.environ["CUDA_VISIBLE_DEVICES"])
    return list(taken.values())


def free_gpus(slots: Sequence[int]) -> None:
    """Give back what `take_gpus` took."""
    for slot in slots:
        os.close(slot)


def _listed() -> list[_Listed]:
    """Every GPU of this machine; none without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    parts: dict[str, list[str]] = {}
    # GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-...), and below it, for each part,   MIG 1g.10gb Device 0: (UUID: MIG-...)
    for uuid in re.findall(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)", _nvidia_smi("--list-gpus")):
        if uuid.startswith("GPU-"):
            parts[uuid] = []
        elif parts:
            parts[list(parts)[-1]].append(uuid)
    rows = csv.reader(
        _nvidia_smi("--query-gpu=index,uuid,compute_cap", "--format=csv,noheader").splitlines(), skipinitialspace=True
    )
    return [
        _Listed(index, uuid, tuple(int(number) for number in re.findall(r"\d+", capability)), tuple(parts[uuid]))
        for index, uuid, capability in (row for row in rows if len(row) == 3)
        if uuid in parts
    ]


def _nvidia_smi(*arguments: str) -> str:
    """What it prints; nothing where it finds no driver.

    Raises MachineError if it does not end. It is not waited for then: a driver that hangs keeps it from being killed.
    """
    command = ["nvidia-smi", *arguments]
    asked = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace", start_new_session=True
    )
    try:
        printed, _ = asked.communicate(timeout=SECONDS_TO_ANSWER)
    except subprocess.TimeoutExpired:
        os.killpg(asked.pid, signal.SIGKILL)
        raise MachineError(
            f"nvidia-smi: no answer in {SECONDS_TO_ANSWER} seconds; see to the GPU's driver, or train on the CPU: "
            "--device cpu, or device=cpu in Snakemake's --config"
        ) from None
    return printed if asked.returncode == 0 else ""


def _assigned_by_batch_system(count: int) -> bool:
    """Whether this is a SLURM job that was given as many GPUs as are asked for, or fewer.

    A job that was given more, such as a whole node for a workflow, shares them out as a machine of its own does.
    """
    if not _allocation():
        return False
    names = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
    assigned = next((os.environ[name] for name in names if name in os.environ), None)
    return assigned is not None and len(assigned.split(",")) <= count


def _allocation() -> str:
    """A prefix for indices, which mean other devices in every SLURM job."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"slurm-{job}-" if job else ""


def _slot_folder() -> Path:
    """Where this machine keeps this user's slots.

    Not in TMPDIR or XDG_RUNTIME_DIR, which may be another folder in each session or batch job, nor in the home folder,
    which machines may share.
    """
    folder = Path(os.environ.get(FOLDER_VARIABLE) or f"/tmp/gdn-mup-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise UserError(
            f"{folder}: no folder for GPU slots ({error.strerror}); name another in {FOLDER_VARIABLE}"
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(
            f"{folder}: GPU slots need a folder that you own and nobody else may write; "
            f"remove it or name another in {FOLDER_VARIABLE}"
        )
    return folder


def _lock(folder: Path, gpus: Sequence[Gpu], count: int) -> dict[Gpu, int]:
    """Lock the first `count` free slots; all of them or none, so that nobody keeps one that another waits for."""
    taken: dict[Gpu, int] = {}
    for gpu in gpus:
        name = re.sub(r"[^\w.-]", "_", gpu.slot)
        slot = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(slot)
            continue
        os.utime(slot)  # in use: cleaners of temporary folders go by age
        taken[gpu] = slot
        if len(taken) == count:
            return taken
    free_gpus(list(taken.values()))
    return {}
