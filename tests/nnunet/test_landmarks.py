"""Landmarks: where they are in preprocessed arrays and augmented patches, and what the trainer makes of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.landmarks import read_landmarks
from monai_mamba.heat_maps import gaussian_heat_maps, voxel_to_world, world_to_voxel


def write_oblique_volume(path, point_mm_lps):
    """Write a volume with anisotropic voxels, turned axes, an empty margin and a blob at a point of the world."""
    direction = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    if np.linalg.det(direction) < 0:
        direction[:, 0] *= -1
    volume = sitk.Image([44, 36, 24], sitk.sitkFloat32)
    volume.SetSpacing((0.8, 1.1, 2.2))  # a ratio above 3 would be resampled to the nearest slice
    volume.SetOrigin((-31.0, 12.0, 55.0))
    volume.SetDirection(direction.flatten().tolist())
    array = np.zeros((24, 36, 44), np.float32)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in array.shape), indexing="ij"), -1)[..., ::-1]
    center = np.array(volume.TransformPhysicalPointToContinuousIndex(point_mm_lps(volume)))
    distance = np.linalg.norm((index - center) * volume.GetSpacing(), axis=-1)
    array += 50 * np.exp(-(distance**2) / (2 * 4.0**2))
    inner = np.zeros(array.shape, bool)
    inner[2:-3, 4:-2, 5:-1] = True
    array = np.where(inner, array + 1, 0)
    blob = sitk.GetImageFromArray(array)
    blob.CopyInformation(volume)
    sitk.WriteImage(blob, str(path))
    return volume


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_world_position_is_found_in_the_array_that_nnunet_preprocesses(planned, tmp_path, reader, order):
    """The blob that SimpleITK puts at a point is where the affine says, after transposing, cropping and resampling."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from monai_mamba.nnunet.geometry import preprocessed_affine

    plans = json.loads((planned.preprocessed / "nnUNetPlans.json").read_text())
    plans["image_reader_writer"] = reader
    plans["transpose_forward"], plans["transpose_backward"] = list(order), np.argsort(order).tolist()
    plans["configurations"]["3d_fullres"]["spacing"] = [0.9, 1.0, 1.3]
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    point = {}

    def choose(volume):
        point["lps"] = np.array(volume.TransformContinuousIndexToPhysicalPoint((23.3, 17.6, 11.2)))
        return tuple(point["lps"])

    write_oblique_volume(tmp_path / "case_0000.nii.gz", choose)
    dataset_json = json.loads((planned.raw / "dataset.json").read_text())
    data, _, properties = configuration.preprocessor_class(verbose=False).run_case(
        [str(tmp_path / "case_0000.nii.gz")], None, manager, configuration, dataset_json
    )
    affine = preprocessed_affine(properties, data.shape[1:], manager.transpose_forward)
    expected = world_to_voxel(point["lps"] * [-1, -1, 1], affine)
    weights = np.clip(data[0] - data[0].min(), 0, None)
    weights[weights < 0.5 * weights.max()] = 0
    found = np.array(ndimage.center_of_mass(weights))
    np.testing.assert_allclose(found, expected, atol=0.1)  # voxels; half a voxel of 2.2 mm would be 0.7
    np.testing.assert_allclose(voxel_to_world(expected, affine), point["lps"] * [-1, -1, 1], atol=1e-9)


@pytest.mark.parametrize("is_dummy_2d", [False, True])
def test_landmarks_follow_the_image_through_nnunets_augmentation(planned, is_dummy_2d, monkeypatch):
    """Dots in the image are where the target says they are, after rotation, scaling, cropping and mirroring."""
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from monai_mamba.nnunet.task_data import LandmarkLoader

    shape, corner = (26, 50, 46), [3, -6, 2]
    points = np.array([[14.3, 20.2, 22.7], [18.0, 30.6, 15.1], [5.0, 9.5, 40.0], [2.0, 200.0, 2.0], [np.nan] * 3])
    transforms = nnUNetTrainer.get_training_transforms(
        (20, 40, 36), (-0.5, 0.5), None, (0, 1, 2), is_dummy_2d, use_mask_for_norm=[False]
    )
    spatial = [t for t in transforms.transforms if isinstance(t, SpatialTransform)]
    spatial[0].p_rotation = spatial[0].p_scaling = 1.0
    kept = [t for t in transforms.transforms if not type(t).__name__.startswith("Random")]
    monkeypatch.setattr(transforms, "transforms", kept)
    loader = LandmarkLoader.__new__(LandmarkLoader)
    loader.patch_size, loader._landmarks = shape, {"case": points}
    seen = 0
    for _ in range(12):
        image = gaussian_heat_maps(points[:3] - corner, shape, 2.5, 100.0)
        sample = {"image": image, "segmentation": torch.zeros(1, *shape, dtype=torch.int16)}
        sample = transforms(**sample, **loader.companions("case", corner))
        target = loader.make_target("case", corner, sample).numpy()
        assert np.isinf(target[3]).all() and np.isnan(target[4]).all()
        for dot, position in zip(sample["image"].numpy(), target[:3], strict=True):
            if np.isinf(position).any():
                assert dot.max() < 100 * np.exp(-(0.45**2) / (2 * 2.5**2))  # the center is not in the patch
            elif all(7 < p < n - 8 for p, n in zip(position, dot.shape, strict=True)):
                weights = np.where(dot > 20, dot, 0)
                np.testing.assert_allclose(ndimage.center_of_mass(weights), position, atol=0.25)
                seen += 1
    assert seen >= 6, "too few landmarks stayed inside: the test proves nothing"


def test_position_in_a_map_of_coordinates_is_exact_for_affine_maps():
    from monai_mamba.nnunet.task_data import locate_in_map

    shape = (12, 14, 16)
    voxels = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij"))
    matrix = torch.tensor([[0.9, 0.3, 0.0], [-0.3, 0.9, 0.1], [0.0, 0.2, -1.1]])
    coordinates = torch.einsum("ij,jabc->iabc", matrix, voxels) + torch.tensor([3.0, -2.0, 7.0])[:, None, None, None]
    is_inside = torch.ones(shape, dtype=torch.bool)
    expected = torch.tensor([[4.3, 5.8, 6.1], [0.0, 13.0, 15.4], [-0.4, 3.0, 3.0]])
    points = expected @ matrix.T + torch.tensor([3.0, -2.0, 7.0])
    torch.testing.assert_close(locate_in_map(points, coordinates, is_inside), expected, atol=1e-4, rtol=0)
    outside = torch.tensor([[-0.7, 3.0, 3.0], [4.0, 14.0, 3.0]]) @ matrix.T + torch.tensor([3.0, -2.0, 7.0])
    assert locate_in_map(outside, coordinates, is_inside).isinf().all()
    is_inside[3:6] = False
    assert locate_in_map(points[:1], coordinates, is_inside).isinf().all()


def test_loss_leaves_out_what_is_not_annotated_and_wants_nothing_where_no_landmark_is():
    from monai_mamba.nnunet.landmarks import HeatMapLoss

    shape = (8, 9, 10)
    voxels = torch.tensor([[[4.0, 4.0, 5.0], [torch.inf] * 3, [torch.nan] * 3]])
    output = torch.zeros(1, 4, *shape)
    output[:, 1] = gaussian_heat_maps(voxels[0, :1], shape, 2.0, 255.0)
    output[:, 0] = output[:, 3] = 1e6  # background and a landmark nobody marked
    output.requires_grad_()
    loss = HeatMapLoss(2.0, 255.0)
    assert loss(output, voxels).item() == 0
    changed = output.detach().clone()
    changed[:, 2] = 3.0
    assert loss(changed, voxels).item() == pytest.approx(9 / 3)
    nothing = loss(output, torch.full((1, 3, 3), torch.nan))
    nothing.backward()
    assert nothing.item() == 0 and not output.grad.any()


@pytest.fixture
def make_landmark_trainer(planned, monkeypatch, tmp_path):
    from monai_mamba.nnunet.lookup import find_trainer
    from tests.nnunet.conftest import _FOLDERS

    for name in _FOLDERS:
        monkeypatch.setenv(name, str(planned.root / name.removeprefix("nnUNet_")))

    def make(name="nnMambaLandmarkTrainerQuickNoSSM", configuration="3d_fullres", labels=None):
        plans = json.loads((planned.preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
        dataset_json = json.loads((planned.preprocessed / "dataset.json").read_text())
        dataset_json["labels"] = labels or dataset_json["labels"]
        trainer = find_trainer(name)(plans, configuration, 0, dataset_json, torch.device("cpu"))
        trainer.output_folder = str(tmp_path)
        trainer.log_file = str(tmp_path / "log.txt")
        return trainer

    return make


def centers_of_spheres(planned):
    """World positions (RAS+) of the balls, through SimpleITK's own index transform."""
    result = {}
    for path in sorted((planned.raw / "labelsTr").glob("*.nii.gz")):
        volume = sitk.ReadImage(str(path))
        array = sitk.GetArrayFromImage(volume)
        result[path.name.removesuffix(".nii.gz")] = np.array(
            [
                np.array(volume.TransformContinuousIndexToPhysicalPoint(np.argwhere(array == value).mean(0)[::-1]))
                * [-1, -1, 1]
                for value in (1, 2)
            ]
        )
    return result


def test_trainer_reads_centers_of_labels_trains_a_step_and_validates_in_mm(make_landmark_trainer, planned, tmp_path):
    trainer = make_landmark_trainer()
    trainer.on_train_start()
    expected = centers_of_spheres(planned)
    for name, points in trainer._landmarks_mm.items():
        np.testing.assert_allclose(points, expected[name], atol=1e-4)
    batch = next(trainer.dataloader_train)
    assert batch["target"].shape == (trainer.batch_size, 2, 3)
    assert np.isfinite(trainer.train_step(batch)["loss"])
    assert trainer.inference_allowed_mirroring_axes is None
    transforms = trainer.dataloader_train.data_loader.transforms.transforms
    assert not any("Mirror" in type(transform).__name__ for transform in transforms)
    # A network that paints the right heat maps makes no error; one that is 3 voxels off makes that error in mm.
    val = next(trainer.dataloader_val)
    sigma = trainer.plans_manager.plans["monai_mamba"]["sigma_vox"]
    for shift in (0.0, 3.0):
        maps = gaussian_heat_maps(val["target"] + torch.tensor([0.0, shift, 0.0]), val["data"].shape[2:], sigma)
        trainer._forward = lambda images, maps=maps: torch.cat([torch.full_like(maps[:, :1], 1.0), maps], 1)
        output = trainer.validation_step(val)
        errors = output["errors"][~np.isnan(output["errors"])]
        assert len(errors) >= trainer.batch_size
        np.testing.assert_allclose(errors, shift * trainer.configuration_manager.spacing[1], atol=0.5)
    trainer.logger.log("epoch_start_timestamps", 0.0, 0)
    trainer.logger.log("train_losses", 1.0, 0)
    trainer.logger.log("lrs", 1e-3, 0)
    trainer.on_validation_epoch_end([output])
    trainer.on_epoch_end()
    assert "MRE in mm" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "progress.png").stat().st_size > 1000
    assert trainer._best_ema == pytest.approx(-np.nanmean(errors), rel=1e-3)


def test_validation_writes_positions_and_errors(make_landmark_trainer, planned, tmp_path, monkeypatch):
    """With the network replaced by the truth: what is written is the truth, to a fraction of a voxel."""
    trainer = make_landmark_trainer()
    trainer.initialize()
    expected = centers_of_spheres(planned)
    _, dataset = trainer.get_tr_and_val_datasets()
    order = iter(dataset.identifiers)

    def paint(_self, image):
        name = next(order)
        affine, shape = trainer._affine_and_shape(dataset, name)
        assert image.shape[1:] == shape
        maps = gaussian_heat_maps(world_to_voxel(expected[name], affine), shape)
        return torch.cat([torch.full_like(maps[:1], 127.5), maps])

    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    monkeypatch.setattr(nnUNetPredictor, "predict_logits_from_preprocessed_data", paint)
    trainer.perform_actual_validation()
    errors = read_landmarks(tmp_path / "validation" / "landmarks.csv")
    assert errors.names == ["left", "right"] and len(errors.case) == len(dataset.identifiers)
    assert errors.errors_mm.max() < 0.6  # a quarter of a slice, which the even window of the center of mass leaves
    markup = json.loads((tmp_path / "validation" / f"{errors.case[0]}.mrk.json").read_text())["markups"][0]
    assert markup["coordinateSystem"] == "RAS"
    np.testing.assert_allclose(markup["controlPoints"][1]["position"], expected[errors.case[0]][1], atol=0.6)
    metrics = json.loads((tmp_path / "validation" / "metrics.json").read_text())["metrics"]
    assert metrics["mre_mm"]["value"] == pytest.approx(errors.errors_mm.mean(), abs=1e-3)


@pytest.mark.parametrize("is_published", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sixty_steps_find_two_balls_and_reach_the_height_that_label_maps_need(
    make_landmark_trainer, planned, is_published, monkeypatch
):
    """The published head finds them as well, but its maps are too low to become label maps."""
    from monai_mamba.nnunet.landmarks import LandmarkFinder
    from nnunet_trainers.nnMambaLandmarkTrainer import nnMambaLandmarkTrainerPublished as Published
    from nnunet_trainers.nnMambaLandmarkTrainer import nnMambaLandmarkTrainerQuickNoSSM as Quick

    if is_published:
        for name in ("head", "output_scale", "optimizer_name", "decay"):
            monkeypatch.setattr(Quick, name, getattr(Published, name))
    trainer = make_landmark_trainer(Quick.__name__)
    trainer.on_train_start()
    trainer.network.train()
    for _ in range(60):
        trainer.train_step(next(trainer.dataloader_train))
    dataset, _ = trainer.get_tr_and_val_datasets()
    expected = centers_of_spheres(planned)
    finder = LandmarkFinder(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json, trainer.device
    )
    errors, heights = [], []
    for name in dataset.identifiers:
        data, _, _, properties = dataset.load_case(name)
        position_mm, peak = finder.find(torch.from_numpy(np.array(data[:])), properties)
        errors.append(np.linalg.norm(position_mm - expected[name], axis=-1))
        heights.append(peak)
    print(f"mean error {np.mean(errors):.2f} mm, heights {np.min(heights):.1f} to {np.max(heights):.1f}")
    assert np.mean(errors) < 3.0, errors  # mm; voxels are 1 x 1 x 2.5 mm
    if is_published:
        assert np.max(heights) < 0.1 * trainer.amplitude, heights
    else:
        assert np.min(heights) > 0.5 * trainer.amplitude, heights


def test_configurations_and_labels_that_are_no_landmarks_are_refused(make_landmark_trainer):
    with pytest.raises(ValueError, match=r"finds landmarks in volumes: use 3d_fullres or 3d_lowres, got 2d"):
        make_landmark_trainer(configuration="2d")
    with pytest.raises(DatasetError, match="one value per landmark without gaps, regions or `ignore`"):
        make_landmark_trainer(labels={"background": 0, "whole": [1, 2], "core": 2})


@pytest.mark.parametrize("base", ["NNMambaSeg", "MedMambaSeg"])
def test_plans_for_the_segmentation_network_will_do(make_landmark_trainer, planned, base):
    import monai_mamba.networks

    network = type("Planned", (getattr(monai_mamba.networks, base),), {})
    monai_mamba.networks.Planned = network
    file = planned.preprocessed / "nnUNetPlans.json"
    content = file.read_text()
    plans = json.loads(content)
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "monai_mamba.networks.Planned"
    try:
        file.write_text(json.dumps(plans))
        if base == "NNMambaSeg":
            make_landmark_trainer()
        else:
            with pytest.raises(ValueError, match=r"made for monai_mamba\.networks\.Planned"):
                make_landmark_trainer()
    finally:
        file.write_text(content)
        del monai_mamba.networks.Planned


def test_sigma_from_the_environment(make_landmark_trainer, monkeypatch):
    monkeypatch.setenv("MONAI_MAMBA_SIGMA", "2.5")
    trainer = make_landmark_trainer()
    assert trainer._build_loss().sigma_vox == 2.5
    assert trainer.plans_manager.plans["monai_mamba"]["sigma_vox"] == 2.5
    monkeypatch.setenv("MONAI_MAMBA_SIGMA", "wide")
    with pytest.raises(ValueError, match="`MONAI_MAMBA_SIGMA` must be a positive number of voxels, got 'wide'"):
        make_landmark_trainer()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda points: points.pop(), r"case case_\d: it has 1 landmarks, not 2"),
        (lambda points: points[0].__setitem__(0, 900.0), r"landmark 1 at \[900.0, .* outside of the image"),
        (lambda points: points[0].__setitem__(0, "x"), r"landmark 'left' must be three numbers or null"),
    ],
    ids=["missing", "outside", "no-number"],
)
def test_bad_landmarks_stop_a_training_before_it_starts(make_landmark_trainer, planned, change, message):
    cases = {name: {"landmarks": points.tolist()} for name, points in centers_of_spheres(planned).items()}
    for entry in cases.values():
        change(entry["landmarks"])
    file = planned.preprocessed / "landmarks.json"
    file.write_text(json.dumps({"landmark_names": ["left", "right"], "cases": cases}))
    try:
        with pytest.raises(DatasetError, match=message):
            make_landmark_trainer().on_train_start()
    finally:
        file.unlink()
