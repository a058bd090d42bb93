"""Folder per class: official parts, duplicates, contradictions, patients."""

from __future__ import annotations

import json
import shutil

import pytest

from data_prep.errors import UsageError
from data_prep.sources.images import Images
from tests.data_prep.factories import convert_tree, report_lines, write_picture


def _datalist(out):
    return json.loads((out / "datalist.json").read_text())


def test_classes_parts_and_duplicates(tmp_path):
    root = tmp_path / "in"
    for number in range(4):
        for name in ("cat", "dog"):
            write_picture(root / "train" / name / f"{number}.png", seed=10 * number + len(name + "x" * (name == "dog")))
    write_picture(root / "test" / "cat" / "x.jpg", seed=5000)
    shutil.copy(root / "train" / "cat" / "0.png", root / "test" / "cat" / "copy.png")
    write_picture(root / "loose.png", seed=6000)
    assert convert_tree(Images(), root, tmp_path / "out", folds=0) == 0
    found = _datalist(tmp_path / "out")
    assert len(found["test"]) == 2 and len(found["training"]) == 7
    assert found["labels"] == {"cat": 0, "dog": 1}
    lines = report_lines(tmp_path / "out")
    assert lines["file", "train/cat/0.png", ""] == ("skipped", "duplicate")
    assert lines["file", "loose.png", ""] == ("skipped", "no-class")


def test_same_image_in_two_classes_fails(tmp_path):
    write_picture(tmp_path / "in" / "a" / "1.png", seed=1)
    write_picture(tmp_path / "in" / "b" / "2.png", seed=2)
    shutil.copy(tmp_path / "in" / "a" / "1.png", tmp_path / "in" / "b" / "1.png")
    assert convert_tree(Images(), tmp_path / "in", tmp_path / "out") == 3
    assert report_lines(tmp_path / "out")["file", "a/1.png", ""] == ("failed", "contradicting-classes")


def test_patients_stay_in_one_fold(tmp_path):
    for patient in range(6):
        for image in range(3):
            write_picture(tmp_path / "in" / "ab"[patient % 2] / f"p{patient}_{image}.png", seed=10 * patient + image)
    source = Images(patient_regex=r"p(\d+)_")
    assert convert_tree(source, tmp_path / "in", tmp_path / "out", folds=3) == 0
    rows = (tmp_path / "out" / "cases.csv").read_text().splitlines()[1:]
    folds = {}
    for row in rows:
        _, patient, _, fold, *_ = row.split(",")
        folds.setdefault(patient, set()).add(fold)
    assert len(folds) == 6 and all(len(found) == 1 for found in folds.values())


@pytest.mark.parametrize("pattern", ["(", "a", "(a)(b)"])
def test_unusable_pattern_is_refused(tmp_path, pattern):
    write_picture(tmp_path / "in" / "a" / "1.png")
    with pytest.raises(UsageError, match="--patient-regex"):
        convert_tree(Images(patient_regex=pattern), tmp_path / "in", tmp_path / "out")
