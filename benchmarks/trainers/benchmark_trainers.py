"""Trainer classes of the benchmarks that run nnU-Net; nnU-Net finds them here by ``nnUNet_extTrainer``.

Each is the trainer it is named after. What is added: the length of the run from the environment, for nnU-Net's own
trainer as for ours, the number of threads, and a file with what only the process itself can measure.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_trainers.MedMambaTrainer import MedMambaTrainer
from nnunet_trainers.nnMambaTrainer import (
    nnMambaTrainer,
    nnMambaTrainerBatchNorm,
    nnMambaTrainerNoSSM,
    nnMambaTrainerPublishedNetwork,
)

MEASURED_FILE = "measured.json"


def _from_environment(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


class _Measured(nnUNetTrainer):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.device.type == "cpu":
            # nnU-Net takes every core, whatever the environment says.
            torch.set_num_threads(_from_environment("OMP_NUM_THREADS", torch.get_num_threads()))
        self.num_epochs = _from_environment("MONAI_MAMBA_EPOCHS", self.num_epochs)
        if os.environ.get("MONAI_MAMBA_ITERATIONS"):
            self.num_iterations_per_epoch = int(os.environ["MONAI_MAMBA_ITERATIONS"])
            self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // 10)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        if os.environ.get("BENCHMARK_NO_MIRRORING"):
            self.inference_allowed_mirroring_axes = None
        super().perform_actual_validation(save_probabilities)

    def on_train_end(self) -> None:
        super().on_train_end()
        log = self.logger.get_checkpoint()
        on_gpu = self.device.type == "cuda"
        measured = {
            "epochs": self.num_epochs,
            "iterations_per_epoch": self.num_iterations_per_epoch,
            "batch_size": self.batch_size,
            "epoch_seconds": [
                round(end - start, 2)
                for start, end in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)
            ],
            "train_losses": [round(float(loss), 4) for loss in log["train_losses"]],
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "peak_cuda_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        }
        Path(self.output_folder, MEASURED_FILE).write_text(json.dumps(measured) + "\n")


class BenchmarkNNUNet(_Measured):
    """nnU-Net's own network and recipe."""


class BenchmarkNNMamba(_Measured, nnMambaTrainer):
    """nnMambaTrainer."""


class BenchmarkNNMambaBatchNorm(_Measured, nnMambaTrainerBatchNorm):
    """nnMambaTrainerBatchNorm."""


class BenchmarkNNMambaPublishedNetwork(_Measured, nnMambaTrainerPublishedNetwork):
    """nnMambaTrainerPublishedNetwork."""


class BenchmarkNNMambaNoSSM(_Measured, nnMambaTrainerNoSSM):
    """nnMambaTrainerNoSSM."""


class BenchmarkMedMamba(_Measured, MedMambaTrainer):
    """MedMambaTrainer."""
