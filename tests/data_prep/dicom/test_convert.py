"""Pixels as they are stored, and what dcm2niix has to say about them."""

from __future__ import annotations

import csv

import nibabel
import numpy as np
import pytest

from data_prep.dicom import convert
from data_prep.dicom.convert import smallest_type
from data_prep.sources.dicom import Dicom
from tests.data_prep.dicom_factories import write_series
from tests.data_prep.factories import convert_tree


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([-32768, 32767], np.int16),
        ([0, 65535], np.uint16),
        ([-1, 65535], np.int32),
        ([0, 2**31], np.float32),
        ([0.5], np.float32),
    ],
    ids=str,
)
def test_smallest_type_holds_the_values(values, kind):
    assert smallest_type(np.array(values)) == kind


def test_volume_keeps_integers_and_widens_where_one_slice_needs_it(tmp_path):
    def edit(slices):
        slices[4].RescaleIntercept = "40000"

    slices = write_series(tmp_path / "in", 6, edit=edit)
    convert_tree(Dicom(), tmp_path / "in", tmp_path / "out")
    (path,) = (tmp_path / "out" / "images").iterdir()
    image = nibabel.load(path)
    assert image.get_data_dtype() == np.int32
    assert image.dataobj[0, 0, 4] == int(slices[4].pixel_array[0, 0]) + 40000


def test_disagreement_of_dcm2niix_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "run_dcm2niix", _wrong_volume)
    write_series(tmp_path / "in", 6)
    assert convert_tree(Dicom(), tmp_path / "in", tmp_path / "out") == 0
    with open(tmp_path / "out" / "report.csv") as file:
        (case,) = [row for row in csv.DictReader(file) if row["kind"] == "case"]
    assert case["detail"] == "dcm2niix was not used (voxels-differ)"


def _wrong_volume(paths, folder):
    affine = np.diag([-0.7, -0.8, 2.5, 1])
    affine[:3, 3] = [20, 30, 40]
    path = folder / "v.nii"
    nibabel.save(nibabel.Nifti1Image(np.zeros((10, 12, 6), np.int16), affine), path)
    return [path]
