"""nnMambaTrainer against nnU-Net's own trainer on the decathlon's hippocampus set: same plan, fold and epochs.

    python benchmarks/nnunet_hippocampus.py Task04_Hippocampus --device cuda \\
        --output benchmarks/results/nnunet_hippocampus_gpu.json

trains at full length (1000 epochs of 250 iterations, the plan's own batch); the short run in docs/results.md is

    OMP_NUM_THREADS=1 python benchmarks/nnunet_hippocampus.py Task04_Hippocampus --epochs 15 --iterations 50 \\
        --batch 2 --splits 4 --no-mirroring --output benchmarks/results/nnunet_hippocampus.json

All cases are used. The folds keep the two sides of a person together, so nobody is trained and tested on. Every trainer
gets the same plans file, fold and seed (of weights, sampling and augmentation; on a GPU two runs still differ). The
validation cases of the fold take no part in training or in the choice of a checkpoint (the last one is used), so their
predictions, which nnU-Net writes at the end, are the test: Dice, 95 % Hausdorff distance and surface Dice of
``monai_mamba.evaluation.segmentation``, with 95 % bootstrap intervals from draws of persons, and for each trainer the
paired difference to nnU-Net's own with its interval and Wilcoxon's signed-rank test over persons.

Rows that the output file holds already are kept, so the run can be cut at any time and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunet_runs import TRAINERS, Job, cases_by_person, person_of, provenance, write_raw

from monai_mamba.evaluation.bootstrap import Interval, bootstrap
from monai_mamba.evaluation.segmentation import METRICS, SURFACE_DICE_TOLERANCE_MM, Labels, evaluate_folder
from monai_mamba.networks.counting import count

DATASET_ID = 905
DATASET = f"Dataset{DATASET_ID}_Hippocampus"


@dataclass(frozen=True)
class Contestant:
    """A trainer users know by ``name``; ``trainer`` is the class of benchmarks/trainers that measures it."""

    name: str
    trainer: str
    configuration: str


CONTESTANTS = {
    f"{c.name} {c.configuration}": c
    for c in (
        Contestant("nnUNetTrainer", "BenchmarkNNUNet", "3d_fullres"),
        Contestant("nnMambaTrainer", "BenchmarkNNMamba", "3d_fullres"),
        Contestant("nnMambaTrainerNoSSM", "BenchmarkNNMambaNoSSM", "3d_fullres"),
        Contestant("nnMambaTrainerBatchNorm", "BenchmarkNNMambaBatchNorm", "3d_fullres"),
        Contestant("nnMambaTrainerPublishedNetwork", "BenchmarkNNMambaPublishedNetwork", "3d_fullres"),
        Contestant("nnUNetTrainer", "BenchmarkNNUNet", "2d"),
        Contestant("MedMambaTrainer", "BenchmarkMedMamba", "2d"),
    )
}
DEFAULT = list(CONTESTANTS)[:3]
LABELS = {"dice": "Dice", "hd95_mm": "HD95, mm", "surface_dice": "surface Dice"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="decathlon-style folder: imagesTr, labelsTr, dataset.json")
    parser.add_argument("--output", type=Path, default=Path("nnunet_hippocampus.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/nnunet_hippocampus"), help="where nnU-Net works")
    parser.add_argument("--trainers", nargs="*", default=DEFAULT, choices=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--epochs", type=int, help="default: the trainer's own")
    parser.add_argument("--iterations", type=int, help="per epoch; default: the trainer's own")
    parser.add_argument("--batch", type=int, help="batch size written into the plan; default: nnU-Net's")
    parser.add_argument("--splits", type=int, default=5, help="folds the persons are dealt into")
    parser.add_argument("--folds", type=int, nargs="*", default=[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--no-mirroring", action="store_true", help="predict without mirrored copies (8 times as fast)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--costs-only", action="store_true", help="print parameters and GMACs; train nothing")
    arguments = parser.parse_args()

    variables = {"nnUNet_extTrainer": str(TRAINERS)}
    for variable, value in (
        ("MONAI_MAMBA_EPOCHS", arguments.epochs),
        ("MONAI_MAMBA_ITERATIONS", arguments.iterations),
        ("BENCHMARK_NO_MIRRORING", 1 if arguments.no_mirroring else None),
    ):
        if value is not None:
            variables[variable] = str(value)
    job = Job(arguments.work.resolve(), variables)
    structures = prepare(arguments, job)
    counts = {name: costs_of(CONTESTANTS[name], job) for name in arguments.trainers}
    if arguments.costs_only:
        for name, costs in counts.items():
            print(f"{name}: {costs['parameters'] / 1e6:.2f} M parameters, {costs['macs'] / 1e9:.2f} GMACs a patch")
        print(paper_line(paper_comparison()))
        return

    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    done = {(row["trainer"], row["fold"], row["seed"]) for row in rows}
    for seed in arguments.seeds:
        for fold in arguments.folds:
            for name in arguments.trainers:
                if (name, fold, seed) not in done:
                    rows.append(measure(name, fold, seed, arguments, job, structures))
                    rows[-1]["costs"] = counts[name]
                    print(name, fold, seed, rows[-1]["mean_dice"], flush=True)
                    write_results(arguments, rows, structures)
    write_results(arguments, rows, structures)


def prepare(arguments: argparse.Namespace, job: Job) -> dict[str, int]:
    """Copy, plan and preprocess the cases and deal the persons into folds; return the structures."""
    raw = job.work / "raw" / DATASET
    preprocessed = job.work / "preprocessed" / DATASET
    persons = cases_by_person(arguments.folder)
    structures = write_raw(arguments.folder, raw, [case for cases in persons.values() for case in cases])
    folds = deal(persons, arguments.splits)
    configurations = " ".join(sorted({CONTESTANTS[name].configuration for name in arguments.trainers}))
    ready = preprocessed / "configurations.txt"
    if not ready.exists() or ready.read_text() != configurations:
        job.plan(DATASET_ID, configurations)
        ready.write_text(configurations)
    (preprocessed / "splits_final.json").write_text(json.dumps(folds))
    if arguments.batch is not None:
        file = preprocessed / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        for configuration in plans["configurations"].values():
            if "batch_size" in configuration:
                configuration["batch_size"] = arguments.batch
        file.write_text(json.dumps(plans))
    return structures


def deal(persons: dict[int, list[str]], num_folds: int) -> list[dict[str, list[str]]]:
    """Deal the persons into folds, their sides together; nnU-Net's splits_final.json."""
    order = sorted(persons)
    random.Random(0).shuffle(order)
    folds = []
    for fold in range(num_folds):
        held_out = set(order[fold::num_folds])
        folds.append(
            {
                "train": sorted(c for p in order if p not in held_out for c in persons[p]),
                "val": sorted(c for p in held_out for c in persons[p]),
            }
        )
    return folds


def costs_of(contestant: Contestant, job: Job) -> dict[str, Any]:
    """Parameters and multiply-accumulates of the network a trainer builds for the plan."""
    import sys

    os.environ.update(job.environment())
    sys.path.insert(0, str(TRAINERS))
    import benchmark_trainers
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(str(job.work / "preprocessed" / DATASET / "nnUNetPlans.json"))
    configuration = plans.get_configuration(contestant.configuration)
    network = getattr(benchmark_trainers, contestant.trainer).build_network_architecture(
        plans, configuration, 1, 3, enable_deep_supervision=False
    )
    counts = count(network, (1, 1, *configuration.patch_size))
    return {
        "parameters": counts.parameters,
        "macs": counts.macs,
        "scan_operations": counts.scan_operations,
        "patch_size": list(configuration.patch_size),
    }


def measure(
    name: str, fold: int, seed: int, arguments: argparse.Namespace, job: Job, structures: dict[str, int]
) -> dict[str, Any]:
    """Train one trainer on one fold and score the fold's validation cases; return its row."""
    contestant = CONTESTANTS[name]
    model = job.work / "results" / DATASET / f"{contestant.trainer}__nnUNetPlans__{contestant.configuration}"
    results = model / f"fold_{fold}"
    shutil.rmtree(results, ignore_errors=True)
    seconds, peak_bytes = job.run(
        f"monai-mamba nnunet train --seed {seed} {DATASET_ID} {contestant.configuration} {fold} "
        f"-tr {contestant.trainer} -device {arguments.device}"
    )
    references = job.work / "references" / f"fold_{fold}"
    shutil.rmtree(references, ignore_errors=True)
    references.mkdir(parents=True)
    splits = json.loads((job.work / "preprocessed" / DATASET / "splits_final.json").read_text())
    for case in splits[fold]["val"]:
        shutil.copy(job.work / "raw" / DATASET / "labelsTr" / f"{case}.nii.gz", references)
    evaluation = evaluate_folder(
        results / "validation", references, Labels({name: (value,) for name, value in structures.items()})
    )
    return {
        "trainer": name,
        "fold": fold,
        "seed": seed,
        "mean_dice": evaluation.mean_dice,
        "num_train": len(splits[fold]["train"]),
        "num_test": len(splits[fold]["val"]),
        "mirroring": not arguments.no_mirroring,
        "process_seconds": round(seconds, 1),
        "peak_rss_bytes": peak_bytes,
        **json.loads((results / "measured.json").read_text()),
        "cases": {
            case: {name: [getattr(score, m) for m in METRICS] for name, score in scores.items()}
            for case, scores in evaluation.cases.items()
        },
    }


def scores_of(rows: list[dict], trainer: str, structures: dict[str, int]) -> tuple[list[str], np.ndarray]:
    """Return the tested cases of a trainer over all its rows and their scores, ``(case, structure, metric)``."""
    cases = [(case, scores) for row in rows if row["trainer"] == trainer for case, scores in row["cases"].items()]
    values = [[scores[structure] for structure in structures] for _, scores in cases]
    return [case for case, _ in cases], np.array(values, dtype=float)


def summarize(rows: list[dict], structures: dict[str, int]) -> list[dict[str, Any]]:
    """Per trainer: every metric with its interval, and the paired difference to nnU-Net's own."""
    from scipy.stats import wilcoxon

    def figures(values: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
        def mean(indices: np.ndarray) -> dict[str, float]:
            per_structure = np.nanmean(values[indices], axis=0)  # (structure, metric)
            found = {
                f"{metric} {structure}": per_structure[s, m]
                for s, structure in enumerate(structures)
                for m, metric in enumerate(METRICS)
            }
            return found | {f"{metric} mean": per_structure[:, m].mean() for m, metric in enumerate(METRICS)}

        return mean

    summary = []
    for name in CONTESTANTS:
        cases, values = scores_of(rows, name, structures)
        if not cases:
            continue
        persons = [str(person_of(case)) for case in cases]
        entry: dict[str, Any] = {
            "trainer": name,
            "cases": len(cases),
            "persons": len(set(persons)),
            "metrics": {k: _interval(v) for k, v in bootstrap(figures(values), persons).items()},
        }
        baseline = f"nnUNetTrainer {CONTESTANTS[name].configuration}"
        other_cases, other = scores_of(rows, baseline, structures)
        if name != baseline and other_cases == cases:
            difference = values - other
            entry["difference"] = {k: _interval(v) for k, v in bootstrap(figures(difference), persons).items()}
            of_person = np.array(
                [np.nanmean(difference[np.array(persons) == p], axis=(0, 1)) for p in sorted(set(persons))]
            )
            entry["wilcoxon_p"] = {m: float(wilcoxon(of_person[:, i]).pvalue) for i, m in enumerate(METRICS)}
        summary.append(entry)
    return summary


def _interval(interval: Interval) -> list[float]:
    return [round(float(x), 4) for x in (interval.value, interval.low, interval.high)]


def write_results(arguments: argparse.Namespace, rows: list[dict], structures: dict[str, int]) -> None:
    """Write the JSON, the Markdown table and the figure beside it."""
    summary = summarize(rows, structures)
    report = {
        **provenance(arguments.device),
        "surface_dice_tolerance_mm": SURFACE_DICE_TOLERANCE_MM,
        "paper": paper_comparison(),
        "summary": summary,
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text("\n".join(table(rows, summary, report["paper"])) + "\n")
    draw(summary, arguments.output.with_suffix(".png"))


def paper_comparison() -> list[dict[str, Any]]:
    """Both networks for one volume of 128 x 128 x 128 and 16 classes, the case the paper's figures belong to."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
    from torch import nn

    from monai_mamba.networks import NNMambaSeg

    size = (128, 128, 128)
    _, strides, kernels, _, _ = get_pool_and_conv_props((1.0, 1.0, 1.0), size, 4, 999999)
    stages = len(strides)
    unet = PlainConvUNet(
        1,
        stages,
        [min(32 * 2**i, 320) for i in range(stages)],
        nn.Conv3d,
        kernels,
        strides,
        2,
        16,
        2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=False,
    )
    found = []
    published, default = NNMambaSeg(3, 1, 16), NNMambaSeg(3, 1, 16, head="conv1x1")
    for name, network in (("nnU-Net", unet), ("nnMamba as published", published), ("nnMambaTrainer", default)):
        counts = count(network, (1, 1, *size))
        found.append({"network": name, "parameters": counts.parameters, "macs": counts.macs})
    return found


def table(rows: list[dict], summary: list[dict], paper: list[dict]) -> list[str]:
    """Return the lines of the Markdown tables."""

    def shown(interval: list[float], digits: int) -> str:
        value, low, high = (f"{x:.{digits}f}" for x in interval)
        return f"{value} ({low} to {high})"

    lines = [
        "| trainer | cases (persons) | " + " | ".join(LABELS[m] for m in METRICS) + " |",
        "|" + " --- |" * (2 + len(METRICS)),
    ]
    for entry in summary:
        cells = [shown(entry["metrics"][f"{m} mean"], 2 if m == "hd95_mm" else 3) for m in METRICS]
        lines.append(f"| {entry['trainer']} | {entry['cases']} ({entry['persons']}) | {' | '.join(cells)} |")
    lines += [
        "",
        "| trainer minus nnUNetTrainer | " + " | ".join(f"{LABELS[m]} | p" for m in METRICS) + " |",
        "|" + " --- |" * (1 + 2 * len(METRICS)),
    ]
    for entry in summary:
        if "difference" in entry:
            cells = [
                f"{shown(entry['difference'][f'{m} mean'], 2 if m == 'hd95_mm' else 3)} | {entry['wilcoxon_p'][m]:.2g}"
                for m in METRICS
            ]
            lines.append(f"| {entry['trainer']} | {' | '.join(cells)} |")
    lines += [
        "",
        "| trainer | seconds per epoch | peak memory, GiB | parameters, M | GMACs of a patch | scans, GFLOPs |",
        "|" + " --- |" * 6,
    ]
    for entry in summary:
        row = next(row for row in rows if row["trainer"] == entry["trainer"])
        costs = row["costs"]
        peak = row["peak_cuda_bytes"] or row["peak_rss_bytes"]
        lines.append(
            f"| {entry['trainer']} | {np.median(row['epoch_seconds']):.0f} | {peak / 2**30:.2f} | "
            f"{costs['parameters'] / 1e6:.2f} | {costs['macs'] / 1e9:.2f} | {costs['scan_operations'] / 1e9:.2f} |"
        )
    lines += ["", paper_line(paper)]
    return lines


def paper_line(paper: list[dict]) -> str:
    """Say how large both networks are in the paper's case."""
    unet, *others = paper
    line = (
        f"One volume of 128 x 128 x 128, 16 classes: {unet['network']} {unet['parameters'] / 1e6:.2f} M parameters and "
        f"{unet['macs'] / 1e9:.1f} GMACs"
    )
    for other in others:
        line += (
            f"; {other['network']} {other['parameters'] / 1e6:.2f} M and {other['macs'] / 1e9:.1f} "
            f"({other['parameters'] / unet['parameters']:.2f} and {other['macs'] / unet['macs']:.2f} of it)"
        )
    return line + "."


def draw(summary: list[dict], path: Path) -> None:
    """Draw the mean Dice of every trainer with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 0.9 + 0.45 * len(summary)), layout="constrained")
    for y, entry in enumerate(reversed(summary)):
        value, low, high = entry["metrics"]["dice mean"]
        color = "tab:gray" if entry["trainer"].startswith("nnUNet") else "tab:blue"
        axes.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", color=color, capsize=4)
    axes.set_yticks(range(len(summary)), [entry["trainer"] for entry in reversed(summary)])
    axes.set_ylim(-0.6, len(summary) - 0.4)
    figure.supxlabel("mean Dice of both structures, 95 % interval over persons", fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
