"""The trainer class by itself: network, losses, optimiser groups, checkpoints that survive kill -9."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from monai_mamba.errors import CheckpointError, RunError
from monai_mamba.networks import NNMambaSeg, create_model
from monai_mamba.nnunet.checkpoint import load_or_previous, previous_path, replace_atomically
from monai_mamba.nnunet.guard import GradientGuard, NonFiniteGradients
from monai_mamba.nnunet.randomness import capture_random_state, restore_random_state
from monai_mamba.weights import to_published
from tests.nnunet.conftest import random_batch


@pytest.mark.parametrize(
    ("name", "patch_size"),
    [
        ("nnMambaTrainerQuick", (40, 56, 40)),
        ("nnMambaTrainerQuick", (20, 48, 48)),
        ("nnMambaTrainerQuick", (10, 32, 32)),
        ("nnMambaTrainerQuickNoSSM", (20, 48, 48)),
        ("nnMambaTrainerNoDeepSupervision", (10, 32, 32)),
    ],
    ids=str,
)
def test_training_step_and_prediction_for_anisotropic_patches(make_trainer, name, patch_size):
    trainer = make_trainer(name, patch_size=patch_size)
    loss = trainer.train_step(random_batch(trainer))["loss"]
    assert np.isfinite(loss)
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        logits = trainer.network(torch.randn(1, 1, *patch_size))
    assert logits.shape == (1, 3, *patch_size)


@pytest.mark.parametrize("name", ["MedMambaTrainer", "MedMambaTrainerNoSSM"])
def test_medmamba_trains_and_predicts_slices(make_trainer, name):
    trainer = make_trainer(name, "2d", patch_size=(40, 56))
    assert np.isfinite(trainer.train_step(random_batch(trainer))["loss"])
    trainer.set_deep_supervision_enabled(False)
    assert trainer.network(torch.randn(1, 1, 40, 56)).shape == (1, 3, 40, 56)
    with pytest.raises(ValueError, match="use the configuration 2d"):
        make_trainer(name, "3d_fullres")


def test_xfmamba_needs_two_groups_of_channels(make_trainer):
    with pytest.raises(ValueError, match="`in_channels` must be even"):
        make_trainer("XFMambaTrainer", "2d")


@pytest.mark.slow
@pytest.mark.parametrize("patch_size", [(20, 320, 320), (10, 224, 224)], ids=str)
def test_training_step_and_prediction_for_full_size_anisotropic_patches(make_trainer, patch_size):
    trainer = make_trainer(patch_size=patch_size)
    assert np.isfinite(trainer.train_step(random_batch(trainer))["loss"])
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        assert trainer.network(torch.randn(1, 1, *patch_size)).shape == (1, 3, *patch_size)


def test_deep_supervision_switch_obeys_the_variant(make_trainer):
    trainer = make_trainer("nnMambaTrainerQuick")
    trainer.set_deep_supervision_enabled(True)
    assert trainer.network.decoder.deep_supervision
    assert len(trainer.loss.weight_factors) == 4 and min(trainer.loss.weight_factors) > 0
    assert sum(trainer.loss.weight_factors) == pytest.approx(1)
    trainer = make_trainer("nnMambaTrainerNoDeepSupervision")
    trainer.set_deep_supervision_enabled(True)
    assert not trainer.network.decoder.deep_supervision


def test_state_space_parameters_do_not_decay(make_trainer):
    trainer = make_trainer()
    decaying, exempt = trainer.optimizer.param_groups
    assert decaying["weight_decay"] > 0 and exempt["weight_decay"] == 0
    names = {id(p): n for n, p in trainer.network.named_parameters()}
    assert {names[id(p)].rsplit("mamba.", 1)[1] for p in exempt["params"]} == {"A_log", "D", "dt_proj.bias"}
    assert len(decaying["params"]) + len(exempt["params"]) == len(names)


@pytest.mark.parametrize(
    ("name", "optimizer", "head", "norm"),
    [
        ("nnMambaTrainer", torch.optim.AdamW, "Conv3d", "InstanceNorm3d"),
        ("nnMambaTrainerNoSSM", torch.optim.AdamW, "Conv3d", "InstanceNorm3d"),
        ("nnMambaTrainerBatchNorm", torch.optim.AdamW, "Conv3d", "BatchNorm3d"),
        ("nnMambaTrainerPublishedNetwork", torch.optim.AdamW, "DoubleConv", "BatchNorm3d"),
        ("nnMambaTrainerPublished", torch.optim.Adam, "DoubleConv", "BatchNorm3d"),
        ("nnMambaTrainerSGD", torch.optim.SGD, "Conv3d", "InstanceNorm3d"),
    ],
)
def test_variants_differ_as_named(make_trainer, name, optimizer, head, norm):
    trainer = make_trainer(name)
    assert type(trainer.optimizer) is optimizer
    assert type(trainer.network.decoder.seg_layers[0]).__name__ == head
    norms = {type(m).__name__ for m in trainer.network.modules() if "Norm3d" in type(m).__name__}
    assert norms == {norm}


def test_length_from_the_environment(make_trainer, monkeypatch):
    monkeypatch.setenv("MONAI_MAMBA_EPOCHS", "7")
    monkeypatch.setenv("MONAI_MAMBA_ITERATIONS", "3")
    trainer = make_trainer()
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (7, 3)
    assert trainer.num_val_iterations_per_epoch == trainer.val_iterations_per_epoch
    assert make_trainer("nnMambaTrainerNoSSM").num_val_iterations_per_epoch == 1
    monkeypatch.setenv("MONAI_MAMBA_EPOCHS", "-1")
    with pytest.raises(ValueError, match="`MONAI_MAMBA_EPOCHS` must be a positive whole number, got '-1'"):
        make_trainer()


@pytest.mark.parametrize(("variable", "cores", "expected"), [("1", 3, 1), ("2,1", 3, 2), ("8", 2, 2), ("", 2, 2)])
def test_threads_keep_to_the_environment_and_the_cores_of_the_process(
    make_trainer, monkeypatch, variable, cores, expected
):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    torch.set_num_threads(3)  # as nnU-Net sets it to all cores of the computer
    try:
        make_trainer()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_no_amp_variant_computes_in_float32(make_trainer):
    trainer = make_trainer("nnMambaTrainerNoAMP", patch_size=(10, 32, 32))
    assert trainer.grad_scaler is None
    # On this machine only the wrapper can be seen at work: autocast is off inside, whatever it is outside.
    seen = []
    trainer.network.encoder.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cuda")))
    with torch.no_grad():
        trainer.network(torch.randn(2, 1, 10, 32, 32))
    assert seen == [False]


def test_step_without_finite_gradients_is_skipped_and_a_series_stops_the_run(make_trainer):
    trainer = make_trainer(patch_size=(10, 32, 32))
    good, bad = random_batch(trainer), random_batch(trainer)
    bad["data"][0, 0, 0, 0, 0] = float("nan")
    trainer.train_step(good)
    before = {name: value.clone() for name, value in trainer.network.named_parameters()}
    outputs = [trainer.train_step(bad)]
    assert not np.isfinite(outputs[0]["loss"])
    for name, value in trainer.network.named_parameters():
        assert torch.equal(value, before[name]), name
    outputs.append({"loss": np.array(0.5)})
    trainer.on_train_epoch_end(outputs)
    assert trainer.logger.get_value("train_losses", step=-1) == 0.5
    assert "1 of 2 losses" in open(trainer.log_file).read()
    trainer._guard.max_consecutive = 3
    trainer.train_step(bad)
    with pytest.raises(NonFiniteGradients, match="3 steps in a row"):
        trainer.train_step(bad)


def test_steps_that_the_gradient_scaler_skips_count_too():
    """On CUDA in float16 the scaler leaves the optimizer's step out; the scaler of a CPU does the same."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler = torch.amp.GradScaler("cpu")
    guard = GradientGuard(max_consecutive=3)
    guard.watch(optimizer)

    def step(factor):
        optimizer.zero_grad()
        with guard.count():
            scaler.scale((weight * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()

    step(float("inf"))
    step(float("inf"))
    step(1.0)
    assert guard.num_skipped == 2 and weight.grad is not None
    step(float("nan"))
    step(float("nan"))
    with pytest.raises(NonFiniteGradients, match="3 steps in a row"):
        step(float("nan"))


def test_random_state_survives_a_checkpoint(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(size=3).tolist(), torch.rand(3).tolist()  # noqa: NPY002

    draw()
    torch.save(capture_random_state(), tmp_path / "state.pth")
    first = draw()
    assert draw() != first
    restore_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert draw() == first


def test_plans_of_another_network_are_refused(make_trainer):
    make_trainer(network="monai_mamba.networks.NNMambaSeg")
    with pytest.raises(ValueError, match=r"made for monai_mamba\.networks\.MedMambaSeg.*choose the trainer"):
        make_trainer(network="monai_mamba.networks.MedMambaSeg")


def test_checkpoint_of_another_trainer_or_configuration_is_refused(make_trainer, tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    make_trainer("MedMambaTrainerNoSSM", "2d").save_checkpoint(str(path))
    trainer = make_trainer("nnMambaTrainerQuick", "2d")
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"was written by MedMambaTrainerNoSSM.*-tr MedMambaTrainerNoSSM"):
        trainer.load_checkpoint(str(path))
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    trainer.save_checkpoint(str(path))
    with pytest.raises(CheckpointError, match="of the configuration 2d, this is 3d_fullres"):
        make_trainer("nnMambaTrainerQuick").load_checkpoint(str(path))
    torch.save({"network_weights": trainer.network.state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of a training.*MONAI_MAMBA_WEIGHTS"):
        trainer.load_checkpoint(str(path))


@pytest.mark.parametrize(
    ("name", "network", "channels", "probe"),
    [
        ("MedMambaTrainer", "medmamba_t", 1, "encoder.layers"),
        ("XFMambaTrainer", "vmamba_t", 2, "encoder.backbone.layers"),
        ("nnMambaTrainerBatchNorm", "nnmamba_seg_2d", 1, "encoder.stem"),
    ],
)
def test_published_weights_are_where_training_starts(
    make_trainer, monkeypatch, tmp_path, name, network, channels, probe
):
    """A file in the published layout, with three image channels and other classes, as it can be downloaded."""
    source = create_model(network, **({"in_channels": 1} if network.startswith("nnmamba") else {"in_channels": 3}))
    with torch.no_grad():
        for index, parameter in enumerate(source.parameters()):
            parameter.fill_(1 + index / 1000)
    torch.save({"model": to_published(source)}, tmp_path / "published.pth")
    monkeypatch.setenv("MONAI_MAMBA_WEIGHTS", str(tmp_path / "published.pth"))
    trainer = make_trainer(name, "2d", patch_size=(64, 64), channels=channels)
    values = torch.cat([p.detach().flatten() for p in trainer.network.get_submodule(probe).parameters()])
    assert values.min() >= 1 and values.max() < 2
    assert "Published weights: " in open(trainer.log_file).read()
    if name == "nnMambaTrainerBatchNorm":
        with pytest.raises(CheckpointError, match=r"normalises over the batch.*-tr nnMambaTrainerBatchNorm"):
            make_trainer("nnMambaTrainer", "2d", patch_size=(64, 64))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match=r"published\.pth: its names"):
        make_trainer(name, "2d", patch_size=(64, 64), channels=channels)


def test_worker_that_died_is_explained(make_trainer, monkeypatch):
    trainer = make_trainer("nnMambaTrainerQuickNoSSM", "2d")
    monkeypatch.setattr(type(trainer).__mro__[-2], "run_training", _complain)

    class Killed:
        exitcode = -9

    trainer.worker_processes = [Killed()]
    with pytest.raises(
        RunError, match=r"ended by signal 9, almost always because memory ran out \(.* GiB .*nnUNet_n_proc_DA"
    ):
        trainer.run_training()
    trainer.worker_processes = []
    with pytest.raises(RunError, match="every case can be read"):
        trainer.run_training()


def _complain(_trainer):
    raise RuntimeError("One or more background workers are no longer alive. Exiting.")


def test_checkpoint_round_trip_continues_the_run(make_trainer, tmp_path):
    trainer = make_trainer(patch_size=(10, 32, 32))
    trainer.train_step(random_batch(trainer))
    trainer.logger.log("train_losses", np.float32(0.5), 0)
    trainer.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    other = make_trainer(patch_size=(10, 32, 32))
    other.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert other.current_epoch == 1
    for (name, a), b in zip(trainer.network.state_dict().items(), other.network.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    batch = random_batch(trainer)
    assert trainer.train_step(batch)["loss"] == other.train_step(batch)["loss"]


@pytest.mark.parametrize("name", ["nnMambaTrainerQuick", "nnMambaTrainerPublishedNetwork"])
def test_pretrained_weights_load_into_a_network_for_other_classes(make_trainer, tmp_path, name):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    trainer = make_trainer(name, patch_size=(10, 32, 32))
    trainer.save_checkpoint(str(tmp_path / "checkpoint_final.pth"))
    network = NNMambaSeg(3, 1, 9, deep_supervision=True, **trainer.network_arguments)
    load_pretrained_weights(network, str(tmp_path / "checkpoint_final.pth"))
    source = trainer.network.state_dict()
    for key, value in network.state_dict().items():
        if ".seg_layers." not in key:
            assert torch.equal(value, source[key]), key


def test_damaged_checkpoint_gives_way_to_the_previous_one(make_trainer, tmp_path, caplog):
    trainer = make_trainer(patch_size=(10, 32, 32))
    path = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    trainer.current_epoch = 41
    trainer.save_checkpoint(str(path))
    assert load_or_previous(path, torch.device("cpu"))["current_epoch"] == 42
    path.write_bytes(path.read_bytes()[:1000])
    trainer.load_checkpoint(str(path))
    assert trainer.current_epoch == 1
    assert "checkpoint_latest.previous.pth instead" in caplog.text
    previous_path(path).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint could be loaded"):
        trainer.load_checkpoint(str(path))


def test_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    torch.save({"network_weights": Payload()}, tmp_path / "checkpoint_latest.pth")
    with pytest.raises(CheckpointError):
        load_or_previous(tmp_path / "checkpoint_latest.pth", torch.device("cpu"))
    assert not canary.exists()


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    path.write_bytes(b"old")

    def write(name):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device", name)

    with pytest.raises(OSError, match="No space left"):
        replace_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_kill_9_during_saving_never_leaves_less_than_a_whole_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(patch_size=(10, 32, 32))
    trainer.train_step(random_batch(trainer))
    path = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    began = time.monotonic()
    trainer.save_checkpoint(str(path))
    duration = time.monotonic() - began
    rng = random.Random(0)
    interrupted = 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            while True:  # save until killed
                trainer.current_epoch += 1
                trainer.save_checkpoint(str(path))
        time.sleep(rng.uniform(0.5, 2.5) * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += bool(list(tmp_path.glob(".*.tmp")))
        newest = torch.load(path, map_location="cpu", weights_only=False)  # the file nnU-Net itself would read
        assert newest["network_weights"].keys() == trainer.network.state_dict().keys()
        assert load_or_previous(previous_path(path), torch.device("cpu"))["current_epoch"] >= 1
    assert interrupted >= 5, "the kills hit no write: the test proves nothing"


@pytest.mark.parametrize("patch_size", [(0, 32, 32), (16, 32.5, 32), (32,)], ids=str)
def test_plans_with_impossible_patches_are_refused(make_trainer, patch_size):
    with pytest.raises(ValueError, match="`patch_size` of the plans 'nnUNetPlans' must be two or three positive whole"):
        make_trainer(patch_size=patch_size)


def test_patch_with_one_deepest_voxel_is_refused_before_training(make_trainer):
    with pytest.raises(ValueError, match=r"`patch_size` \[16, 16, 16\] of the plans .* one voxel at 1/16 resolution"):
        make_trainer(patch_size=(16, 16, 16))
    make_trainer(patch_size=(16, 16, 32))
    make_trainer("nnMambaTrainerBatchNorm", patch_size=(16, 16, 16))
