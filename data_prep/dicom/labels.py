"""Label maps from DICOM-SEG and RTSTRUCT objects, on the grid of the images they refer to; and the way back."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from data_prep.dicom.headers import hash_uid, named_errors, read_dataset, read_facts
from data_prep.dicom.pixels import decode
from data_prep.dicom.stacks import Policy, Slice, Stack, build_stacks, refusal, split_series
from data_prep.engine.files import write_whole
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
            # Label map segmentations may describe their background as segment 0.
            return [_name(item.SegmentLabel) for item in dataset.SegmentSequence if int(item.SegmentNumber) > 0]
        return [_name(item.ROIName) for item in dataset.StructureSetROISequence]
    except Exception as error:
        raise DicomReadError("unreadable-label", "the object names no segments or regions") from error


def _name(value: Any) -> str:
    return " ".join(str(value).split()).lower()


def _values(job: Job) -> dict[str, int]:
    return {str(name): int(value) for name, value in job.params["values"]}


@operation(version=2)
@named_errors
def segmentation(job: Job) -> Outcome:
    """A DICOM-SEG object as a label map: BINARY, FRACTIONAL, or LABELMAP (Supplement 243).

    Params:
        affine, shape: grid of the image volume (RAS+, ``(columns, rows, slices)``).
        values: ``[segment label, value]``; segments that are not listed are left out.
        overlap: ``error``, or ``last`` to let the segment with the higher number win.
        fraction: part of its maximum from which a voxel of a FRACTIONAL object belongs to a segment; 0 refuses these.
        frame: hash of the image's frame of reference.
    """
    dataset = read_dataset(job.inputs[0], pixels=True)
    pixels = math.prod(int(dataset.get(name) or 1) for name in ("NumberOfFrames", "Rows", "Columns"))
    with bounded(job.inputs, _MEMORY_PER_VOXEL * (pixels + math.prod(job.params["shape"]))):
        return _draw_segments(job, dataset)


def _draw_segments(job: Job, dataset: Any) -> Outcome:
    affine, shape = np.array(job.params["affine"]), tuple(job.params["shape"])
    kind, fraction = str(dataset.get("SegmentationType", "BINARY")), float(job.params.get("fraction", 0))
    notes = _frame_note(job, [dataset.get("FrameOfReferenceUID")])
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise DicomReadError("unreadable-label", "the segmentation is neither BINARY nor FRACTIONAL nor LABELMAP")
    if kind == "FRACTIONAL" and not fraction:
        raise CaseError("fractional-segments", "how much of a voxel makes it a part is yours to say: --fraction")
    try:
        pixels = decode(dataset)
        frames = pixels if pixels.ndim == 3 else pixels[None]
        if kind == "FRACTIONAL":
            frames = frames >= max(fraction * float(dataset.MaximumFractionalValue), 1)
            notes.append(f"fractional segments were cut at {fraction:g} of their maximum")
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
    known = {number: values[name] for number, name in numbers.items() if number and name in values}
    pairs = list(zip(frames, groups, strict=True))
    if kind == "LABELMAP":
        background = {0, int(dataset.get("PixelPaddingValue") or 0)}
        masks = list(_masks_of_label_maps(pairs, numbers.keys() | background, known))
    else:
        pairs.sort(key=lambda pair: _segment_number(pair[1], shared))
        numbered = ((frame, group, known.get(_segment_number(group, shared))) for frame, group in pairs)
        masks = [(frame.astype(bool), group, value) for frame, group, value in numbered if value is not None]
    for mask, group, value in masks:
        number = _place_frame(group, shared, mask.shape, affine, shape)
        plane = labels[:, :, number]
        if job.params.get("overlap", "error") == "error" and np.any((plane != 0) & (plane != value) & mask.T):
            raise CaseError("overlapping-segments", "segments overlap; choose with --label, or take --overlap last")
        plane[mask.T] = value
    return _write(job, labels, affine, tuple(notes))


def _masks_of_label_maps(
    pairs: Sequence[tuple[np.ndarray, Any]], described: Set[int], known: dict[int, int]
) -> Iterator[tuple[np.ndarray, Any, int]]:
    """Mask, frame and value of every wanted segment; the voxels of a label map are numbers of segments."""
    for frame, group in pairs:
        found = [int(number) for number in np.unique(frame)]
        unknown = [number for number in found if number not in described]
        if unknown:
            raise DicomReadError("unreadable-label", f"the label map holds {unknown[:5]}, which are no segments of it")
        for number in found:
            if number in known:
                yield frame == number, group, known[number]


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


@operation(version=2)
@named_errors
def structure_set(job: Job) -> Outcome:
    """Closed planar contours of an RTSTRUCT as a label map; a contour inside another of the same region is a hole.

    Params:
        affine, shape, values, overlap, frame: as for `segmentation`.
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
    frames = [item.get("FrameOfReferenceUID") for item in dataset.get("ReferencedFrameOfReferenceSequence") or []]
    return _write(job, labels, affine, tuple(_frame_note(job, frames)))


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


def _frame_note(job: Job, frames: Iterable[Any]) -> list[str]:
    """A remark where a label names another frame of reference than its image: some writers invent one.

    The label names its series, and where it lies on the slices is checked, so it is taken all the same.
    """
    known = {hash_uid(frame) for frame in frames} - {""}
    own = job.params.get("frame")
    return ["the label names another frame of reference than its image"] if own and known and own not in known else []


def _write(job: Job, labels: np.ndarray, affine: np.ndarray, notes: tuple[str, ...] = ()) -> Outcome:
    from data_prep.dicom.convert import prove_file

    write_nifti(job.output, smallest_unsigned(labels), affine)
    grid: Grid = prove_file(job.output, affine, labels.shape)
    return Outcome(grid, tuple(int(value) for value in np.unique(labels)), notes=notes)


#: what a DICOM-SEG object says of patient and study, so that a PACS files it with its series; nothing else is copied
IDENTITY = (
    "PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID",
    "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID",
    "PositionReferenceIndicator",
)  # fmt: skip


_NEVER_EMPTY = frozenset({"IssuerOfPatientID", "StudyInstanceUID", "FrameOfReferenceUID", "PositionReferenceIndicator"})
#: what highdicom needs of the images besides
_GEOMETRY = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "ImageType", "Rows", "Columns", "PixelSpacing",
    "SliceThickness", "SpacingBetweenSlices", "ImagePositionPatient", "ImageOrientationPatient", "NumberOfFrames",
    "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "DimensionOrganizationSequence", "DimensionIndexSequence",
)  # fmt: skip


def write_dicom_seg(
    label_map: Path, images: Sequence[Path], output: Path, segments: dict[int, str], *, series_description: str
) -> int:
    """Write a label map as a DICOM-SEG object that belongs to the series it was predicted from.

    Args:
        label_map: NIfTI on exactly the grid of the series.
        images: the files of the series, or its one enhanced multi-frame file; label objects among them are passed over.
        output: ``.dcm`` to write; whole or not at all.
        segments: value -> name of the segment.
        series_description: shown in the PACS.

    Returns:
        Number of segments that were written (empty ones are left out).

    Raises:
        CaseError: not one series that makes one volume, the grids differ, or the map holds a value without a name.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    from data_prep.dicom.convert import to_dicom_order
    from data_prep.geometry import grid_difference
    from data_prep.nifti import open_nifti
    from data_prep.operations.volumes import to_integers

    stack = _stack_of(images)
    nifti = open_nifti(label_map)
    # A prediction may come back with its axes in another order; space decides, not the order of the voxels.
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
    # A multi-frame source keeps the order of its frames.
    order = sorted(range(len(stack.slices)), key=lambda k: (stack.slices[k].frame, k))
    paths = dict.fromkeys(stack.slices[k].path for k in order)
    sources = [_source(path) for path in paths]
    masks = np.stack([np.stack([labels[:, :, k].T == v for v in found], axis=-1) for k in order])
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
    if not all(source.get("FrameOfReferenceUID") for source in sources):
        raise CaseError(
            "no-frame-of-reference", "the images have no FrameOfReferenceUID, which a DICOM-SEG object shares with them"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote the name of the patient
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
    except Exception as error:  # a series that highdicom does not take; its text may quote the header
        raise DicomReadError(
            "not-a-volume", f"highdicom cannot refer to this series ({type(error).__name__}); convert it first"
        ) from error
    buffer = io.BytesIO()
    result.save_as(buffer)
    write_whole(output, buffer.getvalue())
    return len(found)


def _source(path: str) -> Dataset:
    """An image with what highdicom needs of it; it wants what all frames share said once."""
    dataset = read_dataset(path, tags=(*IDENTITY, *_GEOMETRY))
    for name in IDENTITY:
        # Anonymizers remove what must be there, if empty.
        if name not in dataset and name not in _NEVER_EMPTY:
            setattr(dataset, name, "")
    frames = dataset.get("PerFrameFunctionalGroupsSequence")
    if frames:
        shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
        for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
            if name not in shared and name in frames[0]:
                setattr(shared, name, frames[0][name].value)
        dataset.SharedFunctionalGroupsSequence = [shared]
    return dataset


def _stack_of(images: Sequence[Path]) -> Stack:
    """The one volume that the files of a series make."""
    slices, series = [], set()
    for path in sorted(images):
        facts = read_facts(path)
        if facts["kind"] == "damaged":
            raise DicomReadError("unreadable-dicom", f"a file of the series: {facts['detail']}")
        if facts["kind"] != "image" or facts["modality"] == "SEG":
            continue
        if refusal(facts) or len(facts["slices"]) != facts["frames"]:
            raise CaseError(
                "not-a-volume", "the series holds an image that is no slice (localizer, color, no position)"
            )
        slices += [Slice(str(path), frame, facts, plane) for frame, plane in enumerate(facts["slices"])]
        series.add(facts["series"])
    files = len({one.path for one in slices})
    if len(series) != 1 or (files > 1 and files != len(slices)):
        raise CaseError(
            "not-a-volume",
            f"{len(series)} series in {files} files; give the files of one series, or one multi-frame file",
        )
    groups = split_series(slices)
    if len(groups) != 1:
        raise CaseError(
            "not-a-volume", f"the series holds {len(groups)} kinds of images; give the files of one of them"
        )
    stack = build_stacks(groups[0], Policy(), lambda first, second: False)[0]
    if files == 1 and len(stack.slices) != len(slices):
        raise CaseError("not-a-volume", "frames of the multi-frame file lie at one position")
    return stack
