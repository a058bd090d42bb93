"""Backend ``triton``: the scan and the convolution on NVIDIA and AMD GPUs without anything to build.

Short batches leave most of a GPU idle, so the sequence is split into segments where batch and channels alone do not
fill it: end states of all segments from zero, a carry over the segments, and the scan from the true states. The
backward pass always works on all chunks of 64 steps at a time. What can be many programs lies on the first axis of
the grid, as the others end at 65,535.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_mamba.ops.backends import STATE_INTERVAL, UP_TO_FLOAT32, Availability, Backend
from monai_mamba.ops.device_check import check_on_cuda
from monai_mamba.ops.routes import ROUTES

_CONV_TILE = {"BL": 32, "BD": 64}  # steps and channels of a program of the convolution
_LANES = 32  # channels of a program
_PROGRAMS_PER_PROCESSOR = 4
_TRAIL_PROGRAMS_PER_PROCESSOR = 8


@dataclass
class _Problem:
    """A scan as the kernels see it: ``u`` and the like ``(B, L, G, E)``, matrices ``(B, L, G, N)``, A ``(G, E, N)``."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    softplus: bool
    size: tuple[int, int]
    routes: int  # two bits for each group
    mapped: bool

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, length, groups, channels = self.delta.shape
        return batch, length, groups, channels, self.A.shape[2]

    @property
    def blocks(self) -> int:
        return -(-self.delta.shape[3] // _LANES)

    @property
    def chunks(self) -> int:
        return -(-self.delta.shape[1] // STATE_INTERVAL)

    @functools.cached_property
    def BC(self) -> Tensor:
        """B and C in float32, side by side and filled up with zeros: ``(B, L, G, 2, NP)``.

        Networks have them as parts of a projection, from where a thread could load one value at a time, not 16 bytes.
        """
        both = torch.stack((self.B, self.C), 3).float()
        states = both.shape[4]
        return F.pad(both, (0, self.padded - states)) if states < self.padded else both

    @property
    def padded(self) -> int:
        """States rounded up to a power of two."""
        return 1 << (self.A.shape[2] - 1).bit_length()

    def sizes(self) -> tuple[int, int, int, int]:
        return self.delta.shape[1], *self.size, self.delta.shape[3]

    @property
    def is_wide(self) -> bool:
        """Whether offsets inside one image need 64 bits."""
        _, length, groups, channels, _ = self.shape
        strides = [t.stride(1) for t in (self.u, self.delta, self.z) if t is not None]
        return length * max(*strides, groups * channels, groups * 2 * self.padded) >= 2**31

    def constants(self) -> dict[str, Any]:
        return {
            "N": self.A.shape[2],
            "NP": self.padded,
            "BD": _LANES,
            "SOFTPLUS": self.softplus,
            "BIAS": self.bias is not None,
            "MAPPED": self.mapped,
            "WIDE": self.is_wide,
            "num_warps": max(1, min(8, self.padded // 32)),
        }


class TritonBackend(Backend):
    """Triton kernels: float32 arithmetic for float32, bfloat16 and float16 tensors."""

    name = "triton"
    priority = 90
    ops = frozenset({"selective_scan", "ss2d_scan", "causal_conv1d"})
    device_types = frozenset({"cuda"})
    dtypes = UP_TO_FLOAT32
    max_states = 256
    max_taps = 16  # they are unrolled

    def availability(self) -> Availability:
        if importlib.util.find_spec("triton") is None:
            return Availability(False, "the package triton is not installed")
        if not torch.cuda.is_available():
            return Availability(False, "PyTorch finds no CUDA or ROCm device")
        return check_on_cuda(self)

    def scan_forward(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, save_states):
        problem = _sequence(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        y, states = _forward(problem, u.dtype, save_states)
        return y.view(u.shape), None if states is None else states.flatten(2, 3)

    def scan_backward(self, grad_y, states, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        problem = _sequence(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        gated = grad_y.float().unflatten(2, (B.shape[2], -1))
        found = _backward(problem, gated, states)
        return tuple(
            None if t is None or g is None else g.reshape(t.shape).to(t.dtype)
            for g, t in zip(found, (u, delta, A, B, C, D, z, delta_bias), strict=True)
        )

    def ss2d_forward(self, x, delta, A, B, C, D, delta_bias, routes, delta_softplus, save_states):
        problem = _map(x, delta, A, B, C, D, delta_bias, routes, delta_softplus)
        # One plane per route and a sum: unlike atomic additions, the same bits every time.
        y, states = _forward(problem, torch.float32, save_states)
        return y.sum(2).view(x.shape).to(x.dtype), None if states is None else states.flatten(2, 3)

    def ss2d_backward(self, grad_y, states, x, delta, A, B, C, D, delta_bias, routes, delta_softplus):
        problem = _map(x, delta, A, B, C, D, delta_bias, routes, delta_softplus)
        planes = grad_y.float().flatten(1, 2).unsqueeze(2).expand(problem.delta.shape)
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, _, grad_bias = _backward(problem, planes, states)
        found = (grad_u.sum(2), grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias)
        return tuple(
            None if t is None or g is None else g.reshape(t.shape).to(t.dtype)
            for g, t in zip(found, (x, delta, A, B, C, D, delta_bias), strict=True)
        )

    def conv_forward(self, x, weight, bias, silu):
        from monai_mamba.ops import triton_kernels as kernels

        x, weight, bias = _dense(x), _parameter(weight), _parameter(bias)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with _device_of(x):
            kernels.conv_forward[_conv_grid(x)](
                *_steps(x), weight, weight if bias is None else bias, y, *x.shape[1:],
                W=weight.shape[1], BIAS=bias is not None, SILU=silu, **_CONV_TILE,
            )  # fmt: skip
        return y

    def conv_backward(self, grad_y, x, weight, bias, silu):
        from monai_mamba.ops import triton_kernels as kernels

        x, grad_y = _dense(x), _dense(grad_y)
        taps, shift = _parameter(weight), _parameter(bias)
        grid = _conv_grid(x)
        _, length, channels = x.shape
        grad = taps.new_empty(x.shape)
        grad_weight = taps.new_empty(_conv_tiles(x), channels, taps.shape[1])
        grad_bias = None if shift is None else taps.new_empty(_conv_tiles(x), channels)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with _device_of(x):
            kernels.conv_backward_filter[grid](
                *_steps(x), taps, taps if shift is None else shift, *_steps(grad_y),
                grad, grad_weight, taps if grad_bias is None else grad_bias, length, channels,
                W=taps.shape[1], BIAS=shift is not None, SILU=silu, **_CONV_TILE,
            )  # fmt: skip
            kernels.conv_backward_input[grid](grad, taps, grad_x, length, channels, W=taps.shape[1], **_CONV_TILE)
        return (
            grad_x,
            grad_weight.sum(0).to(weight.dtype),
            None if bias is None or grad_bias is None else grad_bias.sum(0).to(bias.dtype),
        )


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _parameter(t):
    return None if t is None else t.float().contiguous()


def _sequence(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> _Problem:
    groups = (B.shape[2], -1)
    u, delta, z = (None if t is None else _dense(t).unflatten(2, groups) for t in (u, delta, z))
    A, D, delta_bias = (None if t is None else t.float().contiguous().unflatten(0, groups) for t in (A, D, delta_bias))
    return _Problem(u, delta, A, B, C, D, z, delta_bias, delta_softplus, (1, delta.shape[1]), 0, False)


def _map(x, delta, A, B, C, D, delta_bias, routes, delta_softplus) -> _Problem:
    delta, B, C = (t.flatten(1, 2) for t in (delta, B, C))
    delta = _dense(delta)
    u = _dense(x.flatten(1, 2)).unsqueeze(2).expand(delta.shape)
    A, D, delta_bias = (_parameter(t) for t in (A, D, delta_bias))
    codes = sum(ROUTES.index(route) << 2 * i for i, route in enumerate(routes))
    return _Problem(u, delta, A, B, C, D, None, delta_bias, delta_softplus, tuple(x.shape[1:3]), codes, True)


def _conv_tiles(x: Tensor) -> int:
    """Tiles of steps of the whole batch."""
    return x.shape[0] * -(-x.shape[1] // _CONV_TILE["BL"])


def _conv_grid(x: Tensor) -> tuple[int]:
    return (_conv_tiles(x) * -(-x.shape[2] // _CONV_TILE["BD"]),)


def _steps(t: Tensor) -> tuple[Tensor, int, int]:
    """A sequence with its strides of batch and step."""
    return t, t.stride(0), t.stride(1)


def _view(t: Tensor) -> tuple[Tensor, int, int, int]:
    """A tensor with its strides of batch, step and group."""
    return t, t.stride(0), t.stride(1), t.stride(2)


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_segments(programs: int, chunks: int, processors: int) -> int:
    """Choose into how many segments the forward pass splits the sequence.

    Splitting costs a second exponential per update, so it is done only where one pass leaves more than half of the
    device idle, and then as often as fills it.

    Args:
        programs: independent programs without a split (batch x groups x channel blocks).
        chunks: chunks of 64 steps; a segment is a whole number of them.
        processors: multiprocessors of the device.
    """
    wanted = processors * _PROGRAMS_PER_PROCESSOR
    if chunks < 4 or 2 * programs >= wanted:
        return 1
    per_segment = -(-chunks // min(chunks, -(-wanted // programs)))
    return -(-chunks // per_segment)


def _forward(p: _Problem, dtype: torch.dtype, save_states: bool, segments: int | None = None):
    from monai_mamba.ops import triton_kernels as kernels

    batch, length, groups, channels, d_state = p.shape
    programs = batch * groups * p.blocks
    if segments is None:
        segments = num_segments(programs, p.chunks, _num_processors(p.delta.device))
    segment = -(-p.chunks // segments) * STATE_INTERVAL
    A = p.A.permute(2, 0, 1).contiguous()  # (N, G, E)
    bias = A if p.bias is None else p.bias
    delta, u = _view(p.delta), _view(p.u)
    starts = A
    counts = (groups, p.blocks)
    with _device_of(p.delta):
        if segments > 1:
            starts = A.new_empty(batch, segments, d_state, groups, channels)
            sums = A.new_empty(batch, segments, groups, channels)
            kernels.segment_ends[(programs, segments)](
                *(*delta, *u, p.BC, A, bias, p.routes, starts, sums), *p.sizes(), *counts, segment, **p.constants()
            )
            constants = {k: v for k, v in p.constants().items() if k in ("N", "NP", "BD", "num_warps")}
            kernels.carry[(programs,)](A, starts, sums, channels, *counts, segments, **constants, BACKWARD=False)
        y = p.delta.new_empty(batch, length, groups, channels, dtype=dtype)
        states = A.new_empty(batch, p.chunks - 1, groups, channels, d_state) if save_states else None
        kernels.forward[(programs, segments)](
            *(*delta, *u, p.BC, *_view(p.delta if p.z is None else p.z), A, A if p.D is None else p.D, bias),
            *(p.routes, starts, y),
            A if states is None else states,
            *(*p.sizes(), *counts, segment, p.chunks, 1),
            **p.constants(),
            SKIP=p.D is not None,
            GATE=p.z is not None,
            SPLIT=segments > 1,
            SAVE=save_states,
        )
    return y, states


def _backward(p: _Problem, grad_y: Tensor, states: Tensor | None):
    """Gradients of u, delta, A, B, C, D, z, bias; of u, delta and z for every group: ``(B, L, G, E)``."""
    from monai_mamba.ops import triton_kernels as kernels

    batch, length, groups, channels, d_state = p.shape
    if states is None:
        _, states = _forward(p, torch.float32, True)
    states = states.contiguous()
    programs = batch * groups * p.blocks
    A = p.A.permute(2, 0, 1).contiguous()  # (N, G, E)
    bias = A if p.bias is None else p.bias
    delta, u = _view(p.delta), _view(p.u)
    counts = (groups, p.blocks)
    grad = grad_y if p.z is None else grad_y * F.silu(p.z.float())
    grad = grad.contiguous()
    incoming = A.new_empty(batch, p.chunks, d_state, groups, channels)
    sums = A.new_empty(batch, p.chunks, groups, channels)
    items = programs * p.chunks
    running = min(items, _TRAIL_PROGRAMS_PER_PROCESSOR * _num_processors(p.delta.device))
    constants = p.constants()
    trail = A.new_empty(running, STATE_INTERVAL, constants["NP"], _LANES)
    y = A.new_empty(p.delta.shape) if p.z is not None else A
    grad_u, grad_delta = A.new_empty(p.delta.shape), A.new_empty(p.delta.shape)
    grad_A = torch.empty_like(incoming)
    grad_B, grad_C = (A.new_empty(p.blocks, batch, length, groups, d_state) for _ in range(2))
    with _device_of(p.delta):
        kernels.segment_gradients[(items,)](
            *(*delta, p.BC, A, bias, p.routes, grad, incoming, sums), *p.sizes(), *counts, p.chunks, **constants
        )
        few = {k: v for k, v in constants.items() if k in ("N", "NP", "BD", "num_warps")}
        kernels.carry[(programs,)](A, incoming, sums, channels, *counts, p.chunks, **few, BACKWARD=True)
        kernels.backward[(running,)](
            *(*delta, *u, p.BC, A, bias, p.routes, states, incoming, grad, trail),
            *(y, grad_u, grad_delta, grad_A, grad_B, grad_C),
            *(*p.sizes(), batch, *counts, p.chunks, items),
            **constants,
            WITH_Y=p.z is not None,
        )
    grad_bias = None if p.bias is None else grad_delta.sum((0, 1))
    grad_D = None
    if p.D is not None:
        grad_u += p.D * grad
        grad_D = (grad * p.u).sum((0, 1))
    grad_z = None
    if p.z is not None:
        if p.D is not None:
            y += p.D * p.u
        z = p.z.float()
        gate = torch.sigmoid(z)
        grad_z = grad_y * y * gate * (1 + z * (1 - gate))
    return (
        grad_u,
        grad_delta,
        grad_A.sum((0, 1)).permute(1, 2, 0),
        grad_B.sum(0),
        grad_C.sum(0),
        grad_D,
        grad_z,
        grad_bias,
    )


def _device_of(t: Tensor):
    # Triton launches on the current device, which need not be that of the tensors.
    return torch.cuda.device(t.device) if t.device.type == "cuda" else contextlib.nullcontext()
