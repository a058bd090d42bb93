"""``monai-mamba evaluate``: figures with intervals from a table of predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    predictions: Annotated[
        Path, typer.Argument(help="Table of the test cases: case, [patient, study,] label, prob_<class> ...")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for metrics.json and reliability.png.")],
    validation: Annotated[
        Path | None, typer.Option(help="Table of the validation cases: Youden's threshold and the temperature.")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="Table of another model on the same test cases.")] = None,
    group: Annotated[str, typer.Option(help="Score by case, or the mean over each study or patient.")] = "case",
    draws: Annotated[int, typer.Option(min=1, help="Draws of the bootstrap over patients.")] = 1000,
    level: Annotated[float, typer.Option(help="Coverage of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Evaluate a classification: six metrics, AUC by DeLong, calibration, intervals by patients."""
    from monai_mamba.evaluation.tables import evaluate_files

    try:
        report = evaluate_files(predictions, output, validation, compare, group, draws, level, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _show(report, level)
    typer.echo(f"written: {output / 'metrics.json'}")


def _show(report: dict[str, Any], level: float) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {"most probable class": report["metrics"]}
    if "youden" in report:
        columns[f"threshold {report['youden']['threshold']:.3f} from validation"] = report["youden"]["metrics"]
    if "comparison" in report:
        columns["difference to the other model"] = report["comparison"]["difference"]
    table = Table(title=f"{report['cases']} cases of {report['patients']} patients, {level:.0%} intervals")
    table.add_column("metric")
    for name in columns:
        table.add_column(name)
    for metric in report["metrics"]:
        table.add_row(metric, *(_cell(column.get(metric)) for column in columns.values()))
    Console().print(table)
    if "delong" in report:
        d = report["delong"]
        typer.echo(f"AUC by DeLong: {d['auc']:.3f} ({d['low']:.3f} to {d['high']:.3f})")
    if "delong" in report.get("comparison", {}):
        d = report["comparison"]["delong"]
        typer.echo(f"AUC difference by DeLong: {d['auc_difference']:+.3f}, p = {d['p_value']:.2g}")
    if report.get("classes_without_both_labels"):
        typer.echo(f"not measurable, one label only: {', '.join(report['classes_without_both_labels'])}")


def _cell(interval: dict[str, float] | None) -> str:
    if interval is None:
        return ""
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"
