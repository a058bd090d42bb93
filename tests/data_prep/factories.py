"""Factories of downloads: small files in a publisher's exact layout, dirt included, and helpers to convert them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
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


def nnunet_plans(out: Path) -> dict[str, Any]:
    """Plans by ``nnUNetv2_plan_and_preprocess --verify_dataset_integrity`` of ``.../DatasetNNN_Name``."""
    base = out.parent.parent
    folders = {f"nnUNet_{name}": str(base / f"nnunet_{name}") for name in ("preprocessed", "results")}
    command = [str(Path(sys.executable).with_name("nnUNetv2_plan_and_preprocess")), "-d", out.name[7:10]]
    command += ["--verify_dataset_integrity", "-np", "1", "-npfp", "1", "-c", "3d_fullres"]
    # nnU-Net's planner cannot do without a process for augmentation.
    environment = os.environ | folders | {"nnUNet_raw": str(out.parent), "nnUNet_n_proc_DA": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert "verify_dataset_integrity Done" in done.stdout
    return json.loads((base / "nnunet_preprocessed" / out.name / "nnUNetPlans.json").read_text())


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def dicom_slice(
    position: Sequence[float],
    pixels: np.ndarray,
    number: int = 1,
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    spacing: Sequence[float] = (0.7, 0.8),
    **tags: Any,
) -> pydicom.Dataset:
    """A CT slice in memory; `tags` set further attributes by keyword."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.5.{number}"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.3.1", "1.2.3.2", "1.2.3.3"
    data.Modality, data.PatientID, data.PatientName = "CT", "P1", "Doe^Jane"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.InstanceNumber = number
    data.ImagePositionPatient = [float(x) for x in position]
    data.ImageOrientationPatient = [float(x) for x in orientation]
    data.PixelSpacing = [float(x) for x in spacing]
    data.SliceThickness = 2.0
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = pixels.astype("<i2").tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def dicom_series(
    count: int = 6, shape: tuple[int, int] = (20, 16), step: float = 2.5, **tags: Any
) -> list[pydicom.Dataset]:
    """A regular axial CT series in memory, as a list of data sets that a test may damage."""
    generator = np.random.default_rng(7)
    return [
        dicom_slice((-10.0, -20.0, 30.0 + step * k), generator.integers(0, 2000, shape), k + 1, **tags)
        for k in range(count)
    ]


def save_dicom(folder: Path, series: Sequence[pydicom.Dataset]) -> Path:
    """Write data sets under names that say nothing about their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(series):
        data.save_as(folder / f"IM{(i * 7919) % 10007:05d}", enforce_file_format=True)
    return folder
