"""Losses of the bundles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monai_mamba.errors import DatasetError
from monai_mamba.training.bundle import class_weights


class MultiLabelLoss(nn.Module):
    """Binary cross entropy of every class for itself; a label that is NaN (not known) asks for nothing.

    The sum is divided by the number of all labels, those that are not known too, for the reasons of
    :class:`HeatMapLoss`.

    Shape:
        input ``(B, classes)``, logits; target ``(B, classes)``, zeros and ones of any type.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        target = target.to(input.dtype)
        known = ~target.isnan()
        return F.binary_cross_entropy_with_logits(
            input, torch.where(known, target, torch.zeros_like(target)), weight=known.to(input.dtype)
        )


class SingleLogitLoss(nn.BCEWithLogitsLoss):
    """Binary cross entropy of one logit ``(B, 1)`` against class numbers ``(B,)``.

    Args:
        cases: the training cases, for their class counts; needed for ``balance="weights"`` only.
        balance: ``"weights"`` weighs the second class by the count of the first over its own; else none (published).

    Raises:
        DatasetError: if a case is of a third class or of several at once, for which one logit is not enough.
    """

    def __init__(self, cases: Sequence[dict[str, Any]] = (), balance: str = "none") -> None:
        for case in cases:
            if np.ndim(case["label"]) or case["label"] not in (0, 1):
                raise DatasetError(
                    f"case {case.get('case')}: `label` must be 0 or 1 for a network with one logit, got "
                    f"{case['label']}; use a data set of two classes"
                )
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
