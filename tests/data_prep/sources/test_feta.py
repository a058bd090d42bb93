"""FeTA: biometry in a re-aligned space with two numberings, Slicer lines, tissues."""

from __future__ import annotations

import json
import math

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_prep.check import check_data_set
from data_prep.errors import UsageError
from data_prep.sources.feta import MEASURES, Feta, to_original_space
from tests.data_prep.factories import (
    convert_tree,
    report_lines,
    write_bytes,
    write_csv,
    write_label_map,
    write_nifti_volume,
)
from tests.data_prep.markup_factories import write_lines

SHAPE = (40, 44, 36)
AFFINE = np.diag([-0.8, -0.8, 0.8, 1.0])
AFFINE[:3, 3] = [16, 17, -14]
#: voxels of the re-aligned space, two per measure; the first is the one the rule puts first (anterior, superior, right)
ENDS = {
    "LCC": ([20, 8, 18], [20, 34, 18]), "HV": ([20, 30, 24], [20, 31, 12]), "bBIP": ([5, 20, 20], [35, 20, 20]),
    "sBIP": ([3, 22, 20], [37, 22, 20]), "TCD": ([12, 30, 15], [29, 30, 15]),
}  # fmt: skip
SWAPPED = ("HV", "LCC", "bBIP", "sBIP", "TCD")


def rigid():
    transform = sitk.Euler3DTransform()
    transform.SetRotation(0.06, -0.05, 0.08)
    transform.SetTranslation((0.9, -0.7, 0.5))
    return transform


def world(voxel):
    return nib.affines.apply_affine(AFFINE, voxel)


def length(measure):
    return math.dist(*map(world, ENDS[measure]))


def add_subject(root, number, numbering=MEASURES, drop=()):
    """One subject with image, tissues and measurements; returns its row of biometry.tsv."""
    method = "mial" if number <= 40 else "irtk"
    name = f"sub-{number:03d}"
    stem = f"{name}/anat/{name}_rec-{method}"
    write_nifti_volume(root / f"{stem}_T2w.nii.gz", SHAPE, number, AFFINE)
    write_label_map(root / f"{stem}_dseg.nii.gz", SHAPE, range(1, 8), AFFINE)
    mask = np.zeros(SHAPE, np.uint8)
    for value, measure in enumerate(numbering, 1):
        if measure not in drop:
            for voxel in ENDS[measure]:
                mask[tuple(voxel)] = value
    path = root / f"derivatives/biometry/{stem}_meas.nii.gz"
    path.parent.mkdir(parents=True)
    image = nib.Nifti1Image(mask, AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    nib.save(image, path)
    sitk.WriteTransform(rigid(), str(root / f"derivatives/biometry/{stem}_trf.txt"))
    return [name, *("" if m in drop else round(length(m) + 0.3, 2) for m in MEASURES)]


def feta_tree(root):
    """Both numberings, a subject with a missing measure, one without measurements, and litter."""
    rows = [add_subject(root, 1), add_subject(root, 2, SWAPPED), add_subject(root, 41, drop=("HV",))]
    write_nifti_volume(root / "sub-004/anat/sub-004_rec-mial_T2w.nii.gz", SHAPE, 4, AFFINE)
    write_label_map(root / "sub-004/anat/sub-004_rec-mial_dseg.nii.gz", SHAPE, range(1, 8), AFFINE)
    write_csv(root / "derivatives/biometry/biometry.tsv", [["participant_id", *MEASURES], *rows], "\t")
    people = [[f"sub-{n:03d}", "Neurotypical", 25.5] for n in (1, 2, 4, 41)]
    write_csv(root / "participants.tsv", [["participant_id", "Pathology", "Gestational age"], *people], "\t")
    write_bytes(root / "dataset_description.json", b"{}")
    write_nifti_volume(root / "derivatives/im_reo/sub-001/anat/sub-001_rec-mial_T2w.nii.gz", SHAPE, 1, AFFINE)
    write_label_map(root / "derivatives/biometry_mapped/sub-001/anat/sub-001_rec-mial_meas.nii.gz", SHAPE)
    write_bytes(root / "sub-001/anat/._sub-001_rec-mial_T2w.nii.gz")
    return root


def entries(out):
    content = json.loads((out / "datalist.json").read_text())
    return {entry["case"]: entry for entry in content["training"]}, content


def test_feta_biometry_is_carried_to_the_image_and_both_numberings_mean_the_same(tmp_path):
    root, out = feta_tree(tmp_path / "in"), tmp_path / "out"
    assert convert_tree(Feta(), root, out) == 3
    found, content = entries(out)
    assert content["landmark_names"] == [f"{m}{e}" for m in MEASURES for e in (1, 2)]
    assert sorted(found) == ["sub-001", "sub-002"]
    assert found["sub-001"]["landmarks"] == found["sub-002"]["landmarks"]
    # The publisher's way to re-align: the image resampled by the transform. A spot drawn at the landmark in the
    # original image must come to lie at the expert's voxel.
    lps = np.diag([-1.0, -1, 1])
    reference = sitk.ReadImage(str(root / "sub-001/anat/sub-001_rec-mial_T2w.nii.gz"))
    for (measure, end), point in zip([(m, e) for m in MEASURES for e in (0, 1)], found["sub-001"]["landmarks"],
                                     strict=True):  # fmt: skip
        spot = sitk.GaussianSource(sitk.sitkFloat32, reference.GetSize(), [1.5] * 3, (lps @ point).tolist(), 1.0,
                                   reference.GetOrigin(), reference.GetSpacing(), reference.GetDirection())  # fmt: skip
        moved = sitk.GetArrayFromImage(sitk.Resample(spot, reference, rigid(), sitk.sitkBSpline)).transpose(2, 1, 0)
        assert np.unravel_index(moved.argmax(), SHAPE) == tuple(ENDS[measure][end]), (measure, end)
    lines = report_lines(out)
    assert lines["row", "derivatives/biometry/biometry.tsv", "3"] == ("failed", "missing-landmark")
    assert lines["file", "sub-004/anat/sub-004_rec-mial_T2w.nii.gz", ""] == ("skipped", "not-measured")
    assert check_data_set(out).problems == []


def test_feta_measures_that_all_have_keep_all(tmp_path):
    out = tmp_path / "out"
    assert convert_tree(Feta(measures="TCD, LCC"), feta_tree(tmp_path / "in"), out) == 0
    found, content = entries(out)
    assert content["landmark_names"] == ["TCD1", "TCD2", "LCC1", "LCC2"]
    assert sorted(found) == ["sub-001", "sub-002", "sub-041"]
    assert "irtk" in (out / "cases.csv").read_text() and "25.5" in (out / "cases.csv").read_text()
    with pytest.raises(UsageError, match="--measures"):
        convert_tree(Feta(measures="ADV"), tmp_path / "in", tmp_path / "other")


def test_feta_several_rows_of_one_subject_are_refused(tmp_path):
    root = feta_tree(tmp_path / "in")
    path = root / "derivatives/biometry/biometry.tsv"
    text = path.read_text().splitlines()
    path.write_text("\n".join([*text, text[1].replace("\t", "\t1")]))
    assert convert_tree(Feta(measures="TCD"), root, tmp_path / "out") == 3
    lines = report_lines(tmp_path / "out")
    assert {lines["row", "derivatives/biometry/biometry.tsv", n] for n in ("1", "4")} == {("failed", "ambiguous-row")}
    assert sorted(entries(tmp_path / "out")[0]) == ["sub-002", "sub-041"]


def _rewrite(name, change):
    def damage(root):
        path = root / "derivatives/biometry" / name
        change(path)

    return damage


def _voxel(value, places):
    def change(path):
        image = nib.load(path)
        data = np.asanyarray(image.dataobj).copy()
        for place in places:
            data[place] = value
        nib.save(nib.Nifti1Image(data, image.affine, image.header), path)

    return change


def _scaled(path):
    transform = sitk.AffineTransform(3)
    transform.Scale(1.1)
    sitk.WriteTransform(transform, str(path))


MEAS, TRF = "sub-001/anat/sub-001_rec-mial_meas.nii.gz", "sub-001/anat/sub-001_rec-mial_trf.txt"


@pytest.mark.parametrize("kind", ["Euler3D", "VersorRigid3D", "Affine", "MatrixOffsetTransformBase"])
def test_transforms_of_every_kind_are_those_of_itk(tmp_path, kind):
    euler, path = rigid(), tmp_path / "x_trf.txt"
    euler.SetCenter((3.0, -5.0, 7.0))
    transform = euler
    if kind != "Euler3D":
        transform = sitk.VersorRigid3DTransform() if kind == "VersorRigid3D" else sitk.AffineTransform(3)
        transform.SetCenter(euler.GetCenter())
        transform.SetMatrix(euler.GetMatrix())
        transform.SetTranslation(euler.GetTranslation())
    sitk.WriteTransform(transform, str(path))
    path.write_text(path.read_text().replace("AffineTransform_", f"{kind}_" if "Base" in kind else "AffineTransform_"))
    points = [(1.0, 2.0, 3.0), (-20.0, 15.0, 40.0)]
    signs = np.array([-1, -1, 1])
    wanted = [np.array(euler.TransformPoint((signs * p).tolist())) * signs for p in points]
    np.testing.assert_allclose(to_original_space(path, points), wanted, atol=1e-9)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_rewrite(MEAS, _voxel(3, [(1, 1, 1)])), "damaged-measurement"),
        (_rewrite(MEAS, _voxel(9, [(1, 1, 1), (2, 2, 2)])), "damaged-measurement"),
        (_rewrite(MEAS, _voxel(0, [(12, 30, 15), (29, 30, 15)])), "missing-landmark"),
        (_rewrite("biometry.tsv", lambda p: p.write_text(p.read_text().replace("sub-001\t", "sub-001\t9"))),
         "ambiguous-numbering"),
        (_rewrite("biometry.tsv", lambda p: p.write_text("\n".join(
            line for line in p.read_text().splitlines() if "sub-001" not in line))), "not-in-table"),
        (_rewrite(TRF, lambda p: p.write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n")), "damaged-transform"),
        (_rewrite(TRF, lambda p: p.write_text("#Insight Transform File V1.0\nTransform: x\n")), "damaged-transform"),
        (_rewrite(TRF, _scaled), "not-rigid"),
        (_rewrite(TRF, lambda p: p.unlink()), "missing-file"),
        (_rewrite(MEAS, lambda p: p.write_bytes(b"cut")), "damaged-data"),
    ],
    ids=["third voxel", "value 9", "not measured", "lengths differ", "not in table", "matrix", "truncated", "scaled",
         "no transform", "damaged"],
)  # fmt: skip
def test_feta_subject_with_a_fault_is_refused_by_name_and_costs_no_other(tmp_path, damage, reason):
    root = feta_tree(tmp_path / "in")
    damage(root)
    assert convert_tree(Feta(), root, tmp_path / "out") == 3
    assert report_lines(tmp_path / "out")["file", "sub-001/anat/sub-001_rec-mial_T2w.nii.gz", ""] == ("failed", reason)
    assert sorted(entries(tmp_path / "out")[0]) == ["sub-002"]


def test_feta_tissues_as_nnunet(tmp_path):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    root, out = feta_tree(tmp_path / "in"), tmp_path / "Dataset030_FeTA"
    (root / "sub-002/anat/sub-002_rec-mial_dseg.nii.gz").unlink()
    assert convert_tree(Feta(task="tissue"), root, out, format="nnunet") == 3
    verify_dataset_integrity(str(out), num_processes=1)
    assert len(json.loads((out / "dataset.json").read_text())["labels"]) == 8
    lines = report_lines(out)
    assert lines["row", "participants.tsv", "2"] == ("failed", "missing-label")
    assert lines["case", "sub-004", ""] == ("ok", "")


def test_feta_slicer_lines(tmp_path):
    root, out = feta_tree(tmp_path / "in"), tmp_path / "out"
    points = [[world(np.array([10 + n, 12, 9])).tolist(), world(np.array([14, 20 + n, 20])).tolist()] for n in range(6)]
    write_lines(root / "markups/sub-001", points, "RAS")
    write_lines(root / "markups/sub-002", points[:5], "LPS")
    write_lines(root / "markups/sub-099", points)
    assert convert_tree(Feta(task="lines", measures="TCD,HDV,ADV"), root, out) == 3
    found, content = entries(out)
    assert content["landmark_names"] == ["TCD1", "TCD2", "HDV1", "HDV2", "ADV1", "ADV2"] and list(found) == ["sub-001"]
    np.testing.assert_allclose(found["sub-001"]["landmarks"], [p for n in (2, 4, 5) for p in points[n]], atol=1e-6)
    lines = report_lines(out)
    assert lines["file", "markups/sub-002/line_1.mrk.json", ""] == ("failed", "wrong-number-of-files")
    assert lines["file", "markups/sub-099/line_1.mrk.json", ""] == ("failed", "missing-image")


def test_feta_wrong_folder_is_one_error(tmp_path):
    write_bytes(tmp_path / "in/a.txt")
    with pytest.raises(UsageError, match="FeTA"):
        convert_tree(Feta(), tmp_path / "in", tmp_path / "out")
    root = feta_tree(tmp_path / "feta")
    (root / "derivatives/biometry/biometry.tsv").unlink()
    with pytest.raises(UsageError, match=r"biometry\.tsv"):
        convert_tree(Feta(), root, tmp_path / "out")
