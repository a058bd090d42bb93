"""Causal depthwise convolution over a sequence, with optional SiLU, as Mamba uses it before the scan."""

from __future__ import annotations

from torch import Tensor

from monai_mamba.ops import backends, operators
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
        TypeError: if an argument is not a dense floating-point tensor.
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

    name = backends.requested_name(backend, "causal_conv1d")
    silu = activation == "silu"
    if backends.is_composite(name):
        y = causal_conv1d_reference(x, weight, bias, silu)
    else:
        y = _FORWARD(x, weight, bias, silu, name)
    return y if channels_last else y.transpose(1, 2)


def _resolve(x: Tensor, weight: Tensor, name: str) -> backends.Backend:
    batch, length, channels = x.shape
    call = backends.Call("causal_conv1d", x.device.type, x.dtype, batch, length, channels, width=weight.shape[1])
    return backends.resolve(call, name)


def _forward(x, weight, bias, silu, backend):
    with _full_precision(x):
        return _resolve(x, weight, backend).conv_forward(x, weight, bias, silu).contiguous()


def _fake_forward(x, weight, bias, silu, backend):
    return x.new_empty(x.shape)


def _backward(grad_y, x, weight, bias, silu, backend):
    with _full_precision(x):
        gradients = _resolve(x, weight, backend).conv_backward(grad_y, x, weight, bias, silu)
    return [g.contiguous() for g in gradients if g is not None]


def _fake_backward(grad_y, x, weight, bias, silu, backend):
    return [t.new_empty(t.shape) for t in (x, weight, bias) if t is not None]


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, str backend"
_FORWARD = operators.define("causal_conv1d_fwd", f"({_INPUTS}) -> Tensor", _forward, _fake_forward)
_BACKWARD = operators.define("causal_conv1d_bwd", f"(Tensor grad_y, {_INPUTS}) -> Tensor[]", _backward, _fake_backward)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx, grad_y):
    if grad_y is None:
        return (None,) * 5
    x, weight, bias = ctx.saved_tensors
    gradients = _BACKWARD(grad_y, x, weight, bias, ctx.silu, ctx.backend)
    grad_x, grad_weight = gradients[:2]
    return grad_x, grad_weight, None if bias is None else gradients[2], None, None


operators.differentiate(_FORWARD, _setup_context, _gradients, "the causal convolution")
operators.refuse_derivatives(_BACKWARD, "the causal convolution")
