"""The kernels around the delta rule against plain PyTorch in float64, outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
from gdn_mup.kernels import heads as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]  # the interpreter is for float32
NAN = float("nan")

# The interpreter warns where ε = 0.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

# members, sequences, tokens, heads, key dim, value dim, taps, columns of padding
Shape = tuple[int, int, int, int, int, int, int, int]
SHAPES = [
    pytest.param((2, 2, 37, 2, 16, 16, 4, 4), id="powers-of-two"),
    pytest.param((2, 2, 7, 3, 12, 20, 4, 19), id="K-is-not-V"),
    pytest.param((2, 1, 13, 1, 24, 24, 2, 0), id="two-taps"),
    pytest.param((1, 2, 2, 2, 8, 5, 1, 3), id="one-tap"),
    pytest.param((1, 1, 3, 1, 16, 16, 4, 1), id="shorter-than-the-taps"),
    pytest.param((1, 1, 261, 1, 130, 70, 4, 0), id="several-tiles"),
]
if DEVICE == "cuda":
    SHAPES += [
        pytest.param((3, 2, 1024, 4, 64, 64, 4, 56), id="realistic"),
        pytest.param((2, 2, 300, 2, 256, 256, 4, 12), id="wide-heads"),
        pytest.param((2, 2, 1000, 3, 32, 128, 4, 2), id="values-wider"),
    ]


def test_heads_forward_and_every_gradient(shape: Shape, dtype: torch.dtype) -> None:
    _, _, _, heads, key_dim, value_dim, _, padding = shape
    y, parameters = projection(shape, dtype), heads_parameters(shape)
    outputs = kernels.heads_forward(y, *parameters, heads, key_dim, value_dim)
    exact = [x.double().requires_grad_() for x in (y, *parameters)]
    expected = plain_heads(*exact, heads, key_dim, value_dim)
    for output, right in zip(outputs, expected, strict=True):
        assert output.shape == right.shape and output.is_contiguous()
        assert_close(output, right, dtype)
    assert [output.dtype for output in outputs] == [dtype] * 3 + [torch.float32] * 2

    output_gradients = [torch.randn_like(output) for output in outputs]
    right_y, *right_parameters = torch.autograd.grad(expected, exact, [g.double() for g in output_gradients])
    dy = torch.full_like(y, NAN)
    gradients = scattered([torch.full_like(parameter, NAN) for parameter in parameters])
    kernels.heads_backward(*output_gradients, y, *parameters, heads, key_dim, value_dim, dy, *gradients)
    for gradient, right in zip(gradients, right_parameters, strict=True):
        assert_close(gradient, right, dtype)
    g_columns = g_slice(heads, key_dim, value_dim)
    assert dy[..., g_columns].isnan().all()  # not this kernel's to write
    dy[..., g_columns] = 0
    sizes = y_sizes(heads, key_dim, value_dim, padding)
    for written, right in zip(dy.split(sizes, -1), right_y.split(sizes, -1), strict=True):
        assert_close(written, right, dtype)


def test_gated_norm_forward_and_every_gradient(shape: Shape, dtype: torch.dtype, epsilon: float) -> None:
    members, batch, length, heads, key_dim, value_dim, _, _ = shape
    y = projection(shape, dtype)
    o = random(members * batch * heads, length, value_dim, dtype=dtype)
    (gain,) = scattered([1 + 0.5 * random(members, value_dim)])
    normed = kernels.gated_norm_forward(o, y, gain, heads, key_dim, value_dim, epsilon)
    exact = [x.double().requires_grad_() for x in (o, y, gain)]
    expected = plain_gated_norm(*exact, heads, key_dim, value_dim, epsilon)
    assert normed.shape == expected.shape and normed.dtype == dtype
    assert_close(normed, expected, dtype)

    dnormed = torch.randn_like(normed)
    right_o, right_y, right_gain = torch.autograd.grad(expected, exact, dnormed.double())
    dy = torch.full_like(y, NAN)
    (gain_gradient,) = scattered([torch.full_like(gain, NAN)])
    do = kernels.gated_norm_backward(dnormed, o, y, gain, heads, key_dim, value_dim, epsilon, dy, gain_gradient)
    g_columns = g_slice(heads, key_dim, value_dim)
    assert_close(do, right_o, dtype)
    assert_close(gain_gradient, right_gain, dtype)
    assert_close(dy[..., g_columns], right_y[..., g_columns], dtype)
    dy[..., g_columns] = NAN
    assert dy.isnan().all()  # the other columns are not this kernel's to write


def test_gates_hold_for_large_and_small_arguments() -> None:
    arguments = torch.tensor([-1e4, -80.0, -20.0, -7.0, -1e-3, 0.0, 1e-3, 0.7, 7.0, 20.0, 80.0, 1e4], device=DEVICE)
    length = len(arguments)
    y = torch.zeros(1, 1, length, 6, device=DEVICE)
    y[0, 0, :, 4] = y[0, 0, :, 5] = arguments
    taps, A_log, dt_bias = (torch.zeros(size, device=DEVICE) for size in ((1, 3, 4), (1, 1), (1, 1)))
    *_, log_decay, beta = kernels.heads_forward(y, taps, A_log, dt_bias, 1, 1, 1)
    softplus, opening = torch.logaddexp(arguments.double(), arguments.new_zeros(())), arguments.double().sigmoid()
    torch.testing.assert_close(log_decay[0].double(), -softplus, rtol=1e-5, atol=0)
    torch.testing.assert_close(beta[0].double(), opening, rtol=1e-5, atol=1e-37)

    dy, (A_gradient, bias_gradient) = torch.empty_like(y), torch.empty(2, 1, 1, device=DEVICE)
    zero, ones = torch.zeros(1, length, 1, device=DEVICE), torch.ones(1, length, device=DEVICE)
    kernels.heads_backward(
        *(zero, zero, zero, ones, ones, y, taps, A_log, dt_bias, 1, 1, 1),
        *(dy, torch.empty_like(taps), A_gradient, bias_gradient),
    )
    torch.testing.assert_close(dy[0, 0, :, 4].double(), -opening, rtol=1e-5, atol=1e-37)
    torch.testing.assert_close(dy[0, 0, :, 5].double(), opening * (1 - opening), rtol=1e-5, atol=1e-7)


def test_nan_in_one_member_leaves_the_others_bit_equal(dtype: torch.dtype) -> None:
    shape = members, batch, length, heads, key_dim, value_dim, _, _ = 3, 1, 9, 2, 12, 12, 4, 2

    def everything(sick: int | None) -> list[Tensor]:
        """All outputs and gradients, members first; NaN in every input of member `sick`."""
        torch.manual_seed(1)
        y, o = projection(shape, dtype), random(members * batch * heads, length, value_dim, dtype=dtype)
        parameters = scattered([*heads_parameters(shape), random(members, value_dim)])
        if sick is not None:
            for x in (y, o.unflatten(0, (members, -1)), *parameters):
                x[sick] = NAN
        *parameters, gain = parameters
        *gradients, gain_gradient = scattered([torch.full_like(x, NAN) for x in (*parameters, gain)])
        dy = torch.full_like(y, NAN)
        outputs = kernels.heads_forward(y, *parameters, heads, key_dim, value_dim)
        kernels.heads_backward(*outputs, y, *parameters, heads, key_dim, value_dim, dy, *gradients)
        gate = (heads, key_dim, value_dim, 1e-5)
        normed = kernels.gated_norm_forward(o, y, gain, *gate)
        do = kernels.gated_norm_backward(normed, o, y, gain, *gate, dy, gain_gradient)
        folded = [x.unflatten(0, (members, -1)) for x in (*outputs, do)]
        return [*folded, normed, dy, *gradients, gain_gradient]

    healthy = everything(None)
    assert not any(x.isnan().any() for x in healthy)
    for one, other in zip(healthy, everything(1), strict=True):
        assert other[1].isnan().any()
        assert torch.equal(one[[0, 2]], other[[0, 2]])


# ---- plain PyTorch ----


def plain_heads(
    y: Tensor, taps: Tensor, A_log: Tensor, dt_bias: Tensor, heads: int, key_dim: int, value_dim: int
) -> list[Tensor]:
    members, batch, length, _ = y.shape
    channels, size = taps.shape[1:]
    qkv = y[..., :channels].transpose(2, 3).flatten(0, 1)  # [M·B, channels, T]
    per_sequence = taps.repeat_interleave(batch, 0).flatten(0, 1)[:, None]
    padded = F.pad(qkv, (size - 1, 0)).reshape(1, -1, length + size - 1)
    convolved = F.silu(F.conv1d(padded, per_sequence, groups=per_sequence.shape[0]))
    streams = convolved.view(members * batch, channels, length).split(
        (heads * key_dim, heads * key_dim, heads * value_dim), 1
    )
    q, k, v = (s.reshape(members * batch * heads, -1, length).transpose(1, 2) for s in streams)
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    first = 2 * heads * (key_dim + value_dim)
    alpha, beta = y[..., first : first + heads], y[..., first + heads : first + 2 * heads]
    log_decay = -A_log.exp()[:, None, None] * F.softplus(alpha + dt_bias[:, None, None])
    return [q, k, v, *(x.transpose(2, 3).reshape(-1, length) for x in (log_decay, beta.sigmoid()))]


def plain_gated_norm(
    o: Tensor, y: Tensor, gain: Tensor, heads: int, key_dim: int, value_dim: int, epsilon: float
) -> Tensor:
    members, batch, length, _ = y.shape
    unfolded = o.view(members, batch, heads, length, value_dim).transpose(2, 3)
    g = y[..., g_slice(heads, key_dim, value_dim)].view(unfolded.shape)
    normed = unfolded / (unfolded.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return (gain[:, None, None, None] * normed * F.silu(g)).reshape(members, batch * length, -1)


# ---- inputs ----


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, device=DEVICE).to(dtype)


def y_sizes(heads: int, key_dim: int, value_dim: int, padding: int) -> list[int]:
    return [*(heads * size for size in (key_dim, key_dim, value_dim, value_dim, 1, 1)), padding]


def g_slice(heads: int, key_dim: int, value_dim: int) -> slice:
    first = heads * (2 * key_dim + value_dim)
    return slice(first, first + heads * value_dim)


def projection(shape: Shape, dtype: torch.dtype) -> Tensor:
    members, batch, length, heads, key_dim, value_dim, _, padding = shape
    return random(members, batch, length, sum(y_sizes(heads, key_dim, value_dim, padding)), dtype=dtype)


def heads_parameters(shape: Shape) -> list[Tensor]:
    """taps, A_log and dt_bias."""
    members, _, _, heads, key_dim, value_dim, taps, _ = shape
    return scattered([random(members, heads * (2 * key_dim + value_dim), taps), *random(2, members, heads).unbind()])


def scattered(parameters: list[Tensor]) -> list[Tensor]:
    """The same values as views into one buffer [M, all parameters of a member], which starts at an odd place."""
    members = parameters[0].shape[0]
    sizes = [parameter[0].numel() for parameter in parameters]
    buffer = torch.full((members * (sum(sizes) + 1) + 1,), NAN, device=DEVICE)[1:].view(members, -1)
    views = [view.view(p.shape) for view, p in zip(buffer[:, 1:].split(sizes, 1), parameters, strict=True)]
    for view, parameter in zip(views, parameters, strict=True):
        view.copy_(parameter)
    return views


def assert_close(value: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """The error's norm over the right value's; zeros must be zeros."""
    error = (value.double() - right).norm()
    assert error <= TOLERANCE[dtype] * right.norm(), f"relative error {(error / right.norm()).item():.2g}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, values in {"shape": SHAPES, "dtype": DTYPES, "epsilon": [1e-5, 0.0]}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
