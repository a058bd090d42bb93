"""All of nnU-Net's configurations and commands around training, by its own commands, on tiny data sets (slow)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from tests.nnunet.conftest import DATASET_ID, NNUNetFolders, write_sphere_case
from tests.nnunet.test_end_to_end import SHORT, assert_is_prediction, needs_nnunet_search

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), needs_nnunet_search]

TRAINER = "nnMambaTrainerQuickNoSSM"
FEW = {**SHORT, "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}
PREDICT = "-device cpu -npp 1 -nps 1"


class Models:
    """Two folds of 2d and 3d_fullres with probabilities, trained once by the stock command."""

    def __init__(self, folders: NNUNetFolders, results: Path) -> None:
        self.folders = folders
        self.results = results
        for configuration in ("2d", "3d_fullres"):
            for fold in (0, 1):
                self.run(f"nnUNetv2_train {DATASET_ID} {configuration} {fold} -tr {TRAINER} --npz -device cpu")

    def run(self, command: str, check: bool = True, **environment: str):
        return self.folders.run(
            *command.split(), check=check, timeout=1800, **{**FEW, "nnUNet_results": str(self.results), **environment}
        )

    def model(self, configuration: str, plans: str = "nnUNetPlans", trainer: str = TRAINER) -> Path:
        return self.results / self.folders.dataset_name / f"{trainer}__{plans}__{configuration}"

    @property
    def images(self) -> Path:
        return self.folders.raw / "imagesTs"

    def assert_predicted(self, output: Path) -> None:
        assert_is_prediction(output / "case_6.nii.gz", self.images / "case_6_0000.nii.gz")


@pytest.fixture(scope="module")
def models(planned, tmp_path_factory) -> Models:
    return Models(planned, tmp_path_factory.mktemp("results"))


def test_folds_best_configuration_ensemble_and_postprocessing(models, tmp_path):
    assert list(models.model("2d").glob("fold_0/validation/*.npz"))
    models.run(f"nnUNetv2_find_best_configuration {DATASET_ID} -c 2d 3d_fullres -tr {TRAINER} -f 0 1 -np 1")
    found = json.loads((models.results / models.folders.dataset_name / "inference_information.json").read_text())
    assert len(found["all_results"]) == 3, "both configurations and their ensemble"
    best = found["best_model_or_ensemble"]
    for configuration in ("2d", "3d_fullres"):
        models.run(
            f"nnUNetv2_predict -i {models.images} -o {tmp_path / configuration} -d {DATASET_ID} -c {configuration} "
            f"-f 0 1 -tr {TRAINER} --save_probabilities {PREDICT}"
        )
    models.run(f"nnUNetv2_ensemble -i {tmp_path / '2d'} {tmp_path / '3d_fullres'} -o {tmp_path / 'both'} -np 1")
    models.assert_predicted(tmp_path / "both")
    models.run(
        f"nnUNetv2_apply_postprocessing -i {tmp_path / 'both'} -o {tmp_path / 'final'} -np 1 "
        f"-pp_pkl_file {best['postprocessing_file']} -plans_json {best['some_plans_file']}"
    )
    models.assert_predicted(tmp_path / "final")


def test_model_leaves_in_a_zip_and_predicts_elsewhere(models, tmp_path):
    models.run(f"nnUNetv2_export_model_to_zip -d {DATASET_ID} -o {tmp_path / 'model.zip'} -c 2d -f 0 1 -tr {TRAINER}")
    other = {"nnUNet_results": str(tmp_path / "elsewhere")}
    models.run(f"nnUNetv2_install_pretrained_model_from_zip {tmp_path / 'model.zip'}", **other)
    models.run(
        f"nnUNetv2_predict -i {models.images} -o {tmp_path / 'out'} -d {DATASET_ID} -c 2d -f 0 1 -tr {TRAINER} "
        f"{PREDICT} --disable_tta",
        **other,
    )
    models.assert_predicted(tmp_path / "out")


def test_validation_alone_and_continuing_a_finished_run(models):
    summary = models.model("2d") / "fold_0" / "validation" / "summary.json"
    before = summary.read_bytes()
    summary.unlink()
    models.run(f"nnUNetv2_train {DATASET_ID} 2d 0 -tr {TRAINER} --val -device cpu")
    assert json.loads(summary.read_text())["foreground_mean"] == json.loads(before)["foreground_mean"]
    continued = models.run(f"nnUNetv2_train {DATASET_ID} 2d 0 -tr {TRAINER} --c -device cpu")
    assert "Epoch 0" not in continued.stdout and "Mean Validation Dice" in continued.stdout


def test_fold_all_starts_from_pretrained_weights(models):
    pretrained = models.model("2d") / "fold_1" / "checkpoint_final.pth"
    done = models.run(
        f"nnUNetv2_train {DATASET_ID} 2d all -tr {TRAINER} -pretrained_weights {pretrained} -device cpu",
        MONAI_MAMBA_ITERATIONS="1",
    )
    assert "Loading pretrained weights" in done.stdout
    source, target = (
        torch.load(path, map_location="cpu", weights_only=False)["network_weights"]
        for path in (pretrained, models.model("2d") / "fold_all" / "checkpoint_final.pth")
    )
    key = "encoder.stages.0.blocks.0.conv1.weight"
    # One step of AdamW moves a weight by the learning rate at most.
    assert (source[key] - target[key]).abs().max() < 3e-3


def test_low_resolution_and_cascade(models, tmp_path):
    plans = json.loads((models.folders.preprocessed / "nnUNetPlans.json").read_text())
    plans["plans_name"] = "cascadePlans"
    full = plans["configurations"]["3d_fullres"]
    low = json.loads(json.dumps(full))
    low["spacing"] = [s * f for s, f in zip(full["spacing"], (1, 2, 2), strict=True)]
    low["patch_size"] = [16, 24, 24]
    low["median_image_size_in_voxels"] = [18, 20, 18]
    low |= {"data_identifier": "cascadePlans_3d_lowres", "next_stage": "3d_cascade_fullres", "batch_dice": False}
    plans["configurations"]["3d_lowres"] = low
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (models.folders.preprocessed / "cascadePlans.json").write_text(json.dumps(plans))
    models.run(f"nnUNetv2_preprocess -d {DATASET_ID} -plans_name cascadePlans -c 3d_lowres -np 1")
    # Fold `all`: the next stage needs the low resolution's prediction of every case.
    models.run(f"nnUNetv2_train {DATASET_ID} 3d_lowres all -tr {TRAINER} -p cascadePlans -device cpu")
    handed_on = models.model("3d_lowres", "cascadePlans") / "predicted_next_stage" / "3d_cascade_fullres"
    assert len({path.name.split(".")[0] for path in handed_on.iterdir()}) == 6
    models.run(f"nnUNetv2_train {DATASET_ID} 3d_cascade_fullres all -tr {TRAINER} -p cascadePlans -device cpu")
    weights = torch.load(
        models.model("3d_cascade_fullres", "cascadePlans") / "fold_all" / "checkpoint_final.pth",
        map_location="cpu",
        weights_only=False,
    )["network_weights"]
    assert weights["encoder.stem.conv1.weight"].shape[1] == 3, "the image and one map for each of two structures"
    common = f"-d {DATASET_ID} -f all -tr {TRAINER} -p cascadePlans {PREDICT} --disable_tta"
    models.run(f"nnUNetv2_predict -i {models.images} -o {tmp_path / 'low'} -c 3d_lowres {common}")
    models.run(
        f"nnUNetv2_predict -i {models.images} -o {tmp_path / 'cascade'} -c 3d_cascade_fullres {common} "
        f"-prev_stage_predictions {tmp_path / 'low'}"
    )
    models.assert_predicted(tmp_path / "cascade")


def test_regions_and_ignore_label(tmp_path):
    class Folders(NNUNetFolders):
        @property
        def dataset_name(self) -> str:
            return "Dataset502_Regions"

    folders = Folders(tmp_path)
    for index in range(5):
        write_sphere_case(folders.raw, f"case_{index}", index, with_label=True)
        path = folders.raw / "labelsTr" / f"case_{index}.nii.gz"
        image = sitk.ReadImage(str(path))
        label = sitk.GetArrayFromImage(image)
        label[:4] = 3  # a part that nobody has labelled
        changed = sitk.GetImageFromArray(label)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(path))
    write_sphere_case(folders.raw, "case_6", 6, with_label=False)
    (folders.raw / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "MRI"},
                "labels": {"background": 0, "both": [1, 2], "right": [2], "ignore": 3},
                "regions_class_order": [1, 2],
                "numTraining": 5,
                "file_ending": ".nii.gz",
            }
        )
    )
    folders.run(
        *"nnUNetv2_plan_and_preprocess -d 502 -c 2d -np 1 -npfp 1 --verify_dataset_integrity".split(),
        nnUNet_n_proc_DA="1",
    )
    folders.run(*f"nnUNetv2_train 502 2d 0 -tr {TRAINER} -device cpu".split(), **FEW)
    fold = folders.results / f"{TRAINER}__nnUNetPlans__2d" / "fold_0"
    checkpoint = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert checkpoint["network_weights"]["decoder.seg_layers.1.bias"].shape == (2,), "one output per region"
    assert all(np.isfinite(checkpoint["logging"]["train_losses"]))
    folders.run(
        *f"nnUNetv2_predict -i {folders.raw}/imagesTs -o {tmp_path / 'out'} -d 502 -c 2d -f 0 -tr {TRAINER}".split(),
        *PREDICT.split(),
        **FEW,
    )
    assert_is_prediction(tmp_path / "out" / "case_6.nii.gz", folders.raw / "imagesTs" / "case_6_0000.nii.gz")


def test_stock_trainer_trains_and_predicts_by_our_plans(models, tmp_path):
    models.run(
        f"monai-mamba nnunet plan -d {DATASET_ID} --gpu-memory 0.5 --precision float32 --plans-name routePlans -c 2d"
    )
    # nnU-Net's own trainer, only shorter.
    (tmp_path / "short_stock_trainer.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class ShortStockTrainer(nnUNetTrainer):\n"
        "    def __init__(self, plans, configuration, fold, dataset_json, device=None):\n"
        "        super().__init__(plans, configuration, fold, dataset_json, device)\n"
        "        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1\n"
    )
    found = {"nnUNet_extTrainer": str(tmp_path)}
    models.run(f"nnUNetv2_train {DATASET_ID} 2d 0 -tr ShortStockTrainer -p routePlans -device cpu", **found)
    assert (models.model("2d", "routePlans", "ShortStockTrainer") / "fold_0" / "checkpoint_final.pth").exists()
    models.run(
        f"nnUNetv2_predict -i {models.images} -o {tmp_path / 'out'} -d {DATASET_ID} -c 2d -f 0 "
        f"-tr ShortStockTrainer -p routePlans {PREDICT} --disable_tta",
        **found,
    )
    models.assert_predicted(tmp_path / "out")
