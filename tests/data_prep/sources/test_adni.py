"""ADNI: the archive's folders, collection CSV and diagnosis tables; labels, visits, splits, privacy."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.check import check_data_set
from data_prep.errors import DatasetError, UsageError
from data_prep.sources.adni import Adni, visit_month
from tests.data_prep.dicom_factories import oracle_distance, write_series
from tests.data_prep.factories import convert_tree, report_lines, write_bytes, write_csv, write_nifti_volume

COLLECTION = ["Image Data ID", "Subject", "Group", "Sex", "Age", "Visit", "Modality", "Description", "Type", "Acq Date",
              "Format", "Downloaded"]  # fmt: skip
#: name: (DX_bl, ORIGPROT, {month: DX})
SUBJECTS = {
    "002_S_0001": ("CN", "ADNI1", {0: "CN", 6: "CN"}),
    "002_S_0002": ("AD", "ADNI1", {0: "Dementia"}),
    "003_S_0003": ("LMCI", "ADNI1", {0: "MCI", 12: "MCI", 36: "MCI"}),
    "003_S_0004": ("LMCI", "ADNI1", {0: "MCI", 24: "Dementia"}),
    "005_S_4005": ("EMCI", "ADNI2", {0: "MCI", 12: "MCI"}),
    "005_S_4006": ("EMCI", "ADNI2", {0: "MCI", 36: "MCI", 48: "Dementia"}),
    "005_S_4007": ("EMCI", "ADNI2", {0: "MCI", 12: "CN", 36: "MCI"}),
    "006_S_4008": ("SMC", "ADNI2", {0: "CN"}),
    "006_S_4009": ("CN", "ADNI2", {0: "MCI to Dementia"}),
    "006_S_4010": ("", "ADNI2", {0: "", 6: "MCI"}),
    "007_S_10011": ("CN", "ADNI3", {0: "NL"}),
    "007_S_4012": ("AD", "ADNI2", {0: "Dementia"}),
}


def adnimerge(path, subjects=SUBJECTS):
    rows = [["RID", "PTID", "VISCODE", "EXAMDATE", "ORIGPROT", "COLPROT", "DX_bl", "DX", "Month"]]
    for ptid, (baseline, phase, exams) in subjects.items():
        for month, diagnosis in exams.items():
            code = "bl" if month == 0 else f"m{month:02d}"
            rows.append([int(ptid[-4:]), ptid, code, "2006-03-15", phase, phase, baseline, diagnosis, month])
    write_csv(path, rows)


def collection_row(image_id, ptid, **cells):
    base = dict(zip(COLLECTION, [f"I{image_id}", ptid, "CN", "M", "71", "sc", "MRI", "MP-RAGE", "Original", "3/2/2006",
                                 "NiFTI", "Yes"], strict=True))  # fmt: skip
    return [(base | cells)[column] for column in COLLECTION]


def image_path(root, image_id, ptid, ending="nii", series="MP-RAGE"):
    folder = root / "ADNI" / ptid / series / "2006-03-02_10_11_12.0" / f"I{image_id}"
    return folder / f"ADNI_{ptid}_MR_{series}_br_raw_20060302_S11{image_id}_I{image_id}.{ending}"


def adni_tree(root, subjects=SUBJECTS, rows=()):
    """One screening scan per subject, XML beside it, a localizer, a table that is not needed, litter."""
    adnimerge(root / "ADNIMERGE_23Dec2025.csv", subjects)
    listed = []
    for number, ptid in enumerate(subjects, 100):
        write_nifti_volume(image_path(root, number, ptid), (9, 8, 7), seed=number)
        write_bytes(image_path(root, number, ptid, "xml"), b"<x/>")
        listed.append(collection_row(number if number % 2 else f"{number}", ptid, **{"Image Data ID": str(number)}
                                     if number % 2 else {}))  # fmt: skip
    first = next(iter(subjects))
    write_nifti_volume(image_path(root, 900, first, series="Localizer"), (9, 8, 3), seed=900)
    write_nifti_volume(image_path(root, 901, first), (9, 8, 7), seed=901)
    listed.append(collection_row(900, first, Description="3-plane localizer"))
    write_csv(root / "idaSearch_1_2_2026.csv", [COLLECTION, *listed, *rows])
    write_csv(root / "APOERES.csv", [["RID", "APGEN1"], [1, 3]])
    write_bytes(root / "ADNI/._.DS_Store")
    return root


def rows_of(out, table="idaSearch_1_2_2026.csv"):
    return {int(item): verdict for (kind, path, item), verdict in report_lines(out).items()
            if kind == "row" and path == table}  # fmt: skip


def entries(out):
    content = json.loads((out / "datalist.json").read_text())
    return [e | {"part": part} for part in ("training", "validation", "test") for e in content.get(part, [])]


def test_adni_every_row_and_file_has_its_verdict(tmp_path):
    root, out = adni_tree(tmp_path / "in"), tmp_path / "out"
    assert convert_tree(Adni(), root, out) == 0
    assert [verdict for _, verdict in sorted(rows_of(out).items())] == [
        ("ok", ""), ("ok", ""), ("skipped", "other-class"), ("skipped", "other-class"), ("skipped", "short-follow-up"),
        ("skipped", "late-conversion"), ("skipped", "reversion"), ("skipped", "subjective-memory-concern"),
        ("skipped", "contradicting-baseline"), ("skipped", "no-baseline-diagnosis"), ("ok", ""), ("ok", ""),
        ("skipped", "other-series"),
    ]  # fmt: skip
    lines = report_lines(out)
    assert lines["file", "APOERES.csv", ""] == ("skipped", "other-table")
    assert lines["file", image_path(Path(), 901, "002_S_0001").as_posix(), ""] == ("skipped", "not-in-collection")
    assert lines["file", image_path(Path(), 100, "002_S_0001", "xml").as_posix(), ""] == ("skipped", "xml")
    assert lines["row", "ADNIMERGE_23Dec2025.csv", "1"] == ("ok", "metadata")
    assert lines["row", "ADNIMERGE_23Dec2025.csv", "9"] == ("skipped", "short-follow-up")
    assert sorted(e["label"] for e in entries(out)) == [0, 0, 1, 1]
    notes = json.loads((out / "report.json").read_text())["notes"]
    assert any("4 subjects" in note and "1 late-conversion" in note for note in notes)
    assert check_data_set(out).problems == []


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {3: "sMCI", 4: "pMCI"}),
        ({"window_months": 12}, {3: "sMCI", 5: "sMCI"}),
        ({"window_months": 12, "late_conversion": "pmci"}, {3: "sMCI", 4: "pMCI", 5: "sMCI", 6: "pMCI"}),
        ({"late_conversion": "smci"}, {3: "sMCI", 4: "pMCI", 6: "sMCI"}),
        ({"reversion": "keep"}, {3: "sMCI", 4: "pMCI", 7: "sMCI"}),
        ({"window_months": 48}, {4: "pMCI", 6: "pMCI"}),
    ],
    ids=["36 months", "12 months", "late is pMCI", "late is sMCI", "reversion kept", "48 months"],
)
def test_adni_classes_of_mci_follow_window_and_options(tmp_path, options, wanted):
    out = tmp_path / "out"
    assert convert_tree(Adni(task="smci-pmci", **options), adni_tree(tmp_path / "in"), out) == 0
    numbers = {number for number, verdict in rows_of(out).items() if verdict == ("ok", "")}
    assert numbers == set(wanted)
    with open(out / "cases.csv", newline="") as file:
        assert sorted(row["class"] for row in csv.DictReader(file)) == sorted(wanted.values())


def test_adni_four_classes_smc_and_published_split(tmp_path):
    root, out = adni_tree(tmp_path / "in"), tmp_path / "out"
    assert convert_tree(Adni(task="all", smc_as_nc=True, split="published"), root, out) == 0
    found = sorted((e["part"], e["label"]) for e in entries(out))
    assert found == [("test", 0), ("test", 3), ("training", 0), ("training", 1), ("training", 2), ("training", 3)]
    assert rows_of(out)[11] == ("skipped", "other-phase")


def test_adni_dxsum_of_three_phases(tmp_path):
    root = adni_tree(tmp_path / "in")
    (root / "ADNIMERGE_23Dec2025.csv").unlink()
    header = ["Phase", "RID", "VISCODE", "VISCODE2", "EXAMDATE", "DXCURREN", "DXCHANGE", "DIAGNOSIS"]
    rows = [
        ["ADNI1", 1, "bl", "bl", "2006-03-15", 1, "", ""],
        ["ADNI1", 2, "bl", "bl", "2006-03-15", 3, "", ""],
        ["ADNI1", 3, "sc", "sc", "2006-02-01", 1, "", ""],
        ["ADNI1", 3, "bl", "bl", "2006-03-15", 2, "", ""],
        ["ADNI2", 3, "v11", "m36", "2009-03-15", "", 2, ""],
        ["ADNI1", 4, "bl", "bl", "2006-03-15", 2, "", ""],
        ["ADNI3", 4, "y2", "", "2008-03-20", "", "", "3.0"],
        ["ADNI2", 4005, "v03", "bl", "2012-03-15", "", 8, ""],
        ["ADNI2", 4006, "v01", "f", "2012-03-15", "", 5, ""],
        ["ADNI2", 4012, "v03", "bl", "2012-03-15", "", 5, ""],
        ["ADNI2", "x", "v03", "bl", "2012-03-15", "", 5, ""],
    ]
    write_csv(root / "DXSUM_PDXCONV_ADNIALL.csv", [header, *rows])
    out = tmp_path / "out"
    assert convert_tree(Adni(task="all"), root, out) == 3
    ok = {number for number, verdict in rows_of(out).items() if verdict == ("ok", "")}
    assert ok == {1, 2, 3, 4, 12}
    table = rows_of(out, "DXSUM_PDXCONV_ADNIALL.csv")
    assert (table[7], table[8], table[9], table[11]) == (
        ("ok", "metadata"), ("skipped", "short-follow-up"), ("skipped", "screening-failure"), ("failed", "bad-subject"),
    )  # fmt: skip


def test_adni_one_scan_per_visit_and_reasons_for_the_others(tmp_path):
    ptid = "002_S_0001"
    rows = [
        collection_row(200, ptid, **{"Acq Date": "3/1/2006"}),
        collection_row(201, ptid, Type="Processed"),
        collection_row(202, ptid, Modality="PET"),
        collection_row(203, ptid, Visit="m06", **{"Acq Date": "9/15/2006"}),
        collection_row(204, ptid, Visit="7", **{"Acq Date": "10/1/2006"}),
        collection_row(205, ptid, Downloaded=""),
        collection_row(206, ptid),
        collection_row(100, ptid),
        collection_row(100, ptid, Visit="m12"),
        collection_row(207, "not a subject"),
        collection_row(208, "009_S_9999"),
        collection_row("xx", ptid),
        collection_row(209, ptid, **{"Acq Date": "soon"}),
        collection_row(210, ptid),
        collection_row(211, ptid, Visit="7", **{"Acq Date": "10/1/2004"}),
    ]
    root = adni_tree(tmp_path / "in", {ptid: SUBJECTS[ptid]}, rows)
    for number in (200, 203, 204):
        write_nifti_volume(image_path(root, number, ptid), (9, 8, 8), seed=number)
    write_nifti_volume(image_path(root, 210, "002_S_0002"), (9, 8, 8), seed=210)
    assert convert_tree(Adni(), root, tmp_path / "first") == 3
    found = rows_of(tmp_path / "first")
    assert found[17] == ("failed", "unknown-visit")
    assert [found[number] for number in (1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)] == [
        ("skipped", "other-scan-taken"), ("ok", ""), ("skipped", "other-type"), ("skipped", "other-modality"),
        ("skipped", "other-visit"), ("skipped", "other-visit"), ("skipped", "not-downloaded"),
        ("failed", "missing-image"), ("skipped", "duplicate"), ("failed", "contradicting-row"),
        ("failed", "bad-subject"), ("skipped", "no-diagnosis"), ("failed", "bad-image-id"), ("failed", "bad-date"),
        ("failed", "contradicting-subject"),
    ]  # fmt: skip
    convert_tree(Adni(one_per_visit="last", visits="all"), root, tmp_path / "last")
    found = rows_of(tmp_path / "last")
    # Row 7 has no usable visit code; its date is that of month 6, whose first scan is row 6.
    assert (found[1], found[3], found[6], found[7]) == (
        ("ok", ""), ("skipped", "other-scan-taken"), ("skipped", "other-scan-taken"), ("ok", ""),
    )  # fmt: skip
    convert_tree(Adni(one_per_visit="all", visits="all"), root, tmp_path / "all")
    assert len(entries(tmp_path / "all")) == 4
    assert len({e["patient"] for e in entries(tmp_path / "all")}) == 1


def test_adni_later_scans_only_while_the_diagnosis_lasts(tmp_path):
    subjects = {"002_S_0001": ("CN", "ADNI1", {0: "CN", 6: "CN", 12: "MCI"})}
    rows = [collection_row(200 + m, "002_S_0001", Visit=f"m{m:02d}") for m in (6, 12, 18)]
    root = adni_tree(tmp_path / "in", subjects, rows)
    for m in (6, 12, 18):
        write_nifti_volume(image_path(root, 200 + m, "002_S_0001"), (9, 8, 7), seed=m)
    assert convert_tree(Adni(visits="all"), root, tmp_path / "out") == 0
    assert [rows_of(tmp_path / "out")[n] for n in (3, 4, 5)] == [
        ("ok", ""), ("skipped", "diagnosis-changed"), ("skipped", "no-diagnosis-at-visit"),
    ]  # fmt: skip


def dicom_image(root, image_id, ptid, **options):
    folder = image_path(root, image_id, ptid, "dcm").parent
    slices = write_series(folder, modality="MR", series=str(image_id), **options)
    for number, path in enumerate(sorted(folder.glob("IM*"))):
        stem = image_path(root, image_id, ptid, "dcm").name
        path.rename(folder / stem.replace("_br_raw_20060302", f"_br_raw_2006030210{number:04d}_{number}"))
    return slices


def test_adni_dicom_is_exact_and_a_broken_scan_gives_way_to_the_next(tmp_path):
    ptid = "002_S_0001"
    rows = [
        collection_row(300, ptid, Format="DCM"),
        collection_row(301, ptid, Format="DCM", **{"Acq Date": "3/3/2006"}),
    ]
    root = adni_tree(tmp_path / "in", {ptid: SUBJECTS[ptid]}, rows)
    image_path(root, 100, ptid).unlink()
    write_csv(root / "idaSearch_1_2_2026.csv", [COLLECTION, *rows])
    dicom_image(root, 300, ptid, angle=0.2, edit=lambda slices: slices.pop(4), seed=1)
    slices = dicom_image(root, 301, ptid, angle=0.3, seed=2)
    out = tmp_path / "out"
    assert convert_tree(Adni(), root, out) == 3
    assert rows_of(out) == {1: ("failed", "missing-slice"), 2: ("ok", "")}
    (entry,) = entries(out)
    # A slice at the end that cannot be read would leave a shorter, even stack.
    last = max(image_path(root, 300, ptid).parent.glob("*.dcm"), key=lambda path: path.stat().st_mtime_ns)
    write_bytes(last.with_name(last.name.replace("_I300", "x_I300")), b"cut")
    assert convert_tree(Adni(), root, tmp_path / "cut") == 3
    assert rows_of(tmp_path / "cut")[1] == ("failed", "unreadable-dicom")
    assert oracle_distance(out / entry["image"], slices) <= 0.01
    assert check_data_set(out).problems == []


def test_adni_nothing_that_identifies_a_person_leaves(tmp_path):
    root, out = adni_tree(tmp_path / "in"), tmp_path / "out"
    image_path(root, 111, "007_S_4012").unlink()
    dicom_image(root, 111, "007_S_4012", angle=0.1)
    assert convert_tree(Adni(task="all"), root, out) == 0
    texts = [path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".jsonl", ".csv")]
    everything = "\n".join([*texts, *(str(path.relative_to(out)) for path in out.rglob("*"))])
    assert len(entries(out)) == 6
    for secret in (
        "_S_",
        "2006-0",
        "/2006",
        "20060302",
        "idaSearch",
        "RAGE",
        "_I1",
        "/I1",
        "raw",
        "23Dec2025",
        "mprage",
    ):
        assert secret not in everything, secret
    with open(out / "report.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert {line[2] for line in rows if line[0] == "row"} == {""}
    assert rows[1:] == sorted(rows[1:])
    for path in out.rglob("*.nii.gz"):
        header = nib.load(path).header
        assert not bytes(header["descrip"]).strip(b"\0") and not header.extensions


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda root: (root / "ADNIMERGE_23Dec2025.csv").unlink(), UsageError, "ADNIMERGE or DXSUM"),
        (lambda root: adnimerge(root / "more/ADNIMERGE_01Jan2024.csv"), UsageError, "found 2"),
        (lambda root: (root / "idaSearch_1_2_2026.csv").unlink(), UsageError, "Image Data ID"),
        (lambda root: (root / "ADNIMERGE_23Dec2025.csv").write_text(""), DatasetError, "lacks the columns"),
        (lambda root: (root / "ADNIMERGE_23Dec2025.csv").write_text("RID,PTID\n1,2\n"), DatasetError, "DX_bl"),
        (lambda root: (root / "idaSearch_1_2_2026.csv").write_text("Image Data ID,Subject\n1,2\n"), DatasetError,
         "Visit"),
    ],
    ids=["no table", "two tables", "no collection", "empty", "other columns", "other collection"],
)  # fmt: skip
def test_adni_wrong_tables_are_one_error(tmp_path, damage, error, match):
    root = adni_tree(tmp_path / "in", {"002_S_0001": SUBJECTS["002_S_0001"]})
    damage(root)
    with pytest.raises(error, match=match):
        convert_tree(Adni(), root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adni_rows_cut_short_fail_and_cost_no_other(tmp_path):
    root = adni_tree(tmp_path / "in")
    text = (root / "idaSearch_1_2_2026.csv").read_text()
    (root / "idaSearch_1_2_2026.csv").write_text(text[: text.rindex("3/2/2006")])
    assert convert_tree(Adni(), root, tmp_path / "out") == 3
    assert ("failed", "damaged-row") in rows_of(tmp_path / "out").values()
    with pytest.raises(UsageError, match="--series-regex"):
        convert_tree(Adni(series_regex="("), root, tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "month"),
    [("bl", 0), ("sc", 0), ("SCMRI", 0), ("m06", 6), ("M120", 120), ("ADNI Screening", 0), ("ADNI Baseline", 0),
     ("ADNI2 Screening MRI-New Pt", 0), ("ADNI1/GO Month 12", 12), ("ADNI2 Initial Visit-Cont Pt", None), ("y1", None),
     ("v04", None), ("7", None), ("", None), ("ADNI2 Month 6-New Pt", 6)],
)  # fmt: skip
def test_visit_month(text, month):
    assert visit_month(text) == month


def test_adni_own_masks_and_steps(tmp_path):
    ptid = "002_S_0001"
    root = adni_tree(tmp_path / "in", {ptid: SUBJECTS[ptid], "002_S_0002": SUBJECTS["002_S_0002"]})
    path = image_path(root, 100, ptid)
    mask = np.zeros((9, 8, 7), np.uint8)
    mask[2:6, 2:7, 1:5] = 1
    nib.save(nib.Nifti1Image(mask, nib.load(path).affine), path.with_name(path.stem + "_mask.nii.gz"))
    out = tmp_path / "out"
    source = Adni(mask_suffix="_mask", strip=True, zscore=True, grid="6,6,6")
    assert convert_tree(source, root, out) == 3
    assert rows_of(out)[2] == ("failed", "missing-mask")
    (entry,) = entries(out)
    image = nib.load(out / entry["image"])
    data = image.get_fdata()
    assert image.shape == (6, 6, 6)
    original, brain = nib.load(path).get_fdata(), mask > 0
    wanted = np.where(brain, (original - original[brain].mean()) / original[brain].std(), 0)
    places = nib.affines.apply_affine(np.linalg.inv(image.affine) @ nib.load(path).affine, np.argwhere(brain))
    np.testing.assert_allclose(data[tuple(np.rint(places).astype(int).T)], wanted[brain], atol=1e-4)
    assert np.count_nonzero(data) <= brain.sum()
    record = json.loads((out / "manifest.jsonl").read_text())["files"][0]["processing"]
    assert [step["step"] for step in record] == ["strip", "zscore", "grid"]
    assert check_data_set(out).problems == []
