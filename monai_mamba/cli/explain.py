"""``monai-mamba explain`` and ``monai-mamba robustness``: what a trained bundle looks at, and what it bears."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from monai_mamba.cli.parsing import parse_argument

Data = Annotated[Path, typer.Argument(help="Folder with a datalist.json (or, to explain only, with images).")]
Model = Annotated[Path, typer.Option("--model", "-m", help="Trained bundle, or its folder models.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="New or empty folder for the results.")]
SectionName = Annotated[str, typer.Option(help="Section of the data set: training, validation or test.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only so many cases, evenly spaced.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Cases per pass.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: the GPU if there is one.")]
Arguments = Annotated[
    list[str] | None,
    typer.Option("--argument", "-a", help="Entry of the bundle's inference.json, e.g. -a network_def#dims=48."),
]


def explain(
    data: Data,
    model: Model,
    output: Output,
    section: SectionName = "test",
    method: Annotated[
        str | None,
        typer.Option(help="gradcam (default for classes) or gradcam++ (default for label maps, landmarks)."),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Stage (or decoder) to look at; default: the deepest that is fine enough.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Class, structure or landmark to explain; default: the predicted class, or all of them."),
    ] = None,
    region: Annotated[
        str,
        typer.Option(help="Label maps, landmarks: explain what was found (predicted), or the whole output (all)."),
    ] = "predicted",
    case: Annotated[
        list[str] | None, typer.Option(help="Case to draw. Repeatable; default: wrong and sure ones.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to draw if no cases are named.")] = 12,
    checks: Annotated[
        int | None,
        typer.Option(min=0, help="Maps for the sanity checks; 0 for none. Default: 16, or 6 of label maps, landmarks."),
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    device: Device = None,
    argument: Arguments = None,
) -> None:
    """Show where a trained model looks: Grad-CAM pictures and sanity checks, for classifiers PCA and t-SNE, too.

    For label maps the map is Seg-Grad-CAM of a structure, for landmarks that of the heat map at the place that was
    found.
    """
    from monai_mamba.explain.run import explain as run

    with _reported_errors(), _progress() as on_progress:
        summary = run(
            model, data, output, section=section, method=method, layer=layer, target=target, region=region,
            chosen=case or [], num_pictures=pictures, num_checks=checks, limit=limit, batch_size=batch_size, seed=seed,
            device=device, overrides=_overrides(argument), on_progress=on_progress,
        )  # fmt: skip
    layer = f"{summary['method']} of {summary['layer']} ({' x '.join(map(str, summary['map_size']))})"
    typer.echo(f"{len(summary['pictures'])} pictures of {summary['cases']} cases, {layer}")
    for name, cases in summary["not_found"].items():
        shown = ", ".join(cases[:3]) + (", ..." if len(cases) > 3 else "")
        typer.echo(f"{name}: found nowhere in {len(cases)} of {summary['cases']} cases ({shown})")
    empty = [entry["text"].partition(";")[0] for entry in summary["pictures"] if entry["is_empty"]]
    if empty:
        shown = "; ".join(empty[:3]) + ("; ..." if len(empty) > 3 else "")
        typer.echo(f"{len(empty)} empty maps, nothing in {summary['layer']} speaks for it: {shown}")
        typer.echo("try --method gradcam++ or another --layer")
    for check in summary["sanity"]:
        typer.echo(f"{'passed    ' if check['passed'] else 'NOT PASSED'}  {check['name']}: {check['figure']}")
    typer.echo(f"written: {output}")


def robustness(
    data: Data,
    model: Model,
    output: Output,
    section: SectionName = "test",
    perturbation: Annotated[
        list[str] | None, typer.Option("--perturbation", "-p", help="Which; repeatable. Default: all of them.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of the bootstrap over patients.")] = 1000,
    level: Annotated[float, typer.Option(help="Coverage of the intervals.")] = 0.95,
    limit: Limit = None,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    device: Device = None,
    argument: Arguments = None,
) -> None:
    """Measure a trained model on worse images: eight perturbations at five severities.

    All six metrics of classes, Dice of label maps, errors of landmarks. Rotation and translation (the references move,
    too), color_temperature (of colored pictures), brightness, contrast, noise, blur, resolution.
    """
    from monai_mamba.robustness.run import measure_robustness

    with _reported_errors(), _progress() as on_progress:
        summary = measure_robustness(
            model, data, output, section=section, names=perturbation or [], limit=limit, batch_size=batch_size,
            num_draws=draws, level=level, seed=seed, device=device, overrides=_overrides(argument),
            on_progress=on_progress,
        )  # fmt: skip
    _show(summary)
    for name, reason in summary["skipped"].items():
        typer.echo(f"{name}: not measured, {reason}")
    typer.echo(f"written: {output}")


def _show(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from monai_mamba.evaluation.report.evaluation import metric_name, upper_first

    metric = summary["primary"]
    name = upper_first(metric_name(metric))
    table = Table(title=f"{name} of {summary['cases']} cases, as they are {summary['unchanged'][metric]['value']:.3f}")
    for head in ("perturbation", "unit", "1", "2", "3", "4", "5"):
        table.add_column(head)
    for key, entry in summary["perturbations"].items():
        table.add_row(key, entry["unit"], *(f"{level['metrics'][metric]['value']:.3f}" for level in entry["levels"]))
    Console().print(table)


def _overrides(texts: list[str] | None) -> dict[str, Any]:
    return dict(parse_argument(text) for text in texts or [])


@contextmanager
def _reported_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, FileExistsError) as error:
        raise typer.BadParameter(str(error)) from None


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total)

        yield on_progress
