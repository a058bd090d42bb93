"""Where the voxels of an image that nnU-Net has read or preprocessed lie in the world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monai_mamba.errors import DatasetError

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def raw_affine(properties: Mapping[str, Any]) -> np.ndarray:
    """Return the affine from voxels of the array that nnU-Net's reader gives, in its axis order, to RAS+ mm.

    Args:
        properties: what the reader returned beside the array.

    Raises:
        DatasetError: if the file format has no place in the world (pictures, TIFF), or the image has two axes.
    """
    if stuff := properties.get("sitk_stuff"):
        if len(stuff["spacing"]) != 3:
            raise DatasetError(f"the image has {len(stuff['spacing'])} axes; positions in mm need a volume")
        file_affine = np.eye(4)
        file_affine[:3, :3] = np.reshape(stuff["direction"], (3, 3)) * np.asarray(stuff["spacing"])
        file_affine[:3, 3] = stuff["origin"]
        file_affine = _LPS_TO_RAS @ file_affine
    elif stuff := properties.get("nibabel_stuff"):
        file_affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), dtype=np.float64)
    else:
        raise DatasetError(
            "the file format tells no place in the world; use NIfTI, NRRD or MHA, which nnU-Net reads with SimpleITK"
        )
    return file_affine @ _permutation([2, 1, 0])  # nnU-Net's arrays run z, y, x


def preprocessed_affine(
    properties: Mapping[str, Any], shape: Sequence[int], transpose_forward: Sequence[int]
) -> np.ndarray:
    """Return the affine from voxels of a preprocessed array to RAS+ mm.

    Undone are, from the last to the first: resampling (the outer faces of the first and last voxels stay where they
    are, as in :func:`skimage.transform.resize`), cropping to the nonzero region, and the transposition of the axes.

    Args:
        properties: of the preprocessed case.
        shape: of the preprocessed array, without channels.
        transpose_forward: of the plans.
    """
    cropped = np.asarray(properties["shape_after_cropping_and_before_resampling"], dtype=np.float64)
    scale = cropped / np.asarray(shape)
    to_cropped = np.diag([*scale, 1.0])
    to_cropped[:3, 3] = 0.5 * scale - 0.5
    to_transposed = np.eye(4)
    to_transposed[:3, 3] = [low for low, _ in properties["bbox_used_for_cropping"]]
    return raw_affine(properties) @ _permutation(transpose_forward) @ to_transposed @ to_cropped


def _permutation(order: Sequence[int]) -> np.ndarray:
    """Return the matrix that takes an index whose axis k is axis ``order[k]`` of another array to that array's."""
    matrix = np.zeros((4, 4))
    matrix[list(order), range(3)] = 1
    matrix[3, 3] = 1
    return matrix
