"""Options that several sources share: one name, one help text, one set of values.

A source writes ``max_side: MaxSide = 0`` among its fields.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from data_prep.model import Form

FormOption = Annotated[Form, typer.Option(help="Which of a NIfTI header's two geometries to take when they disagree.")]
MaxSide = Annotated[int, typer.Option(help="Longer side at most this many pixels; 0 keeps the size.", min=0)]
CropBreast = Annotated[bool, typer.Option("--crop-breast", help="Mammograms: cut to the breast, masks alike.")]
Uneven = Annotated[
    Literal["error", "resample", "largest-block"],
    typer.Option(help="Missing slices or uneven steps: refuse, resample, or keep the largest even part."),
]
Converter = Annotated[
    Literal["dcm2niix", "simpleitk"],
    typer.Option(help="dcm2niix: compare uncompressed volumes with what it makes; simpleitk: do not."),
]
