"""`monai-mamba robustness`: all metrics of a trained bundle on perturbed images, as table and curves."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.bootstrap import bootstrap, describe_interval
from monai_mamba.evaluation.classification import METRICS
from monai_mamba.evaluation.report.page import color_of
from monai_mamba.evaluation.results import provenance, write_figure, write_results
from monai_mamba.evaluation.tables import Predictions
from monai_mamba.files import whole_folder
from monai_mamba.robustness.perturbations import NUM_SEVERITIES, PERTURBATIONS, Perturbation, is_colored, perturb
from monai_mamba.training.datalist import PICTURES
from monai_mamba.training.trained import Trained, data_source, fingerprints, load_trained

SUMMARY_FILE = "robustness.json"
TABLE_FILE = "robustness.csv"
_LABELS = {"auc": "AUC", "f1": "F1"}
_COLORS = 8


def measure_robustness(
    bundle: os.PathLike[str] | str,
    dataset_dir: os.PathLike[str] | str,
    output_dir: os.PathLike[str] | str,
    *,
    section: str = "test",
    names: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 16,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    device: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure a trained classifier on perturbed images.

    Images are perturbed as they were read, on the grid of the network's input and before they are normalized. The
    folder holds ``robustness.json``, ``robustness.csv`` and ``curves.png``; it appears whole or not at all.

    Args:
        bundle: a trained bundle.
        dataset_dir: folder with a ``datalist.json``.
        output_dir: new or empty folder.
        section: of the data set.
        names: perturbations; none takes all of them.
        limit: use only this many cases, evenly spaced.
        batch_size: cases per pass.
        num_draws, level: of the bootstrap over patients.
        seed: of perturbations and draws.
        device: where to compute; None takes the GPU if there is one.
        overrides: entries of the bundle's configuration.
        on_progress: gets step, done and total.

    Returns:
        The content of ``robustness.json``.

    Raises:
        CheckpointError: if the bundle cannot be used or is of another task.
        DatasetError: if the data does not fit the model, has no labels, or a file cannot be read.
        ValueError: if a perturbation is unknown.
        FileExistsError: if the output folder is not empty.
    """
    unknown = [name for name in names if name not in PERTURBATIONS]
    if unknown:
        raise ValueError(f"`names` must be out of {', '.join(PERTURBATIONS)}, got {unknown[0]!r}")
    chosen = [PERTURBATIONS[name] for name in names or PERTURBATIONS]
    trained = load_trained(bundle, device=device, overrides=overrides)
    trained.require_task("classification", "two-view classification")
    cases = trained.list_cases(dataset_dir, section, limit)
    unlabeled = [case["case"] for case in cases if "label" not in case]
    if unlabeled:
        raise DatasetError(f"{dataset_dir}: case {unlabeled[0]} has no label; robustness is measured against labels")
    with whole_folder(output_dir) as folder:
        probs, num_colored = _predict(trained, cases, chosen, batch_size, seed, on_progress)
        on_progress("metrics", 0, 1)
        skipped = {p.name: "all images are gray" for p in chosen if p.needs_color and num_colored == 0}
        settings: dict[str, Any] = {"num_draws": num_draws, "level": level, "seed": seed}
        unchanged = _predictions(trained, cases, probs["unchanged", 0])
        clean = unchanged.scores()(np.arange(len(cases)))
        summary = {
            "classes": trained.classes,
            "cases": len(cases),
            "patients": len(set(unchanged.patient.tolist())),
            "colored_cases": num_colored,
            "seed": seed,
            "interval": describe_interval(level, num_draws, seed),
            "unchanged": _figures(unchanged, None, settings)["metrics"],
            "perturbations": {
                p.name: {
                    "unit": p.unit,
                    "levels": [
                        {
                            "severity": severity,
                            "level": p.levels[severity - 1],
                            **_figures(_predictions(trained, cases, probs[p.name, severity]), unchanged, settings),
                        }
                        for severity in range(1, NUM_SEVERITIES + 1)
                    ],
                }
                for p in chosen
                if p.name not in skipped
            },
            "skipped": skipped,
            "model": fingerprints(trained),
            "provenance": provenance({"Data": data_source(dataset_dir)}, seed),
        }
        if not summary["perturbations"]:
            raise DatasetError(
                f"{dataset_dir}: nothing to measure: " + "; ".join(f"{k}: {v}" for k, v in skipped.items())
            )
        write_figure(folder / "curves.png", draw_curves(summary, clean), 110)
        write_results(folder, {SUMMARY_FILE: summary, TABLE_FILE: _as_csv(summary)})
    on_progress("metrics", 1, 1)
    return summary


def draw_curves(summary: Mapping[str, Any], unchanged: Mapping[str, float]) -> Figure:
    """Draw all metrics over the severity, one panel each."""
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    panels = list(figure.subplots(2, 3, sharex=True).flat)
    for panel, metric in zip(panels, METRICS, strict=True):
        for index, (name, entry) in enumerate(summary["perturbations"].items()):
            values = [unchanged[metric], *(level["metrics"][metric]["value"] for level in entry["levels"])]
            panel.plot(
                range(len(values)), values, marker="os^DvP*X"[index % _COLORS], markersize=4,
                color=color_of(index) if index < _COLORS - 1 else "0.3", label=name.replace("_", " "),
            )  # fmt: skip
        panel.set_title(_LABELS.get(metric, metric), fontsize=10)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[3:]:
        panel.set_xlabel("severity (0: as it is)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _predict(
    trained: Trained,
    cases: Sequence[dict[str, Any]],
    chosen: Sequence[Perturbation],
    batch_size: int,
    seed: int,
    on_progress: Callable[[str, int, int], None],
) -> tuple[dict[tuple[str, int], np.ndarray], int]:
    """Probabilities by perturbation and severity, and the number of cases with a colored image."""
    steps = [(p, severity) for p in chosen for severity in range(1, NUM_SEVERITIES + 1)]
    found: dict[tuple[str, int], list[torch.Tensor]] = {("unchanged", 0): [], **{(p.name, s): [] for p, s in steps}}
    num_colored = 0
    for start in range(0, len(cases), batch_size):
        batch = [trained.read(case) for case in cases[start : start + batch_size]]
        found["unchanged", 0].append(trained.probabilities([trained.prepare(case)["image"] for case in batch]))
        colored = [any(is_colored(torch.as_tensor(case[key])) for key in trained.image_keys) for case in batch]
        num_colored += sum(colored)
        for perturbation, severity in steps:
            if perturbation.needs_color and not any(colored):
                found[perturbation.name, severity].append(found["unchanged", 0][-1])
                continue
            images = []
            for offset, case in enumerate(batch):
                source, changed = cases[start + offset], dict(case)
                for view, key in enumerate(trained.image_keys):
                    # Views are taken one after the other: each has its own direction and noise.
                    own_seed = (seed * 1_000_003 + start + offset) * len(trained.image_keys) + view
                    is_picture = str(source[key]).lower().endswith(PICTURES)
                    values = perturb(case[key], perturbation, severity, own_seed, is_picture=is_picture)
                    changed[key] = _like(case[key], values)
                images.append(trained.prepare(changed)["image"])
            found[perturbation.name, severity].append(trained.probabilities(images))
        on_progress("predictions", start + len(batch), len(cases))
    return {key: torch.cat(parts).numpy() for key, parts in found.items()}, num_colored


def _like(image: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values with the geometry of ``image``, which transforms may need."""
    if hasattr(image, "affine"):
        changed = image.clone()
        changed[...] = values.to(image.dtype)
        return changed
    return values


def _predictions(trained: Trained, cases: Sequence[Mapping[str, Any]], probs: np.ndarray) -> Predictions:
    if not np.isfinite(probs).all():
        bad = cases[int(np.flatnonzero(~np.isfinite(probs).all(1))[0])]["case"]
        raise DatasetError(f"case {bad}: the network gives probabilities that are no numbers")
    names = np.array([str(case["case"]) for case in cases])
    patients = np.array([str(case["patient"]) for case in cases])
    label = np.array([np.asarray(case["label"]) for case in cases], dtype=int)
    return Predictions(trained.classes, names, patients, np.full(len(names), ""), label, probs)


def _figures(predictions: Predictions, unchanged: Predictions | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Metrics with intervals, and their paired differences to the unchanged images."""
    scores = predictions.scores()
    before = None if unchanged is None else unchanged.scores()

    def figures(rows: np.ndarray) -> dict[str, float]:
        now = scores(rows)
        result = {f"metrics/{name}": now[name] for name in METRICS}
        if before is not None:
            then = before(rows)
            result |= {f"change/{name}": now[name] - then[name] for name in METRICS}
        return result

    intervals = bootstrap(figures, list(predictions.patient), **settings)
    result: dict[str, Any] = {}
    for key, interval in intervals.items():
        kind, name = key.split("/")
        result.setdefault(kind, {})[name] = {"value": interval.value, "low": interval.low, "high": interval.high}
    return result


def _as_csv(summary: Mapping[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = ("value", "low", "high")
    writer.writerow(
        ["perturbation", "severity", "level", "unit", "metric", *parts, *(f"change_{part}" for part in parts)]
    )
    for metric in METRICS:
        figures = summary["unchanged"][metric]
        writer.writerow(["unchanged", 0, "", "", metric, *(f"{figures[part]:.6g}" for part in parts), "", "", ""])
    for name, entry in summary["perturbations"].items():
        for level in entry["levels"]:
            for metric in METRICS:
                numbers = [level[kind][metric][part] for kind in ("metrics", "change") for part in parts]
                writer.writerow(
                    [name, level["severity"], level["level"], entry["unit"], metric, *(f"{n:.6g}" for n in numbers)]
                )
    return text.getvalue()
