from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from monai_mamba import __version__, diagnostics
from monai_mamba.ops import backends
from monai_mamba.ops.chunked import TorchBackend


def test_versions_name_what_is_and_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(diagnostics, "PACKAGES", ("torch", "no-such-distribution"))
    versions = diagnostics.collect_versions()
    assert versions["monai-mamba"] == __version__
    assert versions["torch"] is not None and torch.__version__.startswith(versions["torch"])
    assert versions["no-such-distribution"] is None


def test_versions_import_no_heavy_package():
    code = "import sys; from monai_mamba import diagnostics as d; d.collect_versions(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_backends_list_every_registered_one_with_a_reason():
    found = diagnostics.collect_backends()
    assert [b["name"] for b in found] == [b.name for b in backends.list_backends()]
    assert all(b["reason"] for b in found)


def test_chosen_backend_follows_the_environment(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert diagnostics.chosen_backends()["cpu"]["selective_scan"] == "reference"


def test_chosen_backend_tells_why_there_is_none(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "no-such-backend")
    assert "no-such-backend" in diagnostics.chosen_backends()["cuda"]["selective_scan"]


def test_scan_check_passes_here_within_its_tolerances():
    check = diagnostics.check_scan()
    assert check["ok"], check
    assert 0 < check["forward_error"] <= diagnostics.SELF_CHECK_TOLERANCE


@pytest.fixture
def replaced_backend(monkeypatch):
    """Make a given backend the only one that is registered, and so the one that is checked."""

    def replace(backend: backends.Backend) -> None:
        monkeypatch.setattr(backends, "_REGISTRY", {"torch": backend})

    return replace


def test_scan_check_fails_for_a_wrong_forward_pass(replaced_backend):
    class Wrong(TorchBackend):
        def scan_forward(self, *args):
            y, states = super().scan_forward(*args)
            return y * 1.001, states

    replaced_backend(Wrong())
    check = diagnostics.check_scan()
    assert not check["ok"]
    assert "differs from the sequential definition" in check["reason"]


def test_scan_check_fails_for_a_wrong_gradient(replaced_backend):
    class Wrong(TorchBackend):
        def scan_backward(self, *args):
            grad_u, *rest = super().scan_backward(*args)
            return grad_u * 1.01, *rest

    replaced_backend(Wrong())
    check = diagnostics.check_scan()
    assert not check["ok"] and check["forward_error"] <= diagnostics.SELF_CHECK_TOLERANCE


def test_scan_check_reports_nan_and_crash_instead_of_raising(replaced_backend):
    class Nan(TorchBackend):
        def scan_forward(self, *args):
            y, states = super().scan_forward(*args)
            return y * float("nan"), states

    class Crash(TorchBackend):
        def scan_forward(self, *args):
            raise OSError("undefined symbol: selective_scan")

    replaced_backend(Nan())
    assert "NaN" in diagnostics.check_scan()["reason"]
    replaced_backend(Crash())
    assert "undefined symbol" in diagnostics.check_scan()["reason"]


def test_trainer_search_finds_a_trainer_of_an_external_folder(tmp_path, monkeypatch):
    folder = tmp_path / "nnunet_trainers"
    folder.mkdir()
    (folder / "doctor_probe.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class DoctorProbeTrainer(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    found = diagnostics.check_trainers("DoctorProbeTrainer")
    # Where torchvision does not fit torch, the search fails for every external trainer: then there must be a reason.
    assert found["external_folder"] == str(folder)
    assert found["ok"] or "torchvision" in found["reason"]


def test_trainer_search_tells_why_a_trainer_is_not_found():
    found = diagnostics.check_trainers("NoSuchTrainerAnywhere")
    assert not found["ok"]
    assert "NoSuchTrainerAnywhere" in found["reason"] or "torchvision" in found["reason"]
