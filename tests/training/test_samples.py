"""The samples: sizes, labels, landmarks on the structures they are made from."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from monai_mamba.heat_maps import world_to_voxel
from monai_mamba.quickstart.dataset import PACKAGED_DATASET
from monai_mamba.training.datalist import landmark_names, load_cases, structure_names
from monai_mamba.training.samples import is_sample, sample_dataset


def test_same_organ_depends_on_both_views_and_on_neither_alone(tmp_path):
    folder = Path(sample_dataset("same_organ", tmp_path))
    manifest = json.loads((folder / "datalist.json").read_text())
    for section, pairs in (("training", 512), ("validation", 128), ("test", 256)):
        labels = np.array([case["label"] for case in manifest[section]])
        kinds = np.arange(pairs)
        assert len(labels) == pairs
        np.testing.assert_array_equal(labels, kinds % 2 ^ kinds // 2 % 2)
        for view in (kinds % 2, kinds // 2 % 2):
            assert [labels[view == kind].mean() for kind in (0, 1)] == [0.5, 0.5]


def test_hippocampus_sample_is_the_packaged_one_and_splits_by_crop(tmp_path):
    folder = sample_dataset("hippocampus", tmp_path)
    assert structure_names(folder) == ["background", "anterior", "posterior"]
    sections = {s: load_cases(folder, s) for s in ("training", "validation", "test")}
    assert {s: len(cases) for s, cases in sections.items()} == {"training": 12, "validation": 4, "test": 8}
    held_out = json.loads((PACKAGED_DATASET / "dataset.json").read_text())["held_out"]
    assert sorted(case["case"] for case in sections["test"]) == sorted(held_out)


def test_landmarks_lie_where_the_label_maps_say(tmp_path):
    folder = sample_dataset("hippocampus_landmarks", tmp_path)
    assert landmark_names(folder) == ["anterior center", "posterior center", "border center"]
    missing = 0
    for case in load_cases(folder, "training")[::7]:
        label = nib.load(PACKAGED_DATASET / "labelsTr" / f"{case['patient']}.nii.gz")
        window = nib.load(case["image"])
        assert window.shape == (24, 36, 24)
        image = nib.load(PACKAGED_DATASET / "imagesTr" / f"{case['patient']}.nii.gz")
        start = np.rint(world_to_voxel(window.affine[:3, 3], image.affine)).astype(int)
        block = tuple(slice(s, s + n) for s, n in zip(start, window.shape, strict=True))
        np.testing.assert_array_equal(np.asarray(window.dataobj), np.asarray(image.dataobj)[block])
        values = np.asarray(label.dataobj)
        for value, found in ((1, case["landmarks"][0]), (2, case["landmarks"][1])):
            center = np.argwhere(values == value).mean(0)
            inside = ((center >= start) & (center <= start + np.array(window.shape) - 1)).all()
            assert inside != np.isnan(found).any()
            missing += not inside
            if inside:
                np.testing.assert_allclose(world_to_voxel(found, label.affine), center, atol=1e-2)
    border = world_to_voxel(load_cases(folder, "training")[0]["landmarks"], window.affine)
    assert np.isfinite(border).any()


def test_two_view_sample_is_the_two_halves_of_the_sample(tmp_path):
    whole, halves = (sample_dataset(name, tmp_path) for name in ("breastmnist", "breastmnist_two_view"))
    assert is_sample(whole)
    manifest = json.loads((tmp_path / "breastmnist_two_view" / "datalist.json").read_text())
    assert {s: len(manifest[s]) for s in ("training", "validation", "test")} == {
        "training": 546,
        "validation": 78,
        "test": 156,
    }
    case = manifest["training"][5]
    left, right = (np.asarray(Image.open(f"{halves}/{case[key]}")) for key in ("image1", "image2"))
    image = np.asarray(Image.open(f"{whole}/images/train_0005.png"))
    np.testing.assert_array_equal(np.hstack([left, right[:, ::-1]]), image)
    assert sample_dataset("breastmnist", tmp_path) == whole


def test_hippocampus_sample_has_both_classes_in_every_section(tmp_path):
    manifest = json.loads((Path(sample_dataset("hippocampus_size", tmp_path)) / "datalist.json").read_text())
    labels = {section: [case["label"] for case in manifest[section]] for section in ("training", "validation", "test")}
    assert {section: len(values) for section, values in labels.items()} == {"training": 12, "validation": 4, "test": 8}
    assert sum(labels["training"]) == 6
    assert all(set(values) == {0, 1} for values in labels.values())
