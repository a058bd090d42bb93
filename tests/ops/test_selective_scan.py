"""The scan against its float64 definition, and its life inside autograd, autocast, compile and export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from monai_mamba.errors import BackendError
from monai_mamba.ops import selective_scan, use_backend

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def make_inputs(length, d_state=16, groups=1, batch=2, channels=8, dtype=torch.float32, seed=0, optional=NAMES[5:]):
    """Channels-last inputs drawn like those of the networks; absent optional arguments are None."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = {
        "u": normal(batch, length, channels),
        "delta": 0.5 * normal(batch, length, channels),
        "A": -torch.exp(torch.log(torch.arange(1, d_state + 1, dtype=torch.float64)) + 0.1 * normal(channels, d_state)),
        "B": normal(batch, length, groups, d_state),
        "C": normal(batch, length, groups, d_state),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels) - 2,
    }
    return {
        name: value.to(dtype).requires_grad_() if name in NAMES[:5] or name in optional else None
        for name, value in values.items()
    }


def detached(inputs, dtype):
    return {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in inputs.items()}


def run_scan(**arguments):
    # Without the softplus random step sizes are negative and the state grows without bound.
    return selective_scan(**arguments, delta_softplus=True, channels_last=True)


def relative_error(value, reference):
    return ((value.double() - reference).abs().max() / reference.abs().max().clamp_min(1e-12)).item()


def gradients(inputs, grad_y, **arguments):
    present = [v for v in inputs.values() if v is not None]
    y = selective_scan(**inputs, channels_last=True, **arguments)
    return y, torch.autograd.grad(y, present, grad_y.to(y.dtype))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("d_state", [1, 8, 16])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000])
def test_scan_random_shape_matches_float64_reference(length, d_state, groups):
    inputs = make_inputs(length, d_state, groups)
    grad_y = torch.randn_like(inputs["u"])
    y, found = gradients(inputs, grad_y, delta_softplus=True)
    expected_y, expected = gradients(detached(inputs, torch.float64), grad_y, delta_softplus=True, backend="reference")
    assert relative_error(y, expected_y) <= 1e-5
    for name, gradient, reference in zip(NAMES, found, expected, strict=True):
        if length == 1 and name == "A":
            # One step from a zero state does not see the decay.
            assert gradient.abs().max() == 0
            continue
        assert relative_error(gradient, reference) <= 1e-4, name


@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "linear"])
@pytest.mark.parametrize("present", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")], ids="+".join)
def test_scan_optional_arguments_match_float64_reference(present, softplus):
    inputs = make_inputs(130, optional=present)
    if not softplus:
        for name in {"delta", "delta_bias"} & {k for k, v in inputs.items() if v is not None}:
            inputs[name] = inputs[name].detach().abs().requires_grad_()
    grad_y = torch.randn_like(inputs["u"])
    y, found = gradients(inputs, grad_y, delta_softplus=softplus)
    expected_y, expected = gradients(
        detached(inputs, torch.float64), grad_y, delta_softplus=softplus, backend="reference"
    )
    assert relative_error(y, expected_y) <= 1e-5
    for gradient, reference in zip(found, expected, strict=True):
        assert relative_error(gradient, reference) <= 1e-4


@pytest.mark.parametrize("name", ["D", "z", "delta_bias"])
def test_scan_each_optional_argument_changes_the_result(name):
    with_all = make_inputs(20)
    without = with_all | {name: None}
    difference = run_scan(**with_all) - run_scan(**without)
    assert difference.abs().max() > 1e-3


def test_scan_channels_first_is_the_mamba_ssm_layout():
    inputs = make_inputs(70, groups=2)
    expected = selective_scan(**inputs, delta_softplus=True, channels_last=True)
    first = {
        name: v.transpose(1, 2) if name in ("u", "delta", "z") else v.permute(0, 2, 3, 1) if name in "BC" else v
        for name, v in inputs.items()
    }
    assert torch.equal(selective_scan(**first, delta_softplus=True).transpose(1, 2), expected)


def test_scan_three_dimensional_B_and_C_are_one_group():
    inputs = make_inputs(9, groups=1)
    expected = run_scan(**inputs)
    squeezed = inputs | {"B": inputs["B"][:, :, 0], "C": inputs["C"][:, :, 0]}
    assert torch.equal(run_scan(**squeezed), expected)


def test_scan_non_contiguous_slices_match_contiguous():
    inputs = make_inputs(100)
    wide = torch.cat([inputs["u"], inputs["z"]], dim=-1).detach()
    u, z = wide.chunk(2, dim=-1)
    assert not u.is_contiguous()
    expected = run_scan(**inputs)
    torch.testing.assert_close(run_scan(**(inputs | {"u": u, "z": z})), expected, rtol=1e-5, atol=1e-6)


def test_scan_is_causal():
    inputs = make_inputs(200)
    changed = inputs | {"u": inputs["u"].detach().clone()}
    changed["u"][:, 137:] += 1
    before = run_scan(**inputs)
    after = run_scan(**changed)
    assert torch.equal(before[:, :137], after[:, :137])
    assert not torch.equal(before[:, 137:], after[:, 137:])


@pytest.mark.parametrize("batch", [0, 1])
def test_scan_batch_items_do_not_see_each_other(batch):
    inputs = make_inputs(150)
    single = {k: v[batch : batch + 1] if k in ("u", "delta", "z", "B", "C") else v for k, v in inputs.items()}
    torch.testing.assert_close(run_scan(**single)[0], run_scan(**inputs)[batch], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("length", [1, 5, 66], ids=lambda n: f"L{n}")
def test_scan_gradcheck_float64(length, backend):
    inputs = make_inputs(length, d_state=3, groups=2, batch=1, channels=4, dtype=torch.float64)

    def run(*tensors):
        return selective_scan(*tensors, True, channels_last=True, backend=backend)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=length > 5)


@pytest.mark.parametrize("strength", [1e-6, 1.0, 1e2, 1e4], ids=lambda s: f"deltaA{s:g}")
def test_scan_is_finite_and_right_for_any_decay(strength):
    inputs = make_inputs(300, optional=())
    inputs["delta"] = torch.ones_like(inputs["delta"]).requires_grad_()
    inputs["A"] = torch.full_like(inputs["A"], -strength).requires_grad_()
    grad_y = torch.randn_like(inputs["u"])
    y, found = gradients(inputs, grad_y)
    expected_y, expected = gradients(detached(inputs, torch.float64), grad_y, backend="reference")
    assert relative_error(y, expected_y) <= 1e-5
    for gradient, reference in zip(found, expected, strict=True):
        assert torch.isfinite(gradient).all()
        assert (gradient.double() - reference).abs().max() <= 1e-4 * max(1e-3, reference.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_scan_low_precision_input_keeps_float32_state(dtype):
    inputs = make_inputs(1000, optional=("D", "delta_bias"))
    low = {k: v if v is None or k in ("A", "D", "delta_bias") else v.detach().to(dtype) for k, v in inputs.items()}
    exact = {k: None if v is None else v.detach().double() for k, v in low.items()}
    y = selective_scan(**low, delta_softplus=True, channels_last=True)
    expected = selective_scan(**exact, delta_softplus=True, channels_last=True, backend="reference")
    assert y.dtype == dtype
    # One rounding of the result, nothing accumulated over 1000 steps.
    assert relative_error(y, expected) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 20.0], ids=lambda s: f"delta{s:g}")
def test_scan_under_autocast_is_finite_and_float32(dtype, scale):
    inputs = make_inputs(257)
    inputs["delta"] = (inputs["delta"].detach().abs() * scale).requires_grad_()
    inputs["u"] = (inputs["u"].detach() * 1e3).requires_grad_()
    expected = selective_scan(**inputs, delta_softplus=True, channels_last=True)
    with torch.autocast("cpu", dtype=dtype):
        y = selective_scan(**inputs, delta_softplus=True, channels_last=True)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert all(torch.isfinite(v.grad).all() for v in inputs.values())


def test_scan_gradient_follows_forward_backend_after_leaving_the_context():
    inputs = make_inputs(80)
    with use_backend("torch"):
        y = run_scan(**inputs)
    (found,) = torch.autograd.grad(y.sum(), inputs["u"])
    (expected,) = torch.autograd.grad(run_scan(**inputs).sum(), inputs["u"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_torch_backend_makes_no_tensor_of_size_BDLN():
    from monai_mamba.ops.backends import get_backend

    inputs = make_inputs(640, channels=32)
    arguments = list(inputs.values())
    implementation = get_backend("torch")
    with _LargestTensor() as largest, torch.no_grad():
        y, states = implementation.scan_forward(*arguments, True, True)
        implementation.scan_backward(torch.ones_like(y), states, *arguments, True)
    assert largest.numel <= 2 * inputs["u"].numel()  # BDLN would be 16 times the input


def test_torch_backend_long_sequence_carries_in_two_levels():
    # More than 64 chunks of 64 steps.
    inputs = make_inputs(64 * 70 + 5, d_state=2, batch=1, channels=2)
    grad_y = torch.randn_like(inputs["u"])
    y, found = gradients(inputs, grad_y, delta_softplus=True, backend="torch")
    expected_y, expected = gradients(detached(inputs, torch.float64), grad_y, delta_softplus=True, backend="reference")
    assert relative_error(y, expected_y) <= 1e-5
    for gradient, reference in zip(found, expected, strict=True):
        assert relative_error(gradient, reference) <= 1e-4


def test_torch_backend_recomputes_states_it_was_not_given():
    from monai_mamba.ops.backends import get_backend

    arguments = [t.detach() for t in make_inputs(200).values()]
    implementation = get_backend("torch")
    y, states = implementation.scan_forward(*arguments, True, True)
    assert states.shape == (2, 3, 8, 16)  # before the steps 64, 128 and 192
    with_states = implementation.scan_backward(torch.ones_like(y), states, *arguments, True)
    without = implementation.scan_backward(torch.ones_like(y), None, *arguments, True)
    assert all(torch.equal(a, b) for a, b in zip(with_states, without, strict=True))


@pytest.mark.parametrize("length", [1, 64, 65, 130])
def test_forward_keeps_no_state_of_the_first_64_steps(length, monkeypatch):
    """One state per 64 steps but the first, which starts from zero; the backward pass takes what there is."""
    from monai_mamba.ops.backends import get_backend

    arguments = [t.detach() for t in make_inputs(length).values()]
    torch_backend, reference_backward = get_backend("torch"), get_backend("torch").scan_backward
    _, expected = torch_backend.scan_forward(*[t.double() for t in arguments], True, True)
    assert expected.shape == (2, (length - 1) // 64, 8, 16)
    for name in ("torch", "cpu"):
        backend = get_backend(name)
        if not backend.availability().ok:
            continue
        y, states = backend.scan_forward(*arguments, True, True)
        assert states.shape == expected.shape
        if states.numel():
            assert relative_error(states, expected) <= 1e-6
        # The states of one backend serve the backward pass of another.
        found = backend.scan_backward(torch.ones_like(y), expected.float(), *arguments, True)
        for gradient, reference in zip(
            found, reference_backward(torch.ones_like(y), states, *arguments, True), strict=True
        ):
            assert relative_error(gradient, reference) <= 1e-5

    leaves = [t.requires_grad_() for t in arguments]
    y = selective_scan(*leaves, delta_softplus=True, channels_last=True)
    monkeypatch.setattr("monai_mamba.ops.cpu.CpuBackend.scan_forward", _must_not_run)
    torch.autograd.grad(y.sum(), leaves)  # without a second forward pass


def _must_not_run(*arguments):
    raise AssertionError("the forward pass ran again")


@pytest.mark.parametrize("present", [(), ("D", "z", "delta_bias")], ids=["bare", "full"])
def test_scan_operator_passes_opcheck(present):
    inputs = make_inputs(70, d_state=4, channels=4, optional=present)
    torch.library.opcheck(torch.ops.monai_mamba.selective_scan_fwd.default, (*inputs.values(), True, True, "torch"))


def test_scan_compiles_to_one_graph_forward_and_backward():
    inputs = make_inputs(70, d_state=4, channels=4)

    def run(**tensors):
        return F.gelu(selective_scan(**tensors, delta_softplus=True, channels_last=True))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    grad_y = torch.randn_like(inputs["u"])
    present = list(inputs.values())
    torch.testing.assert_close(
        torch.autograd.grad(compiled(**inputs), present, grad_y),
        torch.autograd.grad(run(**inputs), present, grad_y),
    )


def test_scan_exports_as_one_node_with_dynamic_length():
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return run_scan(u=u, delta=delta, A=A, B=B, C=C) * 2

    inputs = [v.detach() for v in make_inputs(40, optional=()).values() if v is not None]
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(
        Scan(), tuple(inputs), dynamic_shapes=({1: length}, {1: length}, None, {1: length}, {1: length})
    )
    scans = [n for n in program.graph.nodes if "selective_scan_fwd" in str(n.target)]
    assert len(scans) == 1
    other = [v.detach() for v in make_inputs(77, optional=()).values() if v is not None]
    torch.testing.assert_close(program.module()(*other), Scan()(*other))


def test_scan_double_backward_is_refused_by_name_and_served_by_reference():
    inputs = make_inputs(5, optional=(), dtype=torch.float64)

    def second_derivative(backend):
        y = selective_scan(**inputs, channels_last=True, backend=backend)
        (first,) = torch.autograd.grad(y.pow(2).sum(), inputs["u"], create_graph=True)
        return torch.autograd.grad(first.sum(), inputs["u"])[0]

    assert torch.isfinite(second_derivative("reference")).all()
    with pytest.raises(BackendError, match="backend='reference'"):
        second_derivative("torch")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"u": lambda i: i["u"].long()}, TypeError, ["`u`", "int64"]),
        ({"u": lambda i: i["u"].tolist()}, TypeError, ["`u`", "list"]),
        ({"A": lambda i: None}, TypeError, ["`A`", "must be a tensor", "NoneType"]),
        ({"delta": lambda i: i["delta"].to_sparse()}, TypeError, ["`delta`", "torch.sparse_coo", "to_dense()"]),
        ({"delta": lambda i: i["delta"][:, :-1]}, ValueError, ["`delta`", "shape of `u`"]),
        ({"z": lambda i: i["z"][..., :-1]}, ValueError, ["`z`", "shape of `u`"]),
        ({"A": lambda i: i["A"][:-1]}, ValueError, ["`A`", "D=8"]),
        ({"A": lambda i: i["A"][:, :0]}, ValueError, ["`A`", "N=0"]),
        ({"B": lambda i: i["B"].expand(-1, -1, 3, -1)}, ValueError, ["`B`", "G=3", "divide"]),
        ({"B": lambda i: i["B"][0, 0]}, ValueError, ["`B`", "(B, L, G, N)"]),
        ({"C": lambda i: i["C"][..., :-1]}, ValueError, ["`C`", "N=16"]),
        ({"D": lambda i: i["D"][:-1]}, ValueError, ["`D`", "D=8"]),
        ({"delta_bias": lambda i: i["delta_bias"][None]}, ValueError, ["`delta_bias`", "D=8"]),
        ({"delta": lambda i: i["delta"].double()}, ValueError, ["`delta`", "float64", "float32"]),
        ({"C": lambda i: i["C"].to("meta")}, ValueError, ["`C`", "meta", "cpu"]),
        ({"u": lambda i: i["u"][:, :0]}, ValueError, ["`u`", "L=0"]),
        ({"u": lambda i: i["u"][0]}, ValueError, ["`u`", "(B, L, D)"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_scan_bad_argument_is_named(change, error, words):
    inputs = make_inputs(10)
    inputs |= {name: make(inputs) for name, make in change.items()}
    with pytest.raises(error) as raised:
        run_scan(**inputs)
    assert all(word in str(raised.value) for word in words), str(raised.value)
