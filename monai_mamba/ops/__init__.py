"""Functions on tensors: the selective scan and what belongs to it, on interchangeable backends."""

from __future__ import annotations

from monai_mamba.ops.backends import get_backend, list_backends, register, use_backend
from monai_mamba.ops.causal_conv1d import causal_conv1d
from monai_mamba.ops.chunked import TorchBackend
from monai_mamba.ops.cpu import CpuBackend
from monai_mamba.ops.mamba_ssm_backend import MambaSsmBackend
from monai_mamba.ops.reference import ReferenceBackend
from monai_mamba.ops.selective_scan import selective_scan
from monai_mamba.ops.ss2d_scan import ss2d_scan
from monai_mamba.ops.triton_backend import TritonBackend

for _backend in (CpuBackend(), TritonBackend(), TorchBackend(), MambaSsmBackend(), ReferenceBackend()):
    register(_backend)

__all__ = ["causal_conv1d", "get_backend", "list_backends", "selective_scan", "ss2d_scan", "use_backend"]
