"""Three planes through a volume as radiologists look at them, in mm, with the letters of the patient's sides.

This is the one place where slices are turned for a picture: the viewer faces the patient, whose right is on the
viewer's left in axial (seen from the feet) and coronal planes; sagittal planes have the front on the viewer's left.
Which way a volume was stored does not matter, its affine tells. Pictures without an affine are not turned here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

PANEL_INCHES = 3.0
#: For captions.
CONVENTION = "The patient's right is on the left of axial and coronal planes, the front on the left of sagittal ones."


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie, and how they are turned to the order right, anterior, superior (RAS+).

    Attributes:
        shape: of the volume as it is stored.
        affine: ``(4, 4)``, its voxels to RAS+ in mm; oblique axes are taken for the nearest ones.
        has_sides: False if the file does not say where the patient's sides are; then nothing is turned or lettered.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    has_sides: bool = True

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm along the axes of the turned volume."""
        return tuple(float(s) for s in nib.affines.voxel_sizes(np.asarray(self.affine) @ self._back()))

    def turn(self, volume: np.ndarray) -> np.ndarray:
        """Return a volume of this grid in RAS+ order."""
        return np.asarray(nib.orientations.apply_orientation(volume, self._orientation()))

    def turn_point(self, voxel: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return where a point ``(i, j, k)`` of this grid lies in the turned volume."""
        return np.asarray(nib.affines.apply_affine(np.linalg.inv(self._back()), voxel))

    def _orientation(self) -> np.ndarray:
        affine = self.affine if self.has_sides else np.eye(4)
        return np.asarray(nib.orientations.io_orientation(affine))

    def _back(self) -> np.ndarray:
        return np.asarray(nib.orientations.inv_ornt_aff(self._orientation(), self.shape))


@dataclass(frozen=True)
class Plane:
    """A plane through a volume in RAS+ order.

    Attributes:
        name: of the plane.
        axis: that is cut.
        letters: the patient's sides at the left, right, bottom and top of the picture.
    """

    name: str
    axis: int
    letters: str

    def cut(self, volume: np.ndarray, slices: Sequence[int]) -> np.ndarray:
        """Return the slice ``(rows, columns)`` at ``slices[axis]``, to be drawn with the origin below."""
        return np.take(volume, slices[self.axis], axis=self.axis).T[:, ::-1]

    def extent(self, shape: Sequence[int], spacing: Sequence[float]) -> tuple[float, float, float, float]:
        """Return ``(left, right, bottom, top)`` of the slice in mm."""
        across, up = self._axes
        return 0.0, shape[across] * spacing[across], 0.0, shape[up] * spacing[up]

    def place(
        self, voxel: Sequence[float] | np.ndarray, shape: Sequence[int], spacing: Sequence[float]
    ) -> tuple[float, float]:
        """Return where a point ``(i, j, k)`` of the volume lies in the picture, in mm."""
        across, up = self._axes
        return (shape[across] - 0.5 - voxel[across]) * spacing[across], (voxel[up] + 0.5) * spacing[up]

    def dress(self, panel: Any, grid: Grid) -> None:
        """Name the plane above a panel and mark the patient's sides, if they are known."""
        panel.axis("off")
        if not grid.has_sides:
            panel.set_title(f"across axis {self.axis + 1}", color="white", fontsize=10)
            return
        panel.set_title(self.name, color="white", fontsize=10)
        places = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.04), (0.5, 0.96))
        for (x, y), letter in zip(places, self.letters, strict=True):
            mark = panel.text(
                x, y, letter, transform=panel.transAxes, color="white", fontsize=9, ha="center", va="center"
            )  # fmt: skip
            mark.set_path_effects([withStroke(linewidth=2, foreground="black")])

    @property
    def _axes(self) -> tuple[int, int]:
        across, up = (a for a in range(3) if a != self.axis)
        return across, up


PLANES = (Plane("axial", 2, "RLPA"), Plane("coronal", 1, "RLIS"), Plane("sagittal", 0, "APIS"))


def load_ras(path: os.PathLike[str] | str) -> tuple[np.ndarray, Grid]:
    """Return the voxels of a NIfTI file in RAS+ order, and their grid; as stored if the file has no affine."""
    image = nib.Nifti1Image.from_filename(path)
    assert image.affine is not None
    data = np.asarray(image.dataobj)
    data = data.reshape((*data.shape, 1)[:3])
    has_sides = bool(image.header["qform_code"] or image.header["sform_code"])
    grid = Grid(data.shape, image.affine, has_sides)
    return grid.turn(data), grid


def busiest_slices(weight: np.ndarray) -> tuple[int, int, int]:
    """Return for each axis the slice with the largest sum, or the middle one if all are zero."""
    if not weight.any():
        return tuple(size // 2 for size in weight.shape)
    sums = [weight.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    return tuple(int(s.argmax()) for s in sums)  # type: ignore[return-value]


def gray_window(image: np.ndarray) -> tuple[float, float]:
    """Return the intensities for black and white."""
    low, high = np.percentile(image, (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))


def draw_outline(panel: Any, mask: np.ndarray, extent: Sequence[float], color: str, style: str = "solid") -> None:
    """Draw a line around the pixels of a slice's mask, as :meth:`Plane.cut` returns it."""
    if not mask.any():
        return
    # With a margin, so that a line closes at the border of the volume, and at the centers of the voxels.
    step_x, step_y = extent[1] / mask.shape[1], extent[3] / mask.shape[0]
    padded = np.pad(mask.astype(float), 1)
    x = (np.arange(padded.shape[1]) - 0.5) * step_x
    y = (np.arange(padded.shape[0]) - 0.5) * step_y
    panel.contour(x, y, padded, levels=[0.5], colors=[color], linewidths=1.8, linestyles=style)


def draw_segmentation(
    image: np.ndarray,
    grid: Grid,
    references: Mapping[str, np.ndarray],
    predictions: Mapping[str, np.ndarray],
    colors: Mapping[str, str],
) -> Figure:
    """Draw predicted and reference structures on the slices with the largest reference area.

    Args:
        image: voxels in RAS+ order.
        grid: of the image.
        references, predictions: masks by structure, in RAS+ order.
        colors: by structure.
    """
    from matplotlib.colors import to_rgba

    shown = references if any(mask.any() for mask in references.values()) else predictions
    slices = busiest_slices(np.sum([mask > 0 for mask in shown.values()], axis=0))
    low, high = gray_window(image)
    figure = Figure(figsize=(3 * PANEL_INCHES, PANEL_INCHES * 1.08), facecolor="black", layout="constrained")
    for panel, plane in zip(figure.subplots(1, 3), PLANES, strict=True):
        extent = plane.extent(image.shape, grid.spacing)
        picture = plane.cut(image, slices)
        panel.imshow(picture, "gray", vmin=low, vmax=high, origin="lower", extent=extent, interpolation="bicubic")
        # The largest first: a region must not hide its parts.
        for structure in sorted(colors, key=lambda name: -int(predictions[name].sum())):
            found = plane.cut(predictions[structure], slices)
            tint = np.zeros((*found.shape, 4))
            tint[found] = to_rgba(colors[structure], 0.5)
            panel.imshow(tint, origin="lower", extent=extent, interpolation="nearest")
            draw_outline(panel, plane.cut(references[structure], slices), extent, colors[structure])
        panel.set(xlim=extent[:2], ylim=extent[2:])
        plane.dress(panel, grid)
    return figure
