"""Kvasir and CPN X-ray: class folders with the usual litter, copies, and no patients."""

from __future__ import annotations

import json
import shutil

import pytest

from data_prep.check import check_data_set
from data_prep.errors import UsageError
from data_prep.sources.cpn_xray import CpnXray
from data_prep.sources.kvasir import CLASSES, Kvasir
from tests.data_prep.factories import convert_tree, report_lines, write_bytes, write_picture


def kvasir_tree(root, per_class=3):
    """Version 1 as unpacked, with pictures of mixed size and litter."""
    for number, name in enumerate(CLASSES):
        for i in range(per_class):
            path = root / "kvasir-dataset" / name / f"{number:04x}{i:04x}-uuid.jpg"
            write_picture(path, (40 + i, 32), 100 * number + i, "RGB")
    write_bytes(root / "kvasir-dataset/polyps/._0006-uuid.jpg")
    write_bytes(root / "kvasir-dataset/.DS_Store")
    write_picture(root / "overview.png", seed=9999)
    return root


def cpn_tree(root, per_class=4, parts=("",)):
    """Names with brackets, grey and colour, PNG and JPEG under one name."""
    seed = 0
    for part in parts:
        for folder in ("COVID" if part == "" else "COVID19", "NORMAL", "PNEUMONIA"):
            for i in range(per_class):
                seed += 1
                write_picture(root / part / folder / f"{folder}({i}).png", (30, 30), seed, "RGB" if i == 1 else "L")
            write_picture(root / part / folder / f"{folder}(0).jpg", (30, 30), seed + 1000)
    write_bytes(root / "Thumbs.db")
    return root


def first_of(folder):
    return min(folder.glob("0*.jpg"))


def parts_of(out):
    content = json.loads((out / "datalist.json").read_text())
    return {part: content.get(part, []) for part in ("training", "validation", "test")}, content


def test_kvasir_classes_folds_and_verdicts(tmp_path):
    out = tmp_path / "out"
    assert convert_tree(Kvasir(), kvasir_tree(tmp_path / "in"), out) == 0
    parts, content = parts_of(out)
    assert content["classes"] == list(CLASSES)
    assert sum(map(len, parts.values())) == 24 and all(parts.values())
    lines = report_lines(out)
    assert lines["file", "overview.png", ""] == ("skipped", "no-class")
    assert lines["file", "kvasir-dataset/polyps/._0006-uuid.jpg", ""] == ("skipped", "junk")
    assert json.loads((out / "report.json").read_text())["notes"][0].startswith("24 pictures in 8 of 8 classes")
    assert check_data_set(out).problems == []


def test_kvasir_copies_and_near_copies_stay_on_one_side(tmp_path):
    from PIL import Image

    root = kvasir_tree(tmp_path / "in")
    folder = root / "kvasir-dataset/polyps"
    shutil.copy(first_of(folder), folder / "copy.jpg")
    for number in range(6):
        first = Image.open(first_of(root / "kvasir-dataset/esophagitis"))
        first.save(folder.parent / "esophagitis" / f"frame{number}.jpg", quality=60 + 5 * number)
    out = tmp_path / "out"
    assert convert_tree(Kvasir(near_bits=40), root, out) == 0
    assert sorted(report_lines(out).values()).count(("skipped", "duplicate")) == 1
    of_scene = {
        e["patient"]: part for part, entries in parts_of(out)[0].items() for e in entries if "frame" in e["case"]
    }
    assert len(of_scene) == 1
    assert check_data_set(out).problems == []


def test_picture_in_two_classes_fails_everywhere(tmp_path):
    root = kvasir_tree(tmp_path / "in")
    shutil.copy(first_of(root / "kvasir-dataset/polyps"), root / "kvasir-dataset/esophagitis/x.jpg")
    out = tmp_path / "out"
    assert convert_tree(Kvasir(split="folds", near_bits=0), root, out, folds=3) == 3
    assert report_lines(out)["file", "kvasir-dataset/esophagitis/x.jpg", ""] == ("failed", "contradicting-classes")
    assert {e["fold"] for e in parts_of(out)[0]["training"]} == {0, 1, 2}


def test_damaged_picture_fails_alone(tmp_path):
    root = kvasir_tree(tmp_path / "in")
    path = first_of(root / "kvasir-dataset/polyps")
    path.write_bytes(path.read_bytes()[:40])
    assert convert_tree(Kvasir(), root, tmp_path / "out") == 3
    assert [v for v in report_lines(tmp_path / "out").values() if v[0] == "failed"] == 2 * [
        ("failed", "damaged-picture")
    ]


def test_cpn_keeps_pictures_whose_names_differ_in_brackets_or_ending_only(tmp_path):
    out = tmp_path / "out"
    assert convert_tree(CpnXray(mode="RGB"), cpn_tree(tmp_path / "in"), out) == 0
    parts, content = parts_of(out)
    assert content["classes"] == ["COVID", "NORMAL", "PNEUMONIA"]
    assert sum(map(len, parts.values())) == 15
    assert check_data_set(out).problems == []


def test_cpn_edition_with_parts_keeps_them(tmp_path):
    out = tmp_path / "out"
    assert convert_tree(CpnXray(), cpn_tree(tmp_path / "in", 3, ("Data/train", "Data/test")), out) == 0
    parts, _ = parts_of(out)
    assert (len(parts["training"]), len(parts["validation"]), len(parts["test"])) == (12, 0, 12)
    other = tmp_path / "other"
    assert convert_tree(CpnXray(split="published"), tmp_path / "in", other) == 0
    parts, _ = parts_of(other)
    assert (len(parts["training"]), len(parts["validation"]), len(parts["test"])) == (18, 0, 6)


@pytest.mark.parametrize("source", [Kvasir(), CpnXray()], ids=["kvasir", "cpn"])
def test_wrong_folder_archive_and_missing_parts_are_one_error(tmp_path, source):
    write_picture(tmp_path / "in" / "a" / "1.png")
    with pytest.raises(UsageError, match="check the path"):
        convert_tree(source, tmp_path / "in", tmp_path / "out")
    (tmp_path / "zip").mkdir()
    write_bytes(tmp_path / "zip" / "data.zip")
    with pytest.raises(UsageError, match=r"data\.zip"):
        convert_tree(source, tmp_path / "zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_official_split_and_too_few_patients_are_refused(tmp_path):
    root = kvasir_tree(tmp_path / "in", 1)
    with pytest.raises(UsageError, match="--split official"):
        convert_tree(Kvasir(split="official"), root, tmp_path / "out")
    with pytest.raises(UsageError, match="--split folds"):
        convert_tree(Kvasir(near_bits=0), root, tmp_path / "out")
