"""Data lists: what is read and what is refused."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from monai_mamba.errors import DatasetError
from monai_mamba.training.datalist import is_multi_label, list_inputs, load_cases, structure_names


@pytest.fixture
def dataset(tmp_path):
    """A function that writes a data set with one case per section, changed by its argument."""

    def write(change=lambda manifest: None):
        (tmp_path / "images").mkdir(exist_ok=True)
        manifest = {"classes": ["a", "b"]}
        for section in ("training", "validation", "test"):
            manifest[section] = []
            for label in (0, 1):
                name = f"{section}{label}"
                Image.fromarray(np.full((4, 5), 100 + label, np.uint8)).save(tmp_path / "images" / f"{name}.png")
                manifest[section].append({"image": f"images/{name}.png", "label": label})
        change(manifest)
        (tmp_path / "datalist.json").write_text(json.dumps(manifest))
        return tmp_path

    return write


def test_cases_get_names_and_absolute_files(dataset):
    cases = load_cases(dataset(), "training")
    assert [case["case"] for case in cases] == [case["patient"] for case in cases] == ["training0", "training1"]
    assert cases[0]["image"].endswith("images/training0.png")


def test_limit_takes_cases_from_the_whole_section(dataset):
    assert [case["label"] for case in load_cases(dataset(), "test", limit=1)] == [0]


def case_of(section, index=0, **fields):
    return lambda manifest: manifest[section][index].update(fields)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (case_of("test", label=2), "from 0 to 1"),
        (case_of("test", label=-1), "from 0 to 1"),
        (case_of("test", label=True), "from 0 to 1"),
        (case_of("test", label=None), "from 0 to 1"),
        (case_of("test", label=[1]), "2 zeros or ones"),
        (case_of("test", image="images/none.png"), "does not exist"),
        (case_of("test", image="../../etc/hostname"), "leaves the folder"),
        (case_of("test", case="training0"), "twice"),
        (lambda m: [case.update(patient="p") for case in (m["training"][0], m["test"][1])], "split by patient"),
        (lambda m: m["test"].clear(), "missing or empty"),
        (lambda m: m["test"][0].pop("image"), "no `image`"),
    ],
    ids=["above", "below", "bool", "none", "multi", "missing", "outside", "twice", "leak", "empty", "no-image"],
)
def test_bad_data_list_is_refused(dataset, change, reason):
    with pytest.raises(DatasetError, match=reason):
        load_cases(dataset(change), "test")


def test_class_without_training_case_is_refused(dataset):
    with pytest.raises(DatasetError, match="class b"):
        load_cases(dataset(lambda m: m["training"].pop()), "training")


def several_labels(manifest, **fields):
    """Two classes at once in every case; ``fields`` change the first of the training section."""
    for section in ("training", "validation", "test"):
        for index, case in enumerate(manifest[section]):
            case["label"] = [1, index]
    manifest["training"][0].update(fields)


def test_labels_that_are_not_known_become_nan(dataset):
    folder = dataset(lambda m: several_labels(m, label_mask=[0, 1]))
    assert is_multi_label(folder)
    first, second = load_cases(folder, "training")
    np.testing.assert_array_equal(first["label"], [np.nan, 0])
    np.testing.assert_array_equal(second["label"], [1, 1])
    assert first["label"].dtype == second["label"].dtype == np.float32  # they are stacked into one batch
    assert "label_mask" not in first
    assert not is_multi_label(dataset())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"label_mask": [1]}, "`label_mask` must be 2 ones"),
        ({"label_mask": [1, 0.5]}, "`label_mask` must be 2 ones"),
        ({"label_mask": 1}, "`label_mask` must be 2 ones"),
        ({"label": 1}, "`label` must be 2 zeros or ones, got 1"),
        ({"label": [1, None]}, "`label` must be 2 zeros or ones"),
    ],
    ids=["short", "half", "number", "mixed", "null"],
)
def test_bad_lists_of_labels_are_refused(dataset, fields, reason):
    with pytest.raises(DatasetError, match=f"case training0: {reason}"):
        load_cases(dataset(lambda m: several_labels(m, **fields)), "training")


def test_mask_of_a_single_label_is_refused(dataset):
    with pytest.raises(DatasetError, match="case training0: `label_mask` belongs to a list of labels"):
        load_cases(dataset(case_of("training", label_mask=[1])), "training")


def test_class_whose_positives_are_all_unknown_is_empty(dataset):
    def hide(manifest):
        several_labels(manifest)
        manifest["training"][1]["label_mask"] = [1, 0]

    with pytest.raises(DatasetError, match="no case of `training` is of the class b"):
        load_cases(dataset(hide), "training")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"training": '], ids=["empty", "list", "brace", "cut"])
def test_broken_file_is_refused(tmp_path, content):
    (tmp_path / "datalist.json").write_text(content)
    with pytest.raises(DatasetError, match=r"datalist\.json"):
        load_cases(tmp_path, "training")


def test_corrupt_pictures_are_dropped_counted_and_named(dataset, caplog):
    folder = dataset()
    path = folder / "images" / "test0.png"
    path.write_bytes(path.read_bytes()[:40])
    assert len(load_cases(folder, "test")) == 2
    assert [case["case"] for case in load_cases(folder, "test", on_corrupt="drop")] == ["test1"]
    assert "1 of 2 cases dropped" in caplog.text
    assert "test0.png" in caplog.text


def test_folder_of_pictures_is_listed_without_a_data_list(tmp_path):
    for name in ("b.png", "sub/a.JPG", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [case["case"] for case in list_inputs(tmp_path)] == ["b.png", "sub/a.JPG"]
    with pytest.raises(DatasetError, match="nor a picture"):
        list_inputs(tmp_path / "none")


def write_files(folder, manifest, files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "datalist.json").write_text(json.dumps(manifest))
    return folder


def test_segmentation_list_of_data_prep_gets_cases_patients_and_folds(tmp_path):
    entries = [
        {"image": [f"images/{n}_0000.nii.gz", f"images/{n}_0001.nii.gz"], "label": f"labels/{n}.nii.gz", "fold": i % 2}
        for i, n in enumerate("abc")
    ]
    files = [file for e in entries for file in (*e["image"], e["label"])] + ["images/t_0000.nii.gz"]
    manifest = {
        "labels": {"tumor": 1, "background": 0},
        "training": entries,
        "testing": [{"image": ["images/t_0000.nii.gz"]}],
    }
    folder = write_files(tmp_path, manifest, files)
    (folder / "cases.csv").write_text("case,patient\na,p1\nb,p2\nc,p1\nt,p3\n")
    assert structure_names(folder) == ["background", "tumor"]
    training, validation, test = (load_cases(folder, s, fold=1) for s in ("training", "validation", "test"))
    assert [(case["case"], case["patient"]) for case in training] == [("a", "p1"), ("c", "p1")]
    assert [(case["case"], case["patient"]) for case in validation + test] == [("b", "p2"), ("t", "p3")]
    assert training[0]["image"] == [str(folder / name) for name in entries[0]["image"]]
    with pytest.raises(ValueError, match="`fold` must be one of 0, 1"):
        load_cases(folder, "training", fold=2)
    (folder / "cases.csv").write_text("case,patient\na,p1\nb,p1\nc,p1\nt,p3\n")
    with pytest.raises(DatasetError, match="split by patient"):
        load_cases(folder, "training")


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"background": 0, "organ": 2}, "without a gap"),
        ({"background": 0, "organ": "1"}, "without a gap"),
        ({"background": 0, "whole": [1, 2]}, "nnU-Net"),
        (["background"], "must name the values"),
    ],
    ids=["gap", "text", "region", "list"],
)
def test_bad_names_of_structures_are_refused(tmp_path, labels, reason):
    manifest = {"labels": labels, "training": [{"image": "i.nii", "label": "l.nii"}]}
    folder = write_files(tmp_path, manifest, ["i.nii", "l.nii"])
    with pytest.raises(DatasetError, match=reason):
        structure_names(folder)


def landmark_list(folder, points, names=("a", "b")):
    return write_files(
        folder, {"landmark_names": list(names), "training": [{"image": "i.nii", "landmarks": points}]}, ["i.nii"]
    )


def test_landmarks_become_an_array_with_nan_for_missing_ones(tmp_path):
    folder = landmark_list(tmp_path, [[1, 2, 3.5], None])
    manifest = json.loads((folder / "datalist.json").read_text())
    manifest["test"] = manifest.pop("training")
    (folder / "datalist.json").write_text(json.dumps(manifest))
    [case] = load_cases(folder, "test")
    np.testing.assert_array_equal(case["landmarks"], [[1, 2, 3.5], [np.nan] * 3])


@pytest.mark.parametrize(
    "points",
    [[[1, 2, 3]], [[1, 2, 3], [1, 2]], [[1, 2, 3], "x"], [[1, 2, 3], ["a", 1, 2]], None, [[1, 2, 3], [1, 2, 1e999]]],
    ids=["few", "short", "text", "letters", "none", "infinite"],
)
def test_bad_landmarks_are_refused(tmp_path, points):
    with pytest.raises(DatasetError, match=r"case i: `landmarks` must be 2 points"):
        load_cases(landmark_list(tmp_path, points), "training")


def test_landmarks_without_names_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="`landmark_names`"):
        load_cases(landmark_list(tmp_path, [], names=()), "training")


def test_landmark_without_training_case_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"no case of `training` has the landmark b$"):
        load_cases(landmark_list(tmp_path, [[1, 2, 3], None], names=("a", "b")), "training")


def test_structure_without_training_case_is_refused(tmp_path):
    for name, value in (("a.nii", 1), ("b.nii", 2)):
        nib.save(nib.Nifti1Image(np.full((3, 3, 3), value, np.uint8), np.eye(4)), tmp_path / name)
    cases = [{"image": name, "label": name} for name in ("a.nii", "b.nii")]
    labels = {"background": 0, "organ": 1, "tumor": 2}
    assert len(load_cases(write_files(tmp_path, {"labels": labels, "training": cases}, []), "training")) == 2
    folder = write_files(tmp_path, {"labels": labels | {"cyst": 3}, "training": cases}, [])
    with pytest.raises(DatasetError, match=r"no label map of `training` holds the structure cyst$"):
        load_cases(folder, "training")


def test_corrupt_volumes_and_label_maps_are_dropped(tmp_path, caplog):
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.eye(4)), tmp_path / "good.nii")
    cases = [{"image": "good.nii", "label": "bad.nii", "case": "x"}, {"image": "good.nii", "label": "good.nii"}]
    manifest = {"labels": {"background": 0, "organ": 1}, "training": cases}
    folder = write_files(tmp_path, manifest, ["bad.nii"])
    assert [case["case"] for case in load_cases(folder, "training", on_corrupt="drop")] == ["good"]
    assert "1 of 2 cases dropped" in caplog.text and "bad.nii" in caplog.text
