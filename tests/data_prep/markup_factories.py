"""Slicer line markups as Slicer 5 writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.data_prep.factories import write_json

Point = Sequence[float]


def line_markup(points: Sequence[Point], system: str | None = "LPS", **more: Any) -> dict[str, Any]:
    """A line whose end points are given in RAS+ mm, written in `system`; ``None`` leaves the key out and writes LPS."""
    sign = 1 if system == "RAS" else -1
    node = {
        "type": "Line",
        **({} if system is None else {"coordinateSystem": system}),
        "coordinateUnits": "mm",
        "locked": False,
        "controlPoints": [
            {
                "id": str(number),
                "label": f"L-{number}",
                "position": [sign * p[0], sign * p[1], p[2]],
                "orientation": [-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0],
                "positionStatus": "defined",
            }
            for number, p in enumerate(points, 1)
        ],
        "measurements": [{"name": "length", "enabled": True, "value": math.dist(*points), "units": "mm"}]
        if len(points) == 2
        else [],
    }
    return {"@schema": "markups-schema-v1.0.3.json#", "markups": [node | more]}


def write_lines(folder: Path, lines: Sequence[Sequence[Point]], system: str | None = "LPS", first: int = 1) -> None:
    """One file per line, whose names end with its number; 10 sorts before 9 as text."""
    for number, points in enumerate(lines, first):
        write_json(folder / f"line_{number}.mrk.json", line_markup(points, system))
