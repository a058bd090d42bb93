from __future__ import annotations

import pytest
import torch

from monai_mamba.networks import MedMamba
from tests.blobs import CLASSES, train_on_blobs, write_blobs
from tests.trained_bundles import make_trained


@pytest.fixture(scope="package")
def blob_network():
    torch.manual_seed(0)
    return train_on_blobs(MedMamba(in_channels=3, num_classes=2, depths=[1, 1], dims=8))


@pytest.fixture(scope="package")
def blobs(tmp_path_factory, blob_network):
    """A folder with the trained bundle `medmamba` and a data set `data` of 12 cases."""
    folder = tmp_path_factory.mktemp("blobs")
    make_trained("medmamba", folder, blob_network, classes=CLASSES, image_size=32)
    write_blobs(folder / "data", 12, seed=5)
    return folder
