"""Perturbations: what they do to images whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from monai_mamba.robustness.perturbations import (
    NUM_SEVERITIES,
    PERTURBATIONS,
    WHITE_KELVIN,
    Perturbation,
    _black_body_xyz,
    move_label_map,
    move_points,
    perturb,
)

SEVERITIES = range(1, NUM_SEVERITIES + 1)


def texture(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, shape[0], *[max(4, s // 4) for s in shape[1:]], generator=generator)
    mode = "bilinear" if len(shape) == 3 else "trilinear"
    return torch.nn.functional.interpolate(coarse, size=shape[1:], mode=mode)[0]


@pytest.mark.parametrize("name", sorted(PERTURBATIONS))
@pytest.mark.parametrize("shape", [(3, 40, 52), (1, 64, 72, 20)], ids=["2d", "3d"])
def test_severities_grow_and_are_seeded(name, shape):
    if name == "color_temperature" and len(shape) == 4:
        pytest.skip("volumes have no color")
    image, is_picture = texture(shape), len(shape) == 3
    if not is_picture:
        image = 1000 + 300 * image  # as CT or MR values are
    entry, before = PERTURBATIONS[name], image.clone()
    changed = [perturb(image, entry, severity, 7, is_picture=is_picture) for severity in SEVERITIES]
    distance = [(one - image).abs().mean().item() for one in changed]
    assert distance[0] > 0
    assert distance == sorted(distance)
    assert all(one.shape == image.shape for one in changed)
    assert torch.equal(image, before)
    assert torch.equal(changed[2], perturb(image, entry, 3, 7, is_picture=is_picture))
    if is_picture:
        assert all(0 <= one.min() and one.max() <= 1 for one in changed)
    else:
        assert all(one.min() > 500 for one in changed)  # nothing falls to zero, far below the darkest voxel
    others = [perturb(image, entry, 3, seed, is_picture=is_picture) for seed in range(8)]
    if name not in ("blur", "resolution"):
        assert any(not torch.equal(changed[2], other) for other in others)


@pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])
def test_rotation_and_translation_move_a_point_as_far_as_stated(dims):
    size = 64
    image = torch.zeros(1, *[size] * dims)
    image[(0, slice(30, 34), slice(50, 54), *([slice(20, 24)] * (dims - 2)))] = 1

    def middle(values):
        grid = np.meshgrid(*[np.arange(size)] * dims, indexing="ij")
        weight = values[0].numpy()
        return np.array([(axis * weight).sum() / weight.sum() for axis in grid])

    before = middle(image)
    turned = middle(perturb(image, PERTURBATIONS["rotation"], 5, 3, is_picture=True))
    arm, other = (point[:2] - (size - 1) / 2 for point in (before, turned))
    cosine = arm @ other / np.linalg.norm(arm) / np.linalg.norm(other)
    assert math.degrees(math.acos(cosine)) == pytest.approx(30, abs=1)
    moved = middle(perturb(image, PERTURBATIONS["translation"], 2, 3, is_picture=True))
    assert np.linalg.norm(moved - before) == pytest.approx(0.05 * size, abs=0.1)
    if dims == 3:
        assert turned[2] == pytest.approx(before[2], abs=0.01)
        assert moved[2] == pytest.approx(before[2], abs=0.01)


@pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])
@pytest.mark.parametrize("name", sorted(PERTURBATIONS))
def test_labels_and_points_move_with_their_image(name, dims):
    size = (48, 40, 30)[:dims]
    point = np.array([[20.0, 25.0, 11.0][:dims]])
    axes = np.meshgrid(*map(np.arange, size), indexing="ij")
    distance = np.sqrt(sum((axis - p) ** 2 for axis, p in zip(axes, point[0], strict=True)))
    image = torch.from_numpy(np.exp(-((distance / 6) ** 2))[None]).float()
    label = (image > 0.5).to(torch.uint8)
    entry = PERTURBATIONS[name]
    for severity in (2, 5):
        changed = perturb(image, entry, severity, 3, is_picture=True)[0].numpy()
        moved = move_label_map(label, entry, severity, 3)
        [there] = move_points(point, size, entry, severity, 3)
        if entry.motion is None:
            assert torch.equal(moved, label) and np.array_equal(there, point[0])
            continue
        assert not torch.equal(moved, label)
        for weight, tolerance in ((changed**8, 0.2), (moved[0].numpy().astype(float), 0.5)):  # voxels
            seen = [(axis * weight).sum() / weight.sum() for axis in axes]
            np.testing.assert_allclose(there, seen, atol=tolerance)
        overlap = ((changed > 0.5) & (moved[0].numpy() == 1)).sum() / (moved == 1).sum()
        assert overlap > 0.9


def test_points_that_leave_the_image_are_missing():
    corners = np.array([[0.0, 0.0], [31.0, 31.0], [15.0, 16.0]])
    moved = move_points(corners, (32, 32), PERTURBATIONS["rotation"], 5, 0)
    assert np.isnan(moved[:2]).all()
    np.testing.assert_allclose(moved[2], [15, 16], atol=0.5)


def test_channels_of_a_volume_have_their_own_range():
    one = 100 * texture((1, 20, 20, 12))
    changed = perturb(torch.cat([one, 50 * one]), PERTURBATIONS["noise"], 3, 0, is_picture=False)
    added = [(changed[0] - one[0]).std().item(), (changed[1] - 50 * one[0]).std().item()]
    assert added[1] == pytest.approx(50 * added[0], rel=0.05)


def test_direction_of_a_case_stays_over_the_severities():
    image = texture((1, 32, 32))
    signs = set()
    for seed in range(6):
        changes = [
            (perturb(image, PERTURBATIONS["brightness"], s, seed, is_picture=False) - image).mean() for s in SEVERITIES
        ]
        assert len({bool(change > 0) for change in changes}) == 1
        signs.add(bool(changes[0] > 0))
    assert signs == {True, False}


def test_color_temperature_shifts_red_against_blue_and_leaves_gray_alone():
    entry = PERTURBATIONS["color_temperature"]
    gray = texture((1, 16, 16)).repeat(3, 1, 1)
    assert torch.equal(perturb(gray, entry, 5, 0, is_picture=True), gray)
    color = torch.stack([gray[0] * 0.5 + 0.2, gray[0] * 0.5 + 0.25, gray[0] * 0.5 + 0.2])
    seen = set()
    for seed in range(6):
        changed = perturb(color, entry, 3, seed, is_picture=True)
        ratio = (changed[0].mean() / changed[2].mean()).item()
        assert ratio > 1.15 or ratio < 0.87
        seen.add(ratio > 1)
        # Luminance stays about the same: it is the color that changes.
        assert changed.mean().item() == pytest.approx(color.mean().item(), rel=0.12)
    assert seen == {True, False}
    nothing = Perturbation("none", "mired", (0, 0, 0, 0, 0), entry.apply)
    torch.testing.assert_close(perturb(color, nothing, 1, 0, is_picture=True), color, atol=2e-3, rtol=0)


def test_black_body_has_the_published_chromaticity():
    # Planckian locus: 2856 K is CIE illuminant A (0.4476, 0.4074); 6504 K (0.3135, 0.3237).
    for kelvin, published in ((2856, (0.4476, 0.4074)), (WHITE_KELVIN, (0.3135, 0.3237))):
        xyz = _black_body_xyz(kelvin)
        assert xyz[:2] / xyz.sum() == pytest.approx(published, abs=1e-3)


def test_resolution_takes_away_what_is_finer():
    checks = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    changed = perturb(checks[None].float(), PERTURBATIONS["resolution"], 5, 0, is_picture=True)
    assert changed[0, 4:-4, 4:-4].std() < 0.1


def test_gray_picture_of_three_channels_stays_gray():
    gray = texture((1, 16, 16)).repeat(3, 1, 1)
    for name, entry in PERTURBATIONS.items():
        changed = perturb(gray, entry, 4, 1, is_picture=True)
        torch.testing.assert_close(changed[0], changed[2], atol=1e-6, rtol=0, msg=name)


def test_severity_out_of_range_is_refused():
    with pytest.raises(ValueError, match="`severity` must be from 1 to 5, got 6"):
        perturb(torch.zeros(1, 8, 8), PERTURBATIONS["noise"], 6, 0, is_picture=True)
