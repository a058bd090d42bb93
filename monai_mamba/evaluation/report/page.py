"""What every report shares: the page (`base.html.j2`), figures and pictures inside the file, colors."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    import jinja2

#: Okabe and Ito's palette: distinct for people who do not see all colors, and visible on gray.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
_MIME = {"svg": "image/svg+xml", "png": "image/png"}


def render_page(template: os.PathLike[str] | str, **content: Any) -> str:
    """Return a report as HTML.

    Args:
        template: file that extends ``base.html.j2``.
        content: what the template names.
    """
    import jinja2

    folders = [Path(template).parent, Path(__file__).parent]
    environment: jinja2.Environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = format_number
    return environment.get_template(Path(template).name).render(**content)


def format_number(value: float | None, digits: int = 3) -> str:
    """Return a number for a table; a dash for what could not be measured."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def color_of(index: int) -> str:
    """Return the color of structure or curve number ``index``."""
    return COLORS[index % len(COLORS)]


def figure_source(figure: Figure, kind: str = "svg") -> str:
    """Return a figure as a ``data:`` address; without a date, so that equal runs give equal files."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(buffer, format=kind, dpi=110, metadata=metadata)
    return _source(buffer.getvalue(), kind)


def picture_source(path: os.PathLike[str] | str) -> str:
    """Return a PNG file as a ``data:`` address."""
    return _source(Path(path).read_bytes(), "png")


def chart(width: float = 5.2, height: float = 3.6, **axes: Any) -> tuple[Figure, Any]:
    """Return a figure and its one panel in the reports' style.

    Args:
        width, height: in inches.
        axes: for ``Axes.set``, e.g. ``xlabel``.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    panel = figure.subplots()
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set(**axes)
    return figure, panel


def _source(content: bytes, kind: str) -> str:
    return f"data:{_MIME[kind]};base64,{base64.b64encode(content).decode('ascii')}"
