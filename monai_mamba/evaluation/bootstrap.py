"""Confidence intervals by drawing patients, not images: the images of a patient are not independent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A figure with its interval.

    Attributes:
        value: on all cases.
        low: lower end.
        high: upper end.
        draws: draws in which the figure could be measured.
    """

    value: float
    low: float
    high: float
    draws: int


def bootstrap(
    metric: Callable[[np.ndarray], Mapping[str, float]],
    patients: Sequence[str] | np.ndarray,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return percentile intervals of the figures of ``metric`` from draws of whole patients, with replacement.

    Args:
        metric: takes the indices of the drawn cases and returns named figures, NaN for what it cannot measure.
        patients: patient of each case.
        num_draws: draws.
        level: coverage.
        seed: seed of the draws.

    Raises:
        ValueError: if there are no cases, or the level is not between 0 and 1.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; clusters: Field and Welsh, 2007.
    """
    if len(patients) == 0:
        raise ValueError("`patients` is empty; there is nothing to draw from")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, got {level}")
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    members = [np.flatnonzero(index == i) for i in range(index.max() + 1)]
    generator = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {}
    for _ in range(num_draws):
        chosen = generator.integers(0, len(members), len(members))
        for name, value in metric(np.concatenate([members[i] for i in chosen])).items():
            draws.setdefault(name, []).append(value)
    result = {}
    for name, value in metric(np.arange(len(index))).items():
        values = np.array(draws.get(name, []))
        values = values[~np.isnan(values)]
        tail = 100 * (1 - level) / 2
        low, high = np.percentile(values, [tail, 100 - tail]) if len(values) else (np.nan, np.nan)
        result[name] = Interval(float(value), float(low), float(high), len(values))
    return result


def as_table(intervals: Mapping[str, Interval]) -> dict[str, dict[str, Any]]:
    """Return intervals as plain dictionaries, as ``metrics.json`` holds them."""
    return {name: asdict(interval) for name, interval in intervals.items()}


def describe_interval(level: float, num_draws: int, seed: int) -> dict[str, Any]:
    """Return how intervals were made, as ``metrics.json`` holds it."""
    return {"level": level, "method": "percentile bootstrap over patients", "draws": num_draws, "seed": seed}
