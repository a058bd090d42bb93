from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from monai_mamba.cli.main import main
from monai_mamba.quickstart.commands import NnunetJob, commands_for_own_data


@pytest.fixture
def job(tmp_path):
    return NnunetJob(tmp_path / "nnunet", 1, "Tiny", "nnMambaTrainerQuick", 3, "cpu", 7)


def test_commands_carry_every_choice(job):
    train = " ".join(job.train_command())
    for part in ("--epochs 3", "--seed 7", "1 3d_fullres 0", "-tr nnMambaTrainerQuick", "-device cpu", "--c"):
        assert part in train
    predict = " ".join(job.predict_command())
    for part in ("-tr nnMambaTrainerQuick", "-f 0", f"-i {job.raw / 'imagesTs'}", f"-o {job.predictions}"):
        assert part in predict


def test_commands_without_epochs_leave_the_length_to_the_trainer(job):
    assert "--epochs" not in NnunetJob(job.root, 1, "Tiny", "T", None, "cpu", 0).train_command()


def test_environment_points_into_the_run_and_keeps_the_users_workers(job):
    environment = job.environment({"nnUNet_raw": "/elsewhere", "nnUNet_def_n_proc": "6", "PATH": "/bin"})
    assert environment["nnUNet_raw"] == str(job.root / "raw")
    assert (environment["nnUNet_def_n_proc"], environment["nnUNet_n_proc_DA"]) == ("6", "0")


def test_planner_never_gets_zero_threads(job):
    assert int(job.plan_environment({"nnUNet_n_proc_DA": "0"})["nnUNet_n_proc_DA"]) >= 1
    assert job.plan_environment({"nnUNet_n_proc_DA": "5"})["nnUNet_n_proc_DA"] == "5"


def test_commands_for_own_data_name_trainer_and_configuration():
    text = commands_for_own_data("nnMambaTrainer")
    assert "nnUNetv2_train 123 3d_fullres 0 -tr nnMambaTrainer" in text and "--verify_dataset_integrity" in text


BAD_INPUT = {
    "missing-label": lambda d: d.label("case_002").unlink(),
    "truncated-image": lambda d: d.image("case_002").write_bytes(d.image("case_002").read_bytes()[:400]),
    "empty-json": lambda d: (d.folder / "dataset.json").write_text(""),
    "too-few-cases": lambda d: (d.description.update(training=d.description["training"][:5]), d.save()),
}


@pytest.mark.parametrize("spoil", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_data_set_exits_1_with_one_line_and_writes_nothing(decathlon, tmp_path, capsys, spoil):
    spoil(decathlon)
    output = tmp_path / "run"
    assert main(["quickstart", "--dataset", str(decathlon.folder), "--output", str(output), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(decathlon.folder) in error
    assert not output.exists()


def test_output_with_foreign_content_is_refused_and_left_alone(decathlon, tmp_path, capsys):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter.tex").write_text("text")
    assert main(["quickstart", "--dataset", str(decathlon.folder), "--output", str(output)]) == 1
    assert "not the output of a quickstart" in capsys.readouterr().err
    assert [p.name for p in output.iterdir()] == ["chapter.tex"]


def test_epochs_for_a_trainer_of_nnunet_are_refused(decathlon, tmp_path, capsys):
    args = ["--dataset", str(decathlon.folder), "--output", str(tmp_path / "run"), "--trainer", "nnUNetTrainer"]
    assert main(["quickstart", *args, "--epochs", "3"]) == 1
    assert "`epochs` is only understood by" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option", [["--epochs", "0"], ["--device", "tpu"], ["--seed", "-1"]], ids=["epochs", "device", "seed"]
)
def test_impossible_option_is_wrong_usage(tmp_path, capsys, option):
    assert main(["quickstart", "--output", str(tmp_path / "run"), *option]) == 2
    assert not (tmp_path / "run").exists()


def _start(args, **kwargs):
    environment = os.environ | {"MONAI_MAMBA_ITERATIONS": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "monai_mamba", "quickstart", *args],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs,
    )  # fmt: skip


@pytest.mark.timeout(1200)  # a minute or two of work, most of it imports; much longer on a busy machine
def test_quickstart_from_data_to_report_interrupted_and_resumed(make_decathlon, tmp_path):
    data = make_decathlon(num_cases=7, shape=(24, 24, 24))
    held_out = data.names[-2:]
    data.description["held_out"] = held_out
    data.save()
    output = tmp_path / "run"
    args = ["--dataset", str(data.folder), "--output", str(output), "--device", "cpu", "--epochs", "3"]

    with _start(args) as first:
        assert first.stdout is not None
        seen = []
        for line in first.stdout:
            seen.append(line)
            if "Train nnMambaTrainerQuick" in line and "1/3" in line:
                # The line comes before nnU-Net saves the epoch.
                while first.poll() is None and not list(output.rglob("checkpoint_latest.pth")):
                    time.sleep(0.01)
                first.send_signal(signal.SIGINT)
        assert first.wait(timeout=60) == 130, "".join(seen)
    assert f"--output {output}" in seen[-1]
    assert not (output / "report.html").exists()
    state = json.loads((output / "run.json").read_text())
    assert set(state["steps"]) == {"data", "plan"}

    with _start(["--output", str(output)]) as second:
        out, _ = second.communicate(timeout=900)
    assert second.returncode == 0, out
    assert "Plan and preprocess" not in out

    metrics = json.loads((output / "metrics.json").read_text())
    assert 0.0 <= metrics["mean_dice"] <= 1.0
    assert set(metrics["per_class"]) == {"left", "right"}
    assert sorted(metrics["cases"]) == held_out
    assert metrics["run"]["num_training"] == 5 and metrics["run"]["num_epochs"] == 3
    html = (output / "report.html").read_text()
    assert "data:image/png;base64," in html and "<h2>Training</h2>" in html

    split = json.loads((output / "nnunet/preprocessed/Dataset001_Tinyset/splits_final.json").read_text())
    used = {name for fold in split for part in fold.values() for name in part}
    assert used == set(data.names[:-2]), "a held-out case must never be trained on or validated with"
    logs = list((output / "nnunet/results").rglob("training_log_*.txt"))
    assert len(logs) == 2, "the second start must continue the first training"
    assert "Epoch 0" not in max(logs, key=lambda f: f.stat().st_mtime_ns).read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quickstart_as_a_user_starts_it_reaches_dice_of_070(tmp_path):
    output = tmp_path / "run"
    subprocess.run([sys.executable, "-m", "monai_mamba", "quickstart", "--output", str(output)], check=True)
    metrics = json.loads((output / "metrics.json").read_text())
    assert len(metrics["cases"]) == 8
    assert metrics["mean_dice"] >= 0.70
