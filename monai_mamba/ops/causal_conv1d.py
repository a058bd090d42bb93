"""Causal depthwise convolution over a sequence, with optional SiLU, as Mamba uses it before the scan."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_mamba.ops import backends
from monai_mamba.ops.reference import causal_conv1d_reference
from monai_mamba.ops.selective_scan import _check_tensors, _full_precision


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    channels_last: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolve every channel with its own filter, looking back only.

    ``y[l] = sum_k weight[k] x[l - W + 1 + k] + bias``, values before the beginning are zero. Sums are float32
    (float64 for float64 input); the result has the type of ``x``.

    Args:
        x: input sequence.
        weight: one filter per channel; the last tap meets the current step.
        bias: added per channel.
        activation: None or ``"silu"``.
        channels_last: ``(B, L, D)`` instead of ``(B, D, L)``; the native layout, without a copy.
        backend: name of the implementation to use; default the fastest that serves.

    Shape:
        x ``(B, D, L)`` or, channels-last, ``(B, L, D)``; weight ``(D, W)``; bias ``(D,)``. Returns the shape of ``x``.

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: if shapes, devices, precisions or the activation do not fit.
        BackendError: if the backend asked for is not available or cannot serve the call.
    """
    _check_tensors(x=x, weight=weight, bias=bias)
    if activation not in (None, "silu"):
        raise ValueError(f"`activation` must be None or 'silu', got {activation!r}")
    if x.ndim != 3 or 0 in x.shape:
        form = "(B, L, D)" if channels_last else "(B, D, L)"
        raise ValueError(f"`x` must have shape {form} and not be empty, got {tuple(x.shape)}")
    if not channels_last:
        x = x.transpose(1, 2)  # (B, L, D)
    channels = x.shape[2]
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"`weight` must have shape (D, W) with D={channels} and W >= 1, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"`bias` must have shape (D,) with D={channels}, got {tuple(bias.shape)}")

    name = backends.requested_name(backend)
    silu = activation == "silu"
    if name and backends.get_backend(name).is_composite:
        y = causal_conv1d_reference(x, weight, bias, silu)
    else:
        y = torch.ops.monai_mamba.causal_conv1d_fwd(x, weight, bias, silu, name)
    return y if channels_last else y.transpose(1, 2)


def _resolve(x: Tensor, weight: Tensor, name: str) -> backends.Backend:
    call = backends.Call(
        op="causal_conv1d",
        device_type=x.device.type,
        dtype=x.dtype,
        batch=x.shape[0],
        length=x.shape[1],
        channels=x.shape[2],
        width=weight.shape[1],
    )
    return backends.resolve(call, name)


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, str backend"


@torch.library.custom_op("monai_mamba::causal_conv1d_fwd", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _causal_conv1d_fwd(x, weight, bias, silu, backend):
    with _full_precision(x):
        return _resolve(x, weight, backend).conv_forward(x, weight, bias, silu).contiguous()


@_causal_conv1d_fwd.register_fake
def _(x, weight, bias, silu, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "monai_mamba::causal_conv1d_bwd", mutates_args=(), schema=f"(Tensor grad_y, {_INPUTS}) -> Tensor[]"
)
def _causal_conv1d_bwd(grad_y, x, weight, bias, silu, backend):
    with _full_precision(x):
        gradients = _resolve(x, weight, backend).conv_backward(grad_y, x, weight, bias, silu)
    return [g.contiguous() for g in gradients if g is not None]


@_causal_conv1d_bwd.register_fake
def _(grad_y, x, weight, bias, silu, backend):
    return [t.new_empty(t.shape) for t in (x, weight, bias) if t is not None]


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad_y):
    x, weight, bias = ctx.saved_tensors
    gradients = torch.ops.monai_mamba.causal_conv1d_bwd(grad_y, x, weight, bias, ctx.silu, ctx.backend)
    grad_x, grad_weight = gradients[:2]
    return grad_x, grad_weight, None if bias is None else gradients[2], None, None


def _refuse_double_backward(ctx, *gradients):
    raise backends.BackendError(
        "the causal convolution has first derivatives only; for derivatives of derivatives call it with "
        "backend='reference'"
    )


_causal_conv1d_fwd.register_autograd(_backward, setup_context=_setup_context)
_causal_conv1d_bwd.register_autograd(_refuse_double_backward)
