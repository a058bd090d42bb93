"""Synthetic DICOM series, valid and faulty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT, MR, MG = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.1.2"


def uid(*parts: object) -> str:
    """The same UID for the same parts."""
    return generate_uid(entropy_srcs=["monai-mamba tests", *map(str, parts)])


def rotation(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Row and column direction of a plane that is oblique by `angle` radians about two axes."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return turn[:, 0], turn[:, 1]


def make_slice(
    number: int,
    *,
    series: str = "a",
    modality: str = "CT",
    shape: tuple[int, int] = (12, 10),
    spacing: tuple[float, float] = (0.8, 0.7),
    step: float = 2.5,
    angle: float = 0.0,
    origin: Sequence[float] = (-20.0, -30.0, 40.0),
    seed: int = 0,
) -> FileDataset:
    """Slice `number` of an even, upright, oblique series; ``shape`` and ``spacing`` are (rows, columns)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CT if modality == "CT" else MR
    meta.MediaStorageSOPInstanceUID = uid(series, number)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    row, column = rotation(angle)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uid("study"), uid("series", series)
    dataset.FrameOfReferenceUID = uid("frame")
    dataset.PatientID, dataset.PatientName, dataset.Modality = "P1", "Test^Only", modality
    dataset.PatientBirthDate, dataset.PatientSex, dataset.StudyDate, dataset.StudyTime = "", "", "", ""
    dataset.AccessionNumber, dataset.StudyID, dataset.ReferringPhysicianName = "", "", ""
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SeriesDescription = f"series {series}"
    dataset.InstanceNumber = number + 1
    dataset.Rows, dataset.Columns = shape
    dataset.PixelSpacing = [f"{value:.10g}" for value in spacing]
    dataset.SliceThickness = "1"
    position = np.array(origin) + number * step * np.cross(row, column)
    dataset.ImagePositionPatient = [f"{value:.10g}"[:16] for value in position]
    dataset.ImageOrientationPatient = [f"{value:.13f}"[:16] for value in (*row, *column)]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
    pixels = np.random.default_rng([seed, number]).integers(0, 2000, shape).astype(np.int16)
    dataset.PixelData = pixels.tobytes()
    return dataset


def write_series(
    folder: Path,
    num_slices: int = 9,
    *,
    edit: Callable[[list[FileDataset]], Any] | None = None,
    shuffle: int | None = None,
    **options: Any,
) -> list[FileDataset]:
    """Write a series after `edit` has changed its data sets; names tell nothing about the order."""
    slices = [make_slice(number, **options) for number in range(num_slices)]
    if edit is not None:
        edit(slices)
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0 if shuffle is None else shuffle).permutation(len(slices))
    for name, number in enumerate(order):
        slices[number].save_as(folder / f"IM{name:04d}", enforce_file_format=True)
    return slices


def oracle_distance(path: Path, datasets: Sequence[FileDataset]) -> float:
    """Largest distance in mm between where a NIfTI file and the DICOM headers put the corners of each slice.

    Independent of the package: the voxels of every slice are searched in the volume by their values.
    """
    import nibabel

    image = nibabel.load(path)
    data, affine = np.asanyarray(image.dataobj), image.affine
    worst = 0.0
    for dataset in datasets:
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        pixels = dataset.pixel_array.astype(float) * slope + intercept
        position = np.array([float(x) for x in dataset.ImagePositionPatient])
        row, column = np.split(np.array([float(x) for x in dataset.ImageOrientationPatient]), 2)
        spacing = [float(x) for x in dataset.PixelSpacing]
        for r, c in ((0, 0), (0, pixels.shape[1] - 1), (pixels.shape[0] - 1, 0)):
            lps = position + row * spacing[1] * c + column * spacing[0] * r
            index = np.linalg.solve(affine, [-lps[0], -lps[1], lps[2], 1])[:3]
            nearest = np.rint(index).astype(int)
            if (nearest < 0).any() or (nearest >= data.shape).any():
                return float("inf")
            if abs(float(data[tuple(nearest)]) - pixels[r, c]) > 1e-3:
                return float("inf")
            worst = max(worst, float(np.linalg.norm(affine[:3, :3] @ (index - nearest))))
    return worst


def read(path: Path) -> pydicom.FileDataset:
    return pydicom.dcmread(path)
