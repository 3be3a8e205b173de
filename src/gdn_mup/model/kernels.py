"""Whether the kernels that this machine would use give right results."""

import importlib.metadata
import importlib.util
from functools import cache

import torch
from packaging.version import Version

from gdn_mup.errors import UserError

HOPPER = (9, 0)
FIRST_WRONG, FIRST_RIGHT = Version("3.4"), Version("3.7.1")


def check_triton(triton: str, capability: tuple[int, int], has_tilelang: bool) -> None:
    """Refuse a Triton with which fla's gated backward pass gives wrong gradients.

    On Hopper (compute capability 9.0) Triton from 3.4 to before 3.7.1 does (fla issue 640); fla goes round it
    where tilelang is installed. Raises UserError that names both cures.
    """
    version = Version(triton)
    if capability == HOPPER and FIRST_WRONG <= version < FIRST_RIGHT and not has_tilelang:
        raise UserError(
            f"triton {triton} gives wrong gradients for the gated delta rule on Hopper GPUs; "
            f"install triton>={FIRST_RIGHT} (`pip install 'gdn-mup[gpu]'`) or tilelang (`pip install tilelang`)"
        )


@cache
def check_kernels() -> None:
    """`check_triton` for this process's GPU; raises UserError too if fla is not installed."""
    if importlib.util.find_spec("fla") is None or importlib.util.find_spec("triton") is None:
        raise UserError(
            "training on a GPU needs flash-linear-attention and triton; install them with `pip install 'gdn-mup[gpu]'`"
        )
    has_tilelang = importlib.util.find_spec("tilelang") is not None
    check_triton(importlib.metadata.version("triton"), torch.cuda.get_device_capability(), has_tilelang)
