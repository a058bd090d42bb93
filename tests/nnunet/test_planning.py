"""Predicted memory, the plans file of ``monai-mamba nnunet plan``, and our networks in nnU-Net's own trainer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from monai_mamba.nnunet.memory import nnunet_loss, training_memory
from monai_mamba.nnunet.planned_networks import PlannedNNMambaSeg, planned_strides
from monai_mamba.nnunet.planner import GIB, PlanError, plan_dataset, planned_network, planned_network_names
from tests.nnunet.conftest import _FOLDERS, DATASET_ID

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "planning.py"


def mean_square(output, target):
    return ((output - target) ** 2).mean()


def test_memory_of_a_step_that_can_be_counted_by_hand():
    network = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Sigmoid())
    memory = training_memory(network, (1024, 256), mean_square, target_channels=256, optimizer="sgd")
    map_bytes, weight_bytes = 1024 * 256 * 4, 256 * 256 * 4
    assert (memory.parameters, memory.gradients, memory.optimizer) == (weight_bytes,) * 3
    # Image, target, output and difference are kept; the derivative of the square needs up to four maps at once.
    scalars = 16
    assert 6 * map_bytes <= memory.activations <= 8 * map_bytes + scalars
    assert memory.peak == memory.activations + 2 * weight_bytes


def test_memory_leaves_the_network_alone_and_grows_with_states_batch_and_precision():
    network = planned_network("nnmamba").build(3, 1, 3)
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def peak(batch=2, **arguments):
        return training_memory(network, (batch, 1, 32, 32, 32), nnunet_loss(False, 4), **arguments)

    adam, sgd, large, half = peak(), peak(optimizer="sgd"), peak(batch=8), peak(precision="autocast")
    assert adam.optimizer == 2 * sgd.optimizer and adam.peak - sgd.peak == sgd.optimizer
    assert 2.5 * adam.activations < large.activations < 4.5 * adam.activations
    assert half.activations < adam.activations
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in network.parameters())


def test_memory_counts_what_the_scans_keep():
    def activations(mixer):
        network = PlannedNNMambaSeg(1, 3, strides=planned_strides(3), spatial_dims=3, mixer=mixer)
        return training_memory(network, (2, 1, 64, 64, 64), nnunet_loss(False, 4)).activations

    assert activations("mamba") > 1.1 * activations("none")


@pytest.mark.parametrize(
    ("argument", "value"), [("optimizer", "lion"), ("precision", "float16")], ids=["optimizer", "precision"]
)
def test_memory_refuses_unknown_settings(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be one of .*, got '{value}'"):
        training_memory(nn.Identity(), (1, 1, 4), mean_square, **{argument: value})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_predicted_peak_is_within_15_percent_of_the_measured_one(tmp_path):
    output = tmp_path / "planning.json"
    subprocess.run([sys.executable, str(BENCHMARK), "--output", str(output)], check=True)
    rows = json.loads(output.read_text())["rows"]
    assert len([row for row in rows if row["network"] == "nnmamba"]) >= 10
    for row in rows:
        assert 0.85 <= row["ratio"] <= 1.15, row


@pytest.fixture
def planning(planned, monkeypatch):
    """The planned data set in the environment of this process; plans written by a test are removed again."""
    for name in _FOLDERS:
        monkeypatch.setenv(name, str(planned.root / name.removeprefix("nnUNet_")))
    before = set(planned.preprocessed.glob("*.json"))
    yield planned
    for file in set(planned.preprocessed.glob("*.json")) - before:
        file.unlink()


def configuration_of(plans, name):
    return plans["configurations"][name]


def test_plan_fits_the_memory_and_shares_the_images_with_nnunet(planning):
    plans = plan_dataset(str(DATASET_ID), gpu_memory_gib=0.32, precision="float32")
    own = json.loads((planning.preprocessed / "nnMambaPlans.json").read_text())
    assert own["plans_name"] == "nnMambaPlans"
    stock = json.loads((planning.preprocessed / "nnUNetPlans.json").read_text())
    for name in ("2d", "3d_fullres"):
        mine, theirs = configuration_of(own, name), configuration_of(stock, name)
        assert mine["data_identifier"] == theirs["data_identifier"] == f"nnUNetPlans_{name}"
        assert mine["spacing"] == theirs["spacing"]
        assert all(size % 16 == 0 for size in mine["patch_size"])
        assert mine["planned_for"]["predicted_peak_bytes"] <= 0.32 * GIB
        assert mine["batch_size"] >= 2
        assert mine["architecture"]["arch_kwargs"]["strides"] == planned_strides(len(mine["patch_size"]))
    more = plan_dataset(str(DATASET_ID), gpu_memory_gib=4, precision="float32", configurations=["3d_fullres"])
    small, large = (configuration_of(p, "3d_fullres") for p in (plans, more))
    assert large["patch_size"] != small["patch_size"] or large["batch_size"] > small["batch_size"]


def test_plan_for_a_network_of_slices_has_no_other_configuration(planning):
    plans = plan_dataset(str(DATASET_ID), network="medmamba_t", gpu_memory_gib=3, precision="float32")
    assert list(plans["configurations"]) == ["2d"]
    assert all(size % 32 == 0 for size in configuration_of(plans, "2d")["patch_size"])
    assert (planning.preprocessed / "medmamba_tPlans.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "unet"}, "`--network` 'unet' is not known; choose one of nnmamba, medmamba_b"),
        ({"precision": "float64"}, "`--precision` must be one of float32, autocast, got 'float64'"),
        ({"gpu_memory_gib": 0.2, "precision": "float32"}, "a batch of two patches of 16 x 32 x 16 already needs"),
        ({"configurations": ["3d_lowres"]}, "`-c` 3d_lowres: the patch covers enough"),
        ({"configurations": ["2d", "4d"]}, "`-c` 4d: there is no such configuration; possible here"),
        ({"network": "medmamba_t", "configurations": ["3d_fullres"]}, "medmamba_t takes 2D images"),
        ({"plans_name": "nnUNetPlans"}, "`--plans-name` must be a name of letters and digits other than"),
        ({"plans_name": "../evil"}, "`--plans-name` must be a name of letters and digits other than"),
    ],
    ids=["network", "precision", "memory", "lowres", "configuration", "slices", "stock-name", "path"],
)
def test_plan_that_cannot_be_made_is_refused_and_writes_nothing(planning, arguments, message):
    before = {file: file.read_bytes() for file in planning.preprocessed.glob("*.json")}
    with pytest.raises(PlanError, match=message.replace("(", r"\(")):
        plan_dataset(str(DATASET_ID), **{"gpu_memory_gib": 4, "precision": "float32", **arguments})
    assert {file: file.read_bytes() for file in planning.preprocessed.glob("*.json")} == before


def test_plan_needs_data_set_variables_and_fingerprint(planning, monkeypatch, tmp_path):
    with pytest.raises(PlanError, match="`-d` 499: "):
        plan_dataset("499")
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(PlanError, match="`nnUNet_raw` is not set"):
        plan_dataset(str(DATASET_ID))
    monkeypatch.setenv("nnUNet_raw", str(planning.root / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    with pytest.raises(PlanError, match=f"run first: nnUNetv2_extract_fingerprint -d {DATASET_ID}"):
        plan_dataset(str(DATASET_ID))


def test_xfmamba_cannot_be_planned_for_one_channel(planning):
    with pytest.raises(PlanError, match="xfmamba_t takes two groups of channels"):
        plan_dataset(str(DATASET_ID), network="xfmamba_t", gpu_memory_gib=8)


def test_every_network_builds_from_its_architecture():
    for name in planned_network_names():
        network = planned_network(name)
        channels = 2 if name.startswith("xfmamba") else 1
        if name.endswith("_t") or name == "nnmamba":  # the larger ones differ in numbers only
            for dims in network.dims:
                built = network.build(dims, channels, 4)
                assert built.decoder.deep_supervision and built.in_channels == channels
        assert network.architecture(network.dims[0])["network_class_name"].startswith("monai_mamba.nnunet.")
    assert planned_network("MedMamba-T_seg").name == "medmamba_t"


def stock_trainer(planning, tmp_path, change=None, configuration="3d_fullres", trainer_class=None):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    file = planning.preprocessed / "nnMambaPlans.json"
    if not file.exists():
        plan_dataset(str(DATASET_ID), gpu_memory_gib=0.6, precision="float32")
    plans = json.loads(file.read_text())
    plans["continue_training"] = False
    if change is not None:
        change(plans["configurations"][configuration])
    trainer = (trainer_class or nnUNetTrainer)(
        plans,
        configuration,
        0,
        json.loads((planning.preprocessed / "dataset.json").read_text()),
        torch.device("cpu"),
    )
    trainer.output_folder, trainer.log_file = str(tmp_path), str(tmp_path / "log.txt")
    return trainer


def test_stock_trainer_trains_and_predicts_with_the_planned_network(planning, tmp_path):
    from tests.nnunet.test_trainer import random_batch

    trainer = stock_trainer(planning, tmp_path)
    trainer.initialize()
    assert isinstance(trainer.network, PlannedNNMambaSeg)
    assert trainer.train_step(random_batch(trainer))["loss"] < 10
    trainer.set_deep_supervision_enabled(False)
    patch = trainer.configuration_manager.patch_size
    assert trainer.network(torch.randn(1, 1, *patch)).shape == (1, 3, *patch)
    # Prediction builds the network without deep supervision and loads strictly.
    other = type(trainer).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    other.load_state_dict(trainer.network.state_dict())
    assert not other.decoder.deep_supervision


def test_stock_trainer_refuses_plans_with_other_strides(planning, tmp_path):
    def change(configuration):
        configuration["architecture"]["arch_kwargs"]["strides"][1] = [1, 2, 2]

    with pytest.raises(ValueError, match=r"`strides` of the plans must be .* for PlannedNNMambaSeg"):
        stock_trainer(planning, tmp_path, change).initialize()


def test_command_plans_and_reports(planning):
    command = f"monai-mamba nnunet plan -d {DATASET_ID} -c 3d_fullres --gpu-memory 1 --precision float32"
    done = planning.run(*command.split(), "--plans-name", "mine")
    assert "3d_fullres: " in done.stdout and f"nnUNetv2_train {DATASET_ID} 3d_fullres 0 -p mine" in done.stdout
    assert list(json.loads((planning.preprocessed / "mine.json").read_text())["configurations"]) == ["3d_fullres"]
    failed = planning.run(*command.split(), "--network", "unet", check=False)
    assert failed.returncode == 1 and "error: `--network` 'unet' is not known" in failed.stderr
    assert "Traceback" not in failed.stderr
    shutil.rmtree(planning.root / "none", ignore_errors=True)
