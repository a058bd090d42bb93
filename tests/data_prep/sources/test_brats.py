"""BraTS: editions told apart, regions and classes, time points on one side, links."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.check import check_data_set
from data_prep.cli import main
from data_prep.errors import UsageError
from data_prep.sources.brats import Brats
from tests.data_prep.factories import (
    convert_tree,
    nnunet_plans,
    report_lines,
    write_bytes,
    write_label_map,
    write_nifti_volume,
)

#: as published: LPS+ axes, origin at the far corner
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
AFFINE[1, 3] = 239
SHAPE = (20, 18, 16)
NEW, OLD = ("t1n", "t1c", "t2w", "t2f"), ("t1", "t1ce", "t2", "flair")


def write_visit(folder: Path, key: str, labels: tuple[int, ...] | None = (1, 2, 3), seed: int = 0) -> None:
    """One visit; ``labels=None`` is one of the validation data, which have no map."""
    names, joint = (OLD, "_") if key.startswith("BraTS2021") else (NEW, "-")
    for number, name in enumerate(names):
        path = folder / key / f"{key}{joint}{name}.nii.gz"
        write_nifti_volume(path, SHAPE, seed=10 * seed + number, affine=AFFINE, dtype=np.float32)
    if labels is not None:
        write_label_map(folder / key / f"{key}{joint}seg.nii.gz", SHAPE, labels, AFFINE)


def brats_2023_tree(root: Path) -> Path:
    """Training and validation folder of the 2023 GLI download with a patient of two visits and an AppleDouble file."""
    training = root / "in" / "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData"
    for seed, key in enumerate(
        f"BraTS-GLI-{patient}" for patient in ("00000-000", "00002-000", "00003-000", "00003-001")
    ):
        write_visit(training, key, seed=seed)
    write_visit(root / "in" / "ASNR-MICCAI-BraTS2023-GLI-Challenge-ValidationData", "BraTS-GLI-00001-000", None, seed=9)
    write_bytes(training / "BraTS-GLI-00000-000" / "._BraTS-GLI-00000-000-seg.nii.gz")
    write_bytes(root / "in" / "BraTS2023_2017_GLI_Mapping.xlsx", b"PK")
    return root / "in"


def brats_2021_tree(root: Path) -> Path:
    for number in range(3):
        write_visit(root / "in" / "BraTS2021_Training_Data", f"BraTS2021_{number:05d}", (1, 2, 4), seed=number)
    return root / "in"


def test_2023_is_linked_without_a_copy_and_time_points_stay_together(tmp_path):
    root, out = brats_2023_tree(tmp_path), tmp_path / "Dataset137_BraTS"
    assert convert_tree(Brats(), root, out, link="dataset-json", folds=2) == 0
    content = json.loads((out / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "t1n", "1": "t1c", "2": "t2w", "3": "t2f"}
    assert content["labels"] == {
        "background": 0, "whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": [3],
    }  # fmt: skip
    assert content["regions_class_order"] == [2, 1, 3]
    files = content["dataset"]["BraTS-GLI-00003-001"]
    assert [Path(name).name.split("-")[-1] for name in files["images"]] == [f"{name}.nii.gz" for name in NEW]
    assert all((out / name).is_file() for name in [*files["images"], files["label"]])
    assert not list(out.rglob("*.nii.gz"))
    splits = json.loads((out / "splits_final.json").read_text())
    visits = {"BraTS-GLI-00003-000", "BraTS-GLI-00003-001"}
    assert all(len(visits & set(split["val"])) in (0, 2) for split in splits)
    lines = report_lines(out)
    training = "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/BraTS-GLI-00000-000/"
    assert lines["file", f"{training}._BraTS-GLI-00000-000-seg.nii.gz", ""] == ("skipped", "junk")
    assert lines["file", "BraTS2023_2017_GLI_Mapping.xlsx", ""] == ("skipped", "unrecognized")
    assert lines["case", "BraTS-GLI-00001-000", ""] == ("ok", "")
    assert sum(kind == "file" for kind, _, _ in lines) == sum(path.is_file() for path in root.rglob("*"))
    assert check_data_set(out).problems == []


def test_2023_regions_give_back_the_published_values(tmp_path):
    """nnU-Net's own label manager turns region predictions into the challenge's 1, 2, 3."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    out = tmp_path / "Dataset137_BraTS"
    convert_tree(Brats(), brats_2023_tree(tmp_path), out)
    content = json.loads((out / "dataset.json").read_text())
    manager = LabelManager(content["labels"], content["regions_class_order"])
    published = np.asarray(nib.load(out / "labelsTr/BraTS-GLI-00000-000.nii.gz").dataobj).astype(int)
    regions = np.stack([np.isin(published, region) for region in manager.foreground_regions])
    np.testing.assert_array_equal(manager.convert_probabilities_to_segmentation(regions.astype(np.float32)), published)


def test_2021_enhancing_tumor_becomes_3_and_channels_keep_their_order(tmp_path):
    root, out = brats_2021_tree(tmp_path), tmp_path / "Dataset082_BraTS"
    assert convert_tree(Brats(labels="classes"), root, out) == 0
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "necrotic tumor core": 1, "edema": 2, "enhancing tumor": 3}
    assert "regions_class_order" not in content
    before = np.asarray(nib.load(root / "BraTS2021_Training_Data/BraTS2021_00001/BraTS2021_00001_seg.nii.gz").dataobj)
    after = np.asarray(nib.load(out / "labelsTr/BraTS2021_00001.nii.gz").dataobj)
    np.testing.assert_array_equal(after, np.where(before == 4, 3, before))
    for number, name in enumerate(OLD):
        original = root / f"BraTS2021_Training_Data/BraTS2021_00001/BraTS2021_00001_{name}.nii.gz"
        assert (out / f"imagesTr/BraTS2021_00001_{number:04d}.nii.gz").read_bytes() == original.read_bytes()


@pytest.mark.parametrize("key", ["BraTS-GLI-00005-100", "BraTS-GLI-00005-000"], ids=["by time point", "by folder"])
def test_2024_has_the_resection_cavity_as_a_region_of_its_own(tmp_path, key):
    folder = "training_data1_v2" if key.endswith("100") else "BraTS2024-GLI-TrainingData"
    write_visit(tmp_path / "in" / folder, key, (1, 2, 3, 4))
    out = tmp_path / "Dataset138_BraTS"
    assert convert_tree(Brats(), tmp_path / "in", out) == 0
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"]["resection cavity"] == [4] and content["regions_class_order"] == [2, 1, 3, 4]
    assert (out / "cases.csv").read_text().splitlines()[1].startswith(f"{key},BraTS-GLI-00005,train,")


def _refused(root: Path, message: str, **options: str) -> None:
    with pytest.raises(UsageError, match=message):
        convert_tree(Brats(**options), root, root.parent / "Dataset001_X")
    assert not (root.parent / "Dataset001_X").exists()


def test_label_4_in_2023_is_refused(tmp_path):
    root = brats_2023_tree(tmp_path)
    write_visit(root / "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData", "BraTS-GLI-00002-000", (1, 2, 4))
    _refused(root, "1 of 5 visits hold the label 4, which BraTS 2023 does not have .* BraTS-GLI-00002-000")


def test_label_3_in_2021_is_refused(tmp_path):
    root = brats_2021_tree(tmp_path)
    write_visit(root / "BraTS2021_Training_Data", "BraTS2021_00001", (1, 2, 3))
    _refused(root, "hold the label 3, which BraTS 2021 does not have")


def test_mixed_editions_are_refused_by_their_names(tmp_path):
    root = brats_2023_tree(tmp_path)
    brats_2021_tree(tmp_path)
    _refused(root, r"mixes editions .* 3 of BraTS 2021 \(first BraTS2021_00000\), 5 of BraTS 2023")
    shutil.rmtree(root / "BraTS2021_Training_Data")
    write_visit(root, "BraTS-GLI-00002-100", (1, 2, 3, 4))
    _refused(root, "mixes editions")
    _refused(root, "hold the label 4, which BraTS 2023", edition="2023")


def test_mixed_challenges_are_refused(tmp_path):
    root = brats_2023_tree(tmp_path)
    write_visit(root, "BraTS-MEN-00008-000")
    _refused(root, "mixes challenges: 5 visits of GLI, 1 visits of MEN")


@pytest.mark.parametrize(
    ("damage", "verdict"),
    [
        (lambda f: (f / "BraTS-GLI-00000-000-t1c.nii.gz").unlink(), ("failed", "missing-channel")),
        (lambda f: (f / "BraTS-GLI-00000-000-seg.nii.gz").unlink(), ("failed", "missing-label")),
        (lambda f: (f / "BraTS-GLI-00000-000-t1c.nii").write_bytes(b""), ("failed", "two-files")),
        (
            lambda f: write_label_map(f / "BraTS-GLI-00000-000-seg.nii.gz", SHAPE, (1, 6), AFFINE),
            ("failed", "unknown-label"),
        ),
        (lambda f: write_nifti_volume(f / "BraTS-GLI-00000-000-t1c.nii.gz", SHAPE), ("failed", "grids-differ")),
        (lambda f: (f / "BraTS-GLI-00000-000-seg.nii.gz").write_bytes(b"x"), ("failed", "damaged-data")),
        (lambda f: shutil.copytree(f, f.parents[1] / "again" / f.name), ("ok", "")),
    ],
    ids=["no t1c", "no seg", "nii and nii.gz", "label 6", "other grid", "damaged", "equal copy"],
)
def test_damaged_visit_costs_no_other(tmp_path, damage, verdict):
    root = brats_2023_tree(tmp_path)
    training = root / "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData"
    damage(training / "BraTS-GLI-00000-000")
    out = tmp_path / "Dataset137_BraTS"
    assert convert_tree(Brats(), root, out) == (0 if verdict[0] == "ok" else 3)
    lines = report_lines(out)
    path = training.relative_to(root).joinpath("BraTS-GLI-00000-000", "BraTS-GLI-00000-000-t2f.nii.gz").as_posix()
    assert lines["file", path, ""] == verdict
    assert lines["case", "BraTS-GLI-00002-000", ""] == ("ok", "")
    if verdict[0] == "ok":
        assert lines["file", "again/BraTS-GLI-00000-000/BraTS-GLI-00000-000-t2f.nii.gz", ""] == ("skipped", "duplicate")


def test_contradicting_copies_fail_both(tmp_path):
    root = brats_2023_tree(tmp_path)
    write_visit(root / "again", "BraTS-GLI-00000-000", seed=77)
    out = tmp_path / "Dataset137_BraTS"
    assert convert_tree(Brats(), root, out) == 3
    found = {
        verdict for (_, path, _), verdict in report_lines(out).items() if "00000-000-t1n" in path and "._" not in path
    }
    assert found == {("failed", "contradicting-copies")}


def test_wrong_folder_is_one_line_and_exit_2(tmp_path, capsys):
    write_bytes(tmp_path / "in" / "a.txt")
    assert main(["brats", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: the input holds no file of BraTS")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_brats_passes_nnunet_plan_and_preprocess(tmp_path):
    out = tmp_path / "raw" / "Dataset137_BraTS"
    convert_tree(Brats(), brats_2023_tree(tmp_path), out)
    assert set(nnunet_plans(out)["configurations"]) >= {"3d_fullres"}
