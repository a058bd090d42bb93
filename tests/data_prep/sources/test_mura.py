"""MURA: tables with and without header, pairs of a study, patients on one side, the published validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from data_prep.check import check_data_set
from data_prep.cli import main
from data_prep.errors import DatasetError, UsageError
from data_prep.sources.mura import Mura, make_pairs
from monai_mamba.training.datalist import load_cases
from tests.data_prep.factories import convert_tree, report_lines, tree_bytes, write_bytes, write_csv, write_picture

#: part, body part, patient, study, label, number of images
STUDIES = [
    ("train", "XR_SHOULDER", 1, 1, 1, 3),
    ("train", "XR_ELBOW", 1, 1, 0, 1),
    ("train", "XR_HAND", 2, 1, 0, 2),
    ("train", "XR_HAND", 2, 2, 1, 4),
    ("train", "XR_WRIST", 3, 1, 0, 2),
    ("valid", "XR_WRIST", 11185, 1, 1, 2),
    ("valid", "XR_FINGER", 11186, 1, 0, 1),
]


def mura_tree(root: Path, studies=STUDIES, *, header: bool = False) -> Path:
    """The unpacked download: tables without header (or saved again with one), AppleDouble files, one RGB file."""
    base = root / "in" / "MURA-v1.1"
    for part in ("train", "valid"):
        images, labels = [], []
        for seed, (of, body, patient, study, label, count) in enumerate(studies):
            if of != part:
                continue
            word = "positive" if label else "negative"
            folder = f"MURA-v1.1/{part}/{body}/patient{patient:05d}/study{study}_{word}/"
            labels.append([folder, label])
            for number in range(1, count + 1):
                mode = "RGB" if (patient, study, number) == (3, 1, 2) else "L"
                write_picture(root / "in" / folder / f"image{number}.png", (20, 16), 100 * seed + number, mode)
                images.append([f"{folder}image{number}.png"])
            write_bytes(root / "in" / folder / "._image1.png")
        write_csv(base / f"{part}_image_paths.csv", [["image_path"]] * header + images)
        write_csv(base / f"{part}_labeled_studies.csv", [["study_path", "label"]] * header + labels)
    return root / "in"


def _datalist(out: Path) -> dict:
    return json.loads((out / "datalist.json").read_text())


@pytest.mark.parametrize("header", [False, True], ids=["published", "saved again"])
def test_every_image_and_row_is_used_and_no_first_row_is_lost(tmp_path, header):
    root, out = mura_tree(tmp_path, header=header), tmp_path / "out"
    assert convert_tree(Mura(), root, out, folds=3) == 0
    found = _datalist(out)
    assert len(found["training"]) == 3 + 1 + 1 + 6 + 1 and len(found["test"]) == 1 + 1
    first = next(entry for entry in found["training"] if entry["study"] == "XR_SHOULDER-patient00001-study1_positive")
    assert first["label"] == 1 and first["patient"] == "patient00001"
    assert found["classes"] == ["negative", "positive"]
    single = next(entry for entry in found["training"] if entry["study"].startswith("XR_ELBOW"))
    assert single["image1"] == single["image2"]
    lines = report_lines(out)
    assert sum(kind == "row" for kind, _, _ in lines) == 12 + 5 + 3 + 2
    assert {verdict for (kind, _, _), verdict in lines.items() if kind == "row"} == {("ok", "")}
    apple = "MURA-v1.1/train/XR_HAND/patient00002/study1_negative/._image1.png"
    assert lines["file", apple, ""] == ("skipped", "junk")
    assert sum(kind == "file" for kind, _, _ in lines) == sum(path.is_file() for path in root.rglob("*"))
    folds = {}
    for entry in found["training"]:
        folds.setdefault(entry["patient"], set()).add(entry["fold"])
    assert len(folds) == 3 and all(len(found) == 1 for found in folds.values())
    assert check_data_set(out).problems == []
    assert len(load_cases(out, "training")) + len(load_cases(out, "validation")) == 12
    assert {Image.open(path).mode for path in (out / "images").iterdir()} == {"L"}


@pytest.mark.parametrize(
    ("count", "rule", "expected"),
    [
        (1, "all", ((0, 0),)),
        (3, "all", ((0, 1), (0, 2), (1, 2))),
        (4, "first2", ((0, 1),)),
        (4, "canonical", ((0, 1), (2, 3))),
        (5, "canonical", ((0, 1), (2, 3), (3, 4))),
        (1, "canonical", ((0, 0),)),
        (2, "none", ((0,), (1,))),
    ],
)
def test_pairs_of_a_study(count, rule, expected):
    assert make_pairs(count, rule) == expected


def test_first2_leaves_the_other_images_out_by_name(tmp_path):
    out = tmp_path / "out"
    assert convert_tree(Mura(pairs="first2", single="skip"), mura_tree(tmp_path), out) == 0
    folder = "MURA-v1.1/train/XR_HAND/patient00002/study2_positive"
    lines = report_lines(out)
    assert lines["file", f"{folder}/image3.png", ""] == ("skipped", "further-image")
    assert lines["file", "MURA-v1.1/train/XR_ELBOW/patient00001/study1_negative/image1.png", ""] == (
        "skipped",
        "single-image",
    )
    assert not (out / "images/XR_HAND-patient00002-study2_positive_image3.png").exists()


def test_single_images_keep_the_study_and_max_side_shrinks(tmp_path):
    out = tmp_path / "out"
    assert convert_tree(Mura(pairs="none", max_side=10), mura_tree(tmp_path), out) == 0
    entries = _datalist(out)["training"]
    assert len(entries) == 12 and all("image" in entry and "study" in entry for entry in entries)
    assert all(max(Image.open(path).size) == 10 for path in (out / "images").iterdir())


def test_shards_and_merge_equal_one_run(tmp_path):
    root = mura_tree(tmp_path)
    for shard in ("1/2", "2/2"):
        assert convert_tree(Mura(), root, tmp_path / "a" / "mura", shard=shard) == 0
    assert main(["merge", str(tmp_path / "a" / "mura")]) == 0
    convert_tree(Mura(), root, tmp_path / "b" / "mura")
    assert tree_bytes(tmp_path / "a" / "mura") == tree_bytes(tmp_path / "b" / "mura")


def test_one_body_part(tmp_path):
    out = tmp_path / "out"
    assert convert_tree(Mura(body_part=["XR_WRIST"]), mura_tree(tmp_path), out) == 0
    assert len(_datalist(out)["training"]) == 1 and len(_datalist(out)["test"]) == 1
    with pytest.raises(UsageError, match="--body-part knee"):
        convert_tree(Mura(body_part=["knee"]), tmp_path / "in", tmp_path / "b")


def _many(number: int = 60) -> list:
    """Patients with one to three studies whose labels are sometimes evenly divided."""
    return [
        ("train", "XR_HAND", patient, study, (patient * study + patient // 3) % 2, 1)
        for patient in range(number, 0, -1)
        for study in range(1 + patient % 3, 0, -1)
    ]


def test_published_validation_is_that_of_the_published_rule(tmp_path):
    """Against the rule in the libraries of the published code: pandas and scikit-learn."""
    pandas = pytest.importorskip("pandas")
    from sklearn.model_selection import train_test_split

    studies = _many()
    frame = pandas.DataFrame({"patient": [f"patient{s[2]:05d}" for s in studies], "label": [s[4] for s in studies]})
    majority = frame.groupby("patient")["label"].agg(lambda x: x.value_counts().idxmax()).reset_index()
    _, expected = train_test_split(majority, test_size=0.08, random_state=42, shuffle=True, stratify=majority["label"])
    out = tmp_path / "out"
    assert convert_tree(Mura(split="published"), mura_tree(tmp_path, [*studies, STUDIES[-1]]), out) == 0
    assert {entry["patient"] for entry in _datalist(out)["validation"]} == set(expected["patient"])
    assert check_data_set(out).problems == []


def test_published_validation_of_too_few_patients_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot hold out 8 % of 3 patients"):
        convert_tree(Mura(split="published"), mura_tree(tmp_path), tmp_path / "out")


WRIST = "MURA-v1.1/train/XR_WRIST/patient00003/study1_negative"
IMAGE, STRAY = ("file", f"{WRIST}/image1.png", ""), f"{WRIST}/image3.png"
LABELS, PATHS = "MURA-v1.1/train_labeled_studies.csv", "MURA-v1.1/train_image_paths.csv"


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "ref", "verdict"),
    [
        (lambda f: (f / WRIST / "image2.png").unlink(), ("row", PATHS, "12"), ("failed", "missing-image")),
        (lambda f: (f / WRIST / "image2.png").write_bytes(b"x"), IMAGE, ("failed", "damaged-picture")),
        (lambda f: write_picture(f / STRAY), ("file", STRAY, ""), ("skipped", "not-listed")),
        (lambda f: _replace(f / LABELS, f"{WRIST}/,0", f"{WRIST}/,1"), IMAGE, ("failed", "contradicting-label")),
        (lambda f: _replace(f / LABELS, f"{WRIST}/,0", f"{WRIST}/,2"), ("row", LABELS, "5"), ("failed", "bad-label")),
        (lambda f: _replace(f / LABELS, f"{WRIST}/,0", f"{WRIST}/"), ("row", LABELS, "5"), ("failed", "damaged-row")),
        (
            lambda f: _replace(f / LABELS, f"{WRIST}/,0\n", f"{WRIST}/,0\n" * 2),
            ("row", LABELS, "6"),
            ("skipped", "duplicate-row"),
        ),
        (
            lambda f: _replace(f / PATHS, f"{WRIST}/image2.png", "../../etc/passwd"),
            ("row", PATHS, "12"),
            ("failed", "bad-path"),
        ),
    ],
    ids=[
        "file gone",
        "damaged",
        "not listed",
        "contradiction",
        "label 2",
        "row cut short",
        "row twice",
        "path outside",
    ],
)
def test_damage_has_its_verdict_and_costs_no_other_study(tmp_path, damage, ref, verdict):
    root, out = mura_tree(tmp_path), tmp_path / "out"
    for path in root.rglob("*.csv"):
        path.write_text(path.read_text())
    damage(root)
    assert convert_tree(Mura(), root, out) == (3 if verdict[0] == "failed" else 0)
    lines = report_lines(out)
    assert lines[ref] == verdict
    assert lines["case", "XR_SHOULDER-patient00001-study1_positive", ""] == ("ok", "")


def test_labels_come_from_the_folders_when_the_tables_are_missing(tmp_path):
    root, out = mura_tree(tmp_path), tmp_path / "out"
    for path in root.rglob("*.csv"):
        path.unlink()
    assert convert_tree(Mura(), root, out) == 0
    assert len(_datalist(out)["training"]) == 12
    assert "train_labeled_studies.csv is not in the input" in (out / "report.json").read_text()


def test_table_with_wrong_columns_and_wrong_folder_are_refused(tmp_path):
    root = mura_tree(tmp_path)
    (root / LABELS).write_text("a\nb\n")
    with pytest.raises(DatasetError, match="lacks the columns"):
        convert_tree(Mura(), root, tmp_path / "out")
    write_bytes(tmp_path / "other" / "a.png")
    with pytest.raises(UsageError, match="no image of MURA"):
        convert_tree(Mura(), tmp_path / "other", tmp_path / "out")
