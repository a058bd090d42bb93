"""A volume whose sides are known, stored in any order of axes."""

from __future__ import annotations

import nibabel as nib
import numpy as np

#: In RAS+ order; all sizes and spacings differ.
SIZE, SPACING = (10, 14, 18), (1.0, 1.5, 2.5)
#: A voxel on the right, behind, above.
MARK = (8, 3, 16)
STORED = ("RAS", "LPS", "PIR", "SAL", "ILA")


def phantom(codes: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image, mask of the mark and affine, stored in the order ``codes``; the patient's right half is bright."""
    image, mark = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.uint8)
    image[5:], mark[MARK] = 100, 1
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-20, 7, 30)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(codes))
    )
    stored = affine @ nib.orientations.inv_ornt_aff(turn, SIZE)
    image, mark = (nib.orientations.apply_orientation(values, turn) for values in (image, mark))
    return image, mark, stored
