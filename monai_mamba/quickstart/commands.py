"""The nnU-Net commands of a run: what is executed, and what a user types to do the same."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CONFIGURATION = "3d_fullres"
PLANS = "nnUNetPlans"
FOLD = "0"

_PLAN = (
    "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry as run; run()"
)


@dataclass(frozen=True)
class NnunetJob:
    """Where nnU-Net works and with what.

    Attributes:
        root: folder with nnU-Net's three folders.
        dataset_id, dataset_name: as in ``Dataset001_Hippocampus``.
        trainer: name of the trainer class.
        epochs: number of epochs, or None for the trainer's own.
        device: ``cpu``, ``cuda`` or ``mps``.
        seed: seed of weights, sampling and augmentation.
    """

    root: Path
    dataset_id: int
    dataset_name: str
    trainer: str
    epochs: int | None
    device: str
    seed: int

    @property
    def dataset_folder(self) -> str:
        return f"Dataset{self.dataset_id:03d}_{self.dataset_name}"

    @property
    def raw(self) -> Path:
        return self.root / "raw" / self.dataset_folder

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed" / self.dataset_folder

    @property
    def results(self) -> Path:
        """Folder of the trained model, as nnU-Net names it."""
        name = f"{self.trainer}__{PLANS}__{CONFIGURATION}"
        return self.root / "results" / self.dataset_folder / name / f"fold_{FOLD}"

    @property
    def predictions(self) -> Path:
        return self.root / "predictions"

    def environment(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Environment of the commands: the three folders, and few worker processes unless the user wants more.

        Each worker of nnU-Net imports torch anew, which on a small machine takes longer than its work.
        """
        return {
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "0",
            **base,
            "nnUNet_raw": str(self.root / "raw"),
            "nnUNet_preprocessed": str(self.root / "preprocessed"),
            "nnUNet_results": str(self.root / "results"),
        }

    def plan_environment(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """As :meth:`environment`; the planner takes the augmenters for its number of threads: not 0."""
        environment = self.environment(base)
        if environment["nnUNet_n_proc_DA"] == "0":
            environment["nnUNet_n_proc_DA"] = str(max(1, (os.cpu_count() or 1) // 2))
        return environment

    def plan_command(self) -> list[str]:
        # The data has been checked more strictly than by --verify_dataset_integrity, which costs a worker's start.
        return [
            sys.executable, "-c", _PLAN, "-d", str(self.dataset_id), "-c", CONFIGURATION, "-np", "1", "-npfp", "1",
        ]  # fmt: skip

    def train_command(self) -> list[str]:
        # --c continues from the last checkpoint and begins anew where there is none.
        length = [] if self.epochs is None else ["--epochs", str(self.epochs)]
        return [
            sys.executable, "-m", "monai_mamba", "nnunet", "train", *length, "--seed", str(self.seed),
            str(self.dataset_id), CONFIGURATION, FOLD, "-tr", self.trainer, "-device", self.device, "--c",
        ]  # fmt: skip

    def predict_command(self) -> list[str]:
        return [
            sys.executable, "-m", "monai_mamba", "nnunet", "predict", "-i", str(self.raw / "imagesTs"),
            "-o", str(self.predictions), "-d", str(self.dataset_id), "-c", CONFIGURATION, "-f", FOLD,
            "-tr", self.trainer, "-device", self.device, "-npp", "1", "-nps", "1",
        ]  # fmt: skip


def commands_for_own_data(trainer: str = "nnMambaTrainer") -> str:
    """Shell lines that train on a data set in nnU-Net's raw layout, for the report."""
    return f"""\
export nnUNet_raw=/data/nnUNet_raw nnUNet_preprocessed=/data/nnUNet_preprocessed nnUNet_results=/data/nnUNet_results
# Put your data into $nnUNet_raw/Dataset123_Name/{{imagesTr,labelsTr,dataset.json}}
nnUNetv2_plan_and_preprocess -d 123 -c {CONFIGURATION} --verify_dataset_integrity
nnUNetv2_train 123 {CONFIGURATION} 0 -tr {trainer}        # and folds 1 to 4
nnUNetv2_predict -i IMAGES -o PREDICTIONS -d 123 -c {CONFIGURATION} -f 0 -tr {trainer}
"""
