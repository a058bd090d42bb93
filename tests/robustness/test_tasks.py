"""Robustness of label maps and landmarks: what moves with the image, and what is counted."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_mamba.cli.main import main
from monai_mamba.errors import DatasetError
from monai_mamba.robustness.perturbations import PERTURBATIONS
from monai_mamba.robustness.run import measure_robustness
from monai_mamba.robustness.tasks import REFERENCE, LandmarkTask, SegmentationTask
from monai_mamba.training.samples import sample_dataset
from monai_mamba.training.trained import load_trained
from tests.html_reader import check_self_contained
from tests.trained_bundles import make_trained

SETTINGS = {"num_draws": 5, "device": "cpu"}


class Threshold(torch.nn.Module):
    """The background is what is dark, the second structure is never found."""

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), x - 4, torch.full_like(x, -9)], 1)


class Blurred(torch.nn.Module):
    """Every heat map is the blurred image: largest where the blob is."""

    def forward(self, x):
        return torch.nn.functional.avg_pool3d(x, 9, stride=1, padding=4).repeat(1, 3, 1, 1, 1)


def blob_volume(path, center, affine, size=(24, 36, 24)):
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    values = 100 + 900 * np.exp(-((grid - center) ** 2).sum(-1) / 18)
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), path)
    return values


@pytest.fixture
def oblique():
    # Axes that Orientationd has to flip, unequal voxels, no oblique angle: the turn about the slice axis stays a turn.
    return np.array([[-1.0, 0, 0, 30], [0, 1.0, 0, -12], [0, 0, 2.0, 5], [0, 0, 0, 1]])


@pytest.fixture
def volumes(tmp_path, oblique):
    """A data set of two volumes with a bright blob, its label map and its center."""
    data = tmp_path / "data"
    data.mkdir()
    cases = []
    for number, center in enumerate(([7, 25, 10], [16, 11, 13])):
        values = blob_volume(data / f"i{number}.nii.gz", np.array(center), oblique)
        nib.save(nib.Nifti1Image((values > 550).astype(np.uint8), oblique), data / f"l{number}.nii.gz")
        world = oblique[:3, :3] @ center + oblique[:3, 3]
        cases.append(
            {"case": f"c{number}", "image": f"i{number}.nii.gz", "center": world.tolist(), "label": f"l{number}.nii.gz"}
        )
    return data, cases


def write_list(data, cases, **description):
    (data / "datalist.json").write_text(json.dumps({**description, "test": cases}))
    return data


def segmentation_data(volumes):
    data, cases = volumes
    cases = [{key: case[key] for key in ("case", "image", "label")} for case in cases]
    return write_list(data, cases, labels={"background": 0, "anterior": 1, "posterior": 2})


def landmark_data(volumes, **change):
    data, cases = volumes
    names = ["anterior center", "posterior center", "border center"]
    cases = [{"case": c["case"], "image": c["image"], "landmarks": [c["center"], None, c["center"]]} for c in cases]
    return write_list(data, cases, landmark_names=change.get("names", names))


def with_network(bundle, network):
    trained = load_trained(bundle, device="cpu")
    object.__setattr__(trained, "network", network.eval())
    return trained


def change_all(task, reads, name, severity):
    pairs = zip(reads, task.cases, strict=True)
    return [task.change(read, case, PERTURBATIONS[name], severity, i) for i, (read, case) in enumerate(pairs)]


def test_label_maps_move_with_their_images(tmp_path, volumes):
    """A network that finds the blob wherever it is loses nothing by turns and shifts, if the references move too."""
    trained = with_network(make_trained("nnmamba_seg", tmp_path), Threshold())
    cases = trained.list_cases(segmentation_data(volumes))
    task = SegmentationTask(trained, cases)
    reads = [task.read(case) for case in cases]
    unchanged = task.measure(reads)
    assert (unchanged[:, 0] > 0.5).all() and np.isnan(unchanged[:, 1]).all()
    for name in ("rotation", "translation"):
        changed = [
            task.change(r, c, PERTURBATIONS[name], 5, i) for i, (r, c) in enumerate(zip(reads, cases, strict=True))
        ]
        np.testing.assert_allclose(task.measure(changed)[:, 0], unchanged[:, 0], atol=0.1)
        stale = [{**after, REFERENCE: before[REFERENCE]} for after, before in zip(changed, reads, strict=True)]
        assert (task.measure(stale)[:, 0] < unchanged[:, 0] - 0.2).all(), name
    assert task.scores(unchanged)(np.arange(2))["dice"] == pytest.approx(unchanged[:, 0].mean())


def test_landmarks_move_with_their_images_and_leave_with_them(tmp_path, volumes):
    bundle = make_trained("nnmamba_landmark", tmp_path, image_size=[24, 36, 24], window=3)
    trained = with_network(bundle, Blurred())
    cases = trained.list_cases(landmark_data(volumes))
    task = LandmarkTask(trained, cases)
    reads = [task.read(case) for case in cases]
    assert np.nanmax(task.measure(reads)) < 0.6  # mm
    for name in ("rotation", "translation", "noise"):
        changed = [
            task.change(r, c, PERTURBATIONS[name], 2, i) for i, (r, c) in enumerate(zip(reads, cases, strict=True))
        ]
        errors = task.measure(changed)
        assert np.isnan(errors[:, 1]).all() and np.nanmax(errors) < 1.2, name
    assert set(task.scores(errors)(np.arange(2))) == set(task.metrics)
    reads[0][REFERENCE][0] = reads[0]["image"].affine.numpy()[:3, 3]  # the corner voxel
    turned = task.change(reads[0], cases[0], PERTURBATIONS["rotation"], 5, 0)
    assert np.isnan(turned[REFERENCE][0]).all()


def test_segmentation_is_measured_and_shown_in_its_report(tmp_path, capsys):
    bundle = make_trained("nnmamba_seg", tmp_path, patch_size=[32, 48, 32])
    data = sample_dataset("hippocampus", tmp_path)
    arguments = ["robustness", data, "-m", str(bundle), "-o", str(tmp_path / "out"), "--limit", "2", "--draws", "5"]
    assert main([*arguments, "-p", "rotation"]) == 0
    assert "Dice of 2 cases, as they are" in capsys.readouterr().out
    with open(tmp_path / "out" / "robustness.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} == {"dice", "dice_anterior", "dice_posterior"}
    assert len(rows) == 3 * (1 + 5)
    summary = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert (summary["task"], summary["targets"]) == ("segmentation", ["anterior", "posterior"])
    labels = tmp_path / "hippocampus" / "labels"
    (labels / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "anterior": 1, "posterior": 2}}))
    evaluate = ["evaluate", str(labels), "-r", str(labels), "--draws", "5", "--robustness", str(tmp_path / "out")]
    for path in sorted(labels.glob("*.nii.gz"))[2:]:
        path.unlink()
    assert main([*evaluate, "-o", str(tmp_path / "evaluated")]) == 0
    reader = check_self_contained((tmp_path / "evaluated" / "report.html").read_text())
    assert "Dice of 2 cases as they are" in reader.text and "rotation" in reader.text


def test_landmarks_are_measured_and_repeat_themselves(tmp_path):
    bundle = make_trained("nnmamba_landmark", tmp_path)
    data = sample_dataset("hippocampus_landmarks", tmp_path)
    first, second = (
        measure_robustness(bundle, data, tmp_path / name, names=["translation"], limit=1, **SETTINGS) for name in "ab"
    )
    assert first["perturbations"] == second["perturbations"]
    assert first["primary"] == "mre_mm" and "mre_mm_border center" in first["unchanged"]
    level = first["perturbations"]["translation"]["levels"][4]
    assert level["change"]["mre_mm"]["value"] != 0


def test_references_that_do_not_fit_are_refused(tmp_path, volumes, oblique):
    segmentation = make_trained("nnmamba_seg", tmp_path)
    data = segmentation_data(volumes)
    shifted = oblique.copy()
    shifted[0, 3] += 2
    nib.save(nib.Nifti1Image(np.zeros((24, 36, 24), np.uint8), shifted), data / "l1.nii.gz")
    landmarks = make_trained("nnmamba_landmark", tmp_path)

    def fails(bundle, reason):
        with pytest.raises(DatasetError, match=reason):
            measure_robustness(bundle, data, tmp_path / "out", names=["noise"], **SETTINGS)
        assert not (tmp_path / "out").exists()

    fails(segmentation, "case c1: .*l1.nii.gz: lies up to 2 mm away from its image")
    (data / "l1.nii.gz").write_bytes(b"")
    fails(segmentation, "l1.nii.gz: cannot be read as a label map")
    fails(landmarks, "`landmark_names` must be a list of names")
    landmark_data(volumes, names=["a", "b", "c"])
    fails(landmarks, "has the landmarks a, b, c, the model in .* was trained for anterior center")
    landmark_data(volumes)
    fails(segmentation, "`classes` must be a list of names")
