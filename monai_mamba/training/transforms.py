"""Transforms that MONAI does not have: pictures as the papers read them, AutoAugment, checks of label maps, heat maps.

Everything else in the bundles is MONAI's own.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from PIL import Image

from monai_mamba.errors import DatasetError
from monai_mamba.heat_maps import (
    AMPLITUDE,
    SIGMA_VOX,
    decode_heat_maps,
    gaussian_heat_maps,
    voxel_to_world,
    world_to_voxel,
)

AUTO_AUGMENT_POLICIES = ("none", "imagenet", "cifar10", "svhn")


def read_picture(path: os.PathLike[str] | str) -> np.ndarray:
    """Return a picture as float32 ``(C, H, W)`` in [0, 1], with one channel if it is grey and three if it is not.

    8-bit pictures are divided by 255, 16-bit ones by 65535, whatever values occur in them. Transparency is dropped.

    Raises:
        DatasetError: if the file is no picture, is truncated, or is of another depth.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            if picture.mode in ("P", "RGBA", "LA", "CMYK", "YCbCr", "PA", "1"):
                picture = picture.convert("L" if picture.mode in ("LA", "1") else "RGB")
            array = np.asarray(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: cannot be read as a picture: {error}") from error
    if array.dtype == np.int32 and array.min() >= 0 and array.max() <= 65535:  # how PIL gives some 16-bit files
        array = array.astype(np.uint16)
    if array.dtype not in (np.uint8, np.uint16):
        raise DatasetError(f"{path}: has pixels of type {array.dtype}; pictures must have 8 or 16 bits per channel")
    scaled = array.astype(np.float32) / np.iinfo(array.dtype).max
    return scaled[None] if scaled.ndim == 2 else np.moveaxis(scaled, -1, 0)


class ReadPictured(MapTransform):
    """Read pictures, give all of them the same channels, and resize them as the published recipes do.

    Args:
        keys: keys with file names.
        image_size: side of the square result in pixels, the aspect is not kept; None leaves the size. The filter is
            bilinear with antialiasing, as of torchvision's ``Resize`` on PIL images.
        channels: 3 repeats grey pictures, 1 turns colours to grey (ITU-R 601 luma).

    Raises:
        DatasetError: if a file cannot be read; the text names it.
    """

    def __init__(self, keys: KeysCollection, image_size: int | None = None, channels: int = 3) -> None:
        super().__init__(keys)
        if channels not in (1, 3):
            raise ValueError(f"`channels` must be 1 or 3, got {channels}")
        if image_size is not None and image_size < 1:
            raise ValueError(f"`image_size` must be at least 1, got {image_size}")
        self.image_size = image_size
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            array = read_picture(result[key])
            if self.channels == 1 and array.shape[0] == 3:
                array = np.tensordot(np.array([0.299, 0.587, 0.114], np.float32), array, 1)[None]
            if self.image_size is not None:
                size = (self.image_size, self.image_size)
                array = np.stack(
                    [np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BILINEAR)) for c in array]
                )
            if self.channels == 3 and array.shape[0] == 1:
                array = np.repeat(array, 3, axis=0)
            result[key] = torch.from_numpy(np.ascontiguousarray(array))
        return result


class AutoAugmentd(MapTransform):
    """Apply torchvision's AutoAugment to pictures in [0, 1], for the recipe MedMamba-X.

    Args:
        keys: keys with pictures ``(3, H, W)``; each gets its own draw.
        policy: ``"imagenet"``, ``"cifar10"``, ``"svhn"``, or ``"none"`` to leave the pictures alone. The paper does
            not name its policy; torchvision's default is ``"imagenet"``.

    References:
        Cubuk et al., AutoAugment, CVPR 2019; MedMamba, arXiv:2403.03849, section 5.3.
    """

    def __init__(self, keys: KeysCollection, policy: str = "imagenet") -> None:
        super().__init__(keys)
        if policy not in AUTO_AUGMENT_POLICIES:
            raise ValueError(f"`policy` must be one of {', '.join(AUTO_AUGMENT_POLICIES)}, got {policy!r}")
        self._augment: Any = None
        if policy != "none":
            from torchvision.transforms import AutoAugment, AutoAugmentPolicy

            self._augment = AutoAugment(AutoAugmentPolicy(policy))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        if self._augment is not None:
            for key in self.key_iterator(result):
                pixels = (torch.as_tensor(result[key]) * 255).round().clamp(0, 255).to(torch.uint8)
                result[key] = self._augment(pixels).float() / 255
        return result


class OneHotLabeld(MapTransform):
    """Turn class numbers into one-hot float vectors ``(classes,)`` for the metrics; zeros, ones and NaN stay.

    Args:
        keys: keys with labels.
        num_classes: length of the vectors; 1 keeps the number, for networks with one logit for two classes.
        multi_label: labels are vectors of zeros and ones already, NaN where they are not known.
    """

    def __init__(self, keys: KeysCollection = "label", num_classes: int = 2, multi_label: bool = False) -> None:
        super().__init__(keys)
        self.num_classes = num_classes
        self.multi_label = multi_label

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            label = torch.as_tensor(result[key])
            if not self.multi_label and self.num_classes == 1:
                label = label.reshape(1)
            elif not self.multi_label:
                label = torch.nn.functional.one_hot(label.long(), self.num_classes)
            result[key] = label.float()
        return result


class CheckLabelMapd(MapTransform):
    """Refuse label maps that do not belong to their image or hold values that the data set does not name.

    Args:
        keys: keys with label maps ``(1, *spatial)``.
        num_classes: values are 0 to ``num_classes - 1``.
        image_key: the image, on whose grid the label map must lie to 0.01 mm.

    Raises:
        DatasetError: naming the case and the file.
    """

    def __init__(self, keys: KeysCollection = "label", num_classes: int = 2, image_key: str = "image") -> None:
        super().__init__(keys)
        self.num_classes = num_classes
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            label, image = data[key], data[self.image_key]
            file = label.meta.get("filename_or_obj", "") if hasattr(label, "meta") else ""
            where = f"case {data.get('case')}: {file}"
            if label.shape[1:] != image.shape[1:]:
                raise DatasetError(
                    f"{where}: has {tuple(label.shape[1:])} voxels, its image {tuple(image.shape[1:])}; they must "
                    "lie on one grid"
                )
            if hasattr(label, "affine") and hasattr(image, "affine"):
                corners = (
                    np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
                    * ([size - 1 for size in (*image.shape[1:], 1, 1)][:3])
                )
                places = [voxel_to_world(corners, np.asarray(x.affine, dtype=np.float64)) for x in (label, image)]
                distance = np.linalg.norm(places[0] - places[1], axis=1).max()
                if not distance <= 0.01:
                    raise DatasetError(f"{where}: lies up to {distance:.3g} mm away from its image")
            values = torch.unique(torch.as_tensor(label))
            wrong = [v for v in values.tolist() if v != int(v) or not 0 <= v < self.num_classes]
            if wrong:
                raise DatasetError(
                    f"{where}: holds the value {wrong[0]:g}; the data list names 0 to {self.num_classes - 1}"
                )
        return dict(data)


class CheckLandmarksd(MapTransform):
    """Refuse landmarks that lie outside their image as it was read; a case that lacks one has NaN.

    Args:
        keys: key with landmarks ``(landmarks, 3)`` in mm (RAS+).
        names: of the landmarks, for messages.
        image_key: the image, with its affine.

    Raises:
        DatasetError: naming case, landmark and place.
    """

    def __init__(self, keys: KeysCollection = "landmarks", names: Sequence[str] = (), image_key: str = "image") -> None:
        super().__init__(keys)
        self.names = list(names)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data[self.image_key]
        size = np.array(image.shape[1:])
        for key in self.key_iterator(dict(data)):
            voxels = world_to_voxel(np.asarray(data[key]), np.asarray(image.affine, dtype=np.float64))
            outside = ((voxels < -0.5) | (voxels > size - 0.5)).any(1)  # False for NaN
            if outside.any():
                index = int(outside.argmax())
                name = self.names[index] if index < len(self.names) else str(index)
                raise DatasetError(
                    f"case {data.get('case')}: the landmark {name} lies at the voxel "
                    f"{voxels[index].round(1).tolist()}, outside the image of {size.tolist()}; write null for one that "
                    "the case does not have. Coordinates are in mm and RAS+ (LPS has the first two signs turned)"
                )
        return dict(data)


class PositiveWindowd(MapTransform):
    """Clip to the mean plus and minus some standard deviations of the positive voxels; scale that window to 0..255.

    Args:
        keys: keys with images.
        num_deviations: half of the width of the window.

    References:
        Preprocessing of the LFC data set, used by nnMamba, arXiv:2402.03526, section 3.3.
    """

    def __init__(self, keys: KeysCollection = "image", num_deviations: float = 2.0) -> None:
        super().__init__(keys)
        if num_deviations <= 0:
            raise ValueError(f"`num_deviations` must be positive, got {num_deviations}")
        self.num_deviations = num_deviations

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            positive = image[image > 0]
            if positive.numel() < 2 or float(positive.std()) == 0:
                raise DatasetError(f"case {result.get('case')}: the image has no positive voxels that differ")
            low = float(positive.mean() - self.num_deviations * positive.std())
            high = float(positive.mean() + self.num_deviations * positive.std())
            result[key] = (image.clamp(low, high) - low) * (255.0 / (high - low))
        return result


class KeepAffined(MapTransform):
    """Keep where the voxels of an image lie, ``(4, 4)`` to world coordinates in mm (RAS+), under a key of its own.

    Args:
        keys: the image; after this transform its metadata may be dropped.
        name: the new key.
    """

    def __init__(self, keys: KeysCollection = "image", name: str = "affine") -> None:
        super().__init__(keys)
        self.name = name

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[self.name] = torch.as_tensor(np.asarray(result[key].affine, dtype=np.float64))
        return result


class LandmarksToHeatMapsd(MapTransform):
    """Make the heat maps ``(landmarks, *spatial)`` of a case's landmarks on the grid of its image.

    Args:
        keys: key with landmarks ``(landmarks, 3)`` in mm (RAS+), NaN for a landmark that is missing.
        name: key of the heat maps.
        image_key: the image, whose size is taken.
        affine_key: voxels to mm, see :class:`KeepAffined`.
        sigma_vox, amplitude: of the Gaussians.
    """

    def __init__(
        self,
        keys: KeysCollection = "landmarks",
        name: str = "label",
        image_key: str = "image",
        affine_key: str = "affine",
        sigma_vox: float = SIGMA_VOX,
        amplitude: float = AMPLITUDE,
    ) -> None:
        super().__init__(keys)
        self.name = name
        self.image_key = image_key
        self.affine_key = affine_key
        self.sigma_vox = sigma_vox
        self.amplitude = amplitude

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            voxels = world_to_voxel(np.asarray(result[key]), np.asarray(result[self.affine_key]))
            size = tuple(result[self.image_key].shape[1:])
            result[self.name] = gaussian_heat_maps(voxels, size, self.sigma_vox, self.amplitude)
        return result


class HeatMapsToLandmarksd(MapTransform):
    """Decode heat maps, as postprocessing: ``pred_mm`` and ``peak``, and ``error_mm`` where a reference is known.

    Args:
        keys: key with heat maps ``(landmarks, *spatial)``.
        window: 0 takes the voxel of the maximum (published), else fractions of a voxel are resolved, see
            :func:`~monai_mamba.heat_maps.decode_heat_maps`.
        affine_key: voxels to mm.
        reference_key: landmarks in mm, if the case has them.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        window: int = 0,
        affine_key: str = "affine",
        reference_key: str = "landmarks",
    ) -> None:
        super().__init__(keys)
        self.window = window
        self.affine_key = affine_key
        self.reference_key = reference_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            heat_maps = torch.as_tensor(result[key])
            voxels = decode_heat_maps(heat_maps, self.window)
            world = voxel_to_world(voxels, np.asarray(torch.as_tensor(result[self.affine_key]).cpu()))
            result["pred_mm"] = torch.from_numpy(world)
            result["peak"] = heat_maps.flatten(1).amax(1).float().cpu()
            if self.reference_key in result:
                reference = torch.as_tensor(result[self.reference_key]).cpu().double()
                result["error_mm"] = torch.linalg.vector_norm(result["pred_mm"] - reference, dim=-1)
        return result
