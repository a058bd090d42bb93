"""Small real data sets on which every bundle runs out of the box, written as the data sets of `datalist` are.

=========================  =========================================================================================
``breastmnist``            BreastMNIST as pictures: malignant (0) or benign (1), 546 / 78 / 156 images.
``pneumoniamnist``         PneumoniaMNIST as pictures: normal (0) or pneumonia (1), 4708 / 524 / 624 images.
``breastmnist_two_view``   BreastMNIST cut in two by a fixed rule: ``image1`` is the left half, ``image2`` the right one
                           mirrored, both 28 x 14 pixels. It shows how two views are handled; it is no replacement for
                           two projections of one patient.
``same_organ``             a task that no single view can solve: each view is a breast ultrasound or a chest X-ray, and
                           the label is whether both are of one kind (exclusive or). 512 / 128 / 256 pairs, the four
                           combinations equally often.
``hippocampus``            24 MR crops around a hippocampus (Medical Segmentation Decathlon) with the label maps of its
                           anterior and posterior part, 12 / 4 / 8 crops. No two of them are of one person, as far as
                           that can be told (see ``monai_mamba/quickstart/data/README.md``).
``hippocampus_size``       the same crops: is the hippocampus larger (0) or smaller (1) than the median of the training
                           cases, by the volume of its reference label in mm3? A stand-in for atrophy.
``hippocampus_landmarks``  windows of 24 x 36 x 24 voxels at random positions in the same crops, 48 / 8 / 16, with three
                           landmarks made from the label maps: the center of mass of the anterior part, that of the
                           posterior part, and that of the anterior voxels that touch the posterior part from the
                           front. The crops are cut closely around the hippocampus, so that the mean position alone is
                           within 2 mm there; in a random window it says little. A landmark outside its window is
                           missing (null).
=========================  =========================================================================================

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

from monai_mamba.heat_maps import voxel_to_world
from monai_mamba.training.datalist import MANIFEST, read_manifest

#: In the data list of a sample: bundles shorten their recipes for it.
SAMPLE_MARK = "is_sample"
_SECTIONS = {"training": "train", "validation": "val", "test": "test"}
_HIPPOCAMPUS_LICENSE = "CC BY-SA 4.0; Medical Segmentation Decathlon (Antonelli et al. 2022), Vanderbilt University"
_BREAST_LICENSE = "CC BY 4.0; MedMNIST v2 (Yang et al. 2023), from Al-Dhabyani et al. 2020"
_PNEUMONIA_LICENSE = "CC BY 4.0; MedMNIST v2 (Yang et al. 2023), from Kermany et al. 2018"
#: Windows of the landmark sample: size in voxels, and how many are taken from each crop.
_WINDOW = (24, 36, 24)
_NUM_WINDOWS = {"training": 4, "validation": 2, "test": 2}
_LANDMARKS = ["anterior center", "posterior center", "border center"]


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


def _medmnist(name: str) -> dict[str, np.ndarray]:
    with as_file(files("monai_mamba.training") / "data" / f"{name}.npz") as path, np.load(path) as arrays:
        return dict(arrays)


def _pictures(
    folder: Path,
    source: str,
    about: dict[str, object],
    views: Callable[[np.ndarray], dict[str, np.ndarray]] = lambda image: {"image": image},
) -> dict[str, object]:
    """Write a MedMNIST set as pictures; ``views`` turns an image into the pictures of a case."""
    manifest = dict(about)
    arrays = _medmnist(source)
    (folder / "images").mkdir()
    for section, prefix in _SECTIONS.items():
        cases = []
        labels = arrays[f"{prefix}_labels"].ravel()
        for number, (image, label) in enumerate(zip(arrays[f"{prefix}_images"], labels, strict=True)):
            name = f"{prefix}_{number:04d}"
            cases.append({"case": name, "label": int(label), **_write_views(folder, name, views(image))})
        manifest[section] = cases
    return manifest


def _write_views(folder: Path, name: str, views: dict[str, np.ndarray]) -> dict[str, str]:
    paths = {key: f"images/{name}{key.removeprefix('image')}.png" for key in views}
    for key, pixels in views.items():
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / paths[key])
    return paths


def _halves(image: np.ndarray) -> dict[str, np.ndarray]:
    half = image.shape[1] // 2
    return {"image1": image[:, :half], "image2": image[:, ::-1][:, :half]}


def _same_organ(folder: Path) -> dict[str, object]:
    manifest: dict[str, object] = {"license": f"{_BREAST_LICENSE}; {_PNEUMONIA_LICENSE}"}
    manifest["classes"] = ["same", "different"]
    organs = [_medmnist("breastmnist"), _medmnist("pneumoniamnist")]
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for section, quarter in (("training", 128), ("validation", 32), ("test", 64)):
        prefix = _SECTIONS[section]
        cases = []
        for number in range(4 * quarter):
            kinds = {"image1": number % 2, "image2": number // 2 % 2}
            views = {}
            for key, kind in kinds.items():
                images = organs[kind][f"{prefix}_images"]
                views[key] = images[generator.integers(len(images))]
            name = f"{prefix}_{number:04d}"
            label = int(kinds["image1"] != kinds["image2"])
            cases.append({"case": name, "label": label, **_write_views(folder, name, views)})
        manifest[section] = cases
    return manifest


def _hippocampus_crops() -> tuple[Path, dict[str, list[str]], dict[str, float]]:
    """Folder of the packaged crops, the cases of each section, and the volume of each hippocampus in mm3."""
    source = Path(str(files("monai_mamba.quickstart") / "data" / "hippocampus"))
    held_out = set(json.loads((source / "dataset.json").read_text(encoding="utf-8"))["held_out"])
    volumes = {}
    for path in sorted((source / "labelsTr").glob("*.nii.gz")):
        label = nib.Nifti1Image.from_filename(path)
        voxel_mm3 = float(np.prod(label.header.get_zooms()[:3]))
        volumes[path.name.removesuffix(".nii.gz")] = np.count_nonzero(label.dataobj) * voxel_mm3
    by_volume = sorted((case for case in volumes if case not in held_out), key=lambda case: volumes[case])
    # Every fourth in the order of the volumes validates, so that small and large ones are there.
    sections = {
        "training": [case for i, case in enumerate(by_volume) if i % 4 != 1],
        "validation": by_volume[1::4],
        "test": sorted(held_out),
    }
    return source, sections, volumes


def _hippocampus(folder: Path) -> dict[str, object]:
    source, sections, _ = _hippocampus_crops()
    shutil.copytree(source / "imagesTr", folder / "images")
    shutil.copytree(source / "labelsTr", folder / "labels")
    return {
        "license": _HIPPOCAMPUS_LICENSE,
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        **{
            section: [
                {"case": case, "image": f"images/{case}.nii.gz", "label": f"labels/{case}.nii.gz"} for case in cases
            ]
            for section, cases in sections.items()
        },
    }


def _hippocampus_size(folder: Path) -> dict[str, object]:
    source, sections, volumes = _hippocampus_crops()
    shutil.copytree(source / "imagesTr", folder / "images")
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


def _hippocampus_landmarks(folder: Path) -> dict[str, object]:
    source, sections, _ = _hippocampus_crops()
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    manifest: dict[str, object] = {"license": _HIPPOCAMPUS_LICENSE, "landmark_names": _LANDMARKS}
    for section, crops in sections.items():
        cases = []
        for crop in crops:
            image = nib.Nifti1Image.from_filename(source / "imagesTr" / f"{crop}.nii.gz")
            label = np.asarray(nib.Nifti1Image.from_filename(source / "labelsTr" / f"{crop}.nii.gz").dataobj)
            assert image.affine is not None
            points = _structure_centers(label)
            for number in range(_NUM_WINDOWS[section]):
                start = np.array([generator.integers(n - w + 1) for n, w in zip(label.shape, _WINDOW, strict=True)])
                is_inside = ((points >= start) & (points <= start + np.array(_WINDOW) - 1)).all(1)
                window = image.slicer[tuple(slice(s, s + w) for s, w in zip(start, _WINDOW, strict=True))]
                name = f"{crop}_{number}"
                nib.save(window, folder / "images" / f"{name}.nii.gz")
                world = voxel_to_world(points, image.affine)
                landmarks = [
                    p.round(3).tolist() if inside else None for p, inside in zip(world, is_inside, strict=True)
                ]
                cases.append({"case": name, "patient": crop, "image": f"images/{name}.nii.gz", "landmarks": landmarks})
        manifest[section] = cases
    return manifest


def _structure_centers(label: np.ndarray) -> np.ndarray:
    """Centers in voxels ``(3, 3)``: anterior part, posterior part, anterior voxels with a posterior one behind them."""
    anterior, posterior = label == 1, label == 2
    behind = np.zeros_like(posterior)
    behind[:, 1:] = posterior[:, :-1]  # the second axis points forward (RAS+)
    return np.stack([np.argwhere(mask).mean(0) for mask in (anterior, posterior, anterior & behind)])


SAMPLES: dict[str, Callable[[Path], dict[str, object]]] = {
    "breastmnist": lambda folder: _pictures(
        folder, "breastmnist", {"license": _BREAST_LICENSE, "classes": ["malignant", "benign"]}
    ),
    "pneumoniamnist": lambda folder: _pictures(
        folder, "pneumoniamnist", {"license": _PNEUMONIA_LICENSE, "classes": ["normal", "pneumonia"]}
    ),
    "breastmnist_two_view": lambda folder: _pictures(
        folder, "breastmnist", {"license": _BREAST_LICENSE, "classes": ["malignant", "benign"]}, _halves
    ),
    "same_organ": _same_organ,
    "hippocampus": _hippocampus,
    "hippocampus_size": _hippocampus_size,
    "hippocampus_landmarks": _hippocampus_landmarks,
}
