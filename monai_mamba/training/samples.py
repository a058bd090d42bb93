"""Small real data sets on which every bundle runs out of the box, written as the data sets of `datalist` are.

========================  ==========================================================================================
``breastmnist``           BreastMNIST as pictures: malignant (0) or benign (1), 546 / 78 / 156 images.
``breastmnist_two_view``  the same images cut in two by a fixed rule: ``image1`` is the left half, ``image2`` the right
                          half mirrored, both 28 x 14 pixels. It shows how two views are handled; it is no
                          replacement for two projections of one patient.
``hippocampus_size``      24 MR crops around a hippocampus (Medical Segmentation Decathlon): is it larger (0) or smaller
                          (1) than the median of the training cases, by the volume of its reference label in mm3? A
                          stand-in for atrophy, 12 / 4 / 8 crops.
========================  ==========================================================================================

The images are in the package (``monai_mamba/training/data`` and ``monai_mamba/quickstart/data``, with their
licences).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from monai_mamba.training.datalist import MANIFEST, read_manifest

#: In the data list of a sample: bundles shorten their recipes for it.
SAMPLE_MARK = "is_sample"
_SECTIONS = {"training": "train", "validation": "val", "test": "test"}
_HIPPOCAMPUS_LICENSE = "CC BY-SA 4.0; Medical Segmentation Decathlon (Antonelli et al. 2022), Vanderbilt University"
_BREAST_LICENSE = "CC BY 4.0; MedMNIST v2 (Yang et al. 2023), from Al-Dhabyani et al. 2020"


def sample_dataset(name: str, folder: os.PathLike[str] | str) -> str:
    """Write the sample ``name`` below ``folder`` unless it is there, and return its folder.

    The folder appears whole or not at all.

    Raises:
        ValueError: if there is no such sample.
    """
    if name not in SAMPLES:
        raise ValueError(f"`name` must be one of {', '.join(SAMPLES)}, got {name!r}")
    target = Path(folder) / name
    if not (target / MANIFEST).is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
        try:
            manifest = {"name": name, SAMPLE_MARK: True, **SAMPLES[name](temporary)}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            temporary.chmod(0o755)
            try:
                os.replace(temporary, target)
            except OSError:
                if not (target / MANIFEST).is_file():  # otherwise another process was faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return str(target)


def is_sample(dataset_dir: os.PathLike[str] | str) -> bool:
    """True if the data set was written by :func:`sample_dataset`."""
    return read_manifest(dataset_dir).get(SAMPLE_MARK) is True


def _breastmnist(folder: Path, *, two_views: bool) -> dict[str, object]:
    manifest: dict[str, object] = {"license": _BREAST_LICENSE, "classes": ["malignant", "benign"]}
    (folder / "images").mkdir()
    with as_file(files("monai_mamba.training") / "data" / "breastmnist.npz") as path, np.load(path) as arrays:
        for section, prefix in _SECTIONS.items():
            cases = []
            for number, (image, label) in enumerate(
                zip(arrays[f"{prefix}_images"], arrays[f"{prefix}_labels"].ravel(), strict=True)
            ):
                name = f"{prefix}_{number:04d}"
                half = image.shape[1] // 2
                views = (
                    {"image1": image[:, :half], "image2": image[:, ::-1][:, :half]} if two_views else {"image": image}
                )
                case: dict[str, object] = {"case": name, "label": int(label)}
                for key, pixels in views.items():
                    case[key] = f"images/{name}{key.removeprefix('image')}.png"
                    Image.fromarray(np.ascontiguousarray(pixels)).save(folder / str(case[key]))
                cases.append(case)
            manifest[section] = cases
    return manifest


def _hippocampus_size(folder: Path) -> dict[str, object]:
    source = Path(str(files("monai_mamba.quickstart") / "data" / "hippocampus"))
    held_out = set(json.loads((source / "dataset.json").read_text(encoding="utf-8"))["held_out"])
    shutil.copytree(source / "imagesTr", folder / "images")
    volumes = {}
    for path in sorted((source / "labelsTr").glob("*.nii.gz")):
        label = nib.Nifti1Image.from_filename(path)
        voxel_mm3 = float(np.prod(label.header.get_zooms()[:3]))
        volumes[path.name.removesuffix(".nii.gz")] = np.count_nonzero(label.dataobj) * voxel_mm3
    by_volume = sorted((case for case in volumes if case not in held_out), key=lambda case: volumes[case])
    # Every fourth in the order of the volumes validates, so that both classes are there.
    sections = {
        "training": [case for i, case in enumerate(by_volume) if i % 4 != 1],
        "validation": by_volume[1::4],
        "test": sorted(held_out),
    }
    median = float(np.median([volumes[case] for case in sections["training"]]))
    return {
        "license": _HIPPOCAMPUS_LICENSE,
        "classes": ["larger", "smaller"],
        **{
            section: [
                {"case": case, "image": f"images/{case}.nii.gz", "label": int(volumes[case] < median)} for case in cases
            ]
            for section, cases in sections.items()
        },
    }


SAMPLES: dict[str, Callable[[Path], dict[str, object]]] = {
    "breastmnist": lambda folder: _breastmnist(folder, two_views=False),
    "breastmnist_two_view": lambda folder: _breastmnist(folder, two_views=True),
    "hippocampus_size": _hippocampus_size,
}
