"""Triton kernels of the scan; imported only where Triton is (see :mod:`monai_mamba.ops.triton_backend`).

State tiles are ``(N, D)``: states in the registers of a thread, channels across the lanes, so that the sum over the
states needs no exchange between lanes. A program handles one batch, one group (or route), one block of channels and
one segment of the sequence. Routes are index maps: positions in memory follow from the step. Every sum across
programs goes through a buffer that is added up afterwards, never through atomics, so results repeat bit for bit.
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
def _position(step, route, L, H, W, MAPPED: tl.constexpr):
    """Position in memory of a step: 0 row, 1 column, +2 reversed."""
    if MAPPED:
        step = tl.where(route >= 2, L - 1 - step, step)
        step = tl.where(route % 2 == 1, (step % H) * W + step // H, step)
    return tl.full((), 0, tl.int64) + step


@triton.jit
def _place(pid, groups, blocks):
    """Split the first axis of the grid into batch, group and channel block."""
    block = pid % blocks
    rest = pid // blocks
    return (rest // groups).to(tl.int64), (rest % groups).to(tl.int64), block


# Pointers of inputs come with strides of batch, step and group; the last axis is dense. What the backend allocates is
# dense: sequences (B, L, G, E), matrices (B, L, G, N), states (B, chunks, G, E, N), segments (B, segments, N, G, E).
# A is (N, G, E), D and bias are (G, E). E: channels of a group, N: states, NP: N rounded up to a power of two.


@triton.jit
def segment_ends(
    delta, delta_b, delta_l, delta_g, u, u_b, u_l, u_g, B, B_b, B_l, B_g, A, bias, routes, ends, sums,
    L, H, W, E, groups, blocks, segment,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """State at the end of each segment from a zero state, and the sum of its step sizes."""
    b, g, block = _place(tl.program_id(0), groups, blocks)
    s = tl.program_id(1)
    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    channels = d < E
    tile = (n < N)[:, None] & channels[None, :]
    route = tl.load(routes + g)
    rate = tl.load(A + (n[:, None] * groups + g) * E + d[None, :], mask=tile, other=0.0) * LOG2E
    shift = tl.load(bias + g * E + d, mask=channels & BIAS, other=0.0)
    h = tl.zeros((NP, BD), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    for step in range(s * segment, tl.minimum(L, (s + 1) * segment)):
        at = _position(step, route, L, H, W, MAPPED)
        x = tl.load(u + b * u_b + at * u_l + g * u_g + d, mask=channels, other=0.0).to(tl.float32)
        dt = (
            tl.load(delta + b * delta_b + at * delta_l + g * delta_g + d, mask=channels, other=0.0).to(tl.float32)
            + shift
        )
        if SOFTPLUS:
            dt = _softplus(dt)
        Bt = tl.load(B + b * B_b + at * B_l + g * B_g + n, mask=n < N, other=0.0).to(tl.float32)
        h = tl.exp2(dt[None, :] * rate) * h + (dt * x)[None, :] * Bt[:, None]
        total += dt
    row = b * tl.num_programs(1) + s
    tl.store(ends + ((row * N + n[:, None]) * groups + g) * E + d[None, :], h, mask=tile)
    tl.store(sums + (row * groups + g) * E + d, total, mask=channels)


@triton.jit
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
    rate = tl.load(A + (n[:, None] * groups + g) * E + d[None, :], mask=tile, other=0.0) * LOG2E
    h = tl.zeros((NP, BD), tl.float32)
    for i in range(0, num_segments):
        s = i
        if BACKWARD:
            s = num_segments - 1 - i
        row = b * num_segments + s
        place = ends + ((row * N + n[:, None]) * groups + g) * E + d[None, :]
        added = tl.load(place, mask=tile, other=0.0)
        total = tl.load(sums + (row * groups + g) * E + d, mask=channels, other=0.0)
        tl.store(place, h, mask=tile)
        h = tl.exp2(total[None, :] * rate) * h + added


@triton.jit
def forward(
    delta, delta_b, delta_l, delta_g, u, u_b, u_l, u_g, B, B_b, B_l, B_g, C, C_b, C_l, C_g, z, z_b, z_l, z_g,
    A, D, bias, routes, starts, y, states,
    L, H, W, E, groups, blocks, segment, chunks,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr,
    SKIP: tl.constexpr, GATE: tl.constexpr, SPLIT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """The scan of one segment from its true initial state."""
    b, g, block = _place(tl.program_id(0), groups, blocks)
    s = tl.program_id(1)
    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    channels = d < E
    tile = (n < N)[:, None] & channels[None, :]
    route = tl.load(routes + g)
    rate = tl.load(A + (n[:, None] * groups + g) * E + d[None, :], mask=tile, other=0.0) * LOG2E
    shift = tl.load(bias + g * E + d, mask=channels & BIAS, other=0.0)
    skip = tl.load(D + g * E + d, mask=channels & SKIP, other=0.0)
    h = tl.zeros((NP, BD), tl.float32)
    if SPLIT:
        row = b * tl.num_programs(1) + s
        h = tl.load(starts + ((row * N + n[:, None]) * groups + g) * E + d[None, :], mask=tile, other=0.0)
    for first in range(s * segment, tl.minimum(L, (s + 1) * segment), CHUNK):
        if SAVE:
            place = ((b * chunks + first // CHUNK) * groups + g) * E + d[None, :]
            tl.store(states + place * N + n[:, None], h, mask=tile)
        for step in range(first, tl.minimum(L, first + CHUNK)):
            at = _position(step, route, L, H, W, MAPPED)
            x = tl.load(u + b * u_b + at * u_l + g * u_g + d, mask=channels, other=0.0).to(tl.float32)
            dt = tl.load(delta + b * delta_b + at * delta_l + g * delta_g + d, mask=channels, other=0.0)
            dt = dt.to(tl.float32) + shift
            if SOFTPLUS:
                dt = _softplus(dt)
            Bt = tl.load(B + b * B_b + at * B_l + g * B_g + n, mask=n < N, other=0.0).to(tl.float32)
            Ct = tl.load(C + b * C_b + at * C_l + g * C_g + n, mask=n < N, other=0.0).to(tl.float32)
            h = tl.exp2(dt[None, :] * rate) * h + (dt * x)[None, :] * Bt[:, None]
            out = tl.sum(h * Ct[:, None], axis=0) + skip * x
            if GATE:
                gate = tl.load(z + b * z_b + at * z_l + g * z_g + d, mask=channels, other=0.0).to(tl.float32)
                out = out * gate * _sigmoid(gate)
            tl.store(y + ((b * L + at) * groups + g) * E + d, out, mask=channels)


@triton.jit
def segment_gradients(
    delta, delta_b, delta_l, delta_g, C, C_b, C_l, C_g, A, bias, routes, grad, ends, sums,
    L, H, W, E, groups, blocks, chunks,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """Gradient that leaves each chunk towards the one before it, if none came in from behind."""
    b, g, block = _place(tl.program_id(0), groups, blocks)
    chunk = tl.program_id(1)
    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    channels = d < E
    tile = (n < N)[:, None] & channels[None, :]
    route = tl.load(routes + g)
    rate = tl.load(A + (n[:, None] * groups + g) * E + d[None, :], mask=tile, other=0.0) * LOG2E
    shift = tl.load(bias + g * E + d, mask=channels & BIAS, other=0.0)
    gh = tl.zeros((NP, BD), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    stop = tl.minimum(L, (chunk + 1) * CHUNK)
    for i in range(0, stop - chunk * CHUNK):
        at = _position(stop - 1 - i, route, L, H, W, MAPPED)
        dt = (
            tl.load(delta + b * delta_b + at * delta_l + g * delta_g + d, mask=channels, other=0.0).to(tl.float32)
            + shift
        )
        if SOFTPLUS:
            dt = _softplus(dt)
        gy = tl.load(grad + ((b * L + at) * groups + g) * E + d, mask=channels, other=0.0)
        Ct = tl.load(C + b * C_b + at * C_l + g * C_g + n, mask=n < N, other=0.0).to(tl.float32)
        gh = tl.exp2(dt[None, :] * rate) * (gh + gy[None, :] * Ct[:, None])
        total += dt
    row = b * chunks + chunk
    tl.store(ends + ((row * N + n[:, None]) * groups + g) * E + d[None, :], gh, mask=tile)
    tl.store(sums + (row * groups + g) * E + d, total, mask=channels)


@triton.jit
def backward(
    delta, delta_b, delta_l, delta_g, u, u_b, u_l, u_g, B, B_b, B_l, B_g, C, C_b, C_l, C_g,
    A, bias, routes, states, incoming, grad, trail,
    y, grad_u, grad_delta, grad_A, grad_B, grad_C,
    L, H, W, E, batch, groups, blocks, chunks, items,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr, WITH_Y: tl.constexpr,
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
        route = tl.load(routes + g)
        rate = tl.load(A + (n[:, None] * groups + g) * E + d[None, :], mask=tile, other=0.0)
        shift = tl.load(bias + g * E + d, mask=channels & BIAS, other=0.0)
        first = chunk * CHUNK
        steps = tl.minimum(L - first, CHUNK)
        place = ((b * chunks + chunk) * groups + g) * E + d[None, :]
        h = tl.load(states + place * N + n[:, None], mask=tile, other=0.0)
        for i in range(0, steps):
            at = _position(first + i, route, L, H, W, MAPPED)
            x = tl.load(u + b * u_b + at * u_l + g * u_g + d, mask=channels, other=0.0).to(tl.float32)
            dt = tl.load(delta + b * delta_b + at * delta_l + g * delta_g + d, mask=channels, other=0.0)
            dt = dt.to(tl.float32) + shift
            if SOFTPLUS:
                dt = _softplus(dt)
            Bt = tl.load(B + b * B_b + at * B_l + g * B_g + n, mask=n < N, other=0.0).to(tl.float32)
            decayed = tl.exp2(dt[None, :] * (rate * LOG2E)) * h
            tl.store(own + i * (NP * BD), decayed)
            h = decayed + (dt * x)[None, :] * Bt[:, None]
            if WITH_Y:
                Ct = tl.load(C + b * C_b + at * C_l + g * C_g + n, mask=n < N, other=0.0).to(tl.float32)
                tl.store(y + ((b * L + at) * groups + g) * E + d, tl.sum(h * Ct[:, None], axis=0), mask=channels)
        # The trail is read by the threads that wrote it, or by others of the program after this.
        tl.debug_barrier()
        row = b * chunks + chunk
        gh = tl.load(incoming + ((row * N + n[:, None]) * groups + g) * E + d[None, :], mask=tile, other=0.0)
        gA = tl.zeros((NP, BD), tl.float32)
        for j in range(0, steps):
            i = steps - 1 - j
            at = _position(first + i, route, L, H, W, MAPPED)
            x = tl.load(u + b * u_b + at * u_l + g * u_g + d, mask=channels, other=0.0).to(tl.float32)
            raw = tl.load(delta + b * delta_b + at * delta_l + g * delta_g + d, mask=channels, other=0.0)
            raw = raw.to(tl.float32) + shift
            dt = raw
            if SOFTPLUS:
                dt = _softplus(raw)
            gy = tl.load(grad + ((b * L + at) * groups + g) * E + d, mask=channels, other=0.0)
            Bt = tl.load(B + b * B_b + at * B_l + g * B_g + n, mask=n < N, other=0.0).to(tl.float32)
            Ct = tl.load(C + b * C_b + at * C_l + g * C_g + n, mask=n < N, other=0.0).to(tl.float32)
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
        tl.store(grad_A + ((row * N + n[:, None]) * groups + g) * E + d[None, :], gA, mask=tile)
        tl.debug_barrier()
