"""Landmark detection: mean radial error and success detection rate in mm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from monai_mamba.evaluation.bootstrap import bootstrap

#: Radii of the success detection rate; the published evaluation goes from 0 to 6 mm in steps of 0.1.
RADII_MM = (1.0, 2.0, 3.0, 4.0)


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
