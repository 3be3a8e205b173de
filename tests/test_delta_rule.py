"""The delta rule against two independent step-by-step references, and the promise that rows never touch."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gdn_mup.model import delta_rule
from gdn_mup.model.delta_rule import gated_delta_rule

NAMES = ("q", "k", "v", "log_decay", "beta", "initial_state")
SCALE = 0.7
Rule = Callable[..., tuple[Tensor, Tensor | None]]

# rows, length, key_dim, value_dim: odd lengths around the chunk sizes 16 and 32, one row and many, V != K
SHAPES = [
    (1, 1, 16, 16),
    (2, 5, 8, 12),
    (6, 16, 16, 16),
    (3, 37, 16, 16),
    (4, 64, 16, 24),
    (2, 97, 32, 64),
    (1, 131, 40, 8),
    (160, 33, 4, 6),
]
DECAYS: dict[str, Callable[[int, int], Tensor]] = {
    "mild": lambda rows, length: -torch.rand(rows, length),
    "none": lambda rows, length: torch.zeros(rows, length),
    "strong": lambda rows, length: -50 * (0.5 + torch.rand(rows, length)),
    # Mild decays after strong ones: a running sum of log-decays has lost their digits by then.
    "mixed": lambda rows, length: torch.where(torch.rand(rows, length) < 0.2, -50.0, -0.1 * torch.rand(rows, length)),
}
BETAS: dict[str, Callable[[int, int], Tensor]] = {
    "inside": lambda rows, length: torch.rand(rows, length),
    "near 0": lambda rows, length: 1e-6 * torch.rand(rows, length),
    "near 1": lambda rows, length: 1 - 1e-6 * torch.rand(rows, length),
    "0 or 1": lambda rows, length: torch.randint(2, (rows, length)).float(),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_inputs(
    rows: int, length: int, key_dim: int, value_dim: int, decay: str = "mild", beta: str = "inside"
) -> list[Tensor]:
    """The tensors called NAMES; keys and queries of unit length, as the model makes them."""
    q, k = (functional.normalize(torch.randn(rows, length, key_dim), dim=-1) for _ in range(2))
    v, state = torch.randn(rows, length, value_dim), torch.randn(rows, key_dim, value_dim)
    return [q, k, v, DECAYS[decay](rows, length), BETAS[beta](rows, length), state]


def ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None) -> tuple:
    return gated_delta_rule(
        q, k, v, log_decay, beta, scale=SCALE, initial_state=state, output_final_state=True, backend="torch"
    )


def step_by_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written down, one position after another."""
    if state is None:
        state = torch.zeros(len(q), q.shape[2], v.shape[2], dtype=q.dtype)
    outputs = []
    for t in range(q.shape[1]):
        state = log_decay[:, t, None, None].exp() * state
        error = v[:, t] - torch.einsum("nk,nkv->nv", k[:, t], state)
        state = state + beta[:, t, None, None] * torch.einsum("nk,nv->nkv", k[:, t], error)
        outputs.append(SCALE * torch.einsum("nk,nkv->nv", q[:, t], state))
    return torch.stack(outputs, 1), state


def fla_step_by_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    pytest.importorskip("triton", reason="fla imports triton, which this platform does not have")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        naive = pytest.importorskip("fla.ops.gated_delta_rule.naive", reason="fla is not installed")
    q, k, v, log_decay, beta = (x.unsqueeze(2) for x in (q, k, v, log_decay, beta))
    o, final = naive.naive_recurrent_gated_delta_rule(
        q=q,
        k=k,
        v=v,
        beta=beta,
        g=log_decay,
        scale=SCALE,
        initial_state=None if state is None else state.unsqueeze(1),
        output_final_state=True,
    )
    return o.squeeze(2), final.squeeze(1)


def values_and_gradients(rule: Rule, inputs: list[Tensor], grads: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    state = leaves[5] if len(leaves) == 6 else None
    results = rule(*leaves[:5], state)
    gradients = torch.autograd.grad(results, leaves, [g.to(leaves[0].dtype) for g in grads])
    named = {f"gradient of {name}": x for name, x in zip(NAMES, gradients, strict=False)}
    return {"outputs": results[0].detach(), "final state": results[1].detach(), **named}


def make_grads(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    rows, _, key_dim = inputs[0].shape
    return torch.randn_like(inputs[2]), torch.randn(rows, key_dim, inputs[2].shape[2])


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in actual.items():
        assert value.isfinite().all(), name
        target = expected[name]
        # The floor: what passed through e^-50 twice is below the normal float32 numbers and has few digits.
        bound = tolerance * target.norm().clamp_min(1e-30)
        assert (value.to(target.dtype) - target).norm() <= bound, f"{name}: {value} instead of {target}"


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fla_over_shapes_and_decays(shape: tuple[int, int, int, int], decay: str) -> None:
    inputs = make_inputs(*shape, decay=decay)
    grads = make_grads(inputs)
    expected = values_and_gradients(fla_step_by_step, inputs, grads)
    assert_close(values_and_gradients(ours, inputs, grads), expected, 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("beta", BETAS)
def test_matches_fla_over_betas(beta: str, decay: str) -> None:
    inputs = make_inputs(4, 53, 16, 24, decay, beta)
    grads = make_grads(inputs)
    expected = values_and_gradients(fla_step_by_step, inputs, grads)
    assert_close(values_and_gradients(ours, inputs, grads), expected, 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_matches_the_recurrence_in_double_precision(shape: tuple[int, int, int, int], beta: str, decay: str) -> None:
    inputs = make_inputs(*shape, decay=decay, beta=beta)
    grads = make_grads(inputs)
    double = [x.double() for x in inputs]
    expected = values_and_gradients(step_by_step, double, grads)
    assert_close(values_and_gradients(ours, inputs, grads), expected, 1e-5)
    assert_close(values_and_gradients(ours, double, grads), expected, 1e-12)


def test_no_initial_state_is_a_state_of_zeros() -> None:
    inputs = make_inputs(3, 37, 16, 24)[:5]
    grads = make_grads(inputs)
    expected = values_and_gradients(step_by_step, [x.double() for x in inputs], grads)
    assert_close(values_and_gradients(ours, inputs, grads), expected, 1e-5)


def test_no_final_state_unless_asked_for() -> None:
    o, state = gated_delta_rule(*make_inputs(2, 20, 8, 8)[:5])
    assert state is None and o.shape == (2, 20, 8)


@pytest.mark.parametrize("length", [1, 7, 16, 40])
def test_parallel_keys(length: int) -> None:
    """One key at every position, β = 1, no decay: the system in a chunk is as far from diagonal as it gets."""
    q, k, v, *_, state = make_inputs(2, length, 16, 16)
    k = k[:, :1].expand_as(k)
    inputs = [q, k, v, torch.zeros(2, length), torch.ones(2, length), state]
    grads = make_grads(inputs)
    expected = values_and_gradients(step_by_step, [x.double() for x in inputs], grads)
    assert_close(values_and_gradients(ours, inputs, grads), expected, 1e-5)


@pytest.mark.parametrize("length", [5, 19, 32])
def test_gradcheck(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_rule, "_chunk_size", lambda key_dim, value_dim: 8)
    inputs = [x.double().requires_grad_() for x in make_inputs(2, length, 3, 4)]
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize("elements", [1, 3 * 16 * 16 * 2, 10**9])
def test_result_does_not_depend_on_how_chunks_are_grouped(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(3, 16 * 7, 16, 16)
    grads = make_grads(inputs)
    expected = values_and_gradients(ours, inputs, grads)
    monkeypatch.setattr(delta_rule, "_SEGMENT_ELEMENTS", elements)
    assert_close(values_and_gradients(ours, inputs, grads), expected, 1e-6)


def test_layout_in_memory_does_not_matter() -> None:
    inputs = make_inputs(4, 50, 16, 24)
    expected = ours(*inputs)
    strided = ours(*(x.mT.contiguous().mT for x in inputs))
    for actual, target in zip(strided, expected, strict=True):
        torch.testing.assert_close(actual, target)
    leaf = inputs[2].clone().requires_grad_()
    ours(*inputs[:2], leaf, *inputs[3:])[0].sum().backward()  # an expanded gradient: strides of 0
    again = inputs[2].clone().requires_grad_()
    (ours(*inputs[:2], again, *inputs[3:])[0] * torch.ones(4, 50, 24)).sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad)


@pytest.mark.parametrize("cut", [16, 21])
def test_two_halves_make_the_whole(cut: int) -> None:
    *sequences, state = make_inputs(5, 48, 16, 24)

    def in_two(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *sequences, state = inputs
        first, state = ours(*(x[:, :cut] for x in sequences), state)
        second, state = ours(*(x[:, cut:] for x in sequences), state)
        return torch.cat([first, second], 1), state

    grads = make_grads([*sequences, state])
    whole = values_and_gradients(ours, [*sequences, state], grads)
    assert_close(values_and_gradients(in_two, [*sequences, state], grads), whole, 2e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [37, 128])
def test_rows_never_touch(name: str, bad: float, length: int) -> None:
    inputs = make_inputs(6, length, 16, 16)
    grads = make_grads(inputs)
    healthy = values_and_gradients(ours, inputs, grads)
    inputs[NAMES.index(name)][3, ...] = bad
    ill = values_and_gradients(ours, inputs, grads)
    others = [0, 1, 2, 4, 5]
    for key, value in healthy.items():
        assert torch.equal(value[others], ill[key][others]), key
    if name == "v":  # and the illness is real, not masked away
        assert not ill["outputs"][3].isfinite().any()


def test_a_gradient_of_nan_stays_in_its_row() -> None:
    inputs = make_inputs(6, 40, 16, 16)
    grads = make_grads(inputs)
    healthy = values_and_gradients(ours, inputs, grads)
    for grad in grads:
        grad[2] = torch.nan
    ill = values_and_gradients(ours, inputs, grads)
    others = [0, 1, 3, 4, 5]
    for key, value in healthy.items():
        assert torch.equal(value[others], ill[key][others]), key
    assert ill["gradient of k"][2].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_named(name: str) -> None:
    inputs = make_inputs(2, 10, 4, 4)
    inputs[NAMES.index(name)] = inputs[NAMES.index(name)][:1]
    with pytest.raises(ValueError, match="shape"):
        ours(*inputs)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="'cuda'"):
        gated_delta_rule(*make_inputs(1, 4, 2, 2)[:5], backend="cuda")  # type: ignore[arg-type]


def test_the_fla_backend_calls_fla_as_it_wants_to_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel needs a GPU; its arguments, layout and results are checked with fla's reference in its place."""
    import inspect

    pytest.importorskip("triton", reason="fla imports triton, which this platform does not have")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ops = pytest.importorskip("fla.ops.gated_delta_rule", reason="fla is not installed")
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    signature = inspect.signature(ops.chunk_gated_delta_rule)

    def stand_in(**arguments: Tensor) -> tuple[Tensor, Tensor]:
        known = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        assert set(arguments) <= set(known)
        return naive_recurrent_gated_delta_rule(**arguments)

    monkeypatch.setattr(ops, "chunk_gated_delta_rule", stand_in)
    *sequences, state = make_inputs(3, 20, 8, 12)
    expected = ours(*sequences, state)
    actual = gated_delta_rule(*sequences, scale=SCALE, initial_state=state, output_final_state=True, backend="fla")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
