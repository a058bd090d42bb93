"""Time the scans on this machine against loops and against what the machine can do; writes JSON and Markdown.

    python benchmarks/scan.py --output benchmarks/results/scan

Every shape passes a comparison with float64 before it is timed. Times are minima of short repetitions on one thread;
compare ratios within one run only.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from monai_mamba.ops import causal_conv1d, cpu_library, get_backend
from monai_mamba.ops.backends import Backend
from monai_mamba.ops.cpu import use_variant
from monai_mamba.ops.routes import ROUTES

#: name: batch, channels, length, groups, states, gate
SHAPES = {
    "MedMamba-T stage 1": (1, 384, 3136, 4, 16, False),
    "MedMamba-T stage 2": (1, 768, 784, 4, 16, False),
    "MedMamba-T stage 3": (1, 1536, 196, 4, 16, False),
    "MedMamba-T stage 4": (1, 3072, 49, 4, 16, False),
    "MedMamba-T stage 1, batch 4": (4, 384, 3136, 4, 16, False),
    "nnMamba 32^3": (1, 128, 32768, 1, 16, True),
    "nnMamba 16^3": (1, 256, 4096, 1, 16, True),
    "nnMamba 8^3, 4 passes": (4, 512, 512, 1, 16, True),
    "VMamba stage 1, N=1": (1, 384, 3136, 4, 1, False),
    "VMamba stage 2, N=1": (1, 768, 784, 4, 1, False),
}
MAPS = {"56^2, 96": (56, 96), "28^2, 192": (28, 192), "14^2, 384": (14, 384), "7^2, 768": (7, 768)}
CONVOLUTIONS = {"32768 x 128": (32768, 128), "4096 x 256": (4096, 256), "512 x 512": (512, 512)}


def measure(function, seconds: float) -> tuple[float, float]:
    """Minimum and median time in ms of as many repetitions as fit the seconds, but at least two.

    On a machine with other work the minimum is the figure, and the median tells how disturbed the run was.
    """
    function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or (time.perf_counter() < end and len(times) < 500):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times), sorted(times)[len(times) // 2]


def inputs(batch, channels, length, groups, states, gate):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    A = -torch.arange(1, states + 1.0).repeat(channels, 1)
    u, delta, z = draw(batch, length, channels), 0.5 * draw(batch, length, channels), draw(batch, length, channels)
    B, C = draw(batch, length, groups, states), draw(batch, length, groups, states)
    return [u, delta, A, B, C, draw(channels), z if gate else None, draw(channels) - 4]


def sequential_loop(u, delta, A, B, C, D, z, bias):
    """One step after the other with exp(delta A) and delta B u made for all steps first, as published code does."""
    delta = F.softplus(delta + bias)
    repeat = u.shape[2] // B.shape[2]
    decay = torch.exp(delta[..., None] * A)  # (B, L, D, N)
    drive = (delta * u)[..., None] * B.repeat_interleave(repeat, 2)
    C = C.repeat_interleave(repeat, 2)
    h = torch.zeros_like(drive[:, 0])
    outputs = []
    for step in range(u.shape[1]):
        h = decay[:, step] * h + drive[:, step]
        outputs.append((h * C[:, step]).sum(-1))
    y = torch.stack(outputs, 1) + D * u
    return y if z is None else y * F.silu(z)


def gate_of_correctness(values) -> float:
    """Error of the C library against PyTorch in float64, of the first 200 steps; raises if it is too large."""
    short = [v[:1, :200] if v is not None and v.ndim > 2 else v for v in values]
    y, states = get_backend("cpu").scan_forward(*short, True, True)
    wide = [None if v is None else v.double() for v in short]
    expected, wide_states = get_backend("torch").scan_forward(*wide, True, True)
    worst = ((y - expected).abs().max() / expected.abs().max()).item()
    if not worst <= 5e-7:
        raise SystemExit(f"forward error {worst:.1e} of the maximum, more than 5e-7: no timing of a wrong result")
    found = get_backend("cpu").scan_backward(y, states, *short, True)
    reference = get_backend("torch").scan_backward(y.double(), wide_states, *wide, True)
    for a, b in zip(found, reference, strict=True):
        if b is not None and not (a - b).abs().max() <= 3e-6 * b.abs().max():
            raise SystemExit("a gradient is off by more than 3e-6 of its maximum: no timing of a wrong result")
    return worst


def limits(variant: str) -> dict[str, float]:
    library = cpu_library.load()
    index = library.choose_variant(variant)
    rounds, found = 1000, {}
    for kind, name, operations in ((0, "exp2", 1024), (1, "fma", 8192), (2, "update", 4096)):
        best, _ = measure(lambda kind=kind: library.probe(index, kind, rounds), 0.3)
        found[f"{name}_g_per_s"] = rounds * operations / best / 1e6
    return found


def scan_rows(variant: str, quick: bool, loop: bool) -> list[dict]:
    rows = []
    backend = get_backend("cpu")
    rate = limits(variant)["update_g_per_s"]
    for name, (batch, channels, length, groups, states, has_gate) in SHAPES.items():
        values = inputs(batch, channels, length, groups, states, has_gate)
        updates = batch * channels * length * states
        row = {"shape": name, "variant": variant, "error": gate_of_correctness(values)}
        seconds = 0.4 if quick else 1.2
        row["forward_ms"], row["forward_median_ms"] = measure(
            lambda v=values: backend.scan_forward(*v, True, False), seconds
        )
        y, saved = backend.scan_forward(*values, True, True)
        row["backward_ms"], row["backward_median_ms"] = measure(
            lambda v=values, y=y, s=saved: backend.scan_backward(y, s, *v, True), seconds
        )
        copy = torch.empty_like(values[0])
        row["copy_ms"], _ = measure(lambda c=copy, v=values: c.copy_(v[0]), seconds)
        row["forward_g_per_s"] = updates / row["forward_ms"] / 1e6
        row["backward_per_forward"] = row["backward_ms"] / row["forward_ms"]
        row["forward_per_limit"] = rate / row["forward_g_per_s"]
        if loop and updates <= 2.5e7:
            row["loop_ms"], _ = measure(lambda v=values: sequential_loop(*v), 0)
            row["loop_per_forward"] = row["loop_ms"] / row["forward_ms"]
            torch_ms, _ = measure(lambda v=values: get_backend("torch").scan_forward(*v, True, False), 0)
            row["loop_per_torch"] = row["loop_ms"] / torch_ms
        rows.append(row)
        print(name, {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}, flush=True)
    return rows


def map_rows(quick: bool) -> list[dict]:
    rows = []
    backend = get_backend("cpu")
    for name, (size, channels) in MAPS.items():
        shape = (1, size, size, 4)
        values = (
            *(torch.randn(1, size, size, channels), 0.5 * torch.randn(*shape, channels)),
            -torch.arange(1, 17.0).repeat(4, channels, 1),
            *(torch.randn(*shape, 16), torch.randn(*shape, 16), torch.randn(4, channels), torch.randn(4, channels) - 4),
        )
        fused, _ = measure(lambda v=values: backend.ss2d_forward(*v, ROUTES, True, False), 0.4 if quick else 1.2)
        apart, _ = measure(
            lambda v=values: Backend.ss2d_forward(backend, *v, ROUTES, True, False), 0.4 if quick else 1.2
        )
        rows.append({"map": name, "fused_ms": fused, "separate_ms": apart, "fused_per_separate": fused / apart})
        print(rows[-1], flush=True)
    return rows


def conv_rows(quick: bool) -> list[dict]:
    rows = []
    for name, (length, channels) in CONVOLUTIONS.items():
        x, weight, bias = torch.randn(1, length, channels), torch.randn(channels, 4), torch.randn(channels)
        first, target = x.transpose(1, 2).contiguous(), torch.empty_like(x)

        def ours(x=x, weight=weight, bias=bias):
            return causal_conv1d(x, weight, bias, "silu", channels_last=True, backend="cpu")

        def theirs(first=first, weight=weight, bias=bias, channels=channels, length=length):
            return F.silu(F.conv1d(first, weight[:, None], bias, padding=3, groups=channels)[..., :length])

        seconds = 0.4 if quick else 1.2
        own, _ = measure(ours, seconds)
        other, _ = measure(theirs, seconds)
        copy, _ = measure(lambda t=target, x=x: t.copy_(x), seconds)
        row = {"sequence": name, "ms": own, "torch_ms": other, "copy_ms": copy}
        rows.append({**row, "torch_per_ours": other / own, "ours_per_copy": own / copy})
        print(rows[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(k for row in rows for k in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    for row in rows:
        cells = (row.get(k, "") for k in keys)
        lines.append("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="name of the results without ending")
    parser.add_argument("--quick", action="store_true", help="a third of the repetitions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    library = cpu_library.load()
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    result: dict = {
        "machine": model,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
        "command": "python benchmarks/scan.py" + (" --quick" if arguments.quick else ""),
        "limits": {name: limits(name) for name in library.variants},
        "scan": [],
    }
    best = list(library.variants)[-1]
    for variant in library.variants:
        with use_variant(variant):
            result["scan"] += scan_rows(variant, arguments.quick, loop=variant == best)
    result["ss2d"], result["conv"] = map_rows(arguments.quick), conv_rows(arguments.quick)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    head = "\n".join(f"- {k}: {v}" for k, v in result.items() if not isinstance(v, list))
    body = "\n\n".join(f"## {name}\n\n{table(result[name])}" for name in ("scan", "ss2d", "conv"))
    arguments.output.with_suffix(".md").write_text(f"# Scan benchmark\n\n{head}\n\n{body}\n")


if __name__ == "__main__":
    main()
