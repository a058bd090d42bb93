"""What the trainers for other tasks than segmentation share: data loading and progress by a metric of their own."""

from __future__ import annotations

import os
from pathlib import Path
from time import time
from typing import Any, ClassVar

import matplotlib
import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import distributed

from monai_mamba.nnunet.task_data import TaskDataLoader
from monai_mamba.nnunet.trainer import MambaTrainer

#: Where a plans file carries what the network of another task needs, from training to prediction.
PLANS_KEY = "monai_mamba"


class TaskTrainer(MambaTrainer):
    """Trains a network whose target is no label map, inside nnU-Net's loop, folds and folders.

    nnU-Net keeps the best checkpoint by a moving average of its pseudo Dice. Here that place is taken by a score that
    grows when the metric gets better; the log and ``progress.png`` show the metric itself.

    Attributes:
        metric: name and unit of the metric.
        is_better_when_lower: of the metric.
    """

    metric: ClassVar[str]
    is_better_when_lower: ClassVar[bool] = False
    dataset_class: Any  # set by nnU-Net's constructor
    with_deep_supervision = False

    def annotation_folders(self) -> list[Path]:
        """Folders that may hold what the cases are annotated with: of the preprocessed and of the raw data set."""
        folders = [Path(self.preprocessed_dataset_folder_base)]
        if nnUNet_raw.is_set():
            folders.append(Path(join(nnUNet_raw, self.plans_manager.dataset_name)))
        return folders

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, is_dummy_2d, initial_patch_size, _ = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        # A mirrored left is a right: neither landmarks nor classes may be assumed to be symmetric.
        self.inference_allowed_mirroring_axes = None
        return rotation, is_dummy_2d, initial_patch_size, ()

    def make_loader(self, dataset: Any, initial_patch_size: Any, transforms: Any, is_training: bool) -> TaskDataLoader:
        """Return the loader of a part of the data."""
        raise NotImplementedError

    def loader_arguments(self, dataset: Any, initial_patch_size: Any) -> tuple[Any, ...]:
        """Return the positional arguments of nnU-Net's loader."""
        patch_size = self.configuration_manager.patch_size
        return dataset, self.batch_size, initial_patch_size, patch_size, self.label_manager

    def get_dataloaders(self):
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        patch_size = self.configuration_manager.patch_size
        rotation, is_dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        training = self.get_training_transforms(
            patch_size,
            rotation,
            None,
            mirror_axes,
            is_dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
        )
        dataset_train, dataset_val = self.get_tr_and_val_datasets()
        loaders = (
            self.make_loader(dataset_train, initial_patch_size, training, True),
            self.make_loader(dataset_val, patch_size, self.get_validation_transforms(None), False),
        )
        num_workers = get_allowed_n_proc_DA()
        augmenters = []
        for loader, workers in zip(loaders, (num_workers, max(1, num_workers // 2)), strict=True):
            augmenters.append(
                SingleThreadedAugmenter(loader, None)
                if num_workers == 0
                else NonDetMultiThreadedAugmenter(
                    loader, None, workers, max(3, workers // 2), pin_memory=self.device.type == "cuda", wait_time=0.002
                )
            )
        for augmenter in augmenters:
            next(augmenter)
        return tuple(augmenters)

    def summarize(self, outputs: list[dict[str, Any]]) -> tuple[float, list[float]]:
        """Return the metric over the validation steps of an epoch (NaN if there is none), and its parts."""
        raise NotImplementedError

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        gathered = val_outputs
        if self.is_ddp:
            everyone: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(everyone, val_outputs)
            gathered = [output for one in everyone for output in one]
        value, parts = self.summarize(gathered)
        sign = -1.0 if self.is_better_when_lower else 1.0
        score = sign * value
        if not np.isfinite(score):
            earlier = self.logger.get_value("mean_fg_dice", step=None)
            score = earlier[-1] if earlier else (-1e6 if self.is_better_when_lower else 0.0)
        self.logger.log("mean_fg_dice", score, self.current_epoch)
        self.logger.log("dice_per_class_or_region", [sign * part for part in parts], self.current_epoch)
        self.logger.log("val_losses", np.mean([output["loss"] for output in gathered]), self.current_epoch)

    def on_epoch_end(self) -> None:
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)

        def last(key: str) -> Any:
            return self.logger.get_value(key, step=-1)

        sign = -1.0 if self.is_better_when_lower else 1.0
        self.print_to_log_file("train_loss", np.round(last("train_losses"), 4))
        self.print_to_log_file("val_loss", np.round(last("val_losses"), 4))
        parts = [float(np.round(sign * part, 4)) for part in last("dice_per_class_or_region")]
        self.print_to_log_file(self.metric, float(np.round(sign * last("mean_fg_dice"), 4)), parts)
        self.print_to_log_file(f"Epoch time: {last('epoch_end_timestamps') - last('epoch_start_timestamps'):.2f} s")
        if (self.current_epoch + 1) % self.save_every == 0 and self.current_epoch != self.num_epochs - 1:
            self.save_checkpoint(join(self.output_folder, "checkpoint_latest.pth"))
        if self._best_ema is None or last("ema_fg_dice") > self._best_ema:
            self._best_ema = last("ema_fg_dice")
            self.print_to_log_file(f"New best moving average of {self.metric}: {sign * self._best_ema:.4f}")
            self.save_checkpoint(join(self.output_folder, "checkpoint_best.pth"))
        if self.local_rank == 0:
            self._plot_progress()
        self.current_epoch += 1

    def _plot_progress(self) -> None:
        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        values = self.logger.get_checkpoint()
        sign = -1.0 if self.is_better_when_lower else 1.0
        figure, (losses, metric, duration, rate) = plt.subplots(4, 1, figsize=(10, 16), sharex=True)
        losses.plot(values["train_losses"], label="training")
        losses.plot(values["val_losses"], label="validation")
        losses.set_ylabel("loss")
        metric.plot([sign * v for v in values["mean_fg_dice"]], ":", label="of the epoch")
        metric.plot([sign * v for v in values["ema_fg_dice"]], label="moving average")
        metric.set_ylabel(self.metric)
        stamps = zip(values["epoch_end_timestamps"], values["epoch_start_timestamps"], strict=False)
        duration.plot([end - start for end, start in stamps])
        duration.set_ylabel("duration of an epoch in s")
        rate.plot(values["lrs"])
        rate.set_ylabel("learning rate")
        rate.set_xlabel("epoch")
        for axis in (losses, metric):
            axis.legend()
        figure.tight_layout()
        figure.savefig(os.path.join(self.output_folder, "progress.png"))
        plt.close(figure)

    def _images_and_targets(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            batch["data"].to(self.device, non_blocking=True),
            batch["target"].to(self.device, non_blocking=True),
        )

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", enabled=self.device.type == "cuda"):
            return self.network(images)
