"""Converts one stack to NIfTI and proves the result against the DICOM headers and pixels before it is kept.

Slices are decoded one by one (pydicom's decoders, then SimpleITK's) into ``(column, row, slice)``; each must lie where
the affine puts it by its own header. Uncompressed series are converted by dcm2niix as well, which reads the widest
range of vendors, and must come out with the same voxels at the same places; where it fails, warns or disagrees, the
report says so. The affine that is written is the one computed from the headers, and the written file is read again.
"""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from data_prep.dicom.headers import frame_facts, named_errors, plain, read_dataset, slice_facts
from data_prep.dicom.pixels import UNCOMPRESSED, decode
from data_prep.errors import CaseError, DicomReadError
from data_prep.geometry import TOLERANCE_MM, Grid, max_distance_mm
from data_prep.memory import bounded
from data_prep.nifti import open_nifti, write_nifti
from data_prep.operations import Job, Outcome, operation

#: seconds one call of dcm2niix may take
CONVERTER_TIMEOUT = 600.0
_MAX_VOLUME_BYTES = 16 << 30
#: bytes that all copies of a voxel may take; straightening uneven slices takes most, at several times their number
_MEMORY_PER_VOXEL = 96
#: part by which the step of a mosaic may differ from that of its protocol
_MOSAIC_STEP = 0.01
_DOUBTS = (
    "gantry tilt",
    "interslice distance varies",
    "slice thickness varies",
    "missing",
    "single slice",
    "stacked despite",
    "incompatible with nifti",
    "check slice",
    "duplicate",
)


#: what a conversion looks at; the many private sequences of some vendors take more time than all of this
_TAGS = [
    "Modality", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows",
    "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices", "EchoTime", "TemporalPositionIdentifier",
    "TriggerTime", "DiffusionBValue", "PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip


#: what stored values are read by
_MEANING = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "PhotometricInterpretation",
            "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence")  # fmt: skip


@operation(version=2)
@named_errors
def volume(job: Job) -> Outcome:
    """A volume from the slices of one stack.

    Params:
        slices: ``[index of the input, frame]`` in order.
        positions: ImagePositionPatient of each slice, from the plan.
        affine: RAS+ matrix of the plan.
        shape: ``(columns, rows, slices)``.
        repair: ``""``, ``tilt`` or ``uneven``.
        converter: ``dcm2niix`` or ``simpleitk``.
        onto: the stack of the first channel (``affine``, ``shape``) when this one is to be resampled onto it.
        notes: of the plan.
    """
    shape = tuple(job.params["shape"])
    voxels = math.prod(shape)
    if voxels * 4 > _MAX_VOLUME_BYTES:
        raise DicomReadError("too-large", f"{' x '.join(map(str, shape))} voxels")
    voxels += math.prod(job.params["onto"]["shape"]) if job.params.get("onto") else 0
    with bounded(job.inputs, _MEMORY_PER_VOXEL * voxels):
        return _make_volume(job, shape)


def _make_volume(job: Job, shape: tuple[int, ...]) -> Outcome:
    params = job.params
    affine, notes = np.array(params["affine"], dtype=np.float64), list(params.get("notes", []))
    reader = SliceReader(job.inputs, params["slices"])
    data, is_padding = read_slices(reader, shape, affine, params["positions"], params.get("repair", ""))
    # dcm2niix and the decoders of pydicom share no code; of compressed series, decoding twice would double the time.
    if params.get("converter", "dcm2niix") == "dcm2niix" and not params.get("repair") and not reader.is_compressed():
        problem = difference_to_dcm2niix(job, data, affine)
        if problem:
            notes.append(f"dcm2niix was not used ({problem})")
    if is_padding is not None and is_padding.any() and not is_padding.all():
        data[is_padding] = max(data[~is_padding].min(), -1024)
        notes.append("padding outside of the field of view was set to air")
    is_resampled = bool(params.get("repair"))
    if is_resampled:
        data, affine = straighten(data, affine, np.array(params["positions"], dtype=np.float64))
        notes.append(f"resampled to an even, upright grid ({params['repair']}), at the user's wish")
    if params.get("onto"):
        outside = float(data.min()) if reader.modality(0) == "CT" else 0.0
        data = resample_onto(data, affine, params["onto"], outside)
        affine, shape = np.array(params["onto"]["affine"]), tuple(params["onto"]["shape"])
        is_resampled = True
        notes.append("resampled onto the grid of the first channel, at the user's wish")
    write_nifti(job.output, data, affine)
    grid = prove_file(job.output, affine, data.shape)
    return Outcome(grid, is_resampled=is_resampled, notes=tuple(notes))


@operation(version=1)
@named_errors
def mosaic(job: Job) -> Outcome:
    """A volume from one Siemens mosaic: tiles of one image are its slices.

    dcm2niix unfolds it; every tile and the affine that follows from the header are compared with the result. The
    header's position is that of the corner of the whole mosaic, as if it were one large slice.
    """
    with bounded(job.inputs, 0):
        return _unfold(job)


def _unfold(job: Job) -> Outcome:
    dataset = read_dataset(job.inputs[0], pixels=True)
    reader = SliceReader(job.inputs, [[0, 0]])
    position, orientation, spacing = _plane_of(dataset, 0)
    count = mosaic_count(dataset)
    side = int(np.ceil(np.sqrt(count)))
    rows, columns = int(dataset.Rows) // side, int(dataset.Columns) // side
    between = dataset.get("SpacingBetweenSlices")
    if between is None or not float(between) > 0:
        raise DicomReadError("no-position", "a mosaic without SpacingBetweenSlices")
    planned = protocol_step(dataset)
    if planned is not None and not abs(planned - float(between)) <= _MOSAIC_STEP * planned:
        raise DicomReadError(
            "bad-geometry",
            f"SpacingBetweenSlices is {float(between):g} mm, the protocol's slices are {planned:.4g} apart",
        )
    row, column = orientation[:3] * spacing[1], orientation[3:] * spacing[0]
    corner = position + row * (int(dataset.Columns) - columns) / 2 + column * (int(dataset.Rows) - rows) / 2
    normal = np.cross(orientation[:3], orientation[3:]) * float(between)
    plane = {"orientation": list(orientation), "spacing": list(spacing)}
    whole = reader.values(0)
    tiles = [
        whole[(k // side) * rows : (k // side + 1) * rows, (k % side) * columns : (k % side + 1) * columns].T
        for k in range(count)
    ]
    shape = (columns, rows, count)
    from data_prep.dicom.stacks import make_affine

    with tempfile.TemporaryDirectory(dir=job.output.parent, prefix="dcm2niix-") as name:
        made = run_dcm2niix([job.inputs[0]], Path(name))
        if len(made) != 1:
            raise DicomReadError("converter-failed", f"dcm2niix made {len(made)} volumes of one mosaic")
        nifti = open_nifti(made[0], "sform")
        for sign in (1.0, -1.0):
            affine = make_affine(plane, corner, normal * sign)
            data, found = to_dicom_order(nifti.read(), nifti.grid.affine, affine)  # type: ignore[arg-type]
            is_same = data.shape == shape and max_distance_mm(shape, found, affine) <= 5 * TOLERANCE_MM
            if is_same and all(np.array_equal(data[:, :, k], tiles[k]) for k in range(count)):
                write_nifti(job.output, np.array(data), affine)
                grid = prove_file(job.output, affine, shape)
                return Outcome(grid, notes=tuple(job.params.get("notes", [])))
    raise DicomReadError("geometry-not-proven", "header and dcm2niix do not agree about the tiles of the mosaic")


def mosaic_count(dataset: Any) -> int:
    """Number of tiles of a Siemens mosaic, from the private element or the CSA header.

    Raises:
        DicomReadError: unknown or impossible.
    """
    count = 0
    element = dataset.get((0x0019, 0x100A))
    if element is not None:
        value = element.value
        try:
            count = int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)
        except (TypeError, ValueError):
            count = 0
    csa = dataset.get((0x0029, 0x1010))
    if not count and csa is not None and isinstance(csa.value, bytes):
        at = csa.value.find(b"NumberOfImagesInMosaic")
        found = re.search(rb"\0(\d{1,4})[ \0]", csa.value[at + 64 : at + 256]) if at >= 0 else None
        count = int(found[1]) if found else 0
    if not 1 < count <= 4096:
        raise DicomReadError("mosaic", "the number of tiles of the mosaic is unknown")
    return count


def protocol_step(dataset: Any) -> float | None:
    """Distance in mm between the first two slices of the Siemens protocol, where a mosaic carries it."""
    csa = dataset.get((0x0029, 0x1020))
    if csa is None or not isinstance(csa.value, bytes):
        return None
    places = np.zeros((2, 3))
    found = re.findall(
        rb"sSliceArray\.asSlice\[([01])\]\.sPosition\.d(Sag|Cor|Tra)[ \t]*=[ \t]*(-?\d+\.?\d*(?:e[-+]?\d+)?)", csa.value
    )
    for number, axis, value in found:
        places[int(number), [b"Sag", b"Cor", b"Tra"].index(axis)] = float(value)
    step = float(np.linalg.norm(places[1] - places[0]))
    return step if {number for number, _, _ in found} == {b"0", b"1"} and step > 0 else None


class SliceReader:
    """Decodes slices one at a time, as float or integer values after the modality rescale.

    Args:
        paths: files.
        slices: ``[index of the file, frame]`` in order.
    """

    def __init__(self, paths: tuple[Path, ...], slices: list[list[int]]) -> None:
        self._paths = paths
        self.slices = slices
        self._open: tuple[int, Any, np.ndarray | None] | None = None

    def dataset(self, number: int) -> Any:
        """The data set of slice `number`, with its pixel data still encoded."""
        index = self.slices[number][0]
        if self._open is None or self._open[0] != index:
            self._open = (index, read_dataset(self._paths[index], pixels=True, tags=_TAGS), None)
        return self._open[1]

    def modality(self, number: int) -> str:
        return str(plain(self.dataset(number), "Modality") or "")

    def is_compressed(self) -> bool:
        return str(self.dataset(0).file_meta.get("TransferSyntaxUID", "")) not in UNCOMPRESSED

    def stored(self, number: int) -> np.ndarray:
        """Stored values of a slice, ``(rows, columns)``.

        Raises:
            DicomReadError: no decoder can read the pixels.
        """
        dataset = self.dataset(number)
        assert self._open is not None
        if self._open[2] is None:
            self._open = (self._open[0], dataset, decode(dataset))
        pixels: Any = self._open[2]
        frame = self.slices[number][1]
        if pixels.ndim == 3:
            if frame >= len(pixels):
                raise DicomReadError("missing-frame", "the file holds fewer frames than its header says")
            return pixels[frame]
        return pixels

    def _rescale_item(self, number: int) -> Any:
        """The data set, or the item of a frame's functional groups, that holds the rescale of a slice."""
        dataset, frame = self.dataset(number), self.slices[number][1]
        per_frame = dataset.get("PerFrameFunctionalGroupsSequence")
        if not per_frame:
            return dataset
        shared = dataset.get("SharedFunctionalGroupsSequence")
        found = per_frame[frame].get("PixelValueTransformationSequence")
        if not found and shared:
            found = shared[0].get("PixelValueTransformationSequence")
        return found[0] if found else dataset

    def has_rescale(self, number: int) -> bool:
        """Whether a header says what the stored values of a slice mean."""
        item = self._rescale_item(number)
        names = ("RescaleSlope", "RescaleIntercept")
        return "ModalityLUTSequence" in item or any(plain(item, name) not in (None, "") for name in names)

    def rescale(self, number: int) -> tuple[float, float]:
        """Slope and intercept of a slice; of its frame in enhanced objects."""
        item = self._rescale_item(number)
        slope, intercept = plain(item, "RescaleSlope"), plain(item, "RescaleIntercept")
        try:
            values = (float(1 if slope in (None, "") else slope), float(0 if intercept in (None, "") else intercept))
        except (TypeError, ValueError) as error:
            raise DicomReadError("bad-rescale", "RescaleSlope or RescaleIntercept is not a number") from error
        if not np.isfinite(values).all() or values[0] == 0:
            raise DicomReadError("bad-rescale", "RescaleSlope or RescaleIntercept is not usable")
        return values

    def values(self, number: int) -> np.ndarray:
        """Values of a slice after the rescale."""
        if self.dataset(number).get("ModalityLUTSequence"):
            from pydicom.pixels import apply_modality_lut

            return np.asarray(apply_modality_lut(self.stored(number), self.dataset(number)), dtype=np.float64)
        slope, intercept = self.rescale(number)
        stored = self.stored(number)
        if slope == 1 and intercept == 0:
            return stored
        if slope == 1 and intercept == int(intercept) and abs(intercept) < 1 << 30:
            return stored.astype(np.int32 if stored.dtype.itemsize <= 2 else np.int64) + int(intercept)
        return stored.astype(np.float64) * slope + intercept


def read_slices(
    reader: SliceReader, shape: tuple[int, ...], affine: np.ndarray, positions: list[list[float]], repair: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode all slices and prove, for each, that its own header puts it where the affine does.

    Args:
        reader: of the slices.
        shape: ``(columns, rows, slices)``.
        affine: RAS+ matrix.
        positions: of the plan, to notice changed files.
        repair: slices that are to be straightened lie on no grid yet.

    Returns:
        Values ``(columns, rows, slices)`` in the smallest of int16, uint16, int32 and float32 that holds them exactly,
        and where they are padding, if anywhere.

    Raises:
        DicomReadError: a slice has another size or place than planned.
    """
    data = np.empty(shape, dtype=np.int16, order="F")
    is_padding = None
    has_rescale = shape[2] > 0 and reader.has_rescale(0)
    for number in range(shape[2]):
        check_position(reader, number, affine, shape, positions[number], repair)
        if reader.has_rescale(number) != has_rescale:
            raise DicomReadError("bad-rescale", "some slices have RescaleSlope and RescaleIntercept, others have not")
        plane = reader.values(number)
        if plane.shape != (shape[1], shape[0]):
            raise DicomReadError("size-differs", "a decoded slice has another size than the header says")
        wanted = np.result_type(data.dtype, smallest_type(plane))
        if wanted != data.dtype:
            # 64 bits are never needed: integers beyond 32 bits come from a damaged or absurd rescale.
            data = data.astype(np.float32 if wanted.kind == "f" or wanted.itemsize > 4 else wanted, order="F")
        data[:, :, number] = plane.T
        span = padding_range(reader.dataset(number)) if reader.modality(number) == "CT" else None
        if span is not None:
            slope, intercept = reader.rescale(number)
            low, high = sorted(value * slope + intercept for value in span)
            # Only what lies below air: a padding value inside the range of tissue cannot be told from tissue.
            if is_padding is None:
                is_padding = np.zeros(shape, dtype=bool, order="F")
            is_padding[:, :, number] = ((plane >= low) & (plane <= high) & (plane < -1024)).T
    return data, is_padding


def smallest_type(values: np.ndarray) -> np.dtype[Any]:
    """The smallest of int16, uint16, int32 and float32 that holds the values; float32 may round."""
    if values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        for kind in (np.int16, np.uint16, np.int32):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return np.dtype(kind)
    return np.dtype(np.float32)


def check_position(
    reader: SliceReader, number: int, affine: np.ndarray, shape: tuple[int, ...], planned: list[float], repair: str
) -> None:
    """Compare where a slice's header puts its corners with where the affine does.

    Raises:
        DicomReadError: a voxel would lie more than 0.01 mm from where the file says.
    """
    position, orientation, spacing = _plane_of(reader.dataset(number), reader.slices[number][1])
    if np.abs(position - planned).max() > 1e-6:
        raise DicomReadError("changed-file", "the file has changed since it was scanned")
    if repair:
        return
    corners = np.array([[c, r] for c in (0, shape[0] - 1) for r in (0, shape[1] - 1)], dtype=np.float64)
    lps = position + corners * spacing[::-1] @ orientation.reshape(2, 3)
    ras = affine[:3, 3] + affine[:3, 2] * number + corners @ affine[:3, :2].T
    distance = float(np.linalg.norm(lps * [-1, -1, 1] - ras, axis=1).max())
    if not distance <= TOLERANCE_MM:
        raise DicomReadError("geometry-not-proven", f"a voxel lies {distance:.3g} mm from its place")


def _plane_of(dataset: Any, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence")
    if per_frame:
        shared = dataset.get("SharedFunctionalGroupsSequence")
        plane = frame_facts(per_frame[frame], shared[0] if shared else Dataset(), dataset)
    else:
        plane = slice_facts(dataset)
    for name in ("position", "orientation", "spacing"):
        if not plane[name]:
            raise DicomReadError("no-position", f"a slice lacks its {name}")
    return np.array(plane["position"]), np.array(plane["orientation"]), np.array(plane["spacing"])


def run_dcm2niix(paths: list[Path], folder: Path, timeout: float = CONVERTER_TIMEOUT) -> list[Path]:
    """Run dcm2niix on exactly these files.

    Returns:
        The NIfTI files it wrote that are no repaired second versions (``_Tilt``, ``_Eq``).

    Raises:
        CaseError: not installed, failed, too slow, or it warned of something that makes the result doubtful.
    """
    try:
        import dcm2niix

        binary = str(dcm2niix.bin)
    except ImportError as error:
        raise CaseError("no-converter", "dcm2niix is not installed") from error
    source, target = folder / "in", folder / "converted"
    target.mkdir()
    if is_whole_folder(paths):
        source = paths[0].parent.absolute()
    else:
        source.mkdir()
        for number, path in enumerate(paths):
            (source / f"{number:06d}.dcm").symlink_to(path.resolve())
    command = [binary, "-b", "n", "-z", "n", "-f", "v", "-w", "1", "-m", "y", "-o", str(target), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise CaseError("converter-failed", "dcm2niix could not be run or took too long") from error
    text = (done.stdout + done.stderr).decode("utf-8", "replace").lower()
    if done.returncode != 0:
        raise CaseError("converter-failed", f"dcm2niix ended with code {done.returncode}")
    # dcm2niix ends with 0 after these; each means that the affine or the set of slices is not what it seems.
    for line in text.splitlines():
        for word in _DOUBTS:
            if "warning" in line and word in line:
                raise CaseError("converter-warned", f"dcm2niix warned: {word}")
    return sorted(path for path in target.glob("*.nii") if "_Tilt" not in path.name and "_Eq" not in path.name)


def is_whole_folder(paths: Sequence[Path]) -> bool:
    """Whether files are all that their folder holds, so that a program can be given the folder in their place."""
    folder = paths[0].parent
    try:
        return {str(path) for path in paths} == {entry.path for entry in os.scandir(folder)}
    except OSError:
        return False


def difference_to_dcm2niix(job: Job, data: np.ndarray, affine: np.ndarray) -> str:
    """Convert the files with dcm2niix, too: why it does not see the same voxels at the same places, or nothing."""
    with tempfile.TemporaryDirectory(dir=job.output.parent, prefix="dcm2niix-") as name:
        try:
            made = run_dcm2niix(list(job.inputs), Path(name))
            if len(made) != 1:
                return "converter-split"
            nifti = open_nifti(made[0], "sform")
            if nifti.num_channels != 1:
                return "converter-split"
            assert nifti.grid.affine is not None
            scaling: Any = nifti.image.dataobj
            raw = np.asanyarray(scaling.get_unscaled()).reshape(nifti.grid.shape)
            found, place = to_dicom_order(raw, nifti.grid.affine, affine)
        except CaseError as error:
            return error.reason
        if found.shape != data.shape:
            return "size-differs"
        if not max_distance_mm(data.shape, place, affine) <= 5 * TOLERANCE_MM:
            return "affine-differs"
        slope, offset = float(scaling.slope), float(scaling.inter)
        is_exact = {found.dtype.kind, data.dtype.kind} <= {"i", "u"} and slope == 1 and offset == int(offset)
        scale = 0.0 if is_exact else 1e-5 * max(float(np.abs(data).max()), 1e-6)
        for number in range(data.shape[2]):
            # Slice by slice, in integers where possible: the whole volume in float64 would cost more than all else.
            plane = found[:, :, number]
            plane = plane.astype(np.int32) + int(offset) if is_exact else plane * slope + offset
            wanted = data[:, :, number]
            if not (np.array_equal(plane, wanted) if is_exact else np.abs(plane - wanted).max() <= scale):
                return "voxels-differ"
        return ""


def to_dicom_order(data: np.ndarray, affine: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flip and permute axes so that `affine` comes closest to `wanted`; voxels stay where they are in space."""
    relation = np.linalg.solve(wanted[:3, :3], affine[:3, :3])
    order = np.argmax(np.abs(relation), axis=0)
    if sorted(order) != [0, 1, 2]:
        raise CaseError("axes-differ", "the axes of the volume do not match those of the slices")
    flip = np.eye(4)
    for axis in range(3):
        target = order[axis]
        flip[:3, axis] = 0
        sign = np.sign(relation[target, axis])
        flip[target, axis] = sign
        if sign < 0:
            flip[target, 3] = data.shape[axis] - 1
    # `flip` maps old indices to new ones.
    for axis in range(3):
        if relation[order[axis], axis] < 0:
            data = np.flip(data, axis)
    return np.transpose(data, np.argsort(order)), affine @ np.linalg.inv(flip)


def padding_range(dataset: Any) -> tuple[int, int] | None:
    """Smallest and largest stored value that PixelPaddingValue and PixelPaddingRangeLimit declare to be no image."""
    values = [dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")]
    if values[0] is None:
        return None
    bits, is_signed = int(dataset.get("BitsAllocated") or 16), int(dataset.get("PixelRepresentation") or 0) == 1
    numbers = []
    for value in values:
        try:
            number = int(value if value is not None else values[0])
        except (TypeError, ValueError):
            return None
        # Some scanners write the signed value with an unsigned type: 63536 for -2000.
        numbers.append(number - (1 << bits) if is_signed and number >= 1 << (bits - 1) else number)
    return min(numbers), max(numbers)


def straighten(data: np.ndarray, affine: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Resample slices with a tilt or uneven steps onto an upright, even grid, linearly.

    Each slice is shifted inside its own plane to undo the shear, then the column of slices is interpolated along the
    normal at the median step. Outside of the slices the smallest value of the volume is put in.
    """
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :2], axis=0)
    row, column = lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]
    normal = np.cross(row, column)
    heights = positions @ normal
    if heights[-1] < heights[0]:
        raise DicomReadError("bad-geometry", "the slices are not in order")
    step = float(np.median(np.diff(heights)))
    if step <= 0:
        raise DicomReadError("bad-geometry", "the slices do not advance")
    offsets = positions - positions[0]
    shift = np.stack([offsets @ row / spacing[0], offsets @ column / spacing[1]], axis=1)
    low, high = np.floor(shift.min(axis=0)).astype(int), np.ceil(shift.max(axis=0)).astype(int)
    size = (data.shape[0] + high[0] - low[0], data.shape[1] + high[1] - low[1])
    from scipy.ndimage import shift as move

    fill = float(data.min())
    upright = np.full((*size, data.shape[2]), fill, dtype=np.float32)
    for number in range(data.shape[2]):
        canvas = np.full(size, fill, dtype=np.float32)
        canvas[-low[0] : -low[0] + data.shape[0], -low[1] : -low[1] + data.shape[1]] = data[:, :, number]
        upright[:, :, number] = move(canvas, shift[number], order=1, mode="constant", cval=fill)
    count = int(np.floor((heights[-1] - heights[0]) / step + 1e-6)) + 1
    wanted = heights[0] + np.arange(count) * step
    right = np.clip(np.searchsorted(heights, wanted), 1, len(heights) - 1)
    weight = ((wanted - heights[right - 1]) / (heights[right] - heights[right - 1])).astype(np.float32)
    even = upright[:, :, right - 1] * (1 - weight) + upright[:, :, right] * weight
    result = np.eye(4)
    result[:3, 0], result[:3, 1], result[:3, 2] = row * spacing[0], column * spacing[1], normal * step
    result[:3, 3] = positions[0] + row * spacing[0] * low[0] + column * spacing[1] * low[1]
    if data.dtype == np.int16:
        even = np.rint(even).astype(np.int16)
    return even, np.diag([-1.0, -1, 1, 1]) @ result


def resample_onto(data: np.ndarray, affine: np.ndarray, onto: dict[str, Any], outside: float = 0.0) -> np.ndarray:
    """Linear resampling onto another grid; `outside` where the volume does not reach (air in CT)."""
    from scipy.ndimage import affine_transform

    relation = np.linalg.solve(affine, np.array(onto["affine"], dtype=np.float64))
    return affine_transform(
        data.astype(np.float32), relation[:3, :3], relation[:3, 3], tuple(onto["shape"]), order=1, cval=outside
    )


def prove_file(path: Path, affine: np.ndarray, shape: tuple[int, ...]) -> Grid:
    """Read the written file with nabibel's and ITK's eyes: both must put every voxel where the headers do.

    Raises:
        DicomReadError: one of them does not, within 0.01 mm.
    """
    import SimpleITK as sitk

    grid = open_nifti(path).grid
    assert grid.affine is not None
    distance = max_distance_mm(shape, grid.affine, affine)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        lps = np.eye(4)
        lps[:3, :3] = np.array(reader.GetDirection()).reshape(3, 3) * np.array(reader.GetSpacing())
        lps[:3, 3] = reader.GetOrigin()
        distance = max(distance, max_distance_mm(shape, np.diag([-1.0, -1, 1, 1]) @ lps, affine))
    except RuntimeError as error:
        raise DicomReadError("geometry-not-proven", "SimpleITK does not accept the affine") from error
    if not distance <= TOLERANCE_MM or grid.shape != tuple(shape):
        raise DicomReadError("geometry-not-proven", f"readers of the file put voxels {distance:.3g} mm elsewhere")
    return grid


@functools.lru_cache(maxsize=1024)
def same_pixel_data(first: Path, second: Path) -> bool:
    """Whether two files hold the same pixels, encoded in the same way or not."""
    try:
        one, two = (read_dataset(path, pixels=True, tags=_TAGS) for path in (first, second))
        # The same stored values mean something else with another rescale.
        if any(plain(one, name) != plain(two, name) for name in _MEANING):
            return False
        syntaxes = {str(each.file_meta.TransferSyntaxUID) for each in (one, two)}
        if len(syntaxes) == 1 and one.PixelData == two.PixelData:
            return True
        # This runs in the parent process, so no decoder in C that a damaged stream could bring down.
        if len(syntaxes) == 1 or syntaxes - UNCOMPRESSED - {RLELossless}:
            return False
        return np.array_equal(decode(one), decode(two))
    except (CaseError, AttributeError):
        return False
