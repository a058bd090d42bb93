"""The run: check the data, let nnU-Net plan, train and predict, then score and report. Every step can be resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from monai_mamba import diagnostics
from monai_mamba.errors import RunError
from monai_mamba.files import write_text
from monai_mamba.quickstart import dataset as datasets
from monai_mamba.quickstart.commands import CONFIGURATION, NnunetJob, commands_for_own_data
from monai_mamba.quickstart.process import run_logged
from monai_mamba.quickstart.run_folder import RunFolder
from monai_mamba.quickstart.training_log import LogParser, read_training_logs

if TYPE_CHECKING:
    from monai_mamba.quickstart.progress import RunProgress

DEFAULT_TRAINER = "nnMambaTrainerQuick"
DEFAULT_SEED = 0
DATASET_ID = 1

PACKAGED_NOTICE = (
    "Images: Medical Segmentation Decathlon, Task04 Hippocampus, Vanderbilt University Medical Center, CC BY-SA 4.0 "
    "(Antonelli et al., Nature Communications 13, 4128, 2022)."
)

#: nnU-Net's own length of a training.
NNUNET_EPOCHS = 1000
NNUNET_ITERATIONS_PER_EPOCH = 250

HELD_OUT_BY_DATA_SET = "the data set"

REPORT = "report.html"
METRICS = "metrics.json"


@dataclass(frozen=True)
class Result:
    """What a run left: the two files and the mean Dice of the cases that were not trained on."""

    report: Path
    metrics: Path
    mean_dice: float | None
    num_iterations: int


def run_quickstart(
    output: Path,
    progress: RunProgress,
    dataset_folder: Path | None = None,
    trainer: str | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    device: str = "auto",
) -> Result:
    """Run or resume the whole path in ``output``.

    Options that are None are those the run was started with, or the defaults.

    Args:
        output: folder of the run; new, empty, or of an earlier run.
        progress: display.
        dataset_folder: a data set in the decathlon's layout; None for the sample that comes with the package.
        trainer: trainer class, of this package or nnU-Net's own.
        epochs: length of the training; only trainers of this package take it.
        seed: for the draw of held-out cases and the training.
        device: ``auto`` (CUDA if there is one, else the CPU), ``cpu``, ``cuda`` or ``mps``.

    Raises:
        DatasetError: if the data is not fit; nothing has been written then.
        RunError: if the output folder is taken, an option contradicts the run or a step fails.
    """
    run = RunFolder.read(output)
    data_path = None if dataset_folder is None else str(dataset_folder.resolve())
    recorded = run.settle("dataset", data_path, None)
    trainer = str(run.settle("trainer", trainer, DEFAULT_TRAINER))
    epochs = run.settle("epochs", epochs, None)
    seed = int(run.settle("seed", seed, DEFAULT_SEED))
    trainer_class = _check_trainer(trainer, epochs)
    device = _choose_device(device)

    if "data" not in run.steps:
        source = datasets.read_dataset(datasets.PACKAGED_DATASET if recorded is None else Path(recorded))
        training, held_out = datasets.split_cases(source, seed)
        run.settle("data_digest", datasets.fingerprint(source), None)
        progress.start("Check data", len(source.cases))
        seen: list[str] = []

        def count(case: datasets.Case) -> None:
            seen.append(case.name)
            progress.update(len(seen), len(source.cases))

        remarks = datasets.check_dataset(source, count)
        progress.finish(f"{len(training)} cases for training and validation, {len(held_out)} held out")
        run.options |= {
            "dataset_name": source.name,
            "labels": {str(value): name for value, name in source.labels.items()},
            "num_training": len(training),
            "held_out": [case.name for case in held_out],
            "held_out_by": HELD_OUT_BY_DATA_SET if source.held_out else f"drawing a quarter with seed {seed}",
            "remarks": remarks,
        }

    job = NnunetJob(output / "nnunet", DATASET_ID, run.options["dataset_name"], trainer, epochs, device, seed)
    with run.locked():
        run.save()
        for remark in run.options["remarks"]:
            progress.say(f"  note: {remark}", style="yellow")
        if "data" not in run.steps:
            run.step("data", lambda: datasets.write_nnunet_raw(source, training, held_out, job.raw))
        _run_nnunet(run, job, progress, epochs or getattr(trainer_class, "epochs", None))
        return _report(run, job, progress, _iterations_per_epoch(trainer_class))


def _run_nnunet(run: RunFolder, job: NnunetJob, progress: RunProgress, num_epochs: int | None) -> None:
    logs = run.path / "logs"

    def plan() -> None:
        shutil.rmtree(job.preprocessed, ignore_errors=True)
        progress.start("Plan and preprocess (nnU-Net)")

        def on_line(line: str) -> None:
            if match := re.search(r"(\d+)/(\d+) \[", line):
                progress.update(int(match[1]), int(match[2]))

        _run_command("plan", job.plan_command(), job.plan_environment(), logs, on_line)
        progress.finish()

    def train() -> None:
        parser = LogParser()
        progress.start(f"Train {job.trainer} on {job.device}", num_epochs)

        def on_line(line: str) -> None:
            if epoch := parser.feed(line):
                dice = " ".join(f"{value:.2f}" for value in epoch.dice)
                note = f"loss {epoch.train_loss:.3f}, validation Dice {dice}" if epoch.train_loss is not None else ""
                progress.update(epoch.number + 1, num_epochs, note)

        _run_command("train", job.train_command(), job.environment(), logs, on_line)
        epochs = read_training_logs(job.results)
        progress.finish(f"{len(epochs)} epochs")

    def predict() -> None:
        shutil.rmtree(job.predictions, ignore_errors=True)
        total = len(run.options["held_out"])
        progress.start("Predict the held-out cases", total)
        done = 0

        def on_line(line: str) -> None:
            nonlocal done
            if re.search(r"\bdone with ", line):
                done += 1
                progress.update(done, total)

        _run_command("predict", job.predict_command(), job.environment(), logs, on_line)
        progress.finish(f"{total} cases")

    run.step("plan", plan)
    run.step("train", train)
    run.step("predict", predict)


def _run_command(
    name: str, command: list[str], environment: dict[str, str], logs: Path, on_line: Callable[[str], None]
) -> None:
    try:
        run_logged(command, logs / f"{name}.log", environment, on_line)
    except RunError as error:
        raise RunError(f"step {name!r} failed: nnU-Net {error}") from error


def _report(run: RunFolder, job: NnunetJob, progress: RunProgress, iterations_per_epoch: int) -> Result:
    from monai_mamba.evaluation.segmentation import Labels, evaluate_folder
    from monai_mamba.quickstart.report import ReportContent, render

    labels = Labels({name: (int(value),) for value, name in run.options["labels"].items()})
    progress.start("Evaluate and write the report")
    start = time.perf_counter()
    evaluation = evaluate_folder(job.predictions, job.raw / "labelsTs", labels)
    evaluation_s = time.perf_counter() - start
    epochs = read_training_logs(job.results)
    facts = {
        "dataset": run.options["dataset_name"],
        "num_training": run.options["num_training"],
        "held_out": run.options["held_out"],
        "held_out_by": run.options["held_out_by"],
        "cases_are_patients": run.options["held_out_by"] != HELD_OUT_BY_DATA_SET,
        "remarks": run.options["remarks"],
        "dataset_notice": None if run.options["dataset"] else PACKAGED_NOTICE,
        "trainer": job.trainer,
        "configuration": CONFIGURATION,
        "num_epochs": len(epochs),
        "num_iterations": len(epochs) * iterations_per_epoch,
        "seed": job.seed,
        "device": _describe_device(job.device),
        "seconds": {name: round(seconds, 1) for name, seconds in (run.steps | {"evaluate": evaluation_s}).items()},
        "versions": diagnostics.collect_versions(),
    }
    write_text(run.path / METRICS, json.dumps({**evaluation.as_dict(), "run": facts}, indent=2, allow_nan=False) + "\n")
    content = ReportContent(
        facts=facts,
        evaluation=evaluation,
        epochs=epochs,
        images=job.raw / "imagesTs",
        references=job.raw / "labelsTs",
        predictions=job.predictions,
        commands=commands_for_own_data(),
        full_length_iterations=NNUNET_EPOCHS * NNUNET_ITERATIONS_PER_EPOCH,
    )
    write_text(run.path / REPORT, render(content))
    progress.finish()
    return Result(run.path / REPORT, run.path / METRICS, evaluation.mean_dice, len(epochs) * iterations_per_epoch)


def _check_trainer(trainer: str, epochs: int | None) -> type | None:
    """Refuse a trainer that nnU-Net would not find, or that takes no number of epochs, before anything is written.

    Returns:
        The class if it is one of this package, None for another one.
    """
    from monai_mamba.nnunet.lookup import find_trainer

    found = find_trainer(trainer)
    if found is not None:
        return found
    if epochs is not None:
        raise RunError(
            f"`epochs` is only understood by the trainers of this package, and {trainer} is none of them; "
            "leave it out or use a trainer such as nnMambaTrainer"
        )
    search = diagnostics.check_trainers(trainer)
    if not search["ok"]:
        raise RunError(f"`trainer` {trainer} is not found by nnU-Net: {search['reason']}")
    return None


def _iterations_per_epoch(trainer_class: type | None) -> int:
    from monai_mamba.nnunet.trainer import ITERATIONS_VARIABLE

    set_by_user = os.environ.get(ITERATIONS_VARIABLE) if trainer_class else None
    return int(set_by_user or getattr(trainer_class, "iterations_per_epoch", None) or NNUNET_ITERATIONS_PER_EPOCH)


def _choose_device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("`device` cuda was asked for, but torch finds no CUDA device; `monai-mamba doctor` tells more")
    if device == "mps" and not torch.backends.mps.is_available():
        raise RunError("`device` mps was asked for, but torch finds no MPS device; use cpu")
    return device


def _describe_device(device: str) -> str:
    import torch

    if device == "cuda":
        return f"CUDA, {torch.cuda.get_device_name()}"
    if device != "cpu":
        return device.upper()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
