"""Backend ``cpu``: the scans and the convolution in C, with vectors across channels (`csrc/kernels.c`).

The C library is part of the binary wheels; from source it is compiled on first use into the user's cache folder
(:mod:`monai_mamba.ops.cpu_library`). It runs without the interpreter lock on ``torch.get_num_threads()`` threads, and
its results do not depend on their number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from monai_mamba.errors import BackendError
from monai_mamba.ops import cpu_library
from monai_mamba.ops.backends import Availability, Backend, Call, num_saved_states

_TYPES = {
    torch.float32: cpu_library.FLOAT32,
    torch.bfloat16: cpu_library.BFLOAT16,
    torch.float16: cpu_library.FLOAT16,
}
_variant = ""


@contextlib.contextmanager
def use_variant(name: str) -> Iterator[None]:
    """Use one instruction set ("baseline", "avx2", "avx512") within the ``with`` block, in all threads.

    Raises:
        BackendError: if the library or the instruction set is not available here.
    """
    global _variant
    try:
        cpu_library.load().choose_variant(name)
    except cpu_library.LibraryError as error:
        raise BackendError(str(error)) from error
    previous, _variant = _variant, name
    try:
        yield
    finally:
        _variant = previous


class CpuBackend(Backend):
    """The C library: float32 arithmetic, also for bfloat16 and float16 tensors."""

    name = "cpu"
    priority = 100
    ops = frozenset({"selective_scan", "ss2d_scan", "causal_conv1d"})
    device_types = frozenset({"cpu"})
    dtypes = frozenset(_TYPES)
    max_states = cpu_library.MAX_STATE
    max_taps = cpu_library.MAX_TAPS

    def availability(self) -> Availability:
        try:
            library = cpu_library.load()
            index = library.choose_variant(_variant)
        except cpu_library.LibraryError as error:
            return Availability(False, str(error))
        name = next(name for name, i in library.variants.items() if i == index)
        return Availability(True, f"instruction set {name}, {library.path}")

    def refusal(self, call: Call) -> str | None:
        if call.op == "ss2d_scan" and call.groups > cpu_library.MAX_ROUTES:
            return f"it has at most {cpu_library.MAX_ROUTES} routes, got K={call.groups}"
        return super().refusal(call)

    def scan_forward(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, save_states):
        u, delta, B, C, z = (_dense(t) for t in (u, delta, B, C, z))
        A, D, delta_bias = (_parameter(t) for t in (A, D, delta_bias))
        y = torch.empty(u.shape, dtype=u.dtype)
        states = None
        if save_states:
            shape = (u.shape[0], num_saved_states(u.shape[1]), u.shape[2], A.shape[1])
            states = torch.empty(shape, dtype=torch.float32)
        job = _sequence_job(u, delta, A, B, C, D, z, delta_bias, delta_softplus, states)
        job.y = _channel_view(y, job.channels)
        _run("scan_forward", job)
        return y, states

    def scan_backward(self, grad_y, states, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        if states is None:
            _, states = self.scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
        grad_y, dense_u, dense_delta, dense_B, dense_C, dense_z = (_dense(t) for t in (grad_y, u, delta, B, C, z))
        A_, D_, delta_bias_, states = (_parameter(t) for t in (A, D, delta_bias, states))
        job = _sequence_job(
            dense_u, dense_delta, A_, dense_B, dense_C, D_, dense_z, delta_bias_, delta_softplus, states
        )
        grad_u, grad_delta = torch.empty(u.shape, dtype=u.dtype), torch.empty(u.shape, dtype=delta.dtype)
        grad_z = None if z is None else torch.empty(u.shape, dtype=z.dtype)
        grad_A, grad_B, grad_C, grad_D, grad_bias = (
            None if t is None else torch.empty(t.shape, dtype=torch.float32) for t in (A, B, C, D, delta_bias)
        )
        job.grad_y = _channel_view(grad_y, job.channels)
        job.grad_u = _channel_view(grad_u, job.channels)
        job.grad_delta = _channel_view(grad_delta, job.channels)
        if grad_z is not None:
            job.grad_z = _channel_view(grad_z, job.channels)
        job.grad_A, job.grad_B, job.grad_C = (_pointer(t) for t in (grad_A, grad_B, grad_C))
        job.grad_D, job.grad_delta_bias = _pointer(grad_D), _pointer(grad_bias)
        _run("scan_backward", job)
        found = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias)
        return tuple(
            None if g is None else g.to(t.dtype)
            for g, t in zip(found, (u, delta, A, B, C, D, z, delta_bias), strict=True)
        )

    def ss2d_forward(self, x, delta, A, B, C, D, delta_bias, routes, delta_softplus, save_states):
        flat = tuple(_dense(t.flatten(1, 2)) for t in (x, delta, B, C))
        A, D, delta_bias = (_parameter(t) for t in (A, D, delta_bias))
        # The routes are added up in the output, which therefore is float32 until the end.
        y = torch.empty(x.shape, dtype=torch.float32)
        states = None
        if save_states:
            shape = (x.shape[0], num_saved_states(x.shape[1] * x.shape[2]), A.shape[0] * A.shape[1], A.shape[2])
            states = torch.empty(shape, dtype=torch.float32)
        job = _map_job(x.shape, flat, A, D, delta_bias, routes, delta_softplus, states)
        job.y = _channel_view(y.flatten(1, 2), 0)
        _run("scan_forward", job)
        return y.to(x.dtype), states

    def ss2d_backward(self, grad_y, states, x, delta, A, B, C, D, delta_bias, routes, delta_softplus):
        if states is None:
            _, states = self.ss2d_forward(x, delta, A, B, C, D, delta_bias, routes, delta_softplus, True)
        grad_y = _dense(grad_y.flatten(1, 2))
        flat = tuple(_dense(t.flatten(1, 2)) for t in (x, delta, B, C))
        A_, D_, delta_bias_, states = (_parameter(t) for t in (A, D, delta_bias, states))
        job = _map_job(x.shape, flat, A_, D_, delta_bias_, routes, delta_softplus, states)
        grad_x, grad_delta = torch.empty(x.shape, dtype=torch.float32), torch.empty(delta.shape, dtype=delta.dtype)
        grad_A, grad_B, grad_C, grad_D, grad_bias = (
            None if t is None else torch.empty(t.shape, dtype=torch.float32) for t in (A, B, C, D, delta_bias)
        )
        job.grad_y = _channel_view(grad_y, 0)
        job.grad_u = _channel_view(grad_x.flatten(1, 2), 0)
        job.grad_delta = _group_view(grad_delta.flatten(1, 2))
        job.grad_A, job.grad_B, job.grad_C = (_pointer(t) for t in (grad_A, grad_B, grad_C))
        job.grad_D, job.grad_delta_bias = _pointer(grad_D), _pointer(grad_bias)
        _run("scan_backward", job)
        found = (grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias)
        return tuple(
            None if g is None else g.to(t.dtype) for g, t in zip(found, (x, delta, A, B, C, D, delta_bias), strict=True)
        )

    def conv_forward(self, x, weight, bias, silu):
        x, weight, bias = _dense(x), _parameter(weight), _parameter(bias)
        y = torch.empty(x.shape, dtype=x.dtype)
        job = _conv_job(x, weight, bias, silu)
        job.y = _channel_view(y, x.shape[2])
        _run("conv_forward", job)
        return y

    def conv_backward(self, grad_y, x, weight, bias, silu):
        grad_y, dense_x, weight_, bias_ = _dense(grad_y), _dense(x), _parameter(weight), _parameter(bias)
        grad_x = torch.empty(x.shape, dtype=x.dtype)
        grad_weight = torch.empty(weight.shape, dtype=torch.float32)
        grad_bias = None if bias is None else torch.empty(bias.shape, dtype=torch.float32)
        job = _conv_job(dense_x, weight_, bias_, silu)
        job.grad_y, job.grad_x = _channel_view(grad_y, x.shape[2]), _channel_view(grad_x, x.shape[2])
        job.grad_weight, job.grad_bias = _pointer(grad_weight), _pointer(grad_bias)
        _run("conv_backward", job)
        return grad_x, grad_weight.to(weight.dtype), None if grad_bias is None else grad_bias.to(bias.dtype)


def _run(name: str, job: cpu_library.ScanJob | cpu_library.ConvJob) -> None:
    library = cpu_library.load()
    library.call(name, job, library.choose_variant(_variant), torch.get_num_threads())


def _dense(t: Tensor | None) -> Tensor | None:
    """Return ``t`` itself if its last axis is dense, as slices of the channels are; else a copy."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _parameter(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _channel_view(t: Tensor, channels: int) -> cpu_library.View:
    """View ``(B, L, D)`` with groups of ``channels``."""
    return cpu_library.View(t.data_ptr(), t.stride(0), t.stride(1), channels, _TYPES[t.dtype])


def _group_view(t: Tensor) -> cpu_library.View:
    """View ``(B, L, G, N)`` or ``(B, L, K, D)``."""
    return cpu_library.View(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), _TYPES[t.dtype])


def _sequence_job(u, delta, A, B, C, D, z, delta_bias, delta_softplus, states) -> cpu_library.ScanJob:
    """Describe a scan along one sequence. The caller must keep the tensors alive until the job has run."""
    job = cpu_library.ScanJob()
    job.batch, job.length, channels = u.shape
    job.groups = B.shape[2]
    job.channels = channels // B.shape[2]
    job.d_state, job.height, job.width = A.shape[1], 1, u.shape[1]
    job.softplus = delta_softplus
    job.u, job.delta = _channel_view(u, job.channels), _channel_view(delta, job.channels)
    job.B, job.C = _group_view(B), _group_view(C)
    if z is not None:
        job.z = _channel_view(z, job.channels)
    job.A, job.D, job.delta_bias, job.states = (_pointer(t) for t in (A, D, delta_bias, states))
    return job


def _map_job(shape, flat, A, D, delta_bias, routes, delta_softplus, states) -> cpu_library.ScanJob:
    """Describe a scan along routes; ``flat`` is x, delta, B, C with the pixels in one axis, and must be kept alive."""
    x, delta, B, C = flat
    job = cpu_library.ScanJob()
    job.batch, job.height, job.width, job.channels = shape
    job.length, job.groups, job.d_state = shape[1] * shape[2], len(routes), A.shape[2]
    job.softplus, job.merge = delta_softplus, True
    for k, route in enumerate(routes):
        job.routes[k] = cpu_library.ROUTE_CODES[route]
    job.u, job.delta = _channel_view(x, 0), _group_view(delta)
    job.B, job.C = _group_view(B), _group_view(C)
    job.A, job.D, job.delta_bias, job.states = (_pointer(t) for t in (A, D, delta_bias, states))
    return job


def _conv_job(x, weight, bias, silu) -> cpu_library.ConvJob:
    job = cpu_library.ConvJob()
    job.batch, job.length, job.channels = x.shape
    job.taps, job.silu = weight.shape[1], silu
    job.x = _channel_view(x, x.shape[2])
    job.weight, job.bias = _pointer(weight), _pointer(bias)
    return job
