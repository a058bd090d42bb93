"""Write ``report.html``: one file with pictures, curves and tables that needs no network and reads well on a phone."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from monai_mamba.quickstart.evaluation import EMPTY_POLICY, Evaluation
from monai_mamba.quickstart.training_log import Epoch

#: Okabe and Ito's palette: distinct for people who do not see all colors, and visible on gray.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
_NUM_PICTURES = 3
_PANEL_INCHES = 3.0
#: Axes of a volume in RAS+ order: name, index of the axis that is cut, letters at the left, right, bottom and top.
_PLANES = (("axial", 2, tuple("LRPA")), ("coronal", 1, tuple("LRIS")), ("sagittal", 0, tuple("PAIS")))


@dataclass(frozen=True)
class ReportContent:
    """Everything the report shows.

    Attributes:
        facts: plain facts of the run, as in ``metrics.json`` under ``run``.
        evaluation: scores of the held-out cases.
        epochs: the training, epoch by epoch.
        images, references, predictions: folders with ``<case>_0000.nii.gz``, ``<case>.nii.gz``, ``<case>.nii.gz``.
        commands: shell lines for one's own data.
        full_length_iterations: iterations of a training of nnU-Net's own length.
    """

    facts: dict[str, Any]
    evaluation: Evaluation
    epochs: Sequence[Epoch]
    images: Path
    references: Path
    predictions: Path
    commands: str
    full_length_iterations: int


def render(content: ReportContent) -> str:
    """Return the report as HTML."""
    import jinja2

    evaluation = content.evaluation
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = lambda value, digits=3: "–" if value is None else f"{value:.{digits}f}"
    colors = {label: _color(index) for index, label in enumerate(evaluation.labels)}
    return environment.get_template("report.html.j2").render(
        facts=content.facts,
        evaluation=evaluation,
        structures=evaluation.as_dict()["per_class"],
        colors=colors,
        pictures=[
            {
                "case": case,
                "title": title,
                "dice": evaluation.case_dice(case),
                "source": _draw_overlay(content, case, colors),
            }
            for case, title in _pick_cases(evaluation)
        ],
        curves=_draw_curves(content.epochs, list(evaluation.labels.values())) if content.epochs else [],
        commands=content.commands,
        full_length_iterations=content.full_length_iterations,
        total_minutes=sum(content.facts["seconds"].values()) / 60,
        empty_policy=EMPTY_POLICY,
    )


def _pick_cases(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The best, the middle and the worst case: a picture of the best alone would flatter."""
    ranked = sorted(evaluation.cases, key=lambda case: -(evaluation.case_dice(case) or 0.0))
    if len(ranked) < _NUM_PICTURES:
        return [(case, "held-out case") for case in ranked]
    return [(ranked[0], "best"), (ranked[len(ranked) // 2], "middle"), (ranked[-1], "worst")]


def _draw_overlay(content: ReportContent, case: str, colors: dict[int, str]) -> str:
    image, spacing = _load_ras(content.images / f"{case}_0000.nii.gz")
    reference, _ = _load_ras(content.references / f"{case}.nii.gz")
    prediction, _ = _load_ras(content.predictions / f"{case}.nii.gz")
    low, high = np.percentile(image, (0.5, 99.5))
    foreground = reference > 0 if (reference > 0).any() else prediction > 0

    figure = Figure(figsize=(3 * _PANEL_INCHES, _PANEL_INCHES * 1.08), facecolor="black", layout="constrained")
    for panel, (name, axis, letters) in zip(figure.subplots(1, 3), _PLANES, strict=True):
        others = tuple(a for a in range(3) if a != axis)
        index = int(foreground.sum(axis=others).argmax()) if foreground.any() else image.shape[axis] // 2
        picture, wanted, found = (np.take(v, index, axis=axis).T for v in (image, reference, prediction))
        width_mm, height_mm = picture.shape[1] * spacing[others[0]], picture.shape[0] * spacing[others[1]]
        extent = (0.0, width_mm, 0.0, height_mm)
        panel.imshow(
            picture,
            cmap="gray",
            vmin=low,
            vmax=max(high, low + 1e-6),
            origin="lower",
            extent=extent,
            interpolation="bicubic",
        )
        for label, color in colors.items():
            _draw_structure(panel, wanted == label, found == label, color, extent)
        panel.set_xlim(0, width_mm)
        panel.set_ylim(0, height_mm)
        panel.set_title(name, color="white", fontsize=10)
        panel.axis("off")
        left, right, bottom, top = letters
        for x, y, letter in ((0.03, 0.5, left), (0.97, 0.5, right), (0.5, 0.04, bottom), (0.5, 0.96, top)):
            mark = panel.text(
                x, y, letter, transform=panel.transAxes, color="white", fontsize=9, ha="center", va="center"
            )
            mark.set_path_effects([withStroke(linewidth=2, foreground="black")])
    return _as_source(figure, "png")


def _draw_structure(panel: Any, wanted: np.ndarray, found: np.ndarray, color: str, extent: tuple[float, ...]) -> None:
    """The prediction as a tint, the reference as a line around its voxels."""
    from matplotlib.colors import to_rgba

    tint = np.zeros((*found.shape, 4))
    tint[found] = to_rgba(color, 0.5)
    panel.imshow(tint, origin="lower", extent=extent, interpolation="nearest")
    if wanted.any():
        # With a margin, so that a line closes at the border of the volume, and at the centers of the voxels.
        step_x, step_y = extent[1] / wanted.shape[1], extent[3] / wanted.shape[0]
        padded = np.pad(wanted.astype(float), 1)
        x = (np.arange(padded.shape[1]) - 0.5) * step_x
        y = (np.arange(padded.shape[0]) - 0.5) * step_y
        panel.contour(x, y, padded, levels=[0.5], colors=[color], linewidths=1.8)


def _draw_curves(epochs: Sequence[Epoch], structures: Sequence[str]) -> list[dict[str, str]]:
    numbers = [epoch.number + 1 for epoch in epochs]
    marker = "o" if len(epochs) <= 30 else ""

    def axes(label: str) -> tuple[Figure, Any]:
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        panel = figure.subplots()
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure, panel

    loss, panel = axes("loss (Dice + cross-entropy)")
    panel.plot(
        numbers, [_or_nan(e.train_loss) for e in epochs], marker=marker, markersize=3, color="#0072B2", label="training"
    )
    panel.plot(
        numbers, [_or_nan(e.val_loss) for e in epochs], marker=marker, markersize=3, color="#D55E00", label="validation"
    )
    panel.legend(frameon=False)

    dice, panel = axes("Dice of validation patches")
    for index, name in enumerate(structures):
        values = [e.dice[index] if index < len(e.dice) else float("nan") for e in epochs]
        panel.plot(numbers, values, marker=marker, markersize=3, color=_color(index), label=name)
    panel.set_ylim(0, 1)
    panel.legend(frameon=False, ncols=1 if len(structures) < 6 else 2)
    return [
        {"title": "Loss per epoch", "source": _as_source(loss, "svg")},
        {"title": "Dice of validation patches per epoch", "source": _as_source(dice, "svg")},
    ]


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _load_ras(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Voxels in the order right, anterior, superior, and the voxel size in mm."""
    image = nib.as_closest_canonical(nib.load(path))
    assert isinstance(image, nib.Nifti1Image)
    data = np.asarray(image.dataobj)
    return data.reshape(data.shape[:3]), tuple(float(s) for s in nib.affines.voxel_sizes(image.affine))


def _as_source(figure: Figure, kind: str) -> str:
    """The figure as a ``data:`` address; without a date, so that equal runs give equal files."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(buffer, format=kind, dpi=110, metadata=metadata)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
