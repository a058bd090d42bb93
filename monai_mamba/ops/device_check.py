"""What a backend for GPUs must show before it is chosen: the right numbers on this device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from monai_mamba.ops.backends import Availability, Backend
from monai_mamba.ops.chunked import TorchBackend

_TOLERANCE = 1e-4  # of the largest value; a kernel that computes wrongly is off by far more


@functools.cache
def check_on_cuda(backend: Backend) -> Availability:
    """Run the scan and, where the backend has it, the convolution once on the current device against PyTorch.

    A compiler, a driver or a kernel built for another device that computes wrongly is a reason not to use it, not an
    error. The answer is kept for the process.
    """
    try:
        found, expected = (_results(b, "causal_conv1d" in backend.ops) for b in (backend, TorchBackend()))
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
    except Exception as error:  # whatever a compiler, a driver or a device throws
        return Availability(
            False, f"its self-check failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        )
    if not worst <= _TOLERANCE:
        return Availability(False, f"its self-check is off by {worst:.1e} of the maximum")
    return Availability(True, f"self-check passed, error {worst:.0e}")


def _results(backend: Backend, with_convolution: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).cuda()

    values: Any = [draw(1, 200, 40), draw(1, 200, 40), -draw(40, 16).abs(), draw(1, 200, 2, 16), draw(1, 200, 2, 16)]
    values += [draw(40), draw(1, 200, 40), draw(40) - 2]
    grad_y = draw(1, 200, 40)
    y, states = backend.scan_forward(*[*values, True, True])
    results: list[Any] = [y, *backend.scan_backward(*[grad_y, states, *values, True])]
    if with_convolution:
        x, weight, bias = values[0], draw(40, 4), values[5]
        results += [backend.conv_forward(x, weight, bias, True)]
        results += backend.conv_backward(grad_y, x, weight, bias, True)
    return results
