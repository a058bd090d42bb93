"""``monai-mamba export``: a network as an ONNX, torch.export or TorchScript file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monai_mamba.cli.parsing import parse_argument, parse_shape

if TYPE_CHECKING:
    from torch import nn


def export(
    network: Annotated[str, typer.Argument(help="Weight file, or name of a network (see `monai-mamba summary`).")],
    output: Annotated[Path, typer.Argument(help="File to write: .onnx, .pt2 (torch.export) or .ts (TorchScript).")],
    input_shape: Annotated[
        str | None, typer.Option("--input", help="Shape of the input, e.g. 1x3x224x224. The batch size stays free.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weight file for a network given by name.")] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option("--argument", "-a", help="Argument of a network given by name, e.g. -a num_classes=6."),
    ] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Write a network given by name with fresh random weights.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a network for another runtime, and keep the file only if it gives what the network gives."""
    import torch

    from monai_mamba.export import export_network

    try:
        model, shape = _build(network, input_shape, weights, argument or [], untrained)
        report = export_network(model, output, torch.zeros(shape), overwrite=overwrite)
    except (ValueError, TypeError, FileExistsError) as error:
        raise typer.BadParameter(str(error)) from None
    inputs = ", ".join(f"{name} {'x'.join(map(str, sizes))}" for name, sizes in report.inputs.items())
    typer.echo(f"written: {output} ({report.format}, {report.num_nodes} nodes, {output.stat().st_size:,} bytes)")
    typer.echo(f"input: {inputs}")
    sizes = ", ".join(map(str, report.batch_sizes))
    typer.echo(
        f"largest difference from the network: {report.difference:.1e} of its largest output (batches of {sizes})"
    )


def _build(
    network: str, input_shape: str | None, weights: Path | None, arguments: list[str], untrained: bool
) -> tuple[nn.Module, tuple[int, ...]]:
    from monai_mamba.networks.registry import create_model, model_entry
    from monai_mamba.weights import from_published, load_pretrained

    if Path(network).is_file():
        if weights is not None or arguments or untrained:
            raise ValueError("--weights, --argument and --untrained belong to a network given by name, not by file")
        if input_shape is None:
            raise ValueError("--input is needed, e.g. --input 1x3x224x224: a weight file does not tell the image size")
        return from_published(network), parse_shape(input_shape)
    entry = model_entry(network)
    if weights is None and not untrained:
        raise ValueError("--weights FILE is needed for a network given by name (or --untrained for random weights)")
    model = create_model(network, **dict(parse_argument(text) for text in arguments))
    if weights is not None:
        load_pretrained(model, weights)
    return model, parse_shape(input_shape) if input_shape else entry.input_shape
