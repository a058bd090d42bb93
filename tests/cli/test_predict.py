"""``monai-mamba predict`` on pictures, NIfTI, DICOM, tables and data lists."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from monai_mamba.cli.main import main
from tests.data_prep.dicom_factories import make_slice, write_series
from tests.trained_bundles import make_trained


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def picture(path, value=0, size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 255, size).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_pictures_are_predicted_and_a_broken_one_is_named(tmp_path, capsys):
    bundle = make_trained("medmamba", tmp_path, classes=["a", "b"], image_size=32)
    picture(tmp_path / "in" / "ward" / "one.png", 1)
    picture(tmp_path / "in" / "two.png", 2)
    (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG")
    out = tmp_path / "out"
    assert main(["predict", str(tmp_path / "in"), "-m", str(bundle), "-o", str(out), "-f", "csv", "-f", "json"]) == 1
    output = capsys.readouterr()
    assert "refused: bad.png" in output.err and "2 of 3 cases" in output.out
    table = rows(out / "predictions.csv")
    assert [row["case"] for row in table] == ["two.png", "ward/one.png"]
    for row in table:
        probs = {name: float(row[f"prob_{name}"]) for name in "ab"}
        assert sum(probs.values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == max(probs, key=probs.get)
    content = json.loads((out / "predictions.json").read_text())
    assert [case["case"] for case in content["cases"]] == ["two.png", "ward/one.png"]
    assert content["cases"][0]["probabilities"]["a"] == pytest.approx(float(table[0]["prob_a"]), abs=1e-5)
    assert len(content["model"]["model.pt"]) == 64 and list(content["refused"]) == ["bad.png"]


def test_weights_of_their_own_and_flips_change_what_they_should(tmp_path):
    bundle = make_trained("medmamba", tmp_path, classes=["a", "b"], image_size=32)
    image = picture(tmp_path / "one.png", 1)
    (tmp_path / "run").mkdir()
    weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
    save_file(weights, tmp_path / "run" / "best.safetensors")
    (tmp_path / "run" / "model.json").write_text(json.dumps({"classes": ["a", "b"], "image_size": 32}))

    def predicted(name, *arguments):
        assert main(["predict", str(image), "-o", str(tmp_path / name), *arguments]) == 0
        return float(rows(tmp_path / name / "predictions.csv")[0]["prob_a"])

    plain = predicted("plain", "-m", str(bundle))
    moved = predicted("moved", "-m", str(tmp_path / "run" / "best.safetensors"), "--bundle", str(bundle))
    assert moved == plain
    mirrored = tmp_path / "mirrored.png"
    Image.fromarray(np.asarray(Image.open(image))[:, ::-1].copy()).save(mirrored)
    both = predicted("both", "-m", str(bundle), "--flip", "1")
    image = mirrored
    other = predicted("other", "-m", str(bundle))
    assert both != plain and predicted("again", "-m", str(bundle), "--flip", "1") == pytest.approx(both, abs=1e-6)
    logits = [np.log(p / (1 - p)) for p in (plain, other)]
    assert np.log(both / (1 - both)) == pytest.approx(np.mean(logits), abs=1e-4)


def test_two_views_come_from_folders_and_from_a_table(tmp_path, capsys):
    bundle = make_trained("xfmamba", tmp_path, classes=["a", "b"], image_size=32)
    for study in ("s1", "s2"):
        picture(tmp_path / "in" / study / "frontal.png", 1)
        picture(tmp_path / "in" / study / "lateral.png", 2 if study == "s1" else 3)
    assert main(["predict", str(tmp_path / "in"), "-m", str(bundle), "-o", str(tmp_path / "out")]) == 0
    by_folder = {row["case"]: row["prob_a"] for row in rows(tmp_path / "out" / "predictions.csv")}
    assert list(by_folder) == ["s1", "s2"] and by_folder["s1"] != by_folder["s2"]
    table = tmp_path / "in" / "pairs.csv"
    table.write_text("case,patient,image1,image2\nx,p7,s2/frontal.png,s2/lateral.png\n")
    assert main(["predict", str(table), "-m", str(bundle), "-o", str(tmp_path / "out2")]) == 0
    assert rows(tmp_path / "out2" / "predictions.csv")[0] | {"predicted": ""} == {
        "case": "x", "patient": "p7", "predicted": "", "prob_a": by_folder["s2"],
        "prob_b": rows(tmp_path / "out" / "predictions.csv")[1]["prob_b"],
    }  # fmt: skip
    picture(tmp_path / "in" / "s2" / "third.png", 4)
    assert main(["predict", str(tmp_path / "in"), "-m", str(bundle), "-o", str(tmp_path / "out3")]) == 1
    assert "holds 3 images" in capsys.readouterr().err
    assert not (tmp_path / "out3").exists()
    assert main(["predict", str(tmp_path / "in" / "s1" / "frontal.png"), "-m", str(bundle), "-o", str(tmp_path)]) == 1


def test_xray_dicom_is_read_and_nothing_of_its_header_leaves(tmp_path):
    bundle = make_trained("medmamba", tmp_path, classes=["a", "b"], image_size=32)
    (tmp_path / "in").mkdir()
    xray = make_slice(0, shape=(40, 32))
    xray.PatientName, xray.PatientID, xray.StudyDate = "Doe^Jane", "MRN123", "20200102"
    xray.save_as(tmp_path / "in" / "scan", enforce_file_format=True)
    arguments = ["predict", str(tmp_path / "in"), "-m", str(bundle), "-f", "json", "-f", "csv"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    assert rows(tmp_path / "out" / "predictions.csv")[0]["case"] == "scan"
    for file in (tmp_path / "out").iterdir():
        assert not any(word in file.read_text() for word in ("Doe", "MRN123", "20200102", str(xray.SOPInstanceUID)))
    # Pixels alone decide: the same as a picture gives the same probabilities.
    pixels = xray.pixel_array.astype(float)
    scaled = np.rint((pixels - pixels.min()) / (pixels.max() - pixels.min()) * 65535).astype(np.uint16)
    Image.fromarray(scaled).save(tmp_path / "same.png")
    assert main(["predict", str(tmp_path / "same.png"), "-m", str(bundle), "-o", str(tmp_path / "out2")]) == 0
    first, second = (float(rows(tmp_path / n / "predictions.csv")[0]["prob_a"]) for n in ("out", "out2"))
    assert first == pytest.approx(second, abs=1e-4)


def test_landmarks_of_a_dicom_series_are_in_world_coordinates(tmp_path, capsys):
    bundle = make_trained(
        "nnmamba_landmark", tmp_path, landmarks=["left", "right"], image_size=[16, 24, 16], init_filters=16, window=0
    )
    slices = write_series(tmp_path / "in" / "ct", step=2.5)
    write_series(tmp_path / "in" / "single", 1)
    assert main(["predict", str(tmp_path / "in"), "-m", str(bundle), "-o", str(tmp_path / "out")]) == 1
    assert "refused: single" in capsys.readouterr().err
    table = rows(tmp_path / "out" / "landmarks.csv")
    assert [(row["case"], row["landmark"]) for row in table] == [("ct", "left"), ("ct", "right")]
    markups = json.loads((tmp_path / "out" / "ct.mrk.json").read_text())["markups"][0]
    assert markups["coordinateSystem"] == "RAS"
    # Where the headers say the slices lie, in LPS+; x and y change their signs.
    corners = np.array([[float(x) for x in one.ImagePositionPatient] for one in slices])
    far = corners + np.array([0.7 * 9, 0.8 * 11, 0])
    box = np.stack([corners, far]).reshape(-1, 3) * [-1, -1, 1]
    for row, point in zip(table, markups["controlPoints"], strict=True):
        position = np.array([float(row[f"{axis}_mm"]) for axis in "xyz"])
        assert point["label"] == row["landmark"] and point["position"] == pytest.approx(position.tolist(), abs=1e-3)
        assert (position >= box.min(0) - 1.3).all() and (position <= box.max(0) + 1.3).all()
    assert not any("Test^Only" in file.read_text() for file in (tmp_path / "out").iterdir())


def test_label_maps_lie_on_the_grid_of_their_image(tmp_path, capsys):
    bundle = make_trained("nnmamba_seg", tmp_path, structures=["background", "a", "b"], patch_size=[16, 32, 16])
    affine = np.array([[0, -1.5, 0, 10], [0, 0, 2.0, -20], [-1.2, 0, 0, 30], [0, 0, 0, 1]])
    volume = np.random.default_rng(0).normal(size=(20, 18, 25)).astype(np.float32)
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "in" / "Smith.nii.gz")
    (tmp_path / "in" / "cut.nii.gz").write_bytes((tmp_path / "in" / "Smith.nii.gz").read_bytes()[:1000])
    assert main(["predict", str(tmp_path / "in"), "-m", str(bundle), "-o", str(tmp_path / "out")]) == 1
    assert "refused: cut.nii.gz" in capsys.readouterr().err
    found = nib.load(tmp_path / "out" / "Smith.nii.gz")
    assert found.shape == volume.shape
    np.testing.assert_allclose(found.affine, affine, atol=1e-4)
    assert set(np.unique(found.dataobj)) <= {0, 1, 2}
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["Smith.nii.gz"]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["{in}/none.png", "-m", "{bundle}"], 1, "no such file"),
        (["{in}", "-m", "{bundle}"], 1, "holds no pictures"),
        (["{in}", "-m", "{in}"], 1, "no bundle"),
        (["{in}", "-m", "{bundle}", "-f", "xml"], 2, "xml"),
        (["{in}", "-m", "{in}/weights.pt"], 2, "--bundle"),
    ],
    ids=["missing", "empty", "no-bundle", "format", "weights-alone"],
)
def test_bad_usage_is_one_line_and_writes_nothing(tmp_path, capsys, arguments, code, reason):
    bundle = make_trained("medmamba", tmp_path, classes=["a", "b"], image_size=32)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "weights.pt").write_bytes(b"")
    filled = [text.format(**{"in": tmp_path / "in", "bundle": bundle}) for text in arguments]
    assert main(["predict", *filled, "-o", str(tmp_path / "out")]) == code
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
