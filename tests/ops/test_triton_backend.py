"""The Triton kernels without a GPU: their arithmetic in Triton's interpreter, and their code for three devices."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from monai_mamba.ops.backends import Call
from monai_mamba.ops.triton_backend import TritonBackend, num_segments

ROOT = Path(__file__).resolve().parents[2]


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
            assert ((a.double() - b).abs().max() / scale) <= 3e-6, (k, a, b)


def scan(length, channels, groups, states, present):
    values = [draw(1, length, channels), draw(1, length, channels), -4 * torch.rand(channels, states)]
    values += [draw(1, length, groups, states), draw(1, length, groups, states)]
    values += [v if present else None for v in (draw(channels), draw(1, length, channels), draw(channels) - 1)]
    wide = [None if v is None else v.double() for v in values]
    grad = draw(1, length, channels)
    y, states_found = triton.scan_forward(*values, True, True)
    expected, states_expected = oracle.scan_forward(*wide, True, True)
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
    whole, _ = _forward(problem, torch.float32, False, 1)
    parts, _ = _forward(problem, torch.float32, False, 2)
    assert not torch.equal(whole[:, 64:], torch.zeros_like(whole[:, 64:]))
    check((parts,), (whole.double(),))


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
 "groups": lambda: scan(3, 4, 2, 3, True), "split": split,
 "map": lambda: ss2d(2, 3, ("row", "column", "row_reversed", "column_reversed")),
 "routes": lambda: ss2d(3, 2, ("column_reversed", "row")), "conv": lambda: convolution(4, True, True),
 "conv-plain": lambda: convolution(3, False, False)}[sys.argv[1]]()
print("ok")
"""


@needs_triton
@pytest.mark.parametrize(
    "case",
    ["scan", "groups", "split", "map", "routes", "conv", "conv-plain", pytest.param("chunks", marks=pytest.mark.slow)],
)
def test_kernels_in_the_interpreter_match_float64(case):
    if not case.startswith("conv") and _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 reads numbers from arrays in a way that NumPy 2.4 refuses")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", INTERPRET, case], env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.stdout.strip() == "ok", run.stderr[-2000:]


_CONSTANTS = {
    **{"N": 16, "NP": 16, "BD": 32, "SOFTPLUS": True, "BIAS": True, "MAPPED": True, "WIDE": False, "SKIP": True},
    **{"GATE": False, "SPLIT": True, "SAVE": False, "BACKWARD": True, "WITH_Y": False, "SILU": True, "W": 4, "BL": 32},
}
_POINTERS = (
    *("delta", "u", "B", "C", "z", "A", "D", "bias", "starts", "ends", "sums", "y", "states", "incoming", "grad"),
    *("trail", "grad_u", "grad_delta", "grad_A", "grad_B", "grad_C"),
)
_CONV_POINTERS = ("x", "weight", "bias", "y", "grad_y", "grad", "grad_x", "grad_weight", "grad_bias")
_CONV = ("conv_forward", "conv_backward_filter", "conv_backward_input")


def _compile(name, target, is_aligned):
    """Compile as a call would: what is divisible by 16 is known to be, unless the kernel wants not to know."""
    import triton
    from triton.compiler import ASTSource

    from monai_mamba.ops import triton_kernels

    kernel = getattr(triton_kernels, name)
    parameters = kernel.params
    pointers = _CONV_POINTERS if name in _CONV else _POINTERS
    signature = {p.name: "*fp32" if p.name in pointers else "*i32" if p.name == "routes" else "i32" for p in parameters}
    constants = {p.name: _CONSTANTS[p.name] for p in parameters if p.is_constexpr}
    signature.update(dict.fromkeys(constants, "constexpr"))
    if name in _CONV:
        constants["BD"] = 64
    hints = {
        (p.num,): [["tt.divisibility", 16]]
        for p in parameters
        if is_aligned and p.name not in constants and not p.do_not_specialize
    }
    source = ASTSource(kernel, signature, {(p.num,): constants[p.name] for p in parameters if p.is_constexpr}, hints)
    return triton.compile(source, target=target, options={"num_warps": 4 if name in _CONV else 1})


@needs_triton
@pytest.mark.parametrize("is_aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("name", ["segment_ends", "carry", "forward", "segment_gradients", "backward", *_CONV])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_a_gpu(name, target, is_aligned, tmp_path):
    """No spills anywhere; no exchange between lanes in the forward loop, whose sums stay inside a thread."""
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget("hip", "gfx942", 64) if target == "gfx942" else GPUTarget("cuda", int(target[3:]), 32)
    try:
        asm = _compile(name, gpu, is_aligned).asm
    except Exception as error:
        if target == "gfx942" and "linker" in str(error):
            pytest.skip(f"this Triton brings no linker for {target}: {error}")
        raise
    if target == "gfx942":
        assembly = asm["amdgcn"]
        assert re.search(r"\.vgpr_spill_count:\s+0\b", assembly)
        return
    if name in ("forward", "segment_ends", "carry", "segment_gradients"):
        assert "shfl" not in asm["ptx"]
    usage = _resource_usage(asm["cubin"], tmp_path)
    assert usage["STACK"] == 0
    # 72 registers for N = 16: 28 warps of a multiprocessor, of which a map fills a few. Triton 3.4 takes 76 once.
    limits = {"forward": 72, "segment_ends": 76 if _release("triton") < (3, 8) else 72, "segment_gradients": 80}
    assert usage["REG"] <= limits.get(name, 255)


def _resource_usage(cubin, tmp_path):
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump to read the registers with")
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    out = subprocess.run([tool, "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    line = next(line for line in out.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in re.findall(r"(\w+(?:\[\d\])?):(\d+)", line)}


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


@needs_triton
@pytest.mark.parametrize("shape", [(1, 8_000_000, 96), (70_000, 65, 32)], ids=["long", "many"])
def test_no_launch_is_larger_than_a_grid_may_be(shape, monkeypatch):
    from monai_mamba.ops import triton_kernels

    grids = {}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            grids[self.name] = grid
            return lambda *arguments, **constants: None

    for name in ("segment_ends", "carry", "forward", "segment_gradients", "backward", *_CONV):
        monkeypatch.setattr(triton_kernels, name, Recorder(name))
    batch, length, channels = shape
    u, matrix = torch.empty(shape, device="meta"), torch.empty(batch, length, 1, 4, device="meta")
    A, vector = torch.empty(channels, 4, device="meta"), torch.empty(channels, device="meta")
    backend, values = TritonBackend(), (u, u, A, matrix, matrix, vector, u, vector)
    _, states = backend.scan_forward(*values, True, True)
    backend.scan_backward(u, states, *values, True)
    backend.conv_forward(u, A, vector, True)
    backend.conv_backward(u, u, A, vector, True)
    assert len(grids) >= 7
    for name, (first, *others) in grids.items():
        assert first < 2**31 and all(n <= 65_535 for n in others), (name, first, others)


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
