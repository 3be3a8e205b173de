"""The Triton kernels of the gated delta rule against the float64 rule in PyTorch.

On a GPU they run as they train, in bfloat16; elsewhere in Triton's interpreter, in float32.
"""

import pytest
import torch
from test_delta_rule import NAMES, make_inputs
from torch import Tensor
from torch.nn import functional

from gdn_mup.model.delta_rule import gated_delta_rule

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu
CUDA = torch.cuda.is_available()
DEVICE, DTYPE, TOLERANCE = ("cuda", torch.bfloat16, 1e-2) if CUDA else ("cpu", torch.float32, 1e-5)
SCALE = 0.7
# rows, length, key_dim, value_dim: parts of chunks, sizes that are no powers of two, several blocks of value channels
SHAPES = [
    (3, 5, 8, 12),
    (2, 64, 16, 16),
    (2, 70, 32, 64),
    (1, 130, 64, 64),
    (1, 70, 96, 80),
    (1, 40, 128, 128),
    (1, 33, 256, 256),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def results(inputs: list[Tensor], grads: tuple[Tensor, Tensor], backend: str, *types: object) -> list[Tensor]:
    """o, the final state and the gradient of each input, in float64 on the CPU."""
    device, narrow, wide = types
    dtypes = (narrow, narrow, narrow, wide, wide, wide)
    leaves = [x.detach().to(device, t).requires_grad_() for x, t in zip(inputs, dtypes, strict=True)]  # type: ignore[call-overload]
    o, state = gated_delta_rule(
        *leaves[:5], scale=SCALE, initial_state=leaves[5], output_final_state=True, backend=backend
    )
    assert state is not None
    found = torch.autograd.grad((o, state), leaves, (grads[0].to(o), grads[1].to(state)))
    return [x.detach().double().cpu() for x in (o, state, *found)]


def differences(inputs: list[Tensor]) -> dict[str, float]:
    """Relative difference, by norm, of each result of the kernels from that in float64."""
    inputs = [x.to(DTYPE) if i < 3 else x for i, x in enumerate(inputs)]
    rows, length, key_dim = inputs[1].shape
    grads = torch.randn(rows, length, inputs[2].shape[2]).to(DTYPE), torch.randn(rows, key_dim, inputs[2].shape[2])
    found = results(inputs, grads, "triton", DEVICE, DTYPE, torch.float32)
    expected = results(inputs, grads, "torch", "cpu", torch.float64, torch.float64)
    names = ("o", "state", *NAMES)
    return {name: float((x - y).norm() / y.norm()) for name, x, y in zip(names, found, expected, strict=True)}


@pytest.mark.parametrize("decay", ["mild", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_the_rule(shape: tuple[int, int, int, int], decay: str) -> None:
    found = differences(make_inputs(*shape, decay))
    print(shape, decay, {name: f"{value:.1e}" for name, value in found.items()})
    assert all(value <= TOLERANCE for value in found.values()), found  # NaN fails


@pytest.mark.parametrize("beta", ["near 0", "near 1", "0 or 1"])
def test_any_write_strength(beta: str) -> None:
    found = differences(make_inputs(2, 70, 16, 32, "mild", beta))
    assert all(value <= TOLERANCE for value in found.values()), found


@pytest.mark.parametrize("decay", ["strong", "mixed"])
def test_strong_decays(decay: str) -> None:
    """Sums of log-decays reach thousands here, of which float32 keeps three or four digits after the point."""
    found = differences(make_inputs(2, 70, 16, 16, decay))
    del found["log_decay"]  # of size e^-50 where decays are strong: lost beside everything else
    assert all(value <= max(TOLERANCE, 1e-4) for value in found.values()), found


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("likeness", [0.5, 0.9, 1.0])
def test_parallel_keys(likeness: float, beta: float) -> None:
    """Powers of the matrix of key overlaps grow like binomials here: the solve must not go through them."""
    inputs = make_inputs(2, 128, 64, 32, "mild")
    inputs[1] = functional.normalize(likeness * torch.randn(2, 1, 64) + (1 - likeness) * inputs[1], dim=-1)
    inputs[4] = torch.full_like(inputs[4], beta)
    found = differences(inputs)
    assert all(value <= 2 * TOLERANCE for value in found.values()), found


@pytest.mark.parametrize("name", NAMES)
def test_rows_never_touch(name: str) -> None:
    inputs = make_inputs(3, 70, 16, 16)
    grads = torch.randn(3, 70, 16), torch.randn(3, 16, 16)
    types = (DEVICE, DTYPE, torch.float32)
    calm = results(inputs, grads, "triton", *types)
    inputs[NAMES.index(name)][1] = torch.nan
    wild = results(inputs, grads, "triton", *types)
    assert wild[0][1].isnan().any()
    assert all(torch.equal(x[[0, 2]], y[[0, 2]]) for x, y in zip(calm, wild, strict=True))


def test_two_halves_make_the_whole() -> None:
    q, k, v, log_decay, beta, state = (
        x.to(DEVICE, DTYPE if i < 3 else torch.float32) for i, x in enumerate(make_inputs(2, 128, 16, 16))
    )
    whole, end = gated_delta_rule(
        q, k, v, log_decay, beta, initial_state=state, output_final_state=True, backend="triton"
    )
    halves = []
    for part in (slice(0, 64), slice(64, 128)):
        inputs = (x[:, part].contiguous() for x in (q, k, v, log_decay, beta))
        o, state = gated_delta_rule(*inputs, initial_state=state, output_final_state=True, backend="triton")
        halves.append(o)
    torch.testing.assert_close(torch.cat(halves, 1), whole)
    torch.testing.assert_close(state, end)
