"""Memory of a training step: what ``monai-mamba nnunet plan`` predicts against what the step takes on this CPU.

    OMP_NUM_THREADS=1 python benchmarks/planning.py --output benchmarks/results/planning.json

Each size runs in a process of its own: three training steps as nnU-Net makes them (deep supervision, its loss, AdamW,
clipped gradients). Measured is the growth of the resident memory from before the network is built to the highest point
of the third step, after a step on a tiny patch has loaded the libraries. The allocator of the C library is told to give
memory back at once (MALLOC_MMAP_THRESHOLD_), so that holes in its heap are not counted. Rows that the output file holds
already are kept.
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
CASES: tuple[tuple[str, int, tuple[int, ...]], ...] = (
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
)
MIB = 2**20


def measure(network_name: str, batch: int, patch: tuple[int, ...]) -> dict[str, int]:
    """Run three training steps in this process; return the growth of the resident memory at the highest point."""
    import torch

    from monai_mamba.nnunet.memory import nnunet_loss
    from monai_mamba.nnunet.planned_networks import NUM_LEVELS
    from monai_mamba.nnunet.planner import planned_network

    channels = 2 if network_name.startswith("xfmamba") else 1
    loss = nnunet_loss(False, NUM_LEVELS)

    def steps(batch: int, patch: tuple[int, ...], number: int) -> None:
        network = planned_network(network_name).build(len(patch), channels, 3)
        optimizer = torch.optim.AdamW(network.parameters())
        image = torch.randn(batch, channels, *patch)
        targets = [
            torch.randint(0, 3, (batch, 1, *(round(n / 2**level) for n in patch))).float()
            for level in range(NUM_LEVELS)
        ]
        for _ in range(number):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
            optimizer.zero_grad(set_to_none=True)
            output = network(image)
            loss(output, targets).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()

    steps(2, (32,) * len(patch), 1)
    before = resident("VmRSS")
    steps(batch, patch, 3)
    return {"measured_bytes": resident("VmHWM") - before}


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the resident memory can be read on Linux only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("planning.json"))
    parser.add_argument("--cases", type=int, nargs="*", default=list(range(len(CASES))))
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measure(*CASES[arguments.child])))
        return

    from monai_mamba.nnunet.planner import planned_network

    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    done = {(row["network"], row["batch"], tuple(row["patch"])) for row in rows}
    for index in arguments.cases:
        name, batch, patch = CASES[index]
        if (name, batch, patch) in done:
            continue
        channels = 2 if name.startswith("xfmamba") else 1
        memory = planned_network(name).memory(patch, batch, channels, 3)
        # Its own allocator settings; the thresholds are read when a process starts.
        child = subprocess.run(
            [sys.executable, __file__, "--child", str(index)],
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
        write_results(arguments.output, rows)


def write_results(output: Path, rows: list[dict]) -> None:
    """Write the JSON and the Markdown table beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**provenance("cpu"), "rows": rows}, indent=1) + "\n")
    lines = ["| network | batch | patch | predicted, MiB | measured, MiB | ratio |", "|" + " --- |" * 6]
    lines += [
        f"| {row['network']} | {row['batch']} | {' x '.join(map(str, row['patch']))} | "
        f"{row['predicted_bytes'] / MIB:.0f} | {row['measured_bytes'] / MIB:.0f} | {row['ratio']:.2f} |"
        for row in rows
    ]
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
