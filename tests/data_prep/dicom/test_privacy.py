"""Nothing that identifies a person reaches a byte of the data set, of the private folder, or of the terminal."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from data_prep.cli import main
from data_prep.dicom.labels import IDENTITY
from data_prep.nifti import write_nifti
from data_prep.sources.dicom import Dicom
from tests.data_prep.dicom_factories import MG, make_slice, make_structure_set, uid, write_series
from tests.data_prep.factories import convert_tree

TEXT = [
    "PatientName", "PatientID", "OtherPatientIDs", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName",
    "PatientAddress", "MilitaryRank", "BranchOfService", "RegionOfResidence", "PatientTelephoneNumbers", "Occupation",
    "PatientComments", "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "ReferringPhysicianName",
    "ReferringPhysicianAddress", "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "OperatorsName",
    "PhysiciansOfRecord", "RequestingPhysician", "StationName", "DeviceSerialNumber", "AccessionNumber", "StudyID",
    "StudyDescription", "SeriesDescription", "ProtocolName", "ImageComments", "AdditionalPatientHistory",
    "RequestedProcedureDescription", "PerformedProcedureStepDescription", "AdmittingDiagnosesDescription",
    "IssuerOfPatientID", "CurrentPatientLocation", "PatientInsurancePlanCodeSequence", "ScheduledProcedureStepID",
    "RequestAttributesSequence",
]  # fmt: skip
NUMBERS = {"PatientBirthDate": "19310517", "StudyDate": "19870923", "SeriesDate": "19870924", "ContentDate": "19870925",
           "AcquisitionDate": "19870926", "StudyTime": "031733"}  # fmt: skip


def _mark(dataset):
    """A canary in every attribute of `TEXT`, one of its own in each."""
    for number, name in enumerate(TEXT):
        if not name.endswith("Sequence"):
            setattr(dataset, name, f"CANARY{number:02d}")
    for name, value in NUMBERS.items():
        setattr(dataset, name, value)
    dataset.add_new((0x0009, 0x0010), "LO", "CANARYPRIVATE")
    dataset.add_new((0x0009, 0x1001), "LO", "CANARY99")


def _canaries(slices):
    for one in slices:
        _mark(one)


def _run(tmp_path, *arguments):
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=os.environ | {"HOME": str(tmp_path / "home")})


def _blobs(tmp_path, done, *folders):
    """Everything that was shown or written, unpacked where it is packed, and every name."""
    blobs = [done.stdout, done.stderr]
    for folder in (*folders, "home"):
        for path in (tmp_path / folder).rglob("*"):
            blobs.append(str(path.relative_to(tmp_path)).encode())
            if path.is_file():
                content = path.read_bytes()
                blobs += [content, gzip.decompress(content)] if path.suffix == ".gz" else [content]
    return blobs


def _assert_absent(words, blobs):
    assert len(blobs) > 3
    for word in words:
        assert not [blob for blob in blobs if word in blob], word


def _forbidden(*datasets):
    words = {b"CANARY", *(value.encode() for value in NUMBERS.values())}
    for one in datasets:
        words |= {one.SOPInstanceUID.encode(), one.SeriesInstanceUID.encode(), one.StudyInstanceUID.encode()}
    return words


def test_warning_of_pydicom_does_not_quote_a_damaged_value(tmp_path):
    write_series(tmp_path / "in", 3)
    path = tmp_path / "in" / "IM0000"
    path.write_bytes(path.read_bytes().replace(uid("study").encode(), b"CANARY" + uid("study").encode()[6:]))
    done = _run(tmp_path, "dicom", tmp_path / "in", "--out", tmp_path / "out")
    assert b"CANARY" not in done.stdout + done.stderr


@pytest.mark.parametrize("fault", ["none", "missing-slice", "damaged"])
def test_no_canary_in_any_byte(tmp_path, fault):
    slices = write_series(tmp_path / "in", 6, edit=lambda s: (_canaries(s), fault == "missing-slice" and s.pop(2)))
    if fault == "damaged":
        path = sorted((tmp_path / "in").iterdir())[0]
        path.write_bytes(path.read_bytes()[:-50])
    done = _run(tmp_path, "dicom", tmp_path / "in", "--out", tmp_path / "out")
    assert done.returncode == (0 if fault == "none" else 3), done.stderr
    _assert_absent(_forbidden(*slices), _blobs(tmp_path, done, "out", "private-out"))


def test_no_canary_in_any_byte_of_xrays(tmp_path):
    (tmp_path / "in").mkdir()
    images = [make_slice(number, shape=(40, 30)) for number in range(3)]
    for number, one in enumerate(images):
        _mark(one)
        one.Modality, one.SOPClassUID = "MG", MG
        one.file_meta.MediaStorageSOPClassUID = MG
        one.ViewPosition, one.ImageLaterality = "CC", "L"
        if number == 1:  # said twice, and differently
            one.Laterality = "R"
        if number == 2:
            one.PixelData = one.PixelData[:100]
        one.save_as(tmp_path / "in" / f"{number}.dcm", enforce_file_format=True)
    done = _run(tmp_path, "dicom", tmp_path / "in", "--out", tmp_path / "out", "--kind", "projections")
    assert done.returncode == 3 and len(list((tmp_path / "out").glob("images/*.png"))) == 2
    _assert_absent(_forbidden(*images), _blobs(tmp_path, done, "out", "private-out"))


@pytest.fixture
def predicted(tmp_path):
    """A series full of canaries, and a label map on its grid."""
    slices = write_series(tmp_path / "in", 4, edit=_canaries)
    assert convert_tree(Dicom(), tmp_path / "in", tmp_path / "made") == 0
    (path,) = (tmp_path / "made" / "images").iterdir()
    image = nibabel.load(path)
    labels = np.zeros(image.shape, np.uint8)
    labels[3:7, 2:8, 1:3] = 1
    write_nifti(tmp_path / "labels.nii.gz", labels, image.affine)
    return slices


def _to_dicom_seg(tmp_path, out):
    labels, series = str(tmp_path / "labels.nii.gz"), str(tmp_path / "in")
    return ["to-dicom-seg", labels, "--series", series, "--out", str(out), "--segment", "1=liver"]


def test_dicom_seg_for_a_pacs_carries_the_patient_of_its_series_and_nothing_else(tmp_path, predicted):
    """The object is filed by patient and study, so these it must name; nobody and nothing else of the header."""
    done = _run(tmp_path, *_to_dicom_seg(tmp_path, tmp_path / "seg" / "s.dcm"))
    assert done.returncode == 0, done.stderr
    made, source = pydicom.dcmread(tmp_path / "seg" / "s.dcm"), predicted[0]
    carried = [name for name in (*TEXT, *NUMBERS) if name in made and made[name].value == source.get(name)]
    assert sorted(carried) == sorted(set(IDENTITY) & {*TEXT, *NUMBERS})
    assert made.StudyInstanceUID == source.StudyInstanceUID
    assert made.FrameOfReferenceUID == source.FrameOfReferenceUID
    allowed = {str(source[name].value).encode() for name in carried}
    words = {f"CANARY{number:02d}".encode() for number in range(len(TEXT))} | {b"CANARYPRIVATE", b"CANARY99"}
    words |= {value.encode() for value in NUMBERS.values()}
    _assert_absent(words - allowed, _blobs(tmp_path, done, "seg"))
    # What is shown names nobody at all.
    assert not [word for word in words if word in done.stdout + done.stderr]


def test_no_canary_in_any_message_of_a_refused_dicom_seg(tmp_path, predicted, capfd):
    path = sorted((tmp_path / "in").iterdir())[0]
    one = pydicom.dcmread(path)
    one.ImagePositionPatient = [0, 0, 900]
    one.save_as(path)
    assert main(_to_dicom_seg(tmp_path, tmp_path / "seg" / "s.dcm")) == 1
    shown = capfd.readouterr()
    assert shown.err.count("\n") == 1 and not (tmp_path / "seg").exists()
    assert not [word for word in _forbidden(*predicted) if word in (shown.out + shown.err).encode()]


def test_no_canary_in_any_byte_with_label_objects(tmp_path, predicted):
    assert main(_to_dicom_seg(tmp_path, tmp_path / "in" / "seg.dcm")) == 0
    segmentation = pydicom.dcmread(tmp_path / "in" / "seg.dcm")
    segmentation.ContentCreatorName = segmentation.SegmentSequence[0].SegmentDescription = "CANARYCREATOR"
    segmentation.ContentDescription = segmentation.ContentLabel = "CANARYCONTENT"
    structures = make_structure_set(nibabel.load(tmp_path / "labels.nii.gz").affine, [(1, 2.5, 6.5)])
    series, study, frame, observation = Dataset(), Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = predicted[0].SeriesInstanceUID
    study.ReferencedSOPInstanceUID, study.RTReferencedSeriesSequence = uid("study"), [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = predicted[0].FrameOfReferenceUID, [study]
    observation.ROIInterpreter = observation.ROIObservationLabel = "CANARYOBSERVER"
    structures.Modality, structures.StudyInstanceUID = "RTSTRUCT", predicted[0].StudyInstanceUID
    structures.SeriesInstanceUID = uid("structures")
    structures.ReferencedFrameOfReferenceSequence, structures.RTROIObservationsSequence = [frame], [observation]
    structures.StructureSetLabel = structures.StructureSetName = structures.StructureSetDescription = "CANARYSET"
    structures.StructureSetROISequence[0].ROIDescription = structures.ApprovalStatus = "CANARYROI"
    for name, label in (("seg.dcm", segmentation), ("rt.dcm", structures)):
        _mark(label)
        label.save_as(tmp_path / "in" / name, enforce_file_format=True)
    done = _run(tmp_path, "dicom", tmp_path / "in", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 2
    _assert_absent(_forbidden(*predicted, segmentation, structures), _blobs(tmp_path, done, "out", "private-out"))
