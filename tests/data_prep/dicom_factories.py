"""Synthetic DICOM series, valid and faulty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
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


def make_structure_set(affine: np.ndarray, squares: Sequence[tuple[float, float, float]]) -> pydicom.Dataset:
    """RTSTRUCT of one region, drawn as squares (slice, first, last) in voxels of a RAS+ affine."""
    dataset, roi, drawn = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    roi.ROINumber, roi.ROIName = 1, "Organ"
    drawn.ReferencedROINumber, drawn.ContourSequence = 1, []
    for number, first, last in squares:
        contour = pydicom.Dataset()
        contour.ContourGeometricType = "CLOSED_PLANAR"
        corners = [(first, first), (last, first), (last, last), (first, last)]
        points = [(affine @ [x, y, number, 1])[:3] * [-1, -1, 1] for x, y in corners]
        contour.ContourData = [f"{value:.6f}" for point in points for value in point]
        drawn.ContourSequence.append(contour)
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [roi], [drawn]
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.3", uid("rt")
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def planes(dataset: pydicom.Dataset) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Of every frame: rescaled pixels, LPS position, ``(2, 3)`` row and column direction, spacing."""

    def numbers(value: Any) -> np.ndarray:
        return np.array([float(one) for one in value])

    if "PerFrameFunctionalGroupsSequence" not in dataset:
        groups: list[Any] = [dataset]
    else:
        shared = dataset.SharedFunctionalGroupsSequence[0]
        groups = []
        for frame in dataset.PerFrameFunctionalGroupsSequence:
            merged = pydicom.Dataset()
            for part in (shared, frame):
                for element in part:
                    for item in element.value or []:
                        merged.update(item)
            groups.append(merged)
    if "PhotometricInterpretation" not in dataset:
        dataset.PhotometricInterpretation = "MONOCHROME2"
    try:
        stored = dataset.pixel_array
    except RuntimeError:  # no plugin for lossless JPEG; SimpleITK would have applied a rescale, which MR has not
        assert "RescaleSlope" not in dataset
        stored = sitk.GetArrayFromImage(sitk.ReadImage(dataset.filename))
    stored = stored.reshape(len(groups), dataset.Rows, dataset.Columns).astype(float)
    return [
        (
            pixels * float(one.get("RescaleSlope", 1)) + float(one.get("RescaleIntercept", 0)),
            numbers(one.ImagePositionPatient),
            numbers(one.ImageOrientationPatient).reshape(2, 3),
            numbers(one.PixelSpacing),
        )
        for pixels, one in zip(stored, groups, strict=True)
    ]


def assert_every_voxel_is_where_its_header_says(path: Path, files: Sequence[Path]) -> None:
    """Independent of the package: each file's pixels are found at the place its own header gives, and nothing else."""
    image = nibabel.load(path)
    data, count = np.asanyarray(image.dataobj), 0
    to_voxel = np.linalg.inv(np.diag([-1.0, -1, 1, 1]) @ image.affine)
    for file in files:
        dataset = pydicom.dcmread(file, force=True)
        dataset.file_meta.setdefault("TransferSyntaxUID", ExplicitVRLittleEndian)
        for pixels, position, (row, column), spacing in planes(dataset):
            rows, columns = np.meshgrid(*map(np.arange, pixels.shape), indexing="ij")
            places = position + columns[..., None] * row * spacing[1] + rows[..., None] * column * spacing[0]
            voxels = places @ to_voxel[:3, :3].T + to_voxel[:3, 3]
            whole = np.rint(voxels).astype(int)
            assert np.linalg.norm((voxels - whole) @ image.affine[:3, :3].T, axis=-1).max() <= 0.01
            np.testing.assert_allclose(data[tuple(np.moveaxis(whole, -1, 0))], pixels, rtol=1e-5, atol=1e-4)
            count += pixels.size
    assert count == data.size
    by_itk = sitk.ReadImage(str(path))
    for index in [(0, 0, 0), tuple(n - 1 for n in data.shape)]:
        place = np.array(by_itk.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        np.testing.assert_allclose(place, (image.affine @ [*index, 1])[:3], atol=0.01)
