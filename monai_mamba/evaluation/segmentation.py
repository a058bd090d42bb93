"""Score label maps: Dice, 95 % Hausdorff distance and surface Dice (NSD) per case and structure, with intervals.

The metrics are MONAI's. What is decided here is what they leave open, the structures that are empty:

* empty in reference and prediction: nothing to measure, the value is ``None`` and is not averaged;
* empty in one of the two: Dice 0, surface Dice 0, and the Hausdorff distance is the diagonal of the volume in mm, so
  that a structure that was not found never improves the average.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import nibabel as nib
import numpy as np

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.bootstrap import as_table, bootstrap, describe_interval
from monai_mamba.evaluation.results import METRICS_FILE, REPORT_FILE, provenance, write_results
from monai_mamba.evaluation.rows import read_patients

SURFACE_DICE_TOLERANCE_MM = 1.0
EMPTY_POLICY = (
    "A structure that is empty in reference and prediction is not scored. One that is empty in only one of them has "
    "Dice 0, surface Dice 0 and the diagonal of the volume as its 95 % Hausdorff distance."
)
#: Label maps that can be read: NIfTI by nibabel, the others by SimpleITK.
FILE_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
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
        structures: name and label values of every structure that is scored; several values make a region.
        cases: case name to structure to score.
        tolerance_mm: tolerance of the surface Dice.
    """

    structures: dict[str, tuple[int, ...]]
    cases: dict[str, dict[str, Score]] = field(default_factory=dict)
    tolerance_mm: float = SURFACE_DICE_TOLERANCE_MM

    def mean(self, metric: str, structure: str) -> float | None:
        """Mean of a metric of one structure over the cases in which it can be measured."""
        values = self._values(metric, structure)
        return fmean(values) if values else None

    @property
    def mean_dice(self) -> float | None:
        """Mean over the structures of their mean Dice over the cases, as nnU-Net's ``foreground_mean``."""
        means = [mean for name in self.structures if (mean := self.mean("dice", name)) is not None]
        return fmean(means) if means else None

    def case_dice(self, case: str) -> float | None:
        """Mean Dice of one case over its structures."""
        values = [score.dice for score in self.cases[case].values() if score.dice is not None]
        return fmean(values) if values else None

    def array(self, metric: str) -> np.ndarray:
        """A metric as ``(cases, structures)``, NaN where there was nothing to measure."""
        rows = [[getattr(scores[name], metric) for name in self.structures] for scores in self.cases.values()]
        return np.array(rows, dtype=np.float64).reshape(len(self.cases), len(self.structures))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers for ``metrics.json``."""
        return {
            "mean_dice": self.mean_dice,
            "per_class": {
                name: {
                    "label": values[0] if len(values) == 1 else list(values),
                    **{metric: self.mean(metric, name) for metric in METRICS},
                    "lowest_dice": min(self._values("dice", name), default=None),
                    "num_cases": len(self._values("dice", name)),
                }
                for name, values in self.structures.items()
            },
            "cases": {
                case: {name: asdict(score) for name, score in scores.items()} for case, scores in self.cases.items()
            },
            "surface_dice_tolerance_mm": self.tolerance_mm,
            "empty_structures": EMPTY_POLICY,
        }

    def as_csv(self, patients: Mapping[str, str]) -> str:
        """One line per case and structure; empty cells where there was nothing to measure."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", "patient", "structure", *METRICS])
        for case, scores in self.cases.items():
            for name, score in scores.items():
                figures = ("" if value is None else f"{value:.6g}" for value in asdict(score).values())
                writer.writerow([case, patients[case], name, *figures])
        return text.getvalue()

    def _values(self, metric: str, structure: str) -> list[float]:
        values = (getattr(scores[structure], metric) for scores in self.cases.values())
        return [value for value in values if value is not None]


@dataclass(frozen=True)
class Labels:
    """What ``dataset.json`` says about label maps.

    Attributes:
        structures: name to label values; regions have several.
        file_ending: of the label maps.
        ignore: value of voxels that are not scored; None for none.
    """

    structures: dict[str, tuple[int, ...]]
    file_ending: str = ".nii.gz"
    ignore: int | None = None


def evaluate_folder(
    predictions: os.PathLike[str] | str,
    references: os.PathLike[str] | str,
    labels: Labels,
    tolerance_mm: float = SURFACE_DICE_TOLERANCE_MM,
    on_case: Callable[[str], None] | None = None,
) -> Evaluation:
    """Score every reference of a folder against the prediction of the same name.

    Args:
        predictions: folder with predicted label maps.
        references: folder with reference label maps.
        labels: the structures; the background, value 0 alone, is not scored.
        tolerance_mm: largest distance at which two surfaces count as equal for the surface Dice.
        on_case: called with the name of each case when it is done.

    Raises:
        DatasetError: if a prediction is missing, cannot be read, holds a value that no structure has, or lies on
            another grid than its reference.
    """
    file_ending = labels.file_ending
    if file_ending not in FILE_ENDINGS:
        raise DatasetError(f"label maps must end in one of {', '.join(FILE_ENDINGS)}, got {file_ending!r}")
    evaluation = Evaluation({n: v for n, v in labels.structures.items() if v != (0,)}, {}, tolerance_mm)
    files = sorted(Path(references).glob(f"*{file_ending}"))
    if not files:
        raise DatasetError(f"{references}: holds no reference *{file_ending} to evaluate against")
    missing = [file.name for file in files if not (Path(predictions) / file.name).is_file()]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DatasetError(f"{Path(predictions) / missing[0]}: the prediction of this case is missing{others}")
    known = {0, *(value for values in evaluation.structures.values() for value in values)}
    for file in files:
        prediction_file = Path(predictions) / file.name
        reference, affine = read_label_map(file)
        prediction, prediction_affine = read_label_map(prediction_file)
        same_place = np.allclose(affine, prediction_affine, rtol=0, atol=_MAX_GEOMETRY_ERROR_MM)
        if reference.shape != prediction.shape or not same_place:
            raise DatasetError(f"{prediction_file}: lies on another grid than its reference {file}")
        unknown = sorted(set(np.unique(prediction).tolist()) - known)
        if unknown:
            raise DatasetError(
                f"{prediction_file}: holds the value {unknown[0]:g}, which is none of the labels "
                f"{', '.join(map(str, sorted(known)))}; is it a label map of this data set?"
            )
        if labels.ignore is not None:
            scored = reference != labels.ignore
            prediction, reference = prediction * scored, reference * scored
        case = file.name.removesuffix(file_ending)
        spacing = tuple(float(s) for s in nib.affines.voxel_sizes(affine))
        evaluation.cases[case] = score_case(prediction, reference, evaluation.structures, spacing, tolerance_mm)
        if on_case is not None:
            on_case(case)
    return evaluation


def read_label_map(path: os.PathLike[str] | str) -> tuple[np.ndarray, np.ndarray]:
    """Return a label map ``(i, j, k)`` and its affine to RAS+ in mm.

    Raises:
        DatasetError: if the file cannot be read or has more than three dimensions.
    """
    path = Path(path)
    try:
        if path.name.endswith((".nii", ".nii.gz")):
            image = nib.Nifti1Image.from_filename(path)
            labels, affine = np.asarray(image.dataobj), np.asarray(image.affine)
        else:
            import SimpleITK as sitk

            picture = sitk.ReadImage(str(path))
            labels = np.transpose(sitk.GetArrayFromImage(picture))
            affine = np.eye(4)
            affine[:3, :3] = np.array(picture.GetDirection()).reshape(3, 3) * picture.GetSpacing()
            affine[:3, 3] = picture.GetOrigin()
            affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS+ to RAS+
    except Exception as error:
        raise DatasetError(f"{path}: cannot be read as a label map: {error}".splitlines()[0]) from error
    if labels.ndim < 2 or int(np.prod(labels.shape[3:])) != 1:
        raise DatasetError(f"{path}: a label map has three dimensions, this one has the shape {labels.shape}")
    return labels.reshape((*labels.shape, 1)[:3]), affine


def read_labels(dataset_json: os.PathLike[str] | str) -> Labels:
    """Read nnU-Net's or the decathlon's ``dataset.json``.

    Raises:
        DatasetError: if the file cannot be read or names no structure.
    """
    path = Path(dataset_json)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read as dataset.json: {error}") from error
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, dict):
        raise DatasetError(f'{path}: `labels` must be an object such as {{"background": 0, "liver": 1}}')
    structures: dict[str, tuple[int, ...]] = {}
    for key, value in labels.items():
        # The decathlon writes {"1": "liver"}, nnU-Net {"liver": 1} or, for a region, {"liver": [1, 2]}.
        name, values = (value, key) if isinstance(value, str) else (key, value)
        try:
            structures[str(name)] = tuple(int(v) for v in (values if isinstance(values, list) else [values]))
        except (TypeError, ValueError):
            raise DatasetError(f"{path}: `labels` must map names to whole numbers, got {key!r}: {value!r}") from None
    ignore = structures.pop("ignore", None)
    structures = {name: values for name, values in structures.items() if values != (0,)}
    if not structures:
        raise DatasetError(f"{path}: `labels` names no structure besides the background")
    return Labels(structures, str(content.get("file_ending", ".nii.gz")), ignore[0] if ignore else None)


def score_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    structures: Mapping[str, tuple[int, ...]],
    spacing_mm: tuple[float, ...],
    tolerance_mm: float = SURFACE_DICE_TOLERANCE_MM,
) -> dict[str, Score]:
    """Score the structures of one case.

    Args:
        prediction: label map, ``(H, W, D)``; a single slice, ``D`` = 1, is scored as an image.
        reference: label map of the same shape.
        structures: name and label values of the structures to score.
        spacing_mm: voxel size along the three axes.
        tolerance_mm: tolerance of the surface Dice.
    """
    if reference.ndim == 3 and reference.shape[2] == 1:
        prediction, reference, spacing_mm = prediction[..., 0], reference[..., 0], tuple(spacing_mm[:2])
    diagonal_mm = float(np.linalg.norm(np.array(reference.shape) * np.array(spacing_mm)))
    return {
        name: _score_structure(
            np.isin(prediction, values), np.isin(reference, values), spacing_mm, tolerance_mm, diagonal_mm
        )
        for name, values in structures.items()
    }


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Return the Dice of two masks, NaN if both are empty: that of :func:`score_case` without the distances' cost."""
    total = int(prediction.sum()) + int(reference.sum())
    return 2 * int((prediction & reference).sum()) / total if total else math.nan


def summarize(
    evaluation: Evaluation,
    patients: Mapping[str, str] | None = None,
    *,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the means of all metrics per structure and over the structures, with intervals by patients.

    Args:
        evaluation: scores of all cases.
        patients: case to patient; None takes every case for a patient.
        num_draws, level, seed: of the bootstrap.

    Returns:
        What ``metrics.json`` holds besides the scores of the cases.
    """
    patients = patients or {case: case for case in evaluation.cases}
    arrays = {metric: evaluation.array(metric) for metric in METRICS}
    drawn = [patients[case] for case in evaluation.cases]
    figures = as_table(
        bootstrap(lambda rows: _means(arrays, evaluation.structures, rows), drawn, num_draws, level, seed)
    )
    return {
        "task": "segmentation",
        "cases": len(evaluation.cases),
        "patients": len(set(drawn)),
        "structures": {name: list(values) for name, values in evaluation.structures.items()},
        "interval": describe_interval(level, num_draws, seed),
        "metrics": {metric: figures[f"{metric}/"] for metric in METRICS},
        "per_structure": {
            name: {metric: figures[f"{metric}/{name}"] for metric in METRICS} for name in evaluation.structures
        },
        "surface_dice_tolerance_mm": evaluation.tolerance_mm,
        "empty_structures": EMPTY_POLICY,
    }


def compare(
    first: Evaluation,
    second: Evaluation,
    patients: Mapping[str, str] | None = None,
    *,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the differences first - second of two models on the same cases, with paired intervals.

    Raises:
        DatasetError: if the two are not of the same cases and structures.
    """
    if first.cases.keys() != second.cases.keys() or first.structures != second.structures:
        raise DatasetError("two models can be compared on the same cases and structures only")
    patients = patients or {case: case for case in first.cases}
    order = list(first.cases)
    ordered = Evaluation(second.structures, {case: second.cases[case] for case in order}, second.tolerance_mm)
    arrays = [{metric: evaluation.array(metric) for metric in METRICS} for evaluation in (first, ordered)]

    def differences(rows: np.ndarray) -> dict[str, float]:
        a, b = (_means(values, first.structures, rows) for values in arrays)
        return {name: a[name] - b[name] for name in a}

    figures = as_table(bootstrap(differences, [patients[case] for case in order], num_draws, level, seed))
    return {
        "difference": {metric: figures[f"{metric}/"] for metric in METRICS},
        "per_structure": {
            name: {metric: figures[f"{metric}/{name}"] for metric in METRICS} for name in first.structures
        },
    }


def evaluate_files(
    predictions: os.PathLike[str] | str,
    references: os.PathLike[str] | str,
    output_dir: os.PathLike[str] | str,
    dataset_json: os.PathLike[str] | str | None = None,
    patients: os.PathLike[str] | str | None = None,
    compare_with: os.PathLike[str] | str | None = None,
    images: os.PathLike[str] | str | Mapping[str, str] | None = None,
    tolerance_mm: float = SURFACE_DICE_TOLERANCE_MM,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    report: bool = True,
    on_case: Callable[[str], None] | None = None,
    explanations: os.PathLike[str] | str | None = None,
    robustness: os.PathLike[str] | str | None = None,
) -> dict[str, Any]:
    """Evaluate a folder of label maps; write ``metrics.json``, ``cases.csv`` and ``report.html``.

    Args:
        predictions: folder with predicted label maps.
        references: folder with the references; every one of them needs its prediction.
        output_dir: folder for the results.
        dataset_json: nnU-Net's or the decathlon's description; None looks into both folders and above the references.
        patients: table with the columns ``case`` and ``patient``; None takes every case for a patient.
        compare_with: folder with another model's predictions of the same cases.
        images: folder with the images ``<case>_0000.nii.gz``, or case to file, for the pictures of the report.
        tolerance_mm: of the surface Dice.
        num_draws, level, seed: of the bootstrap.
        report: write ``report.html``.
        on_case: called with the name of each case when it is done.
        explanations, robustness: folders that ``monai-mamba explain`` and ``monai-mamba robustness`` wrote, for the
            report.

    Returns:
        The content of ``metrics.json``.
    """
    description = Path(dataset_json) if dataset_json is not None else _find_description(predictions, references)
    labels = read_labels(description)
    evaluation = evaluate_folder(predictions, references, labels, tolerance_mm, on_case)
    by_case = read_patients(patients, list(evaluation.cases)) if patients else {case: case for case in evaluation.cases}
    settings: dict[str, Any] = {"num_draws": num_draws, "level": level, "seed": seed}
    metrics = summarize(evaluation, by_case, **settings)
    predicted = {f.name.removesuffix(labels.file_ending) for f in Path(predictions).glob(f"*{labels.file_ending}")}
    metrics["predictions_without_reference"] = sorted(predicted - evaluation.cases.keys())
    if compare_with is not None:
        other = evaluate_folder(compare_with, references, labels, tolerance_mm)
        metrics["comparison"] = compare(evaluation, other, by_case, **settings)
    inputs = {
        "Predictions": predictions,
        "References": references,
        "Description": description,
        "Patients": patients,
        "Other model": compare_with,
    }
    metrics["provenance"] = provenance(inputs, seed)
    contents: dict[str, Any] = {METRICS_FILE: metrics, "cases.csv": evaluation.as_csv(by_case)}
    if report:
        from monai_mamba.evaluation.report.evaluation import render_segmentation

        contents[REPORT_FILE] = render_segmentation(
            metrics, evaluation, predictions, references, images, labels, explanations, robustness
        )
    write_results(output_dir, contents)
    return metrics


def _find_description(predictions: os.PathLike[str] | str, references: os.PathLike[str] | str) -> Path:
    places = [Path(references) / "dataset.json", Path(references).parent / "dataset.json"]
    places.append(Path(predictions) / "dataset.json")  # nnU-Net copies it there
    for place in places:
        if place.is_file():
            return place
    raise DatasetError(f"{places[1]}: does not exist; name the data set's dataset.json, it holds the structures' names")


def _means(arrays: Mapping[str, np.ndarray], structures: Mapping[str, Any], rows: np.ndarray) -> dict[str, float]:
    """Means of the drawn cases, by ``metric/structure``; ``metric/`` is the mean over the structures."""
    result: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)  # NaN is the answer that is wanted
        for metric, values in arrays.items():
            means = np.nanmean(values[rows], axis=0)
            result |= {f"{metric}/{name}": float(mean) for name, mean in zip(structures, means, strict=True)}
            result[f"{metric}/"] = float(np.nanmean(means))
    return result


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
    from monai.transforms.utils import generate_spatial_bounding_box

    # Distances need the box around both masks only, and a margin of background: the surface is where a structure
    # ends, also where it ends at the border of the volume.
    start, end = generate_spatial_bounding_box((prediction | reference)[None])
    box = tuple(slice(a, b) for a, b in zip(start, end, strict=True))
    pred, ref = (
        torch.from_numpy(np.pad(mask[box], 1))[None, None].float() for mask in (prediction, reference)
    )  # (1, 1, ...)
    spacing = list(spacing_mm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's own metrics use an argument that MONAI deprecates
        overlap = compute_dice(pred, ref, include_background=True)
        hd95 = compute_hausdorff_distance(pred, ref, include_background=True, percentile=95, spacing=spacing)
        surface_dice = compute_surface_dice(
            pred, ref, [tolerance_mm], include_background=True, spacing=spacing, use_subvoxels=True
        )
    return Score(*(float(value) for value in (overlap, hd95, surface_dice)))
