"""PAD-UFES-20: the table of 26 columns, three folders of pictures, patients with several lesions."""

from __future__ import annotations

import csv
import json
import zipfile

import pytest

from data_prep.check import check_data_set
from data_prep.errors import DatasetError, UsageError
from data_prep.sources.pad_ufes_20 import CLASSES, PadUfes20
from tests.data_prep.factories import convert_tree, report_lines, write_bytes, write_csv, write_picture

COLUMNS = (
    "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,skin_cancer_history,"
    "cancer_history,has_piped_water,has_sewage_system,fitspatrick,region,diameter_1,diameter_2,diagnostic,itch,grew,"
    "hurt,changed,bleed,elevation,img_id,biopsed"
).split(",")


def pad_tree(root, num_patients=12):
    """Two lesions per patient, one of them with two pictures; a Bowen's disease; litter of a Mac."""
    rows = []
    for patient in range(num_patients):
        for lesion in range(2):
            diagnosis = "BOD" if patient == lesion == 0 else CLASSES[(patient + lesion) % 6]
            for number in range(1 + lesion):
                name = f"PAT_{patient}_{100 + lesion}_{10 * patient + number}.png"
                part = f"imgs_part_{1 + patient % 3}"
                write_picture(root / "images" / part / part / name, (20, 24), 50 * patient + 5 * lesion + number, "RGB")
                row = dict.fromkeys(COLUMNS, "") | {
                    "patient_id": f"PAT_{patient}", "lesion_id": 100 + lesion, "age": 8, "gender": "FEMALE",
                    "region": "ARM", "fitspatrick": "3.0", "diagnostic": diagnosis, "img_id": name, "biopsed": "True",
                }  # fmt: skip
                rows.append([row[column] for column in COLUMNS])
    write_csv(root / "metadata.csv", [COLUMNS, *rows])
    write_bytes(root / "images/imgs_part_1/imgs_part_1/._PAT_0_100_0.png")
    return root


def test_pad_ufes_patients_stay_together_and_bowen_is_scc(tmp_path):
    out = tmp_path / "out"
    assert convert_tree(PadUfes20(), pad_tree(tmp_path / "in"), out) == 0
    content = json.loads((out / "datalist.json").read_text())
    assert content["classes"] == list(CLASSES)
    entries = [e | {"part": part} for part in ("training", "validation", "test") for e in content[part]]
    assert len(entries) == 36
    assert next(e for e in entries if e["case"] == "PAT_0_100_0")["label"] == CLASSES.index("SCC")
    assert all(len({e["part"] for e in entries if e["patient"] == patient}) == 1 for patient in
               {e["patient"] for e in entries})  # fmt: skip
    assert "ARM" in (out / "cases.csv").read_text()
    assert check_data_set(out).problems == []


def test_pad_ufes_every_row_and_picture_has_a_verdict(tmp_path):
    root = pad_tree(tmp_path / "in")
    with open(root / "metadata.csv", newline="") as file:
        rows = list(csv.reader(file))
    column = {name: number for number, name in enumerate(COLUMNS)}
    rows[1][column["img_id"]] = "PAT_999_1_1.png"
    rows[2][column["diagnostic"]] = "XYZ"
    rows[3][column["patient_id"]] = ""
    rows[5][column["img_id"]] = rows[4][column["img_id"]]
    rows[6] = rows[6][:20]
    write_csv(root / "metadata.csv", rows)
    assert convert_tree(PadUfes20(split="folds"), root, tmp_path / "out") == 3
    lines = report_lines(tmp_path / "out")
    found = [lines["row", "metadata.csv", str(n)] for n in range(1, 8)]
    assert found == [("failed", "missing-image"), ("failed", "unknown-class"), ("failed", "no-patient"), ("ok", ""),
                     ("failed", "same-image-twice"), ("failed", "damaged-row"), ("ok", "")]  # fmt: skip
    # Of row 1 (renamed), row 5 (names another) and row 6 (cut) the pictures are left over.
    assert sum(v == ("skipped", "not-listed") for v in lines.values()) == 3


def test_pad_ufes_zip_files_are_inputs_or_named_in_the_error(tmp_path):
    root = pad_tree(tmp_path / "in")
    archives = []
    for part in (1, 2, 3):
        folder = root / f"images/imgs_part_{part}"
        archives.append(root / f"images/imgs_part_{part}.zip")
        with zipfile.ZipFile(archives[-1], "w") as archive:
            for path in sorted(folder.rglob("PAT_*.png")):
                archive.write(path, path.relative_to(folder).as_posix())
                path.unlink()
    with pytest.raises(UsageError, match=r"imgs_part_1\.zip"):
        convert_tree(PadUfes20(), root, tmp_path / "out")
    assert convert_tree(PadUfes20(), [root / "metadata.csv", *archives], tmp_path / "out") == 0
    assert len(list((tmp_path / "out/images").iterdir())) == 36


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [("", DatasetError, "lacks the columns"), (",".join(COLUMNS) + "\n", UsageError, "no rows"),
     ("patient_id;img_id\n1;2\n", DatasetError, "lacks the columns"), (None, UsageError, "metadata.csv")],
    ids=["empty", "header only", "other columns", "none"],
)  # fmt: skip
def test_pad_ufes_wrong_table_is_one_error(tmp_path, text, error, match):
    root = pad_tree(tmp_path / "in", 1)
    (root / "metadata.csv").unlink() if text is None else (root / "metadata.csv").write_text(text)
    with pytest.raises(error, match=match):
        convert_tree(PadUfes20(), root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
