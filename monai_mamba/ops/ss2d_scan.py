"""The scan of a feature map along several routes, summed at the pixels (cross-scan, scan, cross-merge)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_mamba.ops import backends, operators
from monai_mamba.ops.reference import ss2d_scan_reference, state_dtype
from monai_mamba.ops.routes import ROUTES
from monai_mamba.ops.selective_scan import _check_tensors, _full_precision, _saved


def ss2d_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    routes: Sequence[str] = ROUTES,
    delta_softplus: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Scan a feature map along K routes and sum the results at their pixels.

    Each route is a :func:`~monai_mamba.ops.selective_scan` with its own parameters over the same map. Everything is
    given per pixel, before the map is laid out as a sequence, so projections need not be repeated per route.

    Args:
        x: feature map, channels last.
        delta: step sizes of each route, before ``delta_bias`` and softplus.
        A: decay rates, negative for a stable recurrence.
        B: input matrix per pixel and route.
        C: output matrix per pixel and route; may come from another map than ``B``.
        D: skip connection per route and channel.
        delta_bias: added to ``delta``.
        routes: names out of :data:`ROUTES`, in the order of the parameters; any subset, none twice.
        delta_softplus: apply softplus to the step sizes.
        backend: name of the implementation to use; default the fastest that serves.

    Shape:
        x ``(B, H, W, D)``; delta ``(B, H, W, K, D)``; A ``(K, D, N)``; B, C ``(B, H, W, K, N)``; D, delta_bias
        ``(K, D)``. Returns ``(B, H, W, D)`` in the type of ``x``.

    Raises:
        TypeError: if an argument is not a dense floating-point tensor, or ``routes`` is no sequence of names.
        ValueError: if a route is unknown or named twice, or shapes, devices or precisions do not fit together.
        BackendError: if the backend asked for is not available or cannot serve the call.

    References:
        Liu et al., VMamba: Visual State Space Model, 2024, arXiv:2401.10166, section 4.2.
    """
    routes = _check_routes(routes)
    _check_tensors(x=x, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    _check_shapes(x, delta, A, B, C, D, delta_bias, len(routes))
    name = backends.requested_name(backend, "ss2d_scan")
    if backends.is_composite(name):
        return ss2d_scan_reference(x, delta, A, B, C, D, delta_bias, routes, delta_softplus)
    tensors = (x, delta, A, B, C, D, delta_bias)
    save_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, _ = _FORWARD(*tensors, ",".join(routes), delta_softplus, save_states, name)
    return y


def _check_routes(routes: Sequence[str]) -> tuple[str, ...]:
    known = ", ".join(map(repr, ROUTES))
    if isinstance(routes, str) or not isinstance(routes, Sequence):
        raise TypeError(
            f"`routes` must be a tuple or list of names out of {known}, got {routes!r}; write ('row',) for one"
        )
    routes = tuple(routes)
    if not routes:
        raise ValueError(f"`routes` must name at least one of {known}, got none")
    for route in routes:
        if route not in ROUTES:
            raise ValueError(f"`routes` must be out of {known}, got {route!r}")
    if len(set(routes)) != len(routes):
        raise ValueError(f"`routes` must not name a route twice, got {routes}")
    return routes


def _check_shapes(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    num_routes: int,
) -> None:
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"`x` must be a map (B, H, W, D) that is not empty, got {tuple(x.shape)}")
    batch, height, width, channels = x.shape
    if A.ndim != 3 or A.shape[:2] != (num_routes, channels) or A.shape[2] < 1:
        raise ValueError(
            f"`A` must have shape (K, D, N) with K={num_routes} routes, D={channels} and N >= 1, got {tuple(A.shape)}"
        )
    expected = {
        "delta": (delta, (batch, height, width, num_routes, channels)),
        "B": (B, (batch, height, width, num_routes, A.shape[2])),
        "C": (C, (batch, height, width, num_routes, A.shape[2])),
        "D": (D, (num_routes, channels)),
        "delta_bias": (delta_bias, (num_routes, channels)),
    }
    forms = {"delta": "(B, H, W, K, D)", "B": "(B, H, W, K, N)", "C": "(B, H, W, K, N)"}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"`{name}` must have shape {forms.get(name, '(K, D)')} = {shape} as `x` and `A` say, got "
                f"{tuple(tensor.shape)}"
            )


def _resolve(x: Tensor, A: Tensor, name: str) -> backends.Backend:
    batch, height, width, channels = x.shape
    num_routes, _, d_state = A.shape
    call = backends.Call("ss2d_scan", x.device.type, x.dtype, batch, height * width, channels, num_routes, d_state)
    return backends.resolve(call, name)


def _forward(x, delta, A, B, C, D, delta_bias, routes, delta_softplus, save_states, backend):
    implementation = _resolve(x, A, backend)
    with _full_precision(x):
        y, states = implementation.ss2d_forward(
            x, delta, A, B, C, D, delta_bias, tuple(routes.split(",")), delta_softplus, save_states
        )
    return y.contiguous(), x.new_empty((0,), dtype=state_dtype(x)) if states is None else states


def _fake_forward(x, delta, A, B, C, D, delta_bias, routes, delta_softplus, save_states, backend):
    y = x.new_empty(x.shape)
    if not save_states:
        return y, x.new_empty((0,), dtype=state_dtype(x))
    batch, height, width, channels = x.shape
    shape = (batch, backends.num_saved_states(height * width), A.shape[0] * channels, A.shape[2])
    return y, x.new_empty(shape, dtype=state_dtype(x))


def _backward(grad_y, states, x, delta, A, B, C, D, delta_bias, routes, delta_softplus, backend):
    implementation = _resolve(x, A, backend)
    with _full_precision(x):
        gradients = implementation.ss2d_backward(
            grad_y, _saved(states), x, delta, A, B, C, D, delta_bias, tuple(routes.split(",")), delta_softplus
        )
    return [g.contiguous() for g in gradients if g is not None]


def _fake_backward(grad_y, states, x, delta, A, B, C, D, delta_bias, routes, delta_softplus, backend):
    return [t.new_empty(t.shape) for t in (x, delta, A, B, C, D, delta_bias) if t is not None]


_INPUTS = (
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, str routes, "
    "bool delta_softplus"
)
_FORWARD = operators.define(
    "ss2d_scan_fwd", f"({_INPUTS}, bool save_states, str backend) -> (Tensor, Tensor)", _forward, _fake_forward
)
_BACKWARD = operators.define(
    "ss2d_scan_bwd",
    f"(Tensor grad_y, Tensor states, {_INPUTS}, str backend) -> Tensor[]",
    _backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.routes, ctx.delta_softplus, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_y, _grad_states):
    if grad_y is None:
        return (None,) * 11
    *tensors, states = ctx.saved_tensors
    found = iter(_BACKWARD(grad_y, states, *tensors, ctx.routes, ctx.delta_softplus, ctx.backend))
    return (*(None if t is None else next(found) for t in tensors), None, None, None, None)


operators.differentiate(_FORWARD, _setup_context, _gradients, "the scan of a map")
operators.refuse_derivatives(_BACKWARD, "the scan of a map")
