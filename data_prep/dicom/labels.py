"""Label maps from DICOM-SEG and RTSTRUCT objects, on the grid of the images they refer to; and the way back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dicom.headers import named_errors, read_dataset
from data_prep.dicom.pixels import decode
from data_prep.errors import CaseError, DicomReadError
from data_prep.geometry import TOLERANCE_MM, Grid, lps_to_ras
from data_prep.memory import bounded
from data_prep.nifti import write_nifti
from data_prep.operations import Job, Outcome, operation
from data_prep.operations.volumes import smallest_unsigned

#: a contour lies on a slice when it is at most this part of the slice step away from it
_CONTOUR_TOLERANCE = 0.1
#: bytes that all copies of a pixel of the segments, or of a voxel, may take
_MEMORY_PER_VOXEL = 32


def segment_names(path: Path) -> list[str]:
    """Segment labels of a DICOM-SEG object, or ROI names of an RTSTRUCT, in lower case.

    Raises:
        DicomReadError: neither of these, or damaged.
    """
    dataset = read_dataset(path)
    try:
        if "SegmentSequence" in dataset:
            return [_name(item.SegmentLabel) for item in dataset.SegmentSequence]
        return [_name(item.ROIName) for item in dataset.StructureSetROISequence]
    except Exception as error:
        raise DicomReadError("unreadable-label", "the object names no segments or regions") from error


def _name(value: Any) -> str:
    return " ".join(str(value).split()).lower()


def _values(job: Job) -> dict[str, int]:
    return {str(name): int(value) for name, value in job.params["values"]}


@operation(version=1)
@named_errors
def segmentation(job: Job) -> Outcome:
    """A DICOM-SEG object as a label map.

    Params:
        affine, shape: grid of the image volume (RAS+, ``(columns, rows, slices)``).
        values: ``[segment label, value]``; segments that are not listed are left out.
        overlap: ``error``, or ``last`` to let the segment with the higher number win.
    """
    dataset = read_dataset(job.inputs[0], pixels=True)
    pixels = math.prod(int(dataset.get(name) or 1) for name in ("NumberOfFrames", "Rows", "Columns"))
    with bounded(job.inputs, _MEMORY_PER_VOXEL * (pixels + math.prod(job.params["shape"]))):
        return _draw_segments(job, dataset)


def _draw_segments(job: Job, dataset: Any) -> Outcome:
    affine, shape = np.array(job.params["affine"]), tuple(job.params["shape"])
    try:
        pixels = decode(dataset)
        frames = np.atleast_3d(pixels) if int(dataset.NumberOfFrames) > 1 else pixels[None]
        if str(dataset.get("SegmentationType", "BINARY")) == "FRACTIONAL":
            frames = frames > 0.5 * float(dataset.get("MaximumFractionalValue") or 255)
        numbers = {int(item.SegmentNumber): _name(item.SegmentLabel) for item in dataset.SegmentSequence}
        groups = dataset.PerFrameFunctionalGroupsSequence
        shared = dataset.SharedFunctionalGroupsSequence[0] if "SharedFunctionalGroupsSequence" in dataset else {}
    except MemoryError:
        raise
    except Exception as error:
        raise DicomReadError("unreadable-label", f"the segmentation is damaged ({type(error).__name__})") from error
    if len(groups) != len(frames):
        raise DicomReadError("unreadable-label", "the number of frames and of their descriptions differ")
    values, labels = _values(job), np.zeros(shape, dtype=np.uint16)
    for frame, group in sorted(zip(frames, groups, strict=True), key=lambda pair: _segment_number(pair[1], shared)):
        value = values.get(numbers.get(_segment_number(group, shared), ""))
        if value is None:
            continue
        number = _place_frame(group, shared, frame.shape, affine, shape)
        mask = frame.T.astype(bool)
        plane = labels[:, :, number]
        if job.params.get("overlap", "error") == "error" and np.any((plane != 0) & (plane != value) & mask):
            raise CaseError("overlapping-segments", "segments overlap; choose with --label, or take --overlap last")
        plane[mask] = value
    return _write(job, labels, affine)


def _segment_number(group: Any, shared: Any) -> int:
    for item in (group, shared):
        found = item.get("SegmentIdentificationSequence") if item else None
        if found:
            return int(found[0].ReferencedSegmentNumber)
    raise DicomReadError("unreadable-label", "a frame of the segmentation names no segment")


def _place_frame(group: Any, shared: Any, size: tuple[int, ...], affine: np.ndarray, shape: tuple[int, ...]) -> int:
    """Number of the slice on which a frame lies exactly.

    Raises:
        CaseError: it lies on another grid.
    """

    def find(sequence: str, name: str, count: int) -> np.ndarray:
        for item in (group, shared):
            found = item.get(sequence) if item else None
            if found and found[0].get(name) is not None:
                numbers = np.array([float(value) for value in found[0].get(name)])
                if len(numbers) == count and np.isfinite(numbers).all():
                    return numbers
        raise DicomReadError("no-position", f"a frame of the segmentation lacks its {name}")

    position = find("PlanePositionSequence", "ImagePositionPatient", 3)
    orientation = find("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    spacing = find("PixelMeasuresSequence", "PixelSpacing", 2)
    index = np.linalg.solve(lps_to_ras(affine), np.append(position, 1.0))[:3]
    number = round(float(index[2]))
    corners = []
    for column in (0, size[1] - 1):
        for row in (0, size[0] - 1):
            lps = position + orientation[:3] * spacing[1] * column + orientation[3:] * spacing[0] * row
            corners.append(np.linalg.norm(lps - (lps_to_ras(affine) @ [column, row, number, 1])[:3]))
    if size != (shape[1], shape[0]) or not max(corners) <= TOLERANCE_MM or not 0 <= number < shape[2]:
        raise CaseError("grids-differ", "the segmentation does not lie on the grid of its image")
    return number


@operation(version=1)
@named_errors
def structure_set(job: Job) -> Outcome:
    """Closed planar contours of an RTSTRUCT as a label map; a contour inside another of the same region is a hole.

    Params:
        affine, shape, values, overlap: as for `segmentation`.
    """
    from skimage.draw import polygon2mask

    affine, shape = np.array(job.params["affine"]), tuple(job.params["shape"])
    dataset = read_dataset(job.inputs[0])
    try:
        names = {int(item.ROINumber): _name(item.ROIName) for item in dataset.StructureSetROISequence}
        contours = {
            int(item.ReferencedROINumber): list(item.get("ContourSequence") or [])
            for item in dataset.ROIContourSequence
        }
    except Exception as error:
        raise DicomReadError("unreadable-label", f"the structure set is damaged ({type(error).__name__})") from error
    values, labels = _values(job), np.zeros(shape, dtype=np.uint16)
    inverse = np.linalg.inv(lps_to_ras(affine))
    for roi, name in sorted(names.items()):
        if name not in values:
            continue
        planes: dict[int, np.ndarray] = {}
        for contour in contours.get(roi, []):
            if str(contour.get("ContourGeometricType", "")) != "CLOSED_PLANAR":
                raise CaseError("open-contour", "a region is drawn with points or open lines")
            number, points = _contour_points(contour, inverse, shape)
            mask = polygon2mask(shape[:2], points)
            planes[number] = planes.get(number, np.zeros(shape[:2], dtype=bool)) ^ mask
        for number, mask in planes.items():
            plane = labels[:, :, number]
            if job.params.get("overlap", "error") == "error" and np.any((plane != 0) & mask):
                raise CaseError("overlapping-segments", "regions overlap; choose with --label, or take --overlap last")
            plane[mask] = values[name]
    return _write(job, labels, affine)


def _contour_points(contour: Any, inverse: np.ndarray, shape: tuple[int, ...]) -> tuple[int, np.ndarray]:
    try:
        points = np.array([float(value) for value in contour.ContourData]).reshape(-1, 3)
    except Exception as error:
        raise DicomReadError("unreadable-label", "a contour is no list of points") from error
    if len(points) < 3 or not np.isfinite(points).all():
        raise DicomReadError("unreadable-label", "a contour has fewer than three usable points")
    index = points @ inverse[:3, :3].T + inverse[:3, 3]
    number = round(float(np.median(index[:, 2])))
    if np.abs(index[:, 2] - number).max() > _CONTOUR_TOLERANCE:
        raise CaseError("contour-off-slice", "a contour does not lie on a slice of the image")
    if not 0 <= number < shape[2]:
        raise CaseError("missing-slices", "a contour lies on a slice that is not in the image")
    return number, index[:, :2]


def _write(job: Job, labels: np.ndarray, affine: np.ndarray) -> Outcome:
    from data_prep.dicom.convert import prove_file

    write_nifti(job.output, smallest_unsigned(labels), affine)
    grid: Grid = prove_file(job.output, affine, labels.shape)
    return Outcome(grid, tuple(int(value) for value in np.unique(labels)))


def write_dicom_seg(
    label_map: Path, images: Sequence[Path], output: Path, segments: dict[int, str], *, series_description: str
) -> int:
    """Write a label map as a DICOM-SEG object that belongs to the series it was predicted from.

    Args:
        label_map: NIfTI on exactly the grid of the series.
        images: the files of the series (single-frame).
        output: ``.dcm`` to write; whole or not at all.
        segments: value -> name of the segment.
        series_description: shown in the PACS.

    Returns:
        Number of segments that were written (empty ones are left out).

    Raises:
        CaseError: the grids differ, or the map holds a value without a name.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    from data_prep.dicom.headers import read_facts
    from data_prep.dicom.stacks import Policy, Slice, build_stacks
    from data_prep.engine.files import sync_folder
    from data_prep.geometry import grid_difference
    from data_prep.nifti import open_nifti
    from data_prep.operations.volumes import to_integers

    slices = []
    for path in sorted(images):
        facts = read_facts(path)
        if facts["kind"] != "image" or len(facts["slices"]) != 1:
            raise CaseError("not-an-image", "the series must consist of single-frame images")
        slices.append(Slice(str(path), 0, facts, facts["slices"][0]))
    stack = build_stacks(slices, Policy(), lambda first, second: False)[0]
    nifti = open_nifti(label_map)
    # A prediction may come back with its axes in another order; space decides, not the order of the voxels.
    from data_prep.dicom.convert import to_dicom_order

    data, affine = to_dicom_order(nifti.read(), nifti.grid.affine, stack.affine)  # type: ignore[arg-type]
    problem = grid_difference(Grid(stack.shape, stack.affine), Grid(data.shape, affine))
    if problem:
        raise CaseError("grids-differ", problem)
    labels = to_integers(data)
    found = [int(value) for value in np.unique(labels) if value]
    unnamed = [value for value in found if value not in segments]
    if unnamed:
        raise CaseError("unknown-label", f"the label map holds {unnamed}, which have no name")
    if not found:
        raise CaseError("empty-label", "the label map is empty; a DICOM-SEG needs at least one segment")
    sources = [read_dataset(one.path) for one in stack.slices]
    masks = np.stack([np.stack([labels[:, :, k].T == v for v in found], axis=-1) for k in range(len(sources))])
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=segments[value][:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.AnatomicalStructure,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=hd.AlgorithmIdentificationSequence(
                name="monai-mamba", version="1", family=codes.DCM.ArtificialIntelligence
            ),
        )
        for number, value in enumerate(found, 1)
    ]
    result = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=masks,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=hd.UID(),
        series_number=100,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="monai-mamba",
        manufacturer_model_name="monai-mamba-data",
        software_versions="1",
        device_serial_number="0",
        series_description=series_description[:64],
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        result.save_as(temporary)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(output.parent)
    return len(found)
