"""Compare output heads, normalisations and optimisers of nnMambaTrainer in short nnU-Net runs.

    python benchmarks/nnunet_variants.py Task04_Hippocampus --output benchmarks/results/nnunet_variants.json

Takes some cases of the decathlon's hippocampus set for training, others for testing, plans and preprocesses them with
nnU-Net, trains every variant for the same number of iterations on the same plan and fold, predicts the test cases
without test-time augmentation and writes the Dice of every structure as JSON and as a Markdown table. nnU-Net's
training is not seeded, so single runs differ; ``--repeats`` shows by how much. Every variant runs once before any runs
twice, and runs that the output file holds already are not made again: a table can be made in several sittings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

DATASET_ID = 904
BASE = {"init_filters": 16}
#: name -> (network arguments, optimizer, learning rate); "stock" is nnU-Net's own network and recipe.
VARIANTS: dict[str, tuple[dict, str, float] | None] = {
    "published head AdamW 2e-3": (BASE, "adamw", 2e-3),
    "published head AdamW 5e-4": (BASE, "adamw", 5e-4),
    "published head Adam 2e-4": (BASE, "adam", 2e-4),
    "conv1x1 AdamW 2e-3": (BASE | {"head": "conv1x1"}, "adamw", 2e-3),
    "conv1x1 AdamW 5e-4": (BASE | {"head": "conv1x1"}, "adamw", 5e-4),
    "published head SGD 1e-2": (BASE, "sgd", 1e-2),
    "conv1x1 SGD 1e-2": (BASE | {"head": "conv1x1"}, "sgd", 1e-2),
    "published head AdamW 2e-3, instance norm": (BASE | {"norm": "instance"}, "adamw", 2e-3),
    "published head AdamW 2e-3, no scan": (BASE | {"mixer": "none"}, "adamw", 2e-3),
    "nnU-Net's own network and SGD 1e-2": None,
}


def class_name(index: int) -> str:
    return f"BenchmarkVariant{index}"


def write_trainers(folder: Path) -> None:
    """Write the variants as trainer classes nnU-Net can find."""
    lines = [
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer",
        "from monai_mamba.nnunet.trainer import MambaTrainer, _positive_from_environment",
    ]
    for index, variant in enumerate(VARIANTS.values()):
        if variant is None:
            lines += [
                f"class {class_name(index)}(nnUNetTrainer):",
                "    def __init__(self, plans, configuration, fold, dataset_json, device=None):",
                "        super().__init__(plans, configuration, fold, dataset_json, device)",
                "        self.num_epochs = _positive_from_environment('MONAI_MAMBA_EPOCHS')",
                "        self.num_iterations_per_epoch = _positive_from_environment('MONAI_MAMBA_ITERATIONS')",
                "        self.num_val_iterations_per_epoch = 2",
            ]
            continue
        arguments, optimizer, learning_rate = variant
        lines += [
            f"class {class_name(index)}(MambaTrainer):",
            f"    network_arguments = {arguments!r}",
            f"    optimizer_name = {optimizer!r}",
            f"    learning_rate = {learning_rate!r}",
            "    max_batch_size = 2",
            "    val_iterations_per_epoch = 2",
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark_variants.py").write_text("\n".join(lines) + "\n")


def make_dataset(source: Path, raw: Path, num_train: int, num_test: int, seed: int) -> dict[str, int]:
    """Copy the drawn cases into nnU-Net's layout; return the structures, ``{name: label}``."""
    description = json.loads((source / "dataset.json").read_text())
    # The numbers 2k - 1 and 2k are most likely one person's two sides (hippocampus_pairs.py): at most one is used.
    of_person: dict[int, str] = {}
    for path in sorted((source / "labelsTr").glob("[!.]*.nii.gz")):
        name = path.name[: -len(".nii.gz")]
        of_person.setdefault((int(re.findall(r"\d+", name)[0]) + 1) // 2, name)
    cases = sorted(of_person.values())
    random.Random(seed).shuffle(cases)
    if len(cases) < num_train + num_test:
        raise SystemExit(f"{source} has {len(cases)} persons, {num_train + num_test} are needed")
    for split, names in (("Tr", cases[:num_train]), ("Ts", cases[num_train : num_train + num_test])):
        for kind in ("images", "labels"):
            (raw / f"{kind}{split}").mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(source / "imagesTr" / f"{name}.nii.gz", raw / f"images{split}" / f"{name}_0000.nii.gz")
            shutil.copy(source / "labelsTr" / f"{name}.nii.gz", raw / f"labels{split}" / f"{name}.nii.gz")
    labels = {name.lower(): int(value) for value, name in description["labels"].items()}
    (raw / "dataset.json").write_text(
        json.dumps(
            {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": num_train, "file_ending": ".nii.gz"}
        )
    )
    return {name: value for name, value in labels.items() if value}


def run(command: list[str], environment: dict[str, str], log: Path) -> float:
    began = time.monotonic()
    with log.open("a") as stream:
        subprocess.run(
            [str(Path(sys.executable).with_name(command[0])), *command[1:]],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=True,
        )
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="decathlon-style folder: imagesTr, labelsTr, dataset.json")
    parser.add_argument("--output", type=Path, default=Path("nnunet_variants.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/nnunet_variants"), help="where nnU-Net works")
    parser.add_argument("--train", type=int, default=20, help="training cases, a fifth of which is fold 0's validation")
    parser.add_argument("--test", type=int, default=40, help="untrained cases")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=50, help="per epoch")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    work = arguments.work.resolve()
    raw = work / "raw" / f"Dataset{DATASET_ID}_Benchmark"
    write_trainers(work / "trainers")
    structures = make_dataset(arguments.folder, raw, arguments.train, arguments.test, seed=0)
    environment = os.environ | {
        "nnUNet_raw": str(work / "raw"),
        "nnUNet_preprocessed": str(work / "preprocessed"),
        "nnUNet_results": str(work / "results"),
        "nnUNet_extTrainer": str(work / "trainers"),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "MONAI_MAMBA_EPOCHS": str(arguments.epochs),
        "MONAI_MAMBA_ITERATIONS": str(arguments.iterations),
    }
    log = work / "log.txt"
    plan = f"nnUNetv2_plan_and_preprocess -d {DATASET_ID} -c 3d_fullres -np 1 -npfp 1".split()
    run(plan, environment | {"nnUNet_n_proc_DA": "1"}, log)

    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    done = {(row["variant"], row["repeat"]) for row in rows}
    for repeat in range(arguments.repeats):
        for name in arguments.variants:
            if (name, repeat) in done:
                continue
            rows.append(measure(name, repeat, arguments, raw, structures, environment, log))
            print(json.dumps(rows[-1]), flush=True)
            write_results(arguments, rows, list(structures))


def measure(
    name: str,
    repeat: int,
    arguments: argparse.Namespace,
    raw: Path,
    structures: dict[str, int],
    environment: dict[str, str],
    log: Path,
) -> dict:
    """Train one variant, predict the test cases and score them; return its row."""
    trainer = class_name(list(VARIANTS).index(name))
    work = arguments.work.resolve()
    results = work / "results" / raw.name / f"{trainer}__nnUNetPlans__3d_fullres"
    predictions = work / "predictions" / trainer
    shutil.rmtree(results, ignore_errors=True)
    shutil.rmtree(predictions, ignore_errors=True)
    seconds = run(
        f"nnUNetv2_train {DATASET_ID} 3d_fullres 0 -tr {trainer} -device {arguments.device}".split(), environment, log
    )
    run(
        f"nnUNetv2_predict -i {raw}/imagesTs -o {predictions} -d {DATASET_ID} -c 3d_fullres -f 0 -tr {trainer} "
        f"-device {arguments.device} -npp 1 -nps 1 --disable_tta".split(),
        environment,
        log,
    )
    run(
        f"nnUNetv2_evaluate_folder {raw}/labelsTs {predictions} -djfile {raw}/dataset.json "
        f"-pfile {results}/plans.json -np 1".split(),
        environment,
        log,
    )
    summary = json.loads((predictions / "summary.json").read_text())
    return {
        "variant": name,
        "repeat": repeat,
        "dice": {structure: summary["mean"][str(label)]["Dice"] for structure, label in structures.items()},
        "iterations": arguments.epochs * arguments.iterations,
        "train_seconds": round(seconds, 1),
    }


def write_results(arguments: argparse.Namespace, rows: list[dict], structures: list[str]) -> None:
    import nnunetv2  # noqa: F401 - its version is reported below
    import torch

    import monai_mamba

    from importlib.metadata import version  # isort: skip

    report = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "monai-mamba": monai_mamba.__version__,
            "nnunetv2": version("nnunetv2"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "cases": {"train": arguments.train, "test": arguments.test},
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    table = [
        "| variant | iterations | " + " | ".join(f"Dice {s}" for s in structures) + " | training, s |",
        "|" + " --- |" * (len(structures) + 3),
    ]
    for row in rows:
        dice = " | ".join(f"{row['dice'][s]:.3f}" for s in structures)
        table.append(f"| {row['variant']} | {row['iterations']} | {dice} | {row['train_seconds']:.0f} |")
    arguments.output.with_suffix(".md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
