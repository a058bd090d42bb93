"""``monai-mamba convert-weights``: any published weight file to safetensors, in our layout or the published one."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated

import typer


class Target(str, enum.Enum):
    """Names that the written file uses."""

    ours = "ours"
    published = "published"


def convert_weights(
    source: Annotated[Path, typer.Argument(help="Weight file; with --url it is fetched to here first.")],
    output: Annotated[Path, typer.Argument(help="File to write, .safetensors.")],
    to: Annotated[
        Target, typer.Option(help="Names to use: those of this package or the published ones.")
    ] = Target.ours,
    weights: Annotated[
        str | None, typer.Option(help="Key under which the weights lie, e.g. model_ema. Default: the usual ones.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="Layout, where files look the same: nnmamba_landmark instead of nnmamba_seg.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Fetch SOURCE from here first; needs --sha256.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Hash that SOURCE must have.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write what became of every key to this JSON file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Convert a published weight file to safetensors, with an account of every key.

    The network is recognised from names and shapes; a file that does not hold exactly its tensors is refused.
    """
    if output.suffix != ".safetensors":
        raise typer.BadParameter(f"OUTPUT must end in .safetensors, got {output.name!r}")
    if url is not None and sha256 is None:
        raise typer.BadParameter("--url needs --sha256: nothing is fetched without a hash")
    for path in (output, report):
        if path is not None and path.exists() and not overwrite:
            raise typer.BadParameter(f"{path} exists; choose another name or give --overwrite")

    from monai_mamba import __version__
    from monai_mamba.errors import CheckpointError
    from monai_mamba.weights.download import fetch
    from monai_mamba.weights.io import atomic_path, file_digest, write_safetensors
    from monai_mamba.weights.loading import from_published, to_published

    if url is not None:
        assert sha256 is not None
        try:
            fetch(url, source, sha256)
        except (ValueError, FileExistsError) as error:
            raise typer.BadParameter(str(error)) from None
    digest = file_digest(source) if source.is_file() else ""
    if sha256 is not None and digest != sha256.lower():
        raise CheckpointError(f"its sha256 is {digest}, expected {sha256.lower()}; not converted", source)
    try:
        network, account = from_published(source, layout=layout, weights=weights, return_report=True)
        tensors = network.state_dict() if to is Target.ours else to_published(network)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    metadata = {
        "monai_mamba.version": __version__,
        "monai_mamba.layout": to.value,
        "monai_mamba.network": type(network).__name__,
        "monai_mamba.arguments": json.dumps(account.arguments),
        "monai_mamba.source_sha256": digest,
    }
    write_safetensors(output, tensors, metadata, overwrite=overwrite)
    if report is not None:
        with atomic_path(report) as temporary:
            temporary.write_text(json.dumps(account.to_dict(), indent=2))
    typer.echo(str(account))
    typer.echo(f"written: {output} ({len(tensors)} tensors, names: {to.value})")
