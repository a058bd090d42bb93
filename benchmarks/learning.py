"""Do the networks learn? Train the bundles on the packaged samples and score them, each beside its twin without scans.

    python benchmarks/learning.py pneumonia breast two_view landmarks
    python benchmarks/learning.py --table

Every run is the bundle's own training and evaluation (``configs/train.json``, ``configs/evaluate.json``) with the
settings printed in the table. A run that is in ``benchmarks/results/learning.json`` already is not repeated; a run
with other settings is. ``--table`` writes the results into ``docs/results.md``. One thread, about an hour of CPU. The
tests marked slow (``tests/bundles/test_learning.py``) hold single runs against what the networks have to reach.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "learning.json"
PAGE = ROOT / "docs" / "results.md"
MARKS = ("<!-- learning: written by benchmarks/learning.py --table -->", "<!-- learning: end -->")
TWINS = ("mamba", "none")
_TWO_VIEW = {"image_size": 32, "batch_size": 16, "lr": 0.001, "max_epochs": 6}
_SMALL = {"network_def#depths": [1, 1], "network_def#dims": 32}
_SINGLE_VIEW = {
    "_target_": "monai_mamba.networks.VMamba", "_requires_": "@seeding", "in_channels": 3, "num_classes": 2,
    "depths": [1, 1], "dims": 32,
}  # fmt: skip

#: group: (name, bundle, sample, settings, mixers, seeds)
RUNS: dict[str, list[tuple[str, str, str, dict[str, Any], tuple[str, ...], tuple[int, ...]]]] = {
    "pneumonia": [
        ("MedMamba-T, PneumoniaMNIST", "medmamba", "pneumoniamnist",
         {"image_size": 64, "batch_size": 16, "max_epochs": 1, "limit": 1500}, TWINS, (42,)),
    ],
    "breast": [
        ("MedMamba-T, BreastMNIST", "medmamba", "breastmnist",
         {"image_size": 64, "batch_size": 32, "max_epochs": 6}, TWINS, (42, 43, 44)),
    ],
    "two_view": [
        ("XFMamba (two blocks of 32), same organ?", "xfmamba", "same_organ",
         {**_TWO_VIEW, **_SMALL}, TWINS, (42, 43, 44)),
        ("late joining, same organ?", "xfmamba", "same_organ",
         {**_TWO_VIEW, **_SMALL, "network_def#fusion": "late"}, ("mamba",), (42, 43, 44)),
        ("first view alone (VMamba of that size), same organ?", "medmamba", "same_organ",
         {**_TWO_VIEW, "network_def": _SINGLE_VIEW}, ("mamba",), (42, 43, 44)),
    ],
    "landmarks": [
        ("NNMambaLandmark (16 filters), augmented", "nnmamba_landmark", "hippocampus_landmarks",
         {"batch_size": 2, "max_epochs": 40, "window": 3, "augment": 0.8}, TWINS, (1234, 1235, 1236)),
        ("NNMambaLandmark (16 filters), batches of 2", "nnmamba_landmark", "hippocampus_landmarks",
         {"batch_size": 2, "max_epochs": 14, "window": 3}, ("mamba",), (1234,)),
        ("NNMambaLandmark (16 filters), batches of 4", "nnmamba_landmark", "hippocampus_landmarks",
         {"max_epochs": 9, "window": 3}, ("mamba",), (1234,)),
        ("NNMambaLandmark (16 filters), batches of 4, head conv1x1", "nnmamba_landmark", "hippocampus_landmarks",
         {"head": "conv1x1", "max_epochs": 9, "window": 3}, ("mamba",), (1234,)),
    ],
}  # fmt: skip


def main() -> None:
    """Train what is asked for, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", choices=[*RUNS, []], help="what to train")
    parser.add_argument("--mixers", nargs="*", choices=TWINS, help="only with (mamba) or without scans (none)")
    parser.add_argument("--table", action="store_true", help="write docs/results.md from the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are")
    arguments = parser.parse_args()
    for group in arguments.groups:
        for name, bundle, sample, settings, mixers, seeds in RUNS[group]:
            for seed in seeds:
                for mixer in arguments.mixers or mixers:
                    entry = {"name": name, "bundle": bundle, "sample": sample, "mixer": mixer, "seed": seed}
                    run_once(arguments.results, group, {**entry, "settings": settings})
    if arguments.table:
        write_table(json.loads(arguments.results.read_text(encoding="utf-8")))


def find_run(group: str, name: str, mixer: str = "mamba") -> dict[str, Any]:
    """Return the arguments of :func:`train_and_score` for a run of ``RUNS``, with its first seed."""
    for known, bundle, sample, settings, _, seeds in RUNS[group]:
        if known == name:
            return {"bundle": bundle, "sample": sample, "settings": settings, "mixer": mixer, "seed": seeds[0]}
    raise KeyError(f"{group}: {name}")


def run_once(results: Path, group: str, entry: dict[str, Any]) -> None:
    """Train and score one network unless its result is there; add the result to the file."""
    known = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else []
    if any(all(row.get(key) == value for key, value in entry.items()) for row in known):
        return
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        figures = train_and_score(Path(folder), **{key: entry[key] for key in entry if key != "name"})
        figures |= {"cpu_seconds": round(time.process_time() - start), "versions": versions()}
    print(entry, figures, flush=True)
    # Read again: several groups may run side by side.
    known = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else []
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps([*known, {"group": group, **entry, **figures}], indent=1) + "\n", encoding="utf-8")


def train_and_score(
    folder: Path, bundle: str, sample: str, mixer: str, seed: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Run a bundle's training and evaluation in ``folder``; return its figures."""
    from monai.bundle import ConfigWorkflow

    from monai_mamba.training.samples import sample_dataset

    data = Path(sample_dataset(sample, folder / "data"))
    if bundle == "medmamba" and sample == "same_organ":
        keep_first_view(data)
    root = folder / bundle
    shutil.copytree(ROOT / "bundles" / bundle / "configs", root / "configs")
    overrides = {"bundle_root": str(root), "dataset_dir": str(data), "seed": seed, **settings}
    if mixer != "mamba":
        overrides["network_def#mixer"] = mixer
    for configs in (["train"], ["train", "evaluate"]):
        workflow = ConfigWorkflow(
            config_file=[str(root / "configs" / f"{config}.json") for config in configs],
            workflow_type="train",
            logging_file=False,
            **overrides,
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    if bundle == "nnmamba_landmark":
        return {**landmark_figures(root), "mean_position_mm": mean_position_error(data)}
    return figures_of(root)


def keep_first_view(data: Path) -> None:
    """Turn a data set of two views into one of the first view alone."""
    manifest = json.loads((data / "datalist.json").read_text(encoding="utf-8"))
    for section in ("training", "validation", "test"):
        manifest[section] = [
            {"case": case["case"], "image": case["image1"], "label": case["label"]} for case in manifest[section]
        ]
    (data / "datalist.json").write_text(json.dumps(manifest), encoding="utf-8")


def figures_of(root: Path) -> dict[str, Any]:
    """AUC on the validation and the test section with DeLong's 95 % interval, accuracy, and the epoch of the best."""
    from monai_mamba.evaluation.classification import delong
    from monai_mamba.evaluation.tables import read_predictions

    figures: dict[str, Any] = {}
    for section in ("validation", "test"):
        table = read_predictions(root / "eval" / f"{section}.csv")
        area = delong(table.label, table.probs[:, 1])
        figures[f"{section}_auc"] = [round(value, 4) for value in (area.auc, area.low, area.high)]
    metrics = json.loads((root / "eval" / "metrics.json").read_text(encoding="utf-8"))
    figures["test_accuracy"] = [round(metrics["metrics"]["accuracy"][key], 4) for key in ("value", "low", "high")]
    figures["best_epoch"] = json.loads((root / "models" / "model.json").read_text(encoding="utf-8"))["epoch"]
    return figures


def landmark_figures(root: Path) -> dict[str, Any]:
    """Mean radial error in mm and share of the landmarks within 2 mm, on the test section, with 95 % intervals."""
    metrics = json.loads((root / "eval" / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    card = json.loads((root / "models" / "model.json").read_text(encoding="utf-8"))
    figures = {
        name: [round(metrics[key][part], 4) for part in ("value", "low", "high")]
        for name, key in (("test_mre_mm", "mre_mm"), ("test_sdr_2mm", "sdr_2mm"))
    }
    return {**figures, "validation_mre_mm": round(card["value"], 4), "best_epoch": card["epoch"]}


def mean_position_error(data: Path) -> float:
    """Error in mm of always answering the mean position of the training landmarks in the window: what is free."""
    import nibabel as nib
    import numpy as np

    from monai_mamba.heat_maps import voxel_to_world, world_to_voxel
    from monai_mamba.training.datalist import load_cases

    def affine(case: dict[str, Any]) -> np.ndarray:
        return nib.load(case["image"]).affine

    training = [world_to_voxel(case["landmarks"], affine(case)) for case in load_cases(data, "training")]
    mean = np.nanmean(training, axis=0)
    errors = [
        np.linalg.norm(voxel_to_world(mean, affine(case)) - case["landmarks"], axis=1)
        for case in load_cases(data, "test")
    ]
    return round(float(np.nanmean(errors)), 4)


def versions() -> dict[str, str]:
    """What the figures depend on."""
    import monai
    import torch

    import monai_mamba

    return {
        "monai-mamba": monai_mamba.__version__, "torch": torch.__version__, "monai": monai.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
    }  # fmt: skip


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write the results of ``RUNS`` between the marks in docs/results.md."""
    order = [
        {"name": name, "settings": settings, "mixer": mixer, "seed": seed}
        for runs in RUNS.values()
        for name, _, _, settings, mixers, seeds in runs
        for mixer in mixers
        for seed in seeds
    ]
    rows = [row for known in order for row in rows if all(row[key] == value for key, value in known.items())]
    lines = [
        "| network, data | scans | seed | validation AUC | test AUC | test accuracy | best epoch | CPU min |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "validation_auc" in row:
            cells = [_interval(row[key]) for key in ("validation_auc", "test_auc", "test_accuracy")]
            lines.append(f"{_start(row)} | {row['seed']} | {' | '.join(cells)} | {_effort(row)} |")
    lines += [
        "",
        "| network, data | scans | seed | validation, mm | mean error, mm | within 2 mm | mean position, mm | "
        "best epoch | CPU min |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "test_mre_mm" in row:
            lines.append(
                f"{_start(row)} | {row['seed']} | {row['validation_mre_mm']:.2f} | {_interval(row['test_mre_mm'])} | "
                f"{_interval(row['test_sdr_2mm'])} | {row['mean_position_mm']:.2f} | {_effort(row)} |"
            )
    lines += ["", *_spread(rows)]
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0], 1)
    after = rest.split(MARKS[1], 1)[1]
    PAGE.write_text(before + "\n".join([MARKS[0], "", *lines, "", MARKS[1]]) + after, encoding="utf-8")


def _spread(rows: list[dict[str, Any]]) -> list[str]:
    """Mean and range over the seeds of what was trained more than once."""
    lines = ["| over the seeds: mean (lowest to highest) | scans | seeds | validation | test |", "| --- " * 5 + "|"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_start(row), []).append(row)
    for start, members in groups.items():
        if len(members) < 2:
            continue
        if "test_mre_mm" in members[0]:
            pairs = [(row["validation_mre_mm"], row["test_mre_mm"][0]) for row in members]
            unit = "mean error, mm: "
        else:
            pairs = [(row["validation_auc"][0], row["test_auc"][0]) for row in members]
            unit = "AUC "
        cells = [f"{unit}{sum(v) / len(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in zip(*pairs, strict=True)]
        lines.append(f"{start} | {len(members)} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def _start(row: dict[str, Any]) -> str:
    return f"| {row['name']} | {'yes' if row['mixer'] == 'mamba' else 'no'}"


def _effort(row: dict[str, Any]) -> str:
    return f"{row['best_epoch']} of {row['settings']['max_epochs']} | {row['cpu_seconds'] / 60:.1f}"


def _interval(values: list[float]) -> str:
    value, low, high = values
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
