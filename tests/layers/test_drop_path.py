"""Stochastic depth inside MONAI's engines."""

from __future__ import annotations

import pytest
import torch

from monai_mamba.layers.drop_path import DropPath


@pytest.mark.parametrize("ndim", [2, 4])
def test_meta_tensor_of_monai_is_accepted_in_training(ndim):
    # MetaTensor.new_empty takes the size as one argument only.
    data = pytest.importorskip("monai.data")
    x = data.MetaTensor(torch.ones(64, *(2,) * (ndim - 1)))
    y = DropPath(0.5).train()(x)
    samples = y.as_tensor().flatten(1)
    assert set(samples[:, 0].tolist()) == {0.0, 2.0}
    assert (samples == samples[:, :1]).all()
