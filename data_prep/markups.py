"""3D Slicer markups (``.mrk.json``): control points as world coordinates in RAS+.

Slicer writes positions in the system that ``coordinateSystem`` names, today LPS, formerly often RAS. Taking one for the
other mirrors every point at the origin in two axes, which still looks like a brain; so the key is honoured, and a file
without it is refused unless the user says which system it is in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from data_prep.errors import CaseError, DatasetError
from data_prep.model import Json
from data_prep.tree import Tree

System = Literal["file", "lps", "ras"]
#: Slicer has written names and, earlier, numbers
_SYSTEMS = {"LPS": "lps", "RAS": "ras", "1": "lps", "0": "ras"}
#: a markups file is a few kilobytes
_MAX_BYTES = 4 << 20
#: a stored length may differ from the distance of its two points by this much
_LENGTH_TOLERANCE = 0.02


@dataclass(frozen=True)
class Markup:
    """One markups node.

    Args:
        points: control points in order, mm, RAS+.
        length: of a line, as Slicer measured it, in mm; ``None`` when it is not stored.
    """

    points: tuple[tuple[float, float, float], ...]
    length: float | None


def read_markup(tree: Tree, path: str, system: System = "file") -> Markup:
    """Read the only markups node of a file.

    Args:
        tree: of the input.
        path: tree path.
        system: coordinate system of files that name none; ``"file"`` refuses these.

    Raises:
        CaseError: damaged, no or several nodes, an unknown unit or coordinate system, a point that is not set.
    """
    if tree.stamp(path).size > _MAX_BYTES:
        raise CaseError("damaged-markups", f"more than {_MAX_BYTES} bytes")
    try:
        content = tree.json(path)
    except DatasetError as error:
        raise CaseError("damaged-markups", "the file is not valid JSON") from error
    try:
        nodes = content["markups"]
        if not isinstance(nodes, list) or len(nodes) != 1:
            raise CaseError("damaged-markups", "one markups node is expected in a file")
        return _read_node(nodes[0], system)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CaseError("damaged-markups", "the file is not a Slicer markups file") from error


def _read_node(node: Json, system: System) -> Markup:
    stated = str(node.get("coordinateSystem", "")).upper()
    if stated and stated not in _SYSTEMS:
        raise CaseError("unknown-coordinates", "coordinateSystem is neither LPS nor RAS")
    if not stated and system == "file":
        raise CaseError("no-coordinate-system", "the file names none; say which it is with --coordinates lps or ras")
    sign = -1.0 if (_SYSTEMS[stated] if stated else system) == "lps" else 1.0
    units = node.get("coordinateUnits", "mm")
    # Slicer writes a string, or a coded entry [value, scheme, meaning].
    if "mm" not in (units if isinstance(units, list) else [units]):
        raise CaseError("unknown-unit", "coordinateUnits is not mm")
    points = []
    for point in node["controlPoints"]:
        if point.get("positionStatus", "defined") != "defined":
            raise CaseError("missing-landmark", "a control point has not been placed")
        x, y, z = (float(value) for value in point["position"])
        if not all(map(math.isfinite, (x, y, z))):
            raise CaseError("missing-landmark", "a control point has no finite position")
        points.append((sign * x, sign * y, z))
    lengths = [m for m in node.get("measurements", []) if m.get("name") == "length" and m.get("value") is not None]
    length = float(lengths[0]["value"]) if lengths and lengths[0].get("units", "mm") == "mm" else None
    return Markup(tuple(points), length)


def read_lines(
    tree: Tree, paths: Sequence[str], measures: Sequence[str], system: System
) -> dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]]:
    """End points of line markups, one file per measure, the files ordered by the number that ends their names.

    Raises:
        CaseError: not as many files as measures, no or repeated numbers, not two points in a file, or a stored length
            that is not the distance of the points.
    """
    if len(paths) != len(measures):
        raise CaseError("wrong-number-of-files", f"{len(paths)} markups files, expected {len(measures)}")
    numbers = []
    for path in paths:
        found = re.search(r"(\d+)(\.mrk)?\.json$", PurePosixPath(path).name, re.IGNORECASE)
        if not found:
            raise CaseError("no-number", "a markups file's name must end with the number that says what it measures")
        numbers.append(int(found[1]))
    if len(set(numbers)) != len(numbers):
        raise CaseError("same-number", "two markups files of the case end with one number")
    lines = {}
    for (_, path), measure in zip(sorted(zip(numbers, paths, strict=True)), measures, strict=True):
        try:
            markup = read_markup(tree, path, system)
        except CaseError as error:
            raise CaseError(error.reason, f"{measure}: {error.detail}") from error
        if len(markup.points) != 2:
            raise CaseError("missing-landmark", f"{measure}: {len(markup.points)} control points, a line has 2")
        distance = math.dist(*markup.points)
        if markup.length is not None and abs(distance - markup.length) > _LENGTH_TOLERANCE * max(1.0, markup.length):
            detail = f"{measure}: the points are {distance:.3g} mm apart, the file says {markup.length:.3g}"
            raise CaseError("length-differs", detail)
        lines[measure] = (markup.points[0], markup.points[1])
    return lines
