"""NIfTI headers on which readers do not agree are refused."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from data_prep.errors import ImageReadError
from data_prep.nifti import open_nifti

AFFINE = np.diag([2.0, 2, 3, 1])
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


def _save(path, affine=AFFINE, dtype=np.int16, unit=2):
    image = nib.Nifti1Image(np.zeros((5, 6, 7), dtype), affine)
    image.set_sform(affine, 1)
    image.set_qform(None, 0)
    image.header["xyzt_units"] = unit
    nib.save(image, path)
    return path


@pytest.mark.parametrize("unit", [1, 3], ids=["m", "micrometers"])
def test_open_nifti_refuses_units_that_itk_converts_and_nibabel_does_not(tmp_path, unit):
    with pytest.raises(ImageReadError, match="not-millimeters"):
        open_nifti(_save(tmp_path / "x.nii.gz", unit=unit))
    assert open_nifti(_save(tmp_path / "y.nii.gz", unit=0)).grid.spacing == (2, 2, 3)


def test_open_nifti_refuses_a_sheared_grid_as_itk_does(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    affine = AFFINE.copy()
    affine[1, 2] = 3 * np.tan(np.radians(14))
    path = _save(tmp_path / "x.nii.gz", affine)
    with pytest.raises(ImageReadError, match="right angles"):
        open_nifti(path)
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(path))


@pytest.mark.parametrize("dtype", [np.complex64, RGB], ids=["complex", "RGB"])
def test_open_nifti_refuses_voxels_that_are_no_numbers(tmp_path, dtype):
    with pytest.raises(ImageReadError, match="unsupported-type"):
        open_nifti(_save(tmp_path / "x.nii.gz", dtype=dtype))
