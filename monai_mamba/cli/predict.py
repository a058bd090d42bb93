"""``monai-mamba predict``: a trained bundle on pictures, NIfTI or DICOM files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def predict(
    source: Annotated[
        Path,
        typer.Argument(
            help="Image, folder of images (pictures, NIfTI, DICOM), folder with a datalist.json, or CSV table with the "
            "columns image (two views: image1, image2), case, patient."
        ),
    ],
    model: Annotated[
        Path, typer.Option("--model", "-m", help="Trained bundle, its folder models, or weights with --bundle.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the predictions.")],
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Bundle that the weights given by --model (.pt or .safetensors, model.json beside) belong to."
        ),
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", "-f", help="csv or json; may be repeated. Default: csv.")
    ] = None,
    flips: Annotated[
        list[int] | None,
        typer.Option("--flip", help="Test-time augmentation: mirror this axis too (0, 1, 2); may be repeated."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=0, help="Landmarks: resolve fractions of a voxel within so many voxels of the maximum."),
    ] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option("--argument", "-a", help="Entry of the bundle's inference.json, e.g. -a network_def#dims=48."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: the GPU if there is one.")] = None,
) -> None:
    """Predict with a trained bundle: classes, landmarks or label maps, by what the bundle was trained for.

    Classification writes predictions.csv; landmarks landmarks.csv (mm, RAS+) and markups for 3D Slicer; segmentation a
    label map per case on the grid of its image. A file that cannot be read is named and left out (exit code 1). Outputs
    hold no name but those of your files; nothing of a DICOM header is copied. For research only.
    """
    from monai_mamba.cli.parsing import parse_argument
    from monai_mamba.prediction import FORMATS, find_inputs
    from monai_mamba.prediction import predict as run
    from monai_mamba.training.trained import load_trained

    chosen = list(dict.fromkeys(formats or ["csv"]))
    if unknown := [name for name in chosen if name not in FORMATS]:
        raise typer.BadParameter(f"must be {' or '.join(FORMATS)}, got {unknown[0]!r}", param_hint="--format")
    try:
        overrides: dict[str, Any] = dict(parse_argument(text) for text in argument or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if flips:
        overrides["flips"] = flips
    if window is not None:
        overrides["window"] = window
    if model.is_file():
        if bundle is None and (model.parent.parent / "configs" / "inference.json").is_file():
            bundle = model.parent.parent
        if bundle is None:
            raise typer.BadParameter(f"is needed to use the weights {model}", param_hint="--bundle")
        overrides |= {"ckpt_dir": str(model.parent), "checkpoint": str(model)}
    trained = load_trained(model if bundle is None else bundle, device=device, overrides=overrides)
    cases = find_inputs(source, trained)

    def report(case: str, reason: str | None) -> None:
        if reason is not None:
            typer.secho(f"refused: {case}: {' '.join(reason.split())}", fg=typer.colors.YELLOW, err=True)

    summary = run(trained, cases, output, formats=chosen, on_case=report)
    typer.echo(f"{len(summary.done)} of {len(cases)} cases predicted, in {output}")
    if summary.refused:
        raise typer.Exit(1)
