from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from data_prep.errors import UsageError
from data_prep.sources.decathlon import Decathlon
from tests.data_prep.factories import convert_tree, decathlon_tree, report_lines, tree_bytes, write_label_map


@pytest.mark.parametrize("options", [{"engine": "process", "workers": 1}, {"engine": "process", "workers": 3}], ids=str)
def test_run_result_does_not_depend_on_workers(tmp_path, options):
    root = decathlon_tree(tmp_path)
    convert_tree(Decathlon(), root, tmp_path / "a" / "toy")
    convert_tree(Decathlon(), root, tmp_path / "b" / "toy", **options)
    assert tree_bytes(tmp_path / "a" / "toy") == tree_bytes(tmp_path / "b" / "toy")


def test_run_again_writes_nothing(tmp_path):
    root, out = decathlon_tree(tmp_path), tmp_path / "toy"
    convert_tree(Decathlon(), root, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    convert_tree(Decathlon(), root, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_run_makes_changed_and_damaged_cases_again(tmp_path):
    root, out = decathlon_tree(tmp_path), tmp_path / "toy"
    convert_tree(Decathlon(), root, out)
    write_label_map(root / "labelsTr/toy_001.nii.gz", values=(2, 1))
    (out / "labelsTr/toy_002.nii.gz").unlink()
    convert_tree(Decathlon(), root, out)
    convert_tree(Decathlon(), root, tmp_path / "fresh" / "toy")
    assert tree_bytes(out) == tree_bytes(tmp_path / "fresh" / "toy")


def test_run_resume_sha256_finds_changed_content_of_equal_size(tmp_path):
    root, out = decathlon_tree(tmp_path), tmp_path / "toy"
    convert_tree(Decathlon(), root, out)
    path = out / "labelsTr/toy_000.nii.gz"
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    convert_tree(Decathlon(), root, out, resume="sizes")
    assert path.read_bytes() != good
    convert_tree(Decathlon(), root, out, resume="sha256")
    assert path.read_bytes() == good


def test_run_removes_files_of_cases_that_left_the_input(tmp_path):
    root, out = decathlon_tree(tmp_path), tmp_path / "toy"
    convert_tree(Decathlon(), root, out)
    description = json.loads((root / "dataset.json").read_text())
    del description["training"][0]
    (root / "dataset.json").write_text(json.dumps(description))
    convert_tree(Decathlon(), root, out)
    assert not (out / "imagesTr/toy_000_0000.nii.gz").exists()
    assert report_lines(out)["file", "imagesTr/toy_000.nii.gz", ""] == ("skipped", "not-listed")


def test_run_shards_and_merge_equal_one_run(tmp_path):
    from data_prep.cli import main

    root = decathlon_tree(tmp_path)
    convert_tree(Decathlon(), root, tmp_path / "a" / "toy")
    for i in (3, 1):
        convert_tree(Decathlon(), root, tmp_path / "b" / "toy", shard=f"{i}/3")
    assert main(["merge", str(tmp_path / "b" / "toy")]) == 2
    convert_tree(Decathlon(), root, tmp_path / "b" / "toy", shard="2/3")
    assert main(["merge", str(tmp_path / "b" / "toy")]) == 0
    assert tree_bytes(tmp_path / "a" / "toy") == tree_bytes(tmp_path / "b" / "toy")


@pytest.mark.parametrize("link", ["hardlink", "symlink", "dataset-json"])
def test_run_links_hold_the_same_images(tmp_path, link):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    root, out = decathlon_tree(tmp_path), tmp_path / "Dataset004_Toy"
    convert_tree(Decathlon(), root, out, link=link)
    verify_dataset_integrity(str(out), num_processes=1)
    path = out / "imagesTr/toy_000_0000.nii.gz"
    if link == "dataset-json":
        assert not path.exists()
    else:
        assert os.path.samefile(path, root / "imagesTr/toy_000.nii.gz")
        assert path.is_symlink() == (link == "symlink")


def test_run_input_inside_output_is_refused(tmp_path):
    root = decathlon_tree(tmp_path)
    with pytest.raises(UsageError, match="contain each other"):
        convert_tree(Decathlon(), root, root / "out")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{root}", "--out", "{out}"], 0, ""),
        (["{root}/nowhere", "--out", "{out}"], 2, "does not exist"),
        (["{root}", "--out", "{out}", "--folds", "99"], 2, "--folds 99 with 6 patients"),
        (["{root}", "--out", "{out}", "--shard", "4/3"], 2, "--shard 4/3"),
        (["{root}", "--out", "{out}", "--format", "zip"], 2, "--format zip"),
        (["{root}"], 2, "--out"),
    ],
    ids=["fine", "no input", "too many folds", "bad shard", "bad format", "no output"],
)
def test_command_exit_codes(tmp_path, arguments, code, message):
    root = decathlon_tree(tmp_path)
    arguments = [a.format(root=root, out=tmp_path / "toy") for a in arguments]
    command = [sys.executable, "-m", "data_prep", "decathlon", *arguments, "--engine", "serial"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_command_dry_run_writes_nothing(tmp_path, capsys):
    from data_prep.cli import main

    root = decathlon_tree(tmp_path)
    assert main(["decathlon", str(root), "--out", str(tmp_path / "toy"), "--dry-run"]) == 0
    assert "toy_000" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Task04_Toy"]


def test_data_prep_never_imports_torch():
    code = (
        "import sys, data_prep.cli, data_prep.engine.run, data_prep.operations.volumes, data_prep.operations.pictures"
    )
    code += "; sys.exit(any(name in sys.modules for name in ('torch', 'monai', 'nnunetv2')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
