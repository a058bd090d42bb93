"""NIfTI volumes: images and label maps that come as NIfTI already."""

from __future__ import annotations

import numpy as np

from data_prep.errors import CaseError
from data_prep.geometry import Grid, grid_difference, max_distance_mm
from data_prep.nifti import NiftiFile, open_nifti, verify_stream, write_nifti
from data_prep.operations import Job, Outcome, operation, place


@operation(version=1)
def image(job: Job) -> Outcome:
    """One channel of a NIfTI image.

    Params:
        channel: index along the fourth axis of a 4D file; without it the file must be 3D.
        form: see `data_prep.nifti.open_nifti`.
    """
    nifti = open_nifti(job.inputs[0], job.params.get("form", "strict"))
    channel = job.params.get("channel")
    if channel is None and nifti.num_channels != 1:
        raise CaseError("not-3d", f"the file holds {nifti.num_channels} volumes where one was expected")
    if channel is not None and channel >= nifti.num_channels:
        raise CaseError("missing-channel", f"channel {channel} of a file with {nifti.num_channels}")
    if nifti.num_channels == 1 and _can_be_used_as_it_is(nifti, job):
        verify_stream(nifti)
        return Outcome(nifti.grid, linked=place(nifti.path, job))
    data = nifti.read(channel if nifti.num_channels > 1 else None)
    if data.dtype == np.float64:
        data = data.astype(np.float32)
    write_nifti(job.output, data, nifti.grid.affine)  # type: ignore[arg-type]
    return Outcome(nifti.grid)


@operation(version=1)
def label_map(job: Job) -> Outcome:
    """A label map whose values are checked.

    Params:
        allowed: the integers that may occur after `replace`.
        replace: list of ``[old, new]``.
        form: see `data_prep.nifti.open_nifti`.
        snap_mm: the second input is the image; when the label map's voxels lie beside the image's by no more than
            this, it is put on the image's grid, which is noted.
    """
    nifti = open_nifti(job.inputs[0], job.params.get("form", "strict"))
    if nifti.num_channels != 1:
        raise CaseError("not-3d", f"the label map holds {nifti.num_channels} volumes where one was expected")
    data = nifti.read()
    integers = to_integers(data)
    replaced = replace_values(integers, job.params.get("replace", []))
    found = check_values(replaced, job.params["allowed"])
    grid, notes = _snapped(nifti.grid, job)
    if replaced is integers and grid is nifti.grid and _can_be_used_as_it_is(nifti, job):
        verify_stream(nifti)
        return Outcome(grid, found, linked=place(nifti.path, job))
    write_nifti(job.output, smallest_unsigned(replaced), grid.affine)  # type: ignore[arg-type]
    return Outcome(grid, found, notes=notes)


def _snapped(grid: Grid, job: Job) -> tuple[Grid, tuple[str, ...]]:
    """The grid of a label map, or that of its image when they differ by less than the user allows."""
    snap_mm = job.params.get("snap_mm", 0)
    if not snap_mm:
        return grid, ()
    target = open_nifti(job.inputs[1], job.params.get("form", "strict")).grid
    if not grid_difference(target, grid) or grid_difference(target, grid, snap_mm):
        return grid, ()
    distance = max_distance_mm(grid.shape, target.affine, grid.affine)  # type: ignore[arg-type]
    return target, (f"label map moved by up to {distance:.2g} mm onto the grid of the image",)


def _can_be_used_as_it_is(nifti: NiftiFile, job: Job) -> bool:
    header = nifti.image.header
    has_both = int(header["sform_code"]) > 0 and int(header["qform_code"]) > 0
    # Readers differ in which of two forms they take and in what they do without any, so only a file on which all
    # agree is passed on; others are written anew with one geometry.
    one_geometry = job.params.get("form", "strict") == "strict" or (
        has_both is False and (int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0)
    )
    is_3d = int(header["dim"][0]) == 3
    ending = ".nii.gz" if nifti.is_gzip else ".nii"
    return one_geometry and is_3d and not job.personal and str(job.output).endswith(ending)


def to_integers(data: np.ndarray) -> np.ndarray:
    """The values as integers.

    Raises:
        CaseError: a value is not finite or not whole, or exceeds 16 bits.
    """
    if data.dtype.kind in "ui":
        integers = data
    elif data.dtype.kind == "f":
        if not np.isfinite(data).all():
            raise CaseError("label-not-finite", "the label map holds NaN or infinity")
        integers = np.rint(data)
        if not np.array_equal(integers, data):
            raise CaseError("label-not-integer", "the label map holds values between the integers")
    else:
        raise CaseError("label-type", f"values of type {data.dtype} are not labels")
    if integers.size and (integers.min() < 0 or integers.max() > 65535):
        raise CaseError("label-range", f"values from {integers.min()} to {integers.max()}; allowed are 0 to 65535")
    return integers.astype(np.uint16)


def replace_values(labels: np.ndarray, replace: list[list[int]]) -> np.ndarray:
    """Apply all ``[old, new]`` pairs at once; returns `labels` itself when nothing changes."""
    table = np.arange(65536, dtype=np.uint16)
    for old, new in replace:
        table[old] = new
    out = table[labels]
    return labels if np.array_equal(out, labels) else out


def check_values(labels: np.ndarray, allowed: list[int]) -> tuple[int, ...]:
    """The values that occur.

    Raises:
        CaseError: a value is not among `allowed`.
    """
    found = tuple(int(value) for value in np.flatnonzero(np.bincount(labels.ravel())))
    unknown = sorted(set(found) - set(allowed))
    if unknown:
        raise CaseError("unknown-label", f"values {unknown[:10]} are not in the data set's labels {allowed}")
    return found


def smallest_unsigned(labels: np.ndarray) -> np.ndarray:
    return labels.astype(np.uint8 if not labels.size or labels.max() < 256 else np.uint16)
