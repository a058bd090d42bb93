"""Training in two processes on CPUs equals one process with the double batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

BUNDLE = Path(__file__).parents[2] / "bundles" / "medmamba"


def train(bundle: Path, num_processes: int) -> dict:
    settings = {
        "config_file": ["configs/train.json", "configs/multi_gpu_train.json"],
        "ckpt_dir": str(bundle / f"models{num_processes}"),
        # Batch normalisation is not synchronised on CPUs, so the network has none; Adam would magnify rounding.
        "network_def": {
            "_target_": "monai_mamba.networks.VMamba", "_requires_": "@seeding", "in_channels": 3, "num_classes": 2,
            "depths": [1, 1], "dims": 16, "drop_path_rate": 0.0,
        },
        "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.05},
        "image_size": 32, "limit": 16, "max_epochs": 2, "batch_size": 8 // num_processes,
    }  # fmt: skip
    (bundle / "args.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "-m", "monai.bundle", "run", "--args_file", "args.json"],
        cwd=bundle,
        env=environment,
        check=True,
        timeout=300,
    )
    return torch.load(bundle / f"models{num_processes}" / "last.pt", weights_only=True)


def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    bundle = tmp_path / "medmamba"
    shutil.copytree(BUNDLE / "configs", bundle / "configs")
    one, two = train(bundle, 1), train(bundle, 2)
    assert one["epoch"] == two["epoch"] == 2
    for name, weight in one["network"].items():
        torch.testing.assert_close(two["network"][name], weight, atol=1e-6, rtol=1e-5, msg=name)
