"""Whether the kernels that this machine would use give right results."""

import importlib.metadata
import importlib.util
from functools import cache

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import normalize

from gdn_mup.errors import MachineError, UserError

HOPPER = (9, 0)
FIRST_WRONG, FIRST_RIGHT = Version("3.4"), Version("3.7.1")

LARGEST_HEAD_DIM = 256  # K: of a larger one a chunk's rows no longer fit in a GPU's registers

RESULTS = ("o", "dq", "dk", "dv", "dlog_decay", "dbeta")
TOLERANCE = 1.5e-2  # relative, by norm; bf16 products give 2e-3 to 8e-3


def check_triton(triton: str, capability: tuple[int, int], has_tilelang: bool) -> None:
    """Refuse a Triton with which fla's gated backward pass gives wrong gradients.

    On Hopper (compute capability 9.0) Triton from 3.4 to before 3.7.1 does (fla issue 640); fla goes round it
    where tilelang is installed. Raises MachineError that names both cures.
    """
    version = Version(triton)
    if capability == HOPPER and FIRST_WRONG <= version < FIRST_RIGHT and not has_tilelang:
        raise MachineError(
            f"triton {triton} gives wrong gradients for the gated delta rule on Hopper GPUs; "
            f"install triton>={FIRST_RIGHT} (`pip install 'gdn-mup[gpu]'`) or tilelang (`pip install tilelang`)"
        )


@cache
def check_kernels() -> None:
    """`check_triton` for fla on this process's GPU; raises MachineError too if fla is not installed."""
    if importlib.util.find_spec("fla") is None or importlib.util.find_spec("triton") is None:
        raise MachineError(
            "training on a GPU needs flash-linear-attention and triton; install them with `pip install 'gdn-mup[gpu]'`"
        )
    has_tilelang = importlib.util.find_spec("tilelang") is not None
    check_triton(importlib.metadata.version("triton"), torch.cuda.get_device_capability(), has_tilelang)


def check_head_dim(width: int, head_dim: int) -> None:
    """Raises UserError if a model of this width has larger heads than a GPU's kernels run."""
    if head_dim > LARGEST_HEAD_DIM:
        raise UserError(
            f"width {width}: heads of K = {head_dim}: the GPU's kernels run at most {LARGEST_HEAD_DIM}; "
            "grow by `heads`, start from a smaller model.head_dim, or use --device cpu"
        )


@cache
def check_delta_rule(
    key_dim: int,
    value_dim: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 1056,
    length: int = 512,
) -> dict[str, float]:
    """Relative differences of the delta rule's output and gradients from PyTorch's float32 on the same device.

    A version of Triton can compile kernels that run and are wrong: from 3.4 to before 3.7.1 fla's gated backward is
    on Hopper (fla issue 640). Some are wrong only when the chip is full, which 1056 rows see to. Raises
    MachineError, which names the version and the cure, if any difference exceeds 1.5 %.
    """
    from gdn_mup.model.delta_rule import gated_delta_rule  # which itself asks `check_kernels`

    generator = torch.Generator().manual_seed(0)
    q, k = (normalize(torch.randn(rows, length, key_dim, generator=generator), dim=-1) for _ in range(2))
    v, grad = (torch.randn(rows, length, value_dim, generator=generator) for _ in range(2))
    log_decay, beta = (
        -0.3 * torch.rand(rows, length, generator=generator),
        torch.rand(rows, length, generator=generator),
    )
    narrow = [x.to(device, dtype) for x in (q, k, v, grad)]

    def run(backend: str) -> list[Tensor]:
        wide = backend == "torch"
        *inputs, d_o = (x.float() if wide else x for x in narrow)
        leaves = [x.detach().requires_grad_() for x in (*inputs, log_decay.to(device), beta.to(device))]
        o, _ = gated_delta_rule(*leaves, backend=backend)  # type: ignore[arg-type]
        return [o.detach(), *torch.autograd.grad(o, leaves, d_o)]

    differences = {
        name: float((found.float() - right).norm() / right.norm())
        for name, found, right in zip(RESULTS, run("triton"), run("torch"), strict=True)
    }
    wrong = {name: difference for name, difference in differences.items() if not difference <= TOLERANCE}
    if wrong:
        name, difference = max(wrong.items(), key=lambda item: item[1])
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device
        triton = importlib.metadata.version("triton")
        raise MachineError(
            f"triton {triton} computes the gated delta rule wrongly on {where} (head dims {key_dim} and {value_dim}: "
            f"{name} is off by {difference:.0%}); install triton {FIRST_RIGHT} (`pip install 'gdn-mup[gpu]'`)"
        )
    return differences
