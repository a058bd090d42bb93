"""The commands users type, through the installed and unmodified nnU-Net, on a tiny data set."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from tests.nnunet.conftest import DATASET_ID

SHORT = {"MONAI_MAMBA_EPOCHS": "1", "MONAI_MAMBA_ITERATIONS": "2"}


def _nnunet_search_works() -> bool:
    # nnU-Net's search for foreign trainers imports timm, which needs a torchvision that matches torch.
    return subprocess.run([sys.executable, "-c", "import timm"], capture_output=True).returncode == 0


needs_nnunet_search = pytest.mark.skipif(not _nnunet_search_works(), reason="timm does not import: torchvision?")


def assert_is_prediction(path: Path, image: Path) -> None:
    prediction, original = sitk.ReadImage(str(path)), sitk.ReadImage(str(image))
    assert prediction.GetSize() == original.GetSize()
    assert prediction.GetSpacing() == pytest.approx(original.GetSpacing())
    assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= {0, 1, 2}


@needs_nnunet_search
def test_stock_commands_train_and_predict_3d_fullres(fresh_results):
    folders = fresh_results
    trained = folders.run(
        *f"nnUNetv2_train {DATASET_ID} 3d_fullres 0 -tr nnMambaTrainerQuick -device cpu".split(), **SHORT
    )
    assert "Using trainer 'nnMambaTrainerQuick'" in trained.stdout
    fold = folders.results / "nnMambaTrainerQuick__nnUNetPlans__3d_fullres" / "fold_0"
    assert (fold / "checkpoint_final.pth").exists()
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert np.isfinite(summary["foreground_mean"]["Dice"])
    output = folders.root / "prediction"
    folders.run(
        *f"nnUNetv2_predict -i {folders.raw}/imagesTs -o {output} -d {DATASET_ID} -c 3d_fullres -f 0".split(),
        *"-tr nnMambaTrainerQuick -device cpu -npp 1 -nps 1".split(),
    )
    assert_is_prediction(output / "case_6.nii.gz", folders.raw / "imagesTs" / "case_6_0000.nii.gz")


def test_wrapper_commands_train_resume_and_predict_2d_without_startup_file(fresh_results):
    folders = fresh_results
    off = {"MONAI_MAMBA_NO_STARTUP": "1", "nnUNet_extTrainer": ""}
    train = (
        f"monai-mamba nnunet train {DATASET_ID} 2d 0 -tr nnMambaTrainerQuickNoSSM -device cpu --iterations 2".split()
    )
    folders.run(*train, "--epochs", "1", **off)
    fold = folders.results / "nnMambaTrainerQuickNoSSM__nnUNetPlans__2d" / "fold_0"
    # A longer run continues where the shorter one stopped.
    shutil.move(fold / "checkpoint_final.pth", fold / "checkpoint_latest.pth")
    folders.run(*train, "--epochs", "2", "--c", **off)
    final = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert final["current_epoch"] == 2
    assert len(final["logging"]["train_losses"]) == 2
    output = folders.root / "prediction_2d"
    folders.run(
        *f"monai-mamba nnunet predict -i {folders.raw}/imagesTs -o {output} -d {DATASET_ID} -c 2d -f 0".split(),
        *"-tr nnMambaTrainerQuickNoSSM -device cpu -npp 1 -nps 1".split(),
        **off,
    )
    assert_is_prediction(output / "case_6.nii.gz", folders.raw / "imagesTs" / "case_6_0000.nii.gz")


#: A training that dies of signal 9 with half of a checkpoint written, by its own hand: no race with a killer outside.
MORTAL = """
import os, signal, sys, torch
from nnunet_trainers import nnMambaTrainer as module


def die_halfway(checkpoint, name, save=torch.save):
    save(checkpoint, name)
    os.truncate(name, os.path.getsize(name) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


class MortalTrainer(module.nnMambaTrainerQuickNoSSM):
    network_arguments = {"init_filters": 16, "num_blocks": 1, "mixer": "none"}

    def save_checkpoint(self, filename):
        if str(self.current_epoch) == os.environ.get("DIE_IN_EPOCH"):
            torch.save = die_halfway
        super().save_checkpoint(filename)

    def on_train_start(self):
        super().on_train_start()
        self.logger.plot_progress_png = lambda folder: None  # takes longer than the epoch

    def perform_actual_validation(self, save_probabilities=False):
        pass  # this test is about the training


module.MortalTrainer = MortalTrainer
from monai_mamba.cli.main import main
sys.exit(main())
"""


def test_training_resumed_after_kill_9_equals_an_uninterrupted_one(fresh_results, tmp_path):
    """Bit for bit on a CPU without background workers: weights, optimizer and random generators continue."""
    folders = fresh_results
    (tmp_path / "mortal.py").write_text(MORTAL)
    command = [sys.executable, str(tmp_path / "mortal.py")]
    command += f"nnunet train {DATASET_ID} 2d 0 -tr MortalTrainer -device cpu".split()
    command += "--epochs 4 --iterations 1 --seed 7".split()

    def start(results, *options, **extra):
        environment = folders.environment(nnUNet_results=str(tmp_path / results), PYTHONPATH=_paths(), **extra)
        with (tmp_path / f"{results}.txt").open("a") as log:
            return subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=subprocess.STDOUT)

    def fold(results):
        return tmp_path / results / folders.dataset_name / "MortalTrainer__nnUNetPlans__2d" / "fold_0"

    assert start("whole").wait(500) == 0, (tmp_path / "whole.txt").read_text()
    killed_run = start("killed", DIE_IN_EPOCH="2")
    assert killed_run.wait(500) == -signal.SIGKILL, (tmp_path / "killed.txt").read_text()
    files = {path.name for path in fold("killed").glob("*.pth*")} | {p.name for p in fold("killed").glob(".*.tmp")}
    assert {"checkpoint_latest.pth", "checkpoint_latest.previous.pth", ".checkpoint_latest.pth.tmp"} <= files
    assert "checkpoint_final.pth" not in files
    assert start("killed", "--c").wait(500) == 0, (tmp_path / "killed.txt").read_text()
    whole, resumed = (
        torch.load(fold(results) / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        for results in ("whole", "killed")
    )
    log = (tmp_path / "killed.txt").read_text()
    assert [log.count(f": Epoch {epoch}\n") for epoch in range(4)] == [1, 1, 2, 1], "it did not continue at epoch 2"
    assert resumed["logging"]["train_losses"] == whole["logging"]["train_losses"]
    assert len(set(whole["logging"]["train_losses"])) == 4
    for name, value in whole["network_weights"].items():
        assert torch.equal(value, resumed["network_weights"][name]), name
    left = {path.name for path in fold("killed").iterdir()}
    assert not left & {"checkpoint_latest.pth", "checkpoint_latest.previous.pth", ".checkpoint_latest.pth.tmp"}


def _paths() -> str:
    """The project as this process finds it, for a script that lies elsewhere."""
    return os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])


def test_damaged_case_is_named_when_a_background_worker_dies_of_it(fresh_results):
    folders = fresh_results
    files = sorted((folders.preprocessed / "nnUNetPlans_2d").glob("case_?.b2nd"))
    contents = [file.read_bytes() for file in files]
    try:
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content[: len(content) // 3])
        result = folders.run(
            *f"nnUNetv2_train {DATASET_ID} 2d 0 -tr nnMambaTrainerQuickNoSSM -device cpu".split(),
            check=False,
            nnUNet_n_proc_DA="1",
            **SHORT,
        )
    finally:
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
    assert result.returncode
    assert "a background worker of the data loading stopped at case case_" in result.stderr.strip().splitlines()[-1]


def test_unknown_trainer_is_reported_by_nnunet(planned):
    result = planned.run(
        *f"monai-mamba nnunet train {DATASET_ID} 2d 0 -tr nnMambaTrainerr -device cpu".split(), check=False
    )
    assert result.returncode
    assert "nnMambaTrainerr" in result.stderr


@needs_nnunet_search
def test_wheel_in_a_fresh_environment_registers_the_trainers_and_uninstall_removes_them(tmp_path):
    """The start-up file of the wheel, its opt-out, a user's own folder, and nothing left behind."""
    source = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    # The dependencies of the outer environment as a plain path: its own start-up files do not run from there.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("nnUNet_", "MONAI_MAMBA_", "PYTHON"))}

    def run(code: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, "-c", code], env=environment | extra, capture_output=True, text=True, cwd=tmp_path
        )

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "-q", *arguments], check=True, capture_output=True, cwd=tmp_path)

    show = "import os; print(os.environ.get('nnUNet_extTrainer', ''))"
    find = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "print(find('nnMambaTrainer').__name__)"
    )
    assert run(show).stdout.strip() == ""
    pip("install", "--no-deps", "--no-index", str(wheel))
    assert run(show).stdout.strip() == str(site / "nnunet_trainers")
    assert run(show, MONAI_MAMBA_NO_STARTUP="1").stdout.strip() == ""
    assert run(show, nnUNet_extTrainer="/mine").stdout.strip().split(os.pathsep)[0] == "/mine"
    found = run(find)
    assert found.stdout.strip().endswith("nnMambaTrainer"), found.stderr
    assert f"from: {site / 'nnunet_trainers'}" in found.stdout
    pip("uninstall", "-y", "monai-mamba")
    assert run(show).stdout.strip() == ""
    assert not [p.name for p in site.iterdir() if "mamba" in p.name or "nnunet_trainers" in p.name]


def test_startup_file_is_cheap_and_never_raises():
    spec = importlib.util.find_spec("_monai_mamba_startup")
    assert spec is not None, "the package is not installed: pip install -e ."
    code = "import sys, _monai_mamba_startup as s; s.register(); print([m for m in sys.modules if 'torch' in m])"
    for environment in ({}, {"nnUNet_extTrainer": os.pathsep * 3}):
        result = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == "[]"
        assert not result.stderr
