"""`monai-mamba robustness`: the metrics of a trained bundle on perturbed images, as table and curves."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.bootstrap import bootstrap, describe_interval
from monai_mamba.evaluation.report.charts import plain
from monai_mamba.evaluation.report.evaluation import metric_name
from monai_mamba.evaluation.report.page import color_of
from monai_mamba.evaluation.results import provenance, write_figure, write_results
from monai_mamba.files import whole_folder
from monai_mamba.robustness.perturbations import NUM_SEVERITIES, PERTURBATIONS, Perturbation
from monai_mamba.robustness.tasks import TASKS, Task
from monai_mamba.training.trained import data_source, fingerprints, load_trained

SUMMARY_FILE = "robustness.json"
TABLE_FILE = "robustness.csv"
_COLORS = 8
_MAX_PANELS = 6


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
    """Measure a trained model on perturbed images: classes, label maps or landmarks.

    Images are perturbed as they were read, on the grid of the network's input and before they are normalized; label
    maps and landmarks move with images that are turned or shifted. The folder holds ``robustness.json``,
    ``robustness.csv`` and ``curves.png``; it appears whole or not at all.

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
        CheckpointError: if the bundle cannot be used.
        DatasetError: if the data does not fit the model, has no references, or a file cannot be read.
        ValueError: if a perturbation is unknown.
        FileExistsError: if the output folder is not empty.
    """
    unknown = [name for name in names if name not in PERTURBATIONS]
    if unknown:
        raise ValueError(f"`names` must be out of {', '.join(PERTURBATIONS)}, got {unknown[0]!r}")
    chosen = [PERTURBATIONS[name] for name in names or PERTURBATIONS]
    trained = load_trained(bundle, device=device, overrides=overrides)
    cases = trained.list_cases(dataset_dir, section, limit)
    task = TASKS[trained.task](trained, cases)
    with whole_folder(output_dir) as folder:
        values, num_colored = _measure(task, chosen, batch_size, seed, on_progress)
        on_progress("metrics", 0, 1)
        skipped = {p.name: "all images are gray" for p in chosen if p.needs_color and num_colored == 0}
        settings: dict[str, Any] = {"num_draws": num_draws, "level": level, "seed": seed}
        unchanged = values["unchanged", 0]
        summary = {
            "task": trained.task,
            "targets": task.targets,
            "metrics": task.metrics,
            "primary": task.primary,
            "cases": len(cases),
            "patients": len({str(case["patient"]) for case in cases}),
            "colored_cases": num_colored,
            "seed": seed,
            "interval": describe_interval(level, num_draws, seed),
            "unchanged": _figures(task, unchanged, None, settings)["metrics"],
            "perturbations": {
                p.name: {
                    "unit": p.unit,
                    "levels": [
                        {
                            "severity": severity,
                            "level": p.levels[severity - 1],
                            **_figures(task, values[p.name, severity], unchanged, settings),
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
        write_figure(folder / "curves.png", draw_curves(summary), 110)
        write_results(folder, {SUMMARY_FILE: summary, TABLE_FILE: _as_csv(summary)})
    on_progress("metrics", 1, 1)
    return summary


def draw_curves(summary: Mapping[str, Any]) -> Figure:
    """Draw the metrics over the severity, one panel each; the first ones if there are many."""
    names = summary["metrics"][:_MAX_PANELS]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(1 + 3 * columns, 0.6 + 2.8 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for panel, metric in zip(panels, names, strict=False):
        for index, (name, entry) in enumerate(summary["perturbations"].items()):
            figures = [summary["unchanged"][metric], *(level["metrics"][metric] for level in entry["levels"])]
            panel.plot(
                range(len(figures)), [one["value"] for one in figures], marker="os^DvP*X"[index % _COLORS],
                markersize=4, color=color_of(index) if index < _COLORS - 1 else "0.3", label=name.replace("_", " "),
            )  # fmt: skip
        # One scale for all shares: a zoomed one makes much of little.
        panel.set_ylim(*((0, None) if metric.startswith("mre_mm") else (-0.02, 1.02)))
        panel.set_title(plain(metric_name(metric)), fontsize=10)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(names) - columns) : len(names)]:
        panel.set_xlabel("severity (0: as it is)")
        panel.xaxis.set_tick_params(labelbottom=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _measure(
    task: Task,
    chosen: Sequence[Perturbation],
    batch_size: int,
    seed: int,
    on_progress: Callable[[str, int, int], None],
) -> tuple[dict[tuple[str, int], np.ndarray], int]:
    """What is measured by perturbation and severity, and the number of cases with a colored image."""
    steps = [(p, severity) for p in chosen for severity in range(1, NUM_SEVERITIES + 1)]
    found: dict[tuple[str, int], list[np.ndarray]] = {("unchanged", 0): [], **{(p.name, s): [] for p, s in steps}}
    num_colored = 0
    for start in range(0, len(task.cases), batch_size):
        sources = task.cases[start : start + batch_size]
        batch = [task.read(case) for case in sources]
        found["unchanged", 0].append(task.measure(batch))
        colored = [task.is_colored(read) for read in batch]
        num_colored += sum(colored)
        for perturbation, severity in steps:
            if perturbation.needs_color and not any(colored):
                found[perturbation.name, severity].append(found["unchanged", 0][-1])
                continue
            changed = [
                task.change(read, source, perturbation, severity, seed * 1_000_003 + start + offset)
                for offset, (read, source) in enumerate(zip(batch, sources, strict=True))
            ]
            found[perturbation.name, severity].append(task.measure(changed))
        on_progress("predictions", start + len(batch), len(task.cases))
    return {key: np.concatenate(parts) for key, parts in found.items()}, num_colored


def _figures(task: Task, values: np.ndarray, unchanged: np.ndarray | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Metrics with intervals, and their paired differences to the unchanged images."""
    scores = task.scores(values)
    # What left the image does not count in a difference.
    before = None if unchanged is None else task.scores(np.where(np.isnan(values), np.nan, unchanged))

    def figures(rows: np.ndarray) -> dict[str, float]:
        now = scores(rows)
        result = {f"metrics/{name}": now[name] for name in task.metrics}
        if before is not None:
            then = before(rows)
            result |= {f"change/{name}": now[name] - then[name] for name in task.metrics}
        return result

    intervals = bootstrap(figures, [str(case["patient"]) for case in task.cases], **settings)
    result: dict[str, Any] = {}
    for key, interval in intervals.items():
        kind, name = key.split("/", 1)
        result.setdefault(kind, {})[name] = {"value": interval.value, "low": interval.low, "high": interval.high}
    return result


def _as_csv(summary: Mapping[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = ("value", "low", "high")
    writer.writerow(
        ["perturbation", "severity", "level", "unit", "metric", *parts, *(f"change_{part}" for part in parts)]
    )
    for metric in summary["metrics"]:
        figures = summary["unchanged"][metric]
        writer.writerow(["unchanged", 0, "", "", metric, *(f"{figures[part]:.6g}" for part in parts), "", "", ""])
    for name, entry in summary["perturbations"].items():
        for level in entry["levels"]:
            for metric in summary["metrics"]:
                numbers = [level[kind][metric][part] for kind in ("metrics", "change") for part in parts]
                writer.writerow(
                    [name, level["severity"], level["level"], entry["unit"], metric, *(f"{n:.6g}" for n in numbers)]
                )
    return text.getvalue()
