"""``monai-mamba bundle``: the MONAI bundles of the package, and copies of them to work with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="MONAI bundles that come with the package: list them, copy them.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """List the bundles and what they are for."""
    from monai_mamba.packaged_bundles import list_bundles

    bundles = list_bundles()
    width = max(map(len, bundles))
    for name, task in bundles.items():
        typer.echo(f"{name:{width}}  {task}")


@app.command()
def copy(
    names: Annotated[list[str], typer.Argument(help="Bundles, or all.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that gets a folder per bundle.")] = Path(
        "bundles"
    ),
) -> None:
    """Copy bundles, so that `python -m monai.bundle run --config_file bundles/NAME/train.json` works here.

    A folder that is there and not empty is refused. Trainings write into the copy.
    """
    from monai_mamba.packaged_bundles import copy_bundle, list_bundles

    known = list_bundles()
    chosen = list(known) if names == ["all"] else list(dict.fromkeys(names))
    if unknown := [name for name in chosen if name not in known]:
        raise typer.BadParameter(f"must be of {', '.join(known)} or all, got {unknown[0]!r}", param_hint="NAMES")
    for name in chosen:
        try:
            target = copy_bundle(name, output)
        except FileExistsError as error:
            raise typer.BadParameter(str(error)) from None
        typer.echo(f"written: {target}")
        # Configurations find their bundle as bundles/NAME below the working directory, or as that directory itself.
        run = "python -m monai.bundle run --config_file"
        if output == Path("bundles"):
            typer.echo(f"train:   {run} {target.as_posix()}/train.json")
        else:
            typer.echo(f"train:   cd {target} && {run} configs/train.json")
