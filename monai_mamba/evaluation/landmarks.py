"""Landmark detection: positions from heat maps, mean radial error and success detection rate in mm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from monai_mamba.evaluation.bootstrap import bootstrap

#: Radii of the success detection rate; the published evaluation goes from 0 to 6 mm in steps of 0.1.
RADII_MM = (1.0, 2.0, 3.0, 4.0)


def decode_heat_maps(heat_maps: np.ndarray, window: int = 0) -> np.ndarray:
    """Return the position of each heat map's maximum, in voxels of the array.

    Args:
        heat_maps: ``(landmarks, *spatial)``.
        window: 0 takes the voxel of the maximum (published); else the center of mass of the values within ``window``
            voxels of it is taken, which resolves fractions of a voxel.

    Returns:
        ``(landmarks, spatial_dims)``, float64.

    Raises:
        ValueError: if there is no spatial axis, or a value is not finite.
    """
    heat_maps = np.asarray(heat_maps, dtype=np.float64)
    if heat_maps.ndim < 2:
        raise ValueError(f"`heat_maps` must have shape (landmarks, *spatial), got {heat_maps.shape}")
    if window < 0:
        raise ValueError(f"`window` must be at least 0, got {window}")
    if not np.isfinite(heat_maps).all():
        raise ValueError("`heat_maps` holds values that are not finite; the network has diverged")
    shape = heat_maps.shape[1:]
    peaks = np.stack(np.unravel_index(heat_maps.reshape(len(heat_maps), -1).argmax(1), shape), axis=1)
    if window == 0:
        return peaks.astype(np.float64)
    positions = np.empty(peaks.shape)
    for index, (heat_map, peak) in enumerate(zip(heat_maps, peaks, strict=True)):
        # The window is cut evenly at a border: a one-sided one would pull the position inwards.
        reach = [min(window, p, size - 1 - p) for p, size in zip(peak, shape, strict=True)]
        block = heat_map[tuple(slice(p - r, p + r + 1) for p, r in zip(peak, reach, strict=True))]
        weights = block - block.min()
        if weights.sum() == 0:
            positions[index] = peak
            continue
        grid = np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij")
        positions[index] = peak + np.array([(offset * weights).sum() for offset in grid]) / weights.sum()
    return positions


def voxel_to_world(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return world coordinates in mm (RAS+ for NIfTI affines) of positions in voxels.

    Args:
        voxels: ``(..., 3)`` in the order of the array's axes (i, j, k).
        affine: ``(4, 4)``.
    """
    return np.asarray(voxels) @ affine[:3, :3].T + affine[:3, 3]


def radial_errors(predicted_mm: np.ndarray, reference_mm: np.ndarray) -> np.ndarray:
    """Return the distance of each landmark in mm, ``(cases, landmarks)``; NaN where the reference is NaN.

    Args:
        predicted_mm: ``(cases, landmarks, dims)``, world coordinates.
        reference_mm: same shape and coordinates; NaN for a landmark that a case does not have.

    Raises:
        ValueError: if the shapes differ.
    """
    predicted_mm, reference_mm = np.asarray(predicted_mm), np.asarray(reference_mm)
    if predicted_mm.shape != reference_mm.shape or predicted_mm.ndim != 3:
        raise ValueError(
            "`predicted_mm` and `reference_mm` must have one shape (cases, landmarks, dims), got "
            f"{predicted_mm.shape} and {reference_mm.shape}"
        )
    return np.linalg.norm(predicted_mm - reference_mm, axis=-1)


def evaluate_landmarks(
    errors_mm: np.ndarray,
    names: Sequence[str],
    patients: Sequence[str],
    *,
    radii_mm: Sequence[float] = RADII_MM,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Return mean radial error (MRE) and success detection rate (SDR) with intervals by patients.

    Args:
        errors_mm: ``(cases, landmarks)``, NaN where a case has no reference.
        names: of the landmarks.
        patients: of the cases.
        radii_mm: radii of the SDR: the share of the landmarks that are at most so far from the reference.
        num_draws, level, seed: of the bootstrap.

    Returns:
        ``mre_mm`` and ``sdr_<radius>mm`` over all landmarks, and ``mre_mm_<name>``; each as
        :class:`~monai_mamba.evaluation.bootstrap.Interval`. The MRE over all landmarks is the mean over the landmarks
        of their means over the cases, as published.

    Raises:
        ValueError: if the numbers of names or patients do not fit.

    References:
        nnMamba, arXiv:2402.03526, section 3.3: MRE in mm, mean of three trainings.
    """
    errors_mm = np.asarray(errors_mm, dtype=np.float64)
    if errors_mm.shape != (len(patients), len(names)):
        raise ValueError(
            f"`errors_mm` must have shape ({len(patients)}, {len(names)}), (patients, names), got {errors_mm.shape}"
        )

    def figures(rows: np.ndarray) -> dict[str, float]:
        drawn = errors_mm[rows]
        found = ~np.isnan(drawn)
        counts = found.sum(0)
        means = np.where(counts > 0, np.where(found, drawn, 0).sum(0) / np.maximum(counts, 1), np.nan)
        measured = drawn[found]
        result = {"mre_mm": float(np.nanmean(means)) if len(measured) else float("nan")}
        for radius in radii_mm:
            result[f"sdr_{radius:g}mm"] = float((measured <= radius).mean()) if len(measured) else float("nan")
        return result | {f"mre_mm_{name}": float(mean) for name, mean in zip(names, means, strict=True)}

    return bootstrap(figures, list(patients), num_draws, level, seed)
