"""The operators in PyTorch's dispatcher: what opcheck asks of them, what they refuse, and what a call leaves alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from monai_mamba.errors import BackendError
from monai_mamba.ops import causal_conv1d, get_backend, selective_scan, ss2d_scan
from monai_mamba.ops.backends import num_saved_states

ROUTES = "row,column_reversed"
BACKENDS = ["torch", "cpu"]


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def scan_arguments(length=70):
    sequence, matrix = (2, length, 8), (2, length, 2, 3)
    A = -torch.rand(8, 3) - 0.1
    return [
        normal(*sequence),
        normal(*sequence),
        A,
        normal(*matrix),
        normal(*matrix),
        normal(8),
        normal(*sequence),
        normal(8),
    ]


def map_arguments():
    matrix = (2, 9, 8, 2, 3)
    A = -torch.rand(2, 4, 3) - 0.1
    return [normal(2, 9, 8, 4), normal(2, 9, 8, 2, 4), A, normal(*matrix), normal(*matrix), normal(2, 4), normal(2, 4)]


def conv_arguments():
    return [normal(2, 9, 6), normal(6, 4), normal(6)]


OPERATORS = {  # forward operator, its derivative, tensors, the rest
    "selective_scan": ("selective_scan_fwd", "selective_scan_bwd", scan_arguments, (True,)),
    "ss2d_scan": ("ss2d_scan_fwd", "ss2d_scan_bwd", map_arguments, (ROUTES, True)),
    "causal_conv1d": ("causal_conv1d_fwd", "causal_conv1d_bwd", conv_arguments, (True,)),
}


def operator(name):
    return getattr(torch.ops.monai_mamba, name).default


@pytest.fixture(params=BACKENDS)
def backend(request):
    if not get_backend(request.param).availability().ok:
        pytest.skip(get_backend(request.param).availability().reason)
    return request.param


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_and_its_derivative_pass_opcheck(name, backend):
    forward, backward, make, rest = OPERATORS[name]
    leaves = [t.requires_grad_() for t in make()]
    saved = (True,) if "scan" in name else ()
    torch.library.opcheck(operator(forward), (*leaves, *rest, *saved, backend))
    plain = [t.detach() for t in leaves]
    results = operator(forward)(*plain, *rest, *saved, backend)
    kept = (results[0], results[1]) if saved else (results,)  # as the gradient of the output, and the states
    torch.library.opcheck(operator(backward), (*kept, *plain, *rest, backend))


def calls(**arguments):
    return {
        "selective_scan": lambda *t: selective_scan(*t, True, channels_last=True, **arguments),
        "ss2d_scan": lambda *t: ss2d_scan(*t, routes=ROUTES.split(","), **arguments),
        "causal_conv1d": lambda *t: causal_conv1d(*t, "silu", channels_last=True, **arguments),
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives_by_forward_mode_are_refused_and_served_by_reference(name):
    """They used to be zero without a word."""
    first, *others = OPERATORS[name][2]()

    def tangent(call):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(first, torch.ones_like(first)), *others)).tangent

    with pytest.raises(BackendError, match=r"forward mode.*backend='reference'"):
        tangent(calls()[name])
    with pytest.raises(BackendError, match=r"forward mode.*backend='reference'"):
        torch.func.jvp(lambda x: calls()[name](x, *others), (first,), (first,))
    expected = tangent(calls(backend="reference")[name])
    assert expected.abs().max() > 0
    with forward_ad.dual_level():  # nothing to differentiate: served
        assert torch.equal(calls()[name](first, *others), calls()[name](first, *others))


@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives_by_torch_func_are_refused_and_served_by_reference(name):
    first, *others = OPERATORS[name][2]()
    with pytest.raises(BackendError, match=r"torch\.func.*backend='reference'"):
        torch.func.grad(lambda x: calls()[name](x, *others).sum())(first)
    found = torch.func.grad(lambda x: calls(backend="reference")[name](x, *others).sum())(first)
    leaf = first.clone().requires_grad_()
    (expected,) = torch.autograd.grad(calls()[name](leaf, *others).sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


SEQUENCES = {"selective_scan": (0, 1, 3, 4, 6), "ss2d_scan": (0, 1, 3, 4), "causal_conv1d": (0,)}  # tensors with steps


def longer(name, tensors):
    """The same tensors with more steps, or rows of the map."""
    return [torch.cat([t, t[:, :3]], 1) if i in SEQUENCES[name] else t for i, t in enumerate(tensors)]


@pytest.mark.parametrize("name", ["ss2d_scan", "causal_conv1d"])
def test_operator_compiles_to_one_graph_for_all_lengths(name):
    """Forward and backward; the scan of a sequence has its test beside its values."""
    torch._dynamo.reset()
    call, first = calls()[name], OPERATORS[name][2]()
    compiled = torch.compile(lambda *t: call(*t).sin(), fullgraph=True, dynamic=True, backend="aot_eager")
    for tensors in (first, longer(name, first)):
        leaves = [t.requires_grad_() for t in tensors]
        for found, expected in zip(
            torch.autograd.grad(compiled(*leaves).sum(), leaves),
            torch.autograd.grad(call(*leaves).sin().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ss2d_scan", "causal_conv1d"])
def test_operator_is_one_node_of_an_exported_program_for_all_lengths(name):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return calls()[name](*tensors) * 2

    tensors = OPERATORS[name][2]()
    steps = torch.export.Dim("steps", min=2, max=999)
    shapes = tuple({1: steps} if i in SEQUENCES[name] else None for i in range(len(tensors)))
    program = torch.export.export(Module(), tuple(tensors), dynamic_shapes=(shapes,))
    assert sum("monai_mamba" in str(node.target) for node in program.graph.nodes) == 1
    other = longer(name, tensors)
    torch.testing.assert_close(program.module()(*other), Module()(*other))


@pytest.mark.parametrize("name", OPERATORS)
def test_vmap_over_the_batch_equals_a_loop(name):
    tensors = OPERATORS[name][2]()
    call, axes = calls()[name], tuple(0 if t.ndim > 2 and t.shape[0] == 2 else None for t in tensors)
    axes = tuple(None if i == 2 else axis for i, axis in enumerate(axes))  # A belongs to no batch
    stacked = [t if axis is None else torch.stack([t, 2 * t]) for t, axis in zip(tensors, axes, strict=True)]
    found = torch.vmap(call, in_dims=axes)(*stacked)
    for i in range(2):
        one = [t if axis is None else t[i] for t, axis in zip(stacked, axes, strict=True)]
        assert torch.equal(found[i], call(*one))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_flow_through_vmap(name):
    first, *others = OPERATORS[name][2]()
    many = torch.stack([first, 2 * first]).requires_grad_()
    (found,) = torch.autograd.grad(torch.vmap(lambda x: calls()[name](x, *others))(many).sum(), many)
    for x, gradient in zip(many.detach(), found, strict=True):
        leaf = x.clone().requires_grad_()
        assert torch.equal(gradient, torch.autograd.grad(calls()[name](leaf, *others).sum(), leaf)[0])
    with pytest.raises(ValueError, match="axis of length 0"):
        torch.vmap(lambda x: calls()[name](x, *others))(many[:0])


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_for_many_vectors_at_once_are_refused_and_served_by_reference(name):
    first, *others = OPERATORS[name][2]()

    def gradients(**arguments):
        y = calls(**arguments)[name](first.requires_grad_(), *others)
        return torch.autograd.grad(y, first, torch.stack([torch.ones_like(y)] * 2), is_grads_batched=True)[0]

    with pytest.raises(BackendError, match=r"one by one.*backend='reference'"):
        gradients()
    assert gradients(backend="reference").shape == (2, *first.shape)


@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_of_monai_are_served_with_and_without_gradients(name, backend):
    """Its MetaTensor, which its loaders give and which goes through a whole network, has methods of its own."""
    data = pytest.importorskip("monai.data")
    first, *others = OPERATORS[name][2]()
    call = calls(backend=backend)[name]
    with torch.no_grad():
        expected = call(first, *others)
        for everything in (False, True):
            found = call(data.MetaTensor(first), *(data.MetaTensor(t) if everything else t for t in others))
            assert type(found) is data.MetaTensor and torch.equal(found.as_tensor(), expected)
    leaf, plain = (t.clone().requires_grad_() for t in (first, first))
    (found,) = torch.autograd.grad(call(data.MetaTensor(leaf), *others).as_tensor().sum(), leaf)
    assert torch.equal(found, torch.autograd.grad(call(plain, *others).sum(), plain)[0])


class _Sizes(TorchDispatchMode):
    """Sizes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        self.found += [tuple(t.shape) for t in results if isinstance(t, torch.Tensor)]
        return result


def test_backward_makes_no_gradient_of_the_states():
    """Nothing depends on the states; zeros of their size, a quarter of the input with 16 states, are not made."""
    leaves = [t.requires_grad_() for t in scan_arguments(length=330)]
    y = selective_scan(*leaves, True, channels_last=True)
    states = (2, num_saved_states(330), 8, 3)
    assert any(t is not None and t.shape == states for t in y.grad_fn.saved_tensors)
    with _Sizes() as sizes:
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert (2, 330, 8) in sizes.found
    assert states not in sizes.found


def test_output_that_gets_no_gradient_gives_none():
    leaf = normal(2, 9, 6).requires_grad_()

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    y = Cut.apply(causal_conv1d(leaf, *conv_arguments()[1:], channels_last=True))
    assert torch.autograd.grad(y.sum(), leaf, allow_unused=True) == (None,)


def test_first_scan_of_a_process_does_not_import_the_compiler():
    code = (
        "import sys, torch\n"
        "from monai_mamba.ops import selective_scan\n"
        "u = torch.ones(1, 8, 4, requires_grad=True)\n"
        "m = torch.ones(1, 2, 4)\n"
        "selective_scan(u, u, -torch.ones(8, 2), m, m).sum().backward()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "False", run.stderr
