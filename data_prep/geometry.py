"""Voxel grids: where voxel ``(i, j, k)`` lies in millimetres, and whether two grids are the same.

Affines are RAS+ (nibabel's convention) and map voxel indices in array order to millimetres. DICOM and SimpleITK speak
LPS+; `lps_to_ras` is the only place where the two meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from data_prep.errors import CaseError

#: two grids whose voxel centers differ by no more than this are the same grid
TOLERANCE_MM = 0.01
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Grid:
    """A voxel grid.

    Args:
        shape: number of voxels along ``(i, j, k)``, or ``(i, j)`` for a picture.
        affine: ``(4, 4)`` RAS+ matrix in mm, or ``None`` for a picture without a position in space.
    """

    shape: tuple[int, ...]
    affine: np.ndarray | None

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "affine": None if self.affine is None else self.affine.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Grid:
        affine = value["affine"]
        return cls(tuple(value["shape"]), None if affine is None else np.array(affine, dtype=np.float64))

    @property
    def spacing(self) -> tuple[float, ...] | None:
        if self.affine is None:
            return None
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))


def lps_to_ras(affine: np.ndarray) -> np.ndarray:
    """Turn a voxel-to-LPS matrix into a voxel-to-RAS matrix; the same product turns it back."""
    return LPS_TO_RAS @ affine


def max_distance_mm(shape: tuple[int, ...], first: np.ndarray, second: np.ndarray) -> float:
    """Largest distance between where two affines put the same voxel of a grid.

    The difference of two affine maps is affine, so its norm is largest at a corner.
    """
    corners = np.array([[*corner, 1] for corner in product(*[(0, n - 1) for n in shape[:3]])], dtype=np.float64)
    return float(np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max())


def grid_difference(first: Grid, second: Grid, tolerance_mm: float = TOLERANCE_MM) -> str:
    """Why two grids are not the same, or an empty string when they are."""
    if first.shape[:3] != second.shape[:3]:
        return f"shape {list(first.shape)} against {list(second.shape)}"
    if first.affine is None or second.affine is None:
        return "" if first.affine is None and second.affine is None else "only one of the two has a position in space"
    distance = max_distance_mm(first.shape, first.affine, second.affine)
    if not distance <= tolerance_mm:
        return f"voxels lie up to {distance:.3g} mm apart (allowed {tolerance_mm} mm)"
    return ""


def landmarks_in_voxels(points: Sequence[Sequence[float]], grid: Grid | None) -> list[list[float]]:
    """Voxel coordinates ``(i, j, k)`` of world points; integers are centers of voxels.

    Args:
        points: ``(x, y, z)`` in mm, RAS+.
        grid: of the image they belong to.

    Raises:
        CaseError: a point is not finite or lies outside of the image, or the image has no place in space.
    """
    if not len(points):
        return []
    if grid is None or grid.affine is None:
        raise CaseError("no-orientation", "landmarks in mm need an image with a place in space")
    world = np.array(points, dtype=np.float64)
    voxels = np.linalg.solve(grid.affine[:3, :3], (world - grid.affine[:3, 3]).T).T
    inside = (voxels >= -0.5).all(axis=1) & (voxels <= np.array(grid.shape) - 0.5).all(axis=1)
    if not inside.all():  # NaN compares false
        numbers = ", ".join(str(n + 1) for n in np.flatnonzero(~inside))
        raise CaseError("landmark-outside-image", f"landmarks number {numbers} of {len(points)}")
    return voxels.tolist()


def check_affine(affine: np.ndarray) -> str:
    """Why `affine` cannot be the affine of a grid, or an empty string."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        return "the affine holds values that are not finite"
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (lengths < 1e-6).any() or (lengths > 1e4).any():
        return f"voxel sizes {[float(f'{x:.4g}') for x in lengths]} mm are not possible"
    volume = abs(np.linalg.det(affine[:3, :3] / lengths))
    if volume < 1e-3:
        return "the affine is singular"
    return ""
