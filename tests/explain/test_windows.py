"""The part of an image that is explained: as much as possible of what was found, as a sliding window sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer

from monai_mamba.explain.windows import Window
from monai_mamba.training.inferers import FlipInferer, window_size


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (9, 20)], ids=["even", "odd", "larger-than-the-image"])
def test_window_holds_the_most_of_what_was_found(size):
    generator = np.random.default_rng(0)
    for _ in range(5):
        weight = (generator.random((19, 13)) > 0.9).astype(float)
        window = Window.around(weight, size)
        values = torch.from_numpy(weight)
        held = window.cut(values).sum().item()
        rows, columns = (max(1, n - s + 1) for n, s in zip(weight.shape, size, strict=True))
        best = max(weight[i : i + size[0], j : j + size[1]].sum() for i in range(rows) for j in range(columns))
        assert window.cut(values).shape == size
        assert held == best
        back = window.spread(window.cut(values))
        assert back.shape == values.shape and back.sum() == held
        assert torch.equal(back[back > 0], values[back > 0])


def test_window_is_centered_where_several_hold_the_same():
    weight = np.zeros((40, 40), bool)
    weight[20, 11] = True
    window = Window.around(weight, (9, 9))
    first, last = window.limits
    assert ((first + last) / 2).tolist() == [20, 11]
    corner = np.zeros((40, 40), bool)
    corner[0, 39] = True
    assert Window.around(corner, (9, 9)).limits[0].tolist() == [0, 31]


def test_window_larger_than_the_image_is_filled_as_by_a_sliding_window():
    image = torch.randn(1, 1, 5, 9)
    seen = []

    def network(x):
        seen.append(x)
        return x

    SlidingWindowInferer(roi_size=(8, 12), sw_batch_size=1)(image, network)
    window = Window.around(np.ones((5, 9)), (8, 12))
    assert window.limits is None
    assert torch.equal(window.cut(image[0]), seen[0][0])
    assert torch.equal(window.spread(window.cut(image[0])), image[0])


def test_window_size_is_that_of_the_inferer():
    sliding = SlidingWindowInferer(roi_size=(16, -1, 8), sw_batch_size=1)
    assert window_size(FlipInferer(sliding, [0], dense=True), (40, 50, 60)) == (16, 50, 8)
    assert window_size(SimpleInferer(), (40, 50)) == window_size(None, (40, 50)) == (40, 50)
