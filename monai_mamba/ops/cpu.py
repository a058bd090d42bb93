"""Backend ``cpu``: the scans and the convolution in C, with vectors across channels (`csrc/kernels.c`).

The C library is part of the binary wheels; from source it is compiled on first use into the user's cache folder
(:mod:`monai_mamba.ops.cpu_library`). It runs without the interpreter lock on ``torch.get_num_threads()`` threads, and
its results do not depend on their number.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

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
            return _available(library, library.choose_variant(_variant))
        except cpu_library.LibraryError as error:
            return Availability(False, str(error))

    def refusal(self, call: Call) -> str | None:
        if call.op == "ss2d_scan" and call.groups > cpu_library.MAX_ROUTES:
            return f"it has at most {cpu_library.MAX_ROUTES} routes, got K={call.groups}"
        return super().refusal(call)

    def scan_forward(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, save_states):
        u, delta, B, C, z = _dense(u), _dense(delta), _dense(B), _dense(C), _dense(z)
        A, D, delta_bias = _parameter(A), _parameter(D), _parameter(delta_bias)
        y = _new(u)
        states = None
        if save_states:
            batch, length, channels = u.shape
            states = _new_states(batch, num_saved_states(length), channels, A.shape[1])
        _run("scan_forward", _sequence_job(u, delta, A, B, C, D, z, delta_bias, delta_softplus, states, y))
        return y, states

    def scan_backward(self, grad_y, states, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        if states is None:
            _, states = self.scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
        inputs = (u, delta, A, B, C, D, z, delta_bias)
        grad_y, u, delta, B, C, z = (_dense(t) for t in (grad_y, u, delta, B, C, z))
        A, D, delta_bias, states = (_parameter(t) for t in (A, D, delta_bias, states))
        grad_u, grad_delta, grad_z = (_new(t) for t in (u, delta, z))
        sums = tuple(_new(t, torch.float32) for t in (A, B, C, D, delta_bias))
        own = u.shape[2] // B.shape[2]
        gradients = (
            *(*_view(grad_y, own), *_view(grad_u, own), *_view(grad_delta, own)),
            *(_NO_VIEW if grad_z is None else _view(grad_z, own)),
            *_pointers_of_sums(*sums),
        )
        _run(
            "scan_backward",
            _sequence_job(u, delta, A, B, C, D, z, delta_bias, delta_softplus, states, None, gradients),
        )
        grad_A, grad_B, grad_C, grad_D, grad_bias = sums
        return _in_types_of(inputs, (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias))

    def ss2d_forward(self, x, delta, A, B, C, D, delta_bias, routes, delta_softplus, save_states):
        x, delta, B, C = _even(x), _even(delta), _even(B), _even(C)
        A, D, delta_bias = _parameter(A), _parameter(D), _parameter(delta_bias)
        # The routes are added up in the output, which therefore is float32 until the end.
        y = _new(x, torch.float32)
        states = None
        if save_states:
            batch, height, width, channels = x.shape
            states = _new_states(batch, num_saved_states(height * width), len(routes) * channels, A.shape[2])
        _run("scan_forward", _map_job(x, delta, A, B, C, D, delta_bias, routes, delta_softplus, states, y))
        return y.to(x.dtype), states

    def ss2d_backward(self, grad_y, states, x, delta, A, B, C, D, delta_bias, routes, delta_softplus):
        if states is None:
            _, states = self.ss2d_forward(x, delta, A, B, C, D, delta_bias, routes, delta_softplus, True)
        inputs = (x, delta, A, B, C, D, delta_bias)
        grad_y, x, delta, B, C = (_even(t) for t in (grad_y, x, delta, B, C))
        A, D, delta_bias, states = (_parameter(t) for t in (A, D, delta_bias, states))
        grad_x, grad_delta = _new(x, torch.float32), _new(delta)
        sums = tuple(_new(t, torch.float32) for t in (A, B, C, D, delta_bias))
        gradients = (
            *(*_map_view(grad_y), *_map_view(grad_x), *_map_view(grad_delta), *_NO_VIEW),
            *_pointers_of_sums(*sums),
        )
        _run(
            "scan_backward",
            _map_job(x, delta, A, B, C, D, delta_bias, routes, delta_softplus, states, None, gradients),
        )
        return _in_types_of(inputs, (grad_x, grad_delta, *sums))

    def conv_forward(self, x, weight, bias, silu):
        x, weight, bias = _dense(x), _parameter(weight), _parameter(bias)
        y = _new(x)
        _run("conv_forward", _conv_job(x, weight, bias, silu, y))
        return y

    def conv_backward(self, grad_y, x, weight, bias, silu):
        inputs = (x, weight, bias)
        grad_y, x, weight, bias = _dense(grad_y), _dense(x), _parameter(weight), _parameter(bias)
        gradients = (_new(x), _new(weight, torch.float32), _new(bias, torch.float32))
        _run("conv_backward", _conv_job(x, weight, bias, silu, None, grad_y, *gradients))
        return _in_types_of(inputs, gradients)


@functools.cache
def _available(library: cpu_library.Library, variant: int) -> Availability:
    name = next(name for name, i in library.variants.items() if i == variant)
    return Availability(True, f"instruction set {name}, {library.path}")


def _run(name: str, job: bytes) -> None:
    library = cpu_library.load()
    library.call(name, job, library.choose_variant(_variant), torch.get_num_threads())


# ---- arguments and results ----


def _dense(t: Tensor | None) -> Tensor | None:
    """Return ``t`` itself if its last axis is dense, as slices of the channels are; else a copy."""
    return t if t is None or t.is_contiguous() or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _even(t: Tensor) -> Tensor:
    """Return ``t`` ``(B, H, W, ...)`` itself if its pixels are as far apart along the whole map; else a copy."""
    if t.is_contiguous():
        return t
    strides, (_, height, width, *_) = t.stride(), t.shape
    is_even = height == 1 or width == 1 or strides[1] == width * strides[2]
    return t if is_even and (strides[-1] == 1 or t.shape[-1] == 1) else t.contiguous()


def _parameter(t: Tensor | None) -> Tensor | None:
    return t if t is None or (t.dtype is torch.float32 and t.is_contiguous()) else t.float().contiguous()


def _new(t: Tensor | None, dtype: torch.dtype | None = None) -> Any:
    """Return a dense array for a result of the shape of ``t``; None for None."""
    return None if t is None else torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def _new_states(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever torch.set_default_device says


def _in_types_of(inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(
        g if g is None or t is None or g.dtype == t.dtype else g.to(t.dtype)
        for g, t in zip(gradients, inputs, strict=True)
    )


# ---- jobs: the numbers of the structures in `cpu_library`, in order; the arrays must live until the job has run ----

_NO_VIEW = (0,) * 5
_NO_ROUTES = (0,) * cpu_library.MAX_ROUTES
_NO_GRADIENTS = (0,) * (4 * 5 + 5)


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _view(t: Tensor, channels: int) -> tuple[int, ...]:
    """View ``(B, L, D)`` with groups of ``channels``."""
    batch, step, _ = t.stride()
    return t.data_ptr(), batch, step, channels, _TYPES[t.dtype]


def _matrix_view(t: Tensor) -> tuple[int, ...]:
    """View ``(B, L, G, N)``."""
    batch, step, group, _ = t.stride()
    return t.data_ptr(), batch, step, group, _TYPES[t.dtype]


def _map_view(t: Tensor) -> tuple[int, ...]:
    """View ``(B, H, W, D)``, the same for all routes, or ``(B, H, W, K, D)`` with even pixels as ``(B, L, K, D)``."""
    batch, row, pixel, *rest = t.stride()
    return t.data_ptr(), batch, row if t.shape[2] == 1 else pixel, rest[0] if len(rest) == 2 else 0, _TYPES[t.dtype]


def _pointers_of_sums(grad_A, grad_B, grad_C, grad_D, grad_bias) -> tuple[int, ...]:
    return tuple(map(_pointer, (grad_A, grad_D, grad_bias, grad_B, grad_C)))


def _sequence_job(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, states, y, gradients: tuple[int, ...] = _NO_GRADIENTS
) -> bytes:
    batch, length, channels = u.shape
    groups, d_state = B.shape[2:]
    own = channels // groups
    return cpu_library.pack_scan_job(
        *(batch, length, groups, own, d_state, 1, length, delta_softplus, False),
        *_NO_ROUTES,
        *(*_view(u, own), *_view(delta, own), *_matrix_view(B), *_matrix_view(C)),
        *(_NO_VIEW if z is None else _view(z, own)),
        *(_NO_VIEW if y is None else _view(y, own)),
        *(_pointer(A), _pointer(D), _pointer(delta_bias), _pointer(states)),
        *gradients,
    )


def _map_job(
    x, delta, A, B, C, D, delta_bias, routes, delta_softplus, states, y, gradients: tuple[int, ...] = _NO_GRADIENTS
) -> bytes:
    batch, height, width, channels = x.shape
    return cpu_library.pack_scan_job(
        *(batch, height * width, len(routes), channels, A.shape[2], height, width, delta_softplus, True),
        *(cpu_library.ROUTE_CODES[route] for route in routes),
        *_NO_ROUTES[len(routes) :],
        *(*_map_view(x), *_map_view(delta), *_map_view(B), *_map_view(C), *_NO_VIEW),
        *(_NO_VIEW if y is None else _map_view(y)),
        *(_pointer(A), _pointer(D), _pointer(delta_bias), _pointer(states)),
        *gradients,
    )


def _conv_job(x, weight, bias, silu, y, grad_y=None, grad_x=None, grad_weight=None, grad_bias=None) -> bytes:
    batch, length, channels = x.shape
    return cpu_library.pack_conv_job(
        *(batch, length, channels, weight.shape[1], silu),
        *_view(x, channels),
        *(_NO_VIEW if y is None else _view(y, channels)),
        *(_pointer(weight), _pointer(bias)),
        *(_NO_VIEW if grad_y is None else _view(grad_y, channels)),
        *(_NO_VIEW if grad_x is None else _view(grad_x, channels)),
        *(_pointer(grad_weight), _pointer(grad_bias)),
    )
