"""Time of MedMamba-T and XFMamba-T against themselves on the `reference` backend and against a CNN of their size.

    OMP_NUM_THREADS=1 python benchmarks/networks.py --rounds 15 --output benchmarks/results/networks.json

Before anything is timed, the fast backend must give the outputs of the reference. All candidates of a table take turns
within one run, so that whatever else the machine does meets all of them. Processor time is taken (one thread, so on an
idle machine it is the time on the wall), and of each candidate the fastest round counts. Only the ratios of one run
mean something.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from monai_mamba import __version__
from monai_mamba.layers.siamese import MambaLayer
from monai_mamba.networks import create_model
from monai_mamba.networks.counting import count
from monai_mamba.ops import use_backend


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution and an MLP of ratio 4, channels last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.scale * self.mlp(self.norm(y))


class ConvNeXtT(nn.Module):
    """ConvNeXt-T out of torch parts (Liu et al., 2022, arXiv:2201.03545): depths 3, 3, 9, 3, widths 96 to 768."""

    def __init__(self, in_channels: int = 3, num_classes: int = 1000) -> None:
        super().__init__()
        widths, depths = (96, 192, 384, 768), (3, 3, 9, 3)
        self.steps = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            before = nn.Identity() if i == 0 else nn.LayerNorm(widths[i - 1], eps=1e-6)
            stride = 4 if i == 0 else 2
            self.steps.append(
                nn.ModuleList([before, nn.Conv2d(in_channels if i == 0 else widths[i - 1], width, stride, stride)])
            )
            self.stages.append(nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth))))
        self.stem_norm = nn.LayerNorm(widths[0], eps=1e-6)
        self.head_norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        for i, (step, stage) in enumerate(zip(self.steps, self.stages, strict=True)):
            x = step[1](step[0](x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = stage(self.stem_norm(x) if i == 0 else x)
        return self.head(self.head_norm(x.mean((1, 2))))


def check(network: nn.Module, x: Tensor, label: str) -> float:
    """Stop unless the automatic backend gives the outputs of the reference; return the difference."""
    with torch.inference_mode():
        found = network(x)
        with use_backend("reference"):
            expected = network(x)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= 1e-4:
        sys.exit(f"{label}: the outputs differ from the reference backend by {difference:.1e}; nothing is timed")
    return difference


def forward(network: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            network(x)

    return run


def training_step(network: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        network.zero_grad()
        network(x).square().mean().backward()

    return run


def on_reference(run: Callable[[], None]) -> Callable[[], None]:
    def slow() -> None:
        with use_backend("reference"):
            run()

    return slow


def time_in_turns(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every round of every candidate, the candidates taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return seconds


def shares(network: nn.Module, x: Tensor, rounds: int) -> dict[str, float]:
    """Shares of a forward pass in Mamba layers (without their own convolutions), in convolutions, and in the rest.

    Of every part the fastest round counts.
    """
    seconds = dict.fromkeys(("all", "layers", "convolutions", "inside"), 0.0)
    begun: dict[nn.Module, float] = {}
    depth = 0

    def enter(module: nn.Module, _: object) -> None:
        nonlocal depth
        depth += isinstance(module, MambaLayer)
        begun[module] = time.process_time()

    def leave(module: nn.Module, *_: object) -> None:
        nonlocal depth
        passed = time.process_time() - begun[module]
        if isinstance(module, MambaLayer):
            depth -= 1
            seconds["layers"] += passed
        elif isinstance(module, nn.Conv3d):
            seconds["inside" if depth else "convolutions"] += passed

    handles = [
        register(hook)
        for module in network.modules()
        if isinstance(module, MambaLayer | nn.Conv3d)
        for register, hook in ((module.register_forward_pre_hook, enter), (module.register_forward_hook, leave))
    ]
    best: dict[str, float] = {}
    for _ in range(rounds):
        seconds.update(dict.fromkeys(seconds, 0.0))
        start = time.process_time()
        forward(network, x)()
        seconds["all"] = time.process_time() - start
        best = {key: min(value, best.get(key, value)) for key, value in seconds.items()}
    for handle in handles:
        handle.remove()
    mamba = (best["layers"] - best["inside"]) / best["all"]
    convolutions = (best["convolutions"] + best["inside"]) / best["all"]
    return {"Mamba layers": mamba, "convolutions": convolutions, "rest": 1 - mamba - convolutions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--training", action="store_true", help="time forward and backward instead of forward")
    parser.add_argument("--output", type=Path, help="write all rounds here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (options.size, options.size)
    step = training_step if options.training else forward

    convnext = ConvNeXtT().eval()
    medmamba, medmamba_x = create_model("medmamba_t").eval(), torch.randn(1, 3, *shape)
    xfmamba, xfmamba_x = create_model("xfmamba_t").eval(), torch.randn(1, 6, *shape)
    tables = {
        "MedMamba-T, one image": (medmamba, medmamba_x, torch.randn(1, 3, *shape)),
        "XFMamba-T, two views": (xfmamba, xfmamba_x, torch.randn(2, 3, *shape)),
    }
    results: dict[str, object] = {
        "torch": torch.__version__,
        "monai_mamba": __version__,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": 1,
        "size": options.size,
        "what": "forward and backward" if options.training else "forward",
    }
    print(" ".join(f"{key}={value}" for key, value in results.items()))
    for label, (network, x, cnn_x) in tables.items():
        difference = check(network, x, label)
        seconds = time_in_turns(
            {
                "ours": step(network, x),
                "reference backend": on_reference(step(network, x)),
                "ConvNeXt-T": step(convnext, cnn_x),
            },
            options.rounds,
        )
        best = {name: min(values) for name, values in seconds.items()}
        macs = {"ours": count(network, x).macs, "ConvNeXt-T": count(convnext, cnn_x).macs}
        results[label] = {"difference": difference, "macs": macs, "seconds": seconds}
        print(f"\n{label} (difference from the reference backend {difference:.1e})")
        print("| candidate | GMACs | fastest of the rounds, ms | median, ms | time / ours |")
        print("| --- | --- | --- | --- | --- |")
        for name, value in best.items():
            median = sorted(seconds[name])[len(seconds[name]) // 2]
            gmacs = macs.get(name, macs["ours"]) / 1e9
            print(f"| {name} | {gmacs:.2f} | {value * 1e3:.0f} | {median * 1e3:.0f} | {value / best['ours']:.2f} |")
    volume = torch.randn(1, 1, 64, 64, 64)
    nnmamba = create_model("nnmamba_seg").train()
    with torch.no_grad():  # its batch norms must have seen data, or the published head gives zeros
        for _ in range(10):
            nnmamba(volume)
    nnmamba.eval()
    check(nnmamba, volume, "nnMamba")
    parts = shares(nnmamba, volume, max(3, options.rounds // 3))
    results["nnMamba at 64^3, forward, shares"] = parts
    print("\nnnMamba for segmentation, 64 x 64 x 64, forward: " + ", ".join(f"{v:.0%} {k}" for k, v in parts.items()))
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
