"""Tables of predictions, as the bundles write them, and what is computed from them.

A table is a CSV file with a row per case: ``case``, ``patient`` (default: the case), optionally ``study``; ``label``
with class numbers, or ``label_<class>`` with 0 and 1 for several labels at once; ``prob_<class>``, a column per class.
"""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation import calibration, classification
from monai_mamba.evaluation.bootstrap import Interval, bootstrap
from monai_mamba.files import write_text

GROUPS = ("case", "study", "patient")


@dataclass(frozen=True)
class Predictions:
    """Predictions of one model.

    Attributes:
        classes: names of the classes.
        case, patient, study: names, ``(cases,)``.
        label: class numbers ``(cases,)``, or zeros and ones ``(cases, classes)``.
        probs: ``(cases, classes)``.
    """

    classes: list[str]
    case: np.ndarray
    patient: np.ndarray
    study: np.ndarray
    label: np.ndarray
    probs: np.ndarray

    @property
    def is_multi_label(self) -> bool:
        """True for several labels at once."""
        return self.label.ndim == 2


def read_predictions(path: os.PathLike[str] | str) -> Predictions:
    """Read a table of predictions.

    Raises:
        DatasetError: if the file is missing, is empty, lacks a column, has a case twice, or holds something that is no
            probability or no class.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot be read as a table of predictions: {error}") from error
    if not rows:
        raise DatasetError(f"{path}: holds no predictions")
    columns = [name for name in rows[0] if name is not None]
    classes = [name.removeprefix("prob_") for name in columns if name.startswith("prob_")]
    if "case" not in columns or len(classes) < 1:
        raise DatasetError(f"{path}: needs the columns `case` and `prob_<class>`, has {', '.join(columns)}")
    label_columns = ["label"] if "label" in columns else [f"label_{name}" for name in classes]
    missing = [name for name in label_columns if name not in columns]
    if missing:
        raise DatasetError(f"{path}: has no `label` column, nor {', '.join(missing)}")
    probs = _numbers(rows, [f"prob_{name}" for name in classes], path)
    if not ((probs >= 0) & (probs <= 1)).all():
        raise DatasetError(f"{path}: holds probabilities outside 0 to 1")
    label = _numbers(rows, label_columns, path)
    highest = len(classes) - 1 if label_columns == ["label"] else 1
    if not (np.isin(label, np.arange(highest + 1))).all():
        raise DatasetError(f"{path}: labels must be whole numbers from 0 to {highest}")
    if label_columns == ["label"]:
        label = label[:, 0]
        if not np.allclose(probs.sum(1), 1, atol=1e-3):
            raise DatasetError(f"{path}: the probabilities of a case must add up to 1")
    case = np.array([row["case"] for row in rows])
    if len(np.unique(case)) < len(case):
        raise DatasetError(f"{path}: a case appears twice")
    patient = np.array([row.get("patient") or row["case"] for row in rows])
    study = np.array([row.get("study") or row.get("patient") or row["case"] for row in rows])
    return Predictions(classes, case, patient, study, label.astype(int), probs)


def group_predictions(predictions: Predictions, by: str) -> Predictions:
    """Average the probabilities of the cases of a study or a patient, e.g. the pairs of images of a MURA study.

    Raises:
        DatasetError: if the cases of a group have different labels.
    """
    if by not in GROUPS:
        raise ValueError(f"`by` must be one of {', '.join(GROUPS)}, got {by!r}")
    if by == "case":
        return predictions
    names, first, index = np.unique(getattr(predictions, by), return_index=True, return_inverse=True)
    if not np.array_equal(predictions.label[first][index], predictions.label):
        raise DatasetError(f"cases of one {by} have different labels; evaluate by case")
    probs = np.stack([np.bincount(index, column) for column in predictions.probs.T], 1) / np.bincount(index)[:, None]
    return Predictions(
        predictions.classes,
        names,
        predictions.patient[first],
        predictions.study[first],
        predictions.label[first],
        probs,
    )


def evaluate(
    test: Predictions,
    validation: Predictions | None = None,
    *,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Return all figures of one model.

    Args:
        test: predictions on the test cases.
        validation: predictions of the same model on the validation cases; Youden's threshold and the temperature
            are taken from them. Without them neither is reported: on the test cases they would flatter the model.
        num_draws: draws of the bootstrap over patients.
        level: coverage of the intervals.
        seed: seed of the draws.

    Returns:
        What ``metrics.json`` holds.
    """
    if validation is not None and validation.classes != test.classes:
        raise DatasetError("the validation and the test table have different classes")
    common = {
        "cases": len(test.case),
        "patients": len(np.unique(test.patient)),
        "classes": test.classes,
        "interval": {"level": level, "method": "percentile bootstrap over patients", "draws": num_draws, "seed": seed},
    }
    if test.is_multi_label:

        def areas(rows: np.ndarray) -> dict[str, float]:
            mean, each = classification.multi_label_auc(test.label[rows], test.probs[rows])
            return {"auc": mean, **{f"auc_{n}": float(v) for n, v in zip(test.classes, each, strict=True)}}

        intervals = bootstrap(areas, test.patient, num_draws, level, seed)
        unmeasured = [n for n in test.classes if math.isnan(intervals[f"auc_{n}"].value)]
        return {**common, "metrics": _table(intervals), "classes_without_both_labels": unmeasured}

    def figures(threshold: float | None) -> dict[str, Any]:
        def metric(rows: np.ndarray) -> dict[str, float]:
            return classification.score(test.label[rows], test.probs[rows], threshold)

        return _table(bootstrap(metric, test.patient, num_draws, level, seed))

    chosen = classification.decide(test.probs)
    matrix = classification.confusion_matrix(test.label, chosen, labels=np.arange(len(test.classes)))
    report: dict[str, Any] = {
        **common,
        "metrics": figures(None),
        "confusion_matrix": {"rows": "true", "columns": "predicted", "counts": matrix.tolist()},
        "per_class": {
            name: {key: float(values[i]) for key, values in classification.class_metrics(matrix).items()}
            for i, name in enumerate(test.classes)
        },
        "calibration": {"expected_error": calibration.reliability(test.label, test.probs).expected_error},
    }
    if len(test.classes) == 2 and min(np.bincount(test.label, minlength=2)) >= 2:
        report["delong"] = asdict(classification.delong(test.label, test.probs[:, 1], level))
    if validation is not None:
        temperature = calibration.fit_temperature(validation.label, validation.probs)
        scaled = calibration.scale_temperature(test.probs, temperature)
        report["calibration"] |= {
            "temperature": temperature,
            "expected_error_scaled": calibration.reliability(test.label, scaled).expected_error,
        }
        if len(test.classes) == 2 and len(np.unique(validation.label)) == 2:
            threshold = classification.youden_threshold(validation.label, validation.probs[:, 1])
            report["youden"] = {"threshold": threshold, "chosen_on": "validation", "metrics": figures(threshold)}
    return report


def compare(
    first: Predictions, second: Predictions, *, num_draws: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Return the differences first - second of two models on the same cases, with paired intervals.

    For two classes DeLong's test of the AUCs is added.

    Raises:
        DatasetError: if the tables are not of the same cases, labels and classes.
    """
    order, other = np.argsort(first.case), np.argsort(second.case)
    if (
        first.classes != second.classes
        or not np.array_equal(first.case[order], second.case[other])
        or not np.array_equal(first.label[order], second.label[other])
    ):
        raise DatasetError("two models can be compared on the same cases, labels and classes only")
    label, patient = first.label[order], first.patient[order]
    probs = [first.probs[order], second.probs[other]]

    def metric(rows: np.ndarray) -> dict[str, float]:
        if first.is_multi_label:
            a, b = (classification.multi_label_auc(label[rows], p[rows])[0] for p in probs)
            return {"auc": a - b}
        a_scores, b_scores = (classification.score(label[rows], p[rows]) for p in probs)
        return {name: a_scores[name] - b_scores[name] for name in a_scores}

    result: dict[str, Any] = {"difference": _table(bootstrap(metric, patient, num_draws, level, seed))}
    if not first.is_multi_label and len(first.classes) == 2 and min(np.bincount(label, minlength=2)) >= 2:
        difference, p_value = classification.delong_test(label, probs[0][:, 1], probs[1][:, 1])
        result["delong"] = {"auc_difference": difference, "p_value": p_value}
    return result


def evaluate_files(
    test: os.PathLike[str] | str,
    output_dir: os.PathLike[str] | str,
    validation: os.PathLike[str] | str | None = None,
    compare_with: os.PathLike[str] | str | None = None,
    group: str = "case",
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate tables of predictions and write ``metrics.json`` and ``reliability.png`` into ``output_dir``.

    Args:
        test: table of the test cases.
        output_dir: folder for the results.
        validation: table of the validation cases, for Youden's threshold and the temperature.
        compare_with: table of another model on the same test cases.
        group: score ``"case"`` by case, or the mean over each ``"study"`` or ``"patient"``.
        num_draws, level, seed: of the bootstrap.

    Returns:
        The content of ``metrics.json``.
    """
    predictions = group_predictions(read_predictions(test), group)
    on_validation = None if validation is None else group_predictions(read_predictions(validation), group)
    report = {"group": group, **evaluate(predictions, on_validation, num_draws=num_draws, level=level, seed=seed)}
    if compare_with is not None:
        other = group_predictions(read_predictions(compare_with), group)
        report["comparison"] = compare(predictions, other, num_draws=num_draws, level=level, seed=seed)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not predictions.is_multi_label:
        _plot_reliability(predictions, folder / "reliability.png")
    # NaN is not JSON; what cannot be measured is null.
    write_text(folder / "metrics.json", json.dumps(_without_nan(report), indent=1, allow_nan=False))
    return report


def _plot_reliability(predictions: Predictions, path: Path) -> None:
    from matplotlib.figure import Figure

    from monai_mamba.files import whole_file

    diagram = calibration.reliability(predictions.label, predictions.probs)
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    axes.plot(diagram.confidence, diagram.accuracy, marker="o")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"expected calibration error {diagram.expected_error:.3f}")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _numbers(rows: list[dict[str, str]], columns: list[str], path: Path) -> np.ndarray:
    try:
        values = np.array([[float(row[name]) for name in columns] for row in rows])
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{path}: {', '.join(columns)} must be numbers in every row: {error}") from error
    if not np.isfinite(values).all():
        raise DatasetError(f"{path}: {', '.join(columns)} must be finite numbers in every row")
    return values


def _table(intervals: dict[str, Interval]) -> dict[str, Any]:
    return {name: asdict(interval) for name, interval in intervals.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
