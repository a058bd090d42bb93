"""Trainings recorded by MLflow in a local database; skipped where it is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUNDLES = Path(__file__).parents[2] / "bundles"


def test_mlflow_records_losses_validation_and_configuration(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    bundle = tmp_path / "bundles" / "xfmamba"
    shutil.copytree(BUNDLES / "xfmamba" / "configs", bundle / "configs")
    small = ["--network_def#depths", "[1,1]", "--network_def#dims", "16", "--limit", "32", "--max_epochs", "2"]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train.json", *small]
    done = subprocess.run(
        [*command, "--tracking", "mlflow"],
        cwd=bundle,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    client = mlflow.tracking.MlflowClient(f"sqlite:///{bundle / 'eval' / 'mlruns.db'}")
    experiment = client.get_experiment_by_name("monai_experiment")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    best = json.loads((bundle / "models" / "model.json").read_text())
    values = {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, "val_auc")}
    assert sorted(values) == [1, 2] and values[best["epoch"]] == pytest.approx(best["value"])
    assert len(client.get_metric_history(run.info.run_id, "train_loss")) >= 4
