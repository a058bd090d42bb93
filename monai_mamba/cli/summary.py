"""``monai-mamba summary``: what a network is made of and what it costs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monai_mamba.cli.parsing import parse_argument, parse_shape

if TYPE_CHECKING:
    from rich.console import Console

    from monai_mamba.networks.counting import PartSummary
    from monai_mamba.networks.registry import ModelEntry


def summary(
    name: Annotated[
        str | None, typer.Argument(help="Name of a network, e.g. medmamba_t. Without one, all names are listed.")
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option("--input", help="Shape of the input, e.g. 1x3x224x224. Default: the one papers count with."),
    ] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option("--argument", "-a", help="Argument of the network, e.g. -a num_classes=6. May be repeated."),
    ] = None,
    depth: Annotated[int, typer.Option(min=0, help="How deep to list the modules of the network.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show parameters, MACs and FLOPs of a network, part by part, beside what the papers print.

    Nothing is computed: shapes alone are followed through the network. FLOPs are two per MAC plus the scans, which
    take 9 B L D N + B L D operations each. Normalisations and activations are not counted.
    """
    import torch

    from monai_mamba.networks.counting import summarize
    from monai_mamba.networks.registry import create_model, list_models, model_entry

    if name is None:
        _print_list([model_entry(n) for n in list_models()], as_json)
        return
    try:
        entry = model_entry(name)
        arguments = dict(parse_argument(text) for text in argument or [])
        shape = parse_shape(input_shape) if input_shape else _default_shape(entry, arguments)
        with torch.device("meta"):
            network = create_model(name, **arguments)
        parts = summarize(network, shape, depth=depth)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        typer.echo(json.dumps(_as_json(entry, arguments, shape, parts), indent=2))
    else:
        _print_summary(entry, shape, parts)


def _default_shape(entry: ModelEntry, arguments: dict[str, Any]) -> tuple[int, ...]:
    batch, channels, *spatial = entry.input_shape
    if "in_channels" in arguments:
        views = 2 if entry.task == "two-view classification" else 1
        channels = arguments["in_channels"] * views
    spatial = spatial[: arguments.get("spatial_dims", len(spatial))]
    return (batch, channels, *spatial)


def _published_line(entry: ModelEntry) -> str:
    published = entry.published
    figures = ", ".join(
        f"{value} {what}" for value, what in ((published.parameters, "parameters"), (published.flops, "FLOPs")) if value
    )
    if not figures:
        return ""
    beyond = ", ".join(f"{key}={value}" for key, value in published.arguments.items())
    return f"{figures}{f' with {beyond}' if beyond else ''} ({published.note})"


def _as_json(
    entry: ModelEntry, arguments: dict[str, Any], shape: tuple[int, ...], parts: list[PartSummary]
) -> dict[str, Any]:
    return {
        "name": entry.name,
        "family": entry.family,
        "task": entry.task,
        "source": entry.source,
        "arguments": {**entry.arguments, **arguments},
        "input_shape": shape,
        **parts[0].counts.as_dict(),
        "published": {
            "parameters": entry.published.parameters,
            "flops": entry.published.flops,
            "arguments": dict(entry.published.arguments),
            "note": entry.published.note,
        },
        "parts": [
            {"path": p.path, "kind": p.kind, "output_shape": p.output_shape, **p.counts.as_dict()} for p in parts[1:]
        ],
    }


def _print_list(entries: list[ModelEntry], as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "name": e.name,
                "family": e.family,
                "task": e.task,
                "parameters": e.parameters,
                "source": e.source,
                "aliases": e.aliases,
            }
            for e in entries
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "task", "parameters", "source"):
        table.add_column(column, justify="right" if column == "parameters" else "left", no_wrap=column != "source")
    for e in entries:
        table.add_row(e.name, e.task, f"{e.parameters:,}", e.source)
    _console().print(table)


def _print_summary(entry: ModelEntry, shape: tuple[int, ...], parts: list[PartSummary]) -> None:
    from rich.table import Table

    console = _console()
    total = parts[0].counts
    console.print(f"[bold]{entry.name}[/bold]  {entry.task}, {entry.source}")
    console.print(f"input {'x'.join(map(str, shape))}\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("part", no_wrap=True)
    table.add_column("module", no_wrap=True)
    table.add_column("output", no_wrap=True)
    for column in ("parameters", "conv MACs", "linear MACs", "scan inputs", "scan", "FLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    for part in [*parts[1:], parts[0]]:
        if part.counts.parameters == 0 and part.path:
            continue
        c = part.counts
        table.add_row(
            part.path or "total",
            part.kind,
            "x".join(map(str, part.output_shape or ())),
            f"{c.parameters:,}",
            *(_short(n) for n in (c.convolution_macs, c.linear_macs, c.projection_macs, c.scan_operations, c.flops)),
            style="bold" if not part.path else "",
        )
    console.print(table)
    console.print(
        f"\nparameters {total.parameters:,} ({total.trainable:,} trainable)   MACs {_short(total.macs)}   "
        f"scans {_short(total.scan_operations)}   FLOPs {_short(total.flops)} (2 MACs + scans)"
    )
    if line := _published_line(entry):
        console.print(f"published: {line}", soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    # Into a pipe rich lays out for 80 columns and cuts the figures off.
    return console if console.is_terminal else Console(width=160, highlight=False)


def _short(number: int) -> str:
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.3f} {unit}"
    return str(number)
