"""Time of a training step with and without torch.compile, as nnU-Net would compile, for our trainers' networks.

    OMP_NUM_THREADS=1 python benchmarks/compile.py --output benchmarks/results/compile.json
    python benchmarks/compile.py --device cuda --output benchmarks/results/compile_cuda.json

Before anything is timed, the gradient of the compiled network must be as near to the one in float64 as the plain
network's is (at most twice as far; the deepest maps are normalised over few voxels, which lifts rounding to 1e-3). Both
then take turns within one process, one step each (deep supervision, nnU-Net's loss, clipped gradients, AdamW).
"Compiling" is the first forward and backward pass without any cache, "pays after" how many steps it takes until that
time has been won back. On CUDA the step runs in float16 autocast, as nnU-Net's training does. Rows that the output file
holds already are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from nnunet_runs import provenance
from torch import Tensor, nn

from monai_mamba.layers.drop_path import DropPath
from monai_mamba.nnunet.memory import nnunet_loss
from monai_mamba.nnunet.planned_networks import NUM_LEVELS
from monai_mamba.nnunet.planner import planned_network

#: network, batch size, patch size; the larger ones on a GPU only
CASES: dict[str, tuple[tuple[str, int, tuple[int, ...]], ...]] = {
    "cpu": (("nnmamba", 2, (40, 56, 40)), ("nnmamba", 12, (96, 96)), ("medmamba_t", 4, (96, 96))),
    "cuda": (
        ("nnmamba", 2, (40, 56, 40)),
        ("nnmamba", 2, (128, 128, 128)),
        ("nnmamba", 12, (512, 512)),
        ("medmamba_t", 12, (512, 512)),
        ("xfmamba_t", 12, (512, 512)),
    ),
}
NUM_CLASSES = 3


class Training:
    """One network in training, plain or compiled, always from the same weights and on the same batch."""

    def __init__(self, name: str, batch: int, patch: tuple[int, ...], device: str, is_compiled: bool) -> None:
        torch.manual_seed(0)
        channels = 2 if name.startswith("xfmamba") else 1
        self.device = device
        self.is_mixed = device == "cuda"
        self.network: nn.Module = planned_network(name).build(len(patch), channels, NUM_CLASSES).to(device)
        for module in self.network.modules():
            if isinstance(module, DropPath):  # its draws would differ
                module.rate = 0.0
        self.optimizer = torch.optim.AdamW(self.network.parameters())
        self.scaler = torch.amp.GradScaler(device, enabled=self.is_mixed)
        self.loss = nnunet_loss(False, NUM_LEVELS)
        self.image = torch.randn(batch, channels, *patch, device=device)
        self.targets = [
            torch.randint(0, NUM_CLASSES, (batch, 1, *(n // 2**level for n in patch)), device=device).float()
            for level in range(NUM_LEVELS)
        ]
        self.call = torch.compile(self.network) if is_compiled else self.network

    def gradient(self) -> Tensor:
        """Gradient of all parameters in one vector of float64."""
        self.backward()
        gradients = [p.grad.flatten() for p in self.network.parameters() if p.grad is not None]
        return torch.cat(gradients).double() / self.scaler.get_scale()

    def backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, enabled=self.is_mixed):
            loss = self.loss(self.call(self.image), self.targets)
        self.scaler.scale(loss).backward()

    def step(self) -> float:
        """Seconds of one training step."""
        self.wait()
        began = time.perf_counter()
        self.backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def check(plain: Training, compiled: Training) -> tuple[float, float]:
    """Stop unless the compiled gradient is right; return the errors of both as parts of the norm of the exact one."""
    exact = copy.deepcopy(plain)
    exact.network.double()
    exact.call, exact.image, exact.is_mixed = exact.network, exact.image.double(), False
    expected = exact.gradient()
    errors = [((t.gradient() - expected).norm() / expected.norm()).item() for t in (plain, compiled)]
    if not errors[1] <= 2 * errors[0]:
        raise SystemExit(
            f"the compiled gradient is {errors[1]:.1e} of its norm from the one in float64, the plain one "
            f"{errors[0]:.1e}; nothing is timed"
        )
    return errors[0], errors[1]


def measure(name: str, batch: int, patch: tuple[int, ...], device: str, rounds: int) -> dict:
    """Check, then time both in turns; return the row."""
    torch._dynamo.reset()
    plain, compiled = (Training(name, batch, patch, device, is_compiled) for is_compiled in (False, True))
    began = time.perf_counter()
    compiled.backward()
    compile_seconds = time.perf_counter() - began
    plain_error, compiled_error = check(plain, compiled)
    for training in (plain, compiled):
        training.step()
    pairs = [(plain.step(), compiled.step()) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in pairs)
    eager = statistics.median(a for a, _ in pairs)
    won = eager * (1 - statistics.median(ratios))
    return {
        "network": name,
        "batch": batch,
        "patch": list(patch),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "gradient_error": [plain_error, compiled_error],
        "plain_step_s": round(eager, 4),
        "compiled_over_plain": [round(r, 3) for r in (statistics.median(ratios), ratios[0], ratios[-1])],
        "compile_s": round(compile_seconds, 1),
        "pays_after_steps": round(compile_seconds / won) if won > 0 else None,
    }


def write_results(output: Path, rows: list[dict], device: str) -> None:
    """Write the JSON and the Markdown table beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**provenance(device), "rows": rows}, indent=1) + "\n")
    lines = [
        "| network | batch | patch | plain step, s | compiled / plain (range) | compiling, s | pays after, steps |",
        "|" + " --- |" * 7,
    ]
    for row in rows:
        median, low, high = row["compiled_over_plain"]
        lines.append(
            f"| {row['network']} | {row['batch']} | {' x '.join(map(str, row['patch']))} | {row['plain_step_s']:.3f} | "
            f"{median:.2f} ({low:.2f} to {high:.2f}) | {row['compile_s']:.0f} | {row['pays_after_steps'] or 'never'} |"
        )
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("compile.json"))
    arguments = parser.parse_args()
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    done = {(row["network"], row["batch"], tuple(row["patch"])) for row in rows}
    for case in CASES[arguments.device]:
        if case not in done:
            with tempfile.TemporaryDirectory() as cache:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
                rows.append(measure(*case, arguments.device, arguments.rounds))
            print(json.dumps(rows[-1]), flush=True)
            write_results(arguments.output, rows, arguments.device)


if __name__ == "__main__":
    main()
