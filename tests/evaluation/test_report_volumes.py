"""Pictures of volumes: the patient's sides are where radiologists expect them, however a volume is stored."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from monai_mamba.evaluation.report.volumes import PLANES, Grid, draw_segmentation, load_ras
from tests.phantom import MARK, SIZE, SPACING, STORED, phantom


@pytest.fixture(params=STORED)
def files(request, tmp_path):
    image, mark, affine = phantom(request.param)
    assert "".join(nib.aff2axcodes(affine)) == request.param
    for name, values in (("image", image), ("mark", mark)):
        nib.save(nib.Nifti1Image(values, affine), tmp_path / f"{name}.nii.gz")
    return tmp_path


def drawn(image, grid, mark):
    """The panels of the picture: letter at each place, and where the outline of the mark lies, from 0 to 1."""
    figure = draw_segmentation(image, grid, {"mark": mark}, {"mark": mark}, {"mark": "#00ff00"})
    panels = []
    for panel in figure.axes:
        letters = {text.get_position(): text.get_text() for text in panel.texts}
        lines = np.concatenate([path.vertices for c in panel.collections for path in c.get_paths()])
        x0, x1 = panel.get_xlim()
        y0, y1 = panel.get_ylim()
        middle = (lines.min(0) + lines.max(0)) / 2
        panels.append((letters, (middle - (x0, y0)) / (x1 - x0, y1 - y0), (x1 - x0) / (y1 - y0)))
    return panels


def test_planes_are_radiological_however_the_volume_is_stored(files):
    image, grid = load_ras(files / "image.nii.gz")
    mark, _ = load_ras(files / "mark.nii.gz")
    assert (image.shape, grid.spacing) == (SIZE, pytest.approx(SPACING))
    axial, coronal, sagittal = drawn(image, grid, mark == 1)
    right, behind, above = ((np.array(MARK) + 0.5) / SIZE).tolist()
    for (letters, place, aspect), sides, expected, axes in (
        (axial, "RLPA", (1 - right, behind), (0, 1)),
        (coronal, "RLIS", (1 - right, above), (0, 2)),
        (sagittal, "APIS", (1 - behind, above), (1, 2)),
    ):
        at = {(0.03, 0.5): sides[0], (0.97, 0.5): sides[1], (0.5, 0.04): sides[2], (0.5, 0.96): sides[3]}
        assert letters == at
        np.testing.assert_allclose(place, expected, atol=0.01)
        across, up = (SIZE[axis] * SPACING[axis] for axis in axes)
        assert aspect == pytest.approx(across / up)
    # The patient's right half is bright, and it is on the viewer's left.
    left, other = np.array_split(PLANES[0].cut(image, (5, 7, 9)), 2, axis=1)
    assert left.min() == 100 and other.max() == 0


@pytest.mark.parametrize("codes", STORED)
def test_points_turn_with_their_volume(codes):
    image, mark, affine = phantom(codes)
    grid = Grid(image.shape, affine)
    (stored,) = np.argwhere(mark)
    np.testing.assert_allclose(grid.turn_point(stored), MARK)
    (place,) = np.argwhere(PLANES[1].cut(grid.turn(mark), MARK))  # row, column
    x, y = PLANES[1].place(MARK, SIZE, SPACING)
    np.testing.assert_allclose((x, y), (place[::-1] + 0.5) * (SPACING[0], SPACING[2]))


def test_file_that_does_not_know_its_sides_is_not_turned_and_gets_no_letters(tmp_path):
    image, mark, _ = phantom("LPS")
    nib.save(nib.Nifti1Image(image, None), tmp_path / "image.nii.gz")
    values, grid = load_ras(tmp_path / "image.nii.gz")
    assert not grid.has_sides
    np.testing.assert_array_equal(values, image)
    for letters, _, _ in drawn(values, grid, mark == 1):
        assert not letters
