"""Landmarks as small labels, for networks that segment."""

from __future__ import annotations

import numpy as np

from data_prep.errors import CaseError
from data_prep.geometry import landmarks_in_voxels
from data_prep.nifti import open_nifti, write_nifti
from data_prep.operations import Job, Outcome, operation


@operation(version=1)
def balls(job: Job) -> Outcome:
    """A label map on the grid of the image with a ball around each landmark; the n-th landmark has value n.

    Where balls meet, a voxel belongs to the nearest landmark. The voxel that holds a landmark is always labelled.

    Params:
        landmarks: ``[x, y, z]`` each, mm, RAS+.
        radius_mm: of the balls.
        form: see `data_prep.nifti.open_nifti`.
    """
    grid = open_nifti(job.inputs[0], job.params.get("form", "strict")).grid
    points, radius = job.params["landmarks"], float(job.params["radius_mm"])
    if grid.affine is None:
        raise CaseError("no-orientation", "landmarks in mm need an image with a place in space")
    voxels = np.array(landmarks_in_voxels(points, grid))
    labels = np.zeros(grid.shape, np.uint8 if len(points) < 256 else np.uint16)
    nearest = np.full(grid.shape, np.inf, np.float32)
    # Half of the extent, in voxels, of the box around a ball, for any direction and shear of the grid.
    reach = radius * np.linalg.norm(np.linalg.inv(grid.affine[:3, :3]), axis=1)
    for value, center in enumerate(voxels, 1):
        home = np.clip(np.rint(center).astype(int), 0, np.array(grid.shape) - 1)
        low = np.minimum(np.maximum(np.floor(center - reach).astype(int), 0), home)
        high = np.maximum(np.minimum(np.ceil(center + reach).astype(int) + 1, grid.shape), home + 1)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        indices = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij"), -1)
        distance = np.linalg.norm((indices - center) @ grid.affine[:3, :3].T, axis=-1).astype(np.float32)
        distance[tuple(home - low)] = 0.0
        wins = (distance <= radius) & (distance < nearest[box])
        labels[box][wins] = value
        nearest[box][wins] = distance[wins]
    found = tuple(int(value) for value in np.unique(labels))
    missing = sorted(set(range(1, len(points) + 1)) - set(found))
    if missing:
        raise CaseError("landmarks-coincide", f"landmarks number {missing} share a voxel with others; no label is left")
    write_nifti(job.output, labels, grid.affine)
    return Outcome(grid, labels=found)
