"""Every network can learn eight random images by heart: gradients reach what they must, and nothing saturates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_mamba.networks import create_model

pytestmark = pytest.mark.slow

SMALL = {"depths": (1, 1, 1, 1), "dims": 16, "drop_path_rate": 0.0}
CLASSIFIERS = {
    "medmamba_t": (SMALL, (3, 32, 32)),
    "vmamba_t": (SMALL, (3, 32, 32)),
    "vmamba_v0_t": (SMALL, (3, 32, 32)),
    "xfmamba_t": (SMALL, (6, 32, 32)),
    "nnmamba_cls": ({"init_filters": 16, "num_blocks": 2, "dropout_rate": 0.0}, (1, 32, 16, 16)),
    "nnmamba_cls_sequential": ({"init_filters": 16, "num_blocks": 2, "dropout_rate": 0.0}, (1, 32, 16, 16)),
}


def groups(network):
    exempt = network.no_weight_decay()
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name not in exempt], "weight_decay": 0.01},
        {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
    ]


def learn(network, x, loss_of, steps=40):
    optimizer = torch.optim.AdamW(groups(network), lr=3e-3)
    first = None
    for _ in range(steps):
        loss = loss_of(network(x))
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first, loss.item()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_learns_eight_images_by_heart(name):
    arguments, shape = CLASSIFIERS[name]
    torch.manual_seed(0)
    network = create_model(name, num_classes=3, **arguments).train()
    x, y = torch.randn(8, *shape), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    first, last = learn(network, x, lambda logits: F.cross_entropy(logits, y))
    assert last < 0.1 * first


@pytest.mark.parametrize("name", ["medmamba_t_seg", "vmamba_t_seg", "xfmamba_t_seg"])
def test_segmentation_learns_a_disk(name):
    torch.manual_seed(0)
    network = create_model(name, in_channels=2, out_channels=2, detail_filters=8, **SMALL).train()
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    label = ((rows - 12) ** 2 + (columns - 18) ** 2 < 49).long().expand(4, 32, 32)
    x = torch.randn(4, 2, 32, 32) + label[:, None]
    first, last = learn(network, x, lambda logits: F.cross_entropy(logits, label), steps=100)
    assert last < 0.25 * first
