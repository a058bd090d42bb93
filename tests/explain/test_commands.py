"""`monai-mamba explain`, `robustness` and `evaluate` one after the other, as a user does."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from monai_mamba.cli.main import main
from monai_mamba.explain.run import explain
from monai_mamba.robustness.run import measure_robustness
from monai_mamba.training.samples import sample_dataset
from monai_mamba.training.trained import load_trained
from tests.blobs import CLASSES, write_blobs
from tests.html_reader import check_self_contained
from tests.trained_bundles import make_trained


@pytest.fixture(scope="module")
def explained(blobs):
    arguments = ["explain", str(blobs / "data"), "-m", str(blobs / "medmamba"), "-o", str(blobs / "explained")]
    assert main([*arguments, "--pictures", "3", "--checks", "4"]) == 0
    return blobs / "explained"


@pytest.fixture(scope="module")
def measured(blobs):
    arguments = ["robustness", str(blobs / "data"), "-m", str(blobs / "medmamba"), "-o", str(blobs / "measured")]
    assert main([*arguments, "--draws", "20"]) == 0
    return blobs / "measured"


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_explanation_is_complete(explained):
    summary = json.loads((explained / "explain.json").read_text())
    assert (summary["cases"], summary["layer"], summary["map_size"]) == (12, "stage2", [4, 4])
    assert [check["name"] for check in summary["sanity"]] == ["Maps depend on the weights", "Maps show what matters"]
    assert {"model.pt", "model.json", "inference.json"} == set(summary["model"])
    pictures = rows_of(explained / "pictures.csv")
    assert len(pictures) == len(list((explained / "pictures").iterdir())) == 3
    for row in pictures:
        with Image.open(explained / row["file"]) as picture:
            assert min(picture.size) > 200
    assert {"case", "predicted", "label", "pca_x", "pca_y", "tsne_x", "tsne_y"} == set(
        rows_of(explained / "embeddings.csv")[0]
    )
    assert not list(explained.parent.glob(".writing-*"))


def test_robustness_has_all_metrics_at_five_severities(measured):
    rows = rows_of(measured / "robustness.csv")
    assert len(rows) == 6 + 7 * 5 * 6  # color temperature is left out: the pictures are gray
    summary = json.loads((measured / "robustness.json").read_text())
    assert summary["skipped"] == {"color_temperature": "all images are gray"}
    assert {row["metric"] for row in rows} == {"accuracy", "precision", "sensitivity", "specificity", "f1", "auc"}
    by_key = {(row["perturbation"], int(row["severity"]), row["metric"]): row for row in rows}
    clean, worst = by_key["unchanged", 0, "accuracy"], by_key["brightness", 5, "accuracy"]
    assert float(clean["value"]) == 1
    assert float(worst["value"]) < 0.9
    assert float(worst["change_value"]) == pytest.approx(float(worst["value"]) - 1, abs=1e-6)
    assert (measured / "curves.png").stat().st_size > 10_000


def test_report_shows_all_of_it_and_needs_nothing_from_outside(blobs, explained, measured, tmp_path, capsys):
    trained = load_trained(blobs / "medmamba", device="cpu")
    cases = trained.list_cases(blobs / "data")
    probs = trained.probabilities([trained.preprocessing(case)["image"] for case in cases]).tolist()
    lines = ["case,patient,label,prob_empty,prob_blob"]
    lines += [f"{c['case']},{c['patient']},{c['label']},{p[0]},{p[1]}" for c, p in zip(cases, probs, strict=True)]
    (tmp_path / "test.csv").write_text("\n".join(lines) + "\n")
    arguments = ["evaluate", str(tmp_path / "test.csv"), "-o", str(tmp_path / "out"), "--draws", "20"]
    arguments += ["--explanations", str(explained), "--robustness", str(measured)]
    assert main([*arguments, "--validation", str(tmp_path / "test.csv")]) == 0
    assert "report:" in capsys.readouterr().out
    reader = check_self_contained((tmp_path / "out" / "report.html").read_text())
    # ROC, PR, confusion, reliability, three pictures, checks, embeddings, robustness.
    assert len(reader.sources) == 10
    for text in ("AUC", "Calibration", "Worst cases", "Where the network looked", "brightness", "torch ", "SHA-256"):
        assert text in reader.text, text
    assert str(tmp_path) not in reader.text
    (tmp_path / "test.csv").write_text("\n".join(line.replace("c", "d", 1) for line in lines).replace("dase", "case"))
    assert main(arguments) == 1
    assert "explains none of the cases" in capsys.readouterr().err


def test_two_views_and_volumes_are_explained_and_measured(tmp_path):
    write_blobs(tmp_path / "two", 4, seed=5, color=True, views=2)
    two = make_trained("xfmamba", tmp_path, classes=CLASSES, image_size=32)
    settings = {"device": "cpu", "limit": 4}
    summary = explain(two, tmp_path / "two", tmp_path / "a", num_pictures=1, num_checks=1, **settings)
    assert summary["map_size"] == [4, 4]
    (picture,) = (tmp_path / "a" / "pictures").iterdir()
    with Image.open(picture) as image:
        assert image.height > image.width * 0.9  # both views side by side, without and with the map
    colored = measure_robustness(
        two, tmp_path / "two", tmp_path / "b", names=["color_temperature"], num_draws=5, **settings
    )
    assert colored["colored_cases"] == 4
    assert not colored["skipped"]
    volumes = make_trained("nnmamba_adni", tmp_path, image_size=[16, 24, 16])
    data = sample_dataset("hippocampus_size", tmp_path)
    explain(volumes, data, tmp_path / "c", method="gradcam++", num_pictures=1, num_checks=0, **settings)
    names = ["rotation", "noise"]
    first, second = (
        measure_robustness(volumes, data, tmp_path / name, names=names, num_draws=5, **settings) for name in "de"
    )
    assert first["perturbations"] == second["perturbations"]
    assert set(first["perturbations"]) == set(names)


def fails(arguments, code, text, capsys):
    assert main([str(a) for a in arguments]) == code
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert text in error, error


def test_bad_input_gives_one_error_and_leaves_nothing(blobs, tmp_path, capsys):
    model, data, out = blobs / "medmamba", blobs / "data", tmp_path / "out"
    for command in ("explain", "robustness"):
        fails([command, data, "-m", tmp_path, "-o", out], 1, "is no bundle", capsys)
        fails(
            [command, tmp_path / "none", "-m", model, "-o", out],
            1,
            "holds neither a datalist.json nor a picture",
            capsys,
        )
        write_blobs(tmp_path / command, 6, seed=1)
        (tmp_path / command / "images" / "03_0.png").write_bytes(b"no picture")
        fails([command, tmp_path / command, "-m", model, "-o", out], 1, "03_0.png: cannot be read as a picture", capsys)
        manifest = json.loads((data / "datalist.json").read_text()) | {"classes": ["yes", "no"]}
        shutil.copytree(data, tmp_path / f"{command}-classes")
        (tmp_path / f"{command}-classes" / "datalist.json").write_text(json.dumps(manifest))
        fails([command, tmp_path / f"{command}-classes", "-m", model, "-o", out], 1, "has the classes yes, no", capsys)
    fails(
        ["explain", data, "-m", model, "-o", out, "--target", "cat"], 2, "`target` must be one of empty, blob", capsys
    )
    picture = next((data / "images").iterdir())
    fails(["explain", picture, "-m", model, "-o", out], 1, "is a file; `dataset_dir` must be a folder", capsys)
    fails(["explain", data, "-m", model, "-o", out, "--layer", "decoder"], 2, "one of stage1, stage2, got", capsys)
    fails(["explain", data, "-m", model, "-o", out, "--case", "x"], 2, "names the case x", capsys)
    fails(["explain", data, "-m", model, "-o", out, "--region", "all"], 2, "belongs to label maps and", capsys)
    fails(["robustness", data, "-m", model, "-o", out, "-p", "fog"], 2, "`names` must be out of rotation", capsys)
    fails(["robustness", data / "images", "-m", model, "-o", out], 1, "has no `label`", capsys)
    fails(["robustness", data, "-m", model, "-o", out, "-p", "color_temperature"], 1, "all images are gray", capsys)
    assert not out.exists()
    assert not list(tmp_path.glob(".writing-*"))
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    fails(["explain", data, "-m", model, "-o", out], 2, "is not empty", capsys)
    assert [f.name for f in out.iterdir()] == ["mine.txt"]


def test_model_for_two_views_needs_two_views(blobs, tmp_path, capsys):
    two = make_trained("xfmamba", tmp_path)
    shutil.copy(blobs / "medmamba" / "models" / "model.json", two / "models" / "model.json")
    fails(["explain", blobs / "data", "-m", two, "-o", tmp_path / "out"], 1, "has no `image1` nor `image2`", capsys)


def test_folder_without_labels_is_explained(blobs, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.full((20, 48), 60 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    summary = explain(
        blobs / "medmamba", tmp_path / "images", tmp_path / "out", num_checks=0, target="blob", device="cpu"
    )
    assert [entry["label"] for entry in summary["pictures"]] == ["", "", ""]
    assert {entry["target"] for entry in summary["pictures"]} == {"blob"}
