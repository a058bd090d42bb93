"""What is measured on perturbed images, by the task of a model: classes, label maps or landmarks.

A task reads a case with its reference, changes both by a perturbation, and measures a row of numbers per case, out of
which its figures follow for any choice of cases.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation import classification, landmarks, segmentation
from monai_mamba.evaluation.tables import Predictions
from monai_mamba.heat_maps import voxel_to_world, world_to_voxel
from monai_mamba.robustness.perturbations import Perturbation, is_colored, move_label_map, move_points, perturb
from monai_mamba.training.datalist import PICTURES
from monai_mamba.training.label_maps import read_reference
from monai_mamba.training.trained import Trained

#: Under this key a case that was read holds its reference.
REFERENCE = "reference"
Scores = Callable[[np.ndarray], dict[str, float]]


class Task(ABC):
    """A model and the cases it is measured on.

    Args:
        trained: the model.
        cases: with references.

    Attributes:
        targets: names of classes, structures or landmarks.
        metrics: names of the figures, the first ones for curves.
        primary: the figure for short tables.

    Raises:
        DatasetError: if a case has no reference.
    """

    reference_key: ClassVar[str] = "label"

    def __init__(self, trained: Trained, cases: Sequence[Mapping[str, Any]]) -> None:
        self.trained = trained
        self.cases = list(cases)
        self.targets: list[str] = list(trained.classes)
        self.metrics: list[str] = []
        self.primary = ""
        unlabeled = [case["case"] for case in cases if self.reference_key not in case]
        if unlabeled:
            raise DatasetError(
                f"case {unlabeled[0]} has no `{self.reference_key}`; robustness is measured against references"
            )

    def read(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """Return a case with its images as they were read."""
        return self.trained.read(case)

    def change(
        self, read: Mapping[str, Any], source: Mapping[str, Any], perturbation: Perturbation, severity: int, seed: int
    ) -> dict[str, Any]:
        """Return a case that was read with perturbed images; ``source`` holds the names of its files."""
        changed = dict(read)
        for view, key in enumerate(self.trained.image_keys):
            # Views are taken one after the other: each has its own direction and noise.
            own_seed = seed * len(self.trained.image_keys) + view
            is_picture = str(source[key]).lower().endswith(PICTURES)
            values = perturb(read[key], perturbation, severity, own_seed, is_picture=is_picture)
            changed[key] = _like(read[key], values)
        return changed

    def is_colored(self, read: Mapping[str, Any]) -> bool:
        """True if an image of the case has colors."""
        return any(is_colored(torch.as_tensor(read[key])) for key in self.trained.image_keys)

    @abstractmethod
    def measure(self, batch: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return what is measured on cases that were read, ``(cases, columns)``; NaN where there is nothing."""

    @abstractmethod
    def scores(self, values: np.ndarray) -> Scores:
        """Return the function from row numbers of ``values`` to the figures."""


class ClassificationTask(Task):
    """Probabilities, and the six metrics of the papers."""

    def __init__(self, trained: Trained, cases: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(trained, cases)
        self.metrics, self.primary = list(classification.METRICS), "auc"

    def measure(self, batch: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return self.trained.probabilities([self.trained.prepare(case)["image"] for case in batch]).numpy()

    def scores(self, values: np.ndarray) -> Scores:
        if not np.isfinite(values).all():
            bad = self.cases[int(np.flatnonzero(~np.isfinite(values).all(1))[0])]["case"]
            raise DatasetError(f"case {bad}: the network gives probabilities that are no numbers")
        names, patients = (np.array([str(case[key]) for case in self.cases]) for key in ("case", "patient"))
        label = np.array([np.asarray(case["label"]) for case in self.cases])
        predictions = Predictions(self.targets, names, patients, np.full(len(names), ""), label, values)
        return predictions.scores()


class SegmentationTask(Task):
    """Dice of every structure and their mean, on the grid of the network's input."""

    def __init__(self, trained: Trained, cases: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(trained, cases)
        self.targets = self.targets[1:]  # without the background
        self.metrics, self.primary = ["dice", *(f"dice_{name}" for name in self.targets)], "dice"
        (self._key,) = trained.image_keys

    def read(self, case: Mapping[str, Any]) -> dict[str, Any]:
        read = super().read(case)
        read[REFERENCE] = read_reference(case, self._key, len(self.trained.classes), read[self._key])
        return read

    def change(
        self, read: Mapping[str, Any], source: Mapping[str, Any], perturbation: Perturbation, severity: int, seed: int
    ) -> dict[str, Any]:
        changed = super().change(read, source, perturbation, severity, seed)
        changed[REFERENCE] = move_label_map(read[REFERENCE], perturbation, severity, seed)
        return changed

    def measure(self, batch: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.array([self._dice(case) for case in batch])

    def _dice(self, case: Mapping[str, Any]) -> list[float]:
        logits = self.trained.infer(self.trained.prepare(case)["image"])
        found, reference = logits.argmax(0).cpu().numpy(), case[REFERENCE][0].numpy()
        if found.shape != reference.shape:
            raise DatasetError(
                f"case {case.get('case')}: the network's input has {found.shape} voxels, the image {reference.shape}; "
                "robustness needs a preprocessing that keeps the grid"
            )
        return [segmentation.dice(found == value, reference == value) for value in range(1, len(self.targets) + 1)]

    def scores(self, values: np.ndarray) -> Scores:
        def figures(rows: np.ndarray) -> dict[str, float]:
            means = _mean(values[rows], 0)
            return {"dice": float(_mean(means)), **dict(zip(self.metrics[1:], means.tolist(), strict=True))}

        return figures


class LandmarkTask(Task):
    """Radial errors in mm, their mean and the shares within some radii."""

    reference_key = "landmarks"

    def __init__(self, trained: Trained, cases: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(trained, cases)
        self.targets = [str(name) for name in trained.get("landmarks")]
        self.metrics = ["mre_mm", *(f"sdr_{radius:g}mm" for radius in landmarks.RADII_MM)]
        self.metrics += [f"mre_mm_{name}" for name in self.targets]
        self.primary = "mre_mm"
        (self._key,) = trained.image_keys
        self._decode = trained.get("postprocessing")

    def read(self, case: Mapping[str, Any]) -> dict[str, Any]:
        read = super().read(case)
        read[REFERENCE] = np.asarray(case["landmarks"], dtype=np.float64)
        return read

    def change(
        self, read: Mapping[str, Any], source: Mapping[str, Any], perturbation: Perturbation, severity: int, seed: int
    ) -> dict[str, Any]:
        changed = super().change(read, source, perturbation, severity, seed)
        affine, size = np.asarray(read[self._key].affine), read[self._key].shape[1:]
        voxels = world_to_voxel(read[REFERENCE], affine)
        changed[REFERENCE] = voxel_to_world(move_points(voxels, size, perturbation, severity, seed), affine)
        return changed

    def measure(self, batch: Sequence[Mapping[str, Any]]) -> np.ndarray:
        rows = []
        for case in batch:
            # The reference of the file is no longer that of a moved image.
            data = self.trained.prepare({key: value for key, value in case.items() if key != "landmarks"})
            found = self._decode({**data, "pred": self.trained.infer(data["image"]).cpu()})["pred_mm"]
            rows.append(landmarks.radial_errors(found.numpy()[None], case[REFERENCE][None])[0])
        return np.array(rows)

    def scores(self, values: np.ndarray) -> Scores:
        return lambda rows: landmarks.landmark_figures(values[rows], self.targets)


TASKS: dict[str, type[Task]] = {
    "classification": ClassificationTask,
    "two-view classification": ClassificationTask,
    "segmentation": SegmentationTask,
    "landmarks": LandmarkTask,
}


def _like(image: Tensor, values: Tensor) -> Tensor:
    """The values with the geometry of ``image``, which transforms may need."""
    if hasattr(image, "affine"):
        changed = image.clone()
        changed[...] = values.to(image.dtype)
        return changed
    return values


def _mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)  # NaN is the answer that is wanted
        return np.nanmean(values, axis=axis)
