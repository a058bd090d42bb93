"""The part of an image that a network sees at once, where a sliding window looks at the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A window of an image that is filled with zeros, evenly on both sides, where the window is larger.

    Attributes:
        shape: of the image.
        size: of the window.
        start: first voxel, in the filled image.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    start: tuple[int, ...]

    @classmethod
    def around(cls, weight: np.ndarray, size: Sequence[int]) -> Window:
        """Return the window that holds the most of ``weight`` ``(*spatial)``; of several the one in its middle."""
        # Running sums along each axis; at index i of the filter lies the window that starts at i - size // 2.
        filled = np.pad(weight.astype(np.float64), _margins(weight.shape, size))
        held = uniform_filter(filled, size=tuple(size), mode="constant")
        held = held[tuple(slice(s // 2, n - s + s // 2 + 1) for n, s in zip(filled.shape, size, strict=True))]
        best = np.argwhere(held >= held.max() * (1 - 1e-6))
        places = np.argwhere(filled)
        middle = (np.array(filled.shape) - 1) / 2
        if len(places):
            middle = np.average(places, axis=0, weights=filled[tuple(places.T)])
        distance = np.linalg.norm(best + (np.array(size) - 1) / 2 - middle, axis=1)
        return cls(weight.shape, tuple(size), tuple(int(v) for v in best[distance.argmin()]))

    @property
    def limits(self) -> tuple[np.ndarray, np.ndarray] | None:
        """First and last voxel of the image in the window; None if it holds the whole image."""
        before = np.array([low for low, _ in _margins(self.shape, self.size)])
        first = np.maximum(np.array(self.start) - before, 0)
        last = np.minimum(np.array(self.start) - before + self.size, self.shape) - 1
        return None if (first == 0).all() and (last == np.array(self.shape) - 1).all() else (first, last)

    def cut(self, values: Tensor) -> Tensor:
        """Return the window out of ``(..., *spatial)``."""
        widths = [width for margin in reversed(_margins(self.shape, self.size)) for width in margin]
        return _part(torch.nn.functional.pad(values, widths), self.start, self.size)

    def spread(self, values: Tensor) -> Tensor:
        """Return values of the window ``(..., *size)`` on the grid of the image, zero outside."""
        margins = _margins(self.shape, self.size)
        filled = [n + sum(margin) for n, margin in zip(self.shape, margins, strict=True)]
        whole = values.new_zeros((*values.shape[: -len(self.size)], *filled))
        _part(whole, self.start, self.size)[...] = values
        return _part(whole, [low for low, _ in margins], self.shape)


def _part(values: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """A view of a part of the last axes."""
    for axis, (first, length) in enumerate(zip(start, size, strict=True), start=-len(size)):
        values = values.narrow(axis, first, length)
    return values


def _margins(shape: Sequence[int], size: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after each axis, as MONAI's sliding window adds them."""
    missing = [max(0, s - n) for n, s in zip(shape, size, strict=True)]
    return [(m // 2, m - m // 2) for m in missing]
