"""The selective scan: argument door, operator, choice of backend."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from monai_mamba.ops import backends, operators
from monai_mamba.ops.reference import selective_scan_reference, state_dtype

_OPTIONAL = frozenset({"D", "z", "delta_bias", "bias"})
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    channels_last: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Run the selective state space recurrence of Mamba over a sequence.

    For every channel d and state n: ``h = exp(delta A) h + delta B u`` and ``y = <C, h> + D u``, multiplied by
    ``silu(z)`` if a gate is given. State, step size and sums are float32 (float64 for float64 input) whatever the
    input type and autocast say; the result has the type of ``u``.

    Args:
        u: input sequence.
        delta: step sizes, before ``delta_bias`` and softplus.
        A: decay rates, negative for a stable recurrence.
        B: input matrix, one per step and group.
        C: output matrix, one per step and group.
        D: skip connection per channel.
        z: gate.
        delta_bias: added to ``delta``.
        delta_softplus: apply softplus to the step sizes.
        channels_last: ``(B, L, D)`` instead of ``(B, D, L)``; the native layout, without a copy.
        backend: name of the implementation to use; default the fastest that serves (see `monai-mamba doctor`).

    Shape:
        ``channels_last=False`` (mamba-ssm): u, delta, z ``(B, D, L)``; A ``(D, N)``; B, C ``(B, N, L)`` or
        ``(B, G, N, L)`` with G a divisor of D; D, delta_bias ``(D,)``. Returns ``(B, D, L)``.
        ``channels_last=True``: u, delta, z ``(B, L, D)``; B, C ``(B, L, N)`` or ``(B, L, G, N)``. Returns
        ``(B, L, D)``.

    Raises:
        TypeError: if an argument is not a dense floating-point tensor.
        ValueError: if shapes, devices or precisions do not fit together.
        BackendError: if the backend asked for is not available or cannot serve the call.

    References:
        Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, arXiv:2312.00752, section 3.
    """
    _check_tensors(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    for name, matrix in (("B", B), ("C", C)):
        if matrix.ndim not in (3, 4):
            form = "(B, L, N) or (B, L, G, N)" if channels_last else "(B, N, L) or (B, G, N, L)"
            raise ValueError(f"`{name}` must have shape {form}, got {tuple(matrix.shape)}")
    if u.ndim != 3:
        form = "(B, L, D)" if channels_last else "(B, D, L)"
        raise ValueError(f"`u` must have shape {form}, got {tuple(u.shape)}")
    if channels_last:
        B, C = (m.unsqueeze(2) if m.ndim == 3 else m for m in (B, C))  # (B, L, G, N)
    else:
        if delta.ndim == 3:
            delta = delta.transpose(1, 2)
        if z is not None and z.ndim == 3:
            z = z.transpose(1, 2)
        u = u.transpose(1, 2)  # (B, L, D)
        B, C = (m.unsqueeze(1) if m.ndim == 3 else m for m in (B, C))
        B, C = B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2)  # (B, L, G, N)
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)

    name = backends.requested_name(backend, "selective_scan")
    if backends.is_composite(name):
        y = selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    else:
        tensors = (u, delta, A, B, C, D, z, delta_bias)
        save_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        y, _ = _FORWARD(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save_states, name)
    return y if channels_last else y.transpose(1, 2)


def _check_tensors(**tensors: Tensor | None) -> None:
    """Check type, device and precision of everything against the first tensor."""
    first_name, first = next(iter(tensors.items()))
    if not isinstance(first, Tensor):
        raise TypeError(f"`{first_name}` must be a tensor, got {type(first).__name__}")
    dtype, device = first.dtype, first.device
    if dtype not in _FLOATING:
        raise TypeError(_wrong_type(first_name, dtype))
    for name, tensor in tensors.items():
        if tensor is None and name in _OPTIONAL:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"`{name}` must be a dense tensor, got the layout {tensor.layout}; call its to_dense()")
        other = tensor.dtype
        if other != dtype and other not in _FLOATING:
            raise TypeError(_wrong_type(name, other))
        if tensor.device != device:
            raise ValueError(
                f"`{name}` lies on {tensor.device} but `{first_name}` on {device}; move both to one device"
            )
        if other != dtype and torch.float64 in (other, dtype):
            raise ValueError(
                f"`{name}` is {str(other)[6:]} but `{first_name}` is {str(dtype)[6:]}; "
                "in double precision all arguments must be float64"
            )


def _wrong_type(name: str, dtype: torch.dtype) -> str:
    return f"`{name}` must be float16, bfloat16, float32 or float64, got {str(dtype)[6:]}; convert it"


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Check the native layout; ``u`` is ``(B, L, D)`` and decides. Messages give sizes by name, not by axis order."""
    batch, length, channels = u.shape
    if batch < 1 or length < 1 or channels < 1:
        raise ValueError(f"`u` must not be empty, got B={batch}, L={length}, D={channels}")
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != u.shape:
            raise ValueError(
                f"`{name}` must have the shape of `u` (B={batch}, D={channels}, L={length}), got {tuple(tensor.shape)}"
                " in the order (B, L, D)"
            )
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"`A` must have shape (D, N) with D={channels}, got {tuple(A.shape)}")
    d_state = A.shape[1]
    if d_state < 1:
        raise ValueError("`A` must have at least one state (N >= 1), got N=0")
    groups = B.shape[2]
    if groups < 1 or channels % groups:
        raise ValueError(f"`B` has G={groups} groups, which must divide the D={channels} channels of `u`")
    for name, matrix in (("B", B), ("C", C)):
        if matrix.shape != (batch, length, groups, d_state):
            raise ValueError(
                f"`{name}` must have B={batch}, L={length}, G={groups}, N={d_state} as `u`, `A` and `B` say, got "
                f"{tuple(matrix.shape)} in the order (B, L, G, N)"
            )
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"`{name}` must have shape (D,) with D={channels}, got {tuple(vector.shape)}")


def _resolve(u: Tensor, A: Tensor, B: Tensor, name: str) -> backends.Backend:
    batch, length, channels = u.shape
    groups, d_state = B.shape[2:]
    call = backends.Call("selective_scan", u.device.type, u.dtype, batch, length, channels, groups, d_state)
    return backends.resolve(call, name)


_UNCHANGED = contextlib.nullcontext()


# Autocast does not end at the door of an operator: without this, matrix products inside would be cast again.
def _full_precision(tensor: Tensor) -> contextlib.AbstractContextManager:
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _UNCHANGED


def _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save_states, backend):
    implementation = _resolve(u, A, B, backend)
    with _full_precision(u):
        y, states = implementation.scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save_states)
    return y, u.new_empty((0,), dtype=state_dtype(u)) if states is None else states


def _fake_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save_states, backend):
    y = u.new_empty(u.shape)
    if not (save_states and backends.keeps_states(backend)):
        return y, u.new_empty((0,), dtype=state_dtype(u))
    batch, length, channels = u.shape
    shape = (batch, backends.num_saved_states(length), channels, A.shape[1])
    return y, u.new_empty(shape, dtype=state_dtype(u))


def _backward(grad_y, states, u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend):
    implementation = _resolve(u, A, B, backend)
    with _full_precision(u):
        gradients = implementation.scan_backward(
            grad_y, _saved(states), u, delta, A, B, C, D, z, delta_bias, delta_softplus
        )
    return [g.contiguous() for g in gradients if g is not None]


def _saved(states: Tensor) -> Tensor | None:
    # Not by the number of elements: up to 64 steps there are none to save.
    return states if states.ndim == 4 else None


def _fake_backward(grad_y, states, u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend):
    return [t.new_empty(t.shape) for t in (u, delta, A, B, C, D, z, delta_bias) if t is not None]


_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
_FORWARD = operators.define(
    "selective_scan_fwd",
    f"({_INPUTS}, bool delta_softplus, bool save_states, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_BACKWARD = operators.define(
    "selective_scan_bwd",
    f"(Tensor grad_y, Tensor states, {_INPUTS}, bool delta_softplus, str backend) -> Tensor[]",
    _backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_y, _grad_states):
    if grad_y is None:
        return (None,) * 11
    *tensors, states = ctx.saved_tensors
    found = iter(_BACKWARD(grad_y, states, *tensors, ctx.delta_softplus, ctx.backend))
    return (*(None if t is None else next(found) for t in tensors), None, None, None)


operators.differentiate(_FORWARD, _setup_context, _gradients, "the selective scan")
operators.refuse_derivatives(_BACKWARD, "the selective scan")
