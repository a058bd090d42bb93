"""The definitions: short sequential forms, the oracle of every other implementation.

They are plain differentiable PyTorch operations, work in any floating type and keep one state per step for autograd:
right, slow and large.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_mamba.ops.backends import Backend
from monai_mamba.ops.routes import ROUTES, repeat_routes, stack_routes, sum_routes


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Scan step by step: ``h = exp(delta A) h + delta B u``, ``y = <C, h> + D u``, gated by ``silu(z)``.

    Shape:
        Channels-last: ``u``, ``delta``, ``z`` ``(B, L, D)``, ``A`` ``(D, N)``, ``B``, ``C`` ``(B, L, G, N)``, ``D``,
        ``delta_bias`` ``(D,)``. Returns ``(B, L, D)`` in the type of ``u``.
    References:
        Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, arXiv:2312.00752, section 3.
    """
    dtype = state_dtype(u)
    u_, delta_, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta_ = delta_ + delta_bias.to(dtype)
    if delta_softplus:
        delta_ = F.softplus(delta_)
    channels_per_group = u.shape[2] // B.shape[2]
    h = torch.zeros(u.shape[0], u.shape[2], A.shape[1], dtype=dtype, device=u.device)
    outputs = []
    for step in range(u.shape[1]):
        B_step = B[:, step].repeat_interleave(channels_per_group, dim=1)  # (B, D, N)
        C_step = C[:, step].repeat_interleave(channels_per_group, dim=1)  # (B, D, N)
        delta_step = delta_[:, step, :, None]  # (B, D, 1)
        h = torch.exp(delta_step * A) * h + delta_step * B_step * u_[:, step, :, None]
        outputs.append((h * C_step).sum(-1))
    y = torch.stack(outputs, dim=1)  # (B, L, D)
    if D is not None:
        y = y + D.to(dtype) * u_
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)


def ss2d_scan_reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    routes: tuple[str, ...] = ROUTES,
    delta_softplus: bool = True,
) -> Tensor:
    """Scan a map along every route and sum at the pixels: cross-scan, one group per route, cross-merge.

    Shape:
        ``x`` ``(B, H, W, D)``, ``delta`` ``(B, H, W, K, D)``, ``A`` ``(K, D, N)``, ``B``, ``C`` ``(B, H, W, K, N)``,
        ``D``, ``delta_bias`` ``(K, D)``. Returns ``(B, H, W, D)`` in the type of ``x``.
    References:
        Liu et al., VMamba: Visual State Space Model, 2024, arXiv:2401.10166, section 4.2.
    """
    y = selective_scan_reference(
        repeat_routes(x.to(state_dtype(x)), routes).flatten(2),
        stack_routes(delta, routes).flatten(2),
        A.flatten(0, 1),
        stack_routes(B, routes),
        stack_routes(C, routes),
        None if D is None else D.flatten(),
        None,
        None if delta_bias is None else delta_bias.flatten(),
        delta_softplus,
    )
    return sum_routes(y.unflatten(2, (len(routes), -1)), routes, (x.shape[1], x.shape[2])).to(x.dtype)


def causal_conv1d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False) -> Tensor:
    """Convolve each channel with its own filter, looking back only: ``y[l] = sum_k w[k] x[l - W + 1 + k]``.

    Shape:
        ``x`` ``(B, L, D)``, ``weight`` ``(D, W)``, ``bias`` ``(D,)``. Returns ``(B, L, D)`` in the type of ``x``.
    """
    dtype = state_dtype(x)
    length, width = x.shape[1], weight.shape[1]
    padded = F.pad(x.to(dtype), (0, 0, width - 1, 0))
    y = sum(padded[:, k : k + length] * weight[:, k].to(dtype) for k in range(width))
    assert isinstance(y, Tensor)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype)


def state_dtype(u: Tensor) -> torch.dtype:
    """Type in which state and sums are kept: float64 for float64 input, else float32 whatever autocast says."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


class ReferenceBackend(Backend):
    """The sequential definitions, for tests and for higher derivatives."""

    name = "reference"
    priority = 0
    ops = frozenset({"selective_scan", "ss2d_scan", "causal_conv1d"})
    is_composite = True
