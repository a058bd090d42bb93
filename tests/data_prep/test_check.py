from __future__ import annotations

import gzip
import json

import nibabel as nib
import numpy as np
import pytest

from data_prep.check import check_data_set
from data_prep.cli import main
from data_prep.engine.files import sha256
from data_prep.errors import UsageError
from data_prep.sources.decathlon import Decathlon
from tests.data_prep.factories import convert_tree, decathlon_tree, write_label_map, write_nifti_volume


@pytest.fixture
def data_set(tmp_path):
    convert_tree(Decathlon(), decathlon_tree(tmp_path), tmp_path / "toy")
    return tmp_path / "toy"


@pytest.mark.parametrize("layout", ["nnunet", "monai"])
@pytest.mark.parametrize("link", ["copy", "symlink"])
def test_check_finds_nothing_in_a_fresh_data_set(tmp_path, layout, link):
    convert_tree(Decathlon(), decathlon_tree(tmp_path), tmp_path / "toy", format=layout, link=link)
    findings = check_data_set(tmp_path / "toy")
    assert findings.problems == []
    assert (findings.num_cases, findings.num_files) == (7, 13)


def _resave(path, affine=None, data=None):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(image.get_fdata().astype(np.int16) if data is None else data, affine), path)


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _swap_fold(out):
    def change(splits):
        case = splits[0]["val"][0]
        splits[0]["train"].append(case)

    _edit(out / "splits_final.json", change)


def _twin(out):
    first, second = (json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()[:2])
    lines = (out / "manifest.jsonl").read_text().splitlines()
    second["files"][0] = first["files"][0]
    (out / "manifest.jsonl").write_text("\n".join([lines[0], json.dumps(second), *lines[2:]]) + "\n")


def _same_patient(out):
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    lines[0]["patient"] = lines[1]["patient"]
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _packed_again(out):
    """The image of one case under the name of another, in other bytes, with a manifest that agrees."""
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    first = lines[0]
    other = next(line for line in lines if line["part"] == "train" and line["fold"] != first["fold"])
    target = out / other["files"][0]["path"]
    raw = gzip.decompress((out / first["files"][0]["path"]).read_bytes())
    target.write_bytes(gzip.compress(raw[:148] + b"edited" + raw[154:], 9))
    other["files"][0] |= {"bytes": target.stat().st_size, "sha256": sha256(target)}
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _patient_across(out):
    """A case whose patient is held out, moved to the training side with the rest of the documents intact."""

    def change(splits):
        splits[0]["val"] = splits[0]["val"][1:]

    _edit(out / "splits_final.json", change)


DAMAGES = {
    "file gone": (lambda out: (out / "imagesTr/toy_000_0000.nii.gz").unlink(), "missing-file"),
    "file changed": (lambda out: write_nifti_volume(out / "imagesTr/toy_000_0000.nii.gz", seed=9), "checksum"),
    "affine changed": (lambda out: _resave(out / "imagesTr/toy_000_0000.nii.gz", np.diag([1, 1, 2, 1.0])), "geometry"),
    "label value": (lambda out: write_label_map(out / "labelsTr/toy_000.nii.gz", values=(1, 7)), "label-values"),
    "truncated": (lambda out: (out / "imagesTr/toy_000_0000.nii.gz").write_bytes(b"\x1f\x8b"), "damaged-data"),
    "stray file": (lambda out: (out / "imagesTr/new_0000.nii.gz").write_bytes(b""), "unknown-file"),
    "leftover": (lambda out: (out / ".tmp-1-of-1-x").mkdir(), "leftover"),
    "count": (lambda out: _edit(out / "dataset.json", lambda d: d.update(numTraining=3)), "dataset.json"),
    "channels": (lambda out: _edit(out / "dataset.json", lambda d: d.update(channel_names={})), "dataset.json"),
    "labels": (lambda out: _edit(out / "dataset.json", lambda d: d["labels"].pop("back")), "label-values"),
    "case in both": (_swap_fold, "leakage"),
    "identical images": (_twin, "leakage"),
    "one patient in two folds": (_same_patient, "leakage"),
    "identical pixels in other bytes": (_packed_again, "leakage"),
    "case of no side": (_patient_across, "splits_final.json"),
    "ending": (lambda out: _edit(out / "dataset.json", lambda d: d.update(file_ending=".mha")), "dataset.json"),
    "splits of another form": (
        lambda out: (out / "splits_final.json").write_text('[{"train": 3}]'),
        "damaged-document",
    ),
    "description of another form": (lambda out: (out / "dataset.json").write_text("[1]"), "damaged-document"),
    "table of another fold": (
        lambda out: (out / "cases.csv").write_text((out / "cases.csv").read_text().replace(",train,0,", ",train,1,")),
        "cases.csv",
    ),
    "broken JSON": (lambda out: (out / "dataset.json").write_text("{"), "damaged-document"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_check_finds_damage(data_set, name):
    damage, reason = DAMAGES[name]
    damage(data_set)
    assert any(problem.startswith(f"{reason}:") for problem in check_data_set(data_set).problems)
    assert main(["check", str(data_set)]) == 3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fold", lambda d: d["training"][0].update(fold=(d["training"][0]["fold"] + 1) % 5)),
        ("part", lambda d: d["training"].append(d["testing" if "testing" in d else "test"].pop())),
        ("files of two cases", lambda d: d["training"][0].update(image=d["training"][1]["image"])),
        ("entry gone", lambda d: d["training"].pop()),
    ],
)
def test_check_finds_an_edited_datalist(tmp_path, name, change):
    out = tmp_path / "toy"
    convert_tree(Decathlon(), decathlon_tree(tmp_path), out, format="monai")
    _edit(out / "datalist.json", change)
    assert any(problem.startswith("datalist.json:") for problem in check_data_set(out).problems)


def test_check_finds_an_edited_list_of_links(tmp_path):
    out = tmp_path / "toy"
    convert_tree(Decathlon(), decathlon_tree(tmp_path), out, link="dataset-json")
    assert check_data_set(out).problems == []

    def change(content):
        first, second = list(content["dataset"].values())[:2]
        first["label"], second["label"] = second["label"], first["label"]

    _edit(out / "dataset.json", change)
    assert any(problem.startswith("dataset.json:") for problem in check_data_set(out).problems)


def test_check_command_of_a_fresh_data_set_ends_with_0(data_set, capsys):
    assert main(["check", str(data_set)]) == 0
    assert capsys.readouterr().out == "7 cases, 13 files, 0 problems\n"


def test_check_refuses_other_folders(tmp_path):
    with pytest.raises(UsageError, match=r"manifest\.jsonl"):
        check_data_set(tmp_path)
