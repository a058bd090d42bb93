"""Three planes through a volume, in mm, with the letters of the patient's sides."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

#: Axes of a volume in RAS+ order: name, index of the axis that is cut, letters at the left, right, bottom and top.
PLANES = (("axial", 2, tuple("LRPA")), ("coronal", 1, tuple("LRIS")), ("sagittal", 0, tuple("PAIS")))
PANEL_INCHES = 3.0


def load_ras(path: os.PathLike[str] | str) -> tuple[np.ndarray, tuple[float, ...]]:
    """Return voxels in the order right, anterior, superior, and the voxel size in mm."""
    image = nib.as_closest_canonical(nib.load(path))
    assert isinstance(image, nib.Nifti1Image)
    data = np.asarray(image.dataobj)
    return data.reshape(data.shape[:3]), tuple(float(s) for s in nib.affines.voxel_sizes(image.affine))


def busiest_slices(weight: np.ndarray) -> tuple[int, int, int]:
    """Return for each axis the slice with the largest sum, or the middle one if all are zero."""
    if not weight.any():
        return tuple(size // 2 for size in weight.shape)
    sums = [weight.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    return tuple(int(s.argmax()) for s in sums)  # type: ignore[return-value]


def slice_planes(volume: np.ndarray, slices: Sequence[int]) -> list[np.ndarray]:
    """Return the axial, coronal and sagittal slice ``(rows, columns)``, to be drawn with the origin below."""
    return [np.take(volume, slices[axis], axis=axis).T for _, axis, _ in PLANES]


def plane_extent(shape: Sequence[int], spacing: Sequence[float], axis: int) -> tuple[float, float, float, float]:
    """Return ``(left, right, bottom, top)`` in mm of the plane that cuts ``axis``."""
    across, up = (a for a in range(3) if a != axis)
    return 0.0, shape[across] * spacing[across], 0.0, shape[up] * spacing[up]


def gray_window(image: np.ndarray) -> tuple[float, float]:
    """Return the intensities for black and white."""
    low, high = np.percentile(image, (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))


def draw_letters(panel: Any, letters: Sequence[str]) -> None:
    """Mark the patient's sides at the left, right, bottom and top of a panel."""
    left, right, bottom, top = letters
    for x, y, letter in ((0.03, 0.5, left), (0.97, 0.5, right), (0.5, 0.04, bottom), (0.5, 0.96, top)):
        mark = panel.text(x, y, letter, transform=panel.transAxes, color="white", fontsize=9, ha="center", va="center")
        mark.set_path_effects([withStroke(linewidth=2, foreground="black")])


def draw_segmentation(
    image: np.ndarray,
    spacing: Sequence[float],
    references: Mapping[str, np.ndarray],
    predictions: Mapping[str, np.ndarray],
    colors: Mapping[str, str],
) -> Figure:
    """Draw predicted and reference structures on the slices with the largest reference area.

    Args:
        image: voxels in RAS+ order.
        spacing: in mm.
        references, predictions: masks by structure.
        colors: by structure.
    """
    shown = references if any(mask.any() for mask in references.values()) else predictions
    slices = busiest_slices(np.sum([mask > 0 for mask in shown.values()], axis=0))
    low, high = gray_window(image)
    figure = Figure(figsize=(3 * PANEL_INCHES, PANEL_INCHES * 1.08), facecolor="black", layout="constrained")
    pictures = slice_planes(image, slices)
    for panel, picture, (name, axis, letters) in zip(figure.subplots(1, 3), pictures, PLANES, strict=True):
        extent = plane_extent(image.shape, spacing, axis)
        panel.imshow(picture, "gray", vmin=low, vmax=high, origin="lower", extent=extent, interpolation="bicubic")
        # The largest first: a region must not hide its parts.
        for structure in sorted(colors, key=lambda name: -int(predictions[name].sum())):
            color = colors[structure]
            wanted, found = (
                np.take(masks[structure], slices[axis], axis=axis).T for masks in (references, predictions)
            )
            _draw_structure(panel, wanted, found, color, extent)
        panel.set(xlim=extent[:2], ylim=extent[2:])
        panel.set_title(name, color="white", fontsize=10)
        panel.axis("off")
        draw_letters(panel, letters)
    return figure


def _draw_structure(panel: Any, wanted: np.ndarray, found: np.ndarray, color: str, extent: Sequence[float]) -> None:
    """The prediction as a tint, the reference as a line around its voxels."""
    from matplotlib.colors import to_rgba

    tint = np.zeros((*found.shape, 4))
    tint[found] = to_rgba(color, 0.5)
    panel.imshow(tint, origin="lower", extent=extent, interpolation="nearest")
    if wanted.any():
        # With a margin, so that a line closes at the border of the volume, and at the centers of the voxels.
        step_x, step_y = extent[1] / wanted.shape[1], extent[3] / wanted.shape[0]
        padded = np.pad(wanted.astype(float), 1)
        x = (np.arange(padded.shape[1]) - 0.5) * step_x
        y = (np.arange(padded.shape[0]) - 0.5) * step_y
        panel.contour(x, y, padded, levels=[0.5], colors=[color], linewidths=1.8)
