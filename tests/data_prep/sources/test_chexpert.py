"""CheXpert: layouts, uncertain findings, views, parts by patient and the published parts by study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from data_prep.check import check_data_set
from data_prep.errors import DatasetError, UsageError
from data_prep.sources.chexpert import FINDINGS, Chexpert
from data_prep.splits import torch_permutation
from monai_mamba.training.datalist import load_cases
from tests.data_prep.factories import convert_tree, report_lines, write_bytes, write_csv, write_picture

#: as in the published tables
COLUMNS = [
    "Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly",
    "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax",
    "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
]  # fmt: skip
#: patient, study, views, findings
TRAIN = [
    (1, 1, ("frontal", "lateral"), {"Support Devices": 1}),
    (2, 1, ("frontal", "frontal", "lateral"), {"Edema": -1, "Cardiomegaly": -1, "Fracture": 0, "Pleural Effusion": 1}),
    (2, 2, ("frontal",), {"No Finding": 1}),
    (3, 1, ("lateral", "frontal"), {"Pneumonia": -1, "Atelectasis": -1}),
    (4, 1, ("frontal", "lateral"), {"Lung Opacity": 1}),
]
VALID = [(64541, 1, ("frontal", "lateral"), {name: 0 for name in FINDINGS} | {"Edema": 1})]


def write_part(base: Path, name: str, part: str, studies, folder: Path) -> None:
    """One table and its images below `folder`; `name` is the head of the paths in the table."""
    rows = []
    for patient, study, views, findings in studies:
        for number, view in enumerate(views, 1):
            place = f"patient{patient:05d}/study{study}/view{number}_{view}.jpg"
            write_picture(folder / place, (22, 18), seed=100 * patient + 10 * study + number)
            cells = {"Path": f"{name}/{part}/{place}", "Sex": "Female", "Age": 60 + patient % 30}
            cells |= {"Frontal/Lateral": view.capitalize(), "AP/PA": "AP" if view == "frontal" else ""}
            cells |= {key: f"{value:.1f}" for key, value in findings.items()}
            rows.append([cells.get(column, "") for column in COLUMNS])
    write_csv(base / f"{part}.csv", [COLUMNS, *rows])


def chexpert_tree(root: Path, layout: str = "small", train=TRAIN, valid=VALID) -> Path:
    """The download as ``full`` or ``small`` folder, or in the ``batches`` of the redistribution."""
    root = root / "in"
    if layout == "batches":
        base = root / "CheXpert-v1.0 batch 1 (validate & csv)"
        half = len(train) // 2
        write_part(base, "CheXpert-v1.0", "train", train[:half], root / "CheXpert-v1.0 batch 2 (train 1)")
        rows = (base / "train.csv").read_text()
        write_part(base, "CheXpert-v1.0", "train", train[half:], root / "CheXpert-v1.0 batch 3 (train 2)")
        (base / "train.csv").write_text(rows + "".join((base / "train.csv").read_text().splitlines(True)[1:]))
        name = "CheXpert-v1.0"
    else:
        name = "CheXpert-v1.0" + ("-small" if layout == "small" else "")
        base = root / name
        write_part(base, name, "train", train, base / "train")
    write_part(base, name, "valid", valid, base / "valid")
    write_bytes(base / ".DS_Store")
    return root


def _datalist(out: Path) -> dict:
    return json.loads((out / "datalist.json").read_text())


@pytest.mark.parametrize("layout", ["small", "full", "batches"])
def test_every_layout_gives_the_same_pairs(tmp_path, layout):
    root, out = chexpert_tree(tmp_path, layout), tmp_path / "out"
    assert convert_tree(Chexpert(), root, out) == 0
    found = _datalist(out)
    assert [entry["case"] for entry in found["training"]] == [
        "patient00001-study1", "patient00002-study1", "patient00003-study1", "patient00004-study1",
    ]  # fmt: skip
    assert [entry["patient"] for entry in found["validation"]] == ["patient64541"]
    assert found["classes"] == list(FINDINGS)
    entry = found["training"][0]
    assert (entry["image1"], entry["image2"]) == (
        "images/patient00001-study1_frontal.png",
        "images/patient00001-study1_lateral.png",
    )
    assert entry["label"] == [int(name == "Support Devices") for name in FINDINGS]
    lines = report_lines(out)
    assert sum(kind == "row" for kind, _, _ in lines) == 12
    skipped = {verdict[1] for (kind, _, _), verdict in lines.items() if kind == "row" and verdict[0] == "skipped"}
    assert skipped == {"missing-view", "further-view"}
    assert sum(kind == "file" for kind, _, _ in lines) == sum(path.is_file() for path in root.rglob("*"))
    assert check_data_set(out).problems == []
    assert load_cases(out, "validation")[0]["label"].sum() == 1
    row = (out / "cases.csv").read_text().splitlines()
    assert row[0].split(",")[5:] == ["age", "projection", "sex", "view"] and ",61,AP,Female,pair" in row[1]


EDEMA, CARDIOMEGALY, EFFUSION = (FINDINGS.index(name) for name in ("Edema", "Cardiomegaly", "Pleural Effusion"))


@pytest.mark.parametrize(
    ("policy", "edema", "cardiomegaly"),
    [("zeros", 0, 0), ("ones", 1, 1), ("mixed", 1, 0), ("multiclass", 2, 2), ("ignore", 0, 0)],
)
def test_uncertain_findings(tmp_path, policy, edema, cardiomegaly):
    out = tmp_path / "out"
    convert_tree(Chexpert(uncertain=policy), chexpert_tree(tmp_path), out)
    entry = _datalist(out)["training"][1]
    assert (entry["label"][EDEMA], entry["label"][CARDIOMEGALY], entry["label"][EFFUSION]) == (edema, cardiomegaly, 1)
    if policy == "ignore":
        unknown = [name for name, known in zip(FINDINGS, entry["label_mask"], strict=True) if not known]
        assert unknown == ["Cardiomegaly", "Edema"]
    else:
        assert "label_mask" not in entry


@pytest.mark.parametrize(("policy", "low", "high"), [("lsr", 0.55, 0.85), ("lsr-zeros", 0.0, 0.3)])
def test_smoothed_labels_lie_in_their_range_and_do_not_change(tmp_path, policy, low, high):
    root = chexpert_tree(tmp_path)
    found = []
    for name in ("a", "b"):
        convert_tree(Chexpert(uncertain=policy), root, tmp_path / name)
        label = _datalist(tmp_path / name)["training"][1]["label"]
        found.append((label[EDEMA], label[CARDIOMEGALY]))
        assert all(low <= value <= high for value in found[-1]) and found[-1][0] != found[-1][1]
    assert found[0] == found[1]


def test_blank_findings_can_be_left_out(tmp_path):
    out = tmp_path / "out"
    convert_tree(Chexpert(blank="ignore"), chexpert_tree(tmp_path), out)
    mask = _datalist(out)["training"][1]["label_mask"]
    known = {"Edema", "Cardiomegaly", "Fracture", "Pleural Effusion"}
    assert {name for name, flag in zip(FINDINGS, mask, strict=True) if flag} == known


@pytest.mark.parametrize(("number", "count"), [("13", 13), ("5", 5)])
def test_fewer_findings(tmp_path, number, count):
    out = tmp_path / "out"
    convert_tree(Chexpert(findings=number), chexpert_tree(tmp_path), out)
    found = _datalist(out)
    assert len(found["classes"]) == len(found["training"][0]["label"]) == count
    assert "No Finding" not in found["classes"]


@pytest.mark.parametrize(("views", "count"), [("frontal", 6), ("lateral", 4), ("single", 10)])
def test_single_views(tmp_path, views, count):
    out = tmp_path / "out"
    assert convert_tree(Chexpert(views=views, max_side=11), chexpert_tree(tmp_path), out) == 0
    entries = _datalist(out)["training"]
    assert len(entries) == count and all("image" in entry for entry in entries)
    assert {max(Image.open(path).size) for path in (out / "images").iterdir()} == {11}
    if views != "single":
        assert ("skipped", "other-view") in report_lines(out).values()


def test_jpeg_files_can_be_linked_as_they_are(tmp_path):
    root, out = chexpert_tree(tmp_path), tmp_path / "out"
    assert convert_tree(Chexpert(keep_jpeg=True), root, out, link="hardlink") == 0
    made = out / "images/patient00001-study1_frontal.jpg"
    assert made.samefile(root / "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg")
    assert check_data_set(out).problems == []
    with pytest.raises(UsageError, match="--keep-jpeg and --max-side"):
        convert_tree(Chexpert(keep_jpeg=True, max_side=9), root, tmp_path / "b")


def _many(number: int) -> list:
    return [
        (patient, study, ("frontal", "lateral"), {FINDINGS[patient % 5]: 1})
        for patient in range(1, number + 1)
        for study in range(1, 2 + patient % 2)
    ]


def test_parts_by_patient(tmp_path):
    out = tmp_path / "out"
    assert convert_tree(Chexpert(split="patient"), chexpert_tree(tmp_path, train=_many(24)), out) == 0
    found = _datalist(out)
    convert_tree(Chexpert(split="patient"), tmp_path / "in", tmp_path / "other", seed=1)
    assert _datalist(tmp_path / "other")["test"] != found["test"]
    sizes = {part: len({entry["patient"] for entry in found[part]}) for part in ("training", "validation", "test")}
    assert sizes == {"training": 18, "validation": 3, "test": 3}
    assert check_data_set(out).problems == []
    assert ("skipped", "other-part") in report_lines(out).values()


def test_published_parts_are_those_of_random_split(tmp_path):
    torch = pytest.importorskip("torch")
    from torch.utils.data import random_split

    studies, out = _many(21), tmp_path / "out"
    assert convert_tree(Chexpert(split="published"), chexpert_tree(tmp_path, train=studies[::-1]), out) == 0
    names = sorted(f"patient{patient:05d}-study{study}" for patient, study, _, _ in studies)
    num_train, num_val = int(0.75 * len(names)), int(0.125 * len(names))
    sizes = [num_train, num_val, len(names) - num_train - num_val]
    parts = random_split(names, sizes, generator=torch.Generator().manual_seed(42))
    found = _datalist(out)
    for part, expected in zip(("training", "validation", "test"), parts, strict=True):
        assert {entry["case"] for entry in found[part]} == set(expected)
    assert "patients are in several parts" in (out / "report.json").read_text()
    assert any(problem.startswith("leakage") for problem in check_data_set(out).problems)
    with pytest.raises(UsageError, match="--views frontal does not go with it"):
        convert_tree(Chexpert(split="published", views="frontal"), tmp_path / "in", tmp_path / "b")


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_permutation_equals_that_of_torch(count):
    torch = pytest.importorskip("torch")
    expected = torch.randperm(count, generator=torch.Generator().manual_seed(42)).tolist()
    assert torch_permutation(count, 42) == expected


BASE = "CheXpert-v1.0-small"
FIRST = f"{BASE}/train/patient00001/study1/view1_frontal.jpg"
STRAY, COPY = f"{BASE}/train/patient00009/study1/view1_frontal.jpg", "copy/patient00001/study1/view1_frontal.jpg"
FIRST_ROW = ("row", f"{BASE}/train.csv", "1")


def _edit(root: Path, old: str, new: str) -> None:
    path = root / BASE / "train.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "ref", "verdict"),
    [
        (lambda f: (f / FIRST).unlink(), FIRST_ROW, ("failed", "missing-image")),
        (lambda f: (f / FIRST).write_bytes(b"\xff\xd8\xff"), FIRST_ROW, ("failed", "damaged-picture")),
        (lambda f: _edit(f, "view1_frontal.jpg,", "view1_frontal.jpg,extra,"), FIRST_ROW, ("failed", "damaged-row")),
        (lambda f: _edit(f, ",1.0\n", ",0.5\n"), FIRST_ROW, ("failed", "unknown-label")),
        (lambda f: _edit(f, ",1.0\n", ",0.0\n"), FIRST_ROW, ("failed", "contradicting-labels")),
        (lambda f: _edit(f, "61,Frontal", "61,Lateral"), FIRST_ROW, ("failed", "contradicting-view")),
        (lambda f: _edit(f, FIRST, "../../etc/passwd"), FIRST_ROW, ("failed", "bad-path")),
        (lambda f: write_picture(f / STRAY), ("file", STRAY, ""), ("skipped", "not-listed")),
        (lambda f: write_picture(f / COPY), ("file", COPY, ""), ("skipped", "not-listed")),
    ],
    ids=["gone", "damaged", "shifted", "value", "labels differ", "view", "path outside", "not listed", "second copy"],
)
def test_damage_has_its_verdict_and_costs_no_other_study(tmp_path, damage, ref, verdict):
    root, out = chexpert_tree(tmp_path), tmp_path / "out"
    for path in root.rglob("*.csv"):
        path.write_text(path.read_text())  # line ends of this system
    damage(root)
    assert convert_tree(Chexpert(), root, out) == (3 if verdict[0] == "failed" else 0)
    lines = report_lines(out)
    assert lines[ref] == verdict
    assert lines["case", "patient00004-study1", ""] == ("ok", "")


def test_unusable_inputs_are_one_error(tmp_path):
    root = chexpert_tree(tmp_path)
    chexpert_tree(tmp_path, "full")
    with pytest.raises(UsageError, match=r"several tables of the part train \(train.csv, train.csv\)"):
        convert_tree(Chexpert(), root, tmp_path / "out")
    (root / "CheXpert-v1.0/train.csv").unlink()
    (root / "CheXpert-v1.0/valid.csv").unlink()
    _edit(root, "Pneumothorax", "Pneumo")
    with pytest.raises(DatasetError, match=r"lacks the columns \['Pneumothorax'\]"):
        convert_tree(Chexpert(), root, tmp_path / "out")
    with pytest.raises(UsageError, match=r"needs train\.csv"):
        convert_tree(Chexpert(), root / BASE / "valid", tmp_path / "out")
