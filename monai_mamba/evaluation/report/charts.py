"""The charts of the reports, one function each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from monai_mamba.evaluation import calibration
from monai_mamba.evaluation.report.page import chart, color_of

_GRAY = "0.55"


def plain(text: object) -> str:
    """Return a name as matplotlib shows it letter by letter: dollar signs would start a formula."""
    return str(text).replace("$", r"\$")


def draw_roc(truths: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray]) -> Figure:
    """Draw ROC curves by name; ``truths`` are booleans, ``scores`` probabilities."""
    from sklearn.metrics import roc_auc_score, roc_curve

    figure, panel = chart(xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    panel.plot([0, 1], [0, 1], color=_GRAY, linewidth=1, linestyle="--")
    for index, (name, truth) in enumerate(truths.items()):
        false_positive_rate, sensitivity, _ = roc_curve(truth, scores[name])
        area = roc_auc_score(truth, scores[name])
        panel.plot(false_positive_rate, sensitivity, color=color_of(index), label=f"{plain(name)} ({area:.3f})")
    panel.set_aspect("equal")
    panel.legend(frameon=False, fontsize=8, title="AUC", title_fontsize=8, loc="lower right")
    return figure


def draw_precision_recall(truths: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray]) -> Figure:
    """Draw precision over sensitivity by name; the dotted lines are the shares of the positives."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    figure, panel = chart(
        xlabel="sensitivity (recall)", ylabel="precision", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01)
    )  # fmt: skip
    for index, (name, truth) in enumerate(truths.items()):
        precision, sensitivity, _ = precision_recall_curve(truth, scores[name])
        area = average_precision_score(truth, scores[name])
        panel.plot(
            sensitivity, precision, color=color_of(index), drawstyle="steps-post", label=f"{plain(name)} ({area:.3f})"
        )
        panel.axhline(np.mean(truth), color=color_of(index), linewidth=1, linestyle=":")
    panel.set_aspect("equal")
    panel.legend(frameon=False, fontsize=8, title="average precision", title_fontsize=8, loc="lower left")
    return figure


def draw_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix, rows being the true classes; the shade is the share of the row."""
    matrix = np.asarray(counts)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = 3.6 + 0.28 * max(len(classes) - 4, 0)
    figure, panel = chart(size + 0.9, size, xlabel="predicted", ylabel="true")
    panel.grid(False)
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = [plain(name) for name in classes]
    panel.set_xticks(range(len(names)), names, rotation=0 if len(names) < 4 else 45, ha="center")
    panel.set_yticks(range(len(names)), names)
    panel.tick_params(length=0)
    for (row, column), count in np.ndenumerate(matrix):
        color = "white" if share[row, column] > 0.55 else "0.15"
        panel.text(column, row, f"{count}\n{share[row, column]:.0%}", ha="center", va="center", color=color, fontsize=8)
    return figure


def draw_reliability(label: np.ndarray, probs: np.ndarray, scaled: np.ndarray | None = None) -> Figure:
    """Draw a reliability diagram with the number of cases per bin.

    Args:
        label: class numbers ``(cases,)``.
        probs: probabilities ``(cases, classes)``.
        scaled: probabilities after temperature scaling, drawn beside.
    """
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color=_GRAY, linewidth=1, linestyle="--")
    for index, (name, values) in enumerate((("as they are", probs), ("temperature scaled", scaled))):
        if values is None:
            continue
        diagram = calibration.reliability(label, values)
        title = f"{name}, ECE {diagram.expected_error:.3f}"
        above.plot(
            diagram.confidence, diagram.accuracy, marker="o", markersize=4, color=color_of(5 + index), label=title
        )
        below.stairs(diagram.count, diagram.edges, color=color_of(5 + index), fill=index == 0, alpha=0.5 + 0.5 * index)
    above.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    above.legend(frameon=False, fontsize=8, loc="upper left")
    below.set(xlabel="probability of the predicted class", ylabel="cases")
    for panel in (above, below):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def draw_cases(values: Mapping[str, np.ndarray], label: str) -> Figure:
    """Draw the figures of all cases by structure or landmark: a box, and every case as a point."""
    figure, panel = chart(5.2, 1.4 + 0.45 * len(values), xlabel=label)
    kept = {name: v[~np.isnan(v)] for name, v in values.items()}
    positions = np.arange(len(kept), 0, -1)
    panel.boxplot(
        list(kept.values()), positions=positions, vert=False, showfliers=False, widths=0.55,
        boxprops={"color": "0.45"}, whiskerprops={"color": "0.45"}, capprops={"color": "0.45"},
        medianprops={"color": "0.15", "linewidth": 2},
    )  # fmt: skip
    # Points get a fixed spread, so that equal runs give equal pictures.
    for index, (position, points) in enumerate(zip(positions, kept.values(), strict=True)):
        spread = np.linspace(-0.18, 0.18, len(points)) if len(points) > 1 else np.zeros(len(points))
        panel.plot(points, position + spread, "o", markersize=3, alpha=0.55, color=color_of(index))
    panel.set_yticks(positions, [plain(name) for name in kept])
    return figure


def draw_success(radius_mm: Sequence[float], share: Sequence[float]) -> Figure:
    """Draw the success detection rate over the radius."""
    figure, panel = chart(xlabel="radius (mm)", ylabel="share of the landmarks within it", ylim=(0, 1.02))
    panel.plot(radius_mm, share, color=color_of(6))
    panel.set_xlim(0, max(radius_mm))
    return figure
