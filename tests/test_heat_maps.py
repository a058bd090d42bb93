"""Heat maps: Gaussians, decoding, and positions through an affine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_mamba.heat_maps import decode_heat_maps, gaussian_heat_maps, voxel_to_world, world_to_voxel
from monai_mamba.training.losses import HeatMapLoss


def gaussian(center, shape=(24, 20, 28), sigma=5.0):
    grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
    distance = sum((axis - c) ** 2 for axis, c in zip(grid, center, strict=True))
    return np.exp(-distance / (2 * sigma**2))


def test_gaussians_equal_their_definition():
    centers = torch.tensor([[[3.4, 10, 20.6], [0, 19, 27]], [[-4, 5, 6], [1, 2, 3]]])
    maps = gaussian_heat_maps(centers, (24, 20, 28), sigma_vox=5.0, amplitude=255.0)
    assert maps.shape == (2, 2, 24, 20, 28)
    expected = np.stack([[255 * gaussian(c) for c in case] for case in centers.tolist()])
    np.testing.assert_allclose(maps.numpy(), expected, atol=1e-3)
    flat = gaussian_heat_maps(np.array([[2.0, 3.0]]), (6, 7), sigma_vox=(1.0, 2.0), amplitude=1.0)
    assert float(flat[0, 4, 3]) == pytest.approx(np.exp(-2))
    assert float(flat[0, 2, 5]) == pytest.approx(np.exp(-0.5))


def test_loss_leaves_out_landmarks_that_a_case_does_not_have():
    target = gaussian_heat_maps(torch.tensor([[[1.0, 1], [float("nan")] * 2]]), (4, 4), amplitude=1.0)
    assert target[0, 1].isnan().all()
    output = torch.zeros(1, 2, 4, 4, requires_grad=True)
    loss = HeatMapLoss()(output, target)
    assert loss.item() == pytest.approx(float((target[0, 0] ** 2).mean()) / 2)  # of two maps
    loss.backward()
    assert (output.grad[0, 1] == 0).all()
    assert float(HeatMapLoss()(output, torch.full_like(output, float("nan")))) == 0


def test_loss_of_all_cases_is_the_mean_over_its_shares():
    # What several processes compute: their shares have different numbers of missing landmarks.
    generator = torch.Generator().manual_seed(0)
    output, target = torch.rand(2, 4, 3, 5, 6, generator=generator)
    whole = HeatMapLoss()(output, target)
    assert whole == torch.nn.functional.mse_loss(output, target)
    target[0] = target[1, 1] = float("nan")
    parts = [HeatMapLoss()(output[part], target[part]) for part in (slice(0, 2), slice(2, 4))]
    assert parts[0] < parts[1]
    torch.testing.assert_close(torch.stack(parts).mean(), HeatMapLoss()(output, target))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"voxels": torch.zeros(2, 3), "shape": (4, 4)}, "voxels"),
        ({"voxels": torch.zeros(2, 2), "shape": (4, 4), "sigma_vox": 0}, "sigma_vox"),
        ({"voxels": torch.zeros(2, 2), "shape": (4, 4), "sigma_vox": (1, 1, 1)}, "sigma_vox"),
        ({"voxels": torch.zeros(2, 2), "shape": (4, 4), "amplitude": -1}, "amplitude"),
    ],
    ids=["dims", "zero", "sizes", "negative"],
)
def test_gaussians_refuse(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        gaussian_heat_maps(**arguments)


def test_decoding_takes_the_voxel_of_the_maximum():
    maps = np.stack([gaussian((3.4, 10, 20.6)), gaussian((0, 19, 27))])
    np.testing.assert_array_equal(decode_heat_maps(maps), [[3, 10, 21], [0, 19, 27]])


@pytest.mark.parametrize("center", [(11.3, 9.75, 14.5), (12, 8, 13)], ids=["between", "on"])
def test_sub_voxel_decoding_comes_closer(center):
    maps = gaussian(center, sigma=2.0)[None]
    coarse = np.linalg.norm(decode_heat_maps(maps)[0] - center)
    fine = np.linalg.norm(decode_heat_maps(maps, window=5)[0] - center)
    assert fine <= max(coarse / 3, 1e-9)


def test_sub_voxel_decoding_stays_at_the_border_and_on_flat_maps():
    np.testing.assert_allclose(decode_heat_maps(gaussian((0, 5, 27))[None], window=3)[0], [0, 5, 27], atol=0.01)
    np.testing.assert_array_equal(decode_heat_maps(np.zeros((1, 4, 4, 4)), window=2), [[0, 0, 0]])


@pytest.mark.parametrize("maps", [np.zeros(3), np.full((1, 2, 2, 2), np.nan)], ids=["shape", "nan"])
def test_decoding_refuses(maps):
    with pytest.raises(ValueError, match="`heat_maps`"):
        decode_heat_maps(maps)


def test_world_coordinates_follow_an_oblique_affine():
    nib = pytest.importorskip("nibabel")
    generator = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * [0.5, 0.7, 3.0]
    affine[:3, 3] = [-30, 12, 99]
    voxels = generator.uniform(0, 50, (2, 6, 3))
    np.testing.assert_allclose(voxel_to_world(voxels, affine), nib.affines.apply_affine(affine, voxels))
    np.testing.assert_allclose(world_to_voxel(voxel_to_world(voxels, affine), affine), voxels, atol=1e-10)
