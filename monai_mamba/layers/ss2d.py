"""The two-dimensional selective scan as a layer (SS2D of VMamba), and its parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_mamba.ops import ss2d_scan
from monai_mamba.ops.ss2d_scan import ROUTES


class RouteScan(nn.Module):
    """Parameters of K selective scans over maps with ``d_inner`` channels, and what computes their inputs.

    Base of the layers that scan maps. Names, shapes and order are VMamba's: ``x_proj_weight`` ``(K, R + 2 N, D)`` with
    the rows dt, B, C; ``dt_projs_weight`` ``(K, D, R)``; ``dt_projs_bias`` ``(K, D)``; ``A_logs`` ``(K * D, N)`` and
    ``Ds`` ``(K * D,)`` with the route as the slower index.

    Args:
        d_inner: channels D of the maps.
        dt_rank: rank R of the step size projection.
        d_state: states N per channel.
        num_routes: number of scans K.
        with_scan: False registers nothing (the ``mixer="none"`` ablation).
    """

    def __init__(self, d_inner: int, dt_rank: int, d_state: int, num_routes: int, with_scan: bool = True) -> None:
        super().__init__()
        for name, value in (("d_inner", d_inner), ("dt_rank", dt_rank), ("d_state", d_state)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.d_inner = d_inner
        self.dt_rank = dt_rank
        self.d_state = d_state
        self.num_routes = num_routes
        self.with_scan = with_scan
        if with_scan:
            self.x_proj_weight = nn.Parameter(torch.empty(num_routes, dt_rank + 2 * d_state, d_inner))
            self.dt_projs_weight = nn.Parameter(torch.empty(num_routes, d_inner, dt_rank))
            self.dt_projs_bias = nn.Parameter(torch.empty(num_routes, d_inner))
            self.A_logs = nn.Parameter(torch.empty(num_routes * d_inner, d_state))
            self.Ds = nn.Parameter(torch.empty(num_routes * d_inner))
            self._reset_scan_parameters()

    def _reset_scan_parameters(self, dt_min: float = 1e-3, dt_max: float = 1e-1) -> None:
        with torch.no_grad():
            # What nn.Linear does to each of the K stacked matrices.
            self.x_proj_weight.uniform_(-(self.d_inner**-0.5), self.d_inner**-0.5)
            self.dt_projs_weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            step_size = torch.exp(torch.empty_like(self.dt_projs_bias).uniform_(math.log(dt_min), math.log(dt_max)))
            step_size.clamp_(min=1e-4)
            # Inverse of the softplus, so that the initial step sizes lie between dt_min and dt_max.
            self.dt_projs_bias.copy_(step_size + torch.log(-torch.expm1(-step_size)))
            self.A_logs.copy_(torch.log(torch.arange(1, self.d_state + 1, dtype=torch.float32)))
            self.Ds.fill_(1.0)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not decay: decay rates, skip and step size bias."""
        return {"A_logs", "Ds", "dt_projs_bias"} if self.with_scan else set()

    def decay_rates(self) -> Tensor:
        """``A = -exp(A_logs)`` in float32 (float64 for float64 parameters), ``(K, D, N)``."""
        logs = self.A_logs if self.A_logs.dtype == torch.float64 else self.A_logs.float()
        return -torch.exp(logs).unflatten(0, (self.num_routes, -1))

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute step sizes and input and output matrices of all routes with one product over the unpermuted map.

        Shape:
            ``(B, H, W, D)`` to delta ``(B, H, W, K, D)``, B and C ``(B, H, W, K, N)``.
        """
        return self.split_projection(F.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (self.num_routes, -1)))

    def split_projection(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``(..., K, R + 2 N)`` into step sizes ``(..., K, D)``, B and C ``(..., K, N)``."""
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return torch.einsum("...kr,kdr->...kd", dt, self.dt_projs_weight), B, C


class SS2D(RouteScan):
    """Mix the pixels of a map with selective scans along several routes.

    Projection to the inner width, depthwise convolution with SiLU, the scans, layer normalisation of their sum, an
    optional gate ``silu(z)``, projection back.

    Args:
        d_model: channels of the map.
        d_state: states per inner channel.
        ssm_ratio: the inner width is ``ssm_ratio * d_model``.
        dt_rank: rank of the step size projection; None for ``ceil(d_model / 16)``.
        d_conv: width of the depthwise convolution, odd.
        conv_bias: whether that convolution has a bias.
        gate: multiply by a gate (VMamba v0, MedMamba) or not (VMamba v2).
        routes: routes of the scans, see :func:`monai_mamba.ops.ss2d_scan`.
        mixer: ``"none"`` leaves the scans out and keeps the rest, to measure what the scans are worth.

    Shape:
        ``(B, H, W, d_model)``, channels last. Returns the same shape.

    Raises:
        ValueError: if an argument is out of its range.

    References:
        Liu et al., VMamba: Visual State Space Model, 2024, arXiv:2401.10166, section 4.2 and figure 3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | None = None,
        d_conv: int = 3,
        conv_bias: bool = True,
        gate: bool = True,
        routes: Sequence[str] = ROUTES,
        mixer: str = "mamba",
    ) -> None:
        if d_conv < 1 or d_conv % 2 == 0:
            raise ValueError(f"`d_conv` must be odd to keep the size of the map, got {d_conv}")
        check_mixer(mixer)
        d_inner = int(ssm_ratio * d_model)
        super().__init__(d_inner, dt_rank or math.ceil(d_model / 16), d_state, len(routes), mixer == "mamba")
        self.d_model = d_model
        self.gate = gate
        self.routes = tuple(routes)
        self.in_proj = nn.Linear(d_model, 2 * d_inner if gate else d_inner, bias=False)
        self.conv2d = nn.Conv2d(d_inner, d_inner, d_conv, padding=d_conv // 2, groups=d_inner, bias=conv_bias)
        self.out_norm = nn.LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.in_proj(x)  # (B, H, W, d_inner or 2 * d_inner)
        z = None
        if self.gate:
            inner, z = inner.chunk(2, dim=-1)
        u = F.silu(depthwise(self.conv2d, inner))
        y = self.out_norm(self.scan(u) if self.with_scan else u)
        if z is not None:
            y = y * F.silu(z)
        return self.out_proj(y)

    def scan(self, u: Tensor) -> Tensor:
        """Sum of the scans of ``u`` ``(B, H, W, d_inner)`` along all routes, same shape."""
        delta, B, C = self.project(u)
        D = self.Ds.unflatten(0, (self.num_routes, -1))
        return ss2d_scan(u, delta, self.decay_rates(), B, C, D, self.dt_projs_bias, routes=self.routes)


def depthwise(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution to a channels-last map; the permuted view is torch's channels-last format, not a copy."""
    return convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def check_mixer(mixer: str) -> None:
    """Raise ``ValueError`` unless ``mixer`` is ``"mamba"`` or ``"none"``."""
    if mixer not in ("mamba", "none"):
        raise ValueError(f"`mixer` must be one of 'mamba', 'none', got {mixer!r}")


def scan_parameters_without_decay(network: nn.Module) -> set[str]:
    """Names of the decay rates, skips and step size biases of all scans of a network."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if isinstance(module, RouteScan)
        for name in module.no_weight_decay()
    }
