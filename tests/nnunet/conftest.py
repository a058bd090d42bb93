"""A tiny data set that goes through nnU-Net's real planning and preprocessing once per test session."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

DATASET_ID = 501


@dataclass
class NNUNetFolders:
    """The three folders nnU-Net works in, and a way to run its commands there."""

    root: Path

    @property
    def dataset_name(self) -> str:
        return f"Dataset{DATASET_ID}_Spheres"

    @property
    def raw(self) -> Path:
        return self.root / "raw" / self.dataset_name

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed" / self.dataset_name

    @property
    def results(self) -> Path:
        return self.root / "results" / self.dataset_name

    def environment(self, **extra: str) -> dict[str, str]:
        variables = {name: str(self.root / name.removeprefix("nnUNet_")) for name in _FOLDERS}
        return os.environ | variables | {"OMP_NUM_THREADS": "2"} | extra

    def run(
        self, *command: str, check: bool = True, timeout: float = 540, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).with_name(command[0])
        result = subprocess.run(
            [str(program), *command[1:]],
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if check and result.returncode:
            pytest.fail(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
        return result


_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def write_sphere_case(folder: Path, name: str, seed: int, with_label: bool) -> None:
    """Write an image with two balls, brighter than the noise, and its label map."""
    rng = np.random.default_rng(seed)
    shape, spacing = (18, 40, 36), (1.0, 1.0, 2.5)  # array order z, y, x; spacing x, y, z
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1) * np.array(spacing[::-1])
    extent = np.array(shape) * np.array(spacing[::-1])
    label = np.zeros(shape, np.uint8)
    for value, center in ((1, (0.5, 0.3, 0.5)), (2, (0.5, 0.7, 0.5))):
        distance = np.linalg.norm(grid - extent * (np.array(center) + rng.uniform(-0.05, 0.05, 3)), axis=-1)
        label[distance < 8] = value
    image = rng.normal(0, 0.3, shape) + label * 1.5
    for array, target in (
        (image.astype(np.float32), folder / ("imagesTr" if with_label else "imagesTs") / f"{name}_0000.nii.gz"),
        (label, folder / ("labelsTr" if with_label else "labelsTs") / f"{name}.nii.gz"),
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        volume = sitk.GetImageFromArray(array)
        volume.SetSpacing(spacing)
        sitk.WriteImage(volume, str(target))


@pytest.fixture(scope="session")
def planned(tmp_path_factory) -> NNUNetFolders:
    """Six training and one test case, planned and preprocessed for 2d and 3d_fullres."""
    folders = NNUNetFolders(tmp_path_factory.mktemp("nnunet"))
    for index in range(6):
        write_sphere_case(folders.raw, f"case_{index}", index, with_label=True)
    write_sphere_case(folders.raw, "case_6", 6, with_label=False)
    (folders.raw / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "MRI"},
                "labels": {"background": 0, "left": 1, "right": 2},
                "numTraining": 6,
                "file_ending": ".nii.gz",
            }
        )
    )
    # Planning hands nnUNet_n_proc_DA to torch as a thread count, where 0 is an error.
    command = f"nnUNetv2_plan_and_preprocess -d {DATASET_ID} -c 2d 3d_fullres -np 1 -npfp 1 --verify_dataset_integrity"
    folders.run(*command.split(), nnUNet_n_proc_DA="1")
    return folders


@pytest.fixture
def fresh_results(planned) -> NNUNetFolders:
    """The planned data set with an empty results folder."""
    shutil.rmtree(planned.results, ignore_errors=True)
    return planned


@pytest.fixture
def make_trainer(planned, monkeypatch, tmp_path):
    """Build an initialized trainer by name, for a plan that may be changed."""
    for name in _FOLDERS:
        monkeypatch.setenv(name, str(planned.root / name.removeprefix("nnUNet_")))

    def make(name="nnMambaTrainerQuick", configuration="3d_fullres", patch_size=None, network=None, channels=1):
        from monai_mamba.nnunet.lookup import find_trainer

        plans = json.loads((planned.preprocessed / "nnUNetPlans.json").read_text())
        plans["continue_training"] = False
        if network is not None:
            plans["configurations"][configuration]["architecture"]["network_class_name"] = network
        if patch_size is not None:
            plans["configurations"][configuration]["patch_size"] = list(patch_size)
        dataset_json = json.loads((planned.preprocessed / "dataset.json").read_text())
        dataset_json["channel_names"] = {str(i): "MRI" for i in range(channels)}
        trainer = find_trainer(name)(plans, configuration, 0, dataset_json, torch.device("cpu"))
        trainer.output_folder = str(tmp_path)
        trainer.log_file = str(tmp_path / "log.txt")
        trainer.initialize()
        return trainer

    return make


def random_batch(trainer, batch_size=2):
    size = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales() or [[1.0] * len(size)]
    targets = [
        torch.randint(0, 3, (batch_size, 1, *(round(n * s) for n, s in zip(size, scale, strict=True)))).float()
        for scale in scales
    ]
    return {
        "data": torch.randn(batch_size, trainer.num_input_channels, *size),
        "target": targets if trainer.enable_deep_supervision else targets[0],
    }
