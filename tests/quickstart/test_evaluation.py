from __future__ import annotations

import json
import math

import nibabel as nib
import numpy as np
import pytest

from monai_mamba.errors import DatasetError
from monai_mamba.quickstart.evaluation import Evaluation, Score, evaluate_folder, score_case

LABELS = {1: "left", 2: "right"}
SHAPE = (24, 20, 16)


def _cube(start=(6, 6, 5), size=6, label=1):
    volume = np.zeros(SHAPE, np.uint8)
    volume[tuple(slice(s, s + size) for s in start)] = label
    return volume


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.5, 3.0)], ids=["isotropic", "anisotropic"])
def test_equal_masks_score_perfectly(spacing):
    assert score_case(_cube(), _cube(), LABELS, spacing)[1] == Score(1.0, 0.0, 1.0)


@pytest.mark.parametrize(("axis", "shift_mm"), [(0, 0.5), (1, 0.8), (2, 3.0)], ids=["x", "y", "z"])
def test_shift_by_one_voxel_is_measured_in_mm_along_its_axis(axis, shift_mm):
    start = [6, 6, 5]
    start[axis] += 1
    score = score_case(_cube(start), _cube(), LABELS, (0.5, 0.8, 3.0), tolerance_mm=1.0)[1]
    assert score.dice == pytest.approx(5 / 6)
    assert score.hd95_mm == pytest.approx(shift_mm, rel=1e-5)
    assert score.surface_dice == pytest.approx(1.0) if shift_mm <= 1.0 else score.surface_dice < 0.9


def test_surface_dice_follows_its_tolerance():
    wide, narrow = (
        score_case(_cube((8, 6, 5)), _cube(), LABELS, (1.0, 1.0, 1.0), tolerance_mm=t)[1].surface_dice
        for t in (2.5, 0.5)
    )
    assert wide == pytest.approx(1.0) and narrow < 0.8


def test_structures_are_scored_apart():
    prediction = _cube() + _cube((15, 6, 5), label=2)
    reference = _cube() + _cube((16, 6, 5), label=2)
    scores = score_case(prediction, reference, LABELS, (1.0, 1.0, 1.0))
    assert scores[1].dice == 1.0 and scores[2].dice == pytest.approx(5 / 6)


def test_structure_at_the_border_of_the_volume_has_a_surface_there():
    whole = np.ones((6, 6, 6), np.uint8)
    part = whole.copy()
    part[:2] = 0
    assert score_case(part, whole, {1: "all"}, (1.0, 1.0, 1.0))[1].hd95_mm == pytest.approx(2.0)


def test_empty_in_both_is_not_scored():
    assert score_case(_cube(), _cube(), LABELS, (1.0, 1.0, 1.0))[2] == Score(None, None, None)


@pytest.mark.parametrize("empty", ["prediction", "reference"])
def test_empty_in_one_is_the_worst_score(empty):
    masks = {"prediction": _cube(), "reference": _cube(), empty: np.zeros(SHAPE, np.uint8)}
    score = score_case(**masks, labels=LABELS, spacing_mm=(1.0, 1.0, 2.0))[1]
    assert score == Score(0.0, pytest.approx(math.hypot(24, 20, 32)), 0.0)


def test_means_leave_out_what_was_not_measured():
    none = Score(None, None, None)
    evaluation = Evaluation(
        LABELS, {"a": {1: Score(0.8, 1.0, 0.9), 2: none}, "b": {1: Score(0.4, 3.0, 0.5), 2: Score(0.2, 9.0, 0.1)}}
    )
    assert evaluation.mean("dice", 1) == pytest.approx(0.6)
    assert evaluation.mean("hd95_mm", 2) == 9.0
    assert evaluation.mean_dice == pytest.approx((0.6 + 0.2) / 2)
    assert evaluation.case_dice("a") == 0.8
    content = evaluation.as_dict()
    assert content["per_class"]["right"] == {
        "label": 2, "dice": 0.2, "hd95_mm": 9.0, "surface_dice": 0.1, "lowest_dice": 0.2, "num_cases": 1,
    }  # fmt: skip
    assert content["per_class"]["left"]["lowest_dice"] == 0.4
    json.dumps(content, allow_nan=False)


def test_nothing_measured_has_no_mean():
    evaluation = Evaluation(LABELS, {"a": {label: Score(None, None, None) for label in LABELS}})
    assert evaluation.mean_dice is None and evaluation.case_dice("a") is None


@pytest.fixture
def folders(tmp_path):
    for part in ("predictions", "references"):
        (tmp_path / part).mkdir()
        nib.save(nib.Nifti1Image(_cube(), np.diag([-1, 1, 2.5, 1])), tmp_path / part / "case_1.nii.gz")
    return tmp_path / "predictions", tmp_path / "references"


def test_folder_is_scored_with_the_spacing_of_its_images(folders):
    predictions, references = folders
    nib.save(nib.Nifti1Image(_cube((6, 6, 6)), np.diag([-1, 1, 2.5, 1])), predictions / "case_1.nii.gz")
    evaluation = evaluate_folder(predictions, references, {0: "background", 1: "left"})
    assert evaluation.labels == {1: "left"}
    assert evaluation.cases["case_1"][1].hd95_mm == pytest.approx(2.5)


def test_missing_prediction_is_refused(folders):
    (folders[0] / "case_1.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"case_1.*missing"):
        evaluate_folder(*folders, LABELS)


@pytest.mark.parametrize(
    ("shape", "affine"),
    [((24, 20, 15), [-1, 1, 2.5, 1]), (SHAPE, [1, 1, 2.5, 1])],
    ids=["other-shape", "mirrored"],
)
def test_prediction_on_another_grid_is_refused(folders, shape, affine):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.diag(affine)), folders[0] / "case_1.nii.gz")
    with pytest.raises(DatasetError, match="another grid"):
        evaluate_folder(*folders, LABELS)


def test_folder_without_references_is_refused(folders):
    (folders[1] / "case_1.nii.gz").unlink()
    with pytest.raises(DatasetError, match="no reference"):
        evaluate_folder(*folders, LABELS)
