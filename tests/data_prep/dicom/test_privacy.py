"""Nothing that identifies a person reaches a byte of the data set, of the private folder, or of the terminal."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys

import pytest

from tests.data_prep.dicom_factories import uid, write_series

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


def _canaries(slices):
    for one in slices:
        for number, name in enumerate(TEXT):
            if not name.endswith("Sequence"):
                setattr(one, name, f"CANARY{number:02d}")
        for name, value in NUMBERS.items():
            setattr(one, name, value)
        one.add_new((0x0009, 0x0010), "LO", "CANARYPRIVATE")
        one.add_new((0x0009, 0x1001), "LO", "CANARY99")


def test_warning_of_pydicom_does_not_quote_a_damaged_value(tmp_path):
    write_series(tmp_path / "in", 3)
    path = tmp_path / "in" / "IM0000"
    path.write_bytes(path.read_bytes().replace(uid("study").encode(), b"CANARY" + uid("study").encode()[6:]))
    command = [sys.executable, "-m", "data_prep", "dicom", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True)
    assert b"CANARY" not in done.stdout + done.stderr


@pytest.mark.parametrize("fault", ["none", "missing-slice", "damaged"])
def test_no_canary_in_any_byte(tmp_path, fault):
    slices = write_series(tmp_path / "in", 6, edit=lambda s: (_canaries(s), fault == "missing-slice" and s.pop(2)))
    if fault == "damaged":
        path = sorted((tmp_path / "in").iterdir())[0]
        path.write_bytes(path.read_bytes()[:-50])
    command = [sys.executable, "-m", "data_prep", "dicom", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"HOME": str(tmp_path / "home")})
    assert done.returncode == (0 if fault == "none" else 3), done.stderr
    forbidden = [b"CANARY", *(value.encode() for value in NUMBERS.values()), uid("study").encode()]
    forbidden += [one.SOPInstanceUID.encode() for one in slices] + [slices[0].SeriesInstanceUID.encode()]
    blobs = [done.stdout, done.stderr]
    for folder in (tmp_path / "out", tmp_path / "private-out", tmp_path / "home"):
        for path in folder.rglob("*"):
            blobs.append(str(path.relative_to(tmp_path)).encode())
            if path.is_file():
                content = path.read_bytes()
                blobs += [content, gzip.decompress(content)] if path.suffix == ".gz" else [content]
    assert len(blobs) > 6
    for blob in blobs:
        for word in forbidden:
            assert word not in blob
