"""``monai-mamba evaluate``: figures with intervals and a report, from predictions of any model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from monai_mamba.errors import DatasetError


def evaluate(
    predictions: Annotated[
        Path,
        typer.Argument(help="Table of the test cases (classes or landmarks), or folder with predicted label maps."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for metrics.json and report.html.")],
    compare: Annotated[
        Path | None, typer.Option(help="Table or folder of another model on the same test cases.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of the bootstrap over patients.")] = 1000,
    level: Annotated[float, typer.Option(help="Coverage of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html.")] = True,
    robustness: Annotated[Path | None, typer.Option(help="Folder of `monai-mamba robustness`, for the report.")] = None,
    explanations: Annotated[Path | None, typer.Option(help="Folder of `monai-mamba explain`, for the report.")] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Table of the validation cases: Youden's threshold, temperature.", rich_help_panel="Classes"),
    ] = None,
    group: Annotated[
        str, typer.Option(help="Score by case, or the mean over each study or patient.", rich_help_panel="Classes")
    ] = "case",
    by: Annotated[
        str | None,
        typer.Option(help="Further column of the table, e.g. site: score each value too.", rich_help_panel="Classes"),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", "-r", help="Folder with the references.", rich_help_panel="Label maps")
    ] = None,
    dataset_json: Annotated[
        Path | None,
        typer.Option(
            help="Names of the structures; default: found beside the references.", rich_help_panel="Label maps"
        ),
    ] = None,
    patients: Annotated[
        Path | None,
        typer.Option(help="Table with case and patient, e.g. cases.csv.", rich_help_panel="Label maps"),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder with the images, for pictures in the report.", rich_help_panel="Label maps"),
    ] = None,
    tolerance_mm: Annotated[
        float, typer.Option(min=0, help="Tolerance of the surface Dice.", rich_help_panel="Label maps")
    ] = 1.0,
) -> None:
    """Evaluate classes, landmarks or label maps: the papers' metrics, intervals by patients, one report.

    PREDICTIONS tells what is evaluated: a folder holds label maps, a table with a column `landmark` landmarks, any
    other table classes.
    """
    settings: dict[str, Any] = {
        "num_draws": draws, "level": level, "seed": seed, "report": report, "explanations": explanations,
        "robustness": robustness,
    }  # fmt: skip
    for_classes: dict[str, Path | str | None] = {
        "validation": validation, "by": by,
        "group": None if group == "case" else group,
    }  # fmt: skip
    for_label_maps: dict[str, Path | str | None] = {
        "reference": reference,
        "dataset-json": dataset_json,
        "patients": patients,
        "images": images,
    }
    try:
        if predictions.is_dir():
            _refuse(for_classes, "a table of classes")
            if reference is None:
                raise typer.BadParameter("--reference FOLDER is needed for a folder of label maps")
            metrics = _label_maps(
                predictions, reference, output, dataset_json, patients, compare, images, tolerance_mm, settings
            )
        elif _is_table_of_landmarks(predictions):
            from monai_mamba.evaluation import landmarks

            _refuse(for_classes | for_label_maps, "another kind of predictions")
            metrics = landmarks.evaluate_files(predictions, output, compare, **settings)
        else:
            from monai_mamba.evaluation import tables

            _refuse(for_label_maps, "a folder of label maps")
            metrics = tables.evaluate_files(predictions, output, validation, compare, group, by=by, **settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _show(metrics, level)
    typer.echo(f"written: {output / 'metrics.json'}")
    if report:
        typer.echo(f"report:  {output / 'report.html'}")


def _label_maps(
    predictions: Path,
    reference: Path,
    output: Path,
    dataset_json: Path | None,
    patients: Path | None,
    compare: Path | None,
    images: Path | None,
    tolerance_mm: float,
    settings: dict[str, Any],
) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import Progress

    from monai_mamba.evaluation import segmentation

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("scoring", total=None)
        return segmentation.evaluate_files(
            predictions, reference, output, dataset_json, patients, compare, images, tolerance_mm,
            on_case=lambda case: progress.update(task, advance=1, description=f"scored {case}"), **settings,
        )  # fmt: skip


def _is_table_of_landmarks(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return "landmark" in file.readline().strip().split(",")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise DatasetError(f"{path}: cannot be read as a table of predictions: {reason}") from error


def _refuse(options: Mapping[str, object], what: str) -> None:
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"{', '.join(given)} belongs to {what}")


def _show(report: dict[str, Any], level: float) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{report['cases']} cases of {report['patients']} patients, {level:.0%} intervals"
    if report["task"] == "segmentation":
        names = list(report["metrics"])
        rows = {"mean": report["metrics"], **report["per_structure"]}
        heads = ["structure", *names]
        cells = {name: [_cell(row[metric]) for metric in names] for name, row in rows.items()}
    else:
        figures = {"most probable class" if "classes" in report else "all landmarks": report["metrics"]}
        if "youden" in report:
            threshold = report["youden"]["threshold"]
            shown = "thresholds" if isinstance(threshold, dict) else f"threshold {threshold:.3f}"
            figures[f"{shown} from validation"] = report["youden"]["metrics"]
        if "metrics" in report.get("by_study", {}):
            figures[f"{report['by_study']['cases']} studies"] = report["by_study"]["metrics"]
        if "comparison" in report:
            figures["difference to the other model"] = report["comparison"]["difference"]
        heads = ["metric", *figures]
        cells = {name: [_cell(column.get(name)) for column in figures.values()] for name in report["metrics"]}
        cells |= {f"mre_mm {name}": [_cell(value)] for name, value in report.get("per_landmark", {}).items()}
    table = Table(title=title)
    for head in heads:
        table.add_column(head)
    for name, row in cells.items():
        table.add_row(name, *row)
    Console().print(table)
    if "delong" in report:
        d = report["delong"]
        typer.echo(f"AUC by DeLong: {d['auc']:.3f} ({d['low']:.3f} to {d['high']:.3f})")
    if report["task"] == "segmentation" and "comparison" in report:
        difference = ", ".join(f"{n} {_cell(v)}" for n, v in report["comparison"]["difference"].items())
        typer.echo(f"difference to the other model: {difference}")
    if "delong" in report.get("comparison", {}):
        d = report["comparison"]["delong"]
        typer.echo(f"AUC difference by DeLong: {d['auc_difference']:+.3f}, p = {d['p_value']:.2g}")
    for key, what in (
        ("classes_without_both_labels", "not measurable, one label only"),
        ("classes_without_cases", "without a case"),
        ("predictions_without_reference", "predicted but without a reference, not scored"),
    ):
        if report.get(key):
            typer.echo(f"{what}: {', '.join(report[key])}")


def _cell(interval: dict[str, float] | None) -> str:
    if interval is None:
        return ""
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"
