"""FETAL_PLANES_DB: semicolons or commas, blanks in header and cells, parts by patient."""

from __future__ import annotations

import json

import pytest

from data_prep.check import check_data_set
from data_prep.errors import DatasetError
from data_prep.sources.fetal_planes import BRAIN_PLANES, PLANES, FetalPlanes
from tests.data_prep.factories import convert_tree, report_lines, write_bytes, write_csv, write_picture


def fetal_tree(root, delimiter=";", num_patients=14):
    """The header's last name ends with a blank, as published; the spreadsheet lies beside the CSV file."""
    rows = [["Image_name", "Patient_num", "Plane", "Brain_plane", "Operator", "US_Machine", "Train "]]
    for patient in range(1, num_patients + 1):
        for number, plane in enumerate((PLANES[patient % 6], "Fetal brain"), 1):
            name = f"Patient{patient:05d}_Plane{number}_1_of_2"
            write_picture(root / "Images" / f"{name}.png", (24, 20), 10 * patient + number)
            brain = BRAIN_PLANES[patient % 4] if plane == "Fetal brain" else "Not A Brain"
            rows.append([name, patient, plane + " ", brain, "Op. 1", "Voluson E6", int(patient % 3 != 0)])
    write_csv(root / "FETAL_PLANES_DB_data.csv", rows, delimiter)
    write_bytes(root / "FETAL_PLANES_DB_data.xlsx")
    return root


@pytest.mark.parametrize("delimiter", [";", ","])
def test_fetal_planes_official_parts_by_patient(tmp_path, delimiter):
    out = tmp_path / "out"
    assert convert_tree(FetalPlanes(), fetal_tree(tmp_path / "in", delimiter), out) == 0
    content = json.loads((out / "datalist.json").read_text())
    assert content["classes"] == list(PLANES)
    assert (len(content["training"]), len(content["test"])) == (20, 8)
    assert {e["patient"] for e in content["test"]} == {"Patient00003", "Patient00006", "Patient00009", "Patient00012"}
    assert {e["fold"] for e in content["training"]} == {0, 1, 2, 3, 4}
    lines = report_lines(out)
    assert lines["file", "FETAL_PLANES_DB_data.xlsx", ""] == ("skipped", "other-format")
    assert check_data_set(out).problems == []


def test_fetal_planes_split_by_patient_and_published(tmp_path):
    root = fetal_tree(tmp_path / "in")
    assert convert_tree(FetalPlanes(split="patient"), root, tmp_path / "patient") == 0
    assert check_data_set(tmp_path / "patient").problems == []
    assert convert_tree(FetalPlanes(split="published"), root, tmp_path / "published") == 0
    notes = json.loads((tmp_path / "published/report.json").read_text())["notes"]
    assert any("more than one side" in note for note in notes)
    assert any("leakage" in problem for problem in check_data_set(tmp_path / "published").problems)


def test_fetal_planes_brain_planes_alone(tmp_path):
    out = tmp_path / "out"
    assert convert_tree(FetalPlanes(target="brain-plane"), fetal_tree(tmp_path / "in"), out) == 0
    content = json.loads((out / "datalist.json").read_text())
    assert content["classes"] == list(BRAIN_PLANES)
    assert ("skipped", "not-a-brain") in report_lines(out).values()


def test_fetal_planes_bad_rows_are_named(tmp_path):
    root = fetal_tree(tmp_path / "in")
    text = (root / "FETAL_PLANES_DB_data.csv").read_text().splitlines()
    text[1] = text[1].replace("Patient00001_Plane1", "Patient00099_Plane1")
    text[3] = text[3][:-1] + "7"
    text[5] = text[5].replace(text[5].split(";")[2], "Fetal hand")
    text[7] = text[7][:20]
    (root / "FETAL_PLANES_DB_data.csv").write_text("\n".join(text))
    assert convert_tree(FetalPlanes(), root, tmp_path / "out") == 3
    lines = report_lines(tmp_path / "out")
    assert [lines["row", "FETAL_PLANES_DB_data.csv", str(n)][1] for n in (1, 3, 5, 7)] == [
        "missing-image", "bad-row", "unknown-class", "damaged-row",
    ]  # fmt: skip
    assert sum(v == ("skipped", "not-listed") for v in lines.values()) == 2
    (root / "FETAL_PLANES_DB_data.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DatasetError, match="lacks the columns"):
        convert_tree(FetalPlanes(), root, tmp_path / "other")
