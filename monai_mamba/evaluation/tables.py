"""Tables of predictions, as the bundles write them, and what is computed from them.

A table is a CSV file with a row per case: ``case``, ``patient`` (default: the case), optionally ``study``; ``label``
with class numbers, or ``label_<class>`` with 0 and 1 for several labels at once, empty where it is not known;
``prob_<class>``, a column per class.
Further columns (``site``, ``body_part``) can be scored by their values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation import calibration, classification
from monai_mamba.evaluation.bootstrap import as_table, bootstrap, describe_interval
from monai_mamba.evaluation.results import METRICS_FILE, REPORT_FILE, provenance, write_results
from monai_mamba.evaluation.rows import read_numbers, read_rows

GROUPS = ("case", "study", "patient")
#: How far the probabilities of a case may be from adding up to 1: tables are rounded.
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Predictions:
    """Predictions of one model.

    Attributes:
        classes: names of the classes.
        case, patient, study: names, ``(cases,)``; the study is empty if the table has none.
        label: class numbers ``(cases,)``, or zeros and ones ``(cases, classes)`` with NaN for those not known.
        probs: ``(cases, classes)``.
        columns: further columns of the table, ``(cases,)`` each.
    """

    classes: list[str]
    case: np.ndarray
    patient: np.ndarray
    study: np.ndarray
    label: np.ndarray
    probs: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def is_multi_label(self) -> bool:
        """True for several labels at once."""
        return self.label.ndim == 2

    @property
    def has_studies(self) -> bool:
        """True if a study holds several cases, e.g. the pairs of images of a MURA study."""
        return bool((self.study != "").all()) and len(np.unique(self.study)) < len(self.case)

    def select(self, rows: np.ndarray) -> Predictions:
        """Return some of the cases."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Predictions(
            self.classes,
            self.case[rows],
            self.patient[rows],
            self.study[rows],
            self.label[rows],
            self.probs[rows],
            columns,
        )

    def scores(self, threshold: Any = None) -> Callable[[np.ndarray], dict[str, float]]:
        """Return the function from row numbers to the six metrics.

        Args:
            threshold: for two classes the probability from which a case is of the second; for several labels at once
                one per class; None takes the most probable class, or 0.5.
        """
        if self.is_multi_label:
            limits = 0.5 if threshold is None else threshold

            def metrics(rows: np.ndarray) -> dict[str, float]:
                means, each = classification.multi_label_score(self.label[rows], self.probs[rows], limits)
                return means | {f"auc_{n}": float(v) for n, v in zip(self.classes, each, strict=True)}

            return metrics
        return lambda rows: classification.score(self.label[rows], self.probs[rows], threshold)


def read_predictions(path: os.PathLike[str] | str) -> Predictions:
    """Read a table of predictions.

    Raises:
        DatasetError: if the file is missing, is empty, lacks a column, has a case twice, or holds something that is no
            probability or no class.
    """
    path = Path(path)
    rows = read_rows(path, "a table of predictions")
    names = list(rows[0])
    classes = [name.removeprefix("prob_") for name in names if name.startswith("prob_")]
    if not classes:
        raise DatasetError(f"{path}: needs the columns `case` and `prob_<class>`, has {', '.join(names)}")
    is_single = "label" in names
    label_columns = ["label"] if is_single else [f"label_{name}" for name in classes]
    missing = [name for name in label_columns if name not in names]
    if missing:
        raise DatasetError(f"{path}: has no `label` column, nor {', '.join(missing)}")
    if is_single and len(classes) < 2:
        raise DatasetError(f"{path}: needs `prob_<class>` for every class, two at least; has `prob_{classes[0]}` only")
    case = np.array([row["case"] for row in rows])
    values, counts = np.unique(case, return_counts=True)
    if (counts > 1).any():
        raise DatasetError(f"{path}: the case {values[counts > 1][0]} appears twice; every row is a case of its own")
    probs = read_numbers(rows, [f"prob_{name}" for name in classes], path)
    outside = ~((probs >= 0) & (probs <= 1)).all(1)
    if outside.any():
        raise DatasetError(f"{path}: holds probabilities outside 0 to 1, first in case {case[outside][0]}")
    label = read_numbers(rows, label_columns, path, may_be_empty=not is_single)
    highest = len(classes) - 1 if is_single else 1
    outside = ~(np.isin(label, np.arange(highest + 1)) | np.isnan(label)).all(1)
    if outside.any():
        raise DatasetError(
            f"{path}: labels must be whole numbers from 0 to {highest}, case {case[outside][0]} has "
            f"{', '.join(f'{v:g}' for v in label[outside][0])}"
        )
    if is_single:
        label = label[:, 0].astype(int)
        off = np.abs(probs.sum(1) - 1) > _SUM_TOLERANCE
        if off.any():
            raise DatasetError(
                f"{path}: the probabilities of a case must add up to 1, those of {case[off][0]} to "
                f"{probs[off][0].sum():.6g}; are they logits, or several labels at once (`label_<class>`)?"
            )
    patient = np.array([row.get("patient") or row["case"] for row in rows])
    study = np.array([row.get("study") or "" for row in rows])
    if "study" in names and (study == "").any():
        raise DatasetError(f"{path}: the column `study` is empty for the case {case[study == ''][0]}")
    known = {"case", "patient", "study", *label_columns, *(f"prob_{name}" for name in classes)}
    columns = {name: np.array([row[name] or "" for row in rows]) for name in names if name not in known}
    return Predictions(classes, case, patient, study, label, probs, columns)


def group_predictions(predictions: Predictions, by: str) -> Predictions:
    """Average the probabilities of the cases of a study or a patient, e.g. the pairs of images of a MURA study.

    Raises:
        DatasetError: if the cases of a group have different labels.
    """
    if by not in GROUPS:
        raise ValueError(f"`by` must be one of {', '.join(GROUPS)}, got {by!r}")
    if by == "case":
        return predictions
    if by == "study" and (predictions.study == "").any():
        raise DatasetError("scores by study need the column `study` in the table of predictions")
    names, first, index = np.unique(getattr(predictions, by), return_index=True, return_inverse=True)
    if not _same_labels(predictions.label[first][index], predictions.label):
        raise DatasetError(f"cases of one {by} have different labels; evaluate by case")
    probs = np.stack([np.bincount(index, column) for column in predictions.probs.T], 1) / np.bincount(index)[:, None]
    grouped = predictions.select(first)
    return Predictions(grouped.classes, names, grouped.patient, grouped.study, grouped.label, probs, grouped.columns)


def evaluate(
    test: Predictions,
    validation: Predictions | None = None,
    *,
    by: str | None = None,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Return all figures of one model.

    Args:
        test: predictions on the test cases.
        validation: predictions of the same model on the validation cases; Youden's thresholds and the temperature
            are taken from them. Without them neither is reported: on the test cases they would flatter the model.
        by: further column of the table; every value of it is scored on its own too.
        num_draws: draws of the bootstrap over patients.
        level: coverage of the intervals.
        seed: seed of the draws.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        DatasetError: if the tables do not fit each other, or all cases are of one class.
    """
    _require_both(test)
    if validation is not None and validation.classes != test.classes:
        raise DatasetError(
            f"the validation and the test table have different classes: {', '.join(validation.classes)} and "
            f"{', '.join(test.classes)}"
        )
    if validation is not None and validation.is_multi_label != test.is_multi_label:
        raise DatasetError("one of the validation and the test table has one label per case, the other several")

    def figures(predictions: Predictions, threshold: Any = None) -> dict[str, Any]:
        return as_table(bootstrap(predictions.scores(threshold), predictions.patient, num_draws, level, seed))

    report: dict[str, Any] = {
        "task": "multi-label classification" if test.is_multi_label else "classification",
        "cases": len(test.case),
        "patients": len(np.unique(test.patient)),
        "classes": test.classes,
        "interval": describe_interval(level, num_draws, seed),
        "metrics": figures(test),
    }
    if test.has_studies:
        # Published figures of pairs say nothing about studies: a study with ten images counts 45 times.
        try:
            studies = group_predictions(test, "study")
            report["by_study"] = {"cases": len(studies.case), "metrics": figures(studies)}
        except DatasetError as error:
            report["by_study"] = {"refused": str(error)}
    if by is not None:
        report["by"] = _strata(test, by, figures)
    if test.is_multi_label:
        areas = classification.multi_label_auc(test.label, test.probs)[1]
        report["classes_without_both_labels"] = [n for n, v in zip(test.classes, areas, strict=True) if math.isnan(v)]
        known = ~np.isnan(test.label)
        report["positives"] = dict(zip(test.classes, (test.label == 1).sum(0).tolist(), strict=True))
        report["known_labels"] = dict(zip(test.classes, known.sum(0).tolist(), strict=True))
        if validation is not None:
            thresholds = np.array([_youden_of_class(validation, c) for c in range(len(test.classes))])
            report["youden"] = {
                "threshold": dict(zip(test.classes, thresholds.tolist(), strict=True)),
                "chosen_on": "validation",
                "metrics": figures(test, thresholds),
            }
        return report

    chosen = classification.decide(test.probs)
    matrix = classification.confusion_matrix(test.label, chosen, len(test.classes))
    report |= {
        "classes_without_cases": [n for i, n in enumerate(test.classes) if not (test.label == i).any()],
        "confusion_matrix": {"rows": "true", "columns": "predicted", "counts": matrix.tolist()},
        "per_class": _per_class(test, num_draws, level, seed),
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
            report["youden"] = {"threshold": threshold, "chosen_on": "validation", "metrics": figures(test, threshold)}
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
        or not _same_labels(first.label[order], second.label[other])
    ):
        raise DatasetError("two models can be compared on the same cases, labels and classes only")
    first, second = first.select(order), second.select(other)
    scores = [first.scores(), second.scores()]

    def differences(rows: np.ndarray) -> dict[str, float]:
        a, b = (score(rows) for score in scores)
        return {name: a[name] - b[name] for name in a}

    result: dict[str, Any] = {"difference": as_table(bootstrap(differences, first.patient, num_draws, level, seed))}
    label = first.label
    if not first.is_multi_label and len(first.classes) == 2 and min(np.bincount(label, minlength=2)) >= 2:
        difference, p_value = classification.delong_test(label, first.probs[:, 1], second.probs[:, 1])
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
    by: str | None = None,
    explanations: os.PathLike[str] | str | None = None,
    robustness: os.PathLike[str] | str | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Evaluate tables of predictions; write ``metrics.json``, ``reliability.png`` and ``report.html``.

    Args:
        test: table of the test cases.
        output_dir: folder for the results.
        validation: table of the validation cases, for Youden's threshold and the temperature.
        compare_with: table of another model on the same test cases.
        group: score ``"case"`` by case, or the mean over each ``"study"`` or ``"patient"``.
        num_draws, level, seed: of the bootstrap.
        by: further column of the test table; every value of it is scored on its own too.
        explanations: folder that ``monai-mamba explain`` wrote, for the report.
        robustness: folder that ``monai-mamba robustness`` wrote, for the report.
        report: write ``report.html``.

    Returns:
        The content of ``metrics.json``.
    """
    predictions = group_predictions(read_predictions(test), group)
    on_validation = None if validation is None else group_predictions(read_predictions(validation), group)
    settings: dict[str, Any] = {"num_draws": num_draws, "level": level, "seed": seed}
    metrics = {"group": group, **evaluate(predictions, on_validation, by=by, **settings)}
    if compare_with is not None:
        other = group_predictions(read_predictions(compare_with), group)
        metrics["comparison"] = compare(predictions, other, **settings)
    metrics["provenance"] = provenance(
        {"Predictions": test, "Validation": validation, "Other model": compare_with}, seed
    )
    contents: dict[str, Any] = {METRICS_FILE: metrics}
    if not predictions.is_multi_label:
        from monai_mamba.evaluation.report.charts import draw_reliability

        contents["reliability.png"] = draw_reliability(predictions.label, predictions.probs)
    if report:
        from monai_mamba.evaluation.report.evaluation import render_classification

        contents[REPORT_FILE] = render_classification(metrics, predictions, on_validation, explanations, robustness)
    write_results(output_dir, contents)
    return metrics


def _youden_of_class(validation: Predictions, index: int) -> float:
    """The threshold of one of several labels from its known cases; 0.5 if it has no positives or no negatives."""
    known = ~np.isnan(validation.label[:, index])
    label = validation.label[known, index].astype(int)
    if not 0 < label.sum() < len(label):
        return 0.5
    return classification.youden_threshold(label, validation.probs[known, index])


def _same_labels(first: np.ndarray, second: np.ndarray) -> bool:
    return np.array_equal(first, second, equal_nan=first.dtype.kind == "f")


def _require_both(test: Predictions) -> None:
    if test.is_multi_label:
        if np.isnan(classification.multi_label_auc(test.label, test.probs)[1]).all():
            raise DatasetError("no class has cases with label 0 and with label 1; there is nothing to measure")
    elif len(np.unique(test.label)) == 1:
        only = test.classes[int(test.label[0])]
        raise DatasetError(
            f"all {len(test.case)} cases are of the class {only}; sensitivity, specificity and AUC need cases of "
            "another class too"
        )


def _per_class(test: Predictions, num_draws: int, level: float, seed: int) -> dict[str, Any]:
    chosen = classification.decide(test.probs)

    def metrics(rows: np.ndarray) -> dict[str, float]:
        matrix = classification.confusion_matrix(test.label[rows], chosen[rows], len(test.classes))
        each = classification.class_metrics(matrix)
        return {f"{key}/{i}": float(value) for key, values in each.items() for i, value in enumerate(values)}

    figures = as_table(bootstrap(metrics, test.patient, num_draws, level, seed))
    return {
        name: {key: figures[f"{key}/{i}"] for key in ("precision", "sensitivity", "specificity", "f1")}
        for i, name in enumerate(test.classes)
    }


def _strata(test: Predictions, by: str, figures: Callable[[Predictions], dict[str, Any]]) -> dict[str, Any]:
    if by not in test.columns:
        known = ", ".join(test.columns) or "no further column"
        raise DatasetError(f"`by` must be a further column of the table, got {by!r}; it has {known}")
    values = test.columns[by]
    result: dict[str, Any] = {"column": by, "values": {}}
    for value in np.unique(values):
        stratum = test.select(values == value)
        result["values"][str(value)] = {
            "cases": len(stratum.case),
            "patients": len(np.unique(stratum.patient)),
            "metrics": figures(stratum),
        }
    # As published for the body parts of MURA: the mean of the parts' AUCs, beside the AUC of all.
    areas = [entry["metrics"]["auc"]["value"] for entry in result["values"].values()]
    measured = [area for area in areas if not math.isnan(area)]
    result["mean_auc"] = float(np.mean(measured)) if measured else math.nan
    return result
