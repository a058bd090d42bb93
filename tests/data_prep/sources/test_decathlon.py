from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from data_prep.errors import DatasetError, UsageError
from data_prep.sources.decathlon import Decathlon
from tests.data_prep.factories import convert_tree, decathlon_tree, report_lines, write_label_map, write_nifti_volume


def test_decathlon_every_file_has_its_verdict(tmp_path):
    root = decathlon_tree(tmp_path)
    assert convert_tree(Decathlon(), root, tmp_path / "Dataset004_Toy") == 0
    lines = report_lines(tmp_path / "Dataset004_Toy")
    files = {path for kind, path, _ in lines if kind == "file"}
    assert files == {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert lines["file", "imagesTr/._toy_000.nii.gz", ""] == ("skipped", "junk")
    assert lines["file", "imagesTr/toy_800.nii.gz", ""] == ("skipped", "not-listed")
    assert lines["file", "imagesTr/toy_000.nii.gz", ""] == ("ok", "")
    assert lines["case", "toy_900", ""] == ("ok", "")


def test_decathlon_passes_nnunet_integrity_check(tmp_path):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    out = tmp_path / "Dataset004_Toy"
    convert_tree(Decathlon(), decathlon_tree(tmp_path, num_channels=2), out)
    verify_dataset_integrity(str(out), num_processes=1)
    description = json.loads((out / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "MRI0", "1": "MRI1"}
    assert description["labels"] == {"background": 0, "front": 1, "back": 2}
    assert description["numTraining"] == 6
    assert (out / "imagesTs/toy_900_0001.nii.gz").exists()


def test_decathlon_channels_equal_those_of_the_4d_file(tmp_path):
    root = decathlon_tree(tmp_path, num_channels=3)
    out = tmp_path / "Dataset004_Toy"
    convert_tree(Decathlon(), root, out)
    whole = nib.load(root / "imagesTr/toy_001.nii.gz")
    for channel in range(3):
        one = nib.load(out / f"imagesTr/toy_001_{channel:04d}.nii.gz")
        np.testing.assert_array_equal(one.dataobj, whole.dataobj[..., channel])
        np.testing.assert_array_equal(one.affine, whole.affine)


def test_decathlon_folds_hold_every_training_case_once(tmp_path):
    out = tmp_path / "Dataset004_Toy"
    convert_tree(Decathlon(), decathlon_tree(tmp_path, 7), out, folds=3)
    splits = json.loads((out / "splits_final.json").read_text())
    assert len(splits) == 3
    assert sorted(case for split in splits for case in split["val"]) == [f"toy_{i:03d}" for i in range(7)]
    assert all(not set(split["train"]) & set(split["val"]) for split in splits)


def test_decathlon_monai_datalist_is_read_by_monai(tmp_path):
    from monai.data import load_decathlon_datalist

    out = tmp_path / "toy"
    convert_tree(Decathlon(), decathlon_tree(tmp_path), out, format="monai")
    entries = load_decathlon_datalist(out / "datalist.json", True, "training", out)
    assert len(entries) == 6
    assert nib.load(entries[0]["image"]).shape == nib.load(entries[0]["label"]).shape == (12, 10, 8)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda root: (root / "labelsTr/toy_000.nii.gz").unlink(), "missing-label"),
        (lambda root: write_label_map(root / "labelsTr/toy_000.nii.gz", values=(1, 5)), "unknown-label"),
        (lambda root: write_label_map(root / "labelsTr/toy_000.nii.gz", (12, 10, 9)), "grids-differ"),
        (
            lambda root: write_label_map(root / "labelsTr/toy_000.nii.gz", affine=np.diag([1, 1, 1.01, 1])),
            "grids-differ",
        ),
        (lambda root: (root / "imagesTr/toy_000.nii.gz").write_bytes(b"no image"), "damaged-data"),
        (lambda root: write_nifti_volume(root / "imagesTr/toy_000.nii.gz", (12, 10, 8, 2)), "not-3d"),
    ],
    ids=["label missing", "value unknown", "shape differs", "spacing differs", "not NIfTI", "4D"],
)
def test_decathlon_damaged_case_fails_by_name_and_costs_no_other(tmp_path, damage, reason):
    root = decathlon_tree(tmp_path)
    damage(root)
    out = tmp_path / "Dataset004_Toy"
    assert convert_tree(Decathlon(), root, out) == 3
    lines = report_lines(out)
    assert lines["file", "imagesTr/toy_000.nii.gz", ""] == ("failed", reason)
    assert lines["case", "toy_001", ""] == ("ok", "")
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 5
    assert not (out / "imagesTr/toy_000_0000.nii.gz").exists()


def test_decathlon_case_without_any_file_is_reported(tmp_path):
    root = decathlon_tree(tmp_path)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder / "toy_002.nii.gz").unlink()
    assert convert_tree(Decathlon(), root, tmp_path / "Dataset004_Toy") == 3
    assert report_lines(tmp_path / "Dataset004_Toy")["item", "dataset.json", "toy_002.nii.gz"] == (
        "failed",
        "missing-files",
    )


@pytest.mark.parametrize("text", ["", "[]", '{"labels": {}}', "{"], ids=["empty", "list", "no modality", "truncated"])
def test_decathlon_broken_description_is_one_error(tmp_path, text):
    root = decathlon_tree(tmp_path)
    (root / "dataset.json").write_text(text)
    with pytest.raises((DatasetError, UsageError)):
        convert_tree(Decathlon(), root, tmp_path / "Dataset004_Toy")
    assert not (tmp_path / "Dataset004_Toy").exists()
