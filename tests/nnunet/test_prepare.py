"""Label maps for raw data sets that have landmarks or classes only."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from monai_mamba.errors import DatasetError
from monai_mamba.nnunet.annotations import read_landmarks
from monai_mamba.nnunet.geometry import raw_affine
from monai_mamba.nnunet.prepare import prepare

POINTS = [[-14.0, -21.5, 40.0], [-9.0, -17.0, 52.0]]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    for case in ("a", "b"):
        array = np.zeros((12, 20, 24), np.float32)
        array[2:10, 3:18, 4:20] = 1.5
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((1.0, 1.0, 2.5))
        image.SetOrigin((3.0, 10.0, 30.0))
        sitk.WriteImage(image, str(tmp_path / "imagesTr" / f"{case}_0000.nii.gz"))
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}))
    return tmp_path


def read(path):
    image = sitk.ReadImage(str(path))
    stuff = {"spacing": image.GetSpacing(), "origin": image.GetOrigin(), "direction": image.GetDirection()}
    return sitk.GetArrayFromImage(image)[None], {"sitk_stuff": stuff}


def test_balls_lie_where_the_landmarks_are(folder):
    cases = {case: {"landmarks": POINTS} for case in "ab"}
    (folder / "landmarks.json").write_text(json.dumps({"landmark_names": ["tip", "base"], "cases": cases}))
    written = prepare(folder, radius_mm=4)
    assert [path.name for path in written] == ["a.nii.gz", "b.nii.gz", "dataset.json"]
    dataset_json = json.loads((folder / "dataset.json").read_text())
    assert dataset_json["labels"] == {"background": 0, "tip": 1, "base": 2} and dataset_json["numTraining"] == 2
    (folder / "landmarks.json").unlink()
    found = read_landmarks([folder], ["tip", "base"], "ab", lambda case: read(folder / "labelsTr" / f"{case}.nii.gz"))
    np.testing.assert_allclose(found["b"], POINTS, atol=0.7)  # the center of a ball of whole voxels of 1 x 1 x 2.5 mm
    assert raw_affine(read(written[0])[1])[2, 3] == 30


def test_region_of_the_image_stands_in_for_classes(folder):
    (folder / "classes.json").write_text(json.dumps({"classes": ["x", "y"], "cases": {"a": "x", "b": "y"}}))
    prepare(folder)
    label, properties = read(folder / "labelsTr" / "a.nii.gz")
    assert label.sum() == 8 * 15 * 16 and label.max() == 1
    np.testing.assert_allclose(raw_affine(properties), raw_affine(read(folder / "imagesTr" / "a_0000.nii.gz")[1]))
    assert prepare(folder) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds neither classes.json nor landmarks.json nor landmarksTr"),
        ({"classes.json": {"classes": ["x", "y"], "cases": {"a": "x"}}}, "1 of 2 cases: case b: it has no class"),
        (
            {"landmarks.json": {"landmark_names": ["t"], "cases": {c: {"landmarks": [[900, 0, 0]]} for c in "ab"}}},
            "2 of 2 cases: case a: ",
        ),
        ({"dataset.json": {"file_ending": ".nii.gz"}}, "needs `file_ending` and `channel_names`"),
    ],
    ids=["nothing", "missing", "outside", "dataset"],
)
def test_bad_data_sets(folder, files, message):
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=message):
        prepare(folder)
    assert not list(folder.glob("labelsTr/*"))
