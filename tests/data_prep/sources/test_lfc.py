"""LFC: six Slicer lines per case, coordinate systems, directions, and what is wrong with single cases."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from data_prep.check import check_data_set
from data_prep.errors import UsageError
from data_prep.sources.lfc import MEASURES, Lfc
from tests.data_prep.factories import (
    convert_tree,
    report_lines,
    write_bytes,
    write_csv,
    write_json,
    write_nifti_volume,
)
from tests.data_prep.markup_factories import line_markup, write_lines

SHAPE = (24, 20, 16)
#: oblique, left-handed, with voxels of unequal sides: a reader that ignores the direction is far off
TURN = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
AFFINE = np.eye(4)
AFFINE[:3, :3] = TURN * [0.6, -0.7, 0.8]
AFFINE[:3, 3] = [30, -12, 7]
VOXELS = np.random.default_rng(6).uniform([1, 1, 1], np.array(SHAPE) - 2, (12, 3))
WORLD = VOXELS @ AFFINE[:3, :3].T + AFFINE[:3, 3]
LINES = [WORLD[2 * n : 2 * n + 2].tolist() for n in range(6)]


def lfc_tree(root, system="LPS", only=None):
    """Three parts with padded and plain ids, the table of ages, and litter; numbers of files run from 7 to 12."""
    for mode, ids in {"train": (1, 2, 3), "valid": (121,), "test": (181,), "feta21": (1,)}.items():
        if only is not None and mode != only:
            continue
        for number in ids:
            write_nifti_volume(root / mode / f"{number:03d}.nii.gz", SHAPE, number + 1000 * (mode == "feta21"), AFFINE)
            write_lines(root / f"{mode}_label" / str(number), LINES, system, first=7)
    rows = [[1, 24.1, "train"], [2, 30, "train"], [3, 31, "train"], [121, 22, "val"], [181, 35.5, "test"]]
    write_csv(root / "gestational_age_samples.csv", [["Sample_ID", "Gestational_Age_Weeks", "Split"], *rows])
    write_bytes(root / "train/._001.nii.gz")
    write_bytes(root / "train_label/1/._line_7.mrk.json")
    return root


def entries(out):
    content = json.loads((out / "datalist.json").read_text())
    return {e["case"]: e for part in ("training", "validation", "test") for e in content.get(part, [])}, content


@pytest.mark.parametrize("system", ["LPS", "RAS"])
def test_lfc_points_are_where_they_were_drawn(tmp_path, system):
    out = tmp_path / "out"
    assert convert_tree(Lfc(points="all"), lfc_tree(tmp_path / "in", system), out) == 0
    found, content = entries(out)
    assert content["landmark_names"] == [f"{m}{e}" for m in MEASURES for e in (1, 2)]
    assert sorted(found) == ["001", "002", "003", "121", "181", "feta21_001"]
    for entry in found.values():
        np.testing.assert_allclose(entry["landmarks"], WORLD, atol=1e-6)
        np.testing.assert_allclose(entry["landmarks_voxel"], VOXELS, atol=1e-4)
        # An independent reader of the file that was written puts the voxels at the world points.
        affine = nib.load(out / entry["image"]).affine
        np.testing.assert_allclose(nib.affines.apply_affine(affine, entry["landmarks_voxel"]), WORLD, atol=1e-3)
    assert check_data_set(out).problems == []


def test_lfc_cerebellum_is_tcd_hdv_adv_in_that_order_and_parts_stay(tmp_path):
    out = tmp_path / "out"
    convert_tree(Lfc(), lfc_tree(tmp_path / "in"), out)
    found, content = entries(out)
    assert content["landmark_names"] == ["TCD1", "TCD2", "HDV1", "HDV2", "ADV1", "ADV2"]
    np.testing.assert_allclose(found["001"]["landmarks"], WORLD[[4, 5, 8, 9, 10, 11]], atol=1e-6)
    assert [len(content[part]) for part in ("training", "validation", "test")] == [3, 1, 2]
    table = (out / "cases.csv").read_text()
    assert "24.1" in table


def test_lfc_nnunet_labels_are_balls_around_the_points(tmp_path):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    out = tmp_path / "Dataset020_LFC"
    assert convert_tree(Lfc(radius=1.5), lfc_tree(tmp_path / "in"), out, format="nnunet") == 0
    verify_dataset_integrity(str(out), num_processes=1)
    labels = nib.load(out / "labelsTr/001.nii.gz")
    data = np.asanyarray(labels.dataobj)
    listed = json.loads((out / "landmarks.json").read_text())
    assert listed["landmark_names"] == list(json.loads((out / "dataset.json").read_text())["labels"])[1:]
    world = np.array(listed["cases"]["001"]["landmarks"])
    places = nib.affines.apply_affine(labels.affine, np.argwhere(data > 0))
    distances = np.linalg.norm(places[:, None] - world, axis=-1)
    values = data[data > 0]
    assert (distances[np.arange(len(values)), values - 1] <= 1.5 + 1e-3).all()
    assert (values - 1 == distances.argmin(axis=1)).all()
    everywhere = nib.affines.apply_affine(labels.affine, np.argwhere(data == 0))
    assert np.linalg.norm(everywhere[:, None] - world, axis=-1).min() > 1.5 - 1e-3
    assert check_data_set(out).problems == []
    listed["cases"]["001"]["landmarks"][0][0] *= -1
    write_json(out / "landmarks.json", listed)
    assert check_data_set(out).problems == ["landmarks: 001: are not those of the manifest"]


def test_lfc_is_what_bundles_and_trainers_read(tmp_path):
    from monai_mamba.nnunet.annotations import landmark_names as trained_names
    from monai_mamba.nnunet.annotations import read_landmarks
    from monai_mamba.training.datalist import landmark_names, load_cases

    root, wanted = lfc_tree(tmp_path / "in", only="train"), WORLD[[4, 5, 8, 9, 10, 11]]
    (root / "gestational_age_samples.csv").unlink()
    assert convert_tree(Lfc(), root, tmp_path / "monai") == 0
    assert landmark_names(tmp_path / "monai") == ["TCD1", "TCD2", "HDV1", "HDV2", "ADV1", "ADV2"]
    for case in load_cases(tmp_path / "monai", "training"):
        np.testing.assert_allclose(case["landmarks"], wanted, atol=1e-6)
    out = tmp_path / "Dataset020_LFC"
    assert convert_tree(Lfc(), root, out, format="nnunet") == 0
    names = trained_names(json.loads((out / "dataset.json").read_text()))
    for points in read_landmarks([out], names, ["001", "002", "003"], lambda case: None).values():
        np.testing.assert_allclose(points, wanted, atol=1e-6)


def _replace(name, content):
    return lambda root: write_json(root / f"train_label/1/{name}", content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda root: (root / "train_label/1/line_9.mrk.json").unlink(), "wrong-number-of-files"),
        (_replace("line_13.mrk.json", line_markup(LINES[0])), "wrong-number-of-files"),
        (lambda root: (root / "train_label/1/line_9.mrk.json").rename(root / "train_label/1/line_007.json"),
         "same-number"),
        (lambda root: (root / "train_label/1/line_9.mrk.json").rename(root / "train_label/1/tcd.json"), "no-number"),
        (lambda root: (root / "train_label/1/line_9.mrk.json").write_text('{"markups": [{'), "damaged-markups"),
        (_replace("line_9.mrk.json", {"markups": []}), "damaged-markups"),
        (_replace("line_9.mrk.json", []), "damaged-markups"),
        (_replace("line_9.mrk.json", line_markup(LINES[2], None)), "no-coordinate-system"),
        (_replace("line_9.mrk.json", line_markup(LINES[2], coordinateSystem="XYZ")), "unknown-coordinates"),
        (_replace("line_9.mrk.json", line_markup(LINES[2], coordinateUnits="cm")), "unknown-unit"),
        (_replace("line_9.mrk.json", line_markup(LINES[2][:1])), "missing-landmark"),
        (_replace("line_9.mrk.json", line_markup(LINES[2], controlPoints=[
            {"position": [0, 0, 0], "positionStatus": "undefined"}, {"position": [1, 1, 1]}])), "missing-landmark"),
        (_replace("line_9.mrk.json", line_markup([[900, 0, 0], [910, 0, 0]])), "landmark-outside-image"),
        (_replace("line_9.mrk.json", line_markup(LINES[2], measurements=[{"name": "length", "value": 99.0}])),
         "length-differs"),
        (lambda root: (root / "train/001.nii.gz").unlink(), "missing-image"),
        (lambda root: (root / "train/001.nii.gz").write_bytes(b"cut"), "damaged-data"),
        (lambda root: write_nifti_volume(root / "train/1.nii", SHAPE, 0, AFFINE), "ambiguous-image"),
    ],
    ids=["five files", "seven files", "number twice", "no number", "truncated", "no node", "list", "no system",
         "system unknown", "cm", "one point", "not placed", "outside", "length", "no image", "damaged image",
         "two images"],
)  # fmt: skip
def test_lfc_case_with_a_fault_is_refused_by_name_and_costs_no_other(tmp_path, damage, reason):
    root = lfc_tree(tmp_path / "in", only="train")
    rows = [["Sample_ID", "Gestational_Age_Weeks", "Split"], [1, 24.1, "train"], [2, 30, "train"]]
    write_csv(root / "gestational_age_samples.csv", rows)
    damage(root)
    assert convert_tree(Lfc(), root, tmp_path / "out") == 3
    lines = report_lines(tmp_path / "out")
    of_case = {v for (_, path, item), v in lines.items() if path.startswith("train_label/1/") and "._" not in path}
    assert of_case == {("failed", reason)}
    assert lines["row", "gestational_age_samples.csv", "1"] == ("failed", reason)
    assert lines["file", "train_label/2/line_7.mrk.json", ""] == ("ok", "")
    assert lines["file", "train_label/1/._line_7.mrk.json", ""] == ("skipped", "junk")
    assert "001" not in entries(tmp_path / "out")[0]


def test_lfc_files_without_a_system_are_read_in_the_one_the_user_names(tmp_path):
    root = lfc_tree(tmp_path / "in", None)
    assert convert_tree(Lfc(), root, tmp_path / "refused") == 3
    assert convert_tree(Lfc(coordinates="lps"), root, tmp_path / "out") == 0
    np.testing.assert_allclose(entries(tmp_path / "out")[0]["001"]["landmarks"][0], WORLD[4], atol=1e-6)


def test_lfc_row_without_image_fails_and_wrong_folder_is_one_error(tmp_path):
    root = lfc_tree(tmp_path / "in")
    rows = [["Sample_ID", "Gestational_Age_Weeks", "Split"], [1, 24, "train"], [300, 24, "test"], [1, 3, "nowhere"]]
    write_csv(root / "gestational_age_samples.csv", rows)
    assert convert_tree(Lfc(), root, tmp_path / "out") == 3
    lines = report_lines(tmp_path / "out")
    assert lines["row", "gestational_age_samples.csv", "2"] == ("failed", "missing-image")
    assert lines["row", "gestational_age_samples.csv", "3"] == ("failed", "bad-row")
    with pytest.raises(UsageError, match="LFC"):
        convert_tree(Lfc(), root / "train_label/1", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_lfc_row_cut_short_fails_alone(tmp_path):
    root = lfc_tree(tmp_path / "in", only="train")
    (root / "gestational_age_samples.csv").write_text("Sample_ID,Gestational_Age_Weeks,Split\n1,24.1,train\n2,30\n")
    assert convert_tree(Lfc(), root, tmp_path / "out") == 3
    lines = report_lines(tmp_path / "out")
    assert lines["row", "gestational_age_samples.csv", "2"] == ("failed", "damaged-row")
    assert lines["case", "002", ""] == ("ok", "")


def test_lfc_coinciding_landmarks_leave_no_empty_label(tmp_path):
    root = lfc_tree(tmp_path / "in")
    write_json(root / "train_label/1/line_9.mrk.json", line_markup([LINES[4][0], LINES[2][1]]))
    assert convert_tree(Lfc(), root, tmp_path / "out") == 3
    assert report_lines(tmp_path / "out")["case", "001", ""] == ("failed", "landmarks-coincide")
