"""The benchmarks run: each table of ``benchmarks/scan.py`` at small sizes, behind its gate of correctness."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def scan(monkeypatch):
    name = "benchmarks_scan"
    spec = importlib.util.spec_from_file_location(name, FOLDER / "scan.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
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
    for loop in (scan.sequential_loop, scan.linear_loop):
        assert torch.allclose(loop(*scan.channels_first(values)).transpose(1, 2), expected, atol=1e-5)


def test_wrong_kernel_is_never_timed(scan, monkeypatch):
    class Wrong(type(scan.get_backend("torch"))):
        def scan_forward(self, *arguments):
            y, states = super().scan_forward(*arguments)
            return y * (1 + 1e-4), states

    with pytest.raises(SystemExit, match="nothing is timed"):
        scan.gate_of_correctness(Wrong(), scan.inputs(scan.SHAPES["small"]))


def test_comparison_names_rows_and_ratios(scan, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("benchmarks_compare", FOLDER / "compare.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    old = {"tables": {"cpu scan": [{"variant": "avx2", "shape": "s", "forward_ms": 2.0, "forward_error": 1e-7}]}}
    new = {"tables": {"cpu scan": [{"variant": "avx2", "shape": "s", "forward_ms": 1.0, "forward_error": 1e-7}]}}
    assert compare.compare(old, new) == ["cpu scan / avx2 / s: forward_ms x0.50"]
