"""The Triton kernels without a GPU: their arithmetic in Triton's interpreter, and their code for three devices."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from monai_mamba.ops.backends import Call
from monai_mamba.ops.triton_backend import TritonBackend, _sequence, num_segments
from tests.benchmark_scripts import load_benchmark

ROOT = Path(__file__).resolve().parents[2]
_SCAN = {"segment_ends", "carry", "forward", "segment_gradients", "backward"}
_CONV = {"conv_forward", "conv_backward_filter", "conv_backward_input"}


def _release(package: str) -> tuple[int, ...]:
    return tuple(map(int, importlib.import_module(package).__version__.split(".")[:2]))


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# The interpreter must be chosen before Triton is imported, hence a process of its own. It takes about 20 ms a step.
INTERPRET = """
import sys
import torch
from monai_mamba.ops.chunked import TorchBackend
from monai_mamba.ops.triton_backend import TritonBackend, _forward, _sequence

triton, oracle = TritonBackend(), TorchBackend()
torch.manual_seed(0)


def draw(*shape):
    return torch.randn(*shape)


def check(found, expected):
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), k
        assert a is None or a.shape == b.shape, k
        if a is not None and a.numel():  # up to 64 steps no states are kept
            scale = b.abs().max().clamp_min(1e-20) if b.abs().max() > 0 else 1
            rounding = 0 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps / 2
            assert ((a.double() - b).abs().max() / scale) <= 3e-6 + rounding, (k, a, b)


def scan(length, channels, groups, states, present, dtype=torch.float32):
    values = [draw(1, length, channels), draw(1, length, channels), -4 * torch.rand(channels, states)]
    values += [draw(1, length, groups, states), draw(1, length, groups, states)]
    values += [v if present else None for v in (draw(channels), draw(1, length, channels), draw(channels) - 1)]
    # As autocast has them: not A, D and the bias.
    values = [v if v is None or k in (2, 5, 7) else v.to(dtype) for k, v in enumerate(values)]
    wide = [None if v is None else v.double() for v in values]
    grad = draw(1, length, channels).to(dtype)
    y, states_found = triton.scan_forward(*values, True, True)
    expected, states_expected = oracle.scan_forward(*wide, True, True)
    assert y.dtype == dtype
    check((y, states_found), (expected, states_expected))
    found = triton.scan_backward(grad, states_found, *values, True)
    check(found, oracle.scan_backward(grad.double(), states_expected, *wide, True))


def ss2d(height, width, routes):
    values = [draw(1, height, width, 3), draw(1, height, width, len(routes), 3), -4 * torch.rand(len(routes), 3, 2)]
    values += [draw(1, height, width, len(routes), 2) for _ in range(2)] + [draw(len(routes), 3) for _ in range(2)]
    wide, grad = [v.double() for v in values], draw(1, height, width, 3)
    y, states = triton.ss2d_forward(*values, routes, True, True)
    expected, states_expected = oracle.ss2d_forward(*wide, routes, True, True)
    check((y, states), (expected, states_expected))
    found = triton.ss2d_backward(grad, states, *values, routes, True)
    check(found, oracle.ss2d_backward(grad.double(), states_expected, *wide, routes, True))


def split():
    # Weak decay, so that the carried state matters.
    values = [draw(1, 66, 2), 0.1 * torch.rand(1, 66, 2), -torch.rand(2, 2), draw(1, 66, 1, 2), draw(1, 66, 1, 2)]
    problem = _sequence(*values, None, None, None, False)
    whole, states = _forward(problem, torch.float32, True, 1)
    parts, states_of_parts = _forward(problem, torch.float32, True, 2)
    assert not torch.equal(whole[:, 64:], torch.zeros_like(whole[:, 64:]))
    check((parts, states_of_parts), (whole.double(), states.double()))


def convolution(taps, present, silu):
    # Two tiles of steps and of channels; the input is a part of something wider, as the first half of a projection is.
    length, channels = 37, 70
    x, weight = draw(2, length, 2 * channels)[..., :channels], draw(channels, taps)
    bias, grad = draw(channels) if present else None, draw(2, length, channels)
    wide = [None if v is None else v.double() for v in (x, weight, bias)]
    check([triton.conv_forward(x, weight, bias, silu)], [oracle.conv_forward(*wide, silu)])
    found = triton.conv_backward(grad, x, weight, bias, silu)
    check(found, oracle.conv_backward(grad.double(), *wide, silu))


{"scan": lambda: scan(6, 3, 1, 2, True), "chunks": lambda: scan(66, 2, 1, 1, False),
 "groups": lambda: scan(3, 4, 2, 3, True),
 "bfloat16": lambda: scan(3, 3, 1, 2, True, torch.bfloat16), "split": split,
 "map": lambda: ss2d(2, 3, ("row", "column", "row_reversed", "column_reversed")),
 "routes": lambda: ss2d(3, 2, ("column_reversed", "row")), "conv": lambda: convolution(4, True, True),
 "conv-plain": lambda: convolution(3, False, False)}[sys.argv[1]]()
print("ok")
"""


@needs_triton
@pytest.mark.parametrize(
    "case",
    [
        "scan",
        "groups",
        "bfloat16",
        "split",
        "map",
        "routes",
        "conv",
        "conv-plain",
        pytest.param("chunks", marks=pytest.mark.slow),
    ],
)
def test_kernels_in_the_interpreter_match_float64(case):
    if not case.startswith("conv") and _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 reads numbers from arrays in a way that NumPy 2.4 refuses")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", INTERPRET, case], env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.stdout.strip() == "ok", run.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize(
    ("problem", "dtype"),
    [
        *(("MedMamba-T stage 1", "float32"), ("nnMamba 32^3", "float32"), ("nnMamba 32^3, convolution", "float32")),
        *(("VMamba-T stage 1", "bfloat16"), ("ragged", "bfloat16")),
    ],
)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_a_gpu(problem, dtype, target):
    """No spills; in the forward passes no exchange between lanes, 16 bytes of B and C at a time, 32 warps that fit."""
    script = load_benchmark("triton_kernels")
    try:
        rows = script.rows(problem, getattr(torch, dtype), target)
    except script.NoDisassembler as error:
        pytest.skip(str(error))
    except Exception as error:
        if target == "gfx942" and ("linker" in str(error) or "ld.lld" in str(error)):
            pytest.skip(f"this Triton brings no linker for {target}, and the system none that is new enough: {error}")
        raise
    assert {row["kernel"].split(",")[0] for row in rows} == (_CONV if "convolution" in problem else _SCAN)
    is_measured = _release("triton") >= (3, 8)  # older ones take some registers more
    for row in rows:
        assert row["spill_bytes"] == 0, row
        name, *constants = row["kernel"].split(", ")
        if target == "gfx942" or name not in ("forward", "segment_ends", "segment_gradients"):
            continue
        (loop,) = row["loops"]
        assert loop["exchanges"] == 0, row
        matrices = 2 if name == "forward" else 1
        assert "VMamba" in problem or loop["loads"][16] in (4 * matrices, 3 * matrices), (
            row
        )  # ragged: the 13th comes alone
        assert loop["loads"][min(loop["loads"])] <= 4, row
        if "keeps states" not in constants:
            assert row["registers"] <= (64 if is_measured else 72), row
        elif is_measured:
            assert row["registers"] <= 76 and row["exchanges"] == 0, row


@needs_triton
def test_kernels_compile_for_sizes_that_are_constants_to_triton():
    """Numbers that are 1 become constants, which only the compiler sees, not the interpreter."""
    script = load_benchmark("triton_kernels")
    smallest = (
        script.Scan(1, (1, 1), 4, 1, 1, 1),
        script.Scan(1, (1,), 1, 1, 1, 1, gate=True),
        script.Scan(2, (1, 200), 2, 3, 2, 1),
        script.Convolution(1, 1, 1, 1),
    )
    for problem in smallest:
        launches = script.record_launches(lambda problem=problem: problem.run(TritonBackend(), torch.float16))
        for launch in {launch.label: launch for launch in launches}.values():
            assert script.compile_launch(launch, "sm_90").asm["cubin"], (problem, launch.label)


@pytest.mark.parametrize(
    ("programs", "chunks", "expected"),
    [(12, 49, 25), (384, 49, 1), (264, 49, 1), (4, 1728, 124), (1, 3, 1), (100, 13, 5)],
)
def test_split_fills_the_device_or_is_left_alone(programs, chunks, expected):
    segments = num_segments(programs, chunks, processors=132)
    assert segments == expected
    # Segments are whole and none is empty.
    per_segment = -(-chunks // segments)
    assert (segments - 1) * per_segment < chunks <= segments * per_segment


@pytest.mark.parametrize(("length", "is_wide"), [(2**20 - 1, False), (2**20, True)])
def test_offsets_take_64_bits_where_B_and_C_side_by_side_need_them(length, is_wide):
    u, matrix = (torch.empty(1, length, 4, n, device="meta") for n in (8, 200))  # 200 states are filled up to 256
    problem = _sequence(u.flatten(2), u.flatten(2), torch.empty(32, 200), matrix, matrix, None, None, None, True)
    assert problem.constants()["WIDE"] == is_wide


@needs_triton
@pytest.mark.parametrize("shape", [(1, 8_000_000, 96), (70_000, 65, 32)], ids=["long", "many"])
def test_no_launch_is_larger_than_a_grid_may_be(shape):
    batch, length, channels = shape
    u, matrix = torch.empty(shape, device="meta"), torch.empty(batch, length, 1, 4, device="meta")
    A, vector = torch.empty(channels, 4, device="meta"), torch.empty(channels, device="meta")
    backend, values = TritonBackend(), (u, u, A, matrix, matrix, vector, u, vector)

    def call():
        _, states = backend.scan_forward(*values, True, True)
        backend.scan_backward(u, states, *values, True)
        backend.conv_forward(u, A, vector, True)
        backend.conv_backward(u, u, A, vector, True)

    launches = load_benchmark("triton_kernels").record_launches(call)
    assert len({launch.kernel for launch in launches}) >= 7
    for launch in launches:
        first, *others = launch.grid
        assert first < 2**31 and all(n <= 65_535 for n in others), (launch.kernel, launch.grid)


def test_availability_and_refusals_have_reasons():
    backend = TritonBackend()
    if not torch.cuda.is_available():
        assert "triton" in backend.availability().reason or "device" in backend.availability().reason
    call = Call("selective_scan", "cuda", torch.float64, 1, 8, 8, 1, 16)
    assert "float64" in backend.refusal(call)
    assert "N=257" in backend.refusal(Call("selective_scan", "cuda", torch.float32, 1, 8, 8, 1, 257))
    assert backend.refusal(Call("ss2d_scan", "cuda", torch.bfloat16, 1, 8, 8, 4, 16)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 3, 64, 1000])
def test_convolution_on_the_gpu_matches_float64(length):
    from monai_mamba.ops import causal_conv1d

    values = [torch.randn(2, length, 96, device="cuda"), torch.randn(96, 4, device="cuda"), torch.randn(96).cuda()]
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = [v.to(dtype).requires_grad_() for v in values]
        y = causal_conv1d(*leaves, "silu", channels_last=True, backend=backend)
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 64, 65, 1000, 5000])
@pytest.mark.parametrize("d_state", [1, 8, 16, 33])
def test_scan_on_the_gpu_matches_float64(length, d_state):
    from monai_mamba.ops import selective_scan

    def draw(*shape):
        return torch.randn(*shape, device="cuda")

    values = [draw(2, length, 96), draw(2, length, 96), -4 * torch.rand(96, d_state, device="cuda")]
    values += [draw(2, length, 2, d_state), draw(2, length, 2, d_state), draw(96), draw(2, length, 96), draw(96) - 2]
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = [v.to(dtype).requires_grad_() for v in values]
        y = selective_scan(*leaves, delta_softplus=True, channels_last=True, backend=backend)
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
