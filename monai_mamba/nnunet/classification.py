"""Classification of whole cases inside nnU-Net: its preprocessing, augmentation, folds and folders.

A label belongs to the case, not to a patch of it, so the network sees whole cases: its window is the median size of
the preprocessed cases, rounded up to multiples of 16, in place of the plan's patch. Smaller cases are padded. Larger
ones are seen through a window at a random place in training, and in prediction through overlapping windows whose
probabilities are averaged. The network halves the resolution in its first layer, so that a whole case costs little more
memory than a U-Net's patch.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from batchgenerators.utilities.file_and_folder_operations import isfile, join, save_json
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.classification import auc, matrix_metrics
from monai_mamba.files import whole_file, write_text
from monai_mamba.networks import NNMambaClassifier
from monai_mamba.nnunet.annotations import ClassTable, read_classes
from monai_mamba.nnunet.task_data import ClassLoader
from monai_mamba.nnunet.task_trainer import PLANS_KEY, TaskTrainer

TABLE = "probabilities.csv"
_WINDOW_MULTIPLE = 16
_NUM_FOLDS = 5


class CaseNetwork(NNMambaClassifier):
    """nnMamba for classification that refuses nnU-Net's own predictor, which can only write label maps."""

    is_classifying = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.is_classifying):
            raise DatasetError(
                "nnUNetv2_predict writes label maps, this network gives one class per case: use "
                "`monai-mamba nnunet predict-classes` with the same arguments"
            )
        return super().forward(x)


class ClassLoss(nn.Module):
    """Cross entropy; of one logit for two classes, as in the released network."""

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        logits = logits.float()
        if logits.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(logits[:, 0], label.float())
        return F.cross_entropy(logits, label)


def probabilities(logits: Tensor) -> Tensor:
    """Return ``(B, classes)`` for logits ``(B, classes)``, or ``(B, 2)`` for one logit ``(B, 1)``."""
    logits = logits.float()
    if logits.shape[1] == 1:
        positive = torch.sigmoid(logits)
        return torch.cat([1 - positive, positive], dim=1)
    return logits.softmax(1)


class ClassifierTrainer(TaskTrainer):
    """Trains nnMamba to tell the class of a case."""

    network_class = CaseNetwork
    metric = "AUC"
    learning_rate = 1e-4
    decay = 1e-3
    epochs = 100

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        plans = deepcopy(plans)
        plans["configurations"][configuration]["patch_size"] = window_size(plans, configuration)
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_cascaded:
            raise ValueError(f"{type(self).__name__} knows no cascade: use 2d, 3d_fullres or 3d_lowres")
        self.table = read_classes(self.annotation_folders())
        # It travels with the plans: to predict, nnU-Net's folders hold nothing else that names the classes.
        self.plans_manager.plans[PLANS_KEY] = {"classes": self.table.classes}

    def _check_plans(self) -> None:
        """Any plan will do: only spacing and median size are taken from it."""

    @classmethod
    def build_network_architecture(
        cls, plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """Build the network for a plan that carries the classes."""
        num_classes = len(plans_manager.plans[PLANS_KEY]["classes"])
        network = CaseNetwork(
            len(configuration_manager.patch_size),
            num_input_channels,
            1 if num_classes == 2 else num_classes,
            **cls.network_arguments,
        )
        return network if cls.with_autocast else cls.without_autocast(network)

    def initialize(self) -> None:
        super().initialize()
        network: Any = self._plain_network()
        network.is_classifying = True

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none."""

    def _build_loss(self) -> nn.Module:
        return ClassLoss()

    def do_split(self) -> tuple[list[str], list[str]]:
        """Split by nnU-Net's rules; a split that does not exist yet keeps the shares of the classes and patients whole.

        Raises:
            DatasetError: if a case has no class, or the training part of the fold lacks one.
        """
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        cases = sorted(self.dataset_class.get_identifiers(self.preprocessed_dataset_folder))
        self.table = read_classes(self.annotation_folders(), cases)
        splits_file = join(self.preprocessed_dataset_folder_base, "splits_final.json")
        if self.fold != "all" and not isfile(splits_file):
            self.print_to_log_file("Creating a split that is stratified by class:", splits_file)
            save_json(stratified_folds(self.table, cases), splits_file)
        training, validation = super().do_split()
        for name, part, note in (
            ("training", training, None),
            ("validation", validation, "its AUC cannot be measured"),
        ):
            present = {self.table.cases[case] for case in part}
            lacking = [c for i, c in enumerate(self.table.classes) if i not in present]
            if lacking and note is None:
                raise DatasetError(f"fold {self.fold} has no {name} case of the class {', '.join(lacking)}")
            if lacking:
                self.print_to_log_file(f"The {name} cases of this fold lack the class {', '.join(lacking)}: {note}")
        return training, validation

    def make_loader(self, dataset: Any, initial_patch_size: Any, transforms: Any, is_training: bool) -> ClassLoader:
        label = np.array([self.table.cases[name] for name in dataset.identifiers])
        weight = 1 / np.bincount(label, minlength=len(self.table.classes))[label]
        if len(self.configuration_manager.patch_size) == 2:
            self._check_pictures(dataset)
        return ClassLoader(
            *self.loader_arguments(dataset, initial_patch_size),
            classes=self.table.cases,
            is_ordered=not is_training,
            sampling_probabilities=weight / weight.sum() if is_training else None,
            transforms=transforms,
        )

    def _check_pictures(self, dataset: Any) -> None:
        for name in dataset.identifiers:
            if (depth := dataset.load_case(name)[0].shape[1]) != 1:
                raise DatasetError(
                    f"case {name} has {depth} slices; a slice has no class of its own: use 3d_fullres or 3d_lowres"
                )

    def validation_step(self, batch: dict) -> dict:
        images, label = self._images_and_targets(batch)
        logits = self._forward(images)
        return {
            "loss": self.loss(logits, label).cpu().numpy(),
            "keys": batch["keys"],
            "label": label.cpu().numpy(),
            "probs": probabilities(logits).cpu().numpy(),
        }

    def summarize(self, outputs: list[dict[str, Any]]) -> tuple[float, list[float]]:
        # Cases come round again and again; each counts once.
        cases: dict[str, tuple[int, np.ndarray]] = {}
        for output in outputs:
            for key, label, probs in zip(output["keys"], output["label"], output["probs"], strict=True):
                cases[key] = (int(label), probs)
        label = np.array([one[0] for one in cases.values()])
        probs = np.stack([one[1] for one in cases.values()])
        pred = probs.argmax(1)
        recalls = [
            float((pred[label == c] == c).mean()) if (label == c).any() else np.nan for c in range(probs.shape[1])
        ]
        return auc(label, probs), recalls

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Classify the validation cases; write a table and ``metrics.json``."""
        if self.local_rank != 0:
            return
        _, cases = self.do_split()
        dataset = self.dataset_class(self.preprocessed_dataset_folder, cases)
        folder = Path(self.output_folder) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        classifier = CaseClassifier(self._plain_network(), self.configuration_manager.patch_size, self.device)
        probs = []
        for name in cases:
            self.print_to_log_file(f"predicting {name}")
            probs.append(classifier.classify(torch.from_numpy(np.array(dataset.load_case(name)[0][:]))))
        label = np.array([self.table.cases[name] for name in cases])
        rows = [
            ClassRow(name, p, self.table.cases[name], self.table.patient(name))
            for name, p in zip(cases, probs, strict=True)
        ]
        write_probabilities(folder / TABLE, self.table.classes, rows)
        matrix = np.zeros((len(self.table.classes),) * 2, int)
        np.add.at(matrix, (label, np.stack(probs).argmax(1)), 1)
        metrics = {**matrix_metrics(matrix), "auc": auc(label, np.stack(probs))}
        write_text(
            folder / "metrics.json",
            json.dumps(
                {"cases": len(cases), "classes": self.table.classes, "confusion_matrix": matrix.tolist(), **metrics},
                indent=1,
            ),
        )
        for name, value in metrics.items():
            self.logger.log_summary(f"final_val/{name}", value)
        self.print_to_log_file("Validation complete\n" + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))


class CaseClassifier:
    """Classifies preprocessed images through overlapping windows, with the mean probabilities of several networks.

    Args:
        network: a :class:`CaseNetwork`.
        window: its size in voxels.
        device: where it runs.
        weights: of the folds; None for those in the network.
        tile_step_size: distance of the windows as a share of their size.
    """

    def __init__(
        self,
        network: nn.Module,
        window: Sequence[int],
        device: torch.device,
        weights: list[dict[str, Tensor]] | None = None,
        tile_step_size: float = 0.5,
    ) -> None:
        self._network: Any = network
        self._window = tuple(window)
        self._device = device
        self._weights = weights
        self._tile_step_size = tile_step_size

    @torch.inference_mode()
    def classify(self, image: Tensor) -> np.ndarray:
        """Return probabilities ``(classes,)`` for a preprocessed image ``(channels, *spatial)``.

        Raises:
            DatasetError: if a network of pictures is given a volume.
        """
        if len(self._window) == 2:
            if image.shape[1] != 1:
                raise DatasetError(f"the image has {image.shape[1]} slices, the model is one of pictures")
            image = image[:, 0]
        image = pad_nd_image(image, self._window, "constant", {"value": 0})
        steps = compute_steps_for_sliding_window(image.shape[1:], self._window, self._tile_step_size)
        corners = list(itertools.product(*steps))
        self._network.to(self._device).eval()
        self._network.is_classifying = True
        results = []
        for weights in self._weights or [self._network.state_dict()]:
            self._network.load_state_dict(weights)
            for corner in corners:
                box = (slice(None), *(slice(c, c + n) for c, n in zip(corner, self._window, strict=True)))
                with torch.autocast("cuda", enabled=self._device.type == "cuda"):
                    logits = self._network(image[box][None].float().to(self._device))
                results.append(probabilities(logits)[0].cpu())
        return torch.stack(results).mean(0).numpy()


@dataclass(frozen=True)
class ClassRow:
    """Probabilities ``(classes,)`` of a case; class number and patient where they are known."""

    case: str
    probs: np.ndarray
    label: int | None = None
    patient: str | None = None


def write_probabilities(path: Path, classes: Sequence[str], rows: Sequence[ClassRow]) -> None:
    """Write a table that ``monai-mamba evaluate`` reads, and the same as JSON beside it."""
    with_label = all(row.label is not None for row in rows)
    columns = ["case", *(["patient", "label"] if with_label else []), *(f"prob_{name}" for name in classes)]
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            known = [row.patient or row.case, row.label] if with_label else []
            writer.writerow([row.case, *known, *(f"{p:.6f}" for p in row.probs)])
    content = {row.case: dict(zip(classes, map(float, row.probs), strict=True)) for row in rows}
    write_text(path.with_suffix(".json"), json.dumps(content, indent=1))


def window_size(plans: dict[str, Any], configuration: str) -> list[int]:
    """Return the median size of the preprocessed cases, rounded up to multiples of 16."""
    median = PlansManager(plans).get_configuration(configuration).median_image_size_in_voxels
    return [_WINDOW_MULTIPLE * math.ceil(size / _WINDOW_MULTIPLE) for size in median]


def stratified_folds(table: ClassTable, cases: Sequence[str]) -> list[dict[str, list[str]]]:
    """Return five folds (fewer where a class has fewer patients) with the shares of the classes, patients whole.

    Raises:
        DatasetError: if a class has a single patient.
    """
    from data_prep.splits import stratified_group_folds

    label = np.array([table.cases[case] for case in cases])
    patients = np.array([table.patient(case) for case in cases])
    counts = {name: len(set(patients[label == i])) for i, name in enumerate(table.classes)}
    rarest = min(counts, key=lambda name: counts[name])
    if counts[rarest] < 2:
        raise DatasetError(
            f"the class {rarest!r} has {counts[rarest]} patients: no case would be left to train or to validate with"
        )
    num_folds = min(_NUM_FOLDS, counts[rarest])
    dealt = stratified_group_folds([str(i) for i in label], patients.tolist(), num_folds, seed=12345)
    parts: list[dict[str, list[str]]] = [{"train": [], "val": []} for _ in range(num_folds)]
    for case, own in zip(cases, dealt, strict=True):
        for fold, part in enumerate(parts):
            part["val" if fold == own else "train"].append(case)
    return parts
