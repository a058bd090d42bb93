"""Write the quickstart's ``report.html``: scores and pictures of the held-out cases, training, next commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from monai_mamba.evaluation.report.page import chart, color_of, figure_source, render_page
from monai_mamba.evaluation.report.volumes import CONVENTION, draw_segmentation, load_ras
from monai_mamba.evaluation.segmentation import EMPTY_POLICY, Evaluation
from monai_mamba.quickstart.training_log import Epoch

_NUM_PICTURES = 3


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
    evaluation = content.evaluation
    colors = {name: color_of(index) for index, name in enumerate(evaluation.structures)}
    return render_page(
        Path(__file__).parent / "report.html.j2",
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
        curves=_draw_curves(content.epochs, list(evaluation.structures)) if content.epochs else [],
        commands=content.commands,
        full_length_iterations=content.full_length_iterations,
        total_minutes=sum(content.facts["seconds"].values()) / 60,
        empty_policy=EMPTY_POLICY,
        convention=CONVENTION,
    )


def _pick_cases(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The best, the middle and the worst case: a picture of the best alone would flatter."""
    ranked = sorted(evaluation.cases, key=lambda case: -(evaluation.case_dice(case) or 0.0))
    if len(ranked) < _NUM_PICTURES:
        return [(case, "held-out case") for case in ranked]
    return [(ranked[0], "best"), (ranked[len(ranked) // 2], "middle"), (ranked[-1], "worst")]


def _draw_overlay(content: ReportContent, case: str, colors: dict[str, str]) -> str:
    image, grid = load_ras(content.images / f"{case}_0000.nii.gz")
    masks = []
    for folder in (content.references, content.predictions):
        labels, _ = load_ras(folder / f"{case}.nii.gz")
        masks.append({name: np.isin(labels, values) for name, values in content.evaluation.structures.items()})
    return figure_source(draw_segmentation(image, grid, masks[0], masks[1], colors), "png")


def _draw_curves(epochs: Sequence[Epoch], structures: Sequence[str]) -> list[dict[str, str]]:
    numbers = [epoch.number + 1 for epoch in epochs]
    marker = "o" if len(epochs) <= 30 else ""

    def axes(label: str) -> tuple[Figure, Any]:
        figure, panel = chart(height=3.2, xlabel="epoch", ylabel=label)
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
        panel.plot(numbers, values, marker=marker, markersize=3, color=color_of(index), label=name)
    panel.set_ylim(0, 1)
    panel.legend(frameon=False, ncols=1 if len(structures) < 6 else 2)
    return [
        {"title": "Loss per epoch", "source": figure_source(loss)},
        {"title": "Dice of validation patches per epoch", "source": figure_source(dice)},
    ]


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
