from __future__ import annotations

import copy
import csv
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from data_prep.errors import UsageError
from data_prep.sources.dicom import Dicom
from tests.data_prep import factories
from tests.data_prep.dicom_factories import assert_every_voxel_is_where_its_header_says
from tests.data_prep.factories import dicom_series, dicom_slice, report_lines, save_dicom, tree_bytes


def verdict_of_series(out: Path) -> set[tuple[str, str]]:
    return {verdict for (kind, _, _), verdict in report_lines(out).items() if kind == "series"}


def convert_tree(source: Dicom, folder: Path, out: Path) -> int:
    """With the layout that shows grids best: nnU-Net."""
    return factories.convert_tree(source, folder, out, format="nnunet")


def images(out: Path) -> list[Path]:
    return sorted(out.glob("images*/*.nii.gz"))


@pytest.mark.parametrize("converter", ["dcm2niix", "simpleitk"])
def test_dicom_oblique_series_in_any_order_is_exact_for_both_readers(tmp_path, converter):
    # Rotations about two axes, with the rounding to 16 characters that a decimal string has.
    axis = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    first, second = np.round(axis[:, 0], 12), np.round(axis[:, 1], 12)
    normal = np.cross(first, second)
    generator = np.random.default_rng(5)
    series = [
        dicom_slice(np.round(k * 1.7 * normal + 5, 10), generator.integers(0, 99, (9, 12)), k + 1, [*first, *second])
        for k in range(7)
    ]
    folder = save_dicom(tmp_path / "in", series)
    assert convert_tree(Dicom(converter=converter), folder, tmp_path / "out") == 0
    (path,) = images(tmp_path / "out")
    assert_every_voxel_is_where_its_header_says(path, sorted(folder.iterdir()))
    by_itk, by_nibabel = sitk.ReadImage(str(path)), nib.load(path)
    for index in [(0, 0, 0), (11, 8, 6), (11, 0, 3)]:
        place = np.array(by_itk.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        np.testing.assert_allclose(place, (by_nibabel.affine @ [*index, 1])[:3], atol=1e-3)


def _move(k, vector):
    def change(series):
        series[k].ImagePositionPatient = [a + b for a, b in zip(series[k].ImagePositionPatient, vector, strict=True)]

    return change


def _set(name, value, where=slice(None)):
    def change(series):
        for data in series[where]:
            setattr(data, name, value)

    return change


def _delete(name):
    def change(series):
        for data in series:
            delattr(data, name)

    return change


def _remove(k):
    return lambda series: series.pop(k)


def _tilt(series):
    for k, data in enumerate(series):
        data.ImagePositionPatient = [-10.0, -20.0 + 0.4 * k, 30.0 + 2.5 * k]


def _conflicting_copy(series):
    other = copy.deepcopy(series[2])
    other.ImagePositionPatient = [0.0, 0.0, 99.0]
    series.append(other)


def _same_place(series):
    for data in series:
        data.ImagePositionPatient = [0.0, 0.0, 0.0]


def _three_planes(series):
    for data in series[3:]:
        data.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


ATTACKS = {
    "missing slice": (_remove(2), "missing-slice"),
    "shifted slice": (_move(2, (0, 0, 0.4)), "uneven-spacing"),
    "shifted slice by 0.03 mm": (_move(2, (0, 0, 0.03)), "uneven-spacing"),
    "sideways slice": (_move(3, (0.5, 0, 0)), "uneven-positions"),
    "tilt": (_tilt, "gantry-tilt"),
    "same place": (_same_place, "same-position"),
    "conflicting copies": (_conflicting_copy, "uneven-spacing"),
    "two orientations": (_three_planes, "localizer"),
    "localizer": (_set("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
    "spacing differs": (_set("PixelSpacing", [0.7, 0.9], slice(2, 3)), "mixed-spacings"),
    "turned slice": (
        _set("ImageOrientationPatient", [0.99995, 0.01, 0, -0.01, 0.99995, 0], slice(2, 3)),
        "mixed-orientations",
    ),
    "no position": (_delete("ImagePositionPatient"), "no-position"),
    "no orientation": (_delete("ImageOrientationPatient"), "no-position"),
    "no spacing": (_delete("PixelSpacing"), "no-position"),
    "zero spacing": (_set("PixelSpacing", [0.0, 0.0]), "bad-geometry"),
    "orientation not a unit vector": (_set("ImageOrientationPatient", [2, 0, 0, 0, 1, 0]), "bad-geometry"),
    "color": (_set("PhotometricInterpretation", "RGB"), "color"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_dicom_damaged_geometry_is_refused_by_name(tmp_path, name):
    attack, reason = ATTACKS[name]
    series = dicom_series()
    attack(series)
    out = tmp_path / "out"
    assert convert_tree(Dicom(), save_dicom(tmp_path / "in", series), out) != 0
    verdicts = set(report_lines(out).values())
    assert reason in {found for _, found in verdicts}
    assert {status for status, _ in verdicts} <= {"failed", "skipped"}
    assert not images(out)


@pytest.mark.parametrize(
    ("attack", "option"), [(_tilt, "tilt"), (_remove(2), "uneven"), (_move(2, (0, 0, 0.4)), "uneven")]
)
def test_dicom_repair_is_recorded_and_puts_a_ramp_where_it_belongs(tmp_path, attack, option):
    # The intensity is the height above the first slice in mm times 100, so it tells where a voxel really was.
    series = dicom_series()
    for k, data in enumerate(series):
        data.PixelData = np.full((20, 16), 250 * k, "<i2").tobytes()
        data.RescaleIntercept = 0
    attack(series)
    for data in series:
        data.PixelData = np.full((20, 16), round(100 * (data.ImagePositionPatient[2] - 30)), "<i2").tobytes()
    out = tmp_path / "out"
    assert convert_tree(Dicom(**{option: "resample"}), save_dicom(tmp_path / "in", series), out) == 0
    assert verdict_of_series(out) == {("resampled", "")}
    image = nib.load(images(out)[0])
    middle = image.get_fdata()[8, image.shape[1] // 2]
    heights = (image.affine[2, 2] * np.arange(image.shape[2]) + image.affine[2, 3] - 30) * 100
    np.testing.assert_allclose(middle, heights, atol=0.51)
    cosines = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    np.testing.assert_allclose(cosines.T @ cosines, np.eye(3), atol=1e-6)


def test_dicom_tilt_resampling_moves_the_pixels_back(tmp_path):
    # A rod along the patient's axis is in other rows of every tilted slice, and in one row after the repair.
    series = dicom_series(6, spacing=(0.4, 0.8))
    _tilt(series)
    for k, data in enumerate(series):
        pixels = np.zeros((20, 16), "<i2")
        pixels[12 - k, 8] = 1000
        data.PixelData, data.RescaleIntercept = pixels.tobytes(), 0
    out = tmp_path / "out"
    assert convert_tree(Dicom(tilt="resample"), save_dicom(tmp_path / "in", series), out) == 0
    image = nib.load(images(out)[0])
    places = {tuple(np.round((image.affine @ [*voxel, 1])[:2], 3)) for voxel in np.argwhere(image.get_fdata() > 500)}
    assert places == {(round(10 - 8 * 0.8, 3), round(20 - 12 * 0.4, 3))}


def test_dicom_copies_of_a_file_are_dropped_and_reported(tmp_path):
    folder = save_dicom(tmp_path / "in", dicom_series())
    original = sorted(folder.iterdir())[0]
    (folder / "zz_copy.dcm").write_bytes(original.read_bytes())
    assert convert_tree(Dicom(), folder, tmp_path / "out") == 0
    assert report_lines(tmp_path / "out")["file", "zz_copy.dcm", ""] == ("skipped", "duplicate")
    assert nib.load(images(tmp_path / "out")[0]).shape[2] == 6


def test_dicom_channels_of_a_study_share_one_grid(tmp_path):
    for number, name in enumerate(("T1 pre", "T1 post", "FLAIR")):
        tags = {"SeriesDescription": name, "SeriesInstanceUID": f"1.2.3.2.{number}"}
        series = dicom_series(**tags)
        for data in series:
            data.SOPInstanceUID += f".{number}"
        save_dicom(tmp_path / "in" / f"S{number}", series)
    options = ["t1=t1 pre", "t1c=t1 post", "flair=flair"]
    assert convert_tree(Dicom(channel=options), tmp_path / "in", tmp_path / "out") == 0
    assert len(images(tmp_path / "out")) == 3
    assert len({nib.load(path).affine.tobytes() for path in images(tmp_path / "out")}) == 1


def test_dicom_study_without_a_channel_fails_and_channels_on_other_grids_too(tmp_path):
    series = dicom_series(SeriesDescription="T1")
    other = dicom_series(step=3.0, SeriesDescription="T2", SeriesInstanceUID="1.2.3.9")
    for data in other:
        data.SOPInstanceUID += ".9"
    folder = save_dicom(tmp_path / "in" / "a", series)
    assert convert_tree(Dicom(channel=["t1=t1", "t2=t2"]), folder, tmp_path / "x") == 3
    assert verdict_of_series(tmp_path / "x") == {("failed", "missing-channel")}
    save_dicom(tmp_path / "in" / "b", other)
    assert convert_tree(Dicom(channel=["t1=t1", "t2=t2"]), tmp_path / "in", tmp_path / "y") == 3
    assert verdict_of_series(tmp_path / "y") == {("failed", "grids-differ")}


@pytest.mark.parametrize("option", ["t1", "=x", "t1=(", "t1="], ids=str)
def test_dicom_channel_option_is_checked(tmp_path, option):
    with pytest.raises(UsageError, match="--channel"):
        convert_tree(Dicom(channel=[option]), save_dicom(tmp_path / "in", dicom_series()), tmp_path / "out")


def test_dicom_emptied_uids_fall_back_to_the_folder(tmp_path):
    for name in ("a", "b"):
        tags = dict.fromkeys(
            ("SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID"), ""
        )
        folder = tmp_path / "in" / name
        save_dicom(folder, dicom_series(5 if name == "a" else 6))
        for path in folder.iterdir():
            data = pydicom.dcmread(path)
            for key, value in tags.items():
                setattr(data, key, value)
            data.save_as(path)
    assert convert_tree(Dicom(), tmp_path / "in", tmp_path / "out") == 0
    assert sorted(nib.load(path).shape[2] for path in images(tmp_path / "out")) == [5, 6]


IDENTITY = (
    "PatientName PatientID OtherPatientIDs PatientBirthName PatientMotherBirthName PatientAddress PatientComments "
    "PatientTelephoneNumbers Occupation AdditionalPatientHistory ReferringPhysicianName ReferringPhysicianAddress "
    "PerformingPhysicianName NameOfPhysiciansReadingStudy OperatorsName RequestingPhysician InstitutionName "
    "InstitutionAddress InstitutionalDepartmentName StationName AccessionNumber StudyID StudyDescription "
    "SeriesDescription ProtocolName RequestedProcedureDescription PerformedProcedureStepDescription DeviceSerialNumber "
    "ImageComments MilitaryRank EthnicGroup PatientReligiousPreference CountryOfResidence RegionOfResidence "
    "MedicalRecordLocator AdmissionID IssuerOfPatientID DerivationDescription RequestedProcedureID "
    "PerformedProcedureStepID ScheduledProcedureStepID PatientInsurancePlanCodeSequence"
).split()[:41]


def test_dicom_no_identity_in_any_byte_that_is_written(tmp_path, capfd):
    series = dicom_series()
    canaries = []
    for number, name in enumerate(IDENTITY):
        canary = f"ZQ{number:03d}CANARY"[:14]
        canaries.append(canary.encode())
        for data in series:
            setattr(data, name, canary)
    for data in series:
        data.PatientBirthDate = data.StudyDate = data.SeriesDate = data.AcquisitionDate = "19330218"
        data.StudyInstanceUID = data.SeriesInstanceUID = data.FrameOfReferenceUID = "1.2.987654321.5"
    canaries += [b"19330218", b"987654321"]
    folder = save_dicom(tmp_path / "in", series)
    (folder / "broken").write_bytes((folder / sorted(os.listdir(folder))[0]).read_bytes()[:700])
    out = tmp_path / "work" / "out"
    convert_tree(Dicom(), folder, out)
    convert_tree(Dicom(channel=["a=nothing"]), folder, tmp_path / "work" / "out2")
    assert images(out)
    for name, content in tree_bytes(tmp_path / "work").items():
        if name.endswith(".gz"):
            import gzip

            content += gzip.decompress(content)
        for canary in canaries:
            assert canary not in content, (name, canary)
            assert canary not in name.encode()
    shown = "".join(capfd.readouterr()).encode()
    assert not [canary for canary in canaries if canary in shown]


def test_dicom_public_report_does_not_show_input_paths(tmp_path):
    folder = save_dicom(tmp_path / "in" / "DOE_JANE_1933", dicom_series())
    convert_tree(Dicom(), folder.parent, tmp_path / "out")
    assert all(b"DOE" not in content for content in tree_bytes(tmp_path / "out").values())
    with open(tmp_path / "out/report.csv", newline="") as file:
        assert all(row["input"].startswith(("input-", "case-")) for row in csv.DictReader(file))
