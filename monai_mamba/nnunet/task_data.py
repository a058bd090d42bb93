"""Loading cases for tasks that have another target than a label map."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from threadpoolctl import threadpool_limits
from torch import Tensor


class TaskDataLoader(nnUNetDataLoader):
    """nnU-Net's loader of patches; a subclass says where a patch lies and what its target is.

    nnU-Net's augmentation is applied to ``image`` and ``segmentation`` and to whatever :meth:`companions` adds.
    """

    def generate_train_batch(self) -> dict[str, Any]:
        names = self.get_indices()
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            samples = [self._make_sample(name, self.get_do_oversample(i)) for i, name in enumerate(names)]
        images, targets = zip(*samples, strict=True)
        return {"data": torch.stack(images), "target": torch.stack(targets), "keys": list(names)}

    def choose_corner(self, name: str, shape: tuple[int, ...], is_forced: bool) -> list[int]:
        """Return the lowest voxel of the patch, which may lie outside of the array.

        Args:
            name: of the case.
            shape: of its array, without channels.
            is_forced: True for the share of samples that must show what is looked for (nnU-Net's oversampling).
        """
        raise NotImplementedError

    def companions(self, name: str, corner: list[int]) -> dict[str, Tensor]:
        """Return what goes through the augmentation with the image, channels first, on the grid of the patch."""
        return {}

    def make_target(self, name: str, corner: list[int], sample: dict[str, Any]) -> Tensor:
        """Return the target of an augmented sample."""
        raise NotImplementedError

    def limits(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and the highest corner of a patch; where the array is smaller it lies in the middle."""
        size, shape_ = np.asarray(self.patch_size), np.asarray(shape)
        padding = np.maximum(self.need_to_pad, size - shape_)
        return -(padding // 2), shape_ + padding // 2 + padding % 2 - size

    def _make_sample(self, name: str, is_forced: bool) -> tuple[Tensor, Tensor]:
        data, seg, _, _ = self._data.load_case(name)
        corner = self.choose_corner(name, data.shape[1:], is_forced)
        box = [[low, low + size] for low, size in zip(corner, self.patch_size, strict=True)]
        sample: dict[str, Any] = {
            "image": torch.from_numpy(crop_and_pad_nd(data, box, 0)).float(),
            "segmentation": torch.from_numpy(crop_and_pad_nd(seg, box, -1)).to(torch.int16),
            **self.companions(name, corner),
        }
        if self.patch_size_was_2d:
            sample = {key: value[:, 0] for key, value in sample.items()}
        if self.transforms is not None:
            sample = self.transforms(**sample)
        return sample["image"], self.make_target(name, corner, sample)


class ClassLoader(TaskDataLoader):
    """Loads whole cases, or windows of those that are larger than the window, with the class of the case.

    Args:
        classes: case to class number.
        is_ordered: give the cases in turn instead of at random, for validation.
    """

    def __init__(self, *arguments: Any, classes: dict[str, int], is_ordered: bool = False, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._classes = classes
        self._is_ordered = is_ordered
        self._next = 0

    def get_indices(self) -> list[str]:
        if not self._is_ordered:
            return list(super().get_indices())
        first, count = self._next, len(self.indices)
        self._next = (first + self.batch_size) % count
        return [self.indices[(first + i) % count] for i in range(self.batch_size)]

    def choose_corner(self, name: str, shape: tuple[int, ...], is_forced: bool) -> list[int]:
        # The window of the network in the middle of the larger patch that augmentation starts from.
        window, margin = np.asarray(self.final_patch_size), (np.asarray(self.patch_size) - self.final_patch_size) // 2
        room = np.asarray(shape) - window
        start = [np.random.randint(0, r + 1) if r > 0 else int(np.floor(r / 2)) for r in room]  # noqa: NPY002
        return [int(s - m) for s, m in zip(start, margin, strict=True)]

    def make_target(self, name: str, corner: list[int], sample: dict[str, Any]) -> Tensor:
        return torch.tensor(self._classes[name])


class LandmarkLoader(TaskDataLoader):
    """Loads patches with the positions of the landmarks in them, after augmentation.

    The augmentation carries the coordinates of the patch's voxels along as if they were an image. Where a landmark has
    gone is then read from them to a fraction of a voxel, whatever nnU-Net did: turn, scale, crop or flip. A label map
    would move whole voxels, and could lose a small landmark.

    A landmark that is not in the patch is infinite, so that its heat map is empty; one that is not annotated is NaN.

    Args:
        landmarks: case to positions in voxels of its preprocessed array, ``(landmarks, 3)``.
    """

    def __init__(self, *arguments: Any, landmarks: dict[str, np.ndarray], **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._landmarks = landmarks

    def choose_corner(self, name: str, shape: tuple[int, ...], is_forced: bool) -> list[int]:
        lowest, highest = self.limits(shape)
        corner = np.random.randint(lowest, np.maximum(highest, lowest) + 1)  # noqa: NPY002
        known = self._landmarks[name][~np.isnan(self._landmarks[name]).any(1)]
        if is_forced and len(known):
            # Anywhere in the inner 80 %, not in the middle: a network can learn where the middle is.
            point = known[np.random.randint(len(known))]  # noqa: NPY002
            reach = 0.4 * np.asarray(self.final_patch_size)
            middle = point + np.random.uniform(-reach, reach)  # noqa: NPY002
            corner = np.clip(np.rint(middle - np.asarray(self.patch_size) / 2).astype(int), lowest, highest)
        return [int(c) for c in corner]

    def companions(self, name: str, corner: list[int]) -> dict[str, Tensor]:
        axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in self.patch_size), indexing="ij")
        return {"regression_target": torch.stack([*axes, torch.ones(tuple(self.patch_size))])}

    def make_target(self, name: str, corner: list[int], sample: dict[str, Any]) -> Tensor:
        points = torch.as_tensor(self._landmarks[name] - np.asarray(corner), dtype=torch.float32)
        *coordinates, inside = sample["regression_target"]
        return locate_in_map(points, torch.stack(coordinates), inside > 0.999)


def locate_in_map(points: Tensor, coordinates: Tensor, is_inside: Tensor) -> Tensor:
    """Return the voxels at which a map of coordinates takes given values.

    Args:
        points: ``(points, dims)``; NaN is passed on.
        coordinates: ``(dims, *spatial)``, smooth and locally invertible.
        is_inside: ``(*spatial)``, where the map means something.

    Returns:
        ``(points, dims)``, with fractions; infinite for values that the map does not take.
    """
    shape = torch.tensor(is_inside.shape)
    found = torch.full_like(points, torch.inf)
    for index, point in enumerate(points):
        if point.isnan().any():
            found[index] = torch.nan
            continue
        distance = (coordinates - point.reshape(-1, *[1] * len(shape))).square().sum(0)
        distance = torch.where(is_inside, distance, torch.inf)
        nearest = torch.stack(torch.unravel_index(distance.argmin(), is_inside.shape))
        if not is_inside[tuple(nearest)]:
            continue
        columns = []
        for axis in range(len(shape)):
            # The derivative from the two neighbours, or from one at a border.
            before, after = nearest.clone(), nearest.clone()
            if nearest[axis] > 0 and is_inside[tuple(_moved(nearest, axis, -1))]:
                before[axis] -= 1
            if nearest[axis] < shape[axis] - 1 and is_inside[tuple(_moved(nearest, axis, 1))]:
                after[axis] += 1
            step = (after[axis] - before[axis]).clamp(min=1)
            columns.append((_value_at(coordinates, after) - _value_at(coordinates, before)) / step)
        jacobian = torch.stack(columns, 1)
        rest = point - _value_at(coordinates, nearest)
        offset = torch.linalg.lstsq(jacobian, rest[:, None]).solution[:, 0]
        position = nearest + offset
        # Within the faces of the outer voxels and within a voxel of where the map was read.
        if offset.abs().max() <= 1 and ((position >= -0.5) & (position <= shape - 0.5)).all():
            found[index] = position
    return found


def _moved(voxel: Tensor, axis: int, step: int) -> Tensor:
    moved = voxel.clone()
    moved[axis] += step
    return moved


def _value_at(values: Tensor, voxel: Tensor) -> Tensor:
    index = (slice(None), *voxel.tolist())
    return values[index]
