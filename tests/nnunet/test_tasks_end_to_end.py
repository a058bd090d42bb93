"""The commands of docs/nnunet.md for landmarks and classes, and slices, through the unmodified nnU-Net."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from tests.nnunet.conftest import NNUNetFolders, write_sphere_case
from tests.nnunet.test_end_to_end import needs_nnunet_search
from tests.nnunet.test_landmarks import centers_of_spheres

PAGE = Path(__file__).parents[2] / "docs" / "nnunet.md"
SHORT = {"MONAI_MAMBA_EPOCHS": "1", "MONAI_MAMBA_ITERATIONS": "2"}
pytestmark = [pytest.mark.slow, needs_nnunet_search]


def commands_of(section):
    """The indented lines of a section of the page."""
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def raw_data_set(root, number, name, channels=1):
    """Six training cases and a test case of two balls, without label maps."""
    folders = NamedFolders(root, number, name)
    for index in range(7):
        write_sphere_case(folders.raw, f"case_{index}", index, with_label=index < 6)
        for channel in range(1, channels):
            for path in folders.raw.glob(f"images*/case_{index}_0000.nii.gz"):
                shutil.copy(path, path.with_name(f"case_{index}_{channel:04d}.nii.gz"))
    (folders.raw / "dataset.json").write_text(
        json.dumps({"channel_names": {str(i): "MRI" for i in range(channels)}, "file_ending": ".nii.gz"})
    )
    return folders


class NamedFolders(NNUNetFolders):
    def __init__(self, root, number, name):
        super().__init__(root)
        self._name = f"Dataset{number}_{name}"

    @property
    def dataset_name(self):
        return self._name


def run_page(folders, section, output):
    """Run the section's commands as they stand, but on a CPU, short, and with the variant of half the width."""
    results = []
    for line in commands_of(section):
        command = line.replace("IMAGES", str(folders.raw / "imagesTs")).replace("OUT", str(output))
        if "Trainer" in command:
            command = command.replace("Trainer", "TrainerQuick") + " -device cpu"
        extra = SHORT | {"nnUNet_n_proc_DA": "1" if "plan" in line else "0"}
        if line.startswith("nnUNetv2_predict"):
            command += " -npp 1 -nps 1"
        if "plan" in line:
            command += " -np 1 -npfp 1"
        results.append(folders.run(*command.split(), **extra))
    return results


def continue_to_second_epoch(folders, number, configuration, trainer):
    fold = folders.results / f"{trainer}__nnUNetPlans__{configuration}" / "fold_0"
    shutil.move(fold / "checkpoint_final.pth", fold / "checkpoint_latest.pth")
    folders.run(
        *f"nnUNetv2_train {number} {configuration} 0 -tr {trainer} -device cpu --c".split(),
        **SHORT | {"MONAI_MAMBA_EPOCHS": "2"},
    )
    final = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert final["current_epoch"] == 2 and len(final["logging"]["train_losses"]) == 2
    return fold


def test_landmarks_from_json_alone(tmp_path):
    folders = raw_data_set(tmp_path, 502, "Landmarks")
    centers = centers_of_spheres(folders)
    shutil.rmtree(folders.raw / "labelsTr")
    cases = {name: {"landmarks": points.tolist()} for name, points in centers.items()}
    (folders.raw / "landmarks.json").write_text(json.dumps({"landmark_names": ["left", "right"], "cases": cases}))
    run_page(folders, "Landmarks", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "landmarks.csv").open()))
    assert [(row["case"], row["landmark"]) for row in rows] == [("case_6", "left"), ("case_6", "right")]
    image = sitk.ReadImage(str(folders.raw / "imagesTs" / "case_6_0000.nii.gz"))
    for row in rows:  # a network after two steps finds nothing, but what it finds lies in the image
        x, y, z = (float(row[f"{axis}_mm"]) for axis in "xyz")
        index = np.array(image.TransformPhysicalPointToContinuousIndex((-x, -y, z)))
        assert (index > -0.6).all() and (index < np.array(image.GetSize()) - 0.4).all()
    markup = json.loads((tmp_path / "out" / "case_6.mrk.json").read_text())["markups"][0]
    assert [point["label"] for point in markup["controlPoints"]] == ["left", "right"]
    label = sitk.ReadImage(str(tmp_path / "out" / "case_6.nii.gz"))
    assert label.GetSize() == image.GetSize()
    fold = continue_to_second_epoch(folders, 502, "3d_fullres", "nnMambaLandmarkTrainerQuick")
    assert json.loads((fold / "validation" / "metrics.json").read_text())["metrics"]["mre_mm"]["value"] > 0
    wrong = folders.run(
        *f"monai-mamba nnunet predict-classes -i {folders.raw}/imagesTs -o {tmp_path}/x -d 502".split(),
        *"-c 3d_fullres -f 0 -tr nnMambaLandmarkTrainerQuick -device cpu".split(),
        check=False,
    )
    assert wrong.returncode and "was trained by nnMambaLandmarkTrainerQuick" in wrong.stderr
    assert not (tmp_path / "x").exists()


def test_classes_without_label_maps(tmp_path):
    folders = raw_data_set(tmp_path, 503, "Classes")
    shutil.rmtree(folders.raw / "labelsTr")
    cases = {f"case_{i}": ["thin", "thick"][i % 2] for i in range(6)}
    (folders.raw / "classes.json").write_text(json.dumps({"classes": ["thin", "thick"], "cases": cases}))
    (folders.raw / "imagesTs" / "broken_0000.nii.gz").write_bytes(b"no image")
    for line in commands_of("Classification"):
        assert line.split()[0] in ("monai-mamba", "nnUNetv2_plan_and_preprocess", "nnUNetv2_train")
    with pytest.raises(pytest.fail.Exception, match="broken: failed: "):
        run_page(folders, "Classification", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "probabilities.csv").open()))
    assert [row["case"] for row in rows] == ["case_6"]
    assert float(rows[0]["prob_thin"]) + float(rows[0]["prob_thick"]) == pytest.approx(1, abs=1e-5)
    fold = continue_to_second_epoch(folders, 503, "3d_fullres", "nnMambaClassifierTrainerQuick")
    evaluated = folders.run(
        *f"monai-mamba evaluate {fold}/validation/probabilities.csv -o {tmp_path}/metrics".split(), check=False
    )
    assert evaluated.returncode == 0, evaluated.stderr
    stock = folders.run(
        *f"nnUNetv2_predict -i {folders.raw}/imagesTr -o {tmp_path}/stock -d 503 -c 3d_fullres -f 0".split(),
        *"-tr nnMambaClassifierTrainerQuick -device cpu -npp 1 -nps 1".split(),
        check=False,
    )
    assert stock.returncode and "predict-classes" in stock.stderr


@pytest.mark.parametrize(("trainer", "channels"), [("MedMambaTrainer", 1), ("XFMambaTrainer", 2)])
def test_encoders_of_slices_train_continue_and_predict(tmp_path, trainer, channels):
    folders = raw_data_set(tmp_path, 504, "Slices", channels)
    dataset_json = json.loads((folders.raw / "dataset.json").read_text())
    dataset_json |= {"labels": {"background": 0, "left": 1, "right": 2}, "numTraining": 6}
    (folders.raw / "dataset.json").write_text(json.dumps(dataset_json))
    folders.run(*"nnUNetv2_plan_and_preprocess -d 504 -c 2d -np 1 -npfp 1".split(), nnUNet_n_proc_DA="1")
    plans = json.loads((folders.preprocessed / "nnUNetPlans.json").read_text())
    plans["configurations"]["2d"]["batch_size"] = 2
    (folders.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    short = SHORT | {"MONAI_MAMBA_ITERATIONS": "1"}
    folders.run(*f"nnUNetv2_train 504 2d 0 -tr {trainer} -device cpu".split(), **short)
    continue_to_second_epoch(folders, 504, "2d", trainer)
    folders.run(
        *f"nnUNetv2_predict -i {folders.raw}/imagesTs -o {tmp_path}/out -d 504 -c 2d -f 0 -tr {trainer}".split(),
        *"-device cpu -npp 1 -nps 1 --disable_tta".split(),
    )
    assert sitk.ReadImage(f"{tmp_path}/out/case_6.nii.gz").GetSize() == (36, 40, 18)
