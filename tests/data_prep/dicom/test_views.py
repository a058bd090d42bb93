"""View and side of an X-ray from every attribute that gives them; contradictions give none."""

from __future__ import annotations

import csv

import pytest
from pydicom.dataset import Dataset

from data_prep.dicom.views import view_facts
from data_prep.sources.dicom import Dicom
from tests.data_prep.dicom_factories import MG, make_slice
from tests.data_prep.factories import convert_tree


def _code(value, scheme="SCT", modifiers=()):
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, "free text"
    if modifiers:
        code.ViewModifierCodeSequence = [_code(one) for one in modifiers]
    return code


def _frame(side):
    group, anatomy = Dataset(), Dataset()
    anatomy.FrameLaterality = side
    group.FrameAnatomySequence = [anatomy]
    return group


def _facts(**values):
    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return view_facts(dataset)


@pytest.mark.parametrize(
    ("values", "view"),
    [
        ({"ViewPosition": "cc "}, "CC"),
        ({"ViewPosition": "LAT"}, "LATERAL"),
        ({"ViewPosition": "Doe^Jane"}, ""),
        ({"ViewCodeSequence": [_code("399162004")]}, "CC"),
        ({"ViewCodeSequence": [_code("R-10242", "SRT")]}, "CC"),
        ({"ViewCodeSequence": [_code("R-10226", "SNM3")]}, "MLO"),
        ({"ViewCodeSequence": [_code("R-1024A", "SRT")]}, "XCCL"),
        ({"ViewCodeSequence": [_code("272479007")]}, "PA"),
        ({"ViewCodeSequence": [_code("399162004", "99LOCAL")]}, ""),
        ({"ViewCodeSequence": [_code("399162004"), _code("399368009")]}, ""),
        ({"ViewPosition": "MLO", "ViewCodeSequence": [_code("399368009")]}, "MLO"),
        ({"ViewPosition": "LATERAL", "ViewCodeSequence": [_code("399173006")]}, "LL"),
        ({"ViewPosition": "CC", "PatientOrientation": ["P", "L"]}, "CC"),
        ({"ViewPosition": "MLO", "PatientOrientation": ["A", "FR"]}, "MLO"),
        ({"ViewPosition": "PA", "PatientOrientation": ["L", "F"]}, "PA"),
        ({"ViewPosition": "PA", "PatientOrientation": "L"}, "PA"),
        # Directions alone give no view: a mammogram that is stored as RG has those of a lateral.
        ({"PatientOrientation": ["A", "F"]}, ""),
    ],
)
def test_view_is_what_the_header_says(values, view):
    facts = _facts(**values)
    assert facts["view"] == view and not facts["contradictions"]


@pytest.mark.parametrize(
    "values",
    [
        {"ViewPosition": "CC", "ViewCodeSequence": [_code("399368009")]},
        {"ViewPosition": "AP", "ViewCodeSequence": [_code("272479007")]},
        {"ViewPosition": "CC", "PatientOrientation": ["A", "F"]},
        {"ViewPosition": "MLO", "PatientOrientation": ["A", "R"]},
        {"ViewPosition": "ML", "PatientOrientation": ["A", "R"]},
        {"ViewPosition": "PA", "PatientOrientation": ["A", "F"]},
        {"ViewCodeSequence": [_code("399067008")], "PatientOrientation": ["L", "F"]},
    ],
)
def test_view_that_is_contradicted_is_left_empty(values):
    facts = _facts(**values)
    assert facts["view"] == "" and facts["contradictions"] == ["view"]


@pytest.mark.parametrize(
    ("values", "side", "is_clear"),
    [
        ({"ImageLaterality": "L"}, "L", True),
        ({"Laterality": "R"}, "R", True),
        ({"ImageLaterality": "B"}, "B", True),
        ({"ImageLaterality": "U"}, "", True),
        ({"ImageLaterality": "L", "Laterality": "L"}, "L", True),
        ({"SharedFunctionalGroupsSequence": [_frame("R")]}, "R", True),
        ({"PerFrameFunctionalGroupsSequence": [_frame("L"), _frame("L")]}, "L", True),
        ({"ImageLaterality": "L", "Laterality": "R"}, "", False),
        ({"ImageLaterality": "B", "Laterality": "R"}, "", False),
        ({"Laterality": "L", "SharedFunctionalGroupsSequence": [_frame("R")]}, "", False),
        ({"PerFrameFunctionalGroupsSequence": [_frame("L"), _frame("R")]}, "", False),
    ],
)
def test_side_is_what_all_places_say(values, side, is_clear):
    facts = _facts(**values)
    assert facts["laterality"] == side and facts["contradictions"] == ([] if is_clear else ["laterality"])


def test_modifiers_are_named_and_free_text_is_not_taken():
    facts = _facts(ViewCodeSequence=[_code("399162004", modifiers=["399163009", "399055006", "123"])])
    assert facts["view_modifiers"] == ["magnification", "spot-compression"]


def test_view_and_side_come_into_the_table_and_contradictions_into_the_report(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number, side in enumerate("LR"):
        one = make_slice(number, shape=(20, 16))
        one.Modality, one.SOPClassUID, one.file_meta.MediaStorageSOPClassUID = "MG", MG, MG
        one.ViewCodeSequence, one.ImageLaterality, one.Laterality = [_code("399368009")], side, "L"
        one.save_as(tmp_path / "in" / str(number), enforce_file_format=True)
    assert convert_tree(Dicom(kind="projections"), tmp_path / "in", tmp_path / "out") == 0
    with open(tmp_path / "out" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["view"], row["laterality"]) for row in rows) == [("MLO", ""), ("MLO", "L")]
    assert "laterality left out: the header contradicts itself" in (tmp_path / "private-out/report.csv").read_text()
    assert "1 images: view or side is left empty" in capsys.readouterr().out
