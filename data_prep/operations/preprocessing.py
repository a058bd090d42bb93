"""Optional steps after a volume has been made: bias correction, registration, brain mask, z-score, grid.

Every step is deterministic: one thread, seeded sampling. Every step leaves a note in the report and a record with its
numbers in the manifest. The order is fixed: N4, registration or spacing, mask, z-score, grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from data_prep.engine.files import sha256
from data_prep.errors import CaseError
from data_prep.geometry import Grid
from data_prep.model import Json
from data_prep.nifti import open_nifti, write_nifti
from data_prep.operations import Job, Outcome, find_operation, operation

#: of the sampling of voxels for the metric
SEED = 20260101
#: an affine may scale by this factor, or its inverse, along any axis; more is a failed registration, not a head
_MAX_SCALE = 2.0
_SHRINK = [4, 2, 1]
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass
class State:
    """A volume between two steps; `mask` lies on its grid, whose RAS+ `affine` is kept without ITK's rounding."""

    image: sitk.Image
    affine: np.ndarray
    mask: sitk.Image | None = None
    is_stripped: bool = False
    is_resampled: bool = False
    notes: list[str] = field(default_factory=list)
    records: list[dict[str, Json]] = field(default_factory=list)


@operation(version=1)
def prepared(job: Job) -> Outcome:
    """The volume of another operation, after steps.

    Params:
        first: ``{"operation", "version", "params"}`` of the operation that makes the volume.
        steps: ``[{"step": name, ...}, ...]`` in order; see `STEPS`.
        has_mask: the last input is a brain mask on the grid of the volume.
    """
    first = job.params["first"]
    inputs = job.inputs[:-1] if job.params.get("has_mask") else job.inputs
    raw = job.output.with_name("raw-" + job.output.name)
    made = find_operation(first["operation"])(
        dataclasses.replace(job, inputs=inputs, output=raw, params=first["params"], link="copy")
    )
    nifti = open_nifti(raw)
    assert nifti.grid.affine is not None
    state = State(to_itk(nifti.read(), nifti.grid), nifti.grid.affine)
    if job.params.get("has_mask"):
        state.mask = _read_mask(job.inputs[-1], state.image)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    for step in job.params["steps"]:
        try:
            STEPS[step["step"]](state, step)
        except RuntimeError as error:  # ITK's own; its text may name files
            raise CaseError("preprocessing-failed", f"step {step['step']}") from error
    data = voxels(state.image)
    if not np.isfinite(data).all():
        raise CaseError("preprocessing-failed", "the result holds values that are not finite")
    write_nifti(job.output, data, state.affine)
    raw.unlink(missing_ok=True)
    return Outcome(
        open_nifti(job.output).grid,
        is_resampled=made.is_resampled or state.is_resampled,
        notes=(*made.notes, *state.notes),
        record=tuple(state.records),
    )


def to_itk(data: np.ndarray, grid: Grid) -> sitk.Image:
    """A float32 image in ITK's world (LPS+).

    Raises:
        CaseError: the grid is sheared, which ITK cannot hold.
    """
    assert grid.affine is not None
    lps = _LPS @ grid.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = lps[:3, :3] / spacing
    if np.abs(direction.T @ direction - np.eye(3)).max() > 1e-4:
        raise CaseError("sheared-affine", "the axes of the volume are not at right angles; it cannot be preprocessed")
    u, _, v = np.linalg.svd(direction)
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.transpose(data.astype(np.float32), (2, 1, 0))))
    image.SetSpacing([float(x) for x in spacing])
    image.SetOrigin([float(x) for x in lps[:3, 3]])
    image.SetDirection([float(x) for x in (u @ v).ravel()])
    return image


def itk_affine(image: sitk.Image) -> np.ndarray:
    """RAS+ matrix of an ITK image."""
    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    return _LPS @ lps


def voxels(image: sitk.Image) -> np.ndarray:
    """Values of an ITK image as ``(i, j, k)``."""
    return np.ascontiguousarray(np.transpose(sitk.GetArrayFromImage(image), (2, 1, 0)))


def _read_mask(path: Path, image: sitk.Image) -> sitk.Image:
    """A mask brought onto the image's voxels; it may have its axes in another order, but must cover the same place."""
    nifti = open_nifti(path)
    mask = sitk.Cast(to_itk(nifti.read() > 0, nifti.grid) > 0.5, sitk.sitkUInt8)
    moved = sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    before, after = (
        float(sitk.GetArrayViewFromImage(one).sum(dtype=np.int64)) * float(np.prod(one.GetSpacing()))
        for one in (mask, moved)
    )
    if not before > 0 or abs(after - before) > 0.02 * before:
        raise CaseError("grids-differ", "the brain mask is empty or does not lie where its image does")
    return moved


def _user_file(step: dict[str, Json], name: str) -> sitk.Image:
    """A file the user named by an option; it must be the one that was there when the plan was made."""
    path = Path(step[name]["path"])
    if sha256(path) != step[name]["sha256"]:
        raise CaseError("changed-file", f"the file of --{name.replace('_', '-')} has changed since the plan was made")
    nifti = open_nifti(path, "sform")
    return to_itk(nifti.read(), nifti.grid)


def _n4(state: State, step: dict[str, Json]) -> None:
    """N4 bias field correction (Tustison et al., IEEE TMI 2010) inside the mask, or inside an Otsu foreground."""
    image = state.image
    mask = state.mask if state.mask is not None else sitk.OtsuThreshold(image, 0, 1, 200)
    mask = sitk.And(sitk.Cast(mask, sitk.sitkUInt8), sitk.Cast(image > 0, sitk.sitkUInt8))
    if sitk.GetArrayViewFromImage(mask).sum() < 100:
        raise CaseError("preprocessing-failed", "N4: fewer than 100 voxels of foreground")
    # Small volumes are not shrunk below what the filter can fit a spline to.
    factors = [max(1, min(int(step["shrink"]), n // 16)) for n in image.GetSize()]
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.SetMaximumNumberOfIterations([int(n) for n in step["iterations"]])
    corrector.SetNumberOfThreads(1)
    corrector.SetNumberOfWorkUnits(1)
    corrector.Execute(sitk.Shrink(image, factors), sitk.Shrink(mask, factors))
    field_ = sitk.Exp(corrector.GetLogBiasFieldAsImage(image))
    state.image = sitk.Cast(image / field_, sitk.sitkFloat32)
    state.image.CopyInformation(image)
    values = sitk.GetArrayViewFromImage(field_)
    state.notes.append("N4 bias correction")
    state.records.append(
        {"step": "n4", "shrink": factors, "iterations": step["iterations"],
         "field": [round(float(values.min()), 4), round(float(values.max()), 4)]}
    )  # fmt: skip


def _register(state: State, step: dict[str, Json]) -> None:
    """Rigid, then affine registration to the template by Mattes mutual information; one interpolation, linear."""
    template = _user_file(step, "template")
    transform: sitk.Transform = sitk.CenteredTransformInitializer(
        template, state.image, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    metric = 0.0
    for stage in ("rigid", "affine"):
        if stage == "affine":
            rigid = sitk.Euler3DTransform(transform)
            affine = sitk.AffineTransform(3)
            affine.SetMatrix(rigid.GetMatrix())
            affine.SetTranslation(rigid.GetTranslation())
            affine.SetCenter(rigid.GetCenter())
            transform = affine
        method = sitk.ImageRegistrationMethod()
        method.SetNumberOfThreads(1)
        method.SetNumberOfWorkUnits(1)
        method.SetMetricAsMattesMutualInformation(50)
        method.SetMetricSamplingStrategy(method.RANDOM)
        voxels_per_level = [max(1.0, np.prod(template.GetSize()) / factor**3) for factor in _SHRINK]
        shares = [min(1.0, int(step["samples"]) / count) for count in voxels_per_level]
        method.SetMetricSamplingPercentagePerLevel(shares, SEED)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 200, gradientMagnitudeTolerance=1e-6)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetShrinkFactorsPerLevel(_SHRINK)
        method.SetSmoothingSigmasPerLevel([2, 1, 0])
        method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
        method.SetInitialTransform(transform, inPlace=False)
        found = method.Execute(template, state.image)
        transform = found.GetNthTransform(0) if isinstance(found, sitk.CompositeTransform) else found
        metric = float(method.GetMetricValue())
    affine = sitk.AffineTransform(transform)
    linear = np.array(affine.GetMatrix()).reshape(3, 3)
    center, shift = np.array(affine.GetCenter()), np.array(affine.GetTranslation())
    scales = np.linalg.svd(linear, compute_uv=False)
    if np.linalg.det(linear) <= 0 or scales.max() > _MAX_SCALE or scales.min() < 1 / _MAX_SCALE:
        raise CaseError("registration-failed", f"scales of {scales.min():.2f} to {scales.max():.2f}")
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, shift + center - linear @ center
    reference = isotropic_grid(template, float(step["spacing"])) if step["spacing"] else template
    _resample(state, reference, affine)
    state.notes.append("affine registration to the template")
    state.records.append(
        {"step": "register", "template_sha256": step["template"]["sha256"], "metric": round(metric, 6),
         "samples": step["samples"], "seed": SEED,
         "template_to_image_ras": (_LPS @ matrix @ _LPS).round(9).tolist()}
    )  # fmt: skip


def _spacing(state: State, step: dict[str, Json]) -> None:
    """Resample to cubic voxels, linearly, after smoothing where voxels get larger."""
    before = state.image.GetSpacing()
    _resample(state, isotropic_grid(state.image, float(step["spacing"])), sitk.Transform())
    state.notes.append(f"resampled to {step['spacing']:g} mm")
    state.records.append({"step": "spacing", "from_mm": [round(x, 6) for x in before], "to_mm": step["spacing"]})


def isotropic_grid(image: sitk.Image, spacing: float) -> sitk.Image:
    """An empty image over the same field of view with cubic voxels of `spacing` mm."""
    old, size = np.array(image.GetSpacing()), np.array(image.GetSize())
    new = np.maximum(np.rint(size * old / spacing).astype(int), 1)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    middle = np.array(image.GetOrigin()) + direction @ ((size - 1) / 2 * old)
    reference = sitk.Image([int(n) for n in new], sitk.sitkUInt8)
    reference.SetSpacing([spacing] * 3)
    reference.SetDirection(image.GetDirection())
    reference.SetOrigin([float(x) for x in middle - direction @ ((new - 1) / 2 * spacing)])
    return reference


def _resample(state: State, reference: sitk.Image, transform: sitk.Transform) -> None:
    image = state.image
    # Full width at half maximum of the new voxels, less that of the old ones: what keeps small voxels from aliasing.
    sigmas = [
        float(np.sqrt(max(0.0, new**2 - old**2)) / 2.355)
        for new, old in zip(reference.GetSpacing(), image.GetSpacing(), strict=True)
    ]
    if max(sigmas) > 0.1:
        image = sitk.SmoothingRecursiveGaussian(image, [max(sigma, 1e-3) for sigma in sigmas])
    state.image = sitk.Resample(image, reference, transform, sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    if state.mask is not None:
        state.mask = sitk.Resample(state.mask, reference, transform, sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    state.affine = itk_affine(reference)
    state.is_resampled = True


def _mask(state: State, step: dict[str, Json]) -> None:
    """Take the mask on the template's grid, which after the registration is that of every image."""
    mask = sitk.Cast(_user_file(step, "brain_mask") > 0.5, sitk.sitkUInt8)
    state.mask = sitk.Resample(mask, state.image, sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    if not sitk.GetArrayViewFromImage(state.mask).any():
        raise CaseError("preprocessing-failed", "the brain mask does not meet the image")
    state.records.append({"step": "mask", "sha256": step["brain_mask"]["sha256"]})


def _strip(state: State, step: dict[str, Json]) -> None:
    """Set everything outside the mask to 0."""
    if state.mask is None:
        raise CaseError("missing-mask", "the image has no brain mask")
    state.image = sitk.Mask(state.image, state.mask, 0.0)
    state.is_stripped = True
    state.notes.append("voxels outside the brain mask set to 0")
    state.records.append({"step": "strip"})


def _zscore(state: State, step: dict[str, Json]) -> None:
    """Mean 0 and standard deviation 1 inside the mask, or over the voxels that are not 0."""
    data = sitk.GetArrayFromImage(state.image).astype(np.float64)
    inside = data != 0 if state.mask is None else sitk.GetArrayViewFromImage(state.mask) > 0
    values = data[inside]
    mean, std = (float(values.mean()), float(values.std())) if values.size else (0.0, 0.0)
    if not std > 1e-6 * max(abs(mean), 1e-6):
        raise CaseError("constant-image", "z-score: the image has one value inside the mask")
    scaled = (data - mean) / std
    if state.is_stripped:
        scaled[~inside] = 0
    image = sitk.GetImageFromArray(scaled.astype(np.float32))
    image.CopyInformation(state.image)
    state.image = image
    state.notes.append(f"z-score {'in the brain mask' if state.mask is not None else 'over non-zero voxels'}")
    state.records.append({"step": "zscore", "mean": float(f"{mean:.6g}"), "std": float(f"{std:.6g}")})


def _grid(state: State, step: dict[str, Json]) -> None:
    """Crop and pad to a number of voxels per axis, around the mask's box or the middle; no interpolation."""
    data = voxels(state.image)
    shape, wanted = np.array(data.shape), np.array(step["shape"])
    low, high = np.zeros(3, int), shape
    if state.mask is not None:
        places = np.argwhere(voxels(state.mask) > 0)
        if len(places):
            low, high = places.min(axis=0), places.max(axis=0) + 1
    start = (low + high - wanted) // 2
    out = np.full(tuple(wanted), 0.0 if state.is_stripped else float(data.min()), np.float32)
    source = tuple(slice(max(0, s), min(n, s + w)) for s, n, w in zip(start, shape, wanted, strict=True))
    target = tuple(slice(part.start - s, part.stop - s) for part, s in zip(source, start, strict=True))
    out[target] = data[source]
    if state.mask is not None and (high - low > wanted).any():
        state.notes.append("the brain mask is larger than --grid and was cropped")
    state.affine = state.affine.copy()
    state.affine[:3, 3] += state.affine[:3, :3] @ start
    state.image = to_itk(out, Grid(tuple(int(n) for n in wanted), state.affine))
    state.mask = None
    state.notes.append(f"cropped and padded to {' x '.join(str(n) for n in wanted)}")
    state.records.append({"step": "grid", "shape": list(step["shape"]), "start": [int(n) for n in start]})


STEPS: dict[str, Callable[[State, dict[str, Any]], None]] = {
    "n4": _n4, "register": _register, "spacing": _spacing, "mask": _mask, "strip": _strip, "zscore": _zscore,
    "grid": _grid,
}  # fmt: skip
