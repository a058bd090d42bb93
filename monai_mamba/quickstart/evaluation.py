"""Score predictions of cases that were not trained on: Dice, 95 % Hausdorff distance, surface Dice.

The metrics are MONAI's. What is decided here is what they leave open, the structures that are empty:

* empty in reference and prediction: nothing to measure, the value is ``None`` and is not averaged;
* empty in one of the two: Dice 0, surface Dice 0, and the Hausdorff distance is the diagonal of the volume in mm, so
  that a structure that was not found never improves the average.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import nibabel as nib
import numpy as np

from monai_mamba.errors import DatasetError

SURFACE_DICE_TOLERANCE_MM = 1.0
EMPTY_POLICY = (
    "A structure that is empty in reference and prediction is not scored. One that is empty in only one of them has "
    "Dice 0, surface Dice 0 and the diagonal of the volume as its 95 % Hausdorff distance."
)
_MAX_GEOMETRY_ERROR_MM = 1e-2


@dataclass(frozen=True)
class Score:
    """Metrics of one structure in one case; ``None`` where there is nothing to measure."""

    dice: float | None
    hd95_mm: float | None
    surface_dice: float | None


METRICS = tuple(Score.__dataclass_fields__)


@dataclass(frozen=True)
class Evaluation:
    """Scores of all cases.

    Attributes:
        labels: name of every structure that is scored, by its value.
        cases: case name to label value to score.
        tolerance_mm: tolerance of the surface Dice.
    """

    labels: dict[int, str]
    cases: dict[str, dict[int, Score]] = field(default_factory=dict)
    tolerance_mm: float = SURFACE_DICE_TOLERANCE_MM

    def mean(self, metric: str, label: int) -> float | None:
        """Mean of a metric of one structure over the cases in which it can be measured."""
        values = self._values(metric, label)
        return fmean(values) if values else None

    @property
    def mean_dice(self) -> float | None:
        """Mean over the structures of their mean Dice over the cases, as nnU-Net's ``foreground_mean``."""
        means = [mean for label in self.labels if (mean := self.mean("dice", label)) is not None]
        return fmean(means) if means else None

    def case_dice(self, case: str) -> float | None:
        """Mean Dice of one case over its structures."""
        values = [score.dice for score in self.cases[case].values() if score.dice is not None]
        return fmean(values) if values else None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers for ``metrics.json``."""
        return {
            "mean_dice": self.mean_dice,
            "per_class": {
                name: {
                    "label": label,
                    **{metric: self.mean(metric, label) for metric in METRICS},
                    "lowest_dice": min(self._values("dice", label), default=None),
                    "num_cases": len(self._values("dice", label)),
                }
                for label, name in self.labels.items()
            },
            "cases": {
                case: {self.labels[label]: asdict(score) for label, score in scores.items()}
                for case, scores in self.cases.items()
            },
            "surface_dice_tolerance_mm": self.tolerance_mm,
            "empty_structures": EMPTY_POLICY,
        }

    def _values(self, metric: str, label: int) -> list[float]:
        values = (getattr(scores[label], metric) for scores in self.cases.values())
        return [value for value in values if value is not None]


def evaluate_folder(
    predictions: os.PathLike[str] | str,
    references: os.PathLike[str] | str,
    labels: Mapping[int, str],
    tolerance_mm: float = SURFACE_DICE_TOLERANCE_MM,
) -> Evaluation:
    """Score every reference ``*.nii.gz`` against the prediction of the same name.

    Args:
        predictions: folder with predicted label maps.
        references: folder with reference label maps.
        labels: value and name of the structures; 0 is the background and is not scored.
        tolerance_mm: largest distance at which two surfaces count as equal for the surface Dice.

    Raises:
        DatasetError: if a prediction is missing or lies on another grid than its reference.
    """
    evaluation = Evaluation({v: name for v, name in labels.items() if v != 0}, tolerance_mm=tolerance_mm)
    files = sorted(Path(references).glob("*.nii.gz"))
    if not files:
        raise DatasetError(f"{references}: holds no reference *.nii.gz to evaluate against")
    for file in files:
        prediction_file = Path(predictions) / file.name
        if not prediction_file.is_file():
            raise DatasetError(f"{prediction_file}: the prediction of this case is missing")
        reference, prediction = nib.load(file), nib.load(prediction_file)
        assert isinstance(reference, nib.Nifti1Image) and isinstance(prediction, nib.Nifti1Image)
        same_place = np.allclose(reference.affine, prediction.affine, rtol=0, atol=_MAX_GEOMETRY_ERROR_MM)
        if reference.shape[:3] != prediction.shape[:3] or not same_place:
            raise DatasetError(f"{prediction_file}: lies on another grid than its reference {file}")
        evaluation.cases[file.name.removesuffix(".nii.gz")] = score_case(
            np.asarray(prediction.dataobj).reshape(reference.shape[:3]),
            np.asarray(reference.dataobj).reshape(reference.shape[:3]),
            evaluation.labels,
            tuple(float(s) for s in nib.affines.voxel_sizes(reference.affine)),
            tolerance_mm,
        )
    return evaluation


def score_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    labels: Mapping[int, str],
    spacing_mm: tuple[float, ...],
    tolerance_mm: float = SURFACE_DICE_TOLERANCE_MM,
) -> dict[int, Score]:
    """Score the structures of one case.

    Args:
        prediction: label map, ``(H, W, D)``.
        reference: label map of the same shape.
        labels: value and name of the structures to score.
        spacing_mm: voxel size along the three axes.
        tolerance_mm: tolerance of the surface Dice.
    """
    diagonal_mm = float(np.linalg.norm(np.array(reference.shape) * np.array(spacing_mm)))
    return {
        label: _score_structure(prediction == label, reference == label, spacing_mm, tolerance_mm, diagonal_mm)
        for label in labels
    }


def _score_structure(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing_mm: tuple[float, ...],
    tolerance_mm: float,
    diagonal_mm: float,
) -> Score:
    found, wanted = bool(prediction.any()), bool(reference.any())
    if not found and not wanted:
        return Score(None, None, None)
    if not found or not wanted:
        return Score(0.0, diagonal_mm, 0.0)
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    # A margin of background: the surface is where a structure ends, also where it ends at the border of the volume.
    pred, ref = (
        torch.from_numpy(np.pad(mask, 1))[None, None].float() for mask in (prediction, reference)
    )  # (1, 1, ...)
    spacing = list(spacing_mm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's own metrics use an argument that MONAI deprecates
        dice = compute_dice(pred, ref, include_background=True)
        hd95 = compute_hausdorff_distance(pred, ref, include_background=True, percentile=95, spacing=spacing)
        surface_dice = compute_surface_dice(
            pred, ref, [tolerance_mm], include_background=True, spacing=spacing, use_subvoxels=True
        )
    return Score(*(float(value) for value in (dice, hd95, surface_dice)))
