"""Triton kernels of norm, MLP, loss and embedding against PyTorch in float64: values, gradients, NaN in one member.

On a GPU they run compiled, in bfloat16 too; elsewhere in Triton's interpreter.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton")

from gdn_mup.kernels import norm
from gdn_mup.kernels.embedding import embed
from gdn_mup.kernels.loss import linear_cross_entropy
from gdn_mup.kernels.mlp import swiglu
from gdn_mup.kernels.norm import add_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
EPSILON = 1e-5

# NaN, and exp(200) inside a sigmoid, are part of these tests: NumPy, under the interpreter, warns of them.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]
half = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def parameters(*shape: int, fill: Tensor | None = None) -> Tensor:
    """A float32 view of parameters or gradients whose member stride is larger than a member; NaN unless filled."""
    size = math.prod(shape[1:])
    view = torch.full((shape[0], size + 64), torch.nan, device=DEVICE)[:, :size].view(shape)
    return view if fill is None else view.copy_(fill)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert actual.isfinite().all()
    assert error <= (1e-5 if dtype == torch.float32 else 1e-2), float(error)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def leaf64(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


def assert_members_apart(run: Callable[[bool], list[Tensor]], poisoned: int) -> None:
    """`run(poison)` gives tensors [M, ...]; poison in one member changes no bit of the others."""
    for clean, dirty in zip(run(False), run(True), strict=True):
        others = [member for member in range(len(clean)) if member != poisoned]
        assert torch.equal(clean[others], dirty[others])
        assert dirty[poisoned].isnan().any()


# --- norm -----------------------------------------------------------------------------------------------------------


def run_add_norm(
    x: Tensor, delta: Tensor | None, gain: Tensor, dx_new: Tensor | None, dh: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """x_new, h, dx, dgain and, if there is a delta, ddelta."""
    inputs = [leaf(x)] if delta is None else [leaf(x), leaf(delta)]
    gradient = parameters(*gain.shape)
    x_new, h = add_norm(inputs[0], None if delta is None else inputs[1], gain, gradient, EPSILON, dtype)
    outputs, seeds = ([h], [dh]) if dx_new is None else ([x_new, h], [dx_new, dh])
    dx, *ddelta = torch.autograd.grad(outputs, inputs, seeds)
    return [x_new.detach(), h.detach(), dx, gradient, *ddelta]


@half
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("with_dx_new", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(150, 32), (21, 200)])
def test_add_norm(
    rows: int,
    width: int,
    with_dx_new: bool,
    with_delta: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(norm, "_BACKWARD_WARPS", 4 * 6)  # two programs a member, so that they loop
    x, dx_new = normal(3, rows, width), normal(3, rows, width, seed=1) if with_dx_new else None
    delta = normal(3, rows, width, dtype=dtype, seed=2) if with_delta else None
    dh = normal(3, rows, width, dtype=dtype, seed=3)
    gain = parameters(3, width, fill=1 + 0.3 * normal(3, width))
    actual = run_add_norm(x, delta, gain, dx_new, dh, dtype)

    inputs = [leaf64(tensor) for tensor in (x, gain, delta) if tensor is not None]
    x_new = inputs[0] + inputs[2] if with_delta else inputs[0]
    h = inputs[1][:, None] * x_new * (x_new.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    loss = (h * dh).sum() + (0 if dx_new is None else (x_new * dx_new).sum())
    for got, want in zip(actual, [x_new, h, *torch.autograd.grad(loss, inputs)], strict=True):
        assert_close(got, want, dtype)
    assert [t.dtype for t in actual] == [torch.float32, dtype, torch.float32, torch.float32, dtype][: len(actual)]


def test_add_norm_with_an_unused_output() -> None:
    x, delta, dx_new = leaf(normal(2, 5, 32)), leaf(normal(2, 5, 32, seed=1)), normal(2, 5, 32, seed=2)
    gradient = parameters(2, 32)
    x_new, _ = add_norm(x, delta, torch.ones(2, 32, device=DEVICE), gradient, EPSILON, torch.float32)
    for got in torch.autograd.grad(x_new, [x, delta], dx_new):
        assert torch.equal(got, dx_new)
    assert not gradient.any()


def test_add_norm_keeps_members_apart() -> None:
    def run(poison: bool) -> list[Tensor]:
        x, delta = normal(3, 7, 40), normal(3, 7, 40, seed=1)
        if poison:
            delta[1, 2, 3] = torch.nan
        gain = parameters(3, 40, fill=normal(3, 40))
        return run_add_norm(x, delta, gain, normal(3, 7, 40, seed=2), normal(3, 7, 40, seed=3), torch.float32)

    assert_members_apart(run, 1)


# --- MLP ------------------------------------------------------------------------------------------------------------


@half
@pytest.mark.parametrize(("rows", "width"), [(60, 96), (5, 1100), (70, 20)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    u, dz = 3 * normal(2, rows, 2 * width, dtype=dtype), normal(2, rows, width, dtype=dtype, seed=1)
    u[0, 0, 0], u[0, 0, 1] = 200.0, -200.0
    u.requires_grad_()
    z = swiglu(u)
    (du,) = torch.autograd.grad(z, u, dz)

    exact = leaf64(u)
    gate, up = exact.chunk(2, -1)
    expected = functional.silu(gate) * up
    assert_close(z, expected, dtype)
    assert_close(du, torch.autograd.grad(expected, exact, dz.double())[0], dtype)


def test_swiglu_keeps_members_apart() -> None:
    def run(poison: bool) -> list[Tensor]:
        u = normal(3, 6, 64)
        if poison:
            u[0, 5, 63] = torch.nan
        u.requires_grad_()
        z = swiglu(u)
        return [z.detach(), *torch.autograd.grad(z.sum(), u)]

    assert_members_apart(run, 0)


# --- loss -----------------------------------------------------------------------------------------------------------


def random_targets(rows: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(rows)).to(DEVICE)


def run_loss(h: Tensor, readout: Tensor, targets: Tensor) -> list[Tensor]:
    """losses, dh, dreadout"""
    h, gradient = leaf(h), parameters(*readout.shape)
    losses = linear_cross_entropy(h, readout, gradient, targets)
    (dh,) = torch.autograd.grad(losses.sum(), h)
    return [losses.detach(), dh, gradient]


@half
@pytest.mark.parametrize(("rows", "vocabulary"), [(37, 300), (6, 9001)])
def test_linear_cross_entropy(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    h, width = normal(2, rows, 32, dtype=dtype), 32
    readout = parameters(2, vocabulary, width, fill=normal(2, vocabulary, width)).to(dtype)
    targets = random_targets(rows, vocabulary)
    losses, dh, dreadout = run_loss(h, readout, targets)

    exact = [leaf64(h), leaf64(readout)]
    logits = exact[0] @ exact[1].mT
    expected = torch.stack([functional.cross_entropy(member, targets) for member in logits])
    assert_close(losses, expected, dtype)
    for got, want in zip([dh, dreadout], torch.autograd.grad(expected.sum(), exact), strict=True):
        assert_close(got, want, dtype)
    assert (losses.dtype, dh.dtype, dreadout.dtype) == (torch.float32, dtype, torch.float32)

    gradient = parameters(2, vocabulary, width)
    with torch.no_grad():
        assert_close(linear_cross_entropy(h.requires_grad_(), readout, gradient, targets), losses, torch.float32)
    assert gradient.isnan().all()


def test_loss_of_large_logits() -> None:
    readout = 1000 * normal(2, 50, 16)
    h, targets = normal(2, 9, 16), random_targets(9, 50)
    for got in run_loss(h, readout, targets):
        assert got.isfinite().all()


@pytest.mark.parametrize("vocabulary", [50, 8200])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_loss_keeps_members_apart(poison: float, vocabulary: int) -> None:
    def run(poisoned: bool) -> list[Tensor]:
        h = normal(3, 5, 16)
        if poisoned:
            h[1, 2, 3] = poison
        return run_loss(h, normal(3, vocabulary, 16), random_targets(5, vocabulary))

    assert_members_apart(run, 1)


# --- embedding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(37, 11, 32), (300, 5, 40), (9, 23, 300)])
@pytest.mark.parametrize("add", [False, True])
def test_embed(add: bool, rows: int, vocabulary: int, width: int) -> None:
    tokens = random_targets(rows, vocabulary)
    tokens[tokens == 1] = 0  # token 1 does not occur
    weight = parameters(2, vocabulary, width, fill=normal(2, vocabulary, width)).requires_grad_()
    before = normal(2, vocabulary, width, seed=1) if add else None
    gradient = parameters(2, vocabulary, width, fill=before)
    dx = normal(2, rows, width, seed=2)
    x = embed(tokens, weight, gradient, add)
    x.backward(dx)

    assert torch.equal(x, weight.detach()[:, tokens])
    expected = torch.zeros(2, vocabulary, width, dtype=torch.float64, device=DEVICE).index_add_(1, tokens, dx.double())
    assert_close(gradient, expected if before is None else expected + before, torch.float32)
    assert add or not gradient[:, 1].any()
    assert weight.grad is None


def test_embed_keeps_members_apart() -> None:
    tokens = random_targets(20, 6)

    def run(poison: bool) -> list[Tensor]:
        dx, gradient = normal(3, 20, 32), parameters(3, 6, 32)
        if poison:
            dx[2, 7, 5] = torch.nan
        embed(tokens, normal(3, 6, 32).requires_grad_(), gradient).backward(dx)
        return [gradient]

    assert_members_apart(run, 2)


# --- together -------------------------------------------------------------------------------------------------------


def test_chain_of_a_tied_model() -> None:
    """Embedding, norm, MLP, norm and readout in one graph, the readout tied to the embedding."""
    rows, vocabulary, width = 13, 21, 32
    tokens, targets = random_targets(rows, vocabulary), random_targets(rows, vocabulary).flip(0)
    weight = parameters(2, vocabulary, width, fill=normal(2, vocabulary, width)).requires_grad_()
    gains = [parameters(2, width, fill=1 + 0.1 * normal(2, width, seed=seed)) for seed in (1, 2)]
    into, out = (0.2 * normal(2, 2 * 48, width)).requires_grad_(), (0.2 * normal(2, width, 48)).requires_grad_()
    gradient, gain_gradients = parameters(2, vocabulary, width), [parameters(2, width) for _ in gains]

    x = embed(tokens, weight, gradient, add=True)
    x, h = add_norm(x, None, gains[0], gain_gradients[0], EPSILON, torch.float32)
    delta = swiglu(h @ into.mT) @ out.mT
    _, h = add_norm(x, delta, gains[1], gain_gradients[1], EPSILON, torch.float32)
    losses = linear_cross_entropy(h, weight.detach(), gradient, targets)
    losses.sum().backward()

    exact = [leaf64(tensor) for tensor in (weight, *gains, into, out)]
    x = exact[0][:, tokens]
    rms_norm = functional.rms_norm
    gate, up = ((exact[1][:, None] * rms_norm(x, (width,), eps=EPSILON)) @ exact[3].mT).chunk(2, -1)
    x = x + (functional.silu(gate) * up) @ exact[4].mT
    logits = (exact[2][:, None] * rms_norm(x, (width,), eps=EPSILON)) @ exact[0].mT
    expected = torch.stack([functional.cross_entropy(member, targets) for member in logits])
    assert_close(losses, expected, torch.float32)
    actual = [gradient, *gain_gradients, into.grad, out.grad]
    for got, want in zip(actual, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert got is not None
        assert_close(got, want, torch.float32)
