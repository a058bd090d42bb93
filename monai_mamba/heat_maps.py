"""Landmarks as heat maps: Gaussians to train with, positions from what a network returns, voxels to mm and back.

One landmark is one channel. Positions are in voxels of the array, in the order of its axes, fractions included; a
landmark that an image does not have is NaN, and so is its heat map.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: Published: standard deviation of the Gaussians in voxels, and the value at their centers.
SIGMA_VOX = 5.0
AMPLITUDE = 255.0


def gaussian_heat_maps(
    voxels: Tensor | np.ndarray,
    shape: Sequence[int],
    sigma_vox: float | Sequence[float] = SIGMA_VOX,
    amplitude: float = AMPLITUDE,
) -> Tensor:
    """Return one Gaussian per landmark, ``amplitude * exp(-d^2 / (2 sigma^2))`` with d the distance in voxels.

    The published code rescales each batch so that its smallest and largest value are 0 and 255. Here the value at the
    landmark itself is ``amplitude`` in every case, so that a target does not depend on its neighbours in the batch.

    Args:
        voxels: ``(..., landmarks, dims)``; a landmark outside the array gives the part of its Gaussian that is inside.
        shape: of the array, ``dims`` sizes.
        sigma_vox: standard deviation in voxels, one number or one per axis.
        amplitude: value at the landmark.

    Returns:
        ``(..., landmarks, *shape)``, float32, on the device of ``voxels``. NaN for landmarks that are NaN.

    Raises:
        ValueError: if ``voxels`` and ``shape`` do not fit, or an argument is not positive.

    References:
        nnMamba, arXiv:2402.03526, section 3.3; sigma and amplitude from the pipeline of the LFC data set.
    """
    points = torch.as_tensor(voxels, dtype=torch.float32)
    dims = len(shape)
    if points.ndim < 2 or points.shape[-1] != dims:
        raise ValueError(
            f"`voxels` must have shape (..., landmarks, {dims}) for an array of shape {tuple(shape)}, "
            f"got {tuple(points.shape)}"
        )
    sigmas = [float(sigma_vox)] * dims if isinstance(sigma_vox, int | float) else [float(s) for s in sigma_vox]
    if len(sigmas) != dims or min(sigmas) <= 0:
        raise ValueError(f"`sigma_vox` must be positive, one number or {dims} of them, got {sigma_vox}")
    if amplitude <= 0:
        raise ValueError(f"`amplitude` must be positive, got {amplitude}")
    maps = torch.full(points.shape[:-1] + (1,) * dims, float(amplitude), device=points.device)
    for axis, (size, sigma) in enumerate(zip(shape, sigmas, strict=True)):
        distance = torch.arange(size, device=points.device) - points[..., axis, None]  # (..., landmarks, size)
        profile = torch.exp(-(distance**2) / (2 * sigma**2))
        maps = maps * profile.reshape(points.shape[:-1] + (1,) * axis + (size,) + (1,) * (dims - 1 - axis))
    return maps


def decode_heat_maps(heat_maps: Tensor | np.ndarray, window: int = 0) -> np.ndarray:
    """Return the position of each heat map's maximum, in voxels of the array.

    Args:
        heat_maps: ``(landmarks, *spatial)``.
        window: 0 takes the voxel of the maximum (published); else the center of mass of the values within ``window``
            voxels of it is taken, which resolves fractions of a voxel.

    Returns:
        ``(landmarks, spatial_dims)``, float64.

    Raises:
        ValueError: if there is no spatial axis, or a value is not finite.
    """
    values = heat_maps.detach().float().cpu().numpy() if isinstance(heat_maps, Tensor) else heat_maps
    heat_maps = np.asarray(values, dtype=np.float64)
    if heat_maps.ndim < 2:
        raise ValueError(f"`heat_maps` must have shape (landmarks, *spatial), got {heat_maps.shape}")
    if window < 0:
        raise ValueError(f"`window` must be at least 0, got {window}")
    if not np.isfinite(heat_maps).all():
        raise ValueError("`heat_maps` holds values that are not finite; the network has diverged")
    shape = heat_maps.shape[1:]
    peaks = np.stack(np.unravel_index(heat_maps.reshape(len(heat_maps), -1).argmax(1), shape), axis=1)
    if window == 0:
        return peaks.astype(np.float64)
    positions = np.empty(peaks.shape)
    for index, (heat_map, peak) in enumerate(zip(heat_maps, peaks, strict=True)):
        # The window is cut evenly at a border: a one-sided one would pull the position inwards.
        reach = [min(window, p, size - 1 - p) for p, size in zip(peak, shape, strict=True)]
        block = heat_map[tuple(slice(p - r, p + r + 1) for p, r in zip(peak, reach, strict=True))]
        weights = block - block.min()
        if weights.sum() == 0:
            positions[index] = peak
            continue
        grid = np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij")
        positions[index] = peak + np.array([(offset * weights).sum() for offset in grid]) / weights.sum()
    return positions


def voxel_to_world(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return world coordinates in mm (RAS+ for NIfTI affines) of positions in voxels.

    Args:
        voxels: ``(..., 3)`` in the order of the array's axes (i, j, k).
        affine: ``(4, 4)``.
    """
    return np.asarray(voxels) @ affine[:3, :3].T + affine[:3, 3]


def world_to_voxel(world_mm: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return positions in voxels of world coordinates in mm, the inverse of :func:`voxel_to_world`.

    Args:
        world_mm: ``(..., 3)``.
        affine: ``(4, 4)``, voxels to mm.
    """
    affine = np.asarray(affine, dtype=np.float64)
    return (np.asarray(world_mm, dtype=np.float64) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
