"""Transforms that MONAI does not have: pictures as the papers read them, and AutoAugment.

Everything else in the bundles is MONAI's own.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from PIL import Image

from monai_mamba.errors import DatasetError

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
    """Turn class numbers into one-hot float vectors ``(classes,)`` for the metrics; lists of zeros and ones stay.

    Args:
        keys: keys with labels.
        num_classes: length of the vectors; 1 keeps the number, for networks with one logit for two classes.
        multi_label: labels are lists of zeros and ones already.
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
