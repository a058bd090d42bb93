"""Reading landmarks and classes: every accepted form, and one clear error for every other."""

from __future__ import annotations

import json

import numpy as np
import pytest

from monai_mamba.errors import DatasetError
from monai_mamba.nnunet.annotations import landmark_names, landmarks_in_array, read_classes, read_landmarks

NAMES = ["tip", "base"]
POINTS = np.array([[1.0, -2.0, 3.5], [4.0, 5.0, -6.0]])


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def markups(system="LPS", labels=NAMES, **more):
    sign = np.array([-1, -1, 1]) if system == "LPS" else np.ones(3)
    points = [
        {"label": label, "position": (point * sign).tolist(), "positionStatus": "defined"}
        for label, point in zip(labels, POINTS, strict=False)
    ]
    return {"markups": [{"type": "Fiducial", "coordinateSystem": system, "controlPoints": points, **more}]}


def no_label(case):
    raise AssertionError(f"the label map of {case} was read")


@pytest.mark.parametrize("system", ["LPS", "RAS"])
def test_markups_of_slicer_in_either_system(tmp_path, system):
    write(tmp_path, "landmarksTr/a.mrk.json", markups(system))
    found = read_landmarks([tmp_path / "none", tmp_path], NAMES, ["a"], no_label)
    np.testing.assert_array_equal(found["a"], POINTS)


def test_json_goes_before_markups_and_null_is_not_annotated(tmp_path):
    write(tmp_path, "landmarksTr/a.mrk.json", markups())
    write(tmp_path, "landmarks.json", {"landmark_names": NAMES, "cases": {"a": {"landmarks": [[7, 8, 9], None]}}})
    found = read_landmarks([tmp_path], NAMES, ["a"], no_label)
    np.testing.assert_array_equal(found["a"], [[7, 8, 9], [np.nan] * 3])
    assert np.isnan(landmarks_in_array(found["a"], np.eye(4), (20, 20, 20))[1]).all()


def test_centers_of_labels_in_world_coordinates():
    label = np.zeros((1, 6, 8, 10))
    label[0, 1:4, 2, 3] = 1
    label[0, 5, 5:7, 8] = 2
    properties = {
        "sitk_stuff": {
            "spacing": (0.5, 2.0, 3.0),
            "origin": (10.0, 20.0, 30.0),
            "direction": (0, -1, 0, 1, 0, 0, 0, 0, 1),
        }
    }
    found = read_landmarks([], NAMES, ["a"], lambda case: (label, properties))
    # x = origin - 2 j, y = origin + 0.5 i in LPS, by hand
    expected = [[-(10 - 2 * 2.0), -(20 + 0.5 * 3), 30 + 3 * 2.0], [-(10 - 2 * 5.5), -(20 + 0.5 * 8), 30 + 3 * 5.0]]
    np.testing.assert_allclose(found["a"], expected)


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        ([(1, 1, 1, 1)], r"1 of 1 cases: case a: the label map has no voxel of landmark 'base' \(label 2\)"),
        ([(1, 1, 1, 1), (3, 3, 3, 2), (5, 5, 5, 2)], r"landmark 'base' \(label 2\) has 2 separate parts"),
    ],
    ids=["missing", "two-parts"],
)
def test_labels_that_are_no_landmarks(voxels, message):
    label = np.zeros((1, 6, 8, 10))
    for i, j, k, value in voxels:
        label[0, i, j, k] = value
    properties = {"nibabel_stuff": {"original_affine": np.eye(4)}}
    with pytest.raises(DatasetError, match=message):
        read_landmarks([], NAMES, ["a"], lambda case: (label, properties))


def test_formats_without_a_place_in_the_world_are_refused():
    with pytest.raises(DatasetError, match="tells no place in the world; use NIfTI"):
        label = np.zeros((1, 4, 4, 4))
        label[0, 0, 0, :2] = 1, 2
        read_landmarks([], NAMES, ["a"], lambda case: (label, {"spacing": (1, 1, 1)}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (markups("IJK"), "`coordinateSystem` must be 'RAS' or 'LPS', got 'IJK'"),
        (markups(labels=["tip", "bottom"]), "there is no point 'base'; it has tip, bottom"),
        (markups(labels=["tip", "tip"]), "the label 'tip' is there twice"),
        (markups(coordinateUnits="cm"), "`coordinateUnits` must be 'mm', got 'cm'"),
        ("{", "cannot be read as JSON"),
        ([1], "must hold an object, got a list"),
    ],
    ids=["system", "missing", "twice", "units", "truncated", "list"],
)
def test_bad_markups(tmp_path, content, message):
    write(tmp_path, "landmarksTr/a.mrk.json", content)
    with pytest.raises(DatasetError, match=message):
        read_landmarks([tmp_path], NAMES, ["a"], no_label)


def test_case_without_landmarks_is_named_and_many_are_counted(tmp_path):
    write(tmp_path, "landmarks.json", {"landmark_names": NAMES, "cases": {"a": {"landmarks": POINTS.tolist()}}})
    with pytest.raises(DatasetError, match=r"7 of 8 cases: case b: it has no `landmarks`.*; and 2 more$"):
        read_landmarks([tmp_path], NAMES, "abcdefgh", no_label)
    with pytest.raises(DatasetError, match=r"must be the labels of dataset.json in their order, \['base', 'tip'\]"):
        read_landmarks([tmp_path], NAMES[::-1], "a", no_label)


def test_names_of_landmarks_are_the_labels_in_the_order_of_their_values():
    assert landmark_names({"labels": {"b": 2, "background": 0, "a": 1}}) == ["a", "b"]
    for labels in ({"background": 0, "a": 2}, {"background": 0, "a": [1, 2]}, {"background": 0, "a": 1, "ignore": 2}):
        with pytest.raises(DatasetError, match="one value per landmark without gaps"):
            landmark_names({"labels": labels})


def test_landmark_outside_of_the_image_is_named():
    with pytest.raises(DatasetError, match=r"landmark 2 at \[4.0, 5.0, -6.0\] mm \(RAS\+\) is voxel .* LPS"):
        landmarks_in_array(POINTS, np.diag([1, -1, 1, 1.0]), (30, 30, 30))


def test_classes_by_name_or_number_with_patients(tmp_path):
    write(
        tmp_path, "classes.json", {"classes": ["NC", "AD"], "cases": {"a": "AD", "b": 0, "c": 1}, "patients": {"a": 7}}
    )
    table = read_classes([tmp_path / "none", tmp_path], ["a", "b"])
    assert table.classes == ["NC", "AD"] and table.cases == {"a": 1, "b": 0}
    assert (table.patient("a"), table.patient("b")) == ("7", "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"classes": ["NC"], "cases": {"a": 0}}, "`classes` must be a list of two or more names"),
        ({"classes": ["NC", "NC"], "cases": {"a": 0}}, "`classes` must be a list of two or more names"),
        ({"classes": ["NC", "AD"], "cases": []}, "`cases` must be an object of case names"),
        ({"classes": ["NC", "AD"], "cases": {"b": 0}}, "1 of 1 cases: case a: it has no class"),
        ({"classes": ["NC", "AD"], "cases": {"a": 2}}, r"2 is none of the classes \['NC', 'AD'\], nor a number"),
        ({"classes": ["NC", "AD"], "cases": {"a": True}}, "True is none of the classes"),
        ({"classes": ["NC", "AD"], "cases": {"a": "MCI"}}, "'MCI' is none of the classes"),
        ({"classes": ["NC", "AD"], "cases": {"a": 1}, "patients": ["a"]}, "`patients` must be an object"),
    ],
    ids=["one", "same", "list", "missing", "range", "bool", "unknown", "patients"],
)
def test_bad_classes(tmp_path, content, message):
    write(tmp_path, "classes.json", content)
    with pytest.raises(DatasetError, match=message):
        read_classes([tmp_path], ["a"])


def test_missing_classes_file_names_where_it_was_looked_for(tmp_path):
    with pytest.raises(DatasetError, match=r"there is no .*/one/classes.json nor .*/two/classes.json"):
        read_classes([tmp_path / "one", tmp_path / "two"])
