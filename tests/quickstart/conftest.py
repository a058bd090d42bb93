from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest


class DecathlonFolder:
    """A small, sound data set in the decathlon's layout that a test then spoils."""

    def __init__(self, folder: Path, num_cases: int = 8, shape: tuple[int, ...] = (12, 14, 10)) -> None:
        self.folder = folder
        self.shape = shape
        self.affine = np.diag([1.0, 1.0, 2.0, 1.0])
        self.names = [f"case_{number:03d}" for number in range(num_cases)]
        self.description: dict = {
            "name": "Tiny set",
            "modality": {"0": "MRI"},
            "labels": {"0": "background", "1": "left", "2": "right"},
            "training": [
                {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in self.names
            ],
        }
        rng = np.random.default_rng(0)
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True)
        for name in self.names:
            label = np.zeros(shape, np.uint8)
            label[2:6, 3:8, 2:7] = 1
            label[7:10, 3:8, 2:7] = 2
            self.write(self.image(name), (rng.normal(size=shape) + 3 * label).astype(np.float32))
            self.write(self.label(name), label)
        self.save()

    def image(self, name: str) -> Path:
        return self.folder / "imagesTr" / f"{name}.nii.gz"

    def label(self, name: str) -> Path:
        return self.folder / "labelsTr" / f"{name}.nii.gz"

    def write(self, path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> None:
        nib.save(nib.Nifti1Image(data, self.affine if affine is None else affine), path)

    def read(self, path: Path) -> np.ndarray:
        return np.asarray(nib.load(path).dataobj).copy()

    def save(self) -> None:
        (self.folder / "dataset.json").write_text(json.dumps(self.description))


@pytest.fixture
def make_decathlon(tmp_path) -> Callable[..., DecathlonFolder]:
    return partial(DecathlonFolder, tmp_path / "data")


@pytest.fixture
def decathlon(make_decathlon) -> DecathlonFolder:
    return make_decathlon()
