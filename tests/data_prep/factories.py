"""Factories of downloads: small files in a publisher's exact layout, dirt included, and helpers to convert them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

from data_prep.cli import convert
from data_prep.model import Source

RAS_1MM = np.diag([1.0, 1.0, 1.0, 1.0])


def write_nifti_volume(
    path: Path, shape: Sequence[int] = (12, 10, 8), seed: int = 0, affine: np.ndarray = RAS_1MM, dtype: Any = np.int16
) -> np.ndarray:
    """A smooth random image; returns its voxels."""
    data = np.random.default_rng(seed).normal(100, 20, tuple(shape)).astype(dtype)
    _save_nifti(path, data, affine)
    return data


def write_label_map(
    path: Path,
    shape: Sequence[int] = (12, 10, 8),
    values: Sequence[int] = (1, 2),
    affine: np.ndarray = RAS_1MM,
    dtype: Any = np.uint8,
) -> np.ndarray:
    """Background with one slab per value; returns the labels."""
    data = np.zeros(tuple(shape), dtype)
    for i, value in enumerate(values):
        data[2 + 2 * i : 4 + 2 * i, 2:5, 2:5] = value
    _save_nifti(path, data, affine)
    return data


def _save_nifti(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)


def write_picture(path: Path, size: tuple[int, int] = (32, 24), seed: int = 0, mode: str = "L") -> np.ndarray:
    """A random PNG or JPEG (by the name's ending) of ``size = (width, height)``; returns the pixels before encoding."""
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def write_csv(path: Path, rows: Sequence[Sequence[Any]], delimiter: str = ",") -> None:
    """Write rows, the first being the header unless the publisher has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_bytes(path: Path, content: bytes = b"\0\5\x16\7") -> None:
    """A file of given bytes; the default is the beginning of an AppleDouble file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def decathlon_tree(root: Path, num_cases: int = 6, num_channels: int = 1) -> Path:
    """A task folder of the Medical Segmentation Decathlon: its JSON, images, labels, one test image and its usual dirt.

    Dirt: an AppleDouble file, ``.DS_Store``, an image that dataset.json does not list.
    """
    root = root / "Task04_Toy"
    shape = (12, 10, 8) if num_channels == 1 else (12, 10, 8, num_channels)
    for i in range(num_cases):
        write_nifti_volume(root / f"imagesTr/toy_{i:03d}.nii.gz", shape, seed=i)
        write_label_map(root / f"labelsTr/toy_{i:03d}.nii.gz")
    write_nifti_volume(root / "imagesTs/toy_900.nii.gz", shape, seed=900)
    write_nifti_volume(root / "imagesTr/toy_800.nii.gz", shape, seed=800)
    write_bytes(root / "imagesTr/._toy_000.nii.gz")
    write_bytes(root / ".DS_Store")
    write_json(
        root / "dataset.json",
        {
            "name": "Toy",
            "description": "a toy",
            "reference": "nobody",
            "licence": "CC0",
            "modality": {str(i): f"MRI{i}" for i in range(num_channels)},
            "labels": {"0": "background", "1": "front", "2": "back"},
            "numTraining": num_cases,
            "numTest": 1,
            "training": [
                {"image": f"./imagesTr/toy_{i:03d}.nii.gz", "label": f"./labelsTr/toy_{i:03d}.nii.gz"}
                for i in range(num_cases)
            ],
            "test": ["./imagesTs/toy_900.nii.gz"],
        },
    )
    return root


def convert_tree(source: Source, folder: Path | Sequence[Path], out: Path, **options: Any) -> int:
    """Run a source in this process (``engine="serial"`` unless told otherwise); returns the exit code."""
    folders = [folder] if isinstance(folder, Path) else list(folder)
    return convert(source, folders, out, **{"engine": "serial", **options})


def report_lines(out: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
    """``(kind, input, item)`` to ``(status, reason)`` of the report with input paths."""
    with open(out.parent / f"private-{out.name}" / "report.csv", newline="") as file:
        return {(r["kind"], r["input"], r["item"]): (r["status"], r["reason"]) for r in csv.DictReader(file)}


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
