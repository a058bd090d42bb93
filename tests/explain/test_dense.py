"""Label maps and landmarks are explained: what is meant by a map, what is drawn, what is counted."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import LoadImage
from PIL import Image

from monai_mamba.cli.main import main
from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.report.volumes import Grid
from monai_mamba.explain import pictures
from monai_mamba.explain.cams import ActivationMaps
from monai_mamba.explain.run import explain
from monai_mamba.explain.tasks import LANDMARK_REACH_VOX, LandmarkTask, SegmentationTask, _grid
from monai_mamba.heat_maps import world_to_voxel
from monai_mamba.networks import NNMambaSeg
from monai_mamba.training.label_maps import read_reference
from monai_mamba.training.trained import load_trained
from tests.blobs import SIZE, draw_blobs
from tests.html_reader import check_self_contained
from tests.phantom import MARK, SPACING, STORED, phantom
from tests.phantom import SIZE as VOLUME
from tests.trained_bundles import make_trained

NAMES = ["background", "anterior", "posterior"]
LANDMARKS = ["anterior center", "posterior center", "border center"]
#: Stored with the first two axes against RAS+, and with unequal voxels.
AFFINE = np.array([[-1.0, 0, 0, 30], [0, -1.5, 0, 40], [0, 0, 2.0, 5], [0, 0, 0, 1]])
SHAPE = (20, 30, 18)


def write_data(folder, task):
    """Two volumes with a bright ball each, as label map or as landmark; the second case lacks its last landmark."""
    folder.mkdir()
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    cases = []
    for number, center in enumerate(([6, 20, 8], [12, 11, 10])):
        distance = np.linalg.norm(grid - center, axis=-1)
        image = 100 + 900 * np.exp(-(distance**2) / 18) + np.random.default_rng(number).normal(0, 30, SHAPE)
        nib.save(nib.Nifti1Image(image.astype(np.float32), AFFINE), folder / f"i{number}.nii.gz")
        case = {"case": f"c{number}", "image": f"i{number}.nii.gz"}
        if task == "segmentation":
            nib.save(nib.Nifti1Image((distance < 5).astype(np.uint8), AFFINE), folder / f"l{number}.nii.gz")
            case["label"] = f"l{number}.nii.gz"
        else:
            place = (AFFINE[:3, :3] @ center + AFFINE[:3, 3]).tolist()
            case["landmarks"] = [place, place, None if number else place]
        cases.append(case)
    named = {"labels": {name: i for i, name in enumerate(NAMES)}} if task == "segmentation" else {}
    named |= {"landmark_names": LANDMARKS} if task == "landmarks" else {}
    (folder / "datalist.json").write_text(json.dumps({**named, "test": cases}))
    return folder


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory):
    """A bundle that finds the structure `anterior` somewhere and `posterior` nowhere, and data."""
    folder = tmp_path_factory.mktemp("segmentation")
    torch.manual_seed(1)
    network = NNMambaSeg(out_channels=3, init_filters=16, num_blocks=2, head="conv1x1", deep_supervision=True).eval()
    network.decoder.deep_supervision = False
    with torch.no_grad():
        logit = network(torch.randn(1, 1, 32, 32, 32))[0, 1]
        last = network.decoder.seg_layers[0]
        last.bias += torch.tensor([0, -logit.quantile(0.9).item(), -1e3])
        last.weight[0], last.weight[2], last.bias[0] = 0, 0, 0
    make_trained("nnmamba_seg", folder, network, patch_size=[32, 32, 32], head="conv1x1")
    write_data(folder / "data", "segmentation")
    return folder


@pytest.fixture(scope="module")
def landmarks(tmp_path_factory):
    """A bundle whose second landmark has an empty heat map, and data."""
    folder = tmp_path_factory.mktemp("landmarks")
    torch.manual_seed(1)
    network = NNMambaSeg(out_channels=3, init_filters=16, num_blocks=2)
    with torch.no_grad():  # the published head is never negative: it says 0, that is nothing, for this output
        network.decoder.seg_layers[0].norm2.weight[1] = 0
        network.decoder.seg_layers[0].norm2.bias[1] = -1
    make_trained("nnmamba_landmark", folder, network, image_size=[16, 24, 16])
    write_data(folder / "data", "landmarks")
    return folder


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def predicted(cls, bundle, data, **options):
    trained = load_trained(bundle, device="cpu")
    options = {"target": None, "region": "predicted"} | options
    task = cls(trained, trained.list_cases(data), options["target"], options["region"])
    task.predict(1, lambda *_: None)
    return trained, task


def test_structures_are_explained_and_what_is_found_nowhere_is_counted(segmentation, tmp_path, capsys):
    data, bundle = segmentation / "data", segmentation / "nnmamba_seg"
    arguments = ["explain", str(data), "-m", str(bundle), "-o", str(tmp_path / "out"), "--layer", "stage1"]
    assert main([*arguments, "--checks", "0"]) == 0
    said = capsys.readouterr().out
    assert "2 pictures of 2 cases, gradcam++ of stage1 (8 x 8 x 8)" in said
    assert "posterior: found nowhere in 2 of 2 cases (c0, c1)" in said
    summary = json.loads((tmp_path / "out" / "explain.json").read_text())
    assert (summary["task"], summary["classes"]) == ("segmentation", NAMES)
    assert summary["not_found"] == {"posterior": ["c0", "c1"]}
    assert "region in which it was found" in summary["text"] and "patient's right" in summary["text"]
    rows = rows_of(tmp_path / "out" / "pictures.csv")
    assert {row["target"] for row in rows} == {"anterior"} and {row["case"] for row in rows} == {"c0", "c1"}
    assert float(rows[0]["dice"]) <= float(rows[1]["dice"])
    assert all((tmp_path / "out" / row["file"]).stat().st_size > 10_000 for row in rows)
    assert not (tmp_path / "out" / "embeddings.csv").exists()

    # The report of an evaluation of the same cases takes them in, one of others does not.
    labels = tmp_path / "labels"
    labels.mkdir()
    for number in range(2):
        (labels / f"c{number}.nii.gz").write_bytes((data / f"l{number}.nii.gz").read_bytes())
    (labels / "dataset.json").write_text(json.dumps({"labels": {name: i for i, name in enumerate(NAMES)}}))
    evaluate = ["evaluate", str(labels), "-r", str(labels), "--draws", "5", "--explanations", str(tmp_path / "out")]
    assert main([*evaluate, "-o", str(tmp_path / "evaluated")]) == 0
    reader = check_self_contained((tmp_path / "evaluated" / "report.html").read_text())
    for text in ("Where the network looked", "posterior: found nowhere in 2 of 2 cases"):
        assert text in reader.text, text
    for number in range(2):
        (labels / f"c{number}.nii.gz").rename(labels / f"d{number}.nii.gz")
    assert main([*evaluate, "-o", str(tmp_path / "other")]) == 1
    assert "explains none of the cases" in capsys.readouterr().err
    content = {**summary, "task": "landmarks"}
    (tmp_path / "out" / "explain.json").write_text(json.dumps(content))
    assert main([*evaluate, "-o", str(tmp_path / "other")]) == 1
    assert "is about landmarks, not about segmentation" in " ".join(capsys.readouterr().err.split())


def test_structure_that_is_found_nowhere_is_refused_unless_the_whole_is_explained(segmentation, tmp_path, capsys):
    data, bundle = segmentation / "data", segmentation / "nnmamba_seg"
    arguments = ["explain", str(data), "-m", str(bundle), "-o", str(tmp_path / "out"), "--target", "posterior"]
    arguments += ["--checks", "0", "--layer", "stage1"]
    assert main(arguments) == 1
    assert "posterior: found in none of the 2 cases" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".writing-*"))
    assert main([*arguments, "--region", "all"]) == 0
    assert "2 empty maps, nothing in stage1 speaks for it: c0: posterior" in capsys.readouterr().out
    texts = [entry["text"] for entry in json.loads((tmp_path / "out" / "explain.json").read_text())["pictures"]]
    assert all("found nowhere" in text and "EMPTY MAP" in text for text in texts)
    assert main([*arguments, "--region", "some"]) == 2
    assert main([*arguments, "--target", "liver"]) == 2


def test_score_of_a_structure_is_its_mean_probability_in_the_region(segmentation):
    trained, task = predicted(SegmentationTask, segmentation / "nnmamba_seg", segmentation / "data")
    (first, second) = task.entries
    subject = task.subject(first)
    with torch.no_grad():
        probs = trained.network(subject.image[None]).softmax(1)[0]
    found = trained.infer(trained.prepare(trained.read(task.cases[0]))["image"]).argmax(0) == 1
    # The volume is smaller than the window in every axis and lies in its middle.
    assert subject.image.shape == (1, 32, 32, 32) and subject.region.sum() == found.sum()
    assert torch.equal(subject.region[6:26, 1:31, 7:25], found.cpu())
    assert subject.score([subject.image])[0] == pytest.approx(probs[1][subject.region].mean().item(), rel=1e-5)
    assert subject.score([subject.image, 0 * subject.image]).shape == (2,)
    everything = predicted(SegmentationTask, segmentation / "nnmamba_seg", segmentation / "data", region="all")[1]
    assert everything.subject(everything.entries[0]).region.sum() == np.prod(SHAPE)
    assert len(everything.entries) == 4 and second.case == 1
    # Wrong ones first, then structure by structure the surest.
    wrong = max((0, 1), key=lambda i: task.entries[i].details["wrong"])
    assert task.pick(2) == [wrong, 1 - wrong]


def test_landmarks_are_explained_around_the_place_that_was_found(landmarks, tmp_path, capsys):
    data, bundle = landmarks / "data", landmarks / "nnmamba_landmark"
    arguments = ["explain", str(data), "-m", str(bundle), "-o", str(tmp_path / "out"), "--method", "gradcam"]
    assert main([*arguments, "--checks", "0", "--layer", "stage1"]) == 0
    said = capsys.readouterr().out
    assert "4 pictures of 2 cases, gradcam of stage1 (4 x 8 x 4)" in said
    assert "posterior center: found nowhere in 2 of 2 cases" in said
    rows = {(row["case"], row["target"]): row for row in rows_of(tmp_path / "out" / "pictures.csv")}
    assert rows["c1", "border center"]["error_mm"] == ""  # it has no reference
    trained, task = predicted(LandmarkTask, bundle, data)
    entry = next(e for e in task.entries if (e.case, e.target) == (0, 0))
    prepared = trained.prepare(trained.read(task.cases[0]))
    heat = trained.infer(prepared["image"])[0]
    peak = np.array(np.unravel_index(int(heat.argmax()), heat.shape))
    world = [float(rows["c0", "anterior center"][f"{axis}_mm"]) for axis in "xyz"]
    np.testing.assert_allclose(world_to_voxel(np.array(world), np.asarray(prepared["affine"])), peak, atol=1e-3)
    subject = task.subject(entry)
    marked = np.argwhere(subject.region.numpy())
    assert (np.abs(marked - peak) <= LANDMARK_REACH_VOX).all() and len(marked) > 7
    assert subject.score([subject.image])[0] == pytest.approx(1)

    table = ["case,landmark,x_mm,y_mm,z_mm,reference_x_mm,reference_y_mm,reference_z_mm"]
    table += [f"c{case},{name},0,0,0,1,1,1" for case in range(2) for name in LANDMARKS]
    (tmp_path / "table.csv").write_text("\n".join(table))
    evaluate = ["evaluate", str(tmp_path / "table.csv"), "-o", str(tmp_path / "evaluated"), "--draws", "5"]
    assert main([*evaluate, "--explanations", str(tmp_path / "out")]) == 0
    assert "Where the network looked" in (tmp_path / "evaluated" / "report.html").read_text()


@pytest.mark.parametrize("codes", STORED)
def test_marks_and_map_lie_where_the_image_is(codes):
    """In the planes through a voxel on the right, behind and above: the outline, the point and the brightest color."""
    image, mark, affine = phantom(codes)
    (stored,) = np.argwhere(mark)
    marks = pictures.Marks(found=mark == 1, found_point=stored, window=(stored - 1, stored + 1))
    figure = pictures.draw_volume_map(image, mark.astype(float), Grid(image.shape, affine), "x", marks)
    right, behind, above = (np.array(MARK) + 0.5) * SPACING
    width, depth, _ = np.array(VOLUME) * SPACING
    expected = [(width - right, behind), (width - right, above), (depth - behind, above)]
    panels = [panel for panel in figure.axes if panel.images][:6]
    for number, panel in enumerate(panels):
        x, y = expected[number % 3]
        (line,) = panel.lines
        np.testing.assert_allclose((line.get_xdata()[0], line.get_ydata()[0]), (x, y))
        vertices = np.concatenate([path.vertices for c in panel.collections for path in c.get_paths()])
        np.testing.assert_allclose((vertices.min(0) + vertices.max(0)) / 2, (x, y), atol=1e-6)
        (window,) = panel.patches
        np.testing.assert_allclose(window.get_center(), (x, y))
        assert len(panel.images) == (1 if number < 3 else 2)
        if number >= 3:
            tint = panel.images[1].get_array()[..., 3]
            row, column = np.unravel_index(tint.argmax(), tint.shape)
            size = np.array(panel.images[1].get_extent())[[1, 3]] / tint.shape[::-1]
            np.testing.assert_allclose((column + 0.5, row + 0.5) * size, (x, y))
    assert [text.get_text() for text in panels[0].texts] == list("RLPA")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["found", "found", "part that was looked at"]


@pytest.fixture(scope="module")
def pictures_of_blobs(tmp_path_factory):
    """A 2D bundle that has learned to outline bright blobs, and pictures with their label maps."""
    folder = tmp_path_factory.mktemp("blobs_2d")
    torch.manual_seed(0)
    network = NNMambaSeg(2, 1, 2, 16, 1, mixer="none", head="conv1x1")
    images, _, center = draw_blobs(64, seed=1)
    grid = np.mgrid[:SIZE, :SIZE]
    is_blob = np.arange(64) % 2 == 1
    masks = ((grid[None] - center[:, :, None, None]) ** 2).sum(1) < 16
    masks &= is_blob[:, None, None]
    data, target = torch.from_numpy(images).float()[:, None], torch.from_numpy(masks).long()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(40):
        rows = torch.arange(64).roll(16 * step)[:16]
        loss = torch.nn.functional.cross_entropy(network(data[rows]), target[rows], torch.tensor([1.0, 5.0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (folder / "bundle" / "configs").mkdir(parents=True)
    (folder / "bundle" / "models").mkdir()
    torch.save(network.eval().state_dict(), folder / "bundle" / "models" / "model.pt")
    config = {
        "bundle_root": ".", "task": "segmentation", "ckpt_dir": "$@bundle_root + '/models'",
        "checkpoint": "$@ckpt_dir + '/model.pt'", "card": {}, "classes": ["background", "blob"],
        "network_def": {
            "_target_": "monai_mamba.networks.NNMambaSeg", "spatial_dims": 2, "in_channels": 1, "out_channels": 2,
            "init_filters": 16, "num_blocks": 1, "mixer": "none", "head": "conv1x1",
        },
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "monai_mamba.training.transforms.ReadPictured", "keys": "image", "channels": 1},
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
    }  # fmt: skip
    (folder / "bundle" / "configs" / "inference.json").write_text(json.dumps(config))
    cases = []
    (folder / "data").mkdir()
    for number in range(8):
        for kind, values in (("image", images[number] * 255), ("label", masks[number])):
            Image.fromarray(values.round().astype(np.uint8) if kind == "image" else values.astype(np.uint8)).save(
                folder / "data" / f"{kind}{number}.png"
            )
        cases.append({"case": f"c{number}", "image": f"image{number}.png", "label": f"label{number}.png"})
    (folder / "data" / "datalist.json").write_text(json.dumps({"labels": {"background": 0, "blob": 1}, "test": cases}))
    return folder, center


def test_pictures_are_explained_and_their_maps_pass_the_checks(pictures_of_blobs, tmp_path):
    folder, center = pictures_of_blobs
    summary = explain(folder / "bundle", folder / "data", tmp_path / "out", device="cpu")
    assert (summary["method"], summary["layer"], summary["map_size"]) == ("gradcam++", "stage2", [4, 4])
    assert set(summary["not_found"].get("blob", [])) >= {"c0", "c2", "c4"}  # there is none
    assert [check["passed"] for check in summary["sanity"]] == [True, True]
    assert "patient's right" not in summary["text"]
    entries = [entry for entry in summary["pictures"] if int(entry["case"][1:]) % 2]
    assert len(entries) == 4 and min(entry["dice"] for entry in entries) > 0.5
    trained, task = predicted(SegmentationTask, folder / "bundle", folder / "data")
    explainer = ActivationMaps(trained.network, task.subject(task.entries[0]).image, layer="stage2")
    for entry in (e for e in task.entries if e.case % 2):
        subject = task.subject(entry)
        weight = explainer(subject.image, 1, subject.region)[0].numpy()
        place = np.unravel_index(weight.argmax(), weight.shape)
        assert np.linalg.norm(place - center[entry.case]) < 6
        figure = task.draw(entry, torch.from_numpy(weight)[None])
        for panel in figure.axes[:2]:
            assert not panel.texts and panel.images[0].origin == "upper"  # as stored, without letters
            vertices = np.concatenate([path.vertices for path in panel.collections[-1].get_paths()])
            x, y = (vertices.min(0) + vertices.max(0)) / 2
            np.testing.assert_allclose(((1 - y) * SIZE, x * SIZE), center[entry.case] + 0.5, atol=1.5)
    with pytest.raises(DatasetError, match=r"case c0: blob not found there"):
        explain(folder / "bundle", folder / "data", tmp_path / "none", chosen=["c0"], num_checks=0, device="cpu")
    (folder / "data" / "label1.png").write_bytes(b"")
    with pytest.raises(Exception, match=r"label1.png: cannot be read as a label map"):
        explain(folder / "bundle", folder / "data", tmp_path / "other", device="cpu")


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (np.zeros((SIZE, SIZE - 1), np.uint8), "has \\(32, 31\\) voxels, its image \\(32, 32\\)"),
        (np.full((SIZE, SIZE), 9, np.uint8), "holds the value 9; the data list names 0 to 1"),
    ],
    ids=["size", "value"],
)
def test_picture_whose_label_map_does_not_fit_is_refused(tmp_path, label, reason):
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(label).save(tmp_path / "label.png")
    case = {"case": "c", "image": str(tmp_path / "image.png"), "label": str(tmp_path / "label.png")}
    with pytest.raises(DatasetError, match=f"case c: .*{reason}"):
        read_reference(case, "image", 2, torch.zeros(1, SIZE, SIZE))


def test_label_map_of_a_resized_picture_is_resized(tmp_path):
    values = np.zeros((20, 40), np.uint8)
    values[:10, 30:] = 1
    for name in ("image", "label"):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    case = {"case": "c", "image": str(tmp_path / "image.png"), "label": str(tmp_path / "label.png")}
    reference = read_reference(case, "image", 2, torch.zeros(3, 16, 16))
    expected = torch.zeros(1, 16, 16, dtype=torch.uint8)
    expected[:, :8, 12:] = 1
    assert torch.equal(reference, expected)


@pytest.mark.parametrize("has_sides", [True, False])
def test_volume_that_does_not_know_its_sides_is_not_turned(tmp_path, has_sides):
    image, _, affine = phantom("LPS")
    nib.save(nib.Nifti1Image(image, affine if has_sides else None), tmp_path / "image.nii.gz")
    read = LoadImage(image_only=True, ensure_channel_first=True)(tmp_path / "image.nii.gz")
    grid = _grid(read, {"image": read})
    assert grid.has_sides is has_sides
    turned = grid.turn(image)
    np.testing.assert_array_equal(turned, image[::-1, ::-1] if has_sides else image)
