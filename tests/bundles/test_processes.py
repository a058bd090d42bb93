"""Training in two processes on CPUs equals one process with the double batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BUNDLES = Path(__file__).parents[2] / "bundles"


def small(network: str, **arguments) -> dict:
    # Batch normalisation is not synchronised on CPUs, so no network may have it (the cross fusion of XFMamba does).
    return {"_target_": f"monai_mamba.networks.{network}", "_requires_": "@seeding", **arguments}


_PICTURES = {"in_channels": 3, "num_classes": 2, "depths": [1, 1], "dims": 16, "drop_path_rate": 0.0}
_VOLUMES = {"spatial_dims": 3, "in_channels": 1, "num_blocks": 1, "init_filters": 16, "norm": "instance"}
SETTINGS = {
    "medmamba": {"network_def": small("VMamba", **_PICTURES), "image_size": 32},
    "xfmamba": {"network_def": small("XFMamba", fusion="late", **_PICTURES), "image_size": 32},
    "nnmamba_adni": {
        "network_def": small("NNMambaClassifier", num_classes=1, dropout_rate=0.0, **_VOLUMES),
        "image_size": [16, 24, 16],
    },
    "nnmamba_landmark": {
        "network_def": small("NNMambaLandmark", num_landmarks=3, **_VOLUMES), "image_size": [16, 24, 16],
        "amplitude": 1.0,
    },
    "nnmamba_seg": {
        "network_def": small("NNMambaSeg", out_channels=3, deep_supervision=True, **_VOLUMES),
        "patch_size": [16, 32, 16],
    },
}  # fmt: skip


def changed_transforms(bundle: Path, dtype: str) -> dict:
    """Nothing by chance, for every process draws its own; images in ``dtype``."""
    config = json.loads((bundle / "configs" / "train.json").read_text())
    changes = {}
    for part in ("train", "validate"):
        for index, transform in enumerate(config[part]["preprocessing"]["transforms"]):
            name = f"{part}#preprocessing#transforms#{index}"
            if "prob" in transform:
                changes[f"{name}#prob"] = 0.0
            if transform["_target_"] == "EnsureTyped":
                changes[f"{name}#dtype"] = dtype
            if transform["_target_"].startswith("RandCrop"):
                changes[name] = {"_target_": "CenterSpatialCropd", "keys": transform["keys"], "roi_size": "@patch_size"}
    return changes


def train(bundle: Path, num_processes: int) -> dict:
    is_volume = bundle.name.startswith("nnmamba")
    settings = {
        "config_file": ["configs/train.json", "configs/multi_gpu_train.json"],
        "ckpt_dir": str(bundle / f"models{num_processes}"),
        # Adam would magnify rounding, as does instance normalisation of a few voxels: a thousandfold in every step.
        "optimizer": {
            "_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.001 if is_volume else 0.05
        },
        "network#network": "$@network_def.to(@device).double()" if is_volume else "$@network_def.to(@device)",
        "limit": 16, "max_epochs": 2, "batch_size": 8 // num_processes,
        **SETTINGS[bundle.name], **changed_transforms(bundle, "float64" if is_volume else "float32"),
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


@pytest.mark.parametrize(
    "name",
    [
        "medmamba",
        # Half a minute of CPU each. The shares of a batch of landmarks have different numbers of known ones.
        *(pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS if name != "medmamba"),
    ],
)
def test_two_processes_equal_one_with_the_double_batch(name, tmp_path):
    bundle = tmp_path / name
    shutil.copytree(BUNDLES / name / "configs", bundle / "configs")
    one, two = train(bundle, 1), train(bundle, 2)
    assert one["epoch"] == two["epoch"] == 2
    for key, weight in one["network"].items():
        torch.testing.assert_close(
            two["network"][key], weight, atol=1e-6, rtol=1e-5, msg=lambda message, key=key: f"{key}: {message}"
        )
