"""Pictures of activation maps: the image, the image with the map, a color bar; planes of volumes in mm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from monai_mamba.evaluation.report.charts import plain
from monai_mamba.evaluation.report.page import chart, color_of
from monai_mamba.evaluation.report.volumes import (
    PLANES,
    busiest_slices,
    draw_letters,
    gray_window,
    plane_extent,
    slice_planes,
)

COLOR_MAP = "turbo"
_MAX_OPACITY = 0.6
_PANEL_INCHES = 2.7
_FACE = "black"


def draw_image_maps(
    images: Sequence[np.ndarray], maps: np.ndarray, aspects: Sequence[float], views: Sequence[str], title: str
) -> Figure:
    """Draw one or two images with their maps: above the image (or left of it), below the image with the map.

    Args:
        images: one per view, ``(C, H, W)`` in [0, 1], one channel or three.
        maps: ``(views, H, W)``, from 0 to 1.
        aspects: width over height of each image as it was before it became the network's input.
        views: their names; shown if there are two.
        title: above all.
    """
    number = len(images)
    rows, columns = (1, 2) if number == 1 else (2, number)
    figure = _figure(columns, rows / min(aspects) if number == 1 else rows, title)
    panels = np.asarray(figure.subplots(rows, columns)).reshape(rows, columns)
    for index, (image, view_map, aspect, view) in enumerate(zip(images, maps, aspects, views, strict=True)):
        plain_panel, overlay = (panels[0, 0], panels[0, 1]) if number == 1 else (panels[0, index], panels[1, index])
        extent = (0.0, float(aspect), 0.0, 1.0)
        for panel in (plain_panel, overlay):
            panel.imshow(_displayable(image), cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="bilinear")
        overlay.imshow(_tint(view_map), extent=extent, interpolation="bilinear")
        if number > 1:
            plain_panel.set_title(plain(view), color="white", fontsize=9)
    _finish(figure, panels)
    return figure


def draw_volume_map(volume: np.ndarray, volume_map: np.ndarray, spacing: Sequence[float], title: str) -> Figure:
    """Draw the three planes through the strongest voxels of a map, without and with it.

    Args:
        volume: ``(i, j, k)`` in RAS+ order.
        volume_map: same shape, from 0 to 1.
        spacing: in mm.
        title: above all.
    """
    slices = busiest_slices(volume_map)
    low, high = gray_window(volume)
    figure = _figure(3, 2, title)
    panels = figure.subplots(2, 3)
    planes = zip(slice_planes(volume, slices), slice_planes(volume_map, slices), PLANES, strict=True)
    for column, (picture, plane_map, (name, axis, letters)) in enumerate(planes):
        extent = plane_extent(volume.shape, spacing, axis)
        for panel in panels[:, column]:
            panel.imshow(
                picture, "gray", vmin=low, vmax=high, origin="lower", extent=extent, interpolation="bilinear"
            )  # fmt: skip
            draw_letters(panel, letters)
        panels[1, column].imshow(_tint(plane_map), origin="lower", extent=extent, interpolation="bilinear")
        panels[0, column].set_title(name, color="white", fontsize=9)
    _finish(figure, panels)
    return figure


def draw_sanity(shares: Sequence[float], curves: dict[str, list[float]], similarity: dict[float, Any]) -> Figure:
    """Draw the deletion curves and the similarity to the maps of shuffled networks."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (name, label) in enumerate((("map", "by the map"), ("random", "by random maps"))):
        left.plot(shares, curves[name], color=color_of(5 + index), label=label)
    left.set(
        xlabel="share of the image that is deleted", ylabel="probability of the class", xlim=(0, 1), ylim=(0, 1.02)
    )
    left.legend(frameon=False, fontsize=8)
    names = [f"{share:.0%}" for share in similarity]
    values = np.array([interval.value for interval in similarity.values()])
    reach = np.array([[abs(i.value - i.low), abs(i.high - i.value)] for i in similarity.values()]).T
    right.errorbar(names, values, yerr=reach, fmt="o", color=color_of(6), capsize=4)
    right.axhline(0, color="0.6", linewidth=1)
    right.set(xlabel="parameters shuffled, from the output", ylabel="rank correlation of the maps", ylim=(-1, 1.05))
    for panel in (left, right):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def draw_embeddings(
    coordinates: dict[str, np.ndarray], labels: np.ndarray, classes: Sequence[str], right: np.ndarray | None
) -> Figure:
    """Draw embeddings in the plane, one panel per method; wrong predictions are crosses.

    Args:
        coordinates: method to ``(cases, 2)``.
        labels: class numbers.
        classes: names.
        right: which predictions are right; None if the truth is not known.
    """
    if len(coordinates) == 1:
        figure, panel = chart(4.4, 4.2)
        panels = [panel]
    else:
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        panels = list(figure.subplots(1, len(coordinates)))
    for panel, (name, points) in zip(panels, coordinates.items(), strict=True):
        for index, class_name in enumerate(classes):
            member = labels == index
            for good, marker in ((True, "o"), (False, "x")):
                drawn = member if right is None else member & (right == good)
                if not drawn.any() or (right is None and not good):
                    continue
                label = (
                    plain(class_name) if good or not (member & (right if right is not None else member)).any() else None
                )
                panel.plot(
                    *points[drawn].T, marker, color=color_of(index), markersize=4, alpha=0.7, label=label, linestyle=""
                )  # fmt: skip
        panel.set_title(name, fontsize=10)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.grid(False)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _figure(columns: float, rows: float, title: str) -> Figure:
    figure = Figure(
        figsize=(columns * _PANEL_INCHES + 0.7, rows * _PANEL_INCHES + 0.45), facecolor=_FACE, layout="constrained"
    )
    figure.suptitle(plain(title), color="white", fontsize=10)
    return figure


def _finish(figure: Figure, panels: np.ndarray) -> None:
    for panel in panels.flat:
        panel.axis("off")
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), colormaps[COLOR_MAP]), ax=list(panels.flat), fraction=0.035, pad=0.02
    )
    bar.set_label("relevance (relative)", color="white", fontsize=8)
    bar.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    bar.ax.tick_params(colors="white", labelsize=8)
    bar.outline.set_edgecolor("white")


def _tint(view_map: np.ndarray) -> np.ndarray:
    """Colors whose opacity grows with the map, so that what says nothing stays as it is."""
    tint = colormaps[COLOR_MAP](view_map)
    tint[..., 3] = _MAX_OPACITY * view_map
    return tint


def _displayable(image: np.ndarray) -> np.ndarray:
    image = np.clip(image, 0, 1)
    return image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
