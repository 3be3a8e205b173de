"""The gated delta rule: one signature, three backends (Triton on CUDA, chunked PyTorch anywhere, fla to compare with).

Sources: Yang, Kautz, Hatamizadeh, Gated Delta Networks (arXiv 2412.06464), for the rule and its chunked form;
Liu and Gu (arXiv 2606.04048) for the model this project studies.

How the chunked form comes about
--------------------------------
Write ``u_t = β_t z_t`` with ``z_t = v_t - α_t S_{t-1}ᵀ k_t``: what the decayed state gets wrong about the value
stored under ``k_t``. Then ``S_t = α_t S_{t-1} + k_t u_tᵀ`` unrolls from the state S at the start of a chunk to

    S_t = γ_t S + Σ_{s≤t} D_ts k_s u_sᵀ,     D_ts = α_{s+1} ⋯ α_t  (s ≤ t, else 0),   γ_t = α_1 ⋯ α_t.

Put into the definition of z_t, the only unknowns are the z of the same chunk, and they obey a triangular system
(rows of K, V, Z, U, ... are the positions of the chunk; ∘ is elementwise, vectors scale rows):

    Z = X - A U,    X = V - γ∘(K S),    A = strictly lower part of D∘(K Kᵀ)
    U = β∘Z   =>   (I + β∘A) U = β∘X   =>   U = W (β∘X),   W = (I + β∘A)⁻¹       (the "UT transform")

so a chunk costs a few small matrix products instead of C dependent steps:

    O  = γ∘(Q S) + P U,           P = D∘(Q Kᵀ)
    S⁺ = γ_C S + (δ∘K)ᵀ U,        δ_s = D_Cs                                     (state at the end of the chunk)

W, A, P need no state, so they are computed for many chunks at once; only X, U, S⁺ go from chunk to chunk.
W is unit lower triangular and comes from a triangular solve, which stays accurate when keys are parallel (the
product of powers of A does not: its terms grow like binomials of C and cancel).

The way back, from dO and dS⁺ (chunks in reverse; again only the first three lines and dS are sequential):

    dU = Pᵀ dO + δ∘(K dS⁺)                     through O and S⁺
    dR = Wᵀ dU                                 through U = W R, R = β∘X
    dX = β∘dR = dV
    dS = γ_C dS⁺ + (γ∘Q)ᵀ dO - (γ∘K)ᵀ dX
    dβ = rowsum(dR∘Z)                          both uses of β at once, because U = β∘Z
    dA = -dX Uᵀ,  dP = dO Uᵀ                   W's gradient: d(W⁻¹) = -Wᵀ(dU Rᵀ)Wᵀ = -dR Uᵀ
    dQ = γ∘(dO Sᵀ) + (dP∘D) K
    dK = -γ∘(dX Sᵀ) + δ∘(U dS⁺ᵀ) + (dP∘D)ᵀ Q + (dA∘D + (dA∘D)ᵀ) K

Decays. Each of D, γ, δ is the exponential of a sum of log-decays over an interval, and these sums are formed
directly, by a product with a constant 0/1 matrix, never as a difference of running sums: after a few steps of
log-decay -50 such a difference has lost the digits of the mild decays that follow, and its gradient is a
difference of large equal numbers where the true one is 1e-22. The exponents are never positive: no overflow.
"""

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from gdn_mup.model.kernels import check_kernels

Backend = Literal["torch", "triton", "fla"]

# MKL's vectorised exp sets itself up in its first call. If two threads make that call at once, one of them gets a
# variant of half the digits: errors of 3e-5 in 6 of 70 fresh processes (torch 2.13, two threads), in none of 90
# after one call from one thread, which this is.
torch.zeros(1).exp()


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the gated delta rule over N independent sequences of T positions.

    With the state ``S [K, V]`` of each row (fla's layout: the transpose of the paper's)

        S_t = exp(log_decay_t) S_{t-1} + β_t k_t (v_t - exp(log_decay_t) S_{t-1}ᵀ k_t)ᵀ
        o_t = scale · S_tᵀ q_t

    Rows (members × batch × heads, folded together) never touch each other: a row of NaN leaves every other row's
    outputs and gradients bit-identical.

    Args:
        q: queries ``[N, T, K]``.
        k: keys ``[N, T, K]``, used as they are; the rule is stable for ``β |k|² ≤ 2``.
        v: values ``[N, T, V]``.
        log_decay: natural logarithm of the decay, finite and ``≤ 0``, ``[N, T]``.
        beta: write strength, ``[N, T]``.
        scale: factor on the output.
        initial_state: S before the first position ``[N, K, V]``; zero if None.
        output_final_state: also return S after the last position.
        backend: "triton" (the kernels of `gdn_mup.kernels.delta_rule`; CUDA, K up to 256), "fla"
            (flash-linear-attention's kernels; CUDA) or "torch" (anywhere; float32 or float64, the latter for
            gradcheck; no double backward). None: triton for CUDA tensors of 16 bits, torch otherwise.

    Returns:
        outputs ``[N, T, V]`` and the final state ``[N, K, V]``, or None in its place.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
        MachineError: backend "fla" on a GPU without flash-linear-attention and triton (the extra ``gpu`` brings both),
            or with a Triton that gives wrong gradients there.

    Source: arXiv 2412.06464, equation 10 (the rule) and section 3.3 (its chunked form); arXiv 2606.04048, section 2.
    """
    _check_shapes(q, k, v, log_decay, beta, initial_state)
    if backend is None:
        backend = "triton" if q.is_cuda and q.element_size() == 2 else "torch"
    if backend == "triton":
        inputs = (q.contiguous(), k.contiguous(), v.contiguous(), log_decay.float(), beta.float())
        return _TritonGatedDeltaRule.apply(*inputs, initial_state, scale, output_final_state)
    if backend == "fla":
        return _fla(q, k, v, log_decay, beta, scale, initial_state, output_final_state)
    if backend != "torch":
        raise ValueError(f"backend must be 'torch', 'triton', 'fla' or None, not {backend!r}")
    if scale != 1.0:
        q = q * scale
    if initial_state is None:
        initial_state = k.new_zeros(k.shape[0], k.shape[2], v.shape[2])
    length = k.shape[1]
    chunk_size = min(length, _chunk_size(k.shape[2], v.shape[2]))
    if padding := -length % chunk_size:
        # k = 0, beta = 0, log_decay = 0: a padded position leaves the state as it is.
        q, k, v = (functional.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
        log_decay, beta = (functional.pad(x, (0, padding)) for x in (log_decay, beta))
    o, state = _ChunkedGatedDeltaRule.apply(q, k, v, log_decay, beta, initial_state, chunk_size)
    return o[:, :length] if padding else o, state if output_final_state else None


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, initial_state: Tensor | None
) -> None:
    if k.ndim != 3 or v.ndim != 3 or k.shape[1] < 1:
        raise ValueError(f"k [N, T, K] and v [N, T, V] with T >= 1, got {list(k.shape)} and {list(v.shape)}")
    rows, length, key_dim = k.shape
    expected = {
        "q": (q, [rows, length, key_dim]),
        "v": (v, [rows, length, v.shape[2]]),
        "log_decay": (log_decay, [rows, length]),
        "beta": (beta, [rows, length]),
    }
    if initial_state is not None:
        expected["initial_state"] = (initial_state, [rows, key_dim, v.shape[2]])
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; k and v ask for {shape}")


class _TritonGatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        scale: float,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        from gdn_mup.kernels import delta_rule as kernels  # imports triton: only where it is used

        ctx.kernels, ctx.scale, ctx.starts = kernels, scale, initial_state is not None
        ctx.set_materialize_grads(False)
        log_decay, beta = log_decay.contiguous(), beta.contiguous()
        start = initial_state if initial_state is None else initial_state.float().contiguous()
        o, end, saved = kernels.forward(q, k, v, log_decay, beta, scale, start, output_final_state)
        assert saved is not None
        ctx.save_for_backward(q, k, log_decay, beta, *saved)
        return o, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, log_decay, beta, *saved = ctx.saved_tensors
        kept = ctx.kernels.Saved(*saved)
        do, d_end = grads
        do = torch.zeros_like(kept.z) if do is None else do.contiguous()
        d_end = None if d_end is None else d_end.contiguous()
        gradients = ctx.kernels.backward(do, d_end, q, k, log_decay, beta, kept, ctx.scale, ctx.starts)
        return (*gradients, None, None)


def _fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """fla's kernel with the rows as its batch and one head, so one autotuned kernel serves every width."""
    if q.is_cuda:
        check_kernels()
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # imports triton: only where it is used

    o, state = chunk_gated_delta_rule(
        q=q.unsqueeze(2),
        k=k.unsqueeze(2),
        v=v.unsqueeze(2),
        g=log_decay.unsqueeze(2),
        beta=beta.unsqueeze(2),
        scale=scale,  # fla's default is 1/√K
        initial_state=None if initial_state is None else initial_state.unsqueeze(1),
        output_final_state=output_final_state,
    )
    return o.squeeze(2), state.squeeze(1) if output_final_state else None


def _chunk_size(key_dim: int, value_dim: int) -> int:
    """Chunk length C: work inside a chunk grows with C, work on the K × V state falls with it (measured)."""
    return 16 if max(key_dim, value_dim) <= 16 else 32


# How many elements of a [chunks, C, C] intermediate are worked on at a time: about ten of these, 4 bytes each,
# live at once and should stay in a core's second-level cache, else every elementwise operation waits for memory.
_SEGMENT_ELEMENTS = 128 * 1024


class _Constants(NamedTuple):
    """0/1 matrices that sum log-decays over intervals of a chunk; t, s, r index positions, [C, ...]."""

    between: Tensor  # [C, C·C]: r counts for (t, s) if s < r <= t
    up_to: Tensor  # [C, C]: r counts for t if r <= t
    after: Tensor  # [C, C]: r counts for s if s < r
    identity: Tensor  # [C, C]


@lru_cache(maxsize=16)
def _constants(size: int, dtype: torch.dtype, device: torch.device) -> _Constants:
    r = torch.arange(size, device=device)
    t, s = r[:, None], r
    between = (s < r[:, None, None]) & (r[:, None, None] <= t)
    return _Constants(
        between=between.to(dtype).view(size, size * size),
        up_to=(r[:, None] <= r).to(dtype),
        after=(r < r[:, None]).to(dtype),
        identity=torch.eye(size, dtype=dtype, device=device),
    )


def _segments(chunks: int, rows: int, chunk_size: int) -> list[slice]:
    """Consecutive chunks that are worked on together: all rows of as many chunks as the cache holds."""
    together = max(1, _SEGMENT_ELEMENTS // (rows * chunk_size**2))
    return [slice(start, min(start + together, chunks)) for start in range(0, chunks, together)]


class _ChunkedGatedDeltaRule(torch.autograd.Function):
    """The equations of the module's docstring; B stands for (chunks of the segment) × N, chunk-major."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        rows, length, key_dim = k.shape
        value_dim = v.shape[2]
        constants = _constants(chunk_size, k.dtype, k.device)
        inputs = [_by_chunk(x, chunk_size) for x in (q, k, v, log_decay, beta)]
        outputs = v.new_empty(v.shape)
        outputs_by_chunk = _by_chunk(outputs, chunk_size)
        segments = _segments(length // chunk_size, rows, chunk_size)
        state = initial_state
        saved: list[Tensor] = []
        for segment in segments:
            q_, k_, v_, log_decay_, beta_ = (_flat(x[segment]) for x in inputs)
            chunks = segment.stop - segment.start
            # Without a state: D, γ, A, W, P.
            decay = (log_decay_ @ constants.between).view(-1, chunk_size, chunk_size).exp_().tril_()
            decay_from_start = (log_decay_ @ constants.up_to).exp_().unsqueeze(2)
            decay_to_end = decay[:, -1].unsqueeze(2)
            beta_ = beta_.unsqueeze(2)
            key_overlap = torch.bmm(k_, k_.mT).mul_(decay).tril_(-1)
            attention = torch.bmm(q_, k_.mT).mul_(decay)
            inverse = _unit_lower_inverse(key_overlap * beta_, constants.identity)
            reading_keys = (k_ * decay_from_start).view(chunks, rows, chunk_size, key_dim)
            writing_keys = (k_ * decay_to_end).view(chunks, rows, chunk_size, key_dim)
            # From chunk to chunk: X, U, S.
            states = k.new_empty(chunks + 1, rows, key_dim, value_dim)
            states[0] = state
            innovation = v.new_empty(chunks, rows, chunk_size, value_dim)
            written = v.new_empty(chunks, rows, chunk_size, value_dim)
            v_, inverse_ = v_.view_as(written), inverse.view(chunks, rows, chunk_size, chunk_size)
            kept = decay_from_start[:, -1:].view(chunks, rows, 1, 1)
            beta_ = beta_.view(chunks, rows, chunk_size, 1)
            for i in range(chunks):
                torch.baddbmm(v_[i], reading_keys[i], states[i], alpha=-1, out=innovation[i])
                torch.bmm(inverse_[i], innovation[i] * beta_[i], out=written[i])
                torch.mul(kept[i], states[i], out=states[i + 1]).baddbmm_(writing_keys[i].mT, written[i])
            state, states = states[-1], states[:-1]
            read = torch.bmm(q_ * decay_from_start, states.flatten(0, 1))
            read.baddbmm_(attention, written.flatten(0, 1))
            outputs_by_chunk[segment] = read.view_as(written)
            saved += [decay, decay_from_start, key_overlap, attention, inverse, innovation, written, states]
        ctx.save_for_backward(q, k, beta, *saved)
        ctx.chunk_size, ctx.segments = chunk_size, segments
        return outputs, state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_outputs, grad_state = grads
        q, k, beta, *saved = ctx.saved_tensors
        chunk_size, rows = ctx.chunk_size, k.shape[0]
        constants = _constants(chunk_size, k.dtype, k.device)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(grad_outputs)
        grad_log_decay, grad_beta = torch.empty_like(beta), torch.empty_like(beta)
        inputs = [_by_chunk(x, chunk_size) for x in (q, k, beta, grad_outputs.contiguous())]
        results = [_by_chunk(x, chunk_size) for x in (grad_q, grad_k, grad_v, grad_log_decay, grad_beta)]
        for number, segment in reversed(list(enumerate(ctx.segments))):
            decay, decay_from_start, key_overlap, attention, inverse, innovation, written, states = saved[
                8 * number : 8 * number + 8
            ]
            q_, k_, beta_, d_o = (_flat(x[segment]) for x in inputs)
            chunks = segment.stop - segment.start
            decay_to_end = decay[:, -1].unsqueeze(2)
            # From chunk to chunk, backwards: dU, dR, dX, dS; d_states[i] belongs to the state before chunk i.
            by_chunk = (chunks, rows, chunk_size, -1)
            d_written = torch.bmm(attention.mT, d_o).view_as(written)
            d_read_state = torch.bmm((q_ * decay_from_start).mT, d_o).view_as(states)
            reading_keys = (k_ * decay_from_start).view(by_chunk)
            writing_keys = (k_ * decay_to_end).view(by_chunk)
            inverse_ = inverse.view(by_chunk)
            kept = decay_from_start[:, -1:].view(chunks, rows, 1, 1)
            beta_ = beta_.view(by_chunk)
            d_states = states.new_empty(chunks + 1, *states.shape[1:])
            d_states[chunks] = grad_state
            d_scaled = torch.empty_like(written)
            d_innovation = torch.empty_like(written)
            for i in reversed(range(chunks)):
                d_written[i].baddbmm_(writing_keys[i], d_states[i + 1])
                torch.bmm(inverse_[i].mT, d_written[i], out=d_scaled[i])
                torch.mul(d_scaled[i], beta_[i], out=d_innovation[i])
                torch.addcmul(d_read_state[i], kept[i], d_states[i + 1], out=d_states[i])
                d_states[i].baddbmm_(reading_keys[i].mT, d_innovation[i], alpha=-1)
            grad_state = d_states[0]
            # Everything else, for the whole segment at once.
            state, d_state = states.flatten(0, 1), d_states[1:].flatten(0, 1)
            u, d_x = written.flatten(0, 1), d_innovation.flatten(0, 1)
            z = torch.baddbmm(innovation.flatten(0, 1), key_overlap, u, alpha=-1)
            d_beta = z.mul_(d_scaled.flatten(0, 1)).sum(2)

            d_key_overlap = torch.bmm(d_x, u.mT).neg_().tril_(-1)
            d_attention = torch.bmm(d_o, u.mT)
            d_exponent = (d_key_overlap * key_overlap).addcmul_(d_attention, attention)
            d_key_overlap.mul_(decay)
            d_attention.mul_(decay)

            d_q = torch.bmm(d_o, state.mT).mul_(decay_from_start)
            d_k = torch.bmm(d_x, state.mT).mul_(decay_from_start).neg_()
            d_k_end = torch.bmm(u, d_state.mT).mul_(decay_to_end)
            d_from_start = (d_q * q_).addcmul_(d_k, k_).sum(2)
            d_from_start[:, -1] += decay_from_start[:, -1, 0] * (state * d_state).sum((1, 2))
            d_to_end = (d_k_end * k_).sum(2)
            d_log_decay = d_exponent.view(-1, chunk_size**2) @ constants.between.mT
            d_log_decay.addmm_(d_from_start, constants.up_to.mT).addmm_(d_to_end, constants.after.mT)

            d_q.baddbmm_(d_attention, k_)
            d_k += d_k_end
            d_k.baddbmm_(d_attention.mT, q_).baddbmm_(d_key_overlap, k_).baddbmm_(d_key_overlap.mT, k_)
            for result, value in zip(results, (d_q, d_k, d_x, d_log_decay, d_beta), strict=True):
                result[segment] = value.view(chunks, rows, *value.shape[1:])
        return grad_q, grad_k, grad_v, grad_log_decay, grad_beta, grad_state, None


def _by_chunk(x: Tensor, chunk_size: int) -> Tensor:
    """[N, T, ...] seen as [chunks, N, C, ...]."""
    return x.unflatten(1, (-1, chunk_size)).transpose(0, 1)


def _flat(x: Tensor) -> Tensor:
    """[chunks, N, ...] as [chunks · N, ...]; a copy unless it is a single chunk."""
    return x.reshape(-1, *x.shape[2:])


def _unit_lower_inverse(strictly_lower: Tensor, identity: Tensor) -> Tensor:
    """(I + L)⁻¹ of each [C, C]; solved as W'ᵀ (I + L)ᵀ = I, the orientation that LAPACK takes without copies."""
    right_hand_side = identity.repeat(strictly_lower.shape[0], 1, 1).mT
    return torch.linalg.solve_triangular(
        strictly_lower.mT, right_hand_side, upper=True, left=False, unitriangular=True
    ).mT
