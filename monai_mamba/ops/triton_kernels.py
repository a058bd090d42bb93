"""Triton kernels of the scan and the causal convolution, for :mod:`monai_mamba.ops.triton_backend`.

State tiles are ``(N, D)``: states in the registers of a thread, channels across the lanes, so that the sum over the
states needs no exchange between lanes. A program handles one batch, one group (or route), one block of channels and
one segment of the sequence. Routes are index maps: positions in memory follow from the step. Every sum across
programs goes through a buffer that is added up afterwards, never through atomics, so results repeat bit for bit.

``E`` and ``states_n`` are never specialised. Told that ``E`` is divisible by 16, Triton lets a thread hold four
channels and spreads the states over the lanes, which costs eight exchanges a step; told that ``states_n`` is 1, it
exchanges the states between lanes before it stores them, which takes more registers than everything else.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
CHUNK = tl.constexpr(64)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def _softplus(x):
    # log(1 + e) as a series of atanh: exact also for tiny e, where 1 + e would round it away.
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (e + 2.0)
    q = s * s
    p = 2.0 + q * (6.666631468e-1 + q * (4.002491026e-1 + q * (2.796060302e-1 + q * 2.817833371e-1)))
    return tl.maximum(x, 0.0) + p * s


@triton.jit
def _position(step, route, L, H, W, MAPPED: tl.constexpr, WIDE: tl.constexpr):
    """Position in memory of a step: 0 row, 1 column, +2 reversed."""
    if MAPPED:
        step = tl.where(route >= 2, L - 1 - step, step)
        step = tl.where(route % 2 == 1, (step % H) * W + step // H, step)
    # Offsets inside one image of 2**31 elements or more need 64 bits; others leave the registers to the states.
    if WIDE:
        step = step.to(tl.int64)
    return step


@triton.jit
def _pace(route, W, MAPPED: tl.constexpr):
    """How far apart in memory two steps are, except where a column of the map ends."""
    if MAPPED:
        pace = tl.where(route % 2 == 1, W, 1)
        return tl.where(route >= 2, -pace, pace)
    return 1


@triton.jit
def _next(at, pace, L, MAPPED: tl.constexpr):
    """Position after ``at``, without a division: a step out of the map leads to the next column."""
    at += pace
    if MAPPED:
        at = tl.where(at >= L, at - L + 1, at)
        at = tl.where(at < 0, at + L - 1, at)
    return at


@triton.jit
def _route(routes, g):
    """Route of a group: two bits of ``routes`` each."""
    return (routes >> (2 * g.to(tl.int32))) & 3


@triton.jit
def _place(pid, groups, blocks):
    """Split the first axis of the grid into batch, group and channel block."""
    block = pid % blocks
    rest = pid // blocks
    return (rest // groups).to(tl.int64), (rest % groups).to(tl.int64), block


@triton.jit
def _tile(pointer, own, n, plane):
    """Places of the states of the channels ``own`` behind a pointer to ``(N, G, E)``; ``plane`` is ``G * E``."""
    # N * G * E is less than 2**31, as A is no larger. With 64 bits for each state, or without the common pointer, what
    # comes before the first step and after the last takes more registers than the steps.
    return (pointer + own)[None, :] + n[:, None] * plane


# Pointers of inputs come with strides of batch, step and group; the last axis is dense. What the backend allocates is
# dense: sequences (B, L, G, E), B and C together as BC (B, L, G, 2, NP) with zeros behind the N states, their gradients
# (B, L, G, N), states (B, chunks - 1, G, E, N), segments (B, segments, N, G, E). A is (N, G, E), D and bias are (G, E).
# E: channels of a group, N: states, NP: N rounded up to a power of two.


@triton.jit(do_not_specialize=["E", "routes"])
def segment_ends(
    delta, delta_b, delta_l, delta_g, u, u_b, u_l, u_g, BC, A, bias, routes, ends, sums,
    L, H, W, E, groups, blocks, segment,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """State at the end of each segment from a zero state, and the sum of its step sizes."""
    b, g, block = _place(tl.program_id(0), groups, blocks)
    s = tl.program_id(1)
    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    channels = d < E
    tile = (n < N)[:, None] & channels[None, :]
    route = _route(routes, g)
    plane = groups * E
    own = g * E + d
    rate = tl.load(_tile(A, own, n, plane), mask=tile, other=0.0) * LOG2E
    shift = tl.load(bias + own, mask=channels & BIAS, other=0.0)
    h = tl.zeros((NP, BD), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    delta += b * delta_b + g * delta_g
    u += b * u_b + g * u_g
    BC += (b * L * groups + g) * (2 * NP) + n
    BC_l = groups * (2 * NP)
    pace = _pace(route, W, MAPPED)
    at = _position(s * segment, route, L, H, W, MAPPED, WIDE)
    for _ in range(s * segment, tl.minimum(L, (s + 1) * segment)):
        x = tl.load(u + (at * u_l + d), mask=channels, other=0.0).to(tl.float32)
        dt = tl.load(delta + (at * delta_l + d), mask=channels, other=0.0).to(tl.float32) + shift
        if SOFTPLUS:
            dt = _softplus(dt)
        Bt = tl.load(BC + at * BC_l)
        h = tl.exp2(dt[None, :] * rate) * h + (dt * x)[None, :] * Bt[:, None]
        total += dt
        at = _next(at, pace, L, MAPPED)
    row = b * tl.num_programs(1) + s
    tl.store(_tile(ends + row * (N * plane), own, n, plane), h, mask=tile)
    tl.store(sums + row * plane + own, total, mask=channels)


@triton.jit(do_not_specialize=["E"])
def carry(
    A, ends, sums, E, groups, blocks, num_segments,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Replace what every segment adds by what reaches it from before (or, backward, from behind)."""
    b, g, block = _place(tl.program_id(0), groups, blocks)
    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    channels = d < E
    tile = (n < N)[:, None] & channels[None, :]
    plane = groups * E
    own = g * E + d
    rate = tl.load(_tile(A, own, n, plane), mask=tile, other=0.0) * LOG2E
    h = tl.zeros((NP, BD), tl.float32)
    for i in range(0, num_segments):
        s = i
        if BACKWARD:
            s = num_segments - 1 - i
        row = b * num_segments + s
        place = _tile(ends + row * (N * plane), own, n, plane)
        added = tl.load(place, mask=tile, other=0.0)
        total = tl.load(sums + row * plane + own, mask=channels, other=0.0)
        tl.store(place, h, mask=tile)
        h = tl.exp2(total[None, :] * rate) * h + added


@triton.jit(do_not_specialize=["E", "routes", "states_n"])
def forward(
    delta, delta_b, delta_l, delta_g, u, u_b, u_l, u_g, BC, z, z_b, z_l, z_g,
    A, D, bias, routes, starts, y, states,
    L, H, W, E, groups, blocks, segment, chunks, states_n,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr, WIDE: tl.constexpr,
    SKIP: tl.constexpr, GATE: tl.constexpr, SPLIT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """The scan of one segment from its true initial state."""
    b, g, block = _place(tl.program_id(0), groups, blocks)
    s = tl.program_id(1)
    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    channels = d < E
    tile = (n < N)[:, None] & channels[None, :]
    route = _route(routes, g)
    plane = groups * E
    own = g * E + d
    rate = tl.load(_tile(A, own, n, plane), mask=tile, other=0.0) * LOG2E
    shift = tl.load(bias + own, mask=channels & BIAS, other=0.0)
    skip = tl.load(D + own, mask=channels & SKIP, other=0.0)
    h = tl.zeros((NP, BD), tl.float32)
    if SPLIT:
        row = b * tl.num_programs(1) + s
        h = tl.load(_tile(starts + row * (N * plane), own, n, plane), mask=tile, other=0.0)
    delta += b * delta_b + g * delta_g
    u += b * u_b + g * u_g
    BC += (b * L * groups + g) * (2 * NP) + n
    BC_l = groups * (2 * NP)
    z += b * z_b + g * z_g
    y += (b * L * groups + g) * E
    states += ((b * (chunks - 1) + s * (segment // CHUNK) - 1) * groups + g) * E * N + d * N
    pace = _pace(route, W, MAPPED)
    at = _position(s * segment, route, L, H, W, MAPPED, WIDE)
    for start in range(s * segment, tl.minimum(L, (s + 1) * segment), CHUNK):
        if SAVE:
            if start > 0:
                tl.store(states[None, :] + n[:, None] * states_n, h, mask=tile)
            states += plane * N
        for _ in range(0, tl.minimum(L - start, CHUNK)):
            x = tl.load(u + (at * u_l + d), mask=channels, other=0.0).to(tl.float32)
            dt = tl.load(delta + (at * delta_l + d), mask=channels, other=0.0).to(tl.float32) + shift
            if SOFTPLUS:
                dt = _softplus(dt)
            place = BC + at * BC_l
            Bt = tl.load(place)
            h = tl.exp2(dt[None, :] * rate) * h + (dt * x)[None, :] * Bt[:, None]
            Ct = tl.load(place + NP)
            out = tl.sum(h * Ct[:, None], axis=0) + skip * x
            if GATE:
                gate = tl.load(z + (at * z_l + d), mask=channels, other=0.0).to(tl.float32)
                out = out * gate * _sigmoid(gate)
            tl.store(y + (at * plane + d), out, mask=channels)
            at = _next(at, pace, L, MAPPED)


@triton.jit(do_not_specialize=["E", "routes"])
def segment_gradients(
    delta, delta_b, delta_l, delta_g, BC, A, bias, routes, grad, ends, sums,
    L, H, W, E, groups, blocks, chunks,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient that leaves each chunk towards the one before it, if none came in from behind."""
    chunk = tl.program_id(0) % chunks
    b, g, block = _place(tl.program_id(0) // chunks, groups, blocks)
    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    channels = d < E
    tile = (n < N)[:, None] & channels[None, :]
    route = _route(routes, g)
    plane = groups * E
    own = g * E + d
    rate = tl.load(_tile(A, own, n, plane), mask=tile, other=0.0) * LOG2E
    shift = tl.load(bias + own, mask=channels & BIAS, other=0.0)
    gh = tl.zeros((NP, BD), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    stop = tl.minimum(L, (chunk + 1) * CHUNK)
    delta += b * delta_b + g * delta_g
    BC += (b * L * groups + g) * (2 * NP) + NP + n
    BC_l = groups * (2 * NP)
    grad += (b * L * groups + g) * E
    pace = -_pace(route, W, MAPPED)
    at = _position(stop - 1, route, L, H, W, MAPPED, WIDE)
    for _ in range(0, stop - chunk * CHUNK):
        dt = tl.load(delta + (at * delta_l + d), mask=channels, other=0.0).to(tl.float32) + shift
        if SOFTPLUS:
            dt = _softplus(dt)
        gy = tl.load(grad + (at * plane + d), mask=channels, other=0.0)
        Ct = tl.load(BC + at * BC_l)
        gh = tl.exp2(dt[None, :] * rate) * (gh + gy[None, :] * Ct[:, None])
        total += dt
        at = _next(at, pace, L, MAPPED)
    row = b * chunks + chunk
    tl.store(_tile(ends + row * (N * plane), own, n, plane), gh, mask=tile)
    tl.store(sums + row * plane + own, total, mask=channels)


@triton.jit(do_not_specialize=["E", "routes"])
def backward(
    delta, delta_b, delta_l, delta_g, u, u_b, u_l, u_g, BC,
    A, bias, routes, states, incoming, grad, trail,
    y, grad_u, grad_delta, grad_A, grad_B, grad_C,
    L, H, W, E, batch, groups, blocks, chunks, items,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr, WIDE: tl.constexpr,
    WITH_Y: tl.constexpr,
):  # fmt: skip
    """Gradients of whole chunks. A program does many of them, with one trail of states in memory for all of them."""
    n = tl.arange(0, NP)
    lane = tl.arange(0, BD)
    own = trail + tl.program_id(0).to(tl.int64) * (CHUNK * NP * BD) + n[:, None] * BD + lane[None, :]
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        chunk = item % chunks
        b, g, block = _place(item // chunks, groups, blocks)
        d = block * BD + lane
        channels = d < E
        tile = (n < N)[:, None] & channels[None, :]
        route = _route(routes, g)
        rate = tl.load(A + (n[:, None] * groups + g) * E + d[None, :], mask=tile, other=0.0)
        shift = tl.load(bias + g * E + d, mask=channels & BIAS, other=0.0)
        first = chunk * CHUNK
        steps = tl.minimum(L - first, CHUNK)
        place = ((b * (chunks - 1) + chunk - 1) * groups + g) * E + d[None, :]
        h = tl.load(states + place * N + n[:, None], mask=tile & (chunk > 0), other=0.0)
        pace = _pace(route, W, MAPPED)
        at = _position(first, route, L, H, W, MAPPED, WIDE)
        for i in range(0, steps):
            x = tl.load(u + b * u_b + at * u_l + g * u_g + d, mask=channels, other=0.0).to(tl.float32)
            dt = tl.load(delta + b * delta_b + at * delta_l + g * delta_g + d, mask=channels, other=0.0)
            dt = dt.to(tl.float32) + shift
            if SOFTPLUS:
                dt = _softplus(dt)
            Bt = tl.load(BC + ((b * L + at) * groups + g) * (2 * NP) + n)
            decayed = tl.exp2(dt[None, :] * (rate * LOG2E)) * h
            tl.store(own + i * (NP * BD), decayed)
            h = decayed + (dt * x)[None, :] * Bt[:, None]
            if WITH_Y:
                Ct = tl.load(BC + ((b * L + at) * groups + g) * (2 * NP) + NP + n)
                tl.store(y + ((b * L + at) * groups + g) * E + d, tl.sum(h * Ct[:, None], axis=0), mask=channels)
            at = _next(at, pace, L, MAPPED)
        # The trail is read by the threads that wrote it, or by others of the program after this.
        tl.debug_barrier()
        row = b * chunks + chunk
        gh = tl.load(incoming + ((row * N + n[:, None]) * groups + g) * E + d[None, :], mask=tile, other=0.0)
        gA = tl.zeros((NP, BD), tl.float32)
        at = _position(first + steps - 1, route, L, H, W, MAPPED, WIDE)
        for j in range(0, steps):
            i = steps - 1 - j
            x = tl.load(u + b * u_b + at * u_l + g * u_g + d, mask=channels, other=0.0).to(tl.float32)
            raw = tl.load(delta + b * delta_b + at * delta_l + g * delta_g + d, mask=channels, other=0.0)
            raw = raw.to(tl.float32) + shift
            dt = raw
            if SOFTPLUS:
                dt = _softplus(raw)
            gy = tl.load(grad + ((b * L + at) * groups + g) * E + d, mask=channels, other=0.0)
            Bt = tl.load(BC + ((b * L + at) * groups + g) * (2 * NP) + n)
            Ct = tl.load(BC + ((b * L + at) * groups + g) * (2 * NP) + NP + n)
            decayed = tl.load(own + i * (NP * BD))
            drive = dt * x
            q = gh + gy[None, :] * Ct[:, None]
            matrix = (((block * batch + b) * L + at) * groups + g) * N + n
            tl.store(grad_B + matrix, tl.sum(q * drive[None, :], axis=1), mask=n < N)
            after = decayed + drive[None, :] * Bt[:, None]
            tl.store(grad_C + matrix, tl.sum(after * gy[None, :], axis=1), mask=n < N)
            from_B = tl.sum(q * Bt[:, None], axis=0)
            exponent = q * decayed
            gd = from_B * x + tl.sum(exponent * rate, axis=0)
            if SOFTPLUS:
                gd = gd * _sigmoid(raw)
            gA += exponent * dt[None, :]
            gh = q * tl.exp2(dt[None, :] * (rate * LOG2E))
            sequence = ((b * L + at) * groups + g) * E + d
            tl.store(grad_u + sequence, from_B * dt, mask=channels)
            tl.store(grad_delta + sequence, gd, mask=channels)
            at = _next(at, -pace, L, MAPPED)
        tl.store(grad_A + ((row * N + n[:, None]) * groups + g) * E + d[None, :], gA, mask=tile)
        tl.debug_barrier()


# The convolution: x, y and gradients are (B, L, D), weight (D, W), bias (D,). A program has BL steps of BD channels.


@triton.jit
def _conv_place(L, D, BL: tl.constexpr, BD: tl.constexpr):
    """Number of the tile of steps in the batch, batch item, steps and channels of a program."""
    blocks, tiles = tl.cdiv(D, BD), tl.cdiv(L, BL)
    row = tl.program_id(0) // blocks
    step = row % tiles * BL + tl.arange(0, BL)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    return row.to(tl.int64), (row // tiles).to(tl.int64), step, d


@triton.jit
def _filtered(
    x, x_b, x_l, weight, bias, b, step, d, inside, channels, L, D,
    W: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Convolution of BL steps, before the activation."""
    total = tl.zeros((BL, BD), tl.float32)
    if BIAS:
        total += tl.load(bias + d, mask=channels, other=0.0)[None, :]
    for k in tl.static_range(W):
        source = step + (k - W + 1)
        here = inside & (source >= 0)
        place = x + b * x_b + source.to(tl.int64)[:, None] * x_l + d[None, :]
        value = tl.load(place, mask=here[:, None] & channels[None, :], other=0.0).to(tl.float32)
        total += value * tl.load(weight + d * W + k, mask=channels, other=0.0)[None, :]
    return total


@triton.jit
def conv_forward(
    x, x_b, x_l, weight, bias, y, L, D,
    W: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    _, b, step, d = _conv_place(L, D, BL, BD)
    inside, channels = step < L, d < D
    value = _filtered(x, x_b, x_l, weight, bias, b, step, d, inside, channels, L, D, W, BL, BD, BIAS)
    if SILU:
        value = value * _sigmoid(value)
    place = y + (b * L + step.to(tl.int64))[:, None] * D + d[None, :]
    tl.store(place, value, mask=inside[:, None] & channels[None, :])


@triton.jit
def conv_backward_filter(
    x, x_b, x_l, weight, bias, grad_y, grad_y_b, grad_y_l, grad, grad_weight, grad_bias, L, D,
    W: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradient before the activation, and what this tile adds to the gradients of weight and bias."""
    row, b, step, d = _conv_place(L, D, BL, BD)
    inside, channels = step < L, d < D
    tile = inside[:, None] & channels[None, :]
    place = grad_y + b * grad_y_b + step.to(tl.int64)[:, None] * grad_y_l + d[None, :]
    g = tl.load(place, mask=tile, other=0.0).to(tl.float32)
    if SILU:
        value = _filtered(x, x_b, x_l, weight, bias, b, step, d, inside, channels, L, D, W, BL, BD, BIAS)
        s = _sigmoid(value)
        g = g * s * (1.0 + value * (1.0 - s))
    tl.store(grad + (b * L + step.to(tl.int64))[:, None] * D + d[None, :], g, mask=tile)
    for k in tl.static_range(W):
        source = step + (k - W + 1)
        met = x + b * x_b + source.to(tl.int64)[:, None] * x_l + d[None, :]
        value = tl.load(met, mask=(source >= 0)[:, None] & tile, other=0.0).to(tl.float32)
        tl.store(grad_weight + (row * D + d) * W + k, tl.sum(value * g, axis=0), mask=channels)
    if BIAS:
        tl.store(grad_bias + row * D + d, tl.sum(g, axis=0), mask=channels)


@triton.jit
def conv_backward_input(
    grad, weight, grad_x, L, D,
    W: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradient of x: the same filter looking ahead."""
    _, b, step, d = _conv_place(L, D, BL, BD)
    channels = d < D
    total = tl.zeros((BL, BD), tl.float32)
    for k in tl.static_range(W):
        target = step + (W - 1 - k)
        place = grad + (b * L + target.to(tl.int64))[:, None] * D + d[None, :]
        g = tl.load(place, mask=(target < L)[:, None] & channels[None, :], other=0.0)
        total += g * tl.load(weight + d * W + k, mask=channels, other=0.0)[None, :]
    place = grad_x + (b * L + step.to(tl.int64))[:, None] * D + d[None, :]
    tl.store(place, total, mask=(step < L)[:, None] & channels[None, :])
