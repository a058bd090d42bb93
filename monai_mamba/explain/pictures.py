"""Pictures of activation maps: the image, the image with the map, a color bar; planes of volumes in mm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from monai_mamba.evaluation.report.charts import plain
from monai_mamba.evaluation.report.page import chart, color_of
from monai_mamba.evaluation.report.volumes import PLANES, Grid, busiest_slices, draw_outline, gray_window

COLOR_MAP = "turbo"
#: Neither occurs in the color map or in a gray image.
FOUND_COLOR, REFERENCE_COLOR = "#ff4fd8", "#ffffff"
_SOLID: Literal["solid"] = "solid"
_DASHED: Literal["dashed"] = "dashed"
_MAX_OPACITY = 0.6
_PANEL_INCHES = 2.7
_FACE = "black"


@dataclass(frozen=True)
class Marks:
    """What a network found and what is there, drawn over image and map; all on the grid of the map.

    Attributes:
        found, reference: masks ``(*spatial)``.
        found_point, reference_point: positions in voxels, ``(dims,)``.
        window: first and last voxel of the part that was looked at, if that is not all of it.
    """

    found: np.ndarray | None = None
    reference: np.ndarray | None = None
    found_point: np.ndarray | None = None
    reference_point: np.ndarray | None = None
    window: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def outlines(self) -> list[tuple[np.ndarray, str, Literal["solid", "dashed"], str]]:
        """Masks with color, style of the line and name; the last is drawn above the others."""
        reference = [] if self.reference is None else [(self.reference, REFERENCE_COLOR, _DASHED, "reference")]
        return reference + ([] if self.found is None else [(self.found, FOUND_COLOR, _SOLID, "found")])

    @property
    def points(self) -> list[tuple[np.ndarray, str, str, str]]:
        """Points with color, marker and name; the last is drawn above the others."""
        reference = [] if self.reference_point is None else [(self.reference_point, REFERENCE_COLOR, "x", "reference")]
        return reference + ([] if self.found_point is None else [(self.found_point, FOUND_COLOR, "+", "found")])

    def turned(self, grid: Grid) -> Marks:
        """Return the marks of a volume in RAS+ order."""
        found, reference = (None if m is None else grid.turn(m) for m in (self.found, self.reference))
        points = [None if p is None else grid.turn_point(p) for p in (self.found_point, self.reference_point)]
        window = None
        if self.window is not None:
            corners = np.stack([grid.turn_point(corner) for corner in self.window])
            window = corners.min(0), corners.max(0)
        return Marks(found, reference, points[0], points[1], window)


def draw_image_maps(
    images: Sequence[np.ndarray],
    maps: np.ndarray,
    aspects: Sequence[float],
    views: Sequence[str],
    title: str,
    marks: Marks | None = None,
) -> Figure:
    """Draw one or two images with their maps: above the image (or left of it), below the image with the map.

    Args:
        images: one per view, ``(C, H, W)`` in [0, 1], one channel or three.
        maps: ``(views, H, W)``, from 0 to 1.
        aspects: width over height of each image as it was before it became the network's input.
        views: their names; shown if there are two.
        title: above all.
        marks: drawn into every panel.
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
        if marks is not None:
            for panel in (plain_panel, overlay):
                _mark_image(panel, marks, view_map.shape, extent)
        if number > 1:
            plain_panel.set_title(plain(view), color="white", fontsize=9)
    _finish(figure, panels, marks)
    return figure


def draw_volume_map(
    volume: np.ndarray, volume_map: np.ndarray, grid: Grid, title: str, marks: Marks | None = None
) -> Figure:
    """Draw three planes without and with a map: through what was found, else through the map's strongest voxels.

    Args:
        volume: ``(i, j, k)`` as it is stored.
        volume_map: same shape, from 0 to 1.
        grid: of both.
        title: above all.
        marks: drawn into every panel.
    """
    marks = (marks or Marks()).turned(grid)
    volume, volume_map = grid.turn(volume), grid.turn(volume_map)
    if marks.found_point is not None:
        slices = [int(v) for v in marks.found_point.round().clip(0, np.array(volume.shape) - 1)]
    else:
        slices = list(busiest_slices(volume_map if marks.found is None else marks.found))
    low, high = gray_window(volume)
    figure = _figure(3, 2, title)
    panels = figure.subplots(2, 3)
    for column, plane in enumerate(PLANES):
        extent = plane.extent(volume.shape, grid.spacing)
        picture = plane.cut(volume, slices)
        for row, panel in enumerate(panels[:, column]):
            panel.imshow(
                picture, "gray", vmin=low, vmax=high, origin="lower", extent=extent, interpolation="bilinear"
            )  # fmt: skip
            if row == 1:
                tint = _tint(plane.cut(volume_map, slices))
                panel.imshow(tint, origin="lower", extent=extent, interpolation="bilinear")
            for mask, color, style, _ in marks.outlines:
                draw_outline(panel, plane.cut(mask, slices), extent, color, style)
            for point, color, marker, _ in marks.points:
                _mark_point(panel, plane.place(point, volume.shape, grid.spacing), color, marker)
            if marks.window is not None:
                edges = marks.window[0] - 0.5, marks.window[1] + 0.5
                corners = [plane.place(edge, volume.shape, grid.spacing) for edge in edges]
                _mark_window(panel, corners)
            panel.set(xlim=extent[:2], ylim=extent[2:])
            plane.dress(panel, grid)
    _finish(figure, panels, marks)
    return figure


def draw_sanity(
    shares: Sequence[float], curves: dict[str, list[float]], similarity: dict[float, Any], score: str
) -> Figure:
    """Draw the deletion curves of a score, called ``score``, and the similarity to the maps of shuffled networks."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (name, label) in enumerate((("map", "by the map"), ("random", "by random maps"))):
        left.plot(shares, curves[name], color=color_of(5 + index), label=label)
    top = max(1.0, *(max(curve) for curve in curves.values()))  # a heat map can rise above what it was
    left.set(xlabel="share of the image that is deleted", ylabel=score, xlim=(0, 1), ylim=(0, 1.02 * top))
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


def _mark_image(panel: Any, marks: Marks, shape: Sequence[int], extent: tuple[float, float, float, float]) -> None:
    """Marks of a picture, whose rows run downwards; ``shape`` is that of its map."""
    for mask, color, style, _ in marks.outlines:
        draw_outline(panel, mask[::-1], extent, color, style)

    def place(point: np.ndarray) -> tuple[float, float]:
        row, column = point
        return (column + 0.5) / shape[1] * extent[1], (1 - (row + 0.5) / shape[0]) * extent[3]

    for point, color, marker, _ in marks.points:
        _mark_point(panel, place(point), color, marker)
    if marks.window is not None:
        _mark_window(panel, [place(marks.window[0] - 0.5), place(marks.window[1] + 0.5)])
    panel.set(xlim=extent[:2], ylim=extent[2:])


def _mark_point(panel: Any, place: tuple[float, float], color: str, marker: str) -> None:
    panel.plot(*place, marker, color=color, markersize=9, markeredgewidth=1.8)


def _mark_window(panel: Any, corners: Sequence[tuple[float, float]]) -> None:
    (x0, y0), (x1, y1) = corners
    panel.add_patch(
        Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="0.75", linewidth=1, linestyle="dotted")
    )


def _finish(figure: Figure, panels: np.ndarray, marks: Marks | None = None) -> None:
    for panel in panels.flat:
        panel.axis("off")
    if handles := _legend(marks):
        figure.legend(
            handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8, labelcolor="white",
            frameon=False, handlelength=2.4,
        )  # fmt: skip
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), colormaps[COLOR_MAP]), ax=list(panels.flat), fraction=0.035, pad=0.02
    )
    bar.set_label("relevance (relative)", color="white", fontsize=8)
    bar.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    bar.ax.tick_params(colors="white", labelsize=8)
    bar.outline.set_edgecolor("white")


def _legend(marks: Marks | None) -> list[Line2D]:
    if marks is None:
        return []
    handles = [Line2D([], [], color=color, linestyle=style, label=name) for _, color, style, name in marks.outlines]
    handles += [
        Line2D([], [], color=color, linestyle="", marker=marker, markeredgewidth=1.8, label=name)
        for _, color, marker, name in marks.points
    ]
    if marks.window is not None:
        handles.append(Line2D([], [], color="0.75", linestyle="dotted", label="part that was looked at"))
    return handles


def _tint(view_map: np.ndarray) -> np.ndarray:
    """Colors whose opacity grows with the map, so that what says nothing stays as it is."""
    tint = colormaps[COLOR_MAP](view_map)
    tint[..., 3] = _MAX_OPACITY * view_map
    return tint


def _displayable(image: np.ndarray) -> np.ndarray:
    image = np.clip(image, 0, 1)
    return image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
