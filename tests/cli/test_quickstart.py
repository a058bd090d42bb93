from __future__ import annotations

import os
import signal

import pytest

from monai_mamba.cli.main import main
from monai_mamba.errors import RunError
from monai_mamba.quickstart import pipeline
from monai_mamba.quickstart.pipeline import Result


@pytest.fixture
def replaced_run(monkeypatch):
    def replace(function) -> None:
        monkeypatch.setattr(pipeline, "run_quickstart", function)

    return replace


def test_options_reach_the_run(replaced_run, tmp_path, capsys):
    seen = []

    def run(output, progress, *options):
        seen.append((output, *options))
        return Result(output / "report.html", output / "metrics.json", 0.75, 500)

    replaced_run(run)
    args = ["--output", str(tmp_path), "--trainer", "T", "--epochs", "4", "--seed", "9", "--device", "cpu"]
    assert main(["quickstart", *args, "--dataset", str(tmp_path / "data")]) == 0
    assert seen == [(tmp_path, tmp_path / "data", "T", 4, 9, "cpu")]
    out = capsys.readouterr().out
    assert "0.750" in out and str(tmp_path / "report.html") in out and "500 iterations" in out


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_exits_130_and_says_how_to_continue(replaced_run, tmp_path, capsys, name):
    before = signal.getsignal(signal.SIGTERM)
    replaced_run(lambda *_: os.kill(os.getpid(), getattr(signal, name)))
    assert main(["quickstart", "--output", str(tmp_path)]) == 130
    assert f"monai-mamba quickstart --output {tmp_path}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_run_under_nohup_outlives_the_terminal(replaced_run, tmp_path):
    def run(output, *_):
        os.kill(os.getpid(), signal.SIGHUP)
        return Result(output / "report.html", output / "metrics.json", None, 1)

    replaced_run(run)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["quickstart", "--output", str(tmp_path)]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_failed_step_exits_1_with_one_line(replaced_run, tmp_path, capsys):
    def run(*_):
        raise RunError("step 'train' failed: nnU-Net ended with exit code 1: ValueError: x (log: train.log)")

    replaced_run(run)
    assert main(["quickstart", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: step 'train' failed")
