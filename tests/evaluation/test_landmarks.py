"""Landmarks: decoding, distances through an affine, means and rates."""

from __future__ import annotations

import numpy as np
import pytest

from monai_mamba.evaluation.landmarks import decode_heat_maps, evaluate_landmarks, radial_errors, voxel_to_world


def gaussian(center, shape=(24, 20, 28), sigma=5.0):
    grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
    distance = sum((axis - c) ** 2 for axis, c in zip(grid, center, strict=True))
    return np.exp(-distance / (2 * sigma**2))


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
    # One voxel along the last axis is 3 mm, whatever the rotation.
    step = radial_errors(voxel_to_world(voxels + np.array([0, 0, 1]), affine), voxel_to_world(voxels, affine))
    np.testing.assert_allclose(step, 3.0)


def test_figures_by_hand():
    errors = np.array([[1.0, 3.0], [2.0, np.nan], [3.0, 5.0]])
    result = evaluate_landmarks(errors, ["a", "b"], ["p", "q", "r"], radii_mm=(2, 4), num_draws=100)
    assert result["mre_mm_a"].value == 2
    assert result["mre_mm_b"].value == 4
    assert result["mre_mm"].value == 3
    assert result["sdr_2mm"].value == pytest.approx(2 / 5)
    assert result["sdr_4mm"].value == pytest.approx(4 / 5)
    assert result["mre_mm_a"].low < 2 < result["mre_mm_a"].high
    assert result["mre_mm_b"].draws < 100  # draws of the second case alone cannot measure it


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)], ids=["names", "patients"])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="`errors_mm`"):
        evaluate_landmarks(np.zeros(shape), ["a", "b"], ["p", "q"])
