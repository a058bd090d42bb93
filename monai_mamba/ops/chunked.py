"""Backend ``torch``: a two-level scan out of PyTorch operations, for every device PyTorch knows.

The sequence is cut into chunks of 64 steps. All chunks are scanned at the same time from a zero state (64 vectorised
steps), the end states are carried from chunk to chunk, and a second pass starts each chunk from its true state. Only
decays ``exp(delta A) <= 1`` are ever multiplied, so nothing overflows however strong the decay is; a log-space
cumulative sum would. The backward pass computes the states again in blocks of eight steps.
The largest intermediate holds ``B D L N / 64`` elements and is cut along the channels to fit the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_mamba.ops.backends import STATE_INTERVAL, Backend, num_saved_states
from monai_mamba.ops.reference import state_dtype

_SUB_BLOCK = 8  # steps whose states the backward pass keeps at a time
# Elements of one state tensor: about the size of the L2 cache on a CPU, enough to fill the device elsewhere.
_STATE_ELEMENTS = {"cpu": 1 << 17}
_STATE_ELEMENTS_OTHER = 1 << 24


@dataclass
class _Chunks:
    """The inputs of a scan as ``(B, M, K, G, E)`` and ``(B, M, K, G, N)``: M chunks of K steps, E channels a group."""

    u: Tensor
    delta: Tensor  # after bias and softplus
    A: Tensor  # (G, E, N)
    B: Tensor
    C: Tensor

    def channels(self, start: int, stop: int) -> _Chunks:
        return _Chunks(self.u[..., start:stop], self.delta[..., start:stop], self.A[:, start:stop], self.B, self.C)

    def decay(self, step: int) -> Tensor:
        return (self.delta[:, :, step, ..., None] * self.A).exp_()  # (B, M, G, E, N)

    def advance(self, h: Tensor, step: int, decay: Tensor | None = None) -> Tensor:
        """Do one step of all chunks in place."""
        drive = self.delta[:, :, step] * self.u[:, :, step]
        h.mul_(self.decay(step) if decay is None else decay)
        return h.addcmul_(drive[..., None], self.B[:, :, step, :, None, :])


def _chunked(t: Tensor, steps: int) -> Tensor:
    """Pad ``(B, L, ...)`` with zeros to whole chunks, ``(B, M, K, ...)``; zero delta leaves the state as it is."""
    missing = -t.shape[1] % steps
    if missing:
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing))
    return t.unflatten(1, (-1, steps))


def _prepare(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> tuple[_Chunks, Tensor]:
    """Return the chunked inputs and the step sizes before the softplus, ``(B, L, D)``."""
    dtype = state_dtype(u)
    groups = B.shape[2]
    steps = min(STATE_INTERVAL, u.shape[1])
    raw = delta.to(dtype)
    if delta_bias is not None:
        raw = raw + delta_bias.to(dtype)
    step_size = F.softplus(raw) if delta_softplus else raw
    chunks = _Chunks(
        u=_chunked(u.to(dtype).unflatten(2, (groups, -1)), steps),
        delta=_chunked(step_size.unflatten(2, (groups, -1)), steps),
        A=A.to(dtype).unflatten(0, (groups, -1)),
        B=_chunked(B.to(dtype), steps),
        C=_chunked(C.to(dtype), steps),
    )
    return chunks, raw


def _channel_blocks(chunks: _Chunks) -> list[tuple[int, int]]:
    batch, num_chunks, _, groups, channels = chunks.u.shape
    budget = _STATE_ELEMENTS.get(chunks.u.device.type, _STATE_ELEMENTS_OTHER)
    per_channel = batch * num_chunks * groups * chunks.A.shape[-1]
    width = min(channels, max(1, budget // per_channel))
    return [(start, min(start + width, channels)) for start in range(0, channels, width)]


def _carry(decay: Tensor, end: Tensor) -> Tensor:
    """Turn what each chunk adds, ``(B, M, ...)``, into the state at its beginning (exclusive scan over M)."""
    num_chunks = decay.shape[1]
    if num_chunks <= STATE_INTERVAL:
        state = torch.zeros_like(end[:, 0])
        states = [state]
        for chunk in range(num_chunks - 1):
            state = torch.addcmul(end[:, chunk], decay[:, chunk], state)
            states.append(state)
        return torch.stack(states, dim=1)
    # Long sequences: the same two levels again, so that the number of steps stays near the square root of M.
    steps = math.isqrt(num_chunks - 1) + 1
    missing = -num_chunks % steps
    pad = (0, 0) * (decay.ndim - 2) + (0, missing)
    decay = F.pad(decay, pad, value=1.0).unflatten(1, (-1, steps))
    end = F.pad(end, pad).unflatten(1, (-1, steps))
    total_decay = torch.ones_like(decay[:, :, 0])
    total = torch.zeros_like(end[:, :, 0])
    for step in range(steps):
        total = torch.addcmul(end[:, :, step], decay[:, :, step], total)
        total_decay = total_decay * decay[:, :, step]
    state = _carry(total_decay, total)
    states = []
    for step in range(steps):
        states.append(state)
        state = torch.addcmul(end[:, :, step], decay[:, :, step], state)
    return torch.stack(states, dim=2).flatten(1, 2)[:, :num_chunks]


def _initial_states(chunks: _Chunks) -> Tensor:
    """State at the beginning of every chunk, ``(B, M, G, E, N)``."""
    shape = (*chunks.u.shape[:2], *chunks.A.shape)
    end = torch.zeros(shape, dtype=chunks.u.dtype, device=chunks.u.device)
    if shape[1] == 1:
        return end
    for step in range(chunks.u.shape[2]):
        chunks.advance(end, step)
    return _carry(_total_decay(chunks), end)


def _total_decay(chunks: _Chunks) -> Tensor:
    return (chunks.delta.sum(2)[..., None] * chunks.A).exp_()  # (B, M, G, E, N)


def _readout(h: Tensor, C_step: Tensor) -> Tensor:
    # Not a matmul: TF32 must not reach the state.
    return (h * C_step[:, :, :, None, :]).sum(-1)  # (B, M, G, E)


class TorchBackend(Backend):
    """The stable two-level scan in plain PyTorch."""

    name = "torch"
    priority = 10
    ops = frozenset({"selective_scan", "ss2d_scan", "causal_conv1d"})
    is_fallback = True

    def scan_forward(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, save_states):
        chunks, _ = _prepare(u, delta, A, B, C, delta_bias, delta_softplus)
        y = torch.empty_like(chunks.u)
        states = None
        if save_states:
            states = chunks.u.new_empty((u.shape[0], num_saved_states(u.shape[1]), *chunks.A.shape))
        for start, stop in _channel_blocks(chunks):
            part = chunks.channels(start, stop)
            h = _initial_states(part)
            if states is not None:
                states[..., start:stop, :] = h[:, 1:]
            for step in range(part.u.shape[2]):
                part.advance(h, step)
                y[:, :, step, :, start:stop] = _readout(h, part.C[:, :, step])
        y = y.flatten(3).flatten(1, 2)[:, : u.shape[1]]  # (B, L, D)
        if D is not None:
            y = y + D.to(y.dtype) * u.to(y.dtype)
        if z is not None:
            y = y * F.silu(z.to(y.dtype))
        return y.to(u.dtype).contiguous(), None if states is None else states.flatten(2, 3)

    def scan_backward(self, grad_y, states, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        chunks, raw_delta = _prepare(u, delta, A, B, C, delta_bias, delta_softplus)
        dtype, length, steps = chunks.u.dtype, u.shape[1], chunks.u.shape[2]
        grad_gated = grad_y.to(dtype)
        grad_scan = grad_gated * F.silu(z.to(dtype)) if z is not None else grad_gated  # before the gate
        grad_y_chunks = _chunked(grad_scan.unflatten(2, (B.shape[2], -1)), steps)
        if states is not None:
            states = F.pad(states.unflatten(2, (B.shape[2], -1)), (*(0, 0) * 3, 1, 0))  # (B, M, G, E, N), first zero

        grad_u, grad_delta = torch.zeros_like(chunks.u), torch.zeros_like(chunks.u)
        grad_A = torch.zeros_like(chunks.A)
        grad_B, grad_C = torch.zeros_like(chunks.B), torch.zeros_like(chunks.C)
        y = torch.empty_like(chunks.u) if z is not None else None
        for start, stop in _channel_blocks(chunks):
            part = chunks.channels(start, stop)
            initial = _initial_states(part) if states is None else states[..., start:stop, :]
            _backward_block(
                part,
                initial,
                grad_y_chunks[..., start:stop],
                _Gradients(grad_u[..., start:stop], grad_delta[..., start:stop], grad_A[:, start:stop], grad_B, grad_C),
                None if y is None else y[..., start:stop],
            )

        def whole(t: Tensor) -> Tensor:
            return t.flatten(3).flatten(1, 2)[:, :length]  # (B, L, D)

        grad_u_, grad_delta_ = whole(grad_u), whole(grad_delta)
        u_, grad_D, grad_z = u.to(dtype), None, None
        if z is not None:
            assert y is not None
            y_ = whole(y)
            if D is not None:
                y_ = y_ + D.to(dtype) * u_
            z_ = z.to(dtype)
            gate = torch.sigmoid(z_)
            grad_z = (grad_gated * y_ * gate * (1 + z_ * (1 - gate))).to(z.dtype)
        if D is not None:
            grad_u_ = grad_u_ + D.to(dtype) * grad_scan
            grad_D = (grad_scan * u_).sum((0, 1)).to(D.dtype)
        if delta_softplus:
            grad_delta_ = grad_delta_ * torch.sigmoid(raw_delta)
        grad_bias = None if delta_bias is None else grad_delta_.sum((0, 1)).to(delta_bias.dtype)
        return (
            grad_u_.to(u.dtype),
            grad_delta_.to(delta.dtype),
            grad_A.flatten(0, 1).to(A.dtype),
            grad_B.flatten(1, 2)[:, :length].to(B.dtype),
            grad_C.flatten(1, 2)[:, :length].to(C.dtype),
            grad_D,
            grad_z,
            grad_bias,
        )

    def conv_forward(self, x, weight, bias, silu):
        y = _convolve(x, weight, bias)
        return (F.silu(y) if silu else y).to(x.dtype)

    def conv_backward(self, grad_y, x, weight, bias, silu):
        dtype = state_dtype(x)
        length, width = x.shape[1], weight.shape[1]
        grad = grad_y.to(dtype)
        if silu:
            y = _convolve(x, weight, bias)
            gate = torch.sigmoid(y)
            grad = grad * gate * (1 + y * (1 - gate))
        x_, weight_ = x.to(dtype), weight.to(dtype)
        grad_x = torch.zeros_like(x_)
        grad_weight = torch.zeros_like(weight_)
        for tap in range(width):
            back = width - 1 - tap  # y[l] takes x[l - back] by this tap
            if back >= length:
                continue
            grad_x[:, : length - back] += grad[:, back:] * weight_[:, tap]
            grad_weight[:, tap] = (grad[:, back:] * x_[:, : length - back]).sum((0, 1))
        grad_bias = None if bias is None else grad.sum((0, 1)).to(bias.dtype)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias


@dataclass
class _Gradients:
    """Where a block of channels adds its gradients; ``B`` and ``C`` sum over the blocks."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


def _backward_block(part: _Chunks, initial: Tensor, grad_y: Tensor, gradients: _Gradients, y: Tensor | None) -> None:
    """Backward pass of some channels: carry the gradient of the state backwards, with the states computed again."""
    steps = part.u.shape[2]
    grad_h = _incoming_gradient(part, grad_y)  # of the state after the last step of each chunk
    block_starts = []
    h = initial.clone()
    for step in range(steps):
        if step % _SUB_BLOCK == 0:
            block_starts.append(h.clone())
        part.advance(h, step)
    for block in reversed(range(len(block_starts))):
        first = block * _SUB_BLOCK
        inside = range(first, min(first + _SUB_BLOCK, steps))
        states, decays = [block_starts[block]], []
        for step in inside:
            decays.append(part.decay(step))
            states.append(part.advance(states[-1].clone(), step, decays[-1]))
        block_starts[block] = states[0].new_empty(0)
        for step in reversed(inside):
            before, after, decay = states[step - first], states[step - first + 1], decays[step - first]
            delta, u, B_step = part.delta[:, :, step], part.u[:, :, step], part.B[:, :, step]
            grad_step = grad_y[:, :, step]
            if y is not None:
                y[:, :, step] = _readout(after, part.C[:, :, step])
            gradients.C[:, :, step] += (after * grad_step[..., None]).sum(3)
            grad_h.addcmul_(grad_step[..., None], part.C[:, :, step, :, None, :])
            grad_drive = (grad_h * B_step[:, :, :, None, :]).sum(-1)  # of delta * u
            gradients.B[:, :, step] += (grad_h * (delta * u)[..., None]).sum(3)
            grad_h.mul_(decay)
            grad_exponent = grad_h * before  # of delta * A
            gradients.u[:, :, step] = grad_drive * delta
            gradients.delta[:, :, step] = grad_drive * u + (grad_exponent * part.A).sum(-1)
            gradients.A += (grad_exponent * delta[..., None]).sum((0, 1))


def _incoming_gradient(part: _Chunks, grad_y: Tensor) -> Tensor:
    """Gradient that reaches the end state of each chunk from the chunks behind it, ``(B, M, G, E, N)``."""
    grad_h = torch.zeros((*part.u.shape[:2], *part.A.shape), dtype=part.u.dtype, device=part.u.device)
    if grad_h.shape[1] == 1:
        return grad_h
    for step in reversed(range(part.u.shape[2])):
        grad_h.addcmul_(grad_y[:, :, step, ..., None], part.C[:, :, step, :, None, :])
        grad_h.mul_(part.decay(step))
    return _carry(_total_decay(part).flip(1), grad_h.flip(1)).flip(1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = state_dtype(x)
    x_, weight_ = x.to(dtype), weight.to(dtype)
    length, width = x.shape[1], weight.shape[1]
    y = x_ * weight_[:, -1]
    if bias is not None:
        y += bias.to(dtype)
    for tap in range(width - 1):
        back = width - 1 - tap
        if back < length:
            y[:, back:] += x_[:, : length - back] * weight_[:, tap]
    return y
