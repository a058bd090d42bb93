"""Backend ``mamba_ssm``: the CUDA kernel ``selective_scan_cuda`` of the package mamba-ssm, if it was built.

On request only: nothing shows yet that it is faster than the Triton kernels at the sizes of images and volumes
(``benchmarks/scan.py`` compares them where both run). Recent releases of mamba-ssm install without the kernel of the
first generation of Mamba, so the kernel itself is imported, never ``mamba_ssm``.
"""

from __future__ import annotations

import functools
import importlib
from importlib import metadata
from types import ModuleType

import torch
from torch import Tensor

from monai_mamba.ops.backends import UP_TO_FLOAT32, Availability, Backend
from monai_mamba.ops.device_check import check_on_cuda

_KERNEL = "selective_scan_cuda"
_BUILD = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation --force-reinstall --no-deps mamba-ssm"


class MambaSsmBackend(Backend):
    """The kernel of the authors of Mamba: float32 arithmetic for float32, bfloat16 and float16 tensors.

    Its layout is channels-first, so every call copies what it is given; its backward pass adds up the gradients of B
    and C with atomic additions, so they differ in the last bits from run to run. It keeps states every 2048 steps in a
    form of its own, hence its backward pass runs the forward pass again.
    """

    name = "mamba_ssm"
    priority = 0
    ops = frozenset({"selective_scan"})
    device_types = frozenset({"cuda"})
    dtypes = UP_TO_FLOAT32
    max_states = 256  # of its kernel
    keeps_states = False

    def availability(self) -> Availability:
        kernel, reason = load_kernel()
        if kernel is None:
            return Availability(False, reason)
        if not torch.cuda.is_available():
            return Availability(False, "PyTorch finds no CUDA device")
        return check_on_cuda(self)

    def scan_forward(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, save_states):
        arguments = _channels_first(u, delta, A, B, C, D, z, delta_bias)
        with torch.cuda.device_of(u):
            y, _, *gated = _kernel().fwd(*arguments, delta_softplus)
        return (y if z is None else gated[0]).transpose(1, 2).contiguous(), None

    def scan_backward(self, grad_y, states, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        arguments = _channels_first(u, delta, A, B, C, D, z, delta_bias)
        grad_y = grad_y.to(u.dtype).transpose(1, 2).contiguous()
        with torch.cuda.device_of(u):
            y, checkpoints, *_ = _kernel().fwd(*arguments, delta_softplus)
            # The two last but one: y before the gate, and no buffer for the gradient of z.
            found = _kernel().bwd(*arguments, grad_y, checkpoints, y, None, delta_softplus, False)
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, *grad_z = found
        last = (g.transpose(1, 2) for g in (grad_u, grad_delta))
        matrices = (g.permute(0, 3, 1, 2) for g in (grad_B, grad_C))  # (B, L, G, N)
        gradients = (
            *last,
            grad_A,
            *matrices,
            grad_D,
            grad_z[0].transpose(1, 2) if grad_z else None,
            grad_bias,
        )
        tensors = (u, delta, A, B, C, D, z, delta_bias)
        return tuple(None if t is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True))


@functools.cache
def load_kernel() -> tuple[ModuleType | None, str]:
    """Import the kernel; return it, or None with what is missing and how to get it."""
    try:
        return importlib.import_module(_KERNEL), "the kernel is there"
    except ModuleNotFoundError as error:
        if error.name != _KERNEL:
            return None, f"{_KERNEL} needs the module {error.name}, which is not installed"
        try:
            version = metadata.version("mamba-ssm")
        except metadata.PackageNotFoundError:
            return None, "the package mamba-ssm is not installed"
        return None, f"mamba-ssm {version} is installed without the kernel {_KERNEL}; build it: {_BUILD}"
    except (ImportError, OSError) as error:  # a kernel built for another version of torch or CUDA
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return None, f"{_KERNEL} cannot be loaded ({first}); build it for this torch {torch.__version__}: {_BUILD}"


def _kernel() -> ModuleType:
    kernel, reason = load_kernel()
    assert kernel is not None, reason  # the registry asks for availability first
    return kernel


def _channels_first(u, delta, A, B, C, D, z, delta_bias) -> tuple[Tensor | None, ...]:
    """The arguments as the kernel wants them.

    Shape:
        u, delta, z ``(B, D, L)``, B and C ``(B, G, N, L)`` in one type; A ``(D, N)``, D, delta_bias ``(D,)`` float32.
    """

    def sequence(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(u.dtype).transpose(1, 2).contiguous()

    def parameter(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.float().contiguous()

    B, C = (m.to(u.dtype).permute(0, 2, 3, 1).contiguous() for m in (B, C))
    return (
        *(sequence(u), sequence(delta), parameter(A), B, C),
        *(parameter(D), sequence(z), parameter(delta_bias)),
    )
