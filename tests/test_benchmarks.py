"""The benchmarks of the scan run: each table of ``benchmarks/scan.py`` at small sizes, behind its gate of correctness,
and what ``benchmarks/triton_kernels.py`` reads in compiled code."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.benchmark_scripts import FOLDER, load_benchmark

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def scan(monkeypatch):
    module = load_benchmark("scan")
    small = module.Shape(1, 32, 130, 2, 4, True)
    monkeypatch.setattr(module, "SHAPES", {"small": small})
    monkeypatch.setattr(module, "MAPS", {"small": (5, 8)})
    monkeypatch.setattr(module, "CONVOLUTIONS", {"small": (33, 8)})
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield module
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


def run(module, monkeypatch, output, *arguments):
    monkeypatch.setattr(sys, "argv", ["scan.py", "--output", str(output), "--seconds", "0", *arguments])
    module.main()
    return json.loads(output.with_suffix(".json").read_text())


def test_scan_benchmark_writes_every_table_and_puts_parts_together(scan, monkeypatch, tmp_path):
    first = run(scan, monkeypatch, tmp_path / "r", "--device", "cpu", "--tables", "scan", "--variants", "baseline")
    (row,) = first["tables"]["cpu scan"]
    assert row["variant"] == "baseline" and row["forward_ms"] > 0 and row["forward_error"] <= 5e-7
    result = run(scan, monkeypatch, tmp_path / "r", "--device", "cpu", "--tables", "ss2d", "conv", "calls")
    assert len(result["tables"]["cpu scan"]) == 1
    assert {"cpu limits", "cpu scan", "cpu ss2d", "cpu conv", "cpu calls"} <= result["tables"].keys()
    assert [row["operator"] for row in result["tables"]["cpu calls"]][-1] == "layer_norm"
    for row in result["tables"]["cpu calls"][:-1]:
        assert 0 < row["kernel_us"] < row["inference_us"] < row["training_us"]
    assert len(result["commands"]) == 2
    text = (tmp_path / "r.md").read_text()
    assert "## cpu conv" in text and "small" in text


def test_loops_of_the_scan_benchmark_compute_the_scan(scan):
    """A yardstick that computed something else, or less, would flatter."""
    values = scan.inputs(scan.SHAPES["small"])
    expected, _ = scan.get_backend("torch").scan_forward(*values, True, False)
    for loop in (scan.published_loop, scan.lean_loop):
        for by_unbind in (False, True):
            found = loop(*scan.channels_first(values), by_unbind=by_unbind)
            assert torch.allclose(found.transpose(1, 2), expected, atol=1e-5)


def test_loops_take_b_and_c_of_one_group_as_published_networks_hold_them(scan):
    values = scan.inputs(scan.Shape(1, 8, 12, 1, 4, True))
    first = scan.channels_first(values)
    assert first[3].shape == (1, 4, 12)
    expected, _ = scan.get_backend("torch").scan_forward(*values, True, False)
    for loop in (scan.published_loop, scan.lean_loop):
        assert torch.allclose(loop(*first).transpose(1, 2), expected, atol=1e-5)


# The tables of a GPU on the CPU, by Triton's interpreter, to be chosen before Triton is imported. This shows that
# the script runs to its end and that its gate lets our kernels pass; the times mean nothing.
GPU_TABLES = """
import argparse, importlib.util, json, sys, types
import torch
from monai_mamba.ops import backends, triton_backend

spec = importlib.util.spec_from_file_location("benchmarks_scan", sys.argv[1])
scan = sys.modules["benchmarks_scan"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scan)
scan.SHAPES, scan.MAPS = {"small": scan.Shape(1, 2, 3, 1, 2, True)}, {"small": (2, 2)}
scan.CONVOLUTIONS = {"small": (5, 8)}
scan._PROBE_ROUNDS = 2
scan.Clock.__init__ = lambda self, device, seconds: self.__dict__.update(device="cpu", seconds=seconds)
scan.copy_bandwidth = lambda clock: {"copy_gb_per_s": 1.0}
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=1)
triton_backend.TritonBackend.availability = lambda self: backends.Availability(True, "")
triton_backend.TritonBackend.device_types = frozenset({"cpu"})
torch.set_grad_enabled(False)
tables = scan.gpu_tables(argparse.Namespace(seconds=0, tables=["scan", "ss2d", "conv"]))
print(json.dumps(tables))
"""


@needs_triton
def test_tables_of_a_gpu_are_made_to_their_end():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(FOLDER.parent)}
    run = subprocess.run(
        [sys.executable, "-c", GPU_TABLES, str(FOLDER / "scan.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    tables = json.loads(run.stdout.splitlines()[-1])
    assert tables.keys() == {"cuda limits", "cuda scan", "cuda ss2d", "cuda conv"}
    (row,) = tables["cuda scan"]
    assert row["forward_error"] <= 5e-7 and row["gradient_error"] <= 3e-6 and row["forward_ms"] > 0


def test_wrong_kernel_is_never_timed(scan, monkeypatch):
    class Wrong(type(scan.get_backend("torch"))):
        def scan_forward(self, *arguments):
            y, states = super().scan_forward(*arguments)
            return y * (1 + 1e-4), states

    with pytest.raises(SystemExit, match="nothing is timed"):
        scan.gate_of_correctness(Wrong(), scan.inputs(scan.SHAPES["small"]), scan.SHAPES["small"].groups)


def test_comparison_names_rows_and_ratios(scan, monkeypatch, tmp_path):
    compare = load_benchmark("compare")
    old = {"tables": {"cpu scan": [{"variant": "avx2", "shape": "s", "forward_ms": 2.0, "forward_error": 1e-7}]}}
    new = {"tables": {"cpu scan": [{"variant": "avx2", "shape": "s", "forward_ms": 1.0, "forward_error": 1e-7}]}}
    assert compare.compare(old, new) == ["cpu scan / avx2 / s: forward_ms x0.50"]


@needs_triton
def test_compiled_kernels_are_read_and_written_down(monkeypatch, tmp_path):
    script = load_benchmark("triton_kernels")
    arguments = ["--output", str(tmp_path / "r"), "--targets", "sm_90", "--problems", "VMamba-T stage 1"]
    monkeypatch.setattr(sys, "argv", ["triton_kernels.py", *arguments, "--dtypes", "float32"])
    try:
        script.main()
    except script.NoDisassembler as error:
        pytest.skip(str(error))
    rows = {row["kernel"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    # One state: u, delta, B and C of a step, a decay and the exponential of the softplus.
    (loop,) = rows["forward, split"]["loops"]
    assert loop["loads"] == {"4": 4} and loop["exponentials"] == 2 and loop["exchanges"] == 0
    assert rows["backward"]["exchanges"] >= 10  # the gradients of B and C are sums over 32 lanes
    assert "| forward, split | 1 |" in (tmp_path / "r.md").read_text()


def test_warps_that_fit_follow_from_registers_memory_and_programs():
    script = load_benchmark("triton_kernels")

    def fit(registers, shared_bytes=0, num_warps=1, target="sm_90"):
        return script.warps_that_fit(script.Code(registers, 0, shared_bytes, 0, []), num_warps, target)

    assert [fit(n) for n in (16, 64, 65, 72, 255)] == [32, 32, 28, 28, 8]  # at most 32 programs
    assert [fit(n, num_warps=4) for n in (32, 64, 72)] == [64, 32, 28]
    assert fit(16, shared_bytes=2048, num_warps=4, target="sm_80") == 64 and fit(16, 50_000) == 4
    assert fit(128, target="gfx942") == 16
