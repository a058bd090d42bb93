"""Do probabilities mean what they say: expected calibration error, reliability diagram, temperature scaling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram with equally wide bins; empty bins are NaN.

    Attributes:
        edges: of the bins, ``(bins + 1,)``.
        confidence: mean probability of the predicted class per bin.
        accuracy: share of right predictions per bin.
        count: cases per bin.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def expected_error(self) -> float:
        """Expected calibration error: the mean over the cases of |accuracy - confidence| of their bin."""
        gap = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((gap * self.count).sum() / self.count.sum())


def reliability(label: np.ndarray, probs: np.ndarray, num_bins: int = 15) -> Reliability:
    """Return the reliability diagram of the most probable class.

    Args:
        label: class numbers ``(cases,)``.
        probs: probabilities ``(cases, classes)``.
        num_bins: bins.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 2.
    """
    confidence, right = probs.max(1), probs.argmax(1) == label
    edges = np.linspace(0, 1, num_bins + 1)
    index = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)  # bins (low, high]
    count = np.bincount(index, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(index, confidence, num_bins) / count
        accuracy = np.bincount(index, right, num_bins) / count
    return Reliability(edges, mean, accuracy, count)


def scale_temperature(probs: np.ndarray, temperature: float) -> np.ndarray:
    """Return the softmax of the logits divided by ``temperature``; above 1 the probabilities become less sure."""
    logits = np.log(np.clip(probs, 1e-12, None)) / temperature
    scaled = np.exp(logits - logits.max(1, keepdims=True))
    return scaled / scaled.sum(1, keepdims=True)


def fit_temperature(label: np.ndarray, probs: np.ndarray) -> float:
    """Return the temperature with the smallest negative log likelihood; fit it on validation data only.

    References:
        Guo et al., ICML 2017, section 4.2.
    """
    rows = np.arange(len(label))

    def negative_log_likelihood(log_temperature: float) -> float:
        scaled = scale_temperature(probs, float(np.exp(log_temperature)))
        return -float(np.log(np.clip(scaled[rows, label], 1e-12, None)).mean())

    best = minimize_scalar(negative_log_likelihood, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(best.x))
