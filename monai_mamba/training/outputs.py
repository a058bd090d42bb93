"""What the outputs of a network mean."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_mamba.errors import RunError


def class_logits(logits: Tensor, num_classes: int) -> Tensor:
    """Return one logit per class, ``(B, num_classes)``; networks with one logit for two classes mean the second.

    Raises:
        RunError: if the network has another number of outputs.
    """
    if logits.ndim == 2 and logits.shape[1] == 1 and num_classes == 2:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        outputs = f"{logits.shape[1]} outputs" if logits.ndim == 2 else f"outputs of shape {tuple(logits.shape)}"
        raise RunError(f"the network has {outputs}, the data set {num_classes} classes")
    return logits


def class_probabilities(logits: Tensor, num_classes: int, multi_label: bool = False) -> Tensor:
    """Return probabilities ``(B, num_classes)`` in float64 on the CPU.

    Args:
        logits: ``(B, num_classes)``, or ``(B, 1)`` for two classes.
        num_classes: number of classes.
        multi_label: independent probabilities (sigmoid) instead of one distribution (softmax).

    Raises:
        RunError: if the network has another number of outputs.
    """
    logits = class_logits(torch.as_tensor(logits).detach().double().cpu(), num_classes)
    return logits.sigmoid() if multi_label else logits.softmax(1)
