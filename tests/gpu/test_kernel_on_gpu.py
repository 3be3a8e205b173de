"""The kernels behind `gated_delta_rule` on a GPU, ours and fla's, against the float64 rule on the CPU.

The first use of a (K, V) compiles and tunes fla's kernels for one to two minutes.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gdn_mup.model.delta_rule import Backend, gated_delta_rule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

BF16 = 1e-2  # relative, by norm: products of bf16 numbers, which have 8 bits (measured on an H200: 2e-3 to 8e-3)

SHAPES = [(16, 16), (32, 32), (32, 64), (64, 64), (128, 128), (256, 256)]  # (K, V) of the studies, in both growths
FLA = [(16, 16), (64, 64)]  # the peer, where it takes a minute or two to tune itself for each
CASES = [("triton", *shape) for shape in SHAPES] + [("fla", *shape) for shape in FLA]


def make_inputs(rows: int, length: int, key_dim: int, value_dim: int, strongest: float) -> list[Tensor]:
    """q, k, v, log_decay, beta in float64, with q, k and v representable in bf16."""
    generator = torch.Generator().manual_seed(rows + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = (functional.normalize(normal(rows, length, key_dim), dim=-1) for _ in range(2))
    q, k, v = (x.bfloat16().double() for x in (q, k, normal(rows, length, value_dim)))
    uniform = torch.rand(2, rows, length, generator=generator, dtype=torch.float64)
    return [q, k, v, -strongest * uniform[0], uniform[1]]


def outputs_and_gradients(inputs: list[Tensor], grad: Tensor, backend: Backend) -> list[Tensor]:
    """o, the final state, and the gradient of each input, in float64 on the CPU, where "torch" runs."""
    on_gpu = backend != "torch"
    device = "cuda" if on_gpu else "cpu"
    wide = torch.float32 if on_gpu else torch.float64
    narrow = torch.bfloat16 if on_gpu else torch.float64
    dtypes = (narrow, narrow, narrow, wide, wide)
    leaves = [x.to(device, dtype).requires_grad_() for x, dtype in zip(inputs, dtypes, strict=True)]
    o, state = gated_delta_rule(*leaves, output_final_state=True, backend=backend)
    gradients = torch.autograd.grad(o, leaves, grad.to(device, o.dtype))
    assert state is not None
    return [x.detach().double().cpu() for x in (o, state, *gradients)]


@pytest.mark.parametrize("strongest", [0.0, 0.3, 5.0], ids=["no decay", "mild decay", "strong decay"])
@pytest.mark.parametrize("length", [64, 200])
@pytest.mark.parametrize(("backend", "key_dim", "value_dim"), CASES)
def test_kernel_is_the_rule(backend: Backend, key_dim: int, value_dim: int, length: int, strongest: float) -> None:
    inputs = make_inputs(48, length, key_dim, value_dim, strongest)
    grad = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = outputs_and_gradients(inputs, grad.bfloat16().double(), backend)
    expected = outputs_and_gradients(inputs, grad.bfloat16().double(), "torch")
    names = ("o", "state", "dq", "dk", "dv", "dlog_decay", "dbeta")
    differences = {name: float((x - y).norm() / y.norm()) for name, x, y in zip(names, found, expected, strict=True)}
    print(
        f"{backend} K {key_dim} V {value_dim} T {length} decay {strongest}:",
        {k: f"{v:.1e}" for k, v in differences.items()},
    )
    assert all(difference <= BF16 for difference in differences.values()), differences  # NaN fails


@pytest.mark.parametrize("backend", ["triton", "fla"])
def test_a_row_of_nan_stays_alone(backend: Backend) -> None:
    inputs = make_inputs(48, 64, 64, 64, 0.3)
    grad = torch.ones(inputs[2].shape, dtype=torch.float64)
    calm = outputs_and_gradients(inputs, grad, backend)
    inputs[2][7] = torch.nan
    wild = outputs_and_gradients(inputs, grad, backend)
    others = [row for row in range(48) if row != 7]
    assert wild[0][7].isnan().any()
    for x, y in zip(calm, wild, strict=True):
        assert torch.equal(x[others], y[others])
