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
def _backward_state(q_ptr, k_ptr, log_decay_ptr, beta_ptr, y_ptr, do_ptr, d_end_ptr, dr_ptr, dv_ptr, d_states_ptr,
                    d_start_ptr, length, chunks, scale, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                    BV: tl.constexpr, C: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """dR, dV and the gradient of the state at the end of each chunk, of one row and one block of value channels."""
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
        tl.store(dv_ptr + start * V + at_value, beta * dr, mask=values)
        d_state = tl.exp(whole) * d_state
        d_state += tl.dot(tl.trans(q), (from_start * scale * do).to(half), input_precision=PRECISION)
        d_state -= tl.dot(tl.trans(k), (from_start * beta * dr).to(half), input_precision=PRECISION)
    if STARTS:
        tl.store(d_start_ptr + row * K * V + at_state, d_state, mask=in_state)


@triton.jit(do_not_specialize=["length", "chunks"])
def _backward_inputs(q_ptr, k_ptr, log_decay_ptr, beta_ptr, z_ptr, dr_ptr, states_ptr, d_states_ptr, do_ptr,
                     dq_ptr, dk_ptr, d_log_decay_ptr, d_beta_ptr, length, chunks, scale,
                     K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """The gradients of one chunk's other inputs, once dR and the gradients of the states are known.

    Products read what is in memory as it is; what scales a row or a column of theirs is multiplied on afterwards.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    i, start = tl.program_id(0) % chunks, row * length
    t_in = tl.arange(0, C)
    t = i * C + t_in
    inside = t < length
    half = q_ptr.dtype.element_ty
    beta = tl.load(beta_ptr + start + t, mask=inside, other=0.0)
    log_decay = tl.load(log_decay_ptr + start + t, mask=inside, other=0.0)
    total, whole = tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)
    from_start, to_end = tl.exp(total), tl.exp(whole - total)

    # Inside the chunk. Row and column sums are of the same float32 numbers, so that what cancels, cancels.
    outputs_z, rests_z = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for first in tl.range(0, V, BV):
        d = first + tl.arange(0, BV)
        at_value, values = t[:, None] * V + d, inside[:, None] & (d < V)
        do = tl.load(do_ptr + start * V + at_value, mask=values, other=0.0)
        dr = tl.load(dr_ptr + start * V + at_value, mask=values, other=0.0)
        z = tl.load(z_ptr + start * V + at_value, mask=values, other=0.0)
        outputs_z = tl.dot(do, tl.trans(z), outputs_z, input_precision=PRECISION)
        rests_z = tl.dot(dr, tl.trans(z), rests_z, input_precision=PRECISION)
    overlap_q, overlap_k = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for first in tl.range(0, K, BK):
        c = first + tl.arange(0, BK)
        at_key, keys = t[:, None] * K + c, inside[:, None] & (c < K)
        q = tl.load(q_ptr + start * K + at_key, mask=keys, other=0.0)
        k = tl.load(k_ptr + start * K + at_key, mask=keys, other=0.0)
        overlap_q = tl.dot(q, tl.trans(k), overlap_q, input_precision=PRECISION)
        overlap_k = tl.dot(k, tl.trans(k), overlap_k, input_precision=PRECISION)
    diagonal = t_in[:, None] == t_in[None, :]
    tl.store(d_beta_ptr + start + t, tl.sum(tl.where(diagonal, rests_z, 0.0), 1), mask=inside)
    decay = _decay(total, C)
    d_attention = outputs_z * decay * (scale * beta)[None, :]
    d_a = -rests_z * tl.where(diagonal, 0.0, decay) * beta[:, None] * beta[None, :]
    d_exponent = d_attention * overlap_q + d_a * overlap_k
    d_total = tl.sum(d_exponent, 1) - tl.sum(d_exponent, 0)
    of_q, of_k = d_attention.to(half), (d_a + tl.trans(d_a)).to(half)

    # Through the states: at the end of the chunk what the key writes, at its start what query and key read.
    through_end, through_start = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    d_kept = 0.0
    for first_key in tl.range(0, K, BK):
        c = first_key + tl.arange(0, BK)
        at_key, keys = t[:, None] * K + c, inside[:, None] & (c < K)
        q = tl.load(q_ptr + start * K + at_key, mask=keys, other=0.0)
        k = tl.load(k_ptr + start * K + at_key, mask=keys, other=0.0)
        dq, dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        dk_end = tl.zeros([C, BK], tl.float32)
        for first in tl.range(0, V, BV):
            d = first + tl.arange(0, BV)
            at_value, values = t[:, None] * V + d, inside[:, None] & (d < V)
            at_state, in_state = c[:, None] * V + d, (c < K)[:, None] & (d < V)
            state = tl.load(states_ptr + (row * chunks + i) * K * V + at_state, mask=in_state, other=0.0)
            d_state = tl.load(d_states_ptr + (row * chunks + i) * K * V + at_state, mask=in_state, other=0.0)
            do = tl.load(do_ptr + start * V + at_value, mask=values, other=0.0)
            dr = tl.load(dr_ptr + start * V + at_value, mask=values, other=0.0)
            z = tl.load(z_ptr + start * V + at_value, mask=values, other=0.0)
            d_kept += tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1), 0)
            dq = tl.dot(do, tl.trans(state), dq, input_precision=PRECISION)
            dk = tl.dot(dr, tl.trans(state), dk, input_precision=PRECISION)
            dk_end = tl.dot(z, tl.trans(d_state), dk_end, input_precision=PRECISION)
        dq *= (from_start * scale)[:, None]
        dk *= -(from_start * beta)[:, None]
        dk_end *= (to_end * beta)[:, None]
        through_end += tl.sum(dk_end * k.to(tl.float32), 1)
        through_start += tl.sum(dk * k.to(tl.float32) + dq * q.to(tl.float32), 1)
        dq = tl.dot(of_q, k, dq, input_precision=PRECISION)
        dk = tl.dot(tl.trans(of_q), q, dk + dk_end, input_precision=PRECISION)
        dk = tl.dot(of_k, k, dk, input_precision=PRECISION)
        tl.store(dq_ptr + start * K + at_key, dq, mask=keys)
        tl.store(dk_ptr + start * K + at_key, dk, mask=keys)

    # A log-decay counts in the sums up to its own and all later positions, and in the decays to the end of all earlier.
    d_log_decay = tl.cumsum(d_total + through_start, 0, reverse=True) + tl.cumsum(through_end, 0) - through_end
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
    value_dim, tiling = v.shape[2], tiling_of(key_dim, v.shape[2])
    chunks, common = triton.cdiv(length, tiling.chunk), _common(q, v, tiling)
    y = k.new_empty(rows, length, tiling.chunk)
    operand = tl.float32 if q.dtype == torch.float32 else tl.float16
    _solve[rows * chunks,](
        k, log_decay, beta, y, length, chunks, **_but(common, "V"), BK=_padded(key_dim), OPERAND=operand,
        num_warps=tiling.solve.warps,
    )  # fmt: skip
    o = torch.empty_like(v)
    end = k.new_empty(rows, key_dim, value_dim, dtype=torch.float32) if output_final_state else None
    z = torch.empty_like(v) if save else None
    states = k.new_empty(rows, chunks, key_dim, value_dim) if save else None
    at = tiling.forward
    _forward[rows * triton.cdiv(value_dim, at.values),](
        q, k, v, log_decay, beta, y, initial_state, o, z, states, end, length, chunks, scale, **common,
        BK=_padded(key_dim), BV=at.values, STARTS=initial_state is not None, ENDS=output_final_state, SAVES=save,
        num_warps=at.warps, num_stages=at.stages,
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
    value_dim, tiling = do.shape[2], tiling_of(key_dim, do.shape[2])
    chunks, common = saved.states.shape[1], _common(q, do, tiling)
    dr, d_states, dv = torch.empty_like(do), torch.empty_like(saved.states), torch.empty_like(do)
    d_start = k.new_empty(rows, key_dim, value_dim, dtype=torch.float32) if with_initial_state else None
    at = tiling.backward_state
    _backward_state[rows * triton.cdiv(value_dim, at.values),](
        q, k, log_decay, beta, saved.y, do, d_final_state, dr, dv, d_states, d_start, length, chunks, scale, **common,
        BK=_padded(key_dim), BV=at.values, STARTS=with_initial_state, ENDS=d_final_state is not None,
        num_warps=at.warps, num_stages=at.stages,
    )  # fmt: skip
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    d_log_decay, d_beta = torch.empty_like(log_decay), torch.empty_like(beta)
    at = tiling.backward_inputs
    _backward_inputs[rows * chunks,](
        q, k, log_decay, beta, saved.z, dr, saved.states, d_states, do, dq, dk, d_log_decay, d_beta,
        length, chunks, scale, **common, BK=at.keys, BV=at.values, num_warps=at.warps, num_stages=at.stages,
    )  # fmt: skip
    return Gradients(dq, dk, dv, d_log_decay, d_beta, d_start)


class Launch(NamedTuple):
    """How a kernel cuts its work: channels of values and keys at a time, warps of a program, loads in flight."""

    values: int
    warps: int
    stages: int = 3
    keys: int = 0  # where a kernel takes them in parts

    def within(self, keys: int, values: int) -> "Launch":
        """The same for heads with fewer channels."""
        return self._replace(values=min(self.values, values), keys=min(self.keys, keys))


class Tiling(NamedTuple):
    """How one shape of heads is computed."""

    chunk: int
    solve: Launch
    forward: Launch
    backward_state: Launch
    backward_inputs: Launch


# The fastest by `benchmarks/delta_rule_tilings.py` on an H200, but for the last, which is yet to be measured: chunks of
# 64 leave a state of 256 keys no registers.
TILINGS = {
    (64, 64): Tiling(64, Launch(0, 4), Launch(64, 4), Launch(64, 4), Launch(64, 4, 2, keys=64)),
    (128, 256): Tiling(64, Launch(0, 4), Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 8, 3, keys=128)),
    (256, 256): Tiling(32, Launch(0, 4), Launch(64, 8), Launch(64, 8), Launch(64, 8, 3, keys=128)),
}


def tiling_of(key_dim: int, value_dim: int) -> Tiling:
    """How heads of this shape are computed: as the smallest shape of the table that they fit in."""
    keys, values = _padded(key_dim), _padded(value_dim)
    tiling = TILINGS[min((shape for shape in TILINGS if shape[0] >= keys), key=lambda shape: (shape[0], -shape[1]))]
    return tiling._replace(
        forward=tiling.forward.within(keys, values),
        backward_state=tiling.backward_state.within(keys, values),
        backward_inputs=tiling.backward_inputs.within(keys, values),
    )


def _common(q: Tensor, v: Tensor, tiling: Tiling) -> dict[str, Any]:
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return {"K": q.shape[2], "V": v.shape[2], "C": tiling.chunk, "PRECISION": precision}


def _but(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in sizes.items() if key != name}


def _padded(channels: int) -> int:
    """What products take: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(channels))
