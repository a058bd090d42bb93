"""Compare output heads, normalisations and optimisers of nnMambaTrainer in short nnU-Net runs.

    OMP_NUM_THREADS=1 python benchmarks/nnunet_variants.py Task04_Hippocampus --repeats 3 \\
        --output benchmarks/results/nnunet_variants.json

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
import random
import shutil
import statistics
from pathlib import Path

from nnunet_runs import TRAINERS, Job, cases_by_person, provenance, write_raw

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
    "conv1x1 AdamW 2e-3, instance norm": (BASE | {"head": "conv1x1", "norm": "instance"}, "adamw", 2e-3),
    "published head AdamW 2e-3, no scan": (BASE | {"mixer": "none"}, "adamw", 2e-3),
    "nnU-Net's own network and SGD 1e-2": None,
}


def class_name(name: str) -> str:
    return "BenchmarkNNUNet" if VARIANTS[name] is None else f"BenchmarkVariant{list(VARIANTS).index(name)}"


def write_trainers(folder: Path) -> None:
    """Write the variants as trainer classes nnU-Net can find."""
    lines = ["from monai_mamba.nnunet.trainer import MambaTrainer"]
    for name, variant in VARIANTS.items():
        if variant is None:
            continue
        arguments, optimizer, learning_rate = variant
        lines += [
            f"class {class_name(name)}(MambaTrainer):",
            f"    network_arguments = {arguments!r}",
            f"    optimizer_name = {optimizer!r}",
            f"    learning_rate = {learning_rate!r}",
            "    max_batch_size = 2",
            "    val_iterations_per_epoch = 2",
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark_variants.py").write_text("\n".join(lines) + "\n")


def draw_cases(source: Path, num_train: int, num_test: int, seed: int) -> tuple[list[str], list[str]]:
    """Draw training and test cases, at most one of a person."""
    cases = sorted(names[0] for names in cases_by_person(source).values())
    random.Random(seed).shuffle(cases)
    if len(cases) < num_train + num_test:
        raise SystemExit(f"{source} has {len(cases)} persons, {num_train + num_test} are needed")
    return cases[:num_train], cases[num_train : num_train + num_test]


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
    structures = write_raw(
        arguments.folder, raw, *draw_cases(arguments.folder, arguments.train, arguments.test, seed=0)
    )
    job = Job(
        work,
        {
            "nnUNet_extTrainer": os.pathsep.join([str(work / "trainers"), str(TRAINERS)]),
            "MONAI_MAMBA_EPOCHS": str(arguments.epochs),
            "MONAI_MAMBA_ITERATIONS": str(arguments.iterations),
        },
    )
    job.plan(DATASET_ID, "3d_fullres")

    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    done = {(row["variant"], row["repeat"]) for row in rows}
    for repeat in range(arguments.repeats):
        for name in arguments.variants:
            if (name, repeat) in done:
                continue
            rows.append(measure(name, repeat, arguments, raw, structures, job))
            print(json.dumps(rows[-1]), flush=True)
            write_results(arguments, rows, list(structures))
    write_results(arguments, rows, list(structures))


def measure(
    name: str, repeat: int, arguments: argparse.Namespace, raw: Path, structures: dict[str, int], job: Job
) -> dict:
    """Train one variant, predict the test cases and score them; return its row."""
    trainer = class_name(name)
    results = job.work / "results" / raw.name / f"{trainer}__nnUNetPlans__3d_fullres"
    predictions = job.work / "predictions" / trainer
    shutil.rmtree(results, ignore_errors=True)
    shutil.rmtree(predictions, ignore_errors=True)
    seconds, _ = job.run(f"nnUNetv2_train {DATASET_ID} 3d_fullres 0 -tr {trainer} -device {arguments.device}")
    job.run(
        f"nnUNetv2_predict -i {raw}/imagesTs -o {predictions} -d {DATASET_ID} -c 3d_fullres -f 0 -tr {trainer} "
        f"-device {arguments.device} -npp 1 -nps 1 --disable_tta"
    )
    job.run(
        f"nnUNetv2_evaluate_folder {raw}/labelsTs {predictions} -djfile {raw}/dataset.json "
        f"-pfile {results}/plans.json -np 1"
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
    report = {
        **provenance(arguments.device),
        "cases": {"train": arguments.train, "test": arguments.test},
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    table = [
        "| variant | iterations | runs | " + " | ".join(f"Dice {s}" for s in structures) + " | mean Dice (lowest) |",
        "|" + " --- |" * (len(structures) + 4),
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        means = [statistics.mean(row["dice"].values()) for row in runs]
        dice = " | ".join(", ".join(f"{row['dice'][s]:.3f}" for row in runs) for s in structures)
        table.append(
            f"| {variant} | {runs[0]['iterations']} | {len(runs)} | {dice} | "
            f"{statistics.mean(means):.3f} ({min(means):.3f}) |"
        )
    arguments.output.with_suffix(".md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
