"""The operators of this package as ONNX graphs of fixed size.

The scan becomes three ONNX ``Scan`` nodes over chunks of `CHUNK` steps, however long the sequence is:

1. all chunks side by side, from a zero state: what each chunk adds to the state;
2. over the chunks: the state before each one;
3. all chunks side by side, from these states: the outputs.

So ``2 * CHUNK + L / CHUNK`` steps are taken one after the other instead of ``L``, nothing of size B*L*D*N is made,
and exponents are never positive for a stable ``A``, as in the recurrence itself.
"""

# The decorators of onnxscript read these functions as graphs; to a type checker they are something else.
# mypy: disable-error-code="type-arg, misc, arg-type, type-var"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import FLOAT, graph, script, values
from onnxscript import opset18 as op

#: Steps of the sequence that are taken one after the other within a chunk.
CHUNK = 64

_local = values.Opset("monai_mamba", 1)


@script(_local, default_opset=op)
def _chunk_gains(h0, A, delta, delta_u, B) -> FLOAT[...]:
    """Last state of every chunk, (B*chunks, G, D/G, N), from the state ``h0``."""

    @graph()
    def step(h, delta_t, delta_u_t, B_t):
        h_next = op.Add(op.Mul(op.Exp(op.Mul(delta_t, A)), h), op.Mul(delta_u_t, B_t))
        return h_next

    h = op.Scan(h0, delta, delta_u, B, body=step, num_scan_inputs=3, scan_input_axes=[1, 1, 1])
    return h


@script(_local, default_opset=op)
def _chunk_states(h0, decay, gain) -> FLOAT[...]:
    """State before every chunk, (B, chunks, G, D/G, N)."""

    @graph()
    def step(h, decay_t, gain_t):
        h_next = op.Add(op.Mul(decay_t, h), gain_t)
        before = op.Identity(h)
        return h_next, before

    _, states = op.Scan(h0, decay, gain, body=step, num_scan_inputs=2, scan_input_axes=[1, 1], scan_output_axes=[1])
    return states


@script(_local, default_opset=op)
def _chunk_outputs(h0, A, delta, delta_u, B, C) -> FLOAT[...]:
    """Outputs of every step, (B*chunks, CHUNK, G, D/G, 1)."""

    @graph()
    def step(h, delta_t, delta_u_t, B_t, C_t):
        h_next = op.Add(op.Mul(op.Exp(op.Mul(delta_t, A)), h), op.Mul(delta_u_t, B_t))
        y = op.ReduceSum(op.Mul(h_next, C_t), op.Constant(value_ints=[-1]), keepdims=1)
        return h_next, y

    _, y = op.Scan(
        h0, delta, delta_u, B, C, body=step, num_scan_inputs=4, scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1]
    )
    return y


def _ints(*numbers: int) -> Any:
    return op.Constant(value_ints=list(numbers))


def _scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    delta_bias: Any,
    delta_softplus: bool,
    groups: int,
    width: int,
    d_state: int,
) -> Any:
    """Scan ``(B, L, D)`` with ``D = groups * width`` channels; the arguments are those of the selective scan."""
    if delta_bias is not None:
        delta = op.Add(delta, delta_bias)
    if delta_softplus:
        delta = op.Softplus(delta)

    batch, length = op.Shape(u, start=0, end=1), op.Shape(u, start=1, end=2)
    chunk = op.Min(length, _ints(CHUNK))
    num_chunks = op.Div(op.Sub(op.Add(length, chunk), _ints(1)), chunk)
    padding = op.Sub(op.Mul(num_chunks, chunk), length)

    def split(tensor: Any, ndim: int, *tail: int) -> Any:
        """Pad the sequence with zeros (a step of size zero changes nothing) and cut it: (B*chunks, chunk, *tail)."""
        pads = op.Concat(_ints(*[0] * (ndim + 1)), padding, _ints(*[0] * (ndim - 2)), axis=0)
        shape = op.Concat(op.Mul(batch, num_chunks), chunk, _ints(*tail), axis=0)
        return op.Reshape(op.Pad(tensor, pads), shape)

    def zeros(*leading: Any) -> Any:
        return op.Expand(op.Constant(value_float=0.0), op.Concat(*leading, _ints(groups, width, d_state), axis=0))

    A = op.Reshape(A, _ints(groups, width, d_state))
    delta_c, delta_u = split(delta, 3, groups, width, 1), split(op.Mul(delta, u), 3, groups, width, 1)
    B_c, C_c = split(B, 4, groups, 1, d_state), split(C, 4, groups, 1, d_state)
    gain = _chunk_gains(zeros(op.Mul(batch, num_chunks)), A, delta_c, delta_u, B_c)
    decay = op.Exp(op.Mul(op.ReduceSum(delta_c, _ints(1), keepdims=0), A))
    by_chunk = op.Concat(batch, num_chunks, _ints(groups, width, d_state), axis=0)
    states = _chunk_states(zeros(batch), op.Reshape(decay, by_chunk), op.Reshape(gain, by_chunk))
    states = op.Reshape(states, _ints(-1, groups, width, d_state))
    y = _chunk_outputs(states, A, delta_c, delta_u, B_c, C_c)
    y = op.Reshape(y, op.Concat(batch, op.Mul(num_chunks, chunk), _ints(groups * width), axis=0))
    y = op.Slice(y, _ints(0), length, _ints(1))  # (B, L, D)
    return y if D is None else op.Add(y, op.Mul(u, D))


def _no_states() -> Any:
    return op.Expand(op.Constant(value_float=0.0), _ints(0))


def _check_inference(save_states: bool) -> None:
    if save_states:
        raise ValueError("a scan that keeps its states for a gradient cannot go to ONNX; export without gradients")


def translate_selective_scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus: bool, save_states: bool, backend: str
) -> Any:
    """Translate ``monai_mamba::selective_scan_fwd``; the second result, the states, is empty in inference."""
    _check_inference(save_states)
    groups, d_state = int(B.shape[2]), int(B.shape[3])
    width = int(A.shape[0]) // groups
    y = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, groups, width, d_state)
    if z is not None:
        y = op.Mul(y, op.Mul(z, op.Sigmoid(z)))
    return y, _no_states()


def translate_ss2d_scan(
    x, delta, A, B, C, D, delta_bias, routes: str, delta_softplus: bool, save_states: bool, backend: str
) -> Any:
    """Translate ``monai_mamba::ss2d_scan_fwd``: lay out, scan with one group per route, put back and add."""
    _check_inference(save_states)
    num_routes, channels, d_state = (int(n) for n in A.shape)
    names = routes.split(",")

    def reverse(sequence: Any) -> Any:
        return op.Slice(sequence, _ints(-1), _ints(-(2**63)), _ints(1), _ints(-1))

    def sequence(feature_map: Any, route: str, size: int) -> Any:
        """(B, H, W, E) to (B, L, E)."""
        if route.startswith("column"):
            feature_map = op.Transpose(feature_map, perm=[0, 2, 1, 3])
        flat = op.Reshape(feature_map, _ints(0, -1, size))
        return reverse(flat) if route.endswith("reversed") else flat

    def of_routes(tensor: Any, size: int) -> list[Any]:
        """(B, H, W, K, E) to a sequence (B, L, E) for each route."""
        return [sequence(op.Gather(tensor, op.Constant(value_int=k), axis=3), r, size) for k, r in enumerate(names)]

    y = _scan(
        op.Concat(*[sequence(x, route, channels) for route in names], axis=-1),
        op.Concat(*of_routes(delta, channels), axis=-1),
        A,
        op.Concat(*[op.Unsqueeze(t, _ints(2)) for t in of_routes(B, d_state)], axis=2),
        op.Concat(*[op.Unsqueeze(t, _ints(2)) for t in of_routes(C, d_state)], axis=2),
        None if D is None else op.Reshape(D, _ints(-1)),
        None if delta_bias is None else op.Reshape(delta_bias, _ints(-1)),
        delta_softplus,
        num_routes,
        channels,
        d_state,
    )
    rows, columns = op.Shape(x, start=1, end=2), op.Shape(x, start=2, end=3)
    total = None
    for k, route in enumerate(names):
        part = op.Slice(y, _ints(k * channels), _ints((k + 1) * channels), _ints(2))
        if route.endswith("reversed"):
            part = reverse(part)
        if route.startswith("column"):
            part = op.Reshape(part, op.Concat(_ints(0), columns, rows, _ints(channels), axis=0))
            part = op.Transpose(part, perm=[0, 2, 1, 3])
        else:
            part = op.Reshape(part, op.Concat(_ints(0), rows, columns, _ints(channels), axis=0))
        total = part if total is None else op.Add(total, part)
    return total, _no_states()


def translate_causal_conv1d(x, weight, bias, silu: bool, backend: str) -> Any:
    """Translate ``monai_mamba::causal_conv1d_fwd``."""
    channels, taps = int(weight.shape[0]), int(weight.shape[1])
    inputs = [op.Transpose(x, perm=[0, 2, 1]), op.Unsqueeze(weight, _ints(1))]
    if bias is not None:
        inputs.append(bias)
    y = op.Conv(*inputs, group=channels, pads=[taps - 1, 0])
    if silu:
        y = op.Mul(y, op.Sigmoid(y))
    return op.Transpose(y, perm=[0, 2, 1])


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what ``torch.onnx.export`` needs to know about the operators of this package."""
    import monai_mamba.ops  # noqa: F401  registers the operators

    operators = torch.ops.monai_mamba
    return {
        operators.selective_scan_fwd.default: translate_selective_scan,
        operators.ss2d_scan_fwd.default: translate_ss2d_scan,
        operators.causal_conv1d_fwd.default: translate_causal_conv1d,
    }
