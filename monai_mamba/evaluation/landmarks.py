"""Landmark detection: mean radial error and success detection rate in mm.

A table of landmarks is a CSV file with a row per case and landmark: ``case``, ``patient`` (default: the case),
``landmark``, the predicted position ``x_mm``, ``y_mm``, ``z_mm`` and the reference ``reference_x_mm``,
``reference_y_mm``, ``reference_z_mm``, both in one system of coordinates. An empty reference, or a row that is not
there, is a landmark that the case does not have. Images in two dimensions have no z.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.bootstrap import Interval, as_table, bootstrap, describe_interval
from monai_mamba.evaluation.results import METRICS_FILE, REPORT_FILE, provenance, write_results
from monai_mamba.evaluation.rows import read_numbers, read_rows

#: Radii of the success detection rate; the published evaluation goes from 0 to 6 mm in steps of 0.1.
RADII_MM = (1.0, 2.0, 3.0, 4.0)
CURVE_RADII_MM = tuple(float(r) for r in np.arange(61) / 10)
_AXES = ("x_mm", "y_mm", "z_mm")


@dataclass(frozen=True)
class Landmarks:
    """Predicted and reference landmarks of one model.

    Attributes:
        names: of the landmarks.
        case, patient: names, ``(cases,)``.
        predicted_mm, reference_mm: ``(cases, landmarks, dims)``; NaN for what is not there.
    """

    names: list[str]
    case: np.ndarray
    patient: np.ndarray
    predicted_mm: np.ndarray
    reference_mm: np.ndarray

    @property
    def errors_mm(self) -> np.ndarray:
        """Radial errors ``(cases, landmarks)``, NaN where a case has no reference."""
        return radial_errors(self.predicted_mm, self.reference_mm)


def read_landmarks(path: os.PathLike[str] | str) -> Landmarks:
    """Read a table of landmarks.

    Raises:
        DatasetError: if the file cannot be read, lacks a column, has a landmark of a case twice, a case with two
            patients, a predicted position that is no number or missing where there is a reference, or no reference.
    """
    path = Path(path)
    rows = read_rows(path, "a table of landmarks")
    axes = [axis for axis in _AXES if axis in rows[0]]
    columns = ["landmark", *(axes if len(axes) > 1 else _AXES), *(f"reference_{a}" for a in (axes or _AXES))]
    missing = [name for name in columns if name not in rows[0]]
    if missing:
        raise DatasetError(f"{path}: needs the columns {', '.join(['case', *columns])}; lacks {', '.join(missing)}")
    predicted = read_numbers(rows, axes, path)
    reference = read_numbers(rows, [f"reference_{axis}" for axis in axes], path, may_be_empty=True)
    names = list(dict.fromkeys(row["landmark"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    patients: dict[str, str] = {}
    shape = (len(cases), len(names), len(axes))
    predicted_mm, reference_mm = np.full(shape, np.nan), np.full(shape, np.nan)
    for row, found, wanted in zip(rows, predicted, reference, strict=True):
        at = cases.index(row["case"]), names.index(row["landmark"])
        if not np.isnan(predicted_mm[at]).all():
            raise DatasetError(f"{path}: the landmark {row['landmark']} of the case {row['case']} appears twice")
        if np.isnan(wanted).any() and not np.isnan(wanted).all():
            raise DatasetError(f"{path}: the reference of {row['landmark']} of the case {row['case']} is half empty")
        patient = row.get("patient") or row["case"]
        if patients.setdefault(row["case"], patient) != patient:
            raise DatasetError(f"{path}: the case {row['case']} has two patients")
        predicted_mm[at], reference_mm[at] = found, wanted
    if np.isnan(reference_mm).all():
        raise DatasetError(f"{path}: no landmark has a reference; there is nothing to measure")
    return Landmarks(names, np.array(cases), np.array([patients[case] for case in cases]), predicted_mm, reference_mm)


def evaluate(landmarks: Landmarks, *, num_draws: int = 1000, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """Return all figures of one model: what ``metrics.json`` holds."""
    errors = landmarks.errors_mm
    intervals = as_table(
        evaluate_landmarks(
            errors, landmarks.names, list(landmarks.patient), num_draws=num_draws, level=level, seed=seed
        )
    )
    measured = errors[~np.isnan(errors)]
    return {
        "task": "landmarks",
        "cases": len(landmarks.case),
        "patients": len(np.unique(landmarks.patient)),
        "landmarks": landmarks.names,
        "interval": describe_interval(level, num_draws, seed),
        "metrics": {name: value for name, value in intervals.items() if not name.startswith("mre_mm_")},
        "per_landmark": {name: intervals[f"mre_mm_{name}"] for name in landmarks.names},
        "sdr_curve": {
            "radius_mm": list(CURVE_RADII_MM),
            "share": [float((measured <= radius + 1e-9).mean()) for radius in CURVE_RADII_MM],
        },
        "errors_mm": {
            case: dict(zip(landmarks.names, row, strict=True))
            for case, row in zip(landmarks.case.tolist(), errors.tolist(), strict=True)
        },
    }


def compare(
    first: Landmarks, second: Landmarks, *, num_draws: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Return the differences first - second of two models on the same cases, with paired intervals.

    Raises:
        DatasetError: if the tables are not of the same cases, landmarks and references.
    """
    if sorted(first.case) != sorted(second.case) or sorted(first.names) != sorted(second.names):
        raise DatasetError("two models can be compared on the same cases and landmarks only")
    rows = [list(second.case).index(case) for case in first.case]
    names = [second.names.index(name) for name in first.names]
    if not np.allclose(second.reference_mm[rows][:, names], first.reference_mm, atol=1e-3, equal_nan=True):
        raise DatasetError("the two tables have different references; two models need the same to be compared")
    errors = [first.errors_mm, second.errors_mm[rows][:, names]]

    def differences(drawn: np.ndarray) -> dict[str, float]:
        a, b = (landmark_figures(values[drawn], first.names) for values in errors)
        return {name: a[name] - b[name] for name in a}

    return {"difference": as_table(bootstrap(differences, first.patient, num_draws, level, seed))}


def evaluate_files(
    table: os.PathLike[str] | str,
    output_dir: os.PathLike[str] | str,
    compare_with: os.PathLike[str] | str | None = None,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    report: bool = True,
    explanations: os.PathLike[str] | str | None = None,
    robustness: os.PathLike[str] | str | None = None,
) -> dict[str, Any]:
    """Evaluate a table of landmarks; write ``metrics.json`` and ``report.html``.

    Args:
        table: of the test cases.
        output_dir: folder for the results.
        compare_with: table of another model on the same cases.
        num_draws, level, seed: of the bootstrap.
        report: write ``report.html``.
        explanations, robustness: folders that ``monai-mamba explain`` and ``monai-mamba robustness`` wrote, for the
            report.

    Returns:
        The content of ``metrics.json``.
    """
    landmarks = read_landmarks(table)
    settings: dict[str, Any] = {"num_draws": num_draws, "level": level, "seed": seed}
    metrics = evaluate(landmarks, **settings)
    if compare_with is not None:
        metrics["comparison"] = compare(landmarks, read_landmarks(compare_with), **settings)
    metrics["provenance"] = provenance({"Landmarks": table, "Other model": compare_with}, seed)
    contents: dict[str, Any] = {METRICS_FILE: metrics}
    if report:
        from monai_mamba.evaluation.report.evaluation import render_landmarks

        contents[REPORT_FILE] = render_landmarks(metrics, landmarks, explanations, robustness)
    write_results(output_dir, contents)
    return metrics


def summarize_trainings(
    tables: Sequence[os.PathLike[str] | str], output_dir: os.PathLike[str] | str
) -> dict[str, dict[str, Any]]:
    """Write ``trainings.json``: mean and population standard deviation of every metric over several trainings.

    The paper reports three trainings so.

    Args:
        tables: one per training, of the same cases and landmarks.
        output_dir: folder for the result.

    Raises:
        DatasetError: if a table cannot be read, or they are not of the same cases and landmarks.
    """
    runs = [read_landmarks(table) for table in tables]
    for table, run in zip(tables, runs, strict=True):
        if run.names != runs[0].names or list(run.case) != list(runs[0].case):
            raise DatasetError(f"{table}: is not of the same cases and landmarks as {tables[0]}")
    figures = [landmark_figures(run.errors_mm, run.names) for run in runs]
    values = {name: np.array([one[name] for one in figures]) for name in figures[0]}
    summary = {
        name: {"mean": float(v.mean()), "standard_deviation": float(v.std()), "values": v.tolist()}
        for name, v in values.items()
    }
    write_results(output_dir, {"trainings.json": summary})
    return summary


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
) -> dict[str, Interval]:
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

    return bootstrap(
        lambda rows: landmark_figures(errors_mm[rows], names, radii_mm), list(patients), num_draws, level, seed
    )


def landmark_figures(
    errors_mm: np.ndarray, names: Sequence[str], radii_mm: Sequence[float] = RADII_MM
) -> dict[str, float]:
    """Return ``mre_mm``, ``sdr_<radius>mm`` and ``mre_mm_<name>`` of errors ``(cases, landmarks)``, NaN if unknown."""
    found = ~np.isnan(errors_mm)
    counts = found.sum(0)
    means = np.where(counts > 0, np.where(found, errors_mm, 0).sum(0) / np.maximum(counts, 1), np.nan)
    measured = errors_mm[found]
    result = {"mre_mm": float(np.nanmean(means)) if len(measured) else float("nan")}
    for radius in radii_mm:
        result[f"sdr_{radius:g}mm"] = float((measured <= radius).mean()) if len(measured) else float("nan")
    return result | {f"mre_mm_{name}": float(mean) for name, mean in zip(names, means, strict=True)}
