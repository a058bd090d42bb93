from __future__ import annotations

import random

import numpy as np
import torch

from monai_mamba.cli.nnunet import _seed_everything


def _draw():
    return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002 - what nnU-Net draws from


def test_seed_fixes_the_three_generators_that_nnunet_draws_from():
    _seed_everything(3)
    first = _draw()
    assert all(a != b for a, b in zip(first, _draw(), strict=True))
    _seed_everything(3)
    assert _draw() == first
    _seed_everything(4)
    assert all(a != b for a, b in zip(first, _draw(), strict=True))
