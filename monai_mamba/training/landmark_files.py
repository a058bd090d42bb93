"""Files of landmarks that were found: one table for `monai_mamba.evaluation`, markups for 3D Slicer.

The table has the columns that `monai_mamba.evaluation.landmarks` reads, ``peak``, the largest value of the heat map,
and ``error_mm``. The columns of the reference are empty for a landmark that a case does not have.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monai_mamba.files import whole_file, write_text


@dataclass(frozen=True)
class FoundLandmarks:
    """The landmarks that a network found in one case.

    Attributes:
        case, patient: names.
        position_mm: ``(landmarks, 3)``, world (RAS+).
        peak: ``(landmarks,)``, largest value of each heat map.
        reference_mm: ``(landmarks, 3)``, NaN for those that the case does not have; None if no reference is known.
    """

    case: str
    patient: str
    position_mm: np.ndarray
    peak: np.ndarray
    reference_mm: np.ndarray | None = None


def write_landmark_table(path: os.PathLike[str] | str, names: Sequence[str], found: Sequence[FoundLandmarks]) -> None:
    """Write a table of landmarks, whole or not at all."""
    axes = ("x", "y", "z")
    columns = ["case", "patient", "landmark", *(f"{a}_mm" for a in axes), "peak"]
    with_reference = any(one.reference_mm is not None for one in found)
    if with_reference:
        columns += [*(f"reference_{a}_mm" for a in axes), "error_mm"]
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for one in found:
            for index, name in enumerate(names):
                row = [one.case, one.patient, name, *_decimals(one.position_mm[index]), f"{one.peak[index]:.4g}"]
                if with_reference:
                    reference = np.full(3, np.nan) if one.reference_mm is None else one.reference_mm[index]
                    error = np.linalg.norm(one.position_mm[index] - reference)
                    row += [*_decimals(reference), *_decimals(np.array([error]))]
                writer.writerow(row)


def write_markups(path: os.PathLike[str] | str, names: Sequence[str], position_mm: np.ndarray) -> None:
    """Write the landmarks of one case as a list of points for 3D Slicer (``.mrk.json``, coordinates RAS).

    Args:
        path: the file; it appears whole or not at all.
        names: of the landmarks; they become the labels of the points.
        position_mm: ``(landmarks, 3)``, world (RAS+).

    References:
        3D Slicer, markups schema 1.0.3.
    """
    points = [
        {
            "id": str(number),
            "label": name,
            "position": [round(float(x), 4) for x in position],
            "positionStatus": "defined",
        }
        for number, (name, position) in enumerate(zip(names, position_mm, strict=True), 1)
    ]
    content = {
        "@schema": "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
        "markups-schema-v1.0.3.json#",
        "markups": [{"type": "Fiducial", "coordinateSystem": "RAS", "coordinateUnits": "mm", "controlPoints": points}],
    }
    write_text(path, json.dumps(content, indent=1))


def _decimals(values: np.ndarray) -> list[str]:
    return ["" if np.isnan(value) else f"{value:.4f}" for value in values]
