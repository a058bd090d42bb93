"""From landmarks in mm to heat maps and back, the schedule, the metric, the files."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.transforms import Compose, LoadImaged, Orientationd, RandAffined, Resized

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.landmarks import read_landmarks, summarize_trainings
from monai_mamba.heat_maps import decode_heat_maps, voxel_to_world
from monai_mamba.networks import NNMambaSeg
from monai_mamba.training.bundle import single_output, warmup_polynomial
from monai_mamba.training.handlers import MeanRadialError, SingleOutput
from monai_mamba.training.inferers import FlipInferer
from monai_mamba.training.label_maps import gather_references
from monai_mamba.training.landmark_files import FoundLandmarks, write_landmark_table
from monai_mamba.training.transforms import (
    CheckLabelMapd,
    CheckLandmarksd,
    HeatMapsToLandmarksd,
    KeepAffined,
    LandmarksToHeatMapsd,
    PositiveWindowd,
)

OBLIQUE = np.array([[0.1, -1.4, 0.2, 30.0], [1.1, 0.1, 0.3, -12.0], [-0.2, 0.3, 2.1, 5.0], [0, 0, 0, 1]])


def volume(path, shape=(20, 24, 18), affine=OBLIQUE, values=None):
    values = np.random.default_rng(0).normal(100, 10, shape) if values is None else values
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), path)
    return str(path)


@pytest.mark.parametrize("size", [(20, 24, 18), (32, 30, 40)], ids=["as-it-is", "stretched"])
def test_landmarks_survive_the_way_to_heat_maps_and_back(tmp_path, size):
    landmarks = voxel_to_world(np.array([[4.0, 18, 3], [10.3, 9.6, 9.2]]), OBLIQUE)
    landmarks = np.vstack([landmarks, [np.nan] * 3])
    transform = Compose(
        [
            LoadImaged("image", image_only=True, ensure_channel_first=True),
            Orientationd("image", axcodes="RAS", labels=None),
            Resized("image", spatial_size=size, mode="trilinear"),
            KeepAffined("image"),
            LandmarksToHeatMapsd(sigma_vox=2.0, amplitude=9.0),
        ]
    )
    data = transform({"image": volume(tmp_path / "i.nii.gz"), "landmarks": landmarks})
    assert data["label"].shape == (3, *data["image"].shape[1:])
    assert data["label"][2].isnan().all()
    maps = torch.nan_to_num(data["label"])
    found = HeatMapsToLandmarksd(window=6)({**data, "pred": maps})
    assert (found["error_mm"][:2] < 0.25).all() and found["error_mm"][2].isnan()
    assert float(found["peak"][0]) == pytest.approx(9.0, rel=0.1)
    coarse = HeatMapsToLandmarksd()({**data, "pred": maps})
    assert (coarse["error_mm"][:2] < np.linalg.norm([1.4, 1.2, 2.2]) / 2 + 0.01).all()


def test_heat_maps_move_with_an_augmented_volume(tmp_path):
    spot = np.array([8.0, 14, 10])
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (20, 24, 18)), indexing="ij"), -1)
    values = np.exp(-((grid - spot) ** 2).sum(-1) / 8)
    transform = Compose(
        [
            LoadImaged("image", image_only=True, ensure_channel_first=True),
            Orientationd("image", axcodes="RAS", labels=None),
            RandAffined(
                "image", prob=1.0, rotate_range=[0.3] * 3, scale_range=[0.15] * 3, translate_range=[2.0] * 3,
                padding_mode="border",
            ),
            KeepAffined("image"),
            LandmarksToHeatMapsd(sigma_vox=2.0, amplitude=1.0),
        ]
    ).set_random_state(3)  # fmt: skip
    case = {"image": volume(tmp_path / "i.nii.gz", values=values), "landmarks": voxel_to_world(spot[None], OBLIQUE)}
    places = []
    for _ in range(3):
        data = transform(case)
        weight = np.asarray(data["image"][0]) ** 2
        seen = [
            (axis * weight).sum() / weight.sum() for axis in np.meshgrid(*map(np.arange, weight.shape), indexing="ij")
        ]
        heat = decode_heat_maps(data["label"], window=4)[0]
        np.testing.assert_allclose(heat, seen, atol=0.15)  # voxels
        places.append(heat)
    assert np.ptp(places, axis=0).max() > 1


def test_landmarks_outside_their_image_are_refused(tmp_path):
    load = LoadImaged("image", image_only=True, ensure_channel_first=True)
    check = CheckLandmarksd(names=["tip", "base"])
    inside = np.vstack([voxel_to_world(np.array([[19.4, 0, 5]]), OBLIQUE), [np.nan] * 3])
    data = load({"image": volume(tmp_path / "i.nii.gz"), "landmarks": inside, "case": "c9"})
    np.testing.assert_array_equal(check(data)["landmarks"], inside)
    lps = inside[0] * [-1, -1, 1]
    with pytest.raises(
        DatasetError, match=r"case c9: the landmark base lies at the voxel .* outside the image of \[20, 24"
    ):
        check({**data, "landmarks": np.vstack([inside[0], lps])})


def test_window_is_of_the_positive_voxels_alone():
    image = torch.tensor([[[[-50.0, 0, 10, 12, 14, 16, 1000]]]])[0]
    positive = image[image > 0]
    low, high = (float(positive.mean() + s * 2 * positive.std()) for s in (-1, 1))
    result = PositiveWindowd()({"image": image})["image"]
    expected = (image.clamp(low, high) - low) / (high - low) * 255
    torch.testing.assert_close(result, expected)
    assert result.min() >= 0 and result.max() <= 255
    with pytest.raises(DatasetError, match="case c1"):
        PositiveWindowd()({"image": torch.zeros(1, 2, 2, 2), "case": "c1"})


def test_rate_warms_up_falls_in_steps_and_never_rises_again():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = warmup_polynomial(optimizer, max_epochs=80)
    rates = []
    for _ in range(80):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates[:5], np.arange(1, 6) / 5 * 1e-3)
    np.testing.assert_allclose(rates[5:15], 1e-3)
    np.testing.assert_allclose(rates[15:25], 1e-3 * (1 - 10 / 75) ** 2)
    assert (np.diff(rates[5:]) <= 0).all() and rates[-1] > 0  # the published schedule rises from epoch 55 on
    for arguments in ({"max_epochs": 0}, {"max_epochs": 5, "hold_epochs": 0}):
        with pytest.raises(ValueError, match="`max_epochs`"):
            warmup_polynomial(optimizer, **arguments)


def test_mean_radial_error_leaves_out_what_has_no_reference():
    metric = MeanRadialError(lambda output: output)
    metric.update([torch.tensor([1.0, float("nan")]), torch.tensor([3.0, 5.0])])
    assert metric.compute() == 3.0
    metric.reset()
    assert np.isnan(metric.compute())


def test_table_is_what_the_evaluation_reads_and_trainings_are_summarized(tmp_path):
    reference = np.array([[0.0, 0, 0], [np.nan] * 3])
    for run, error in enumerate((1.0, 2.0, 3.0)):
        found = FoundLandmarks("c", "p", np.array([[error, 0, 0], [1, 1, 1]]), np.array([200.0, 3]), reference)
        write_landmark_table(tmp_path / f"{run}.csv", ["a", "b"], [found])
    with open(tmp_path / "0.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["landmark"], row["error_mm"], row["reference_x_mm"]) for row in rows] == [
        ("a", "1.0000", "0.0000"),
        ("b", "", ""),
    ]
    landmarks = read_landmarks(tmp_path / "0.csv")
    np.testing.assert_allclose(landmarks.errors_mm, [[1, np.nan]])
    summary = summarize_trainings([tmp_path / f"{run}.csv" for run in range(3)], tmp_path)
    assert summary["mre_mm"]["mean"] == 2
    assert summary["mre_mm"]["standard_deviation"] == pytest.approx(np.sqrt(2 / 3))  # of the population, as published
    assert json.loads((tmp_path / "trainings.json").read_text())["mre_mm"]["values"] == [1, 2, 3]
    write_landmark_table(tmp_path / "other.csv", ["a", "c"], [found])
    with pytest.raises(DatasetError, match=r"other\.csv"):
        summarize_trainings([tmp_path / "0.csv", tmp_path / "other.csv"], tmp_path)


def checked(tmp_path, **change):
    image = volume(tmp_path / "i.nii.gz")
    values = np.zeros((20, 24, 18))
    values[0, 0, 0] = change.pop("value", 1)
    label = volume(tmp_path / "l.nii.gz", **{"values": values, **change})
    load = LoadImaged(["image", "label"], image_only=True, ensure_channel_first=True)
    return CheckLabelMapd(num_classes=2)(load({"image": image, "label": label, "case": "c7"}))


def test_label_maps_must_fit_their_image_and_their_names(tmp_path):
    assert checked(tmp_path)["label"].max() == 1
    moved = OBLIQUE.copy()
    moved[0, 3] += 0.5
    for change, reason in (
        ({"value": 2}, "holds the value 2"),
        ({"value": 0.5}, "holds the value 0.5"),
        ({"affine": moved}, "0.5 mm away"),
        ({"values": np.zeros((20, 24, 17))}, "one grid"),
    ):
        with pytest.raises(DatasetError, match=rf"case c7: .*l\.nii\.gz.*{reason}"):
            checked(tmp_path, **change)


def test_deep_supervision_is_off_while_an_evaluator_runs():
    network = NNMambaSeg(init_filters=16, num_blocks=1, deep_supervision=True)
    seen = []
    engine = Engine(lambda engine, batch: seen.append(network.decoder.deep_supervision))
    SingleOutput(network).attach(engine)
    engine.run([0], max_epochs=1)
    assert seen == [False] and network.decoder.deep_supervision
    assert not single_output(network).decoder.deep_supervision
    assert len(network.decoder.seg_layers) == 4


@pytest.mark.parametrize("dense", [True, False], ids=["maps", "classes"])
def test_flips_average_over_all_mirror_images(dense):
    def inferer(inputs, network):
        return network(inputs)

    def network(x):
        ramp = x * torch.arange(x.shape[-1])
        return ramp if dense else ramp.flatten(2).sum(2)

    x = torch.rand(2, 1, 3, 4)
    result = FlipInferer(inferer, [0, 1], dense=dense)(x, network)
    mirrored = network(x.flip(3))
    expected = (network(x) + (mirrored.flip(3) if dense else mirrored)) / 2  # rows do not matter to this network
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(FlipInferer(inferer, dense=dense)(x, network), network(x))
    for flips in ([-1], [1, 1]):
        with pytest.raises(ValueError, match="`flips`"):
            FlipInferer(inferer, flips)


def test_references_are_gathered_under_the_names_of_the_cases(tmp_path):
    for name in ("a.nii", "b.nii.gz"):
        volume(tmp_path / name)
    cases = [
        {"case": "x", "patient": "p", "label": str(tmp_path / "a.nii")},
        {"case": "y", "patient": "q", "label": str(tmp_path / "b.nii.gz")},
    ]
    gather_references(cases, ["background", "organ"], tmp_path / "out")
    gather_references(cases[1:], ["background", "organ"], tmp_path / "out")  # replaces what was there
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["cases.csv", "dataset.json", "y.nii.gz"]
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"] == {"background": 0, "organ": 1}
    assert (tmp_path / "out" / "cases.csv").read_text() == "case,patient\ny,q\n"
    gather_references(cases, ["background", "organ"], tmp_path / "out", left_out={"y": "damaged"})
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["cases.csv", "dataset.json", "x.nii.gz"]
