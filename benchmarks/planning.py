"""Memory of a training step: what ``monai-mamba nnunet plan`` predicts against what the step takes.

    OMP_NUM_THREADS=1 python benchmarks/planning.py --output benchmarks/results/planning.json
    python benchmarks/planning.py --device cuda --output benchmarks/results/planning_cuda.json

Each size runs in a process of its own: three training steps as nnU-Net makes them (deep supervision, its loss, AdamW,
clipped gradients), after a step on a tiny patch that loads the libraries.

On a CPU, measured is the growth of the resident memory from before the network is built to the highest point of the
third step. The allocator of the C library is told to give memory back at once (MALLOC_MMAP_THRESHOLD_), so that holes
in its heap are not counted. On CUDA the steps run in float16 autocast and measured is the highest sum of torch's
allocations; "outside" is what the device holds beyond that (the allocator's holes, cuDNN, the CUDA context), for which
plans leave 1 GiB. Rows that the output file holds already are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from nnunet_runs import provenance

#: network, batch size, patch size
CASES: dict[str, tuple[tuple[str, int, tuple[int, ...]], ...]] = {
    "cpu": (
        ("nnmamba", 2, (32, 32, 32)),
        ("nnmamba", 2, (40, 56, 40)),
        ("nnmamba", 2, (64, 64, 64)),
        ("nnmamba", 2, (20, 96, 96)),
        ("nnmamba", 2, (16, 160, 160)),
        ("nnmamba", 4, (48, 48, 48)),
        ("nnmamba", 8, (32, 48, 48)),
        ("nnmamba", 1, (48, 80, 64)),
        ("nnmamba", 3, (32, 32, 64)),
        ("nnmamba", 2, (24, 40, 40)),
        ("nnmamba", 12, (96, 96)),
        ("medmamba_t", 4, (96, 96)),
        ("medmamba_t", 2, (160, 128)),
        ("xfmamba_t", 2, (96, 96)),
    ),
    "cuda": (
        ("nnmamba", 2, (64, 64, 64)),
        ("nnmamba", 2, (40, 56, 40)),
        ("nnmamba", 2, (96, 96, 96)),
        ("nnmamba", 2, (128, 128, 128)),
        ("nnmamba", 2, (48, 192, 192)),
        ("nnmamba", 2, (16, 320, 320)),
        ("nnmamba", 4, (96, 128, 112)),
        ("nnmamba", 8, (64, 64, 64)),
        ("nnmamba", 2, (160, 128, 112)),
        ("nnmamba", 12, (512, 512)),
        ("medmamba_t", 12, (512, 512)),
        ("medmamba_t", 4, (256, 256)),
        ("xfmamba_t", 6, (512, 512)),
    ),
}
MIB = 2**20


def measure(network_name: str, batch: int, patch: tuple[int, ...], device: str) -> dict[str, int]:
    """Run three training steps in this process; return the growth of the memory at the highest point."""
    import torch

    from monai_mamba.nnunet.memory import nnunet_loss
    from monai_mamba.nnunet.planned_networks import NUM_LEVELS
    from monai_mamba.nnunet.planner import planned_network

    channels = 2 if network_name.startswith("xfmamba") else 1
    loss = nnunet_loss(False, NUM_LEVELS)
    is_mixed = device == "cuda"
    scaler = torch.amp.GradScaler(device, enabled=is_mixed)

    def steps(batch: int, patch: tuple[int, ...], number: int) -> None:
        network = planned_network(network_name).build(len(patch), channels, 3).to(device)
        optimizer = torch.optim.AdamW(network.parameters())
        image = torch.randn(batch, channels, *patch, device=device)
        targets = [
            torch.randint(0, 3, (batch, 1, *(round(n / 2**level) for n in patch)), device=device).float()
            for level in range(NUM_LEVELS)
        ]
        for _ in range(number):
            if not is_mixed:
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, enabled=is_mixed):
                value = loss(network(image), targets)
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
            scaler.step(optimizer)
            scaler.update()

    steps(2, (32,) * len(patch), 1)
    if not is_mixed:
        before = resident("VmRSS")
        steps(batch, patch, 3)
        return {"measured_bytes": resident("VmHWM") - before}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps(batch, patch, 3)
    highest = torch.cuda.max_memory_allocated()
    free, total = torch.cuda.mem_get_info()  # the allocator still holds what it took at the highest point
    return {"measured_bytes": highest - before, "outside_bytes": total - free - highest}


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the resident memory can be read on Linux only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("planning.json"))
    parser.add_argument("--device", default="cpu", choices=list(CASES))
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the cases, from 0; default: all")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, cases = arguments.device, CASES[arguments.device]
    if arguments.child is not None:
        print(json.dumps(measure(*cases[arguments.child], device)))
        return

    from monai_mamba.nnunet.planner import planned_network

    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    done = {(row["network"], row["batch"], tuple(row["patch"])) for row in rows}
    for index in range(len(cases)) if arguments.cases is None else arguments.cases:
        name, batch, patch = cases[index]
        if (name, batch, patch) in done:
            continue
        channels = 2 if name.startswith("xfmamba") else 1
        memory = planned_network(name).memory(
            patch, batch, channels, 3, precision="autocast" if device == "cuda" else "float32"
        )
        # Its own allocator settings; the thresholds are read when a process starts.
        child = subprocess.run(
            [sys.executable, __file__, "--device", device, "--child", str(index)],
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        row = {
            "network": name,
            "batch": batch,
            "patch": list(patch),
            "predicted_bytes": memory.peak,
            **json.loads(child.stdout.splitlines()[-1]),
        }
        row["ratio"] = round(row["predicted_bytes"] / row["measured_bytes"], 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_results(arguments.output, rows, device)


def write_results(output: Path, rows: list[dict], device: str) -> None:
    """Write the JSON and the Markdown table beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**provenance(device), "rows": rows}, indent=1) + "\n")
    figures = ["predicted", "measured", *(["outside"] if device == "cuda" else [])]
    lines = [
        f"| network | batch | patch | {' | '.join(f'{name}, MiB' for name in figures)} | ratio |",
        "|" + " --- |" * (4 + len(figures)),
    ]
    for row in rows:
        sizes = [f"{row[f'{name}_bytes'] / MIB:.0f}" for name in figures]
        patch = " x ".join(map(str, row["patch"]))
        lines.append(f"| {row['network']} | {row['batch']} | {patch} | {' | '.join(sizes)} | {row['ratio']:.2f} |")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
