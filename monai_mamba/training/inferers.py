"""Inference that MONAI does not have: averages over mirrored copies of the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import fall_back_tuple
from torch import Tensor


class FlipInferer(Inferer):
    """Test-time augmentation: the mean of the logits of the input and of all its mirror images.

    Args:
        inferer: does the inference of each copy.
        flips: spatial axes that are mirrored, from 0; all their combinations are taken. Without any this is ``inferer``
            itself. Do not mirror an axis along which left and right mean different things.
        dense: outputs are maps ``(B, C, *spatial)``, which are mirrored back, instead of ``(B, C)``.

    Raises:
        ValueError: if an axis is negative or appears twice.
    """

    def __init__(self, inferer: Inferer, flips: Sequence[int] = (), dense: bool = False) -> None:
        super().__init__()
        axes = [int(axis) for axis in flips]
        if any(axis < 0 for axis in axes) or len(set(axes)) < len(axes):
            raise ValueError(f"`flips` must be spatial axes from 0, each once, got {list(flips)}")
        self.inferer = inferer
        self.dense = dense
        self.copies = [dims for count in range(len(axes) + 1) for dims in combinations(axes, count)]

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        total = self.inferer(inputs, network, *args, **kwargs)
        for axes in self.copies[1:]:
            dims = [axis + 2 for axis in axes]
            output = self.inferer(torch.flip(inputs, dims), network, *args, **kwargs)
            total = total + (torch.flip(output, dims) if self.dense else output)
        return total / len(self.copies)


def window_size(inferer: Inferer | None, size: Sequence[int]) -> tuple[int, ...]:
    """Return how much of an input an inferer hands to the network at once.

    Args:
        inferer: of a bundle; None for the network itself.
        size: of the input.

    Returns:
        The window of a sliding window, which can be larger than the input and is filled with zeros then; else ``size``.
    """
    while isinstance(inferer, FlipInferer):
        inferer = inferer.inferer
    roi = getattr(inferer, "roi_size", None)
    return tuple(size) if roi is None else tuple(int(n) for n in fall_back_tuple(roi, size))
