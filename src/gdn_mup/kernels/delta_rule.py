"""The gated delta rule as four Triton kernels, two each way.

The equations are those of `gdn_mup.model.delta_rule`, in the form that keeps every row of a chunk in registers and
divides by nothing. With ``A = strictly lower part of D∘(K Kᵀ)`` and ``Y = A (I + βA)⁻¹`` (strictly lower too),

    Z = X - Y (β∘X)          U = β∘Z          X = V - γ∘(K S)
    dR = dU - Yᵀ (β∘dU)      dX = β∘dR = dV   dβ = rowsum(dR∘Z)

so that one matrix serves both ways. What does not depend on the state is computed for all chunks at once
(`_solve`, `_backward_inputs`); only the state goes from chunk to chunk (`_forward`, `_backward_state`), one
program a row and block of value channels.

Y is found without a sequential loop. L = A diag(β) is nilpotent on its 4 × 4 diagonal blocks, so (I + L)⁻¹ is a
short polynomial there; blocks of 4 combine to blocks of 16, and those to the chunk, in the same way: with W the
inverse of the diagonal blocks and N = W·(rest), N⁴ = 0 and (I + W·rest)⁻¹ W = (I - N)(I + N²) W. Entries of N stay of
order one even for parallel keys, where powers of L itself grow like binomials of the chunk length.

The products that find Y take float16 operands: its 11 bits are those of tf32, at half the bytes and twice the rate
(0.18 instead of 0.31 ms for 10 240 chunks on an H200), and for keys of unit norm no entry is far from one.

Decays inside a chunk are exponentials of differences of a running sum in float32: with log-decays that add up to
-1000 in a chunk they keep four digits, which is what bfloat16 products keep.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Saved(NamedTuple):
    """What the way back needs of the way there."""

    y: Tensor  # [N, T, C]
    z: Tensor  # [N, T, V]
    states: Tensor  # [N, chunks, K, V], at the start of each chunk


@triton.jit
def _decay(total, SIZE: tl.constexpr):
    """D [C, C]: the decays from s to t where s <= t, else 0, from the running sum of log-decays."""
    t = tl.arange(0, SIZE)
    exponent = tl.minimum(total[:, None] - total[None, :], 0.0)
    return tl.where(t[:, None] >= t[None, :], tl.exp(exponent), 0.0)


@triton.jit
def _product(a, b, OPERAND: tl.constexpr):
    """a · b summed in float32, from operands rounded to OPERAND."""
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision="ieee")


@triton.jit
def _combine(inverse, rest, OPERAND: tl.constexpr):
    """(I + inverse · rest)⁻¹ inverse, where four diagonal blocks combine to one: (inverse · rest)⁴ = 0."""
    n = _product(inverse, rest, OPERAND)
    square = _product(n, n, OPERAND)
    cube = _product(square, n, OPERAND)
    return inverse + _product(square - n - cube, inverse, OPERAND)


@triton.jit(do_not_specialize=["length", "chunks"])
def _solve(k_ptr, log_decay_ptr, beta_ptr, y_ptr, length, chunks,
           K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
           OPERAND: tl.constexpr):  # fmt: skip
    """Y [C, C] of one chunk."""
    start = (tl.program_id(0) // chunks).to(tl.int64) * length
    c, t_in = tl.arange(0, BK), tl.arange(0, C)
    t = tl.program_id(0) % chunks * C + t_in
    k = tl.load(k_ptr + start * K + t[:, None] * K + c, mask=(t < length)[:, None] & (c < K), other=0.0)
    log_decay = tl.load(log_decay_ptr + start + t, mask=t < length, other=0.0)
    beta = tl.load(beta_ptr + start + t, mask=t < length, other=0.0)
    decay = _decay(tl.cumsum(log_decay, 0), C)
    a = tl.where(t_in[:, None] > t_in[None, :], tl.dot(k, tl.trans(k), input_precision=PRECISION) * decay, 0.0)
    strict = a * beta[None, :]
    same_4 = (t_in // 4)[:, None] == (t_in // 4)[None, :]
    same_16 = (t_in // 16)[:, None] == (t_in // 16)[None, :]
    n = tl.where(same_4, strict, 0.0)
    square = _product(n, n, OPERAND)
    identity = tl.where(t_in[:, None] == t_in[None, :], 1.0, 0.0)
    inverse = identity - n + square - _product(square, n, OPERAND)
    inverse = _combine(inverse, tl.where(same_16 & ~same_4, strict, 0.0), OPERAND)
    if C > 16:
        inverse = _combine(inverse, tl.where(same_16, 0.0, strict), OPERAND)
    y = _product(inverse, a, OPERAND)
    tl.store(y_ptr + start * C + t[:, None] * C + t_in, y, mask=(t < length)[:, None])


@triton.jit(do_not_specialize=["length", "chunks"])
def _forward(q_ptr, k_ptr, v_ptr, log_decay_ptr, beta_ptr, y_ptr, start_ptr, o_ptr, z_ptr, states_ptr, end_ptr,
             length, chunks, scale, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
             C: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr, SAVES: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Outputs and Z of one row and one block of value channels, chunk after chunk."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = row * length
    c, t_in = tl.arange(0, BK), tl.arange(0, C)
    d = (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
    in_state = (c < K)[:, None] & (d < V)
    at_state = c[:, None] * V + d
    half = q_ptr.dtype.element_ty
    state = tl.zeros([BK, BV], tl.float32)
    if STARTS:
        state += tl.load(start_ptr + row * K * V + at_state, mask=in_state, other=0.0)
    for i in range(chunks):
        t = i * C + t_in
        inside = t < length
        at_key, keys = t[:, None] * K + c, inside[:, None] & (c < K)
        at_value, values = t[:, None] * V + d, inside[:, None] & (d < V)
        q = tl.load(q_ptr + start * K + at_key, mask=keys, other=0.0)
        k = tl.load(k_ptr + start * K + at_key, mask=keys, other=0.0)
        v = tl.load(v_ptr + start * V + at_value, mask=values, other=0.0)
        y = tl.load(y_ptr + start * C + t[:, None] * C + t_in, mask=inside[:, None], other=0.0)
        beta = tl.load(beta_ptr + start + t, mask=inside, other=0.0)[:, None]
        log_decay = tl.load(log_decay_ptr + start + t, mask=inside, other=0.0)
        total, whole = tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)
        from_start, to_end = tl.exp(total)[:, None], tl.exp(whole - total)[:, None]

        state_half = state.to(half)
        if SAVES:
            tl.store(states_ptr + (row * chunks + i) * K * V + at_state, state_half, mask=in_state)
        x = v.to(tl.float32) - from_start * tl.dot(k, state_half, input_precision=PRECISION)
        z = x - tl.dot(y, (beta * x).to(half), input_precision=PRECISION)
        if SAVES:
            tl.store(z_ptr + start * V + at_value, z, mask=values)
        u = beta * z
        state = tl.exp(whole) * state + tl.dot(tl.trans(k), (to_end * u).to(half), input_precision=PRECISION)
        o = from_start * tl.dot(q, state_half, input_precision=PRECISION)
        attention = (tl.dot(q, tl.trans(k), input_precision=PRECISION) * _decay(total, C)).to(half)
        o += tl.dot(attention, u.to(half), input_precision=PRECISION)
        tl.store(o_ptr + start * V + at_value, o * scale, mask=values)
    if ENDS:
        tl.store(end_ptr + row * K * V + at_state, state, mask=in_state)


@triton.jit(do_not_specialize=["length", "chunks"])
def _backward_state(q_ptr, k_ptr, log_decay_ptr, beta_ptr, y_ptr, do_ptr, d_end_ptr, dr_ptr, d_states_ptr, d_start_ptr,
                    length, chunks, scale, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                    C: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dR and the gradient of the state at the end of each chunk, of one row and one block of value channels."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = row * length
    c, t_in = tl.arange(0, BK), tl.arange(0, C)
    d = (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
    in_state = (c < K)[:, None] & (d < V)
    at_state = c[:, None] * V + d
    half = q_ptr.dtype.element_ty
    d_state = tl.zeros([BK, BV], tl.float32)
    if ENDS:
        d_state += tl.load(d_end_ptr + row * K * V + at_state, mask=in_state, other=0.0)
    for j in range(chunks):
        i = chunks - 1 - j
        t = i * C + t_in
        inside = t < length
        at_key, keys = t[:, None] * K + c, inside[:, None] & (c < K)
        at_value, values = t[:, None] * V + d, inside[:, None] & (d < V)
        q = tl.load(q_ptr + start * K + at_key, mask=keys, other=0.0)
        k = tl.load(k_ptr + start * K + at_key, mask=keys, other=0.0)
        do = tl.load(do_ptr + start * V + at_value, mask=values, other=0.0)
        y = tl.load(y_ptr + start * C + t[:, None] * C + t_in, mask=inside[:, None], other=0.0)
        beta = tl.load(beta_ptr + start + t, mask=inside, other=0.0)[:, None]
        log_decay = tl.load(log_decay_ptr + start + t, mask=inside, other=0.0)
        total, whole = tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)
        from_start, to_end = tl.exp(total)[:, None], tl.exp(whole - total)[:, None]

        d_state_half = d_state.to(half)
        tl.store(d_states_ptr + (row * chunks + i) * K * V + at_state, d_state_half, mask=in_state)
        attention = (tl.dot(q, tl.trans(k), input_precision=PRECISION) * _decay(total, C) * scale).to(half)
        du = to_end * tl.dot(k, d_state_half, input_precision=PRECISION)
        du += tl.dot(tl.trans(attention), do, input_precision=PRECISION)
        dr = du - tl.dot(tl.trans(y), (beta * du).to(half), input_precision=PRECISION)
        tl.store(dr_ptr + start * V + at_value, dr, mask=values)
        d_state = tl.exp(whole) * d_state
        d_state += tl.dot(tl.trans(q), (from_start * scale * do).to(half), input_precision=PRECISION)
        d_state -= tl.dot(tl.trans(k), (from_start * beta * dr).to(half), input_precision=PRECISION)
    if STARTS:
        tl.store(d_start_ptr + row * K * V + at_state, d_state, mask=in_state)


@triton.jit(do_not_specialize=["length", "chunks"])
def _backward_inputs(q_ptr, k_ptr, log_decay_ptr, beta_ptr, z_ptr, dr_ptr, states_ptr, d_states_ptr, do_ptr,
                     dq_ptr, dk_ptr, dv_ptr, d_log_decay_ptr, d_beta_ptr, length, chunks, scale,
                     K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """The gradients of one chunk's inputs, once dR and the gradients of the states are known.

    Value channels are read again for each accumulator: from the cache, and at most three are alive at once.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    i, start = tl.program_id(0) % chunks, row * length
    c, t_in = tl.arange(0, BK), tl.arange(0, C)
    t = i * C + t_in
    inside = t < length
    at_key, keys = t[:, None] * K + c, inside[:, None] & (c < K)
    half = q_ptr.dtype.element_ty
    beta = tl.load(beta_ptr + start + t, mask=inside, other=0.0)[:, None]
    log_decay = tl.load(log_decay_ptr + start + t, mask=inside, other=0.0)
    q = tl.load(q_ptr + start * K + at_key, mask=keys, other=0.0)
    k = tl.load(k_ptr + start * K + at_key, mask=keys, other=0.0)
    total, whole = tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)
    from_start, to_end = tl.exp(total)[:, None], tl.exp(whole - total)[:, None]

    # Through the state at the end of the chunk: what the key writes.
    dk = tl.zeros([C, BK], tl.float32)
    d_beta = tl.zeros([C], tl.float32)
    d_kept = 0.0
    for first in tl.static_range(0, V, BV):
        d = first + tl.arange(0, BV)
        at_value, values = t[:, None] * V + d, inside[:, None] & (d < V)
        at_state, in_state = c[:, None] * V + d, (c < K)[:, None] & (d < V)
        z = tl.load(z_ptr + start * V + at_value, mask=values, other=0.0).to(tl.float32)
        dr = tl.load(dr_ptr + start * V + at_value, mask=values, other=0.0).to(tl.float32)
        state = tl.load(states_ptr + (row * chunks + i) * K * V + at_state, mask=in_state, other=0.0)
        d_state = tl.load(d_states_ptr + (row * chunks + i) * K * V + at_state, mask=in_state, other=0.0)
        tl.store(dv_ptr + start * V + at_value, beta * dr, mask=values)
        d_beta += tl.sum(dr * z, 1)
        d_kept += tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1), 0)
        dk += tl.dot((to_end * beta * z).to(half), tl.trans(d_state), input_precision=PRECISION)
    tl.store(d_beta_ptr + start + t, d_beta, mask=inside)
    through_end = tl.sum(dk * k.to(tl.float32), 1)

    # Through the state at its start: what query and key read.
    dq = tl.zeros([C, BK], tl.float32)
    for first in tl.static_range(0, V, BV):
        d = first + tl.arange(0, BV)
        at_value, values = t[:, None] * V + d, inside[:, None] & (d < V)
        at_state, in_state = c[:, None] * V + d, (c < K)[:, None] & (d < V)
        dr = tl.load(dr_ptr + start * V + at_value, mask=values, other=0.0).to(tl.float32)
        do = tl.load(do_ptr + start * V + at_value, mask=values, other=0.0).to(tl.float32)
        state = tl.load(states_ptr + (row * chunks + i) * K * V + at_state, mask=in_state, other=0.0)
        dk -= tl.dot((from_start * beta * dr).to(half), tl.trans(state), input_precision=PRECISION)
        dq += tl.dot((from_start * scale * do).to(half), tl.trans(state), input_precision=PRECISION)
    through_start = tl.sum(dk * k.to(tl.float32), 1) - through_end + tl.sum(dq * q.to(tl.float32), 1)

    # Inside the chunk. Row and column sums are of the same float32 numbers, so that what cancels, cancels.
    decay = _decay(total, C)
    d_attention = tl.zeros([C, C], tl.float32)
    for first in tl.static_range(0, V, BV):
        d = first + tl.arange(0, BV)
        at_value, values = t[:, None] * V + d, inside[:, None] & (d < V)
        do = tl.load(do_ptr + start * V + at_value, mask=values, other=0.0)
        z = tl.load(z_ptr + start * V + at_value, mask=values, other=0.0).to(tl.float32)
        d_attention += tl.dot(do, tl.trans((beta * z).to(half)), input_precision=PRECISION)
    d_attention *= decay * scale
    d_exponent = d_attention * tl.dot(q, tl.trans(k), input_precision=PRECISION)
    d_total = tl.sum(d_exponent, 1) - tl.sum(d_exponent, 0)
    d_attention_half = d_attention.to(half)
    dq += tl.dot(d_attention_half, k, input_precision=PRECISION)
    dk += tl.dot(tl.trans(d_attention_half), q, input_precision=PRECISION)
    tl.store(dq_ptr + start * K + at_key, dq, mask=keys)

    d_a = tl.zeros([C, C], tl.float32)
    for first in tl.static_range(0, V, BV):
        d = first + tl.arange(0, BV)
        at_value, values = t[:, None] * V + d, inside[:, None] & (d < V)
        dr = tl.load(dr_ptr + start * V + at_value, mask=values, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + start * V + at_value, mask=values, other=0.0).to(tl.float32)
        d_a -= tl.dot((beta * dr).to(half), tl.trans((beta * z).to(half)), input_precision=PRECISION)
    d_a *= tl.where(t_in[:, None] > t_in[None, :], decay, 0.0)
    d_exponent = d_a * tl.dot(k, tl.trans(k), input_precision=PRECISION)
    d_total += tl.sum(d_exponent, 1) - tl.sum(d_exponent, 0) + through_start
    dk += tl.dot((d_a + tl.trans(d_a)).to(half), k, input_precision=PRECISION)
    tl.store(dk_ptr + start * K + at_key, dk, mask=keys)

    # A log-decay counts in the sums up to its own and all later positions, and in the decays to the end of all earlier.
    d_log_decay = tl.cumsum(d_total, 0, reverse=True) + tl.cumsum(through_end, 0) - through_end
    d_log_decay += tl.exp(whole) * d_kept
    tl.store(d_log_decay_ptr + start + t, d_log_decay, mask=inside)


class Gradients(NamedTuple):
    """Of the inputs, in their order and shapes; `initial_state` is None if there was none."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor
    initial_state: Tensor | None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    save: bool = True,
) -> tuple[Tensor, Tensor | None, Saved | None]:
    """Outputs [N, T, V], the final state [N, K, V] float32 if wanted, and what `backward` needs if `save`.

    q, k [N, T, K] and v [N, T, V] of one type; log_decay and beta [N, T] float32; initial_state [N, K, V] float32.
    All contiguous, K at most 256. Keys are of about unit norm: in 16 bits, products of two keys must fit float16.
    """
    rows, length, key_dim = k.shape
    value_dim, sizes = v.shape[2], _sizes(q, v)
    chunks = triton.cdiv(length, sizes["C"])
    y = k.new_empty(rows, length, sizes["C"])
    common = {name: sizes[name] for name in ("K", "BK", "C", "PRECISION")}
    warps = _warps(key_dim)
    operand = tl.float32 if q.dtype == torch.float32 else tl.float16
    _solve[rows * chunks,](k, log_decay, beta, y, length, chunks, **common, OPERAND=operand, num_warps=4)
    o = torch.empty_like(v)
    end = k.new_empty(rows, key_dim, value_dim, dtype=torch.float32) if output_final_state else None
    z = torch.empty_like(v) if save else None
    states = k.new_empty(rows, chunks, key_dim, value_dim) if save else None
    _forward[rows * triton.cdiv(value_dim, sizes["BV"]),](
        q, k, v, log_decay, beta, y, initial_state, o, z, states, end, length, chunks, scale, **sizes,
        STARTS=initial_state is not None, ENDS=output_final_state, SAVES=save, num_warps=warps, num_stages=3,
    )  # fmt: skip
    return o, end, Saved(y, z, states) if z is not None and states is not None else None


def backward(
    do: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    saved: Saved,
    scale: float = 1.0,
    with_initial_state: bool = False,
) -> Gradients:
    """Gradients of the inputs of `forward` from those of its outputs [N, T, V] and of its final state (or None)."""
    rows, length, key_dim = k.shape
    value_dim, sizes = do.shape[2], _sizes(q, do)
    chunks, warps = saved.states.shape[1], _warps(key_dim)
    dr, d_states = torch.empty_like(do), torch.empty_like(saved.states)
    d_start = k.new_empty(rows, key_dim, value_dim, dtype=torch.float32) if with_initial_state else None
    _backward_state[rows * triton.cdiv(value_dim, sizes["BV"]),](
        q, k, log_decay, beta, saved.y, do, d_final_state, dr, d_states, d_start, length, chunks, scale, **sizes,
        STARTS=with_initial_state, ENDS=d_final_state is not None, num_warps=warps, num_stages=3,
    )  # fmt: skip
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(do)
    d_log_decay, d_beta = torch.empty_like(log_decay), torch.empty_like(beta)
    _backward_inputs[rows * chunks,](
        q, k, log_decay, beta, saved.z, dr, saved.states, d_states, do, dq, dk, dv, d_log_decay, d_beta,
        length, chunks, scale, **sizes, num_warps=warps,
    )  # fmt: skip
    return Gradients(dq, dk, dv, d_log_decay, d_beta, d_start)


def _sizes(q: Tensor, v: Tensor) -> dict[str, Any]:
    """Compile-time sizes. Chunks of 64 fill the matrix units; larger keys leave registers for chunks of 32."""
    key_dim, value_dim = q.shape[2], v.shape[2]
    return {
        "K": key_dim,
        "V": value_dim,
        "BK": max(16, triton.next_power_of_2(key_dim)),
        "BV": min(64, max(16, triton.next_power_of_2(value_dim))),
        "C": 64 if key_dim <= 64 else 32,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def _warps(key_dim: int) -> int:
    return 4 if key_dim <= 64 else 8
