"""Registry of the implementations ("backends") that compute the scan and the causal convolution.

A backend is one file of this package with one subclass of :class:`Backend`, registered in ``ops/__init__.py``. The
choice for a call is, in this order: the ``backend`` argument, :func:`use_backend`, the environment variable
``MONAI_MAMBA_BACKEND``, and otherwise the available backend of highest priority that serves the call. The context and
the variable speak for the operators that their backend has, so that a network can run its scans on one that has no
convolution. A backend that was asked for by name and cannot serve raises :class:`~monai_mamba.errors.BackendError` with
the reason; a slow automatic choice is announced once with the way to the fast one.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monai_mamba.errors import BackendError
from monai_mamba.ops.routes import repeat_routes, stack_routes, sum_routes, unstack_routes

ENVIRONMENT_VARIABLE = "MONAI_MAMBA_BACKEND"

#: Types that a kernel with float32 arithmetic takes.
UP_TO_FLOAT32 = frozenset({torch.float32, torch.bfloat16, torch.float16})

#: A forward pass keeps the hidden state before every step whose index is a multiple of this, but the first.
STATE_INTERVAL = 64


def num_saved_states(length: int) -> int:
    """Return how many states of one channel a forward pass keeps; up to 64 steps need none."""
    return (length - 1) // STATE_INTERVAL


class Call(NamedTuple):
    """What a backend is asked to serve; everything here is known without looking at the data.

    Attributes:
        op: ``"selective_scan"``, ``"ss2d_scan"`` or ``"causal_conv1d"``.
        device_type: ``"cpu"``, ``"cuda"``, ...
        dtype: type of the main input.
        batch, length, channels: sizes of the main input, ``(B, L, D)``; the pixels of a map are its length.
        groups, d_state: number of groups (routes of a map) and of states of the scan; 1 and 0 for the convolution.
        width: taps of the convolution; 0 for the scan.
    """

    op: str
    device_type: str
    dtype: torch.dtype
    batch: int
    length: int
    channels: int
    groups: int = 1
    d_state: int = 0
    width: int = 0


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used here at all, and why (not)."""

    ok: bool
    reason: str


class Backend:
    """One implementation of the operators, all in the native channels-last layout.

    A subclass sets the class attributes and implements the kernels of the operators named in ``ops``. Results must be
    new tensors, no arguments or views of them.

    Attributes:
        name: what users write.
        priority: the highest one that serves a call is chosen; 0 means "only when asked for by name".
        ops: names of the operators it implements.
        device_types: device types it serves; empty means all.
        dtypes: types of the main input it takes; empty means all.
        max_states, max_taps: the most states of a scan and taps of a convolution it serves; 0 means any number.
        is_fallback: chosen automatically only for want of something faster, so the choice is announced.
        keeps_states: whether its forward pass returns the states when asked; if not, its backward starts over.
        is_composite: made of differentiable PyTorch operations and called outside the custom operator, which gives
            it double backward and ``vmap``.
    """

    name: str
    priority: int
    ops: frozenset[str]
    device_types: frozenset[str] = frozenset()
    dtypes: frozenset[torch.dtype] = frozenset()
    max_states: int = 0
    max_taps: int = 0
    is_fallback: bool = False
    keeps_states: bool = True
    is_composite: bool = False

    def availability(self) -> Availability:
        """Tell whether the backend works on this machine, with a reason either way."""
        return Availability(True, "always available")

    def refusal(self, call: Call) -> str | None:
        """Return why this backend cannot serve ``call``, or None if it can."""
        if self.dtypes and call.dtype not in self.dtypes:
            return f"it computes in float32, got {str(call.dtype)[6:]}"
        if self.max_states and call.d_state > self.max_states:
            return f"it has at most {self.max_states} states, got N={call.d_state}"
        if self.max_taps and call.width > self.max_taps:
            return f"it has at most {self.max_taps} taps, got W={call.width}"
        return None

    def scan_forward(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        save_states: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the output ``(B, L, D)`` in the type of ``u`` and, if asked, the states.

        The states are those before the steps 64, 128, ...: ``(B, ceil(L / 64) - 1, D, N)``, float32 or float64.
        """
        raise BackendError(f"backend {self.name!r} has no selective scan")

    def scan_backward(
        self,
        grad_y: Tensor,
        states: Tensor | None,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients of ``u, delta, A, B, C, D, z, delta_bias``, None where the argument is None.

        ``states`` may be None: then they are computed again.
        """
        raise BackendError(f"backend {self.name!r} has no selective scan")

    def ss2d_forward(
        self,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        routes: tuple[str, ...],
        delta_softplus: bool,
        save_states: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the sum over the routes ``(B, H, W, D)`` and, if asked, the states of :meth:`scan_forward`.

        The states are those of the scan with one group per route: ``(B, ceil(L / 64) - 1, K * D, N)``. By default the
        routes are laid out as sequences for :meth:`scan_forward`; a backend with a fused kernel overrides this.
        """
        # The routes are added up in the type of the state.
        u = repeat_routes(x.to(torch.promote_types(x.dtype, torch.float32)), routes).flatten(2)
        y, states = self.scan_forward(
            u,
            **_sequences(delta, A, B, C, D, delta_bias, routes),
            delta_softplus=delta_softplus,
            save_states=save_states,
        )
        total = sum_routes(y.unflatten(2, (len(routes), -1)), routes, (x.shape[1], x.shape[2]))
        return total.to(x.dtype), states

    def ss2d_backward(
        self,
        grad_y: Tensor,
        states: Tensor | None,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        routes: tuple[str, ...],
        delta_softplus: bool,
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients of ``x, delta, A, B, C, D, delta_bias``, None where the argument is None."""
        size, dtype = (x.shape[1], x.shape[2]), torch.promote_types(x.dtype, torch.float32)
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, _, grad_bias = self.scan_backward(
            repeat_routes(grad_y.to(dtype), routes).flatten(2),
            states,
            repeat_routes(x.to(dtype), routes).flatten(2),
            **_sequences(delta, A, B, C, D, delta_bias, routes),
            delta_softplus=delta_softplus,
        )
        assert grad_u is not None and grad_delta is not None and grad_A is not None
        assert grad_B is not None and grad_C is not None
        per_route = (len(routes), -1)
        return (
            sum_routes(grad_u.unflatten(2, per_route), routes, size).to(x.dtype),
            unstack_routes(grad_delta.unflatten(2, per_route), routes, size),
            grad_A.unflatten(0, per_route),
            unstack_routes(grad_B, routes, size),
            unstack_routes(grad_C, routes, size),
            None if grad_D is None else grad_D.unflatten(0, per_route),
            None if grad_bias is None else grad_bias.unflatten(0, per_route),
        )

    def conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        """Compute the causal depthwise convolution of ``x`` ``(B, L, D)`` with ``weight`` ``(D, W)``."""
        raise BackendError(f"backend {self.name!r} has no causal convolution")

    def conv_backward(
        self, grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the gradients of ``x``, ``weight`` and ``bias``."""
        raise BackendError(f"backend {self.name!r} has no causal convolution")


def _sequences(
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    routes: tuple[str, ...],
) -> dict[str, Any]:
    """Lay out the arguments of a map after ``x`` as those of a sequence after ``u``, one group per route."""
    return {
        "delta": stack_routes(delta, routes).flatten(2),
        "A": A.flatten(0, 1),
        "B": stack_routes(B, routes),
        "C": stack_routes(C, routes),
        "D": None if D is None else D.flatten(),
        "z": None,
        "delta_bias": None if delta_bias is None else delta_bias.flatten(),
    }


_REGISTRY: dict[str, Backend] = {}  # the preferred ones first
_forced: str = ""
_announced: set[tuple[str, str, str]] = set()


def register(backend: Backend) -> Backend:
    """Add a backend; its name must be new."""
    if backend.name in _REGISTRY:
        raise ValueError(f"`backend` {backend.name!r} is registered already; names are unique")
    ordered = sorted((*_REGISTRY.values(), backend), key=lambda b: -b.priority)
    _REGISTRY.clear()
    _REGISTRY.update((b.name, b) for b in ordered)
    return backend


def list_backends() -> list[Backend]:
    """Return all registered backends, the preferred ones first."""
    return list(_REGISTRY.values())


def get_backend(name: str) -> Backend:
    """Return the backend of that name.

    Raises:
        BackendError: if there is none.
    """
    return _get_backend(name, "`backend`")


def _get_backend(name: str, asked_by: str) -> Backend:
    try:
        return _REGISTRY[name]
    except KeyError:
        known = ", ".join(sorted(_REGISTRY))
        raise BackendError(f"{asked_by} {name!r} is unknown; use one of: {known}") from None


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend for all calls of its operators within the ``with`` block, in all threads of the process.

    Args:
        name: name of a backend, or None to return to the automatic choice.

    Raises:
        BackendError: if the name is unknown or the backend is not available here.
    """
    global _forced
    if name:
        _require_available(get_backend(name))
    previous, _forced = _forced, name or ""
    try:
        yield
    finally:
        _forced = previous


def requested_name(argument: str | None, op: str) -> str:
    """Return the name a call of ``op`` is bound to by its argument or by :func:`use_backend`; empty if by neither."""
    return argument or (_forced if _forced and op in get_backend(_forced).ops else "")


def is_composite(requested: str) -> bool:
    """Whether a call is bound, by ``requested`` or the environment variable, to a backend outside of the operators.

    Raises:
        BackendError: if the requested backend is unknown.
    """
    if requested:
        return get_backend(requested).is_composite
    name = os.environ.get(ENVIRONMENT_VARIABLE, "")
    return name in _REGISTRY and _REGISTRY[name].is_composite


def keeps_states(requested: str) -> bool:
    """Whether the forward pass returns states; all backends do that are chosen without being asked for by name."""
    name = requested or os.environ.get(ENVIRONMENT_VARIABLE, "")
    return name not in _REGISTRY or _REGISTRY[name].keeps_states


def resolve(call: Call, requested: str = "") -> Backend:
    """Choose the backend for a call.

    Args:
        call: what is to be computed.
        requested: name that must be used; empty for that of the environment variable, if it has the operator, or the
            automatic choice.

    Raises:
        BackendError: if the requested backend is unknown, unavailable or cannot serve the call.
    """
    asked_by = "`backend`"
    if not requested:
        asked_by, name = ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE, "")
        requested = name if name not in _REGISTRY or call.op in _REGISTRY[name].ops else ""
    if requested:
        backend = _get_backend(requested, asked_by)
        _require_available(backend)
        reason = _refusal(backend, call)
        if reason:
            raise BackendError(
                f"backend {requested!r} was asked for by {asked_by} but cannot serve this {call.op}: {reason}"
            )
        return backend
    rejected: list[str] = []
    for backend in _REGISTRY.values():
        if backend.priority <= 0 or call.op not in backend.ops:
            continue
        if backend.device_types and call.device_type not in backend.device_types:
            continue
        availability = backend.availability()
        reason = backend.refusal(call) if availability.ok else availability.reason
        if reason is None:
            if backend.is_fallback and rejected:
                _announce(call, backend, rejected)
            return backend
        rejected.append(f"{backend.name}: {reason}")
    raise BackendError(f"no backend serves {call.op} on {call.device_type}: " + "; ".join(rejected))


def _require_available(backend: Backend) -> None:
    availability = backend.availability()
    if not availability.ok:
        raise BackendError(f"backend {backend.name!r} is not available here: {availability.reason}")


def _refusal(backend: Backend, call: Call) -> str | None:
    if call.op not in backend.ops:
        return f"it has no {call.op}"
    if backend.device_types and call.device_type not in backend.device_types:
        served = ", ".join(sorted(backend.device_types))
        return f"it serves {served} tensors, got {call.device_type}"
    return backend.refusal(call)


def _announce(call: Call, backend: Backend, rejected: list[str]) -> None:
    # One warning per operator, device and set of reasons: a second reason is news, a second call is not.
    key = (call.op, call.device_type, "; ".join(rejected))
    if key in _announced:
        return
    _announced.add(key)
    warnings.warn(
        f"{call.op} on {call.device_type} runs on the slower backend {backend.name!r}, because "
        f"{'; '.join(rejected)}. `monai-mamba doctor` shows what is missing; "
        f"{ENVIRONMENT_VARIABLE}={backend.name} keeps this choice without a warning.",
        stacklevel=2,
    )
