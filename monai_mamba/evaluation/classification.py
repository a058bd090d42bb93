"""Classification metrics by the conventions of the papers and of MedMNIST.

* Precision, sensitivity, specificity and F1 are means over the classes, each class against the rest; a class that is
  never predicted has precision 0. F1 is the mean of the classes' F1, not the harmonic mean of the two means.
* The AUC is that of the second class for two classes, else the mean of the one-against-rest AUCs (MedMNIST).
* For several labels at once the AUC is the mean over the classes that have positives and negatives; the others are
  named and left out. Labels that are not known (NaN) count nowhere.

The convention was recovered from published figures: see `tests/evaluation/test_classification.py`. The figures equal
scikit-learn's (same tests); they are computed here because a bootstrap needs them a thousand times, and scikit-learn
checks its input anew each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, rankdata
from sklearn.metrics import roc_curve

METRICS = ("accuracy", "precision", "sensitivity", "specificity", "f1", "auc")


def confusion_matrix(label: np.ndarray, decided: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the confusion matrix ``(num_classes, num_classes)``; rows are the true classes."""
    cells = np.bincount(label * num_classes + decided, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def class_metrics(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Return precision, sensitivity, specificity and F1 of every class.

    Args:
        matrix: confusion matrix ``(classes, classes)``, rows are the true classes.

    Returns:
        Name to ``(classes,)``; 0 where nothing can be divided by.
    """
    matrix = np.asarray(matrix)
    hits, actual, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    negatives = matrix.sum() - actual
    return {
        "precision": _share(hits, predicted),
        "sensitivity": _share(hits, actual),
        "specificity": _share(negatives - (predicted - hits), negatives),
        "f1": _share(2 * hits, predicted + actual),
    }


def matrix_metrics(matrix: np.ndarray) -> dict[str, float]:
    """Return the five metrics that follow from a confusion matrix, rows being the true classes."""
    matrix = np.asarray(matrix)
    means = {name: float(values.mean()) for name, values in class_metrics(matrix).items()}
    return {"accuracy": float(np.trace(matrix) / matrix.sum()), **means}


def auc(label: np.ndarray, probs: np.ndarray) -> float:
    """Return the area under the ROC curve, NaN if a class is missing.

    Args:
        label: class numbers ``(cases,)``.
        probs: probabilities ``(cases, classes)``.
    """
    num_classes = probs.shape[1]
    if len(np.unique(label)) < num_classes:
        return float("nan")
    if num_classes == 2:
        return _area(label == 1, probs[:, 1])
    return float(np.mean([_area(label == c, probs[:, c]) for c in range(num_classes)]))


def multi_label_auc(label: np.ndarray, probs: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean AUC over the classes that can be measured, and the AUC of every class (NaN if it cannot).

    Args:
        label: zeros and ones ``(cases, classes)``, NaN where they are not known.
        probs: probabilities ``(cases, classes)``.
    """
    each = np.full(label.shape[1], np.nan)
    for c in range(label.shape[1]):
        known = ~np.isnan(label[:, c])
        positive = label[known, c] == 1
        if 0 < positive.sum() < len(positive):
            each[c] = _area(positive, probs[known, c])
    return (float(np.nanmean(each)) if not np.isnan(each).all() else float("nan")), each


def multi_label_score(
    label: np.ndarray, probs: np.ndarray, thresholds: np.ndarray | float = 0.5
) -> tuple[dict[str, float], np.ndarray]:
    """Return all six metrics for several labels at once, as means over the classes that can be measured.

    Each class is a question of its own with the answers yes and no: precision, sensitivity, specificity and F1 are
    those of yes, accuracy is the share of right answers. Where a label is not known the answer does not count.

    Args:
        label: zeros and ones ``(cases, classes)``, NaN where they are not known.
        probs: probabilities ``(cases, classes)``.
        thresholds: probability from which the answer is yes, one or one per class (published: 0.5).

    Returns:
        The metrics, and the AUC of every class (NaN if it has no positives or no negatives).
    """
    mean_auc, each = multi_label_auc(label, probs)
    measured = ~np.isnan(each)
    if not measured.any():
        return dict.fromkeys(METRICS, float("nan")), each
    yes, no = label[:, measured] == 1, label[:, measured] == 0
    answer = (probs >= thresholds)[:, measured]
    hits, rejections = (yes & answer).sum(0), (no & ~answer).sum(0)
    answered = (answer & (yes | no)).sum(0)
    return {
        "accuracy": float((hits + rejections).sum() / (yes | no).sum()),
        "precision": float(_share(hits, answered).mean()),
        "sensitivity": float(_share(hits, yes.sum(0)).mean()),
        "specificity": float(_share(rejections, no.sum(0)).mean()),
        "f1": float(_share(2 * hits, yes.sum(0) + answered).mean()),
        "auc": mean_auc,
    }, each


def decide(probs: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """Return the predicted classes: the most probable one, or of two classes the second from ``threshold`` on."""
    if threshold is None:
        return probs.argmax(1)
    if probs.shape[1] != 2:
        raise ValueError(f"`threshold` needs two classes, got {probs.shape[1]}")
    return (probs[:, 1] >= threshold).astype(int)


def score(label: np.ndarray, probs: np.ndarray, threshold: float | None = None) -> dict[str, float]:
    """Return all six metrics of one model.

    Args:
        label: class numbers ``(cases,)``.
        probs: probabilities ``(cases, classes)``.
        threshold: for two classes, the probability from which a case is of the second; None takes the most probable.
    """
    matrix = confusion_matrix(label, decide(probs, threshold), probs.shape[1])
    return {**matrix_metrics(matrix), "auc": auc(label, probs)}


def youden_threshold(label: np.ndarray, probability: np.ndarray) -> float:
    """Return the threshold with the largest sensitivity + specificity - 1; choose it on validation data only.

    Args:
        label: 0 or 1, ``(cases,)``.
        probability: of class 1, ``(cases,)``.

    Raises:
        ValueError: if one of the classes is missing.
    """
    if len(np.unique(label)) != 2:
        raise ValueError("Youden's point needs cases of both classes in `label`")
    false_positive_rate, sensitivity, thresholds = roc_curve(label, probability, drop_intermediate=False)
    return float(min(thresholds[np.argmax(sensitivity - false_positive_rate)], 1.0))


@dataclass(frozen=True)
class DeLong:
    """An AUC with its standard error and interval.

    Attributes:
        auc: area under the ROC curve.
        standard_error: by DeLong's method.
        low: lower end of the interval.
        high: upper end.
    """

    auc: float
    standard_error: float
    low: float
    high: float


def delong(label: np.ndarray, probability: np.ndarray, level: float = 0.95) -> DeLong:
    """Return the AUC of two classes with DeLong's interval; cases are taken as independent.

    Raises:
        ValueError: if one of the classes is missing.

    References:
        DeLong et al., Biometrics 44:837, 1988; in the ranks form of Sun and Xu, IEEE SPL 21:1389, 2014.
    """
    areas, covariance = _delong_covariance(np.asarray(label), [np.asarray(probability)])
    error = float(np.sqrt(covariance[0, 0]))
    half = float(norm.ppf(0.5 + level / 2)) * error
    return DeLong(float(areas[0]), error, max(0.0, areas[0] - half), min(1.0, areas[0] + half))


def delong_test(label: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Compare the AUCs of two models on the same cases.

    Returns:
        The difference first - second and its two-sided p value (1 if the two do not differ at all).

    References:
        DeLong et al., Biometrics 44:837, 1988.
    """
    areas, covariance = _delong_covariance(np.asarray(label), [np.asarray(first), np.asarray(second)])
    difference = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if variance <= 0:
        return difference, 1.0 if difference == 0 else 0.0
    return difference, float(2 * norm.sf(abs(difference) / np.sqrt(variance)))


def _delong_covariance(label: np.ndarray, scores: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    positive, negative = label == 1, label == 0
    m, n = int(positive.sum()), int(negative.sum())
    if m + n != len(label) or min(m, n) < 2:
        raise ValueError(f"DeLong's method needs two cases of class 0 and of class 1 at least, got {n} and {m}")
    by_positive, by_negative = [], []
    for values in scores:
        ranks = rankdata(values)
        by_positive.append((ranks[positive] - rankdata(values[positive])) / n)  # share of negatives below each
        by_negative.append(1 - (ranks[negative] - rankdata(values[negative])) / m)
    v10, v01 = np.array(by_positive), np.array(by_negative)
    return v10.mean(1), np.atleast_2d(np.cov(v10)) / m + np.atleast_2d(np.cov(v01)) / n


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where there is nothing to divide by."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def _area(positive: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve as the Mann-Whitney statistic; ties count half."""
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    above = rankdata(score)[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))
