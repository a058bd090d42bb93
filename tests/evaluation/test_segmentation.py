from __future__ import annotations

import json
import math

import nibabel as nib
import numpy as np
import pytest

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.segmentation import (
    Evaluation,
    Labels,
    Score,
    evaluate_files,
    evaluate_folder,
    read_label_map,
    read_labels,
    score_case,
)

STRUCTURES = {"left": (1,), "right": (2,)}
SHAPE = (24, 20, 16)


def _cube(start=(6, 6, 5), size=6, label=1):
    volume = np.zeros(SHAPE, np.uint8)
    volume[tuple(slice(s, s + size) for s in start)] = label
    return volume


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.5, 3.0)], ids=["isotropic", "anisotropic"])
def test_equal_masks_score_perfectly(spacing):
    assert score_case(_cube(), _cube(), STRUCTURES, spacing)["left"] == Score(1.0, 0.0, 1.0)


@pytest.mark.parametrize(("axis", "shift_mm"), [(0, 0.5), (1, 0.8), (2, 3.0)], ids=["x", "y", "z"])
def test_shift_by_one_voxel_is_measured_in_mm_along_its_axis(axis, shift_mm):
    start = [6, 6, 5]
    start[axis] += 1
    score = score_case(_cube(start), _cube(), STRUCTURES, (0.5, 0.8, 3.0), tolerance_mm=1.0)["left"]
    assert score.dice == pytest.approx(5 / 6)
    assert score.hd95_mm == pytest.approx(shift_mm, rel=1e-5)
    assert score.surface_dice == pytest.approx(1.0) if shift_mm <= 1.0 else score.surface_dice < 0.9


def test_surface_dice_follows_its_tolerance():
    wide, narrow = (
        score_case(_cube((8, 6, 5)), _cube(), STRUCTURES, (1.0, 1.0, 1.0), tolerance_mm=t)["left"].surface_dice
        for t in (2.5, 0.5)
    )
    assert wide == pytest.approx(1.0) and narrow < 0.8


def test_structures_are_scored_apart():
    prediction = _cube() + _cube((15, 6, 5), label=2)
    reference = _cube() + _cube((16, 6, 5), label=2)
    scores = score_case(prediction, reference, STRUCTURES, (1.0, 1.0, 1.0))
    assert scores["left"].dice == 1.0 and scores["right"].dice == pytest.approx(5 / 6)


def test_structure_at_the_border_of_the_volume_has_a_surface_there():
    whole = np.ones((6, 6, 6), np.uint8)
    part = whole.copy()
    part[:2] = 0
    assert score_case(part, whole, {"all": (1,)}, (1.0, 1.0, 1.0))["all"].hd95_mm == pytest.approx(2.0)


def test_empty_in_both_is_not_scored():
    assert score_case(_cube(), _cube(), STRUCTURES, (1.0, 1.0, 1.0))["right"] == Score(None, None, None)


@pytest.mark.parametrize("empty", ["prediction", "reference"])
def test_empty_in_one_is_the_worst_score(empty):
    masks = {"prediction": _cube(), "reference": _cube(), empty: np.zeros(SHAPE, np.uint8)}
    score = score_case(**masks, structures=STRUCTURES, spacing_mm=(1.0, 1.0, 2.0))["left"]
    assert score == Score(0.0, pytest.approx(math.hypot(24, 20, 32)), 0.0)


def test_means_leave_out_what_was_not_measured():
    none = Score(None, None, None)
    evaluation = Evaluation(
        STRUCTURES,
        {
            "a": {"left": Score(0.8, 1.0, 0.9), "right": none},
            "b": {"left": Score(0.4, 3.0, 0.5), "right": Score(0.2, 9.0, 0.1)},
        },
    )
    assert evaluation.mean("dice", "left") == pytest.approx(0.6)
    assert evaluation.mean("hd95_mm", "right") == 9.0
    assert evaluation.mean_dice == pytest.approx((0.6 + 0.2) / 2)
    assert evaluation.case_dice("a") == 0.8
    content = evaluation.as_dict()
    assert content["per_class"]["right"] == {
        "label": 2, "dice": 0.2, "hd95_mm": 9.0, "surface_dice": 0.1, "lowest_dice": 0.2, "num_cases": 1,
    }  # fmt: skip
    assert content["per_class"]["left"]["lowest_dice"] == 0.4
    json.dumps(content, allow_nan=False)


def test_nothing_measured_has_no_mean():
    evaluation = Evaluation(STRUCTURES, {"a": {name: Score(None, None, None) for name in STRUCTURES}})
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
    evaluation = evaluate_folder(predictions, references, Labels({"background": (0,), "left": (1,)}))
    assert evaluation.structures == {"left": (1,)}
    assert evaluation.cases["case_1"]["left"].hd95_mm == pytest.approx(2.5)


def test_missing_prediction_is_refused(folders):
    (folders[0] / "case_1.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"case_1.*missing"):
        evaluate_folder(*folders, Labels(STRUCTURES))


@pytest.mark.parametrize(
    ("shape", "affine"),
    [((24, 20, 15), [-1, 1, 2.5, 1]), (SHAPE, [1, 1, 2.5, 1])],
    ids=["other-shape", "mirrored"],
)
def test_prediction_on_another_grid_is_refused(folders, shape, affine):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.diag(affine)), folders[0] / "case_1.nii.gz")
    with pytest.raises(DatasetError, match="another grid"):
        evaluate_folder(*folders, Labels(STRUCTURES))


def test_folder_without_references_is_refused(folders):
    (folders[1] / "case_1.nii.gz").unlink()
    with pytest.raises(DatasetError, match="no reference"):
        evaluate_folder(*folders, Labels(STRUCTURES))


def test_single_slice_is_scored_as_an_image():
    # In three dimensions both faces of the slice would be surface, and a hole would be close to it.
    reference = np.zeros((30, 30, 1), np.uint8)
    reference[5:25, 5:25] = 1
    prediction = reference.copy()
    prediction[14:16, 14:16] = 0
    score = score_case(prediction, reference, {"all": (1,)}, (1.0, 1.0, 5.0))["all"]
    flat = score_case(prediction[..., 0], reference[..., 0], {"all": (1,)}, (1.0, 1.0))["all"]
    assert score == flat
    assert score.surface_dice < 1


def test_region_and_ignored_voxels(tmp_path):
    prediction, reference = _cube(), _cube(label=2)
    reference[0, 0, 0], prediction[0, 0, 0] = 3, 1
    for part, volume in (("predictions", prediction), ("references", reference)):
        (tmp_path / part).mkdir()
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / part / "a.nii.gz")
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "file_ending": ".nii.gz"})
    )
    labels = read_labels(tmp_path / "dataset.json")
    assert labels == Labels({"whole": (1, 2), "core": (2,)}, ".nii.gz", 3)
    scores = evaluate_folder(tmp_path / "predictions", tmp_path / "references", labels).cases["a"]
    assert (scores["whole"].dice, scores["core"].dice) == (1.0, 0.0)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver"}}))
    assert read_labels(tmp_path / "dataset.json").structures == {"liver": (1,)}


def test_other_formats_lie_where_they_say(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    affine = np.array([[0, -0.5, 0, 3], [0.7, 0, 0, -8], [0, 0, 2, 5], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(_cube(), affine), tmp_path / "a.nii.gz")
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")), str(tmp_path / "a.nrrd"))
    for ours, theirs in zip(read_label_map(tmp_path / "a.nrrd"), read_label_map(tmp_path / "a.nii.gz"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_files_give_intervals_by_patient_comparison_and_table(folders):
    predictions, references = folders
    root = predictions.parent
    for number in (2, 3):
        nib.save(nib.Nifti1Image(_cube(), np.diag([-1, 1, 2.5, 1])), references / f"case_{number}.nii.gz")
        nib.save(nib.Nifti1Image(_cube((6, 6, 6)), np.diag([-1, 1, 2.5, 1])), predictions / f"case_{number}.nii.gz")
    nib.save(nib.Nifti1Image(_cube(), np.diag([-1, 1, 2.5, 1])), predictions / "extra.nii.gz")
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "left": 1}}))
    (root / "p.csv").write_text("case,patient\ncase_1,p\ncase_2,p\ncase_3,q\n")
    metrics = evaluate_files(
        predictions, references, root / "out", patients=root / "p.csv", compare_with=references, num_draws=60
    )
    dice = metrics["per_structure"]["left"]["dice"]
    assert dice["value"] == pytest.approx((1 + 2 * 5 / 6) / 3)
    assert (dice["low"], dice["high"]) == (pytest.approx(5 / 6), pytest.approx((1 + 5 / 6) / 2))
    assert metrics["comparison"]["difference"]["dice"]["value"] == pytest.approx(dice["value"] - 1)
    assert metrics["predictions_without_reference"] == ["extra"]
    assert (root / "out" / "cases.csv").read_text().splitlines()[1].startswith("case_1,p,left,1,0,1")
    (root / "p.csv").write_text("case,patient\ncase_1,p\n")
    with pytest.raises(DatasetError, match="no patient for the case case_2"):
        evaluate_files(predictions, references, root / "none", patients=root / "p.csv")
    assert not (root / "none").exists()


def test_label_without_a_structure_and_unreadable_file_are_refused(folders):
    nib.save(nib.Nifti1Image(_cube(label=7), np.diag([-1, 1, 2.5, 1])), folders[0] / "case_1.nii.gz")
    with pytest.raises(DatasetError, match=r"value 7, which is none of the labels 0, 1, 2"):
        evaluate_folder(*folders, Labels(STRUCTURES))
    (folders[0] / "case_1.nii.gz").write_bytes(b"no volume")
    with pytest.raises(DatasetError, match="cannot be read as a label map"):
        evaluate_folder(*folders, Labels(STRUCTURES))
