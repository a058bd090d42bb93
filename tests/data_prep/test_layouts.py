"""The datalist in the form that the bundles read, and in Auto3DSeg's."""

from __future__ import annotations

import json

import pytest

from data_prep.layouts import LAYOUTS, Entry, Made
from data_prep.model import Case, Description, Make
from monai_mamba.training.datalist import load_cases

PICTURE = Make("operations.pictures:picture", ("a.png",))


def _datalist(description: Description, *cases: tuple[Case, int | None]) -> dict:
    layout = LAYOUTS["monai"]
    made = []
    for case, fold in cases:
        outputs = layout.outputs(description, case.key, case)
        made.append(Made(Entry(case, case.key, case.group, fold, outputs), outputs))
    return json.loads(layout.documents(description, made)["datalist.json"])


def _pair(key: str, **values) -> Case:
    return Case(key, "p-" + key, (PICTURE, PICTURE), views=("cc", "mlo"), target=1, same_grid=False, **values)


TWO_VIEWS = Description("Toy", "classification", ("cc", "mlo"), {"benign": 0, "malignant": 1}, file_ending=".png")


def test_two_views_and_their_masks_are_named_as_the_bundles_read_them():
    found = _datalist(TWO_VIEWS, (_pair("a", masks=(PICTURE, PICTURE)), 0), (_pair("b", split="test"), None))
    assert found["classes"] == ["benign", "malignant"]
    assert found["training"] == [
        {
            "image1": "images/a_cc.png",
            "image2": "images/a_mlo.png",
            "mask1": "labels/a_cc.png",
            "mask2": "labels/a_mlo.png",
            "label": 1,
            "case": "a",
            "patient": "p-a",
            "fold": 0,
        }
    ]
    assert [entry["case"] for entry in found["test"]] == ["b"]


def test_samples_of_a_study_are_entries_with_one_study():
    study = Case(
        "s", "p", (PICTURE,) * 3, views=("image1", "image2", "image3"), target=0, samples=((0, 1), (1, 2), (2, 2))
    )
    entries = _datalist(TWO_VIEWS, (study, None))["training"]
    assert [(e["case"], e["image1"], e["image2"]) for e in entries] == [
        ("s_image1_image2", "images/s_image1.png", "images/s_image2.png"),
        ("s_image2_image3", "images/s_image2.png", "images/s_image3.png"),
        ("s_image3_image3", "images/s_image3.png", "images/s_image3.png"),
    ]
    assert {e["study"] for e in entries} == {"s"}


def test_values_and_mask_of_several_labels_are_separate():
    description = Description("Toy", "multilabel", ("image",), {"edema": 1, "fracture": 0}, file_ending=".png")
    found = _datalist(description, (Case("a", "p", (PICTURE,), target={"values": [1, 0], "mask": [1, 0]}), None))
    assert found["classes"] == ["fracture", "edema"]
    assert found["training"][0]["label"] == [1, 0] and found["training"][0]["label_mask"] == [1, 0]


def test_landmarks_are_in_the_entry_and_their_names_at_the_top():
    description = Description("Toy", "landmarks", ("image",), landmark_names=("left", "right"))
    points = ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    found = _datalist(description, (Case("a", "p", (PICTURE,), landmarks=points), None))
    assert found["landmark_names"] == ["left", "right"]
    assert found["training"][0]["landmarks"] == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def test_segmentation_entries_hold_nothing_but_files_and_folds():
    volume = Make("operations.volumes:image", ("a.nii.gz",))
    description = Description("Toy", "segmentation", ("MR",), {"background": 0, "x": 1})
    case = Case("a", "p", (volume, volume), label_map=volume)
    found = _datalist(description, (case, 2), (Case("b", "p", (volume,), split="test"), None))
    assert found["training"] == [
        {"image": ["images/a_0000.nii.gz", "images/a_0001.nii.gz"], "label": "labels/a.nii.gz", "fold": 2}
    ]
    assert found["testing"] == [{"image": "images/b.nii.gz"}]


@pytest.mark.parametrize("fold", [0, 1])
def test_bundles_read_the_datalist_and_take_one_fold_to_validate(tmp_path, fold):
    cases = [(_pair(name), number % 2) for number, name in enumerate("abcd")]
    found = _datalist(TWO_VIEWS, *cases, (Case("e", "e", (PICTURE,) * 2, views=("cc", "mlo"), target=0), 1 - fold))
    (tmp_path / "datalist.json").write_text(json.dumps(found))
    (tmp_path / "images").mkdir()
    for entry in found["training"]:
        for key in ("image1", "image2"):
            (tmp_path / entry[key]).write_bytes(b"")
    validation = [case["case"] for case in load_cases(tmp_path, "validation", fold=fold)]
    training = [case["case"] for case in load_cases(tmp_path, "training", fold=fold)]
    assert validation == (["a", "c"], ["b", "d"])[fold]
    assert sorted(training + validation) == list("abcde")


def test_values_of_a_case_cannot_take_the_columns_that_every_case_has():
    with pytest.raises(ValueError, match="part"):
        Case("a", "p", (), meta={"part": "Tr", "scanner": "x"})
