"""The Mamba mixer: projections, causal convolution and selective scan over one sequence."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_mamba.ops import causal_conv1d, selective_scan


class MambaMixer(nn.Module):
    """Mix the tokens of a sequence with a selective state space model (first generation of Mamba).

    Parameter names, shapes and initialisation are those of ``mamba_ssm.Mamba``, so its weights load as they are.

    Args:
        d_model: channels of the tokens.
        d_state: states per inner channel.
        d_conv: taps of the causal convolution.
        expand: the inner width is ``expand * d_model``.
        dt_rank: rank of the step size projection; None for ``ceil(d_model / 16)``.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.

    Shape:
        ``(B, L, d_model)``, channels last. Returns the same shape.

    Raises:
        ValueError: if a size is smaller than 1.

    References:
        Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, arXiv:2312.00752, figure 3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.d_model = d_model
        self.d_state = d_state
        self.d_inner = expand * d_model
        self.dt_rank = dt_rank or math.ceil(d_model / 16)
        # Registered first, as in mamba_ssm: state dicts list the two before the projections.
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self._initialize(dt_min, dt_max)

    def _initialize(self, dt_min: float, dt_max: float) -> None:
        with torch.no_grad():
            self.A_log.copy_(torch.log(torch.arange(1, self.d_state + 1, dtype=torch.float32)))
            self.D.fill_(1.0)
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            step_size = torch.exp(torch.empty(self.d_inner).uniform_(math.log(dt_min), math.log(dt_max)))
            step_size.clamp_(min=1e-4)
            # Inverse of the softplus, so that the initial step sizes lie between dt_min and dt_max.
            self.dt_proj.bias.copy_(step_size + torch.log(-torch.expm1(-step_size)))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not decay: decay rates, skip and step size bias."""
        return {"A_log", "D", "dt_proj.bias"}

    def forward(self, x: Tensor) -> Tensor:
        inner, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, d_inner) each
        inner = causal_conv1d(inner, self.conv1d.weight[:, 0], self.conv1d.bias, "silu", channels_last=True)
        dt, B, C = self.x_proj(inner).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.linear(dt, self.dt_proj.weight)  # (B, L, d_inner); the bias is added in float32 inside the scan
        y = selective_scan(
            inner,
            delta,
            -torch.exp(self.A_log.float() if self.A_log.dtype != torch.float64 else self.A_log),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            channels_last=True,
        )
        return self.out_proj(y)
