"""Predictions as DICOM-SEG and back; structure sets with holes."""

from __future__ import annotations

import errno
import os

import nibabel
import numpy as np
import pydicom
import pytest
from scipy.spatial.transform import Rotation

from data_prep.cli import main
from data_prep.dicom.labels import structure_set, write_dicom_seg
from data_prep.errors import CaseError
from data_prep.nifti import write_nifti
from data_prep.operations import Job
from data_prep.sources.dicom import Dicom
from tests.data_prep.dicom.test_series import enhanced
from tests.data_prep.dicom_factories import make_structure_set, uid, write_series
from tests.data_prep.factories import convert_tree, report_lines


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


def _run_structure_set(tmp_path, squares):
    affine = np.array([[-0.7, 0, 0, 5], [0, -0.8, 0, 6], [0, 0, 2.5, 7], [0, 0, 0, 1]])
    make_structure_set(affine, squares).save_as(tmp_path / "rt.dcm", enforce_file_format=True)
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


def _write_seg(path, series, kind, frames=None):
    """A DICOM-SEG object of highdicom on the slices of a series; ``frames`` are ``(slices, rows, columns)``."""
    import highdicom
    from pydicom.sr.codedict import codes

    files, image = series
    datasets = sorted(map(pydicom.dcmread, files), key=lambda one: float(one.ImagePositionPatient[2]))
    labels = np.moveaxis(_label_map(image), -1, 0).swapaxes(1, 2)
    descriptions = [
        highdicom.seg.SegmentDescription(
            number, name, codes.SCT.Organ, codes.SCT.Liver, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for number, name in ((1, "Liver"), (2, "Spleen"))[: 1 if kind == "FRACTIONAL" else 2]
    ]
    made = highdicom.seg.Segmentation(
        datasets, labels if frames is None else frames, kind, descriptions, uid("seg series"), 9, uid("seg"), 1,
        "maker", "model", "1", "0", fractional_type="PROBABILITY",
    )  # fmt: skip
    made.save_as(path)


def test_label_map_segmentation_gives_its_voxels(tmp_path, series):
    _write_seg(tmp_path / "dicom" / "seg.dcm", series, "LABELMAP")
    assert convert_tree(Dicom(), tmp_path / "dicom", tmp_path / "back") == 0
    (path,) = (tmp_path / "back" / "labels").iterdir()
    np.testing.assert_array_equal(np.asanyarray(nibabel.load(path).dataobj), _label_map(series[1]))
    assert convert_tree(Dicom(label=["spleen"]), tmp_path / "dicom", tmp_path / "one") == 0
    (path,) = (tmp_path / "one" / "labels").iterdir()
    np.testing.assert_array_equal(np.asanyarray(nibabel.load(path).dataobj), _label_map(series[1]) == 2)


def test_label_map_segmentation_with_a_number_that_is_no_segment_is_refused(tmp_path, series):
    path = tmp_path / "dicom" / "seg.dcm"
    _write_seg(path, series, "LABELMAP")
    made = pydicom.dcmread(path)
    made.PixelData = made.PixelData.replace(b"\2", b"\7")
    made.save_as(path)
    assert convert_tree(Dicom(), tmp_path / "dicom", tmp_path / "back") == 3
    assert ("failed", "unreadable-label") in report_lines(tmp_path / "back").values()


def test_fractional_segmentation_is_refused_or_cut_where_the_user_says(tmp_path, series):
    part = np.moveaxis(_label_map(series[1]) == 1, -1, 0).swapaxes(1, 2) * np.array([0.3, 0.6, 0.9] * 2)[:, None, None]
    _write_seg(tmp_path / "dicom" / "seg.dcm", series, "FRACTIONAL", part.astype(np.float32))
    assert convert_tree(Dicom(), tmp_path / "dicom", tmp_path / "back") == 3
    assert ("failed", "fractional-segments") in report_lines(tmp_path / "back").values()
    assert convert_tree(Dicom(fraction=0.5), tmp_path / "dicom", tmp_path / "cut") == 0
    (path,) = (tmp_path / "cut" / "labels").iterdir()
    np.testing.assert_array_equal(
        np.asanyarray(nibabel.load(path).dataobj), (part >= 0.5).swapaxes(1, 2).transpose(1, 2, 0)
    )
    assert "cut at 0.5" in (tmp_path / "private-cut" / "report.csv").read_text()


def test_label_with_another_frame_of_reference_is_taken_with_a_note(tmp_path, series):
    path = tmp_path / "dicom" / "seg.dcm"
    _write_seg(path, series, "BINARY")
    made = pydicom.dcmread(path)
    made.FrameOfReferenceUID = uid("invented")
    made.save_as(path)
    assert convert_tree(Dicom(), tmp_path / "dicom", tmp_path / "back") == 0
    assert "another frame of reference" in (tmp_path / "private-back" / "report.csv").read_text()


def test_prediction_of_an_enhanced_object_comes_back_voxel_by_voxel(tmp_path):
    (tmp_path / "dicom").mkdir()
    source = enhanced(order=[3, 1, 5, 0, 2, 4], turn=Rotation.from_euler("xyz", (0.3, 0.1, 0.9)).as_matrix())
    source.save_as(tmp_path / "dicom" / "one.dcm", enforce_file_format=True)
    convert_tree(Dicom(), tmp_path / "dicom", tmp_path / "converted")
    (path,) = (tmp_path / "converted" / "images").iterdir()
    image = nibabel.load(path)
    write_nifti(tmp_path / "pred.nii.gz", _label_map(image), image.affine)
    command = ["to-dicom-seg", str(tmp_path / "pred.nii.gz"), "--segment", "1=a", "--segment", "2=b"]
    command += ["--series", str(tmp_path / "dicom"), "--out", str(tmp_path / "dicom" / "seg.dcm")]
    for _ in range(2):  # the second time, the object itself lies among the files of the series
        assert main(command) == 0
    assert convert_tree(Dicom(), tmp_path / "dicom", tmp_path / "back") == 0
    (path,) = (tmp_path / "back" / "labels").iterdir()
    np.testing.assert_array_equal(np.asanyarray(nibabel.load(path).dataobj), _label_map(image))


@pytest.mark.parametrize(
    ("name", "options"),
    [("two series", {"series": "b"}), ("two sizes", {"shape": (8, 10)}), ("two sets", {"origin": (-20, -30, 90)})],
)
def test_series_that_is_no_volume_gets_no_dicom_seg(tmp_path, series, name, options):
    files, image = series
    write_nifti(tmp_path / "pred.nii.gz", _label_map(image), image.affine)
    write_series(tmp_path / "more", 3, angle=0.2, **options)
    files = [*files, *(tmp_path / "more").iterdir()]
    with pytest.raises(CaseError, match=r"not-a-volume|missing-slice|uneven"):
        write_dicom_seg(tmp_path / "pred.nii.gz", files, tmp_path / "s.dcm", {1: "a", 2: "b"}, series_description="x")
    assert not (tmp_path / "s.dcm").exists()


def test_dicom_seg_appears_whole_or_not_at_all(tmp_path, series, monkeypatch):
    files, image = series
    write_nifti(tmp_path / "pred.nii.gz", _label_map(image), image.affine)
    (tmp_path / "out").mkdir()
    order = []
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("rename"), replace(*names)))
    arguments = (tmp_path / "pred.nii.gz", files, tmp_path / "out" / "s.dcm", {1: "a", 2: "b"})
    write_dicom_seg(*arguments, series_description="x")
    assert order[:2] == ["fsync", "rename"]
    before = (tmp_path / "out" / "s.dcm").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_dicom_seg(*arguments, series_description="x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["s.dcm"]
    assert (tmp_path / "out" / "s.dcm").read_bytes() == before
