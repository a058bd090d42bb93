"""Predictions as DICOM-SEG and back; structure sets with holes."""

from __future__ import annotations

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from data_prep.dicom.labels import structure_set, write_dicom_seg
from data_prep.errors import CaseError
from data_prep.geometry import lps_to_ras
from data_prep.nifti import write_nifti
from data_prep.operations import Job
from data_prep.sources.dicom import Dicom
from tests.data_prep.dicom_factories import uid, write_series
from tests.data_prep.factories import convert_tree


@pytest.fixture
def series(tmp_path):
    write_series(tmp_path / "dicom", 6, angle=0.2)
    convert_tree(Dicom(), tmp_path / "dicom", tmp_path / "converted")
    (image,) = (tmp_path / "converted" / "images").iterdir()
    return sorted((tmp_path / "dicom").iterdir()), nibabel.load(image)


def _label_map(image):
    labels = np.zeros(image.shape, np.uint8)
    labels[2:5, 3:7, 1:4], labels[6:8, 1:3, 2] = 1, 2
    return labels


@pytest.mark.parametrize("reorder", [False, True], ids=["same-axes", "canonical-axes"])
def test_prediction_comes_back_from_its_dicom_seg_voxel_by_voxel(tmp_path, series, reorder):
    files, image = series
    label = nibabel.Nifti1Image(_label_map(image), image.affine)
    stored = nibabel.as_closest_canonical(label) if reorder else label
    write_nifti(tmp_path / "pred.nii.gz", np.asanyarray(stored.dataobj), stored.affine)
    count = write_dicom_seg(
        tmp_path / "pred.nii.gz",
        files,
        tmp_path / "dicom" / "seg.dcm",
        {1: "Liver", 2: "Spleen"},
        series_description="x",
    )
    assert count == 2
    assert convert_tree(Dicom(), tmp_path / "dicom", tmp_path / "back") == 0
    (path,) = (tmp_path / "back" / "labels").iterdir()
    np.testing.assert_array_equal(np.asanyarray(nibabel.load(path).dataobj), _label_map(image))


def test_highdicom_reads_the_same_voxels(tmp_path, series):
    import highdicom

    files, image = series
    write_nifti(tmp_path / "pred.nii.gz", _label_map(image), image.affine)
    write_dicom_seg(tmp_path / "pred.nii.gz", files, tmp_path / "s.dcm", {1: "a", 2: "b"}, series_description="x")
    volume = highdicom.seg.segread(tmp_path / "s.dcm").get_volume(combine_segments=True)
    assert int((volume.array == 1).sum()) == 36 and int((volume.array == 2).sum()) == 4


def test_prediction_on_another_grid_is_refused(tmp_path, series):
    files, image = series
    affine = image.affine.copy()
    affine[0, 3] += 0.5
    write_nifti(tmp_path / "pred.nii.gz", _label_map(image), affine)
    with pytest.raises(CaseError, match="grids-differ"):
        write_dicom_seg(tmp_path / "pred.nii.gz", files, tmp_path / "s.dcm", {1: "a", 2: "b"}, series_description="x")
    assert not (tmp_path / "s.dcm").exists()


def test_value_without_name_is_refused(tmp_path, series):
    files, image = series
    write_nifti(tmp_path / "pred.nii.gz", _label_map(image), image.affine)
    with pytest.raises(CaseError, match="unknown-label"):
        write_dicom_seg(tmp_path / "pred.nii.gz", files, tmp_path / "s.dcm", {1: "a"}, series_description="x")


def _structure_set(path, affine, squares):
    """Contours in LPS mm from squares (slice, first, last) in voxels."""
    dataset = Dataset()
    roi, drawn = Dataset(), Dataset()
    roi.ROINumber, roi.ROIName = 1, "Organ"
    drawn.ReferencedROINumber, drawn.ContourSequence = 1, []
    for number, first, last in squares:
        contour = Dataset()
        contour.ContourGeometricType = "CLOSED_PLANAR"
        corners = [(first, first), (last, first), (last, last), (first, last)]
        points = [(lps_to_ras(affine) @ [x, y, number, 1])[:3] for x, y in corners]
        contour.ContourData = [f"{value:.6f}" for point in points for value in point]
        drawn.ContourSequence.append(contour)
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [roi], [drawn]
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.3", uid("rt")
    dataset.save_as(path, enforce_file_format=True)


def _run_structure_set(tmp_path, squares):
    affine = np.array([[-0.7, 0, 0, 5], [0, -0.8, 0, 6], [0, 0, 2.5, 7], [0, 0, 0, 1]])
    _structure_set(tmp_path / "rt.dcm", affine, squares)
    params = {"affine": affine.tolist(), "shape": [20, 20, 4], "values": [["organ", 1]], "overlap": "error"}
    structure_set(Job((tmp_path / "rt.dcm",), tmp_path / "out.nii.gz", tmp_path / "out.nii.gz", params))
    return np.asanyarray(nibabel.load(tmp_path / "out.nii.gz").dataobj)


def test_contour_inside_another_is_a_hole(tmp_path):
    labels = _run_structure_set(tmp_path, [(2, 2.5, 12.5), (2, 5.5, 8.5)])
    assert labels[..., 2].sum() == 100 - 9 and labels.sum() == 91
    assert labels[4, 4, 2] == 1 and labels[7, 7, 2] == 0


@pytest.mark.parametrize(("number", "reason"), [(1.4, "contour-off-slice"), (9, "missing-slices")])
def test_contour_off_the_slices_is_refused(tmp_path, number, reason):
    with pytest.raises(CaseError, match=reason):
        _run_structure_set(tmp_path, [(number, 2.5, 8.5)])
