"""Real series end in the right verdict, and what is converted equals its ground truth."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from data_prep.geometry import max_distance_mm
from data_prep.sources.dicom import Dicom
from tests.data_prep.dicom_factories import oracle_distance
from tests.data_prep.factories import convert_tree, report_lines

SAMPLES = Path(__file__).parents[2] / "data" / "data_prep"
# Larger samples, not in the repository: the folder that holds dicom_edge, seg_dicom and so on.
MORE = Path(os.environ.get("MONAI_MAMBA_SAMPLES", ""))
more = pytest.mark.skipif("MONAI_MAMBA_SAMPLES" not in os.environ, reason="MONAI_MAMBA_SAMPLES is not set")


def _series(out: Path) -> set[tuple[str, str]]:
    return {verdict for (kind, _, _), verdict in report_lines(out).items() if kind == "series"}


def _files(out: Path) -> set[tuple[str, str]]:
    return {verdict for (kind, _, _), verdict in report_lines(out).items() if kind == "file"}


@pytest.mark.parametrize("syntax", ["j2k_lossless", "jpeg_lossless", "jpegls", "rle"])
@pytest.mark.parametrize("converter", ["dcm2niix", "simpleitk"])
def test_compressed_transfer_syntaxes_equal_the_ground_truth(tmp_path, syntax, converter):
    assert convert_tree(Dicom(converter=converter), SAMPLES / f"ts_{syntax}", tmp_path / "out") == 0
    _compare(tmp_path / "out", SAMPLES / "ground_truth" / "ts_ground_truth.nii.gz")


@pytest.mark.parametrize("converter", ["dcm2niix", "simpleitk"])
def test_implicit_syntax_equals_its_files(tmp_path, converter):
    # The publisher scrambled the pixels of this copy separately, so the ground truth of the others is not its own.
    assert convert_tree(Dicom(converter=converter), SAMPLES / "ts_implicit", tmp_path / "out") == 0
    (path,) = (tmp_path / "out" / "images").iterdir()
    assert oracle_distance(path, [pydicom.dcmread(f) for f in sorted((SAMPLES / "ts_implicit").iterdir())]) < 0.01


@pytest.mark.parametrize("converter", ["dcm2niix", "simpleitk"])
def test_rescale_per_slice_equals_the_ground_truth(tmp_path, converter):
    assert convert_tree(Dicom(converter=converter), SAMPLES / "rescale_per_slice", tmp_path / "out") == 0
    _compare(tmp_path / "out", SAMPLES / "ground_truth" / "rescale_per_slice_ground_truth.nii.gz")


@more
def test_enhanced_series_equals_the_ground_truth(tmp_path):
    edge = MORE / "dicom_edge"
    assert convert_tree(Dicom(), edge / "enhanced_mr_siemens", tmp_path / "out") == 0
    _compare(tmp_path / "out", edge / "ground_truth" / "enhanced_mr_siemens_ground_truth.nii.gz")


def _compare(out: Path, truth: Path) -> None:
    """Same voxels at the same places, whatever the order of the axes."""
    (path,) = (out / "images").iterdir()
    ours, theirs = nibabel.as_closest_canonical(nibabel.load(path)), nibabel.as_closest_canonical(nibabel.load(truth))
    np.testing.assert_allclose(ours.get_fdata(), theirs.get_fdata(), rtol=1e-5, atol=1e-4)
    # The reference was stored by another tool in single precision.
    assert max_distance_mm(ours.shape, ours.affine, theirs.affine) < 0.01


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("rgb_series", ("skipped", "color")),
        ("scout_ct", ("skipped", "localizer")),
        ("enhanced_4d_siemens_xa10", ("failed", "time-points")),
        ("two_slices", ("ok", "")),
    ],
)
def test_sample_ends_in_its_verdict(tmp_path, name, verdict):
    code = convert_tree(Dicom(), SAMPLES / name, tmp_path / "out")
    # Nothing converted is not "all fine": 1 even where every file was rightly skipped.
    assert code == {"failed": 3, "skipped": 1, "ok": 0}[verdict[0]]
    assert _files(tmp_path / "out") == {verdict}


@more
@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("gantry_tilt", ("failed", "gantry-tilt")),
        ("missing_slice", ("failed", "missing-slice")),
        ("same_position", ("failed", "same-position")),
        ("mixed_orientation_localizer", ("skipped", "localizer")),
        ("mosaic_siemens", ("failed", "time-points")),
    ],
)
def test_larger_sample_ends_in_its_verdict(tmp_path, name, verdict):
    convert_tree(Dicom(), MORE / "dicom_edge" / name, tmp_path / "out")
    assert _series(tmp_path / "out") == {verdict}


@more
@pytest.mark.parametrize(
    ("name", "options"), [("gantry_tilt", {"tilt": "resample"}), ("missing_slice", {"uneven": "resample"})]
)
def test_resampling_is_done_when_asked_for_and_recorded(tmp_path, name, options):
    assert convert_tree(Dicom(**options), MORE / "dicom_edge" / name, tmp_path / "out") == 0
    assert _series(tmp_path / "out") == {("resampled", "")}


def test_first_time_point_of_enhanced_series_is_exact(tmp_path):
    folder = SAMPLES / "enhanced_4d_siemens_xa10"
    assert convert_tree(Dicom(time="first"), folder, tmp_path / "out") == 0
    (path,) = (tmp_path / "out" / "images").iterdir()
    dataset = pydicom.dcmread(folder / "6_1.dcm")
    data = np.asanyarray(nibabel.load(path).dataobj)
    assert sorted(data[..., k].sum() for k in range(6)) == sorted(frame.sum() for frame in dataset.pixel_array)


@more
def test_mosaic_is_unfolded_with_proven_geometry(tmp_path):
    assert convert_tree(Dicom(time="first"), MORE / "dicom_edge" / "mosaic_siemens", tmp_path / "out") == 0
    (path,) = (tmp_path / "out" / "images").iterdir()
    assert nibabel.load(path).shape == (64, 64, 36)
    assert _files(tmp_path / "out") == {("ok", ""), ("skipped", "not-taken")}


@more
@pytest.mark.parametrize("name", ["ct_totalsegmentator/example_ct_dicom", "mr_t1_dicom/anat-T1w"])
def test_every_voxel_lies_where_its_file_says(tmp_path, name):
    assert convert_tree(Dicom(), MORE / name, tmp_path / "out") == 0
    (path,) = (tmp_path / "out" / "images").iterdir()
    datasets = [pydicom.dcmread(file) for file in sorted((MORE / name).iterdir())]
    assert oracle_distance(path, datasets) < 0.01


@more
def test_tumor_study_becomes_one_case_of_four_channels(tmp_path):
    folder = MORE.parent / "brain_tumor_progression_dicom"
    source = Dicom(channel=["t1c=T1post", "t1n=T1pre", "flair=FLAIR", "t2=T2"])
    out = tmp_path / "Dataset100_Tumor"
    assert convert_tree(source, folder, out, format="nnunet") == 0
    images = sorted((out / "imagesTr").iterdir())
    assert len(images) == 4
    first = nibabel.load(images[0])
    for other in images[1:]:
        assert max_distance_mm(first.shape, first.affine, nibabel.load(other).affine) < 0.01
    assert list(json.loads((out / "dataset.json").read_text())["channel_names"].values()) == [
        "t1c",
        "t1n",
        "flair",
        "t2",
    ]


@more
def test_segmentation_object_gives_its_voxels_and_overlaps_are_refused(tmp_path):
    assert convert_tree(Dicom(), MORE / "seg_dicom", tmp_path / "out") == 3
    (path,) = (tmp_path / "out" / "labels").iterdir()
    liver = pydicom.dcmread(next((MORE / "seg_dicom").rglob("liver.dcm")))
    assert int((np.asanyarray(nibabel.load(path).dataobj) > 0).sum()) == int(liver.pixel_array.sum())
    reasons = {verdict[1] for (kind, _, _), verdict in report_lines(tmp_path / "out").items() if kind == "case"}
    assert reasons == {"", "overlapping-segments"}


@more
def test_structure_set_with_foreign_references_is_refused_by_name(tmp_path):
    assert convert_tree(Dicom(), MORE / "rtstruct", tmp_path / "out") == 3
    lines = report_lines(tmp_path / "out")
    assert lines["file", "rt.dcm", ""][0] == "ok"
    assert lines["file", "invalid_reference_rt.dcm", ""] == ("failed", "missing-slices")
    assert lines["file", "non_existent_reference_rt.dcm", ""] == ("failed", "no-reference")
