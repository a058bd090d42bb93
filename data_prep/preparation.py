"""Options of sources that can preprocess volumes, and the steps they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.engine.files import sha256
from data_prep.errors import CaseError, UsageError
from data_prep.model import Make
from data_prep.nifti import open_nifti

_N4 = {"step": "n4", "shrink": 4, "iterations": [50, 50, 50, 50]}
#: voxels of the template that the metric looks at, on each level; twelve parameters need no more
_SAMPLES = 50_000


@dataclass(frozen=True)
class IntensityOptions:
    """Steps that leave the grid alone, so that label maps stay right."""

    n4: Annotated[bool, typer.Option("--n4", help="MR: correct the bias field (N4); recorded.")] = False
    zscore: Annotated[
        bool,
        typer.Option("--zscore", help="Mean 0, deviation 1 in the brain mask, else over non-zero voxels; recorded."),
    ] = False

    def steps(self) -> list[dict[str, Any]]:
        """The steps of these options, in order.

        Raises:
            UsageError: they contradict each other, or a file cannot be used.
        """
        return ([dict(_N4)] if self.n4 else []) + ([{"step": "zscore"}] if self.zscore else [])


@dataclass(frozen=True)
class VolumeOptions(IntensityOptions):
    """All steps, for volumes without label maps."""

    template: Annotated[
        Path | None,
        typer.Option(help="NIfTI image to register every volume to (affine); the result has its grid. Recorded."),
    ] = None
    spacing: Annotated[
        float, typer.Option(help="Cubic voxels of this size in mm, of the volume or the template; 0 keeps them.", min=0)
    ] = 0.0
    brain_mask: Annotated[
        Path | None, typer.Option(help="NIfTI mask on the grid of --template, for --strip, --zscore and --grid.")
    ] = None
    mask_suffix: Annotated[
        str, typer.Option(help="Each image's own mask lies beside it as NAME + this + .nii(.gz), on its grid.")
    ] = ""
    strip: Annotated[bool, typer.Option("--strip", help="Set voxels outside the brain mask to 0; recorded.")] = False
    grid: Annotated[
        str, typer.Option(help="I,J,K: crop and pad to so many voxels, around the mask or the middle; recorded.")
    ] = ""

    def steps(self) -> list[dict[str, Any]]:
        if self.brain_mask is not None and self.template is None:
            raise UsageError("--brain-mask lies on the grid of --template; give both, or --mask-suffix for own masks.")
        if self.brain_mask is not None and self.mask_suffix:
            raise UsageError("--brain-mask and --mask-suffix are two brain masks; give one of them.")
        if self.strip and self.brain_mask is None and not self.mask_suffix:
            raise UsageError("--strip needs a brain mask; give --brain-mask or --mask-suffix.")
        if self.mask_suffix and not (self.n4 or self.strip or self.zscore or self.grid):
            raise UsageError("--mask-suffix has no use without --n4, --strip, --zscore or --grid.")
        if self.spacing and not 0.1 <= self.spacing <= 20:
            raise UsageError(f"--spacing {self.spacing:g}: voxels must have 0.1 to 20 mm.")
        steps: list[dict[str, Any]] = [dict(_N4)] if self.n4 else []
        if self.template is not None:
            template = _stamp(self.template, "--template")
            steps.append({"step": "register", "template": template, "spacing": self.spacing, "samples": _SAMPLES})
        elif self.spacing:
            steps.append({"step": "spacing", "spacing": self.spacing})
        if self.brain_mask is not None:
            steps.append({"step": "mask", "brain_mask": _stamp(self.brain_mask, "--brain-mask")})
        steps += [{"step": "strip"}] if self.strip else []
        steps += [{"step": "zscore"}] if self.zscore else []
        if self.grid:
            steps.append({"step": "grid", "shape": _parse_grid(self.grid)})
        return steps


def prepare(make: Make, steps: list[dict[str, Any]], mask: str | None = None) -> Make:
    """`make` followed by steps; `make` itself when there are none.

    Args:
        make: of a volume.
        steps: see `IntensityOptions.steps`.
        mask: tree path of the volume's own brain mask.
    """
    if not steps:
        return make
    from data_prep.operations import find_operation

    version = find_operation(make.operation).operation_version  # type: ignore[attr-defined]
    first = {"operation": make.operation, "version": version, "params": dict(make.params)}
    params = {"first": first, "steps": steps} | ({"has_mask": True} if mask else {})
    return Make("operations.preprocessing:prepared", make.inputs + ((mask,) if mask else ()), params)


def _stamp(path: Path, option: str) -> dict[str, str]:
    try:
        nifti = open_nifti(path, "sform")
        if nifti.num_channels != 1:
            raise CaseError("not-3d", "it holds several volumes")
        return {"path": str(path.absolute()), "sha256": sha256(path)}
    except (CaseError, OSError) as error:
        reason = error.reason if isinstance(error, CaseError) else "it cannot be read"
        raise UsageError(f"{option} {path} is not a usable NIfTI volume ({reason}).") from error


def _parse_grid(text: str) -> list[int]:
    try:
        shape = [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        shape = []
    if len(shape) != 3 or min(shape) < 1 or max(shape) > 2048:
        raise UsageError(f"--grid must be three numbers of voxels such as 113,137,113, got {text!r}.")
    return shape
