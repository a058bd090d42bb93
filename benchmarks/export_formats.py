"""Compare exported files with the network they came from: speed, size, difference.

    python benchmarks/export_formats.py --output benchmarks/results/export_formats.json

Each network is written as ONNX, torch.export and TorchScript file with fresh weights; a file that differs from its
network by more than 1e-4 of the largest output is not kept, and then nothing is timed. Times are for one image on one
thread, the minimum of several runs taken in turn with the network's own, as ratio to it. The result is printed as a
Markdown table too.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from monai_mamba.export import FORMATS, export_network
from monai_mamba.networks import create_model

#: name of the network -> its arguments and the input.
CASES = {
    "medmamba_t": ({"num_classes": 6}, (1, 3, 224, 224)),
    "xfmamba_t": ({}, (1, 6, 224, 224)),
    # Not the published head: with fresh weights its last ReLU gives zeros, which would compare nothing.
    "nnmamba_seg": ({"out_channels": 3, "head": "conv1x1"}, (1, 1, 48, 48, 48)),
}


def runner(path: Path, format: str) -> Callable[[Tensor], object]:
    if format == "onnx":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda image: session.run(None, {"image": image.numpy()})
    if format == "program":
        return torch.export.load(path).module()
    return torch.jit.load(str(path))


def fastest(functions: dict[str, Callable[[Tensor], object]], image: Tensor, repeats: int) -> dict[str, float]:
    """Minimum seconds of each, taken in turn so that a busy machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function(image)
            times[name].append(time.perf_counter() - start)
    return {name: min(values[1:]) for name, values in times.items()}  # the first run allocates


def measure(name: str, arguments: dict, shape: tuple[int, ...], repeats: int, folder: Path) -> list[dict]:
    network: nn.Module = create_model(name, **arguments).eval()
    image = torch.randn(shape)
    reports = {}
    for format, suffix in FORMATS.items():
        start = time.perf_counter()
        report = export_network(network, folder / f"{name}{suffix}", image)
        reports[format] = (report, time.perf_counter() - start)
    runners = {"network": network, **{f: runner(folder / f"{name}{s}", f) for f, s in FORMATS.items()}}
    seconds = fastest(runners, image, repeats)
    return [
        {
            "network": name,
            "input": "x".join(map(str, shape)),
            "format": format,
            "nodes": report.num_nodes,
            "megabytes": round(report.path.stat().st_size / 1e6, 1),
            "export_s": round(export_s, 1),
            "difference": report.difference,
            "network_s": round(seconds["network"], 4),
            "file_s": round(seconds[format], 4),
            "ratio": round(seconds[format] / seconds["network"], 2),
        }
        for format, (report, export_s) in reports.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--networks", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict] = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            arguments, shape = CASES[name]
            rows += measure(name, arguments, shape, options.repeats, Path(folder))
    if options.output:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["onnxruntime"] = onnxruntime.__version__
        content = {"machine": platform.machine(), "threads": 1, "versions": versions, "rows": rows}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=2) + "\n")
    columns = ["network", "input", "format", "nodes", "MB", "difference", "time / network's"]
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print(
            f"| {row['network']} | {row['input']} | {row['format']} | {row['nodes']} | {row['megabytes']} | "
            f"{row['difference']:.0e} | {row['ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
