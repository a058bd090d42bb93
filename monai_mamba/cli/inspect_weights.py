"""``monai-mamba inspect-weights``: what a weight file holds, without running anything in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer


def inspect_weights(
    file: Annotated[Path | None, typer.Argument(help="File of torch.save or safetensors.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Key under which the weights lie, e.g. model_ema. Default: the usual ones.")
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every tensor.")] = False,
    catalogue: Annotated[
        bool, typer.Option("--catalogue", help="List the files their authors have published.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a weight file is: format, network, sizes, and whether its values are whole.

    Nothing in the file is run: a file with anything but tensors and plain values is refused.
    """
    if catalogue:
        _print_catalogue(as_json)
        return
    if file is None:
        raise typer.BadParameter("give a FILE, or --catalogue for what has been published")
    facts = _facts(file, weights, keys)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{file}: {facts['format']}, {facts['bytes']:,} bytes, sha256 {facts['sha256']}")
    for group in facts["groups"]:
        chosen = "  <- the weights" if group["name"] == facts["weights"] else ""
        typer.echo(f"  {group['name'] or '(top)'}: {group['tensors']} tensors, {group['numbers']:,} numbers{chosen}")
    for key, value in facts["metadata"].items():
        typer.echo(f"  {key}: {value}")
    if facts["network"]:
        typer.echo(f"network: {facts['network']}")
        typer.echo("  " + ", ".join(f"{key}={value}" for key, value in facts["arguments"].items()))
    else:
        typer.echo(f"network: not recognized: {facts['reason']}")
    for key, (shape, dtype) in facts.get("keys", {}).items():
        typer.echo(f"  {key}  {dtype}  {'x'.join(map(str, shape)) or 'number'}")


def _facts(file: Path, weights: str | None, with_keys: bool) -> dict[str, Any]:
    from monai_mamba.errors import CheckpointError
    from monai_mamba.weights.io import WeightFile, file_digest
    from monai_mamba.weights.loading import recognize

    opened = WeightFile(file)
    name, specs = opened.state_dict(weights)
    opened.load(name)  # damaged or infinite values are an error here
    facts: dict[str, Any] = {
        "file": str(file),
        "format": opened.format,
        "bytes": file.stat().st_size,
        "sha256": file_digest(file),
        "weights": name,
        "groups": [
            {"name": group, "tensors": len(tensors), "numbers": sum(math.prod(s.shape) for s in tensors.values())}
            for group, tensors in opened.state_dicts().items()
        ],
        "metadata": opened.metadata,
        "network": "",
        "arguments": {},
        "reason": "",
    }
    try:
        found = recognize({key: spec.shape for key, spec in specs.items()})
        facts["network"], facts["arguments"] = found.title, found.arguments
    except CheckpointError as error:
        facts["reason"] = error.reason
    if with_keys:
        facts["keys"] = {key: (list(spec.shape), str(spec.dtype)[6:]) for key, spec in specs.items()}
    return facts


def _print_catalogue(as_json: bool) -> None:
    from dataclasses import asdict

    from monai_mamba.weights.catalogue import CATALOGUE

    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in CATALOGUE], indent=2))
        return
    for entry in CATALOGUE:
        size = f", {entry.parameters:,} parameters" if entry.parameters else ""
        typer.echo(f"{entry.name}: {entry.file or 'several files'}{size}")
        typer.echo(f"  {entry.page}")
        typer.echo(f"  licence: {entry.licence}; sha256: {entry.sha256 or 'not known'}")
        if entry.note:
            typer.echo(f"  {entry.note}")
