"""AMOS22: modalities by number, the quirks of dataset.json, the official validation, label maps beside their image."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.check import check_data_set
from data_prep.errors import DatasetError, UsageError
from data_prep.sources.amos import ORGANS, Amos
from tests.data_prep.factories import (
    convert_tree,
    nnunet_plans,
    report_lines,
    write_bytes,
    write_csv,
    write_json,
    write_label_map,
    write_nifti_volume,
)

AXIAL, CORONAL = np.diag([-0.7, -0.7, 5.0, 1.0]), np.array([[1.0, 0, 0, 3], [0, 0, -2, 4], [0, 1, 0, 5], [0, 0, 0, 1]])
SHAPE = (40, 10, 9)
TRAINING, VALIDATION, TEST = (1, 4, 405, 507, 540), (8, 555), (3, 411, 600)


def amos_tree(root: Path, *, labels_ts: bool = False) -> Path:
    """The unpacked download: CT and MRI of different orientation, "licence", "arota", the table of scanners, junk."""
    root = root / "in" / "amos22"
    parts = {"Tr": TRAINING, "Va": VALIDATION, "Ts": TEST}
    for part, numbers in parts.items():
        for number in numbers:
            affine = AXIAL if number <= 500 else CORONAL
            write_nifti_volume(root / f"images{part}/amos_{number:04d}.nii.gz", SHAPE, number, affine)
            if part != "Ts" or labels_ts:
                organs = range(1, 16) if number == 1 else (1, 15)
                write_label_map(root / f"labels{part}/amos_{number:04d}.nii.gz", SHAPE, list(organs), affine)
    write_bytes(root / "imagesTr" / "._amos_0001.nii.gz")
    organs = ["background", *ORGANS]
    organs[8] = "arota"
    write_json(
        root / "dataset.json",
        {
            "name": "AMOS",
            "description": "Amos: A large-scale abdominal multi-organ benchmark",
            "author": "Ji YuanFeng",
            "reference": "SRIBD x CUHKSZ x HKU x LGCHOSPITAL x LGPHOSPITAL",
            "licence": "CC-BY-SA 4.0",
            "release": "1.0 01/05/2022",
            "tensorImageSize": "3D",
            "modality": {"0": "CT"},
            "labels": {str(value): name for value, name in enumerate(organs)},
            "numTraining": len(TRAINING),
            "numValidation": len(VALIDATION),
            "numTest": len(TEST),
            **{
                section: [
                    {"image": f"./images{part}/amos_{n:04d}.nii.gz", "label": f"./labels{part}/amos_{n:04d}.nii.gz"}
                    for n in parts[part]
                ]
                for section, part in (("training", "Tr"), ("validation", "Va"))
            },
            "test": [{"image": f"./imagesTs/amos_{n:04d}.nii.gz"} for n in TEST],
        },
    )
    header = ["amos_id", "Patient's Birth Date", "Patient's Sex", "Manufacturer's Model Name", "Acquisition Date"]
    rows = [[str(n), "19430101", "M", "Aquilion ONE", "20200101"] for n in (*TRAINING, *VALIDATION, 77)]
    write_csv(root / "labeled_data_meta_0000_0599.csv", [header, *rows])
    return root.parent


def _cases(out: Path) -> dict[str, str]:
    return {line.split(",")[0]: line.split(",")[2] for line in (out / "cases.csv").read_text().splitlines()[1:]}


def test_both_modalities_with_the_official_validation(tmp_path):
    root, out = amos_tree(tmp_path), tmp_path / "Dataset218_AMOS"
    assert convert_tree(Amos(), root, out) == 0
    content = json.loads((out / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "nonCT"}
    assert (
        content["labels"]["aorta"] == 8 and content["labels"]["prostate/uterus"] == 15 and len(content["labels"]) == 16
    )
    assert content["licence"] == "CC-BY-SA 4.0" and content["numTraining"] == 7
    splits = json.loads((out / "splits_final.json").read_text())
    assert splits == [{"train": [f"amos_{n:04d}" for n in TRAINING], "val": [f"amos_{n:04d}" for n in VALIDATION]}]
    assert sorted(path.name for path in (out / "imagesTs").iterdir()) == [f"amos_{n:04d}_0000.nii.gz" for n in TEST]
    assert not (out / "labelsTs").exists()
    for number, affine in ((1, AXIAL), (507, CORONAL)):  # orientation stays that of the case
        np.testing.assert_allclose(nib.load(out / f"imagesTr/amos_{number:04d}_0000.nii.gz").affine, affine)
    assert check_data_set(out).problems == []
    lines = report_lines(out)
    assert lines["row", "amos22/labeled_data_meta_0000_0599.csv", "8"] == ("skipped", "no-such-case")
    assert lines["row", "amos22/labeled_data_meta_0000_0599.csv", "1"] == ("ok", "")
    assert sum(kind == "file" for kind, _, _ in lines) == sum(path.is_file() for path in root.rglob("*"))
    written = "".join(path.read_text() for path in out.iterdir() if path.is_file())
    assert "Aquilion ONE" in written and "19430101" not in written and "20200101" not in written


@pytest.mark.parametrize(("modality", "channel", "first"), [("ct", "CT", 0), ("mr", "MR", 501)])
def test_one_modality_leaves_the_other_out_by_number(tmp_path, modality, channel, first):
    out = tmp_path / "Dataset216_AMOS"
    assert convert_tree(Amos(modality=modality), amos_tree(tmp_path), out) == 0
    assert json.loads((out / "dataset.json").read_text())["channel_names"] == {"0": channel}
    wanted = {f"amos_{n:04d}" for n in (*TRAINING, *VALIDATION, *TEST) if first <= n < first + 501}
    assert set(_cases(out)) == wanted
    other = "amos_0001" if modality == "mr" else "amos_0507"
    assert report_lines(out)["file", f"amos22/imagesTr/{other}.nii.gz", ""] == ("skipped", "other-modality")


def test_merged_validation_is_spread_over_folds_with_both_modalities(tmp_path):
    out = tmp_path / "Dataset218_AMOS"
    assert convert_tree(Amos(val="merge"), amos_tree(tmp_path), out, folds=2) == 0
    splits = json.loads((out / "splits_final.json").read_text())
    assert len(splits) == 2
    assert all(any(int(case[5:]) > 500 for case in split["val"]) for split in splits)


def test_later_published_test_labels_are_taken(tmp_path):
    out = tmp_path / "Dataset218_AMOS"
    assert convert_tree(Amos(), amos_tree(tmp_path, labels_ts=True), out) == 0
    assert len(list((out / "labelsTs").iterdir())) == len(TEST)
    assert set(_cases(out).values()) == {"train", "val", "test"}


def test_validation_without_any_label_is_there_to_be_predicted(tmp_path):
    root = amos_tree(tmp_path)
    for path in (root / "amos22/labelsVa").iterdir():
        path.unlink()
    assert convert_tree(Amos(), root, tmp_path / "Dataset218_AMOS") == 0
    assert _cases(tmp_path / "Dataset218_AMOS")["amos_0008"] == "test"


def test_label_map_beside_its_image_is_refused_or_snapped(tmp_path):
    root = amos_tree(tmp_path)
    moved = AXIAL.copy()
    moved[0, 3] = 0.04
    labels = write_label_map(root / "amos22/labelsTr/amos_0004.nii.gz", SHAPE, (1, 2), moved)
    assert convert_tree(Amos(), root, tmp_path / "a" / "Dataset218_AMOS") == 3
    assert report_lines(tmp_path / "a" / "Dataset218_AMOS")["case", "amos_0004", ""] == ("failed", "grids-differ")
    assert convert_tree(Amos(snap_labels=0.03), root, tmp_path / "b" / "Dataset218_AMOS") == 3
    out = tmp_path / "c" / "Dataset218_AMOS"
    assert convert_tree(Amos(snap_labels=0.05), root, out) == 0
    image = nib.load(out / "labelsTr/amos_0004.nii.gz")
    np.testing.assert_allclose(image.affine, AXIAL)
    np.testing.assert_array_equal(image.dataobj, labels)
    assert "moved by up to 0.04 mm" in (out / "report.csv").read_text()
    untouched = root / "amos22/labelsTr/amos_0001.nii.gz"
    assert (out / "labelsTr/amos_0001.nii.gz").read_bytes() == untouched.read_bytes()


def _scan(folder: str, number: int) -> tuple[str, str, str]:
    return "file", f"amos22/{folder}/amos_{number:04d}.nii.gz", ""


_SCANNERS = "labeled_data_meta_0000_0599.csv"


@pytest.mark.parametrize(
    ("damage", "ref", "reason"),
    [
        (lambda f: (f / "labelsTr/amos_0001.nii.gz").unlink(), _scan("imagesTr", 1), "missing-label"),
        (lambda f: (f / "labelsVa/amos_0008.nii.gz").unlink(), _scan("imagesVa", 8), "missing-label"),
        (lambda f: (f / "imagesTr/amos_0001.nii.gz").unlink(), _scan("labelsTr", 1), "missing-image"),
        (
            lambda f: (f / "imagesTs/amos_0600.nii.gz").unlink(),
            ("item", "amos22/dataset.json", "amos_0600.nii.gz"),
            "missing-files",
        ),
        (lambda f: write_nifti_volume(f / "imagesTs/amos_0001.nii.gz"), _scan("imagesTr", 1), "duplicate-number"),
        (
            lambda f: (f / "labelsTr/amos_0001.nii").write_bytes(b""),
            ("file", "amos22/labelsTr/amos_0001.nii", ""),
            "two-files",
        ),
        (
            lambda f: write_label_map(f / "labelsTr/amos_0001.nii.gz", SHAPE, (16,), AXIAL),
            ("case", "amos_0001", ""),
            "unknown-label",
        ),
        (
            lambda f: write_csv(f / _SCANNERS, [["amos_id", "x"], ["1"]]),
            ("row", f"amos22/{_SCANNERS}", "1"),
            "damaged-row",
        ),
    ],
    ids=["label", "val label", "image", "listed", "twice", "two endings", "value", "row cut short"],
)
def test_damage_has_its_verdict_and_costs_no_other(tmp_path, damage, ref, reason):
    root, out = amos_tree(tmp_path), tmp_path / "Dataset218_AMOS"
    damage(root / "amos22")
    assert convert_tree(Amos(), root, out) == 3
    lines = report_lines(out)
    assert lines[ref] == ("failed", reason)
    assert lines["case", "amos_0004", ""] == ("ok", "")


def test_dataset_json_of_another_set_is_refused(tmp_path):
    root = amos_tree(tmp_path)
    content = json.loads((root / "amos22/dataset.json").read_text())
    content["labels"]["1"] = "liver"
    write_json(root / "amos22/dataset.json", content)
    with pytest.raises(DatasetError, match="names other organs"):
        convert_tree(Amos(), root, tmp_path / "out")


def test_wrong_folder_is_refused(tmp_path):
    write_bytes(tmp_path / "in" / "a.txt")
    with pytest.raises(UsageError, match="no imagesTr"):
        convert_tree(Amos(), tmp_path / "in", tmp_path / "out")


@pytest.mark.slow
def test_amos_passes_nnunet_plan_and_preprocess(tmp_path):
    out = tmp_path / "raw" / "Dataset218_AMOS"
    convert_tree(Amos(), amos_tree(tmp_path), out)
    assert set(nnunet_plans(out)["configurations"]) >= {"3d_fullres"}
