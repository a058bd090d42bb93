"""Routes over a feature map: how its pixels are lined up for a scan."""

from __future__ import annotations

import torch
from torch import Tensor

#: The four routes of VMamba in the order of its parameters. ``row`` visits the pixels in the order ``h * W + w``,
#: ``column`` in the order ``w * H + h``; ``_reversed`` walks the same way backwards.
ROUTES = ("row", "column", "row_reversed", "column_reversed")


def to_sequence(x: Tensor, route: str) -> Tensor:
    """Lay out ``(B, H, W, ...)`` as the sequence ``(B, L, ...)`` that the route visits."""
    if route.startswith("column"):
        x = x.transpose(1, 2)
    x = x.flatten(1, 2)
    return x.flip(1) if route.endswith("reversed") else x


def from_sequence(y: Tensor, route: str, size: tuple[int, int]) -> Tensor:
    """Invert :func:`to_sequence` for a map of ``size`` ``(H, W)``."""
    height, width = size
    if route.endswith("reversed"):
        y = y.flip(1)
    if route.startswith("column"):
        return y.unflatten(1, (width, height)).transpose(1, 2)
    return y.unflatten(1, (height, width))


def stack_routes(x: Tensor, routes: tuple[str, ...]) -> Tensor:
    """Turn ``(B, H, W, K, E)``, one entry per route, into sequences ``(B, L, K, E)``."""
    return torch.stack([to_sequence(x[:, :, :, k], route) for k, route in enumerate(routes)], dim=2)


def unstack_routes(y: Tensor, routes: tuple[str, ...], size: tuple[int, int]) -> Tensor:
    """Invert :func:`stack_routes`."""
    return torch.stack([from_sequence(y[:, :, k], route, size) for k, route in enumerate(routes)], dim=3)


def repeat_routes(x: Tensor, routes: tuple[str, ...]) -> Tensor:
    """Line up the map ``(B, H, W, E)`` along every route (cross-scan): ``(B, L, K, E)``."""
    return torch.stack([to_sequence(x, route) for route in routes], dim=2)


def sum_routes(y: Tensor, routes: tuple[str, ...], size: tuple[int, int]) -> Tensor:
    """Sum the sequences ``(B, L, K, E)`` at their pixels (cross-merge): ``(B, H, W, E)``."""
    total = from_sequence(y[:, :, 0], routes[0], size)
    for k, route in enumerate(routes[1:], start=1):
        total = total + from_sequence(y[:, :, k], route, size)
    return total
