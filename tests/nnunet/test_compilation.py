"""``nnUNet_compile=measure``: what is decided, that nothing else changes, and what happens where compiling fails."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from monai_mamba.nnunet.compilation import (
    MeasuredCompilation,
    compile_setting,
    measuring_conditions,
    refusal_to_measure,
)
from monai_mamba.nnunet.guard import GradientGuard, NonFiniteGradients
from monai_mamba.nnunet.lookup import find_trainer
from tests.nnunet.conftest import DATASET_ID, random_batch

TRIAL = "p" * 10 + "c" * 3 + "pc" * 15
CONDITIONS = {"device": "this one", "torch": "2", "patch_size": [8], "batch_size": 2}


class Training:
    """A training in miniature, with everything that a step can change, and a clock that is told what steps take.

    Args:
        seconds: of a step, from its number and "p" (plain) or "c" (compiled).
        failure: ``(place, number)``: where the compiled network fails, and from which step on.
    """

    def __init__(self, seconds=lambda number, kind: 1.0, failure=None, scaler=False, **attributes):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-2)
        self.scaler = torch.amp.GradScaler("cpu") if scaler else None
        self.guard = GradientGuard()
        self.guard.watch(self.optimizer)
        self.seconds, self.failure = seconds, failure
        self.kinds, self.lines, self.now, self.num_compiled = "", [], 0.0, 0
        self.number = 0
        self.batches = torch.Generator().manual_seed(1)
        self.compilation = MeasuredCompilation(
            self.network,
            self.optimizer,
            self.scaler,
            self.guard,
            torch.device("cpu"),
            compile=self.compile,
            conditions=CONDITIONS,
            log=self.lines.append,
            clock=lambda: self.now,
        )
        self.compilation.steps_left = 1000
        for name, value in attributes.items():
            setattr(self.compilation, name, value)

    def compile(self, network):
        self.num_compiled += 1
        self.fail("compiling")
        return lambda x: network(x)

    def fail(self, place):
        if self.failure is not None and self.failure[0] == place and self.number >= self.failure[1]:
            raise RuntimeError(f"no luck in {place}\nwith details")

    def step(self):
        batch = torch.randn(6, 4, generator=self.batches)
        with self.guard.count():
            loss = self.compilation.step(lambda network: self.train(network, batch))
        self.number += 1
        return loss

    def train(self, network, batch):
        is_compiled = network is not self.network
        self.optimizer.zero_grad(set_to_none=True)
        self.now += self.seconds(self.number, "c" if is_compiled else "p")
        output = network(batch)
        if is_compiled:
            self.fail("the forward pass")
            output.register_hook(lambda _: self.fail("the backward pass"))
        loss = output.square().mean()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            if is_compiled:
                self.fail("clipping")
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if is_compiled:
            self.fail("what follows the optimizer")
        self.kinds += "c" if is_compiled else "p"
        return loss.item()

    def run(self, steps):
        return [self.step() for _ in range(steps)]

    def result(self):
        """Everything that a plain training would leave."""
        return [*self.network.state_dict().values(), torch.get_rng_state()]


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a.result(), b.result(), strict=True))


def wins(count):
    """Compiled steps that take half a plain one's time in so many pairs, and longer in the others."""
    return lambda number, kind: 1.0 if kind == "p" else 0.5 if (number - 13) // 2 < count else 1.1


@pytest.mark.parametrize(
    ("seconds", "is_compiled"),
    [
        pytest.param(lambda number, kind: 0.8 if kind == "c" else 1.0, True, id="faster"),
        pytest.param(lambda number, kind: 1.2 if kind == "c" else 1.0, False, id="slower"),
        pytest.param(lambda number, kind: 0.98 if kind == "c" else 1.0, False, id="within the margin"),
        pytest.param(wins(12), True, id="faster in 12 of 15 pairs"),
        pytest.param(wins(11), False, id="faster in 11 of 15 pairs"),
        pytest.param(lambda number, kind: 1.0 if number < 10 else 0.5, False, id="all faster after the warm-up"),
        pytest.param(lambda number, kind: (0.8 if kind == "c" else 1.0) * number, True, id="all slowing down"),
    ],
)
def test_faster_steps_stay_and_every_step_is_one_of_the_training(seconds, is_compiled):
    training = Training(seconds)
    losses = training.run(60)
    assert training.kinds == TRIAL + ("c" if is_compiled else "p") * 17
    assert training.num_compiled == 1
    assert training.compilation.decision.is_compiled is is_compiled
    assert training.compilation.steps_left == 1000 - 60
    plain = Training(steps_left=0)
    assert plain.run(60) == losses
    assert_equal(training, plain)


def test_log_names_both_times_their_ratio_the_time_of_compiling_and_the_decision():
    training = Training(lambda number, kind: 31.0 if number == 10 else 0.75 if kind == "c" else 1.0)
    training.run(60)
    (line,) = training.lines
    assert line == (
        "nnUNet_compile=measure: plain step 1 (1 to 1) s, compiled 0.75 (0.75 to 0.75) s, ratio 0.75 (0.75 to 0.75), "
        "the compiled one faster in 15 of 15 pairs; compiling took 30 s, which 121 steps win back, 957 are left; "
        "training steps stay compiled"
    )
    training = Training(lambda number, kind: 31.0 if number == 10 else 1.0)
    training.run(60)
    assert training.lines[0].endswith("faster in 0 of 15 pairs; compiling took 30 s; training stays plain")


@pytest.mark.parametrize(
    ("steps_left", "seconds", "message"),
    [
        (43, 100.0, "43 steps are left, fewer than measuring takes; training stays plain"),
        (500, 0.2, "490 steps of 0.2 s are left, too few to win back the time of compiling; training stays plain"),
    ],
)
def test_nothing_is_compiled_where_it_cannot_pay(steps_left, seconds, message):
    training = Training(lambda *_: seconds, steps_left=steps_left)
    training.run(43)
    assert training.kinds == "p" * 43 and training.num_compiled == 0
    assert training.lines == [f"nnUNet_compile=measure: {message}"]
    assert training.compilation.state() is None  # a longer training shall measure
    longer = Training(lambda *_: seconds, steps_left=(44 if steps_left == 43 else 2000))
    longer.run(43)
    assert longer.num_compiled == 1


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("compiling", 10),
        *itertools.product(("the forward pass", "the backward pass", "clipping"), (10, 14, 55)),
    ],
)
def test_failing_compiled_step_is_repeated_plain_as_if_nothing_had_been(place, number):
    # Steps 10, 14 and 55 are the first compiled one, one of those in turns, one after the decision.
    training = Training(wins(15), failure=(place, number), scaler=True)
    losses = training.run(60)
    assert training.kinds == (TRIAL + "c" * 17)[:number] + "p" * (60 - number)
    failures = [line for line in training.lines if "failed" in line]
    assert failures == [
        f"nnUNet_compile=measure: a compiled step failed (RuntimeError: no luck in {place}); it is repeated plain, and "
        "training stays plain"
    ]
    assert training.compilation.decision.is_compiled is False
    plain = Training(steps_left=0, scaler=True)
    assert plain.run(60) == losses
    assert_equal(training, plain)
    assert training.scaler.state_dict() == plain.scaler.state_dict()


def test_failure_of_the_plain_step_too_is_raised_as_always():
    training = Training(failure=("the forward pass", 10))
    training.run(10)

    def fail(*_):
        raise ValueError("the batch is at fault")

    training.network.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="the batch is at fault"):
        training.step()
    assert training.kinds == "p" * 10
    assert "failed (ValueError: the batch is at fault)" in training.lines[0]


def test_failure_after_the_optimizers_step_is_raised_and_the_step_not_repeated():
    training = Training(failure=("what follows the optimizer", 10))
    training.run(10)
    with pytest.raises(RuntimeError, match="what follows the optimizer"):
        training.step()
    assert training.optimizer.state[training.network[0].weight]["step"] == 11
    assert training.lines == []


def test_diverged_training_is_no_failure_of_compiling():
    training = Training(wins(15))
    training.run(50)
    training.guard.max_consecutive = 2
    with torch.no_grad():
        training.network[3].bias.fill_(float("nan"))
    with pytest.raises(NonFiniteGradients, match="2 steps in a row"):
        training.run(2)
    assert training.compilation.decision.is_compiled


def test_decision_is_taken_over_under_the_same_conditions_only():
    first = Training(lambda number, kind: 31.0 if number == 10 else 0.75 if kind == "c" else 1.0)
    assert first.compilation.state() is None
    first.run(60)
    state = json.loads(json.dumps(first.compilation.state()))
    assert state["plain_s"] == 1 and state["compiled_s"] == 0.75 and state["compile_s"] == 30.25

    second = Training()
    second.compilation.resume(state)
    second.run(3)
    assert second.kinds == "ccc"
    assert "as decided before: plain step 1 (1 to 1) s, compiled 0.75" in second.lines[0]
    assert second.compilation.state() == state

    short = Training(steps_left=121)  # the time of compiling is not spent yet
    short.compilation.resume(state)
    short.run(3)
    assert short.kinds == "ppp"
    assert short.lines[1:] == [
        "nnUNet_compile=measure: 121 steps are left, too few to compile again for; training stays plain"
    ]
    assert short.compilation.state() == state

    for name, value in {"device": "another", "torch": "3", "patch_size": [16], "batch_size": 3}.items():
        other = Training()
        other.compilation.resume(state | {"conditions": CONDITIONS | {name: value}})
        assert other.compilation.decision is None
        assert other.lines == [f"nnUNet_compile=measure: decided for another {name} before; measuring again"]
        other.run(11)
        assert other.kinds == TRIAL[:11]
    for foreign in (None, "compiled", {"is_compiled": True}):
        other = Training()
        other.compilation.resume(foreign)
        assert other.compilation.decision is None and not other.lines


def test_failure_is_remembered_by_a_resumed_training():
    first = Training(failure=("compiling", 0))
    first.run(20)
    second = Training()
    second.compilation.resume(first.compilation.state())
    second.run(20)
    assert second.kinds == "p" * 20 and second.num_compiled == 0
    assert "as decided before: a compiled step failed (RuntimeError: no luck in compiling)" in second.lines[0]


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        (None, "off"),
        ("", "off"),
        *[(text, "on") for text in ("true", "1", "t", "True")],
        *[(text, "off") for text in ("false", "0", "f", "F")],
        *[(text, "measure") for text in ("measure", "Measure")],
    ],
)
def test_setting_is_read_as_nnunet_reads_it(monkeypatch, text, setting):
    monkeypatch.delenv("nnUNet_compile")
    if text is not None:
        monkeypatch.setenv("nnUNet_compile", text)
    assert compile_setting() == setting


def test_wrong_setting_is_refused_before_training(make_trainer, monkeypatch):
    monkeypatch.setenv("nnUNet_compile", "mesure")
    message = r"`nnUNet_compile` must be true, 1 or t, false, 0 or f, or measure, got 'mesure'; correct it or unset it"
    with pytest.raises(ValueError, match=message):
        make_trainer("nnMambaTrainerQuickNoSSM", "2d")


def test_devices_and_processes_where_nothing_is_compiled():
    assert refusal_to_measure(torch.device("cpu"), False) is None
    assert refusal_to_measure(torch.device("cuda"), False) is None
    assert "cpu and cuda only" in refusal_to_measure(torch.device("mps"), False)
    assert "several processes" in refusal_to_measure(torch.device("cuda"), True)


def test_conditions_are_plain_values():
    conditions = measuring_conditions(torch.device("cpu"), np.array([8, 16]), np.int64(2))
    assert json.loads(json.dumps(conditions)) == conditions
    assert type(conditions["torch"]) is str and "threads" in conditions["device"]


@pytest.fixture
def measuring(make_trainer, monkeypatch):
    """Build trainers that measure with few steps, their times given: compiled ones take half as long."""
    from monai_mamba.nnunet.trainer import MambaTrainer

    numbers = {"num_warmup": 1, "num_compiled_warmup": 1, "num_pairs": 1, "min_pairs_won": 1, "least_compile_s": 0.0}
    for name, value in numbers.items():
        monkeypatch.setattr(MeasuredCompilation, name, value)

    def make(name, *arguments, backend="eager", setting="measure", **keywords):
        monkeypatch.setattr(MambaTrainer, "compile_backend", backend)
        monkeypatch.setenv("nnUNet_compile", setting)
        torch.manual_seed(0)
        trainer = make_trainer(name, *arguments, **keywords)
        trainer.on_train_epoch_start()
        if setting == "measure":
            clock = iter(range(1 << 30))
            # Each step asks twice; the plain ones are twice as long.
            trainer._compilation.clock = lambda: next(clock) * (0.5 if trainer._compilation.is_next_compiled else 1.0)
        return trainer

    torch._dynamo.reset()
    yield make
    torch._dynamo.reset()


def assert_same_weights(trainer, other, **tolerance):
    for (key, value), expected in zip(
        trainer.network.state_dict().items(), other.network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, **({"rtol": 0, "atol": 0} | tolerance), msg=key)


def test_measured_training_is_the_plain_one_with_its_checkpoints_validation_and_resume(
    measuring, monkeypatch, tmp_path
):
    quick = find_trainer("nnMambaTrainerQuick")
    monkeypatch.setattr(quick, "network_arguments", quick.network_arguments | {"num_blocks": 1})  # seconds less
    arguments = {"configuration": "2d", "patch_size": (32, 32)}
    trainer = measuring("nnMambaTrainerQuick", **arguments)
    plain = measuring("nnMambaTrainerQuick", **arguments, setting="0")
    network, parameters = trainer.network, {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    batches = [random_batch(trainer) for _ in range(6)]
    for batch in batches[:5]:  # one plain, one compiled, one of each, one compiled
        assert trainer.train_step(batch)["loss"] == plain.train_step(batch)["loss"]
    assert trainer._compilation.decision.is_compiled
    assert "training steps stay compiled" in Path(trainer.log_file).read_text()
    assert trainer.network is network
    assert {id(p) for p in network.parameters()} == parameters
    assert_same_weights(trainer, plain)

    num_frames = torch._dynamo.utils.counters["frames"]["ok"]
    assert num_frames, "nothing was compiled"
    network.eval()
    with torch.no_grad():
        loss = trainer.validation_step(batches[0])["loss"]
        plain.network.eval()
        assert loss == plain.validation_step(batches[0])["loss"]
        trainer.set_deep_supervision_enabled(False)
        assert torch.is_tensor(trainer.network(batches[0]["data"]))
    trainer.set_deep_supervision_enabled(True)
    for one in (trainer, plain):
        one.save_checkpoint(str(tmp_path / f"{id(one)}.pth"))
    saved, expected = (torch.load(tmp_path / f"{id(one)}.pth", weights_only=False) for one in (trainer, plain))
    assert list(saved["network_weights"]) == list(expected["network_weights"])
    assert saved["compilation"]["is_compiled"] and expected["compilation"] is None

    resumed = measuring("nnMambaTrainerQuick", **arguments)
    resumed.load_checkpoint(str(tmp_path / f"{id(trainer)}.pth"))
    assert resumed._compilation.decision == trainer._compilation.decision
    for one in (trainer, plain, resumed):
        one.current_epoch = 1
        one.on_train_epoch_start()
        one.train_step(batches[5])
    assert torch._dynamo.utils.counters["frames"]["ok"] == num_frames, "compiled again"
    assert trainer._compilation.is_next_compiled and resumed._compilation.is_next_compiled
    assert_same_weights(resumed, plain)
    del saved["compilation"]  # as earlier versions wrote it
    torch.save(saved, tmp_path / "earlier.pth")
    resumed = measuring("nnMambaTrainerQuick", **arguments)
    resumed.load_checkpoint(str(tmp_path / "earlier.pth"))
    assert resumed._compilation.decision is None


def test_trainer_whose_network_cannot_be_compiled_trains_on(measuring):
    arguments = {"configuration": "2d", "patch_size": (32, 32)}
    trainer = measuring("nnMambaTrainerBatchNorm", **arguments, backend="no_such_backend")
    plain = measuring("nnMambaTrainerBatchNorm", **arguments, setting="0")
    for _ in range(3):
        batch = random_batch(trainer)
        assert trainer.train_step(batch)["loss"] == plain.train_step(batch)["loss"]
    assert_same_weights(trainer, plain)
    text = Path(trainer.log_file).read_text()
    assert text.count("a compiled step failed (InvalidBackend: Invalid backend: 'no_such_backend'") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "configuration"),
    [
        ("nnMambaTrainer", "3d_fullres"),
        ("nnMambaTrainerNoSSM", "3d_fullres"),
        ("nnMambaTrainerNoAMP", "2d"),
        ("nnMambaTrainerPublished", "2d"),
        ("nnMambaTrainerNoDeepSupervision", "2d"),
        ("MedMambaTrainer", "2d"),
        ("MedMambaTrainerNoSSM", "2d"),
        ("XFMambaTrainer", "2d"),
        ("XFMambaTrainerNoSSM", "2d"),
        ("nnMambaLandmarkTrainer", "3d_fullres"),
        ("nnMambaClassifierTrainer", "3d_fullres"),
    ],
)
def test_compiled_step_of_every_network_equals_the_plain_one(measuring, planned, request, name, configuration):
    if "Classifier" in name:
        path = planned.preprocessed / "classes.json"
        path.write_text(json.dumps({"classes": ["a", "b"], "cases": {f"case_{i}": i % 2 for i in range(6)}}))
        request.addfinalizer(path.unlink)
    patch_size = (32, 32) if configuration == "2d" else (16, 32, 32)
    channels = 2 if name.startswith("XF") else 1
    trainers = [
        measuring(name, configuration, patch_size=patch_size, channels=channels, backend="aot_eager", setting=setting)
        for setting in ("measure", "0")
    ]
    batch = random_batch(trainers[0])
    if "Landmark" in name:
        batch["target"] = torch.rand(2, 2, 3) * torch.tensor(patch_size)
    if "Classifier" in name:
        batch["target"] = torch.tensor([0, 1])
    batch["data"] = batch["data"].double()
    losses = []
    for trainer in trainers:
        trainer.network.double()  # in float32 a few steps turn rounding into per cents
        torch.manual_seed(1)  # for stochastic depth
        losses.append([float(trainer.train_step(batch)["loss"]) for _ in range(5)])
    assert trainers[0]._compilation.decision.is_compiled, Path(trainers[0].log_file).read_text()
    # Plain, compiled, plain, compiled, compiled.
    assert len(set(losses[0])) == 5
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


EXTERNAL_TRAINER = """
from monai_mamba.nnunet.compilation import MeasuredCompilation
from nnunet_trainers.nnMambaTrainer import nnMambaTrainerQuick

MeasuredCompilation.least_compile_s = 0.0  # this training is too short to compile for


class MeasuredTrainer(nnMambaTrainerQuick):
    network_arguments = nnMambaTrainerQuick.network_arguments | {"num_blocks": 1}
"""


@pytest.mark.slow
def test_stock_command_measures_with_the_real_compiler_and_continues(fresh_results, tmp_path):
    if subprocess.run([sys.executable, "-c", "import timm"], capture_output=True).returncode:
        pytest.skip("timm does not import: torchvision?")
    folders = fresh_results
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "MeasuredTrainer.py").write_text(EXTERNAL_TRAINER)
    search = os.pathsep.join([str(tmp_path / "trainers"), os.environ.get("nnUNet_extTrainer", "")])
    command = f"nnUNetv2_train {DATASET_ID} 2d 0 -tr MeasuredTrainer -device cpu".split()
    extra = {
        "nnUNet_compile": "measure",
        "nnUNet_extTrainer": search,
        "OMP_NUM_THREADS": "1",
        "MONAI_MAMBA_ITERATIONS": "25",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    folders.run(*command, **extra, MONAI_MAMBA_EPOCHS="3", timeout=1500)
    fold = folders.results / "MeasuredTrainer__nnUNetPlans__2d" / "fold_0"
    (log,) = fold.glob("training_log_*.txt")
    (line,) = [line for line in log.read_text().splitlines() if "nnUNet_compile=measure" in line]
    assert "plain step" in line and "compiling took" in line
    checkpoint = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert len(checkpoint["logging"]["train_losses"]) == 3 and np.isfinite(checkpoint["logging"]["train_losses"]).all()
    assert not [key for key in checkpoint["network_weights"] if "_orig_mod" in key]
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert np.isfinite(summary["foreground_mean"]["Dice"])
    # Whichever was faster here, a training that goes on with compiled steps is what is tried.
    checkpoint["compilation"] |= {"is_compiled": True, "plain_s": 100.0, "compiled_s": 1.0}
    torch.save(checkpoint, fold / "checkpoint_latest.pth")
    (fold / "checkpoint_final.pth").unlink()
    result = folders.run(*command, "--c", **extra, MONAI_MAMBA_EPOCHS="4", timeout=1500)
    assert "as decided before: plain step" in result.stdout
    assert "failed" not in result.stdout
    final = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert len(final["logging"]["train_losses"]) == 4 and np.isfinite(final["logging"]["train_losses"]).all()
    assert final["compilation"] == checkpoint["compilation"]
