"""Keeps one step without finite gradients from spoiling a network, and a series of them from wasting a week."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from monai_mamba.errors import MonaiMambaError

#: Steps in a row without finite gradients after which a training stops.
MAX_CONSECUTIVE_SKIPS = 20


class NonFiniteGradients(MonaiMambaError):
    """The training diverged: every recent step had NaN or infinite gradients."""


class GradientGuard:
    """Skips the optimiser's step when a gradient is NaN or infinite, counts, and stops a hopeless run.

    Call :meth:`watch` once. A gradient scaler (float16 on CUDA) skips such steps itself: :meth:`count` sees them too,
    if the training step runs inside it.

    Args:
        max_consecutive: steps in a row that may be skipped.

    Attributes:
        num_skipped: steps skipped so far.
        is_step_attempted: whether the optimizer's step has been called in the training step that is being counted.
    """

    def __init__(self, max_consecutive: int = MAX_CONSECUTIVE_SKIPS) -> None:
        self.max_consecutive = max_consecutive
        self.num_skipped = 0
        self._consecutive = 0
        self.is_step_attempted = False

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the gradients before every step of this optimiser."""
        optimizer.register_step_pre_hook(self._before_step)

    @contextmanager
    def count(self) -> Iterator[None]:
        """Run one training step; if the optimizer's step is never called, the scaler has skipped it.

        Raises:
            NonFiniteGradients: after `max_consecutive` skipped steps in a row.
        """
        self.is_step_attempted = False
        yield
        if not self.is_step_attempted:
            self._skip()

    def _before_step(self, optimizer: torch.optim.Optimizer, _arguments: Any, _keywords: Any) -> None:
        self.is_step_attempted = True
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch._foreach_norm([p.grad for p in parameters])
        if not parameters or bool(torch.isfinite(torch.stack(norms)).all()):
            self._consecutive = 0
            return
        for parameter in parameters:
            parameter.grad = None  # optimisers pass over parameters without a gradient
        self._skip()

    def _skip(self) -> None:
        self.num_skipped += 1
        self._consecutive += 1
        if self._consecutive >= self.max_consecutive:
            raise NonFiniteGradients(
                f"{self._consecutive} steps in a row had NaN or infinite gradients; the weights were kept as they were "
                "before. Look for NaN or extreme values in the images, lower the learning rate, or train with "
                "nnMambaTrainerNoAMP"
            )
