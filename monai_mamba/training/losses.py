"""Losses of the bundles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
    """Mean squared error of heat maps; one that is NaN (a landmark that the case lacks) asks for nothing.

    The sum of the squares is divided by the number of all values, those of the missing maps too. Divided by what is
    known in the batch, a landmark would weigh more the fewer others happen to be in its batch, and the mean over
    several processes or accumulated batches would not be the loss of all their cases together. Here every annotated
    landmark counts the same in an epoch; the number printed is lower where many are missing.

    Shape:
        input and target ``(B, landmarks, *spatial)``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, torch.where(target.isnan(), input.detach(), target))


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
