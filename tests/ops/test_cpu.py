"""The C backend: every instruction set, type and stride, any number of threads, forks, and data that is not finite."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from monai_mamba.errors import BackendError
from monai_mamba.layers.mamba import MambaMixer
from monai_mamba.ops import causal_conv1d, cpu, cpu_library, get_backend, selective_scan, ss2d_scan
from monai_mamba.ops.cpu import use_variant
from monai_mamba.ops.routes import ROUTES

try:
    VARIANTS = list(cpu_library.load().variants)
except cpu_library.LibraryError as error:  # no compiler on this machine
    pytest.skip(str(error), allow_module_level=True)

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
FORWARD_TOLERANCE = 5e-7  # of the maximum, against float64
GRADIENT_TOLERANCE = 3e-6


@pytest.fixture(params=VARIANTS)
def variant(request):
    with use_variant(request.param):
        yield request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def scan_inputs(batch=2, length=130, channels=24, groups=1, d_state=16):
    """Float64 inputs drawn like those of the networks."""
    rates = torch.log(torch.arange(1, d_state + 1, dtype=torch.float64)) + 0.1 * normal(channels, d_state)
    return {
        "u": normal(batch, length, channels),
        "delta": 0.5 * normal(batch, length, channels),
        "A": -torch.exp(rates),
        "B": normal(batch, length, groups, d_state),
        "C": normal(batch, length, groups, d_state),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels) - 3,
    }


def map_inputs(batch=2, height=7, width=11, channels=20, d_state=16, num_routes=4):
    rates = torch.log(torch.arange(1, d_state + 1, dtype=torch.float64)) + 0.1 * normal(num_routes, channels, d_state)
    return {
        "x": normal(batch, height, width, channels),
        "delta": 0.5 * normal(batch, height, width, num_routes, channels),
        "A": -torch.exp(rates),
        "B": normal(batch, height, width, num_routes, d_state),
        "C": normal(batch, height, width, num_routes, d_state),
        "D": normal(num_routes, channels),
        "delta_bias": normal(num_routes, channels) - 3,
    }


def as_leaves(values, dtype):
    return {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in values.items()}


def run(op, inputs, backend, **arguments):
    """Output and gradients of every input for an output gradient that is the same for all backends."""
    y = op(**inputs, backend=backend, **arguments)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    present = {k: v for k, v in inputs.items() if v is not None}
    found = torch.autograd.grad(y, list(present.values()), grad_y.to(y.dtype))
    return y, dict(zip(present, found, strict=True))


def error_of(value, reference):
    return ((value.double() - reference).abs().max() / reference.abs().max().clamp_min(1e-30)).item()


def check(op, values, **arguments):
    """Float32 in C against the float64 definition on the same (float32) numbers."""
    values = {k: None if v is None else v.float() for k, v in values.items()}
    y, found = run(op, as_leaves(values, torch.float32), "cpu", **arguments)
    expected_y, expected = run(op, as_leaves(values, torch.float64), "reference", **arguments)
    assert error_of(y, expected_y) <= FORWARD_TOLERANCE
    for name, gradient in found.items():
        if expected[name].abs().max() == 0:
            assert gradient.abs().max() == 0, name
        else:
            assert error_of(gradient, expected[name]) <= GRADIENT_TOLERANCE, name


def scan(**arguments):
    return selective_scan(**arguments, delta_softplus=True, channels_last=True)


def conv(**arguments):
    return causal_conv1d(**arguments, activation="silu", channels_last=True)


@pytest.mark.parametrize(
    ("length", "channels", "groups", "d_state"),
    [
        *((1, 1, 1, 1), (1, 16, 1, 16), (63, 15, 1, 4), (64, 17, 1, 8), (65, 32, 2, 16), (130, 66, 3, 3)),
        *(
            (200, 40, 4, 1),
            (70, 100, 1, 1),
            (129, 48, 2, 2),
            (70, 8, 8, 5),
            (66, 33, 1, 64),
            (65, 5, 1, 255),
            (64, 3, 1, 256),
        ),
    ],
    ids=lambda v: str(v),
)
def test_scan_matches_float64_on_every_instruction_set(variant, length, channels, groups, d_state):
    check(scan, scan_inputs(2, length, channels, groups, d_state))


@pytest.mark.parametrize("present", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")], ids="+".join)
@pytest.mark.parametrize("d_state", [1, 16])
def test_scan_optional_arguments_match_float64(variant, present, d_state):
    values = scan_inputs(channels=18, d_state=d_state)
    check(scan, {k: v if k in NAMES[:5] or k in present else None for k, v in values.items()})


def test_scan_without_softplus_matches_float64(variant):
    values = scan_inputs()
    values["delta"] = values["delta"].abs() * 0.1
    values["delta_bias"] = None
    check(lambda **a: selective_scan(**a, channels_last=True), values)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 70), (70, 1), (8, 8), (5, 27)], ids=lambda v: str(v))
def test_ss2d_scan_matches_float64_on_every_instruction_set(variant, height, width):
    check(ss2d_scan, map_inputs(height=height, width=width))


@pytest.mark.parametrize("routes", [("column",), ("row_reversed", "column"), ROUTES[::-1]], ids="+".join)
@pytest.mark.parametrize(("d_state", "channels"), [(1, 33), (1, 100), (6, 33)])
def test_ss2d_scan_route_subset_matches_float64(variant, routes, d_state, channels):
    check(ss2d_scan, map_inputs(num_routes=len(routes), d_state=d_state, channels=channels), routes=routes)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
@pytest.mark.parametrize(
    ("length", "channels", "width"), [(1, 1, 1), (3, 16, 4), (300, 37, 4), (130, 24, 3), (9, 8, 64), (600, 2, 2)]
)
def test_conv_matches_float64_on_every_instruction_set(variant, length, channels, width, silu):
    values = {"x": normal(2, length, channels), "weight": normal(channels, width), "bias": normal(channels)}
    activation = "silu" if silu else None
    check(causal_conv1d, values, channels_last=True, activation=activation)
    check(causal_conv1d, {**values, "bias": None}, channels_last=True, activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("channels", [16, 21], ids=["whole", "ragged"])
def test_low_precision_rounds_once_at_the_end(variant, dtype, channels):
    """Everything inside is float32: the result is the float32 result of the rounded inputs, rounded once."""
    cases = (
        (scan, scan_inputs(channels=channels), {}),
        (ss2d_scan, map_inputs(channels=channels), {}),
        (
            causal_conv1d,
            {"x": normal(2, 70, channels), "weight": normal(channels, 4), "bias": normal(channels)},
            {"channels_last": True, "activation": "silu"},
        ),
    )
    for op, values, arguments in cases:
        # Parameters stay float32 under mixed precision; that the output gradient is rounded is the same for both.
        low = {k: None if v is None else v.to(torch.float32 if v.ndim < 3 else dtype) for k, v in values.items()}
        y, found = run(op, {k: v.requires_grad_() for k, v in low.items()}, "cpu", **arguments)
        wide = as_leaves(low, torch.float32)
        expected = op(**wide, backend="cpu", **arguments)
        assert y.dtype == dtype
        assert torch.equal(y, expected.to(dtype))
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        gradients = torch.autograd.grad(expected, list(wide.values()), grad_y.float())
        for (name, gradient), reference in zip(found.items(), gradients, strict=True):
            assert gradient.dtype == low[name].dtype
            assert torch.equal(gradient, reference.to(gradient.dtype)), name


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e9, 6e-8, 2.9e-8, 3.1e-8, 6.1e-5, 1e-10, float("inf")]
)
def test_half_precision_conversion_equals_that_of_torch(variant, value):
    """A convolution with the single tap 1 passes numbers through: loads and stores convert exactly as PyTorch does."""
    x = torch.tensor([value, -value, 1.0009766 * value]).view(1, 3, 1)
    one = torch.ones(1, 1)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = x.to(dtype)
        assert torch.equal(causal_conv1d(rounded, one, channels_last=True, backend="cpu"), rounded)
        # Float32 weights times low-precision data round to the type of the data.
        y = causal_conv1d(torch.ones(1, 3, 1, dtype=dtype), x.flatten()[:1].view(1, 1), channels_last=True)
        assert torch.equal(y, x.flatten()[:1].to(dtype).expand(3).view(1, 3, 1))


def test_scan_slices_of_projections_need_no_copy_and_match(variant):
    """Channel slices of a projection, a broadcast batch and a flipped sequence are read where they lie."""
    projection = normal(2, 70, 16 + 16 + 40 + 40).float()
    u, delta, B, C = projection.split([40, 40, 16, 16], dim=-1)
    A = -torch.rand(40, 16)
    y = selective_scan(u, delta, A, B, C, delta_softplus=True, channels_last=True, backend="cpu")
    dense = [t.contiguous() for t in (u, delta, A, B, C)]
    assert torch.equal(y, selective_scan(*dense, delta_softplus=True, channels_last=True, backend="cpu"))
    wide = [t[:1].expand(3, -1, -1) for t in (u, delta, B, C)]
    y3 = selective_scan(wide[0], wide[1], A, *wide[2:], delta_softplus=True, channels_last=True, backend="cpu")
    assert torch.equal(y3, y[:1].expand(3, -1, -1))


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_results_do_not_depend_on_the_number_of_threads(variant, threads, num_threads):
    cases = (
        (scan, scan_inputs(1, 1100, 96, 2, 16), {}),
        (scan, scan_inputs(3, 2000, 200, 1, 1), {}),
        (ss2d_scan, map_inputs(1, 31, 33, 72), {}),
        (
            causal_conv1d,
            {"x": normal(2, 5000, 96), "weight": normal(96, 4), "bias": normal(96)},
            {"channels_last": True, "activation": "silu"},
        ),
    )
    for op, values, arguments in cases:
        inputs = as_leaves(values, torch.float32)
        threads(1)
        y, alone = run(op, inputs, "cpu", **arguments)
        threads(num_threads)
        again, together = run(op, inputs, "cpu", **arguments)
        assert torch.equal(y, again)
        for name, gradient in alone.items():
            assert torch.equal(gradient, together[name]), name


# Results of 8 MB and more are written past the caches, in whole lines; those of their parts are not.
@pytest.mark.parametrize("channels", [240, 248, 241], ids=["lines", "halves-of-lines", "unaligned"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_large_scans_of_one_state_equal_those_of_their_parts(variant, threads, channels, gated):
    threads(2)
    values = {k: v.float() for k, v in scan_inputs(2, 5000, channels, 1, 1).items() if gated or k != "z"}
    sequences = [k for k, v in values.items() if v.ndim > 2]

    def scan_of(batch):
        return scan(backend="cpu", **{k: v[batch] if k in sequences else v for k, v in values.items()})

    assert torch.equal(scan_of(slice(2)), torch.cat([scan_of(slice(1)), scan_of(slice(1, 2))]))


@pytest.mark.parametrize("channels", [256, 264, 257], ids=["lines", "halves-of-lines", "unaligned"])
@pytest.mark.parametrize("activation", ["silu", None])
def test_large_convolutions_equal_those_of_their_parts(variant, threads, channels, activation):
    threads(2)
    x, weight, bias = (normal(*size).float() for size in ((2, 4500, channels), (channels, 4), (channels,)))

    def convolve(x):
        return causal_conv1d(x, weight, bias, activation, channels_last=True, backend="cpu")

    assert torch.equal(convolve(x), torch.cat([convolve(x[:1]), convolve(x[1:])]))


def test_callers_in_many_python_threads_get_their_own_results(threads):
    threads(2)
    inputs = [as_leaves(scan_inputs(1, 900, 80), torch.float32) for _ in range(6)]
    expected = [run(scan, i, "cpu") for i in inputs]
    failures = []

    def work(k):
        for _ in range(5):
            y, found = run(scan, inputs[k], "cpu")
            same = torch.equal(y, expected[k][0]) and all(torch.equal(found[n], g) for n, g in expected[k][1].items())
            if not same:
                failures.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not any(worker.is_alive() for worker in workers)
    assert not failures


def _scan_in_child(queue, inputs):
    torch.set_num_threads(2)
    y = selective_scan(**inputs, delta_softplus=True, channels_last=True, backend="cpu")
    # Summed by NumPy: PyTorch's own sum waits for the OpenMP threads of the parent for ever.
    queue.put(float(y.numpy().sum()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_scan_after_the_parent_has(threads, method):
    """The pool of the parent does not survive a fork; a child that waited for it would hang."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    threads(2)
    inputs = {k: v.float() for k, v in scan_inputs(1, 1500, 64).items()}
    expected = float(scan(**inputs, backend="cpu").numpy().sum())
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_scan_in_child, args=(queue, inputs))
    child.start()
    try:
        result = queue.get(timeout=60)
    finally:
        child.join(10)
        child.kill()
    assert child.exitcode == 0
    assert result == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_children_forked_while_other_threads_scan_compute_the_same(threads):
    threads(2)
    inputs = {k: v.float() for k, v in scan_inputs(1, 1500, 64).items()}
    expected, stop = scan(**inputs, backend="cpu"), threading.Event()

    def work():
        while not stop.is_set():
            scan(**inputs, backend="cpu")

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(5):
            child = os.fork()
            if not child:
                signal.alarm(30)  # ends it if it hangs
                os._exit(not (scan(**inputs, backend="cpu").numpy() == expected.numpy()).all())
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for worker in workers:
            worker.join(60)


class Scans(torch.utils.data.Dataset):
    """Items that a layer with scans makes out of their numbers."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 4

    @torch.no_grad()
    def __getitem__(self, index):
        return self.layer(torch.full((1, 150, 8), 0.1 * (index + 1)))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader_scan(threads, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    threads(1)  # OpenMP of PyTorch does not survive a fork
    items = Scans(MambaMixer(8))
    expected = [items[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(items, None, num_workers=1, multiprocessing_context=method, timeout=120)
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_scan_lets_values_that_are_not_finite_through(variant, name, value):
    """What the definition makes NaN or infinite is so here; the rest of the output stays finite and right."""
    values = scan_inputs(1, 70, 20)
    index = {"A": (3, 2), "D": (3,), "delta_bias": (3,)}.get(name, (0, 5, 3) if name in "u delta z" else (0, 5, 0, 3))
    values[name][index] = value
    y = scan(**{k: v.float() for k, v in values.items()}, backend="cpu")
    expected = scan(**{k: v.float() for k, v in values.items()}, backend="reference")
    bad = ~torch.isfinite(expected)
    assert torch.equal(~torch.isfinite(y), bad)
    torch.testing.assert_close(y[~bad], expected[~bad], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", [scan, ss2d_scan, conv], ids=["scan", "map", "conv"])
def test_what_is_not_finite_stays_where_the_definition_has_it(variant, op):
    """In outputs for each argument; in gradients for NaN only: infinity times zero depends on the order of products."""
    values = {
        scan: scan_inputs(2, 70, 20, d_state=4),
        ss2d_scan: map_inputs(2, 9, 8, 20, d_state=4),
        conv: {"x": normal(2, 70, 20), "weight": normal(20, 4), "bias": normal(20)},
    }[op]
    for name in values:
        for value in (float("nan"), float("inf"), -float("inf")):
            spoiled = {k: v.float() for k, v in values.items()}
            spoiled[name] = spoiled[name].clone()
            spoiled[name].view(-1)[spoiled[name].numel() // 2] = value
            results = [run(op, as_leaves(spoiled, torch.float32), backend) for backend in ("cpu", "reference")]
            (y, found), (expected_y, expected) = results
            pairs = {"y": (y, expected_y)}
            if value != value:
                pairs |= {k: (found[k], expected[k]) for k in found}
                assert not torch.isfinite(y).all(), name
            for key, (ours, theirs) in pairs.items():
                if op is conv and key == "x":  # the definition pads in front only, so NaN weights spare its last steps
                    continue
                bad = ~torch.isfinite(theirs)
                assert torch.equal(~torch.isfinite(ours), bad), (name, value, key)
                torch.testing.assert_close(ours[~bad], theirs[~bad], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("d_state", [1, 16])
@pytest.mark.parametrize("strength", [1e1, 1e3, 1e4, 1e30], ids=lambda v: f"{v:g}")
def test_scan_strong_decay_stays_finite_and_right(variant, strength, d_state):
    """delta * A down to -1e4 and far beyond, where 2^x leaves the range of float32."""
    values = {k: v.float() for k, v in scan_inputs(1, 100, 20, d_state=d_state).items()}
    values["A"] = values["A"] * strength
    values["delta"] = values["delta"].abs() + 1
    y, found = run(scan, as_leaves(values, torch.float32), "cpu")
    expected_y, expected = run(scan, as_leaves(values, torch.float64), "reference")
    assert error_of(y, expected_y) <= FORWARD_TOLERANCE
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        if expected[name].abs().max() > 1e-30:
            assert error_of(gradient, expected[name]) <= GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("name", ["delta", "A"])
def test_a_nan_does_not_hide_a_strong_decay_beside_it(variant, name):
    """A chunk is looked through for exponents beyond 2^-126; channels 4, 8 or 16 apart share a lane there."""
    values = {k: v.float() for k, v in scan_inputs(1, 40, 32, d_state=8).items()}
    values["delta"][..., 3::4] += 300
    values[name][(0, 5, 3) if name == "delta" else (3, 0)] = float("nan")
    y, found = run(scan, as_leaves(values, torch.float32), "cpu")
    expected_y, expected = run(scan, as_leaves(values, torch.float64), "reference")
    good = torch.isfinite(expected_y)
    assert good.sum() > 1000 and torch.equal(torch.isfinite(y), good)
    assert error_of(y[good], expected_y[good]) <= FORWARD_TOLERANCE
    for key in ("u", "delta", "A"):
        good = torch.isfinite(expected[key])
        assert good.any() and torch.equal(torch.isfinite(found[key]), good), key
        assert error_of(found[key][good], expected[key][good]) <= GRADIENT_TOLERANCE, key


def test_scan_growing_state_overflows_to_infinity(variant):
    """Positive A is allowed; its overflow is infinity, not a wrapped exponent."""
    ones = torch.ones(1, 300, 16)
    y = selective_scan(
        ones, ones, torch.full((16, 4), 50.0), torch.ones(1, 300, 4), torch.ones(1, 300, 4), channels_last=True
    )
    expected = selective_scan(
        *(ones, ones, torch.full((16, 4), 50.0), torch.ones(1, 300, 4), torch.ones(1, 300, 4)),
        channels_last=True,
        backend="reference",
    )
    assert torch.isinf(y[0, -1]).all()
    assert torch.equal(torch.isinf(y), torch.isinf(expected))


def test_long_memory_carries_no_bias(variant):
    """Decays around 1 - 2e-5: an exponential that is off by 1e-7 in the same direction at every step would be seen."""
    length = 3000
    values = {
        "u": torch.ones(1, length, 16),
        "delta": 4e-3 * torch.rand(1, length, 16),
        "A": torch.full((16, 4), -1e-2),
        "B": torch.ones(1, length, 1, 4),
        "C": torch.ones(1, length, 1, 4),
    }
    y = selective_scan(**values, channels_last=True, backend="cpu")
    exact = selective_scan(**{k: v.double() for k, v in values.items()}, channels_last=True, backend="reference")
    assert error_of(y, exact) <= 2e-5  # 3000 steps off by 1e-7 would make 1.5e-4


@pytest.mark.parametrize("d_state", [1, 16])
def test_sums_over_long_sequences_keep_the_tolerance(d_state):
    """As long as a map of 48 x 48 x 48: one by one onto their sum, the terms of A, D and the bias would round a lot."""
    generator = torch.Generator().manual_seed(1)
    length, channels = 110_592, 16

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    values = [
        draw(1, length, channels),
        0.5 * draw(1, length, channels),
        -torch.arange(1, d_state + 1.0).repeat(channels, 1),
    ]
    values += [draw(1, length, 1, d_state), draw(1, length, 1, d_state), draw(channels), None, draw(channels) - 4]
    grad_y, weight = draw(1, length, channels), draw(channels, 4)

    def results(backend, dtype):
        wide = [None if v is None else v.to(dtype) for v in values]
        y, states = backend.scan_forward(*wide, True, True)
        found = [y, *backend.scan_backward(grad_y.to(dtype), states, *wide, True)]
        x, bias = wide[0], wide[5]
        found += backend.conv_backward(grad_y.to(dtype), x, weight.to(dtype), bias, True)
        return [g for g in found if g is not None]

    expected = results(get_backend("torch"), torch.float64)
    for name in VARIANTS:
        with use_variant(name):
            y, *gradients = results(get_backend("cpu"), torch.float32)
        assert error_of(y, expected[0]) <= FORWARD_TOLERANCE
        errors = [error_of(g, reference) for g, reference in zip(gradients, expected[1:], strict=True)]
        assert max(errors) <= GRADIENT_TOLERANCE, (name, errors)


def test_refusals_name_the_reason():
    values = {k: v for k, v in scan_inputs(1, 4, 2, d_state=2).items()}
    with pytest.raises(BackendError, match="float32, got float64"):
        scan(**values, backend="cpu")
    wide = {k: v.float() for k, v in scan_inputs(1, 4, 2, d_state=257).items()}
    with pytest.raises(BackendError, match="at most 256 states, got N=257"):
        scan(**wide, backend="cpu")
    with pytest.raises(BackendError, match="at most 64 taps, got W=65"):
        causal_conv1d(torch.ones(1, 4, 2), torch.ones(2, 65), channels_last=True, backend="cpu")


def test_the_automatic_choice_on_cpu_tensors_is_the_c_library():
    assert get_backend("cpu").availability().ok
    values = {k: v.float() for k, v in scan_inputs().items()}
    assert torch.equal(scan(**values), scan(**values, backend="cpu"))


@pytest.mark.parametrize("name", ["avx9", "AVX2"])
def test_unknown_instruction_set_is_an_error_that_lists_the_known(name):
    with pytest.raises(BackendError, match=f"{name}.*baseline"), use_variant(name):
        pass


def test_instruction_set_follows_the_environment_variable():
    code = "from monai_mamba.ops import get_backend; print(get_backend('cpu').availability())"
    for name, expected in (("baseline", "ok=True"), ("avx9", 'ok=False, reason="MONAI_MAMBA_CPU_VARIANT: the')):
        environment = {**os.environ, cpu_library.VARIANT_VARIABLE: name}
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert expected in out.stdout and name in out.stdout


def is_in_huge_pages(address):
    """Whether pages of 2 MB have been asked for at an address."""
    if sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("no transparent huge pages here")
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
        begin, end = (int(bound, 16) for bound in mapping.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            return " hg" in mapping[mapping.index("VmFlags") :]
    raise AssertionError("the address lies in no mapping")


def large_scan():
    """Arguments of a scan with an output of 42 MB: from 32 MB on, memory is new at every call."""
    u = torch.zeros(1, 2**15, 320)
    matrix, rates = torch.ones(1, 2**15, 1, 1), -torch.ones(320, 1)
    return u, u, rates, matrix, matrix


@pytest.mark.skipif(sys.platform != "linux", reason="mappings as Linux has them")
def test_large_outputs_ask_for_huge_pages(monkeypatch):
    """In a mapping of their own, which malloc gives them unless earlier tests have left as much of the heap."""
    inputs = large_scan()
    mapping = mmap.mmap(-1, 4 * inputs[0].numel(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapping, dtype=torch.float32).view(inputs[0].shape)
    monkeypatch.setattr(cpu, "_new", lambda t, dtype=None: memory)
    y = selective_scan(*inputs, channels_last=True, backend="cpu")
    assert y.data_ptr() == memory.data_ptr()
    assert is_in_huge_pages(y.data_ptr() + 2 * y.numel())


@pytest.mark.skipif(sys.platform != "linux", reason="a heap as Linux has it")
def test_large_outputs_out_of_the_heap_do_not():
    """The heap would keep the large pages, and small arrays in it would take 2 MB each."""
    libc, size = ctypes.CDLL(None), 48 << 20
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, (ctypes.c_ssize_t,)
    begin = libc.sbrk(size)
    u, delta, A, B, C = large_scan()
    try:
        memory = torch.frombuffer((ctypes.c_char * size).from_address(begin), dtype=torch.float32)
        y = memory[: u.numel()].view(u.shape)
        y.fill_(1)
        cpu._run("scan_forward", cpu._sequence_job(u, delta, A, B, C, None, None, None, False, None, y))
        assert (y == 0).all()
        assert not is_in_huge_pages(begin + size // 2)
    finally:
        libc.madvise(ctypes.c_void_p(-(-begin // 4096) * 4096), ctypes.c_size_t(size - 4096), 4)  # gives the pages back


def test_subnormal_numbers_survive_in_the_calling_thread():
    """The kernels flush subnormal numbers for themselves only."""
    scan(**{k: v.float() for k, v in scan_inputs().items()}, backend="cpu")
    assert (torch.tensor([1e-39]) * 0.5).item() > 0


def test_jobs_are_the_structures_of_the_library():
    """Numbers packed in order against the names of the fields."""
    batch, height, width, channels, states = 2, 3, 5, 7, 4
    x, delta = torch.zeros(batch, height, width, channels), torch.zeros(batch, height, width, 2, channels)
    B, C = (torch.zeros(batch, height, width, 2, states, dtype=t) for t in (torch.bfloat16, torch.float16))
    A, D, bias, saved = torch.zeros(2, channels, states), torch.zeros(14), torch.zeros(14), torch.zeros(1)
    routes = ("column", "row_reversed")
    gradients = tuple(range(100, 125))
    packed = cpu._map_job(x, delta, A, B, C, D, bias, routes, True, saved, x, gradients)
    job = cpu_library.ScanJob.from_buffer_copy(packed)
    sizes = (job.batch, job.length, job.groups, job.channels, job.d_state, job.height, job.width)
    assert sizes == (2, 15, 2, 7, 4, 3, 5) and (job.softplus, job.merge) == (1, 1)
    assert list(job.routes[:3]) == [1, 2, 0]
    pixel = 2 * states
    for view, expected in (
        (job.u, (x.data_ptr(), 15 * 7, 7, 0, 0)),
        (job.delta, (delta.data_ptr(), 15 * 14, 14, 7, 0)),
        (job.B, (B.data_ptr(), 15 * pixel, pixel, states, 1)),
        (job.C, (C.data_ptr(), 15 * pixel, pixel, states, 2)),
        (job.z, (None, 0, 0, 0, 0)),
        (job.y, (x.data_ptr(), 15 * 7, 7, 0, 0)),
        (job.grad_y, (100, 101, 102, 103, 104)),
        (job.grad_z, (115, 116, 117, 118, 119)),
    ):
        assert (view.data, view.batch, view.step, view.group, view.dtype) == expected
    assert (job.A, job.D, job.delta_bias, job.states) == tuple(t.data_ptr() for t in (A, D, bias, saved))
    found = (job.grad_A, job.grad_D, job.grad_delta_bias, job.grad_B, job.grad_C)
    assert found == (120, 121, 122, 123, 124)

    u, matrix = torch.zeros(2, 9, 6), torch.zeros(2, 9, 3, 4)
    job = cpu_library.ScanJob.from_buffer_copy(
        cpu._sequence_job(u, u, A, matrix, matrix, D, u, None, False, None, u[:, :, :1])
    )
    sizes = (job.batch, job.length, job.groups, job.channels, job.d_state, job.height, job.width)
    assert sizes == (2, 9, 3, 2, 4, 1, 9) and (job.softplus, job.merge) == (0, 0)
    assert (job.z.data, job.z.batch, job.z.step, job.z.group) == (u.data_ptr(), 54, 6, 2)
    assert (job.D, job.delta_bias, job.states, job.grad_y.data) == (D.data_ptr(), None, None, None)

    weight, bias = torch.zeros(6, 4), torch.zeros(6)
    job = cpu_library.ConvJob.from_buffer_copy(cpu._conv_job(u, weight, None, True, None, u, u, weight, bias))
    assert (job.batch, job.length, job.channels, job.taps, job.silu) == (2, 9, 6, 4, 1)
    assert (job.x.data, job.y.data, job.grad_x.data) == (u.data_ptr(), None, u.data_ptr())
    assert (job.weight, job.bias, job.grad_weight) == (weight.data_ptr(), None, weight.data_ptr())
    assert job.grad_bias == bias.data_ptr()


@pytest.mark.parametrize("size", [(1, 7), (7, 1), (4, 6)], ids=str)
def test_map_slices_of_projections_need_no_copy_and_match(variant, size, monkeypatch):
    """Channel slices of maps are read where they lie; maps whose rows lie apart otherwise are copied."""
    values = {k: v.float() for k, v in map_inputs(height=size[0], width=size[1], num_routes=1).items()}
    expected = ss2d_scan(**values, routes=("column",), backend="cpu")
    wide = {k: torch.stack([v, v], -2).flatten(-2) for k, v in values.items() if k in ("x", "delta", "B", "C")}
    slices = values | {k: v[..., v.shape[-1] // 2 :] for k, v in wide.items()}
    assert not any(slices[k].is_contiguous() for k in wide)
    transposed = values | {k: values[k].transpose(1, 2).contiguous().transpose(1, 2) for k in wide}
    assert torch.equal(ss2d_scan(**transposed, routes=("column",), backend="cpu"), expected)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)  # from here on nothing may be copied
    assert all(cpu._even(slices[k]) is slices[k] for k in wide)
    monkeypatch.undo()
    assert torch.equal(ss2d_scan(**slices, routes=("column",), backend="cpu"), expected)


def resident(name):
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def extra_memory(call):
    """Bytes that a call needs at its peak beyond the arrays that it returns."""
    call()  # threads take memory of their own for the first time
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    except OSError as error:
        pytest.skip(f"the peak of resident memory cannot be reset: {error}")
    before = resident("VmRSS")
    found = call()
    return resident("VmHWM") - before - sum(t.numel() * t.element_size() for t in found if t is not None)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read the Linux way")
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("batch", "length", "channels"), [(1, 8192, 256), (48, 64, 512)], ids=["long", "batch"])
def test_passes_need_little_memory_beyond_their_results(threads, batch, length, channels, num_threads):
    """Backward, sums of B and C over parts of the channels, and of A over the batch, are added up as the pass goes on.

    Kept to the end they would take 2 MB for the long sequence and 1.8 MB for the large batch.
    """
    values = scan_inputs(batch, length, channels)
    values = [None if v is None else v.float() for v in values.values()]
    backend = get_backend("cpu")
    threads(num_threads)
    assert extra_memory(lambda: (backend.scan_forward(*values, True, False)[0],)) < num_threads << 20
    y, states = backend.scan_forward(*values, True, True)
    assert extra_memory(lambda: backend.scan_backward(y, states, *values, True)) < 1 << 20
