"""Activation maps: against their definition, and on a task where the right place is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_mamba.explain.cams import ActivationMaps, enlarge, map_layers, normalized
from monai_mamba.networks import (
    MedMamba,
    MedMambaSeg,
    NNMambaClassifier,
    NNMambaLandmark,
    NNMambaSeg,
    VMambaSeg,
    XFMamba,
    XFMambaSeg,
)
from tests.blobs import SIZE, draw_blobs

NETWORKS = {
    "medmamba": (lambda: MedMamba(in_channels=3, num_classes=3, depths=[1, 1], dims=8), (3, 40, 56)),
    "xfmamba": (lambda: XFMamba(num_classes=3, depths=[1, 1], dims=16), (6, 48, 64)),
    "nnmamba": (
        lambda: NNMambaClassifier(spatial_dims=3, in_channels=1, num_classes=3, init_filters=4, num_blocks=1),
        (1, 32, 48, 40),
    ),
}


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_map_equals_the_definition(name):
    make, shape = NETWORKS[name]
    network, image = make().eval(), torch.randn(shape)
    explainer = ActivationMaps(network, image)
    maps = explainer(image, 2)
    assert maps.shape == (2 if name == "xfmamba" else 1, *shape[1:])

    kept = {}
    module = dict(network.named_modules())[map_layers(network)[explainer.layer]]
    handle = module.register_forward_hook(lambda _module, _inputs, output: kept.update(map=output))
    logits = network(image[None])
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 2], kept["map"])
    weights = gradient.flatten(2).mean(2)
    coarse = torch.einsum("bc,bc...->b...", weights, kept["map"]).relu()[:, None]
    torch.testing.assert_close(maps, normalized(enlarge(coarse.detach(), shape[1:])), atol=1e-5, rtol=1e-4)
    assert 0 <= maps.min() <= maps.max() <= 1


SMALL_2D = {"depths": [1, 1, 1, 1], "dims": 16, "detail_filters": 4}
#: Network, size of an image that it pads, layer, factor from the layer's map to the padded image.
DENSE = {
    "nnmamba-3d": (
        lambda: NNMambaSeg(out_channels=3, init_filters=16, num_blocks=2, head="conv1x1"),
        (1, 20, 20, 33), "stage2", 8,
    ),
    "nnmamba-2d": (
        lambda: NNMambaSeg(spatial_dims=2, out_channels=3, init_filters=16, num_blocks=1, head="conv1x1"),
        (1, 70, 90), "stage3", 16,
    ),
    "landmarks-2d": (
        lambda: NNMambaLandmark(spatial_dims=2, num_landmarks=3, init_filters=16, num_blocks=1, head="conv1x1"),
        (1, 70, 90), "stage3", 16,
    ),
    "medmamba-2d": (lambda: MedMambaSeg(out_channels=3, **SMALL_2D), (1, 70, 90), "stage3", 16),
    "vmamba-2d": (lambda: VMambaSeg(out_channels=3, **SMALL_2D), (1, 70, 90), "stage3", 16),
    "xfmamba-2d": (lambda: XFMambaSeg(out_channels=3, **SMALL_2D), (2, 70, 90), "stage3", 16),
    "decoder": (lambda: MedMambaSeg(out_channels=3, **SMALL_2D), (1, 70, 90), "decoder", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DENSE))
def test_map_of_a_region_equals_the_definition(name):
    """Seg-Grad-CAM: the gradient of the sum of a class's logits over the region."""
    make, shape, layer, factor = DENSE[name]
    torch.manual_seed(0)
    network, image = make().eval(), torch.randn(shape)
    explainer = ActivationMaps(network, image, layer="decoder" if layer == "decoder" else None)
    assert explainer.layer == layer
    region = torch.zeros(shape[1:], dtype=torch.bool)
    region[tuple(slice(2, size // 2) for size in shape[1:])] = True
    kept = {}
    module = dict(network.named_modules())[map_layers(network)[layer]]
    handle = module.register_forward_hook(lambda _module, _inputs, output: kept.update(map=output))
    logits = network(image[None])
    handle.remove()
    padded = [size * factor for size in kept["map"].shape[2:]]
    assert all(fit >= size for fit, size in zip(padded, shape[1:], strict=True)) and padded != list(shape[1:])
    is_empty = []
    for index in range(3):
        (gradient,) = torch.autograd.grad(logits[0, index][region].sum(), kept["map"], retain_graph=True)
        coarse = torch.einsum("bc,bc...->b...", gradient.flatten(2).mean(2), kept["map"]).relu()[:, None].detach()
        expected = normalized(enlarge(coarse, padded)[(slice(None), *map(slice, shape[1:]))])
        maps = explainer(image, index, region)
        assert len(maps) == (2 if name == "xfmamba-2d" else 1)
        torch.testing.assert_close(maps, expected, atol=1e-4, rtol=1e-3)
        is_empty.append(maps.max() == 0)
        if not is_empty[-1] and layer != "decoder":  # one convolution of size 1 has the same gradient everywhere
            assert not torch.allclose(explainer(image, index), maps, atol=1e-3)  # all voxels instead
    assert not all(is_empty)


def test_region_must_mark_voxels_of_the_image():
    network = NNMambaSeg(spatial_dims=2, out_channels=2, init_filters=16, num_blocks=1).eval()
    image = torch.randn(1, 64, 64)
    explainer = ActivationMaps(network, image)
    for region in (torch.zeros(64, 64, dtype=torch.bool), torch.ones(32, 64, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"`region` must mark voxels of the image of \(64, 64\), got a mask of"):
            explainer(image, 1, region)


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_map_points_at_the_blob(blob_network, method):
    images, label, center = draw_blobs(24, seed=3)
    inputs = torch.from_numpy(images).float()[:, None].repeat(1, 3, 1, 1) * 2 - 1
    explainer = ActivationMaps(blob_network, inputs[0], method)
    distance = []
    for index in np.flatnonzero(label):
        weight = explainer(inputs[index], 1)[0].numpy()
        middle = [(weight.sum(1 - axis) * np.arange(SIZE)).sum() / weight.sum() for axis in range(2)]
        distance.append(np.linalg.norm(middle - center[index]))
    chance = np.linalg.norm(center[label == 1] - SIZE / 2, axis=1).mean()
    assert np.mean(distance) < 0.75 * chance


def test_gradcam_plus_plus_of_a_very_sure_network_is_finite(blob_network):
    images, _, _ = draw_blobs(2, seed=3)
    inputs = torch.from_numpy(images).float()[:, None].repeat(1, 3, 1, 1) * 2 - 1
    network = MedMamba(in_channels=3, num_classes=2, depths=[1, 1], dims=8).eval()
    network.load_state_dict(blob_network.state_dict())
    with torch.no_grad():
        network.head.weight.mul_(1e3)
        assert network(inputs).abs().max() > 100  # exp() of it is infinite in float32
    maps = ActivationMaps(network, inputs[0], "gradcam++")(inputs[1], 1)
    assert torch.isfinite(maps).all()
    assert maps.max() == 1


def test_single_logit_explains_both_classes():
    network = NNMambaClassifier(spatial_dims=2, in_channels=1, num_classes=1, init_filters=4, num_blocks=1).eval()
    image = torch.randn(1, 64, 64)
    explainer = ActivationMaps(network, image)
    first, second = explainer(image, 0), explainer(image, 1)
    assert not torch.equal(first, second)
    # What speaks for one class speaks against the other.
    assert np.corrcoef(first.flatten(), second.flatten())[0, 1] < 0


def test_layer_is_the_deepest_that_is_fine_enough():
    network = MedMamba(in_channels=3, num_classes=2, depths=[1, 1, 1], dims=8).eval()
    assert ActivationMaps(network, torch.randn(3, 64, 64)).layer == "stage3"
    assert ActivationMaps(network, torch.randn(3, 32, 32)).layer == "stage2"
    assert ActivationMaps(network, torch.randn(3, 64, 64), layer="stage1").map_size == (16, 16)


def test_network_that_is_explained_stays_as_it_is(blob_network):
    image = torch.randn(3, SIZE, SIZE)
    ActivationMaps(blob_network, image)(image, 1)
    assert not any(module._forward_hooks or module._backward_hooks for module in blob_network.modules())
    blob_network.zero_grad()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"method": "magic"}, "`method`"), ({"layer": "stage9"}, "`layer` must be one of stage1")],
    ids=["method", "layer"],
)
def test_unknown_names_are_refused(blob_network, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        ActivationMaps(blob_network, torch.zeros(3, SIZE, SIZE), **arguments)


def test_too_small_image_is_refused(blob_network):
    with pytest.raises(ValueError, match="too small for a map of 4 pixels"):
        ActivationMaps(blob_network, torch.zeros(3, 12, 12))
