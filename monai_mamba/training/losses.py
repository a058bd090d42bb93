"""Losses of the bundles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from monai_mamba.training.bundle import class_weights


class MultiLabelLoss(nn.BCEWithLogitsLoss):
    """Binary cross entropy of every class for itself; labels are zeros and ones of any type."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target.to(input.dtype))


class SingleLogitLoss(nn.BCEWithLogitsLoss):
    """Binary cross entropy of one logit ``(B, 1)`` against class numbers ``(B,)``.

    Args:
        cases: the training cases, for their class counts; needed for ``balance="weights"`` only.
        balance: ``"weights"`` weighs the second class by the count of the first over its own; else none (published).
    """

    def __init__(self, cases: Sequence[dict[str, Any]] = (), balance: str = "none") -> None:
        weights = class_weights(cases, 2, balance)
        super().__init__(pos_weight=None if weights is None else weights[1] / weights[0])

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input[:, 0], target.to(input.dtype))


class HeatMapLoss(nn.Module):
    """Mean squared error of heat maps ``(B, landmarks, *spatial)``; NaN maps (landmarks a case lacks) are left out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        is_known = ~target.flatten(2).isnan().any(2)  # (B, landmarks)
        if is_known.all():
            return F.mse_loss(input, target)
        if not is_known.any():
            return input.sum() * 0.0  # a batch without any landmark changes nothing
        return F.mse_loss(input[is_known], target[is_known])


def classification_loss(
    cases: Sequence[dict[str, Any]], num_classes: int, balance: str = "none", multi_label: bool = False
) -> nn.Module:
    """Return the loss of a classification: cross entropy, or binary cross entropy for several labels at once.

    Args:
        cases: the training cases, for their class counts.
        num_classes: number of classes.
        balance: ``"weights"`` weighs classes by the inverse of their counts; else they count as they come (published).
        multi_label: labels are lists of zeros and ones.

    Raises:
        ValueError: if balancing is asked for with several labels at once.
    """
    if multi_label:
        if balance != "none":
            raise ValueError(f"`balance` must be 'none' for several labels at once, got {balance!r}")
        return MultiLabelLoss()
    return nn.CrossEntropyLoss(weight=class_weights(cases, num_classes, balance))
