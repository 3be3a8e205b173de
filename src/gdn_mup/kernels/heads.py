"""From one projection to the heads of the gated delta rule, and from its output back.

Shapes below: M members, B sequences, T tokens, H heads, K key dim, V value dim, S taps. The projection
y [M, B, T, R] holds, along its last axis, q (H·K) | k (H·K) | v (H·V) | g (H·V) | alpha (H) | beta (H) | padding.
What the delta rule takes and gives is *folded*: its rows are (member · B + sequence) · H + head.

Activations are contiguous and of one element type; arithmetic is in float32. Parameters and their gradients are
float32 views whose members may lie any distance apart and whose other axes are contiguous. Gradients of
parameters are summed in a fixed order, so that they are the same in every run.
"""
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005  Triton knows no starred tuples

import torch
import triton
import triton.language as tl
from torch import Tensor

L2_EPSILON = 1e-6  # as fla normalises q and k
WARPS = 4


# ---- Short convolution, SiLU and L2 norm: y's columns q, k, v -> q, k, v folded ----


@triton.jit
def _stream_of(program, heads, KEY_DIM: tl.constexpr, DIM: tl.constexpr, FIRST: tl.constexpr, STREAMS: tl.constexpr):
    """(stream, head, its first column in y, block) of a program; streams 0, 1, 2 are q, k, v.

    Programs side by side read columns side by side: the head varies fastest, then the stream.
    """
    head = program % heads
    stream = FIRST + program // heads % STREAMS
    column = FIRST * heads * KEY_DIM + ((stream - FIRST) * heads + head) * DIM
    return stream, head, column, program // heads // STREAMS


@triton.jit(
    do_not_specialize=["batch", "heads", "length", "taps_stride", "tiles"], do_not_specialize_on_alignment=["taps"]
)
def _convolve_forward(
    y,
    taps,
    q,
    k,
    v,
    batch,
    heads,
    length,
    columns,
    taps_stride,
    tiles,
    KEY_DIM: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    STREAMS: tl.constexpr,
    TAPS: tl.constexpr,
    TIME: tl.constexpr,
    BLOCK: tl.constexpr,
    EPSILON: tl.constexpr,
):
    stream, head, column, tile = _stream_of(tl.program_id(0), heads, KEY_DIM, DIM, FIRST, STREAMS)
    sequence = (tile // tiles).to(tl.int64)
    start = tile % tiles * TIME
    y += (sequence * length + start) * columns + column
    taps += sequence // batch * taps_stride + column * TAPS
    token = tl.arange(0, TIME)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (token < length - start) & (channel < DIM)

    z = tl.zeros((TIME, BLOCK), tl.float32)
    for delay in tl.static_range(TAPS):
        weight = tl.load(taps + channel * TAPS + (TAPS - 1 - delay), channel < DIM, 0.0)
        seen = inside & (token >= delay - start)
        z += weight * tl.load(y + (token - delay) * columns + channel, seen, 0.0).to(tl.float32)
    s = z * tl.sigmoid(z)
    if stream < 2:
        s *= tl.rsqrt(tl.sum(s * s, 1, keep_dims=True) + EPSILON)

    if stream == 0:
        out = q
    elif stream == 1:
        out = k
    else:
        out = v
    out += ((sequence * heads + head) * length + start) * DIM
    tl.store(out + token * DIM + channel, s.to(out.dtype.element_ty), inside)


@triton.jit
def _filter(window, weights, REVERSED: tl.constexpr):
    """Σ window[j] · weights[j], or with the weights in reverse order."""
    total = window[0] * weights[len(weights) - 1 if REVERSED else 0]
    for j in tl.static_range(1, len(weights)):
        total += window[j] * weights[len(weights) - 1 - j if REVERSED else j]
    return total


@triton.jit(
    do_not_specialize=["batch", "heads", "length", "taps_stride", "chunks", "segment"],
    do_not_specialize_on_alignment=["taps"],
)
def _convolve_backward(
    q_gradient,
    k_gradient,
    v_gradient,
    y,
    taps,
    dy,
    partials,
    batch,
    heads,
    length,
    columns,
    taps_stride,
    chunks,
    segment,
    KEY_DIM: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    STREAMS: tl.constexpr,
    TAPS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """One pass over y and the gradients, with no scratch tensor.

    A program walks SEGMENTS adjacent stretches of `segment` tokens side by side, one token of each at a time. Both the
    convolution and its transpose then look back at the last few tokens only, which stay in registers. A stretch
    starts with the tokens before it in the window and walks on over the next one's first TAPS − 1 tokens, whose
    gradients reach back.
    """
    stream, head, column, chunk = _stream_of(tl.program_id(0), heads, KEY_DIM, DIM, FIRST, STREAMS)
    sequence = (chunk // chunks).to(tl.int64)
    start = chunk % chunks * (SEGMENTS * segment)
    y += (sequence * length + start) * columns + column
    dy += (sequence * length + start) * columns + column
    taps += sequence // batch * taps_stride + column * TAPS
    if stream == 0:
        gradient = q_gradient
    elif stream == 1:
        gradient = k_gradient
    else:
        gradient = v_gradient
    gradient += ((sequence * heads + head) * length + start) * DIM
    first = tl.arange(0, SEGMENTS)[:, None] * segment
    channel = tl.arange(0, BLOCK)[None, :]
    real = channel < DIM
    end = length - start

    # Newest first: weights[j] multiplies the token j before, past[j] is the token j + 1 before.
    weights = ()
    past = ()
    past_dz = ()
    sums = ()
    for delay in tl.static_range(TAPS):
        weights += (tl.load(taps + channel * TAPS + (TAPS - 1 - delay), real, 0.0),)
        sums += (tl.zeros((SEGMENTS, BLOCK), tl.float32),)
    for delay in tl.static_range(1, TAPS):
        time = first - delay
        known = real & (time < end) & (time >= -start)
        past += (tl.load(y + time * columns + channel, known, 0.0).to(tl.float32),)
        past_dz += (tl.zeros((SEGMENTS, BLOCK), tl.float32),)

    for step in range(0, segment + TAPS - 1, AHEAD):
        tokens = ()
        gradients = ()
        for ahead in tl.static_range(AHEAD):
            time = first + (step + ahead)
            known = real & (time < end) & (step + ahead < segment + TAPS - 1)
            tokens += (tl.load(y + time * columns + channel, known, 0.0),)
            gradients += (tl.load(gradient + time * DIM + channel, known, 0.0),)
        for ahead in tl.static_range(AHEAD):
            window = (tokens[ahead].to(tl.float32),) + past
            z = _filter(window, weights, False)
            gate = tl.sigmoid(z)
            s = z * gate
            ds = gradients[ahead].to(tl.float32)
            if stream < 2:
                scale = tl.rsqrt(tl.sum(s * s, 1, keep_dims=True) + EPSILON)
                along = tl.sum(s * ds, 1, keep_dims=True) * scale * scale
                ds = scale * (ds - s * along)
            dz = ds * (gate + s * (1 - gate))

            window_dz = (dz,) + past_dz
            time = first + (step + ahead - (TAPS - 1))
            own = real & (time < end) & (step + ahead >= TAPS - 1) & (step + ahead < segment + TAPS - 1)
            tl.store(dy + time * columns + channel, _filter(window_dz, weights, True).to(dy.dtype.element_ty), mask=own)
            own_dz = tl.where(step + ahead < segment, dz, 0.0)
            new_sums = ()
            for delay in tl.static_range(TAPS):
                new_sums += (sums[delay] + own_dz * window[delay],)
            sums = new_sums
            past = window[:-1]
            past_dz = window_dz[:-1]

    total = STREAMS * heads * DIM
    partials += chunk.to(tl.int64) * TAPS * total + ((stream - FIRST) * heads + head) * DIM
    for delay in tl.static_range(TAPS):
        tl.store(partials + (TAPS - 1 - delay) * total + channel, tl.sum(sums[delay], 0, keep_dims=True), mask=real)


# ---- Gates: y's columns alpha, beta -> the logarithm of the decay and the writing strength, folded ----


@triton.jit
def _softplus(x):
    """log(1 + eˣ) = max(x, 0) + log(1 + u) with u = e^−|x|, as accurate where u is small."""
    u = tl.exp(-tl.abs(x))
    # log(1 + u) = 2 artanh(r), r = u / (2 + u); as r <= 1/3, the first term left out is below 2e-8 of the sum.
    ratio = u / (2 + u)
    square = ratio * ratio
    series = 1 / 7 + square * (1 / 9 + square * (1 / 11 + square * (1 / 13)))
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * series))
    return tl.maximum(x, 0.0) + 2 * ratio * series


@triton.jit(
    do_not_specialize=["batch", "heads", "length", "A_stride", "bias_stride", "tiles"],
    do_not_specialize_on_alignment=["A_log", "dt_bias"],
)
def _gates_forward(
    y,
    A_log,
    dt_bias,
    log_decay,
    beta,
    batch,
    heads,
    length,
    columns,
    A_stride,
    bias_stride,
    tiles,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TIME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * TIME
    token = tl.arange(0, TIME)[:, None]
    head = tl.arange(0, BLOCK)[None, :]
    inside = (token < length - start) & (head < heads)
    rate = tl.exp(tl.load(A_log + sequence // batch * A_stride + head, head < heads, 0.0))
    bias = tl.load(dt_bias + sequence // batch * bias_stride + head, head < heads, 0.0)

    y += (sequence * length + start) * columns + 2 * heads * (KEY_DIM + VALUE_DIM) + token * columns + head
    x = tl.load(y, inside, 0.0).to(tl.float32) + bias
    writing = tl.sigmoid(tl.load(y + heads, inside, 0.0).to(tl.float32))
    folded = (sequence * heads + head) * length + start + token
    tl.store(log_decay + folded, -rate * _softplus(x), inside)
    tl.store(beta + folded, writing, inside)


@triton.jit(
    do_not_specialize=["batch", "heads", "length", "A_stride", "bias_stride", "tiles"],
    do_not_specialize_on_alignment=["A_log", "dt_bias"],
)
def _gates_backward(
    log_decay_gradient,
    beta_gradient,
    y,
    A_log,
    dt_bias,
    dy,
    A_partials,
    bias_partials,
    batch,
    heads,
    length,
    columns,
    A_stride,
    bias_stride,
    tiles,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TIME: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDING: tl.constexpr,
):
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * TIME
    token = tl.arange(0, TIME)[:, None]
    head = tl.arange(0, BLOCK)[None, :]
    inside = (token < length - start) & (head < heads)
    rate = tl.exp(tl.load(A_log + sequence // batch * A_stride + head, head < heads, 0.0))
    bias = tl.load(dt_bias + sequence // batch * bias_stride + head, head < heads, 0.0)
    folded = (sequence * heads + head) * length + start + token
    log_decay_gradient = tl.load(log_decay_gradient + folded, inside, 0.0)
    beta_gradient = tl.load(beta_gradient + folded, inside, 0.0)

    place = (sequence * length + start) * columns + 2 * heads * (KEY_DIM + VALUE_DIM) + token * columns + head
    x = tl.load(y + place, inside, 0.0).to(tl.float32) + bias
    writing = tl.sigmoid(tl.load(y + place + heads, inside, 0.0).to(tl.float32))
    A_gradient = -rate * log_decay_gradient * _softplus(x)
    alpha_gradient = -rate * log_decay_gradient * tl.sigmoid(x)
    tl.store(dy + place, alpha_gradient.to(dy.dtype.element_ty), inside)
    tl.store(dy + place + heads, (beta_gradient * writing * (1 - writing)).to(dy.dtype.element_ty), inside)
    first = 2 * heads * (KEY_DIM + VALUE_DIM + 1)
    for padding in range(first, columns, PADDING):
        column = padding + tl.arange(0, PADDING)[None, :]
        zero = tl.zeros((TIME, PADDING), dy.dtype.element_ty)
        rest = (token < length - start) & (column < columns)
        tl.store(dy + (sequence * length + start) * columns + token * columns + column, zero, rest)

    partial = tl.program_id(0).to(tl.int64) * heads + head
    tl.store(A_partials + partial, tl.sum(A_gradient, 0, keep_dims=True), head < heads)
    tl.store(bias_partials + partial, tl.sum(alpha_gradient, 0, keep_dims=True), head < heads)


# ---- RMSNorm of the delta rule's output times SiLU of y's columns g: o folded -> normed [M, B·T, H·V] ----


@triton.jit(
    do_not_specialize=["batch", "heads", "length", "gain_stride", "tiles", "epsilon"],
    do_not_specialize_on_alignment=["gain"],
)
def _gated_norm_forward(
    o,
    y,
    gain,
    normed,
    batch,
    heads,
    length,
    columns,
    gain_stride,
    tiles,
    epsilon,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TIME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0) % heads
    sequence = (tl.program_id(0) // heads // tiles).to(tl.int64)
    start = tl.program_id(0) // heads % tiles * TIME
    token = tl.arange(0, TIME)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (token < length - start) & (channel < VALUE_DIM)
    o += ((sequence * heads + head) * length + start) * VALUE_DIM
    y += (sequence * length + start) * columns + heads * (2 * KEY_DIM + VALUE_DIM) + head * VALUE_DIM
    normed += ((sequence * length + start) * heads + head) * VALUE_DIM

    weight = tl.load(gain + sequence // batch * gain_stride + channel, channel < VALUE_DIM, 0.0)
    x = tl.load(o + token * VALUE_DIM + channel, inside, 0.0).to(tl.float32)
    g = tl.load(y + token * columns + channel, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / VALUE_DIM + epsilon)
    out = weight * (x * scale) * (g * tl.sigmoid(g))
    tl.store(normed + token * (heads * VALUE_DIM) + channel, out.to(normed.dtype.element_ty), inside)


@triton.jit(
    do_not_specialize=["batch", "heads", "length", "gain_stride", "tiles", "epsilon"],
    do_not_specialize_on_alignment=["gain"],
)
def _gated_norm_backward(
    normed_gradient,
    o,
    y,
    gain,
    o_gradient,
    dy,
    partials,
    batch,
    heads,
    length,
    columns,
    gain_stride,
    tiles,
    epsilon,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TIME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0) % heads
    sequence = (tl.program_id(0) // heads // tiles).to(tl.int64)
    start = tl.program_id(0) // heads % tiles * TIME
    token = tl.arange(0, TIME)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (token < length - start) & (channel < VALUE_DIM)
    folded = ((sequence * heads + head) * length + start) * VALUE_DIM
    gate = (sequence * length + start) * columns + heads * (2 * KEY_DIM + VALUE_DIM) + head * VALUE_DIM
    normed_gradient += ((sequence * length + start) * heads + head) * VALUE_DIM

    weight = tl.load(gain + sequence // batch * gain_stride + channel, channel < VALUE_DIM, 0.0)
    x = tl.load(o + folded + token * VALUE_DIM + channel, inside, 0.0).to(tl.float32)
    g = tl.load(y + gate + token * columns + channel, inside, 0.0).to(tl.float32)
    out = tl.load(normed_gradient + token * (heads * VALUE_DIM) + channel, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / VALUE_DIM + epsilon)
    x *= scale
    opening = tl.sigmoid(g)
    silu = g * opening
    along = out * x  # the gradient of gain · silu

    g_gradient = along * weight * (opening + silu * (1 - opening))
    tl.store(dy + gate + token * columns + channel, g_gradient.to(dy.dtype.element_ty), inside)
    x_gradient = out * silu * weight
    x_gradient = scale * (x_gradient - x * (tl.sum(x_gradient * x, 1, keep_dims=True) / VALUE_DIM))
    tl.store(o_gradient + folded + token * VALUE_DIM + channel, x_gradient.to(o_gradient.dtype.element_ty), inside)
    partials += tl.program_id(0).to(tl.int64) * VALUE_DIM
    along = tl.where(inside, along * silu, 0.0)  # with ε = 0, masked tokens are NaN
    tl.store(partials + channel, tl.sum(along, 0, keep_dims=True), channel < VALUE_DIM)


# ---- Launchers ----


def heads_forward(
    y: Tensor, taps: Tensor, A_log: Tensor, dt_bias: Tensor, heads: int, key_dim: int, value_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, log_decay, beta) of the gated delta rule from the projection y [M, B, T, R].

    A causal convolution over time with taps [M, 2·H·K + H·V, S], whose last tap multiplies the current token, and
    SiLU give q, k [M·B·H, T, K] and v [M·B·H, T, V], of y's type; q and k are then divided by their norm per head.
    log_decay = −exp(A_log) · softplus(alpha + dt_bias) and beta = sigmoid(beta) are float32 [M·B·H, T], with A_log
    and dt_bias [M, H].
    """
    assert y.is_contiguous()
    members, batch, length, columns = y.shape
    rows = members * batch * heads
    q, k = (y.new_empty(rows, length, key_dim) for _ in range(2))
    v = y.new_empty(rows, length, value_dim)
    log_decay, beta = (y.new_empty(rows, length, dtype=torch.float32) for _ in range(2))
    for first, streams, dim in _streams(key_dim, value_dim):
        block = triton.next_power_of_2(dim)
        time = _time_tile(4096, block)
        tiles = triton.cdiv(length, time)
        _convolve_forward[(members * batch * tiles * streams * heads,)](
            *(y, taps, q, k, v),
            *(batch, heads, length, columns, taps.stride(0), tiles),
            **{"KEY_DIM": key_dim, "DIM": dim, "FIRST": first, "STREAMS": streams, "TAPS": taps.shape[2]},
            **{"TIME": time, "BLOCK": block, "EPSILON": L2_EPSILON, "num_warps": WARPS},
        )
    time, block, tiles = _gate_tiles(length, heads)
    _gates_forward[(members * batch * tiles,)](
        *(y, A_log, dt_bias, log_decay, beta),
        *(batch, heads, length, columns, A_log.stride(0), dt_bias.stride(0), tiles),
        **{"KEY_DIM": key_dim, "VALUE_DIM": value_dim, "TIME": time, "BLOCK": block, "num_warps": WARPS},
    )
    return q, k, v, log_decay, beta


def heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlog_decay: Tensor,
    dbeta: Tensor,
    y: Tensor,
    taps: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    heads: int,
    key_dim: int,
    value_dim: int,
    dy: Tensor,
    taps_gradient: Tensor,
    A_log_gradient: Tensor,
    dt_bias_gradient: Tensor,
) -> None:
    """The gradients of `heads_forward` from those of its outputs, which have the outputs' shapes and types.

    Writes all columns of dy [M, B, T, R] but g's (the padding's are 0), taps_gradient [M, 2·H·K + H·V, S],
    A_log_gradient and dt_bias_gradient [M, H].
    """
    assert all(x.is_contiguous() for x in (dq, dk, dv, dlog_decay, dbeta, y, dy))
    members, batch, length, columns = y.shape
    size = taps.shape[2]
    for first, streams, dim in _streams(key_dim, value_dim):
        block = triton.next_power_of_2(dim)
        # Four elements a thread and four tokens ahead fill the registers; a head must fit into one warp's row.
        elements, ahead = (512, 4) if block <= 128 else (4 * block, 2)
        segments = elements // block
        segment = min(64, triton.cdiv(length, segments))
        chunks = triton.cdiv(length, segments * segment)
        of_stream = slice(first * heads * key_dim, first * heads * key_dim + streams * heads * dim)
        partials = y.new_empty(members, batch * chunks, size, streams * heads * dim, dtype=torch.float32)
        _convolve_backward[(members * batch * chunks * streams * heads,)](
            *(dq, dk, dv, y, taps, dy, partials),
            *(batch, heads, length, columns, taps.stride(0), chunks, segment),
            **{"KEY_DIM": key_dim, "DIM": dim, "FIRST": first, "STREAMS": streams, "TAPS": size},
            **{"SEGMENTS": segments, "BLOCK": block, "AHEAD": ahead, "EPSILON": L2_EPSILON, "num_warps": WARPS},
        )
        torch.sum(partials, 1, out=taps_gradient[:, of_stream].transpose(1, 2))
    time, block, tiles = _gate_tiles(length, heads)
    A_partials, bias_partials = y.new_empty(2, members, batch * tiles, heads, dtype=torch.float32)
    _gates_backward[(members * batch * tiles,)](
        *(dlog_decay, dbeta, y, A_log, dt_bias, dy, A_partials, bias_partials),
        *(batch, heads, length, columns, A_log.stride(0), dt_bias.stride(0), tiles),
        **{"KEY_DIM": key_dim, "VALUE_DIM": value_dim, "TIME": time, "BLOCK": block, "PADDING": 16, "num_warps": WARPS},
    )
    torch.sum(A_partials, 1, out=A_log_gradient)
    torch.sum(bias_partials, 1, out=dt_bias_gradient)


def gated_norm_forward(
    o: Tensor, y: Tensor, gain: Tensor, heads: int, key_dim: int, value_dim: int, epsilon: float
) -> Tensor:
    """gain · o / √(mean over V of o² + ε) · SiLU(g) as [M, B·T, H·V] (channel h·V + i), of o's type.

    o is [M·B·H, T, V]; g are columns of y [M, B, T, R]; gain [M, V] is shared by a member's heads.
    """
    assert o.is_contiguous() and y.is_contiguous()
    members, batch, length, columns = y.shape
    normed = o.new_empty(members, batch * length, heads * value_dim)
    block = triton.next_power_of_2(value_dim)
    time = _time_tile(4096, block)
    tiles = triton.cdiv(length, time)
    _gated_norm_forward[(members * batch * tiles * heads,)](
        *(o, y, gain, normed),
        *(batch, heads, length, columns, gain.stride(0), tiles, epsilon),
        **{"KEY_DIM": key_dim, "VALUE_DIM": value_dim, "TIME": time, "BLOCK": block, "num_warps": WARPS},
    )
    return normed


def gated_norm_backward(
    dnormed: Tensor,
    o: Tensor,
    y: Tensor,
    gain: Tensor,
    heads: int,
    key_dim: int,
    value_dim: int,
    epsilon: float,
    dy: Tensor,
    gain_gradient: Tensor,
) -> Tensor:
    """The gradient of o [M·B·H, T, V] from that of `gated_norm_forward`'s output.

    Writes the columns g of dy [M, B, T, R], no others, and gain_gradient [M, V].
    """
    assert all(x.is_contiguous() for x in (dnormed, o, y, dy))
    members, batch, length, columns = y.shape
    do = torch.empty_like(o)
    block = triton.next_power_of_2(value_dim)
    time = _time_tile(2048, block)
    tiles = triton.cdiv(length, time)
    partials = y.new_empty(members, batch * tiles * heads, value_dim, dtype=torch.float32)
    _gated_norm_backward[(members * batch * tiles * heads,)](
        *(dnormed, o, y, gain, do, dy, partials),
        *(batch, heads, length, columns, gain.stride(0), tiles, epsilon),
        **{"KEY_DIM": key_dim, "VALUE_DIM": value_dim, "TIME": time, "BLOCK": block, "num_warps": WARPS},
    )
    torch.sum(partials, 1, out=gain_gradient)
    return do


def _streams(key_dim: int, value_dim: int) -> list[tuple[int, int, int]]:
    """(first stream, streams, dim) of each launch: q, k and v in one where they have one dim."""
    return [(0, 3, key_dim)] if key_dim == value_dim else [(0, 2, key_dim), (2, 1, value_dim)]


def _time_tile(elements: int, block: int) -> int:
    """Tokens of a tile with about `elements` elements."""
    return max(1, elements // block)


def _gate_tiles(length: int, heads: int) -> tuple[int, int, int]:
    """(tokens of a tile, heads of a tile, tiles of a sequence)."""
    block = triton.next_power_of_2(heads)
    time = min(128, _time_tile(2048, block))
    return time, block, triton.cdiv(length, time)
