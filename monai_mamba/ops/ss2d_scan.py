"""The scan of a feature map along several routes, summed at the pixels (cross-scan, scan, cross-merge)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_mamba.ops.reference import state_dtype
from monai_mamba.ops.selective_scan import selective_scan

#: The four routes of VMamba in the order of its parameters. ``row`` visits the pixels in the order ``h * W + w``,
#: ``column`` in the order ``w * H + h``; ``_reversed`` walks the same way backwards.
ROUTES = ("row", "column", "row_reversed", "column_reversed")


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
        TypeError: if an argument is not a floating-point tensor.
        ValueError: if a route is unknown or named twice, or shapes, devices or precisions do not fit together.

    References:
        Liu et al., VMamba: Visual State Space Model, 2024, arXiv:2401.10166, section 4.2.
    """
    routes = tuple(routes)
    _check_routes(routes)
    _check_shapes(x, delta, A, B, C, D, delta_bias, len(routes))
    size, channels = (x.shape[1], x.shape[2]), x.shape[3]
    u = torch.cat([_to_sequence(x, route) for route in routes], dim=-1)  # (B, L, K * D)
    y = selective_scan(
        u,
        torch.cat([_to_sequence(delta[:, :, :, k], route) for k, route in enumerate(routes)], dim=-1),
        A.flatten(0, 1),
        torch.stack([_to_sequence(B[:, :, :, k], route) for k, route in enumerate(routes)], dim=2),  # (B, L, K, N)
        torch.stack([_to_sequence(C[:, :, :, k], route) for k, route in enumerate(routes)], dim=2),
        None if D is None else D.flatten(),
        None,
        None if delta_bias is None else delta_bias.flatten(),
        delta_softplus,
        channels_last=True,
        backend=backend,
    ).to(state_dtype(x))
    total = _from_sequence(y[..., :channels], routes[0], size)
    for k, route in enumerate(routes[1:], start=1):
        total = total + _from_sequence(y[..., k * channels : (k + 1) * channels], route, size)
    return total.to(x.dtype)


def _to_sequence(x: Tensor, route: str) -> Tensor:
    """Lay out ``(B, H, W, E)`` as the sequence ``(B, L, E)`` that the route visits."""
    if route.startswith("column"):
        x = x.transpose(1, 2)
    x = x.flatten(1, 2)
    return x.flip(1) if route.endswith("reversed") else x


def _from_sequence(y: Tensor, route: str, size: tuple[int, int]) -> Tensor:
    """Invert :func:`_to_sequence`."""
    height, width = size
    if route.endswith("reversed"):
        y = y.flip(1)
    if route.startswith("column"):
        return y.unflatten(1, (width, height)).transpose(1, 2)
    return y.unflatten(1, (height, width))


def _check_routes(routes: tuple[str, ...]) -> None:
    known = ", ".join(map(repr, ROUTES))
    if not routes:
        raise ValueError(f"`routes` must name at least one of {known}, got none")
    for route in routes:
        if route not in ROUTES:
            raise ValueError(f"`routes` must be out of {known}, got {route!r}")
    if len(set(routes)) != len(routes):
        raise ValueError(f"`routes` must not name a route twice, got {routes}")


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
