"""From header facts to stacks: which slices make one volume, in which order, on which grid, or why they do not.

Nothing here looks at names of files or at InstanceNumber; order and spacing come from ImagePositionPatient alone.
A stack is accepted only when every slice lies within the tolerance of its place on one straight, even grid.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.dicom.headers import PROJECTION_MODALITIES
from data_prep.errors import DicomReadError
from data_prep.geometry import TOLERANCE_MM, lps_to_ras

VOLUME_MODALITIES = frozenset({"CT", "MR", "PT", "NM"})
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
#: direction cosines of one stack agree to this, and have this length and right angle
_COSINE_TOLERANCE = 1e-4
#: a stack whose slices move sideways by more than this angle is a sheared grid, which ITK does not accept in a file
_TILT_DEGREES = 0.003
_SPACING_TOLERANCE_MM = 2e-5
#: a gantry that is tilted by more than this is worth a word
_TILT_TAG_DEGREES = 0.5
#: what tells images at one place apart
_TIME_KEYS: tuple[Callable[[Slice], float | None], ...] = (
    lambda one: one.plane["temporal"],
    lambda one: one.plane["trigger"],
    lambda one: one.facts["acquisition"],
)
#: how far a slice may lie beside the straight row of a tilted or uneven stack that is to be resampled
_BEND_MM = 0.1


@dataclass(frozen=True)
class Slice:
    """One image plane: a single-frame file, or a frame (from 0) of a multi-frame file."""

    path: str
    frame: int
    facts: dict[str, Any]
    plane: dict[str, Any]

    @property
    def position(self) -> np.ndarray:
        return np.array(self.plane["position"], dtype=np.float64)


@dataclass(frozen=True)
class Stack:
    """Slices in the order of their positions, on one grid.

    Args:
        slices: in order.
        affine: RAS+, maps ``(column, row, slice)`` to mm.
        repair: ``""`` when the grid is exact; ``"tilt"`` or ``"uneven"`` when the volume must be resampled.
        notes: what was dropped, for the report.
        dropped: slices that are exact copies of others.
    """

    slices: tuple[Slice, ...]
    affine: np.ndarray
    repair: str = ""
    notes: tuple[str, ...] = ()
    dropped: tuple[Slice, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        facts = self.slices[0].facts
        return facts["columns"], facts["rows"], len(self.slices)


@dataclass(frozen=True)
class Policy:
    """What the user decided.

    Args:
        tilt: ``error`` or ``resample``.
        uneven: ``error``, ``resample`` or ``largest-block``.
        time: ``error``; ``first`` to take the first of several time points; ``merge`` to take slices of several
            acquisitions that alternate as one volume.
        min_slices: smaller stacks are skipped.
        tolerance_mm: how far a slice may lie from its place on the grid.
    """

    tilt: str = "error"
    uneven: str = "error"
    time: str = "error"
    min_slices: int = 2
    tolerance_mm: float = TOLERANCE_MM


def refusal(facts: dict[str, Any]) -> tuple[str, str] | None:
    """Why a DICOM file is no part of a volume or projection, by its header alone: (reason, detail)."""
    if facts["kind"] == "other":
        return "not-an-image", f"modality {facts['modality'] or 'unknown'}"
    words = set(facts["words"])
    if facts["samples"] != 1 or facts["photometric"] not in ("MONOCHROME1", "MONOCHROME2", ""):
        return "color", "only grey images are converted"
    if words & {"LOCALIZER", "SCOUT"}:
        return "localizer", ""
    if words & {"SCREEN", "SCREEN SAVE"}:
        return "screenshot", ""
    if "DERIVED" in words and words & {"MPR", "MIP", "MINIP", "MIN IP", "PROJECTION", "PROJECTION IMAGE",
                                       "REFORMATTED", "CSA MPR", "CSA MIP"}:  # fmt: skip
        return "derived-view", "a reformatted view of another series"
    return None


def is_projection(facts: dict[str, Any]) -> bool:
    """Whether a file is an X-ray or mammogram rather than a slice of a volume."""
    return facts["modality"] in PROJECTION_MODALITIES


def split_series(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Split one series into what may each be a stack: size, kind of object, and physical contrast.

    Echo time, b-value, kernel and magnitude or phase are properties of an image, so slices that differ in them never
    make one volume. AcquisitionNumber is not: step-and-shoot CT counts it up inside a volume. Slices that differ in
    spacing or orientation alone stay together, and `build_stacks` refuses them.
    """
    groups: dict[tuple[Any, ...], list[Slice]] = defaultdict(list)
    for one in slices:
        groups[_stack_key(one)].append(one)
    return list(groups.values())


def _stack_key(one: Slice) -> tuple[Any, ...]:
    facts, plane = one.facts, one.plane
    part = tuple(sorted(set(facts["words"]) & {"M", "P", "R", "I", "MAGNITUDE", "PHASE", "REAL", "IMAGINARY"}))
    echo = None if plane["echo"] is None else round(plane["echo"], 2)
    return (
        facts["rows"],
        facts["columns"],
        (*part, plane["part"]),
        echo,
        plane["b"],
        facts["modality"],
        facts["sop_class"],
        facts["photometric"],
        facts["kernel"],
        "MOSAIC" in facts["words"],
    )


def is_secondary_capture(facts: dict[str, Any]) -> bool:
    """Whether an image is a copy of a screen or of another image by its class."""
    return str(facts["sop_class"]).startswith(_SECONDARY_CAPTURE)


def num_orientations(slices: Sequence[Slice]) -> int:
    """Number of clearly different plane orientations (more than 1 degree apart)."""
    normals: list[np.ndarray] = []
    for one in slices:
        orientation = one.plane["orientation"]
        if orientation:
            normal = np.cross(orientation[:3], orientation[3:])
            if not any(abs(float(normal @ other)) > np.cos(np.radians(1.0)) for other in normals):
                normals.append(normal)
    return len(normals)


def build_stacks(slices: Sequence[Slice], policy: Policy, same_pixels: Callable[[Slice, Slice], bool]) -> list[Stack]:
    """Make the volumes of one group of `split_series`.

    Args:
        slices: of one group.
        policy: of the user.
        same_pixels: whether two slices hold the same pixels; called for slices at one position only.

    Returns:
        One stack, or one per time point or acquisition where these tell overlapping slices apart and the policy wants
        them.

    Raises:
        DicomReadError: with the name of the fault.
    """
    check_agreement(slices)
    ordered, dropped = _drop_copies(sorted(slices, key=_order), policy.tolerance_mm, same_pixels)
    parts = _separate_overlaps(ordered, policy.tolerance_mm)
    if len(parts) > 1:
        if policy.time != "first":
            raise DicomReadError(
                "time-points",
                f"{len(parts)} images at every position (time points or phases); take one with --time first",
            )
        note = f"time point 1 of {len(parts)} was taken"
        return [_build(parts[0], policy, dropped, (note,))]
    alternating = _separate_alternating(ordered)
    if len(alternating) > 1 and policy.time == "error":
        raise DicomReadError(
            "time-points",
            f"slices of {len(alternating)} time points or acquisitions lie among each other; take the first with "
            "--time first, or all as one volume with --time merge",
        )
    if len(alternating) > 1 and policy.time == "first":
        note = f"acquisition 1 of {len(alternating)} was taken"
        return [_build(alternating[0], policy, dropped, (note,))]
    return [_build(ordered, policy, dropped, ())]


def check_agreement(slices: Sequence[Slice]) -> None:
    """All slices of a group must have a place, and one spacing, orientation, frame of reference and patient.

    Raises:
        DicomReadError: with the name of the fault.
    """
    for one in slices:
        _check_plane(one)
    first = slices[0].plane
    for one in slices:
        if np.abs(np.subtract(one.plane["spacing"], first["spacing"])).max() > _SPACING_TOLERANCE_MM:
            raise DicomReadError("mixed-spacings", "slices of one series differ in their pixel spacing")
        if np.abs(np.subtract(one.plane["orientation"], first["orientation"])).max() > _COSINE_TOLERANCE:
            raise DicomReadError("mixed-orientations", "slices of one series differ in their orientation")
    for what, name in (("frame_of_reference", "frames of reference"), ("patient", "patients")):
        number = len({one.facts[what] for one in slices})
        if number > 1:
            raise DicomReadError(f"mixed-{name.replace(' ', '-')}", f"{number} {name} in one series")


def _order(one: Slice) -> tuple[Any, ...]:
    orientation = np.array(one.plane["orientation"])
    normal = np.cross(orientation[:3], orientation[3:])
    # The last keys only make the order independent of the order of the input.
    return round(float(one.position @ normal), 4), *_when(one), one.facts["sop"], one.frame, one.path


def _when(one: Slice) -> tuple[float, ...]:
    """What tells images at one place apart: time point, trigger time, acquisition; -1 when unknown."""
    values = (key(one) for key in _TIME_KEYS)
    return tuple(-1.0 if value is None else value for value in values)


def _check_plane(one: Slice) -> None:
    plane = one.plane
    for name in ("position", "orientation", "spacing"):
        if plane[name] is None:
            raise DicomReadError("no-position", f"a slice lacks its {name}")
        if not plane[name]:
            raise DicomReadError("bad-geometry", f"the {name} of a slice is not a list of finite numbers")
    orientation = np.array(plane["orientation"])
    row, column = orientation[:3], orientation[3:]
    lengths = abs(np.linalg.norm(row) - 1), abs(np.linalg.norm(column) - 1)
    if max(*lengths, abs(float(row @ column))) > _COSINE_TOLERANCE:
        raise DicomReadError("bad-geometry", "the direction cosines of a slice are no unit vectors at a right angle")
    if min(plane["spacing"]) <= 1e-3 or max(plane["spacing"]) > 1e3:
        raise DicomReadError("bad-geometry", "the pixel spacing of a slice is zero or absurd")
    ratio = one.facts["aspect"]
    # 1:1 is written by habit; any other ratio is a statement.
    if ratio and ratio[0] != ratio[1]:
        said = ratio[0] / ratio[1] if ratio[1] else math.inf
        if not abs(plane["spacing"][0] / plane["spacing"][1] - said) <= 0.01 * said:
            raise DicomReadError("bad-geometry", "PixelSpacing and PixelAspectRatio of a slice contradict each other")
    if np.abs(one.position).max() > 1e5:
        raise DicomReadError("bad-geometry", "the position of a slice is absurd")


def _drop_copies(
    ordered: Sequence[Slice], tolerance_mm: float, same_pixels: Callable[[Slice, Slice], bool]
) -> tuple[list[Slice], tuple[Slice, ...]]:
    kept: list[Slice] = []
    dropped = []
    for one in ordered:
        twins = [other for other in reversed(kept[-64:]) if np.abs(other.position - one.position).max() <= tolerance_mm]
        # Equal numbers of an instance prove nothing: anonymizers have given one to a whole series.
        if any(twin.frame == one.frame and _when(twin) == _when(one) and same_pixels(twin, one) for twin in twins):
            dropped.append(one)
        else:
            kept.append(one)
    return kept, tuple(dropped)


def _separate_overlaps(ordered: Sequence[Slice], tolerance_mm: float) -> list[list[Slice]]:
    """Tell images at one position apart by a time-like key that does so completely, else refuse."""
    positions: list[np.ndarray] = []
    index = []
    for one in ordered:
        if not positions or np.abs(positions[-1] - one.position).max() > tolerance_mm:
            positions.append(one.position)
        index.append(len(positions) - 1)
    if len(positions) == len(ordered):
        return [list(ordered)]
    if len(positions) == 1:
        raise DicomReadError("same-position", f"{len(ordered)} different slices lie at one position; not a volume")
    for key in _TIME_KEYS:
        parts: dict[Any, list[int]] = defaultdict(list)
        for number, one in enumerate(ordered):
            parts[key(one)].append(number)
        places = [[index[number] for number in members] for members in parts.values()]
        if None not in parts and len(parts) > 1 and all(p == list(range(len(positions))) for p in places):
            return [[ordered[number] for number in parts[value]] for value in sorted(parts)]
    raise DicomReadError(
        "same-position", f"{len(ordered)} different slices lie at {len(positions)} positions; nothing tells them apart"
    )


def _separate_alternating(ordered: Sequence[Slice]) -> list[list[Slice]]:
    """Slices by time point or acquisition, where such sets of slices lie among each other at different positions.

    Sets that follow each other along the stack are the steps of one scan, and so are single slices.
    """
    for key in _TIME_KEYS:
        places: dict[Any, list[int]] = defaultdict(list)
        for number, one in enumerate(ordered):
            places[key(one)].append(number)
        spans = sorted((members[0], members[-1]) for members in places.values() if len(members) > 1)
        if any(start < stop for (_, stop), (start, _) in itertools.pairwise(spans)):
            known = sorted(places, key=lambda value: (value is None, value))
            return [[ordered[number] for number in places[value]] for value in known]
    return [list(ordered)]


def _build(slices: list[Slice], policy: Policy, dropped: tuple[Slice, ...], notes: tuple[str, ...]) -> Stack:
    if dropped:
        notes = (*notes, f"{len(dropped)} slices that are there twice were dropped")
    if len(slices) < max(policy.min_slices, 2):
        raise DicomReadError("too-few-slices", f"{len(slices)} slices; at least {max(policy.min_slices, 2)} are needed")
    positions = np.array([one.position for one in slices])
    orientation = np.array(slices[0].plane["orientation"])
    normal = np.cross(orientation[:3], orientation[3:])
    heights = positions @ normal
    steps = np.diff(heights)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    deviation = np.linalg.norm(positions - positions[0] - np.arange(len(slices))[:, None] * step, axis=1)
    # The angle is that between first and last slice; a single slice out of line shows in `deviation`.
    sideways = float(np.linalg.norm(step - (step @ normal) * normal))
    tilt = float(np.degrees(np.arctan2(sideways, abs(float(step @ normal)))))
    repair = ""
    if _is_uneven(steps, policy.tolerance_mm):
        if policy.uneven == "largest-block":
            block = _largest_block(steps, policy.tolerance_mm)
            note = f"{block.stop - block.start} of {len(slices)} slices were kept (largest even block)"
            strict = Policy(policy.tilt, "error", policy.time, policy.min_slices, policy.tolerance_mm)
            return _build(slices[block], strict, (), (*notes, note))
        if policy.uneven == "error":
            raise DicomReadError(*_name_uneven(steps))
        repair = "uneven"
    upright = _upright_affine(slices, positions) if not repair else None
    if upright is not None and _corner_error(slices, upright) <= min(policy.tolerance_mm, TOLERANCE_MM):
        return Stack(tuple(slices), lps_to_ras(upright), "", (*notes, *_tilt_note(slices[0], normal)), dropped)
    # Repairs interpolate between neighbors, so the slices must stand in one straight row, tilted or not.
    along = (heights - heights[0]) / max(heights[-1] - heights[0], 1e-9)
    bend = float(np.linalg.norm(positions - positions[0] - np.outer(along, positions[-1] - positions[0]), axis=1).max())
    if (repair or tilt > _TILT_DEGREES) and bend > max(policy.tolerance_mm, _BEND_MM):
        raise DicomReadError("uneven-positions", f"slices lie up to {bend:.3g} mm beside a straight row")
    if tilt > _TILT_DEGREES:
        if policy.tilt == "error":
            raise DicomReadError("gantry-tilt", f"the slices are sheared by {tilt:.2f} degrees; see --tilt")
        repair = repair or "tilt"
    elif not repair and deviation.max() > policy.tolerance_mm:
        raise DicomReadError("uneven-positions", f"slices lie up to {deviation.max():.3g} mm from a straight, even row")
    return Stack(tuple(slices), make_affine(slices[0].plane, positions[0], step), repair, notes, dropped)


def _tilt_note(one: Slice, normal: np.ndarray) -> tuple[str, ...]:
    """A remark where GantryDetectorTilt speaks of a tilt of which orientation and positions know nothing."""
    tilt = one.facts["tilt"]
    if tilt is None or abs(tilt) <= _TILT_TAG_DEGREES or abs(float(normal[2])) < 1 - 1e-6:
        return ()
    return (f"GantryDetectorTilt is {tilt:g}, but orientation and positions are upright; the latter were taken",)


def _upright_affine(slices: Sequence[Slice], positions: np.ndarray) -> np.ndarray:
    """LPS+ matrix with axes at exactly right angles that lies closest to the slices.

    Headers round: cosines and positions of a straight stack are off by some 1e-4, which is nothing in mm but more than
    ITK takes for a right angle.
    """
    plane = slices[0].plane
    row = np.array(plane["orientation"][:3])
    row /= np.linalg.norm(row)
    column = np.array(plane["orientation"][3:])
    column -= (column @ row) * row
    column /= np.linalg.norm(column)
    normal = np.cross(row, column)
    heights = positions @ normal
    step = normal * (heights[-1] - heights[0]) / (len(slices) - 1)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * plane["spacing"][1], column * plane["spacing"][0], step
    affine[:3, 3] = (positions - np.arange(len(slices))[:, None] * step).mean(axis=0)
    return affine


def _corner_error(slices: Sequence[Slice], affine: np.ndarray) -> float:
    """Largest distance in mm between where the headers and an LPS+ matrix put the corners of each slice."""
    columns, rows = slices[0].facts["columns"] - 1, slices[0].facts["rows"] - 1
    corners = np.array([[0, 0], [columns, 0], [0, rows], [columns, rows]], dtype=np.float64)
    in_plane = corners @ affine[:3, :2].T
    worst = 0.0
    for number, one in enumerate(slices):
        orientation, spacing = np.array(one.plane["orientation"]).reshape(2, 3), one.plane["spacing"]
        own = one.position + corners * [spacing[1], spacing[0]] @ orientation
        there = affine[:3, 3] + number * affine[:3, 2] + in_plane
        worst = max(worst, float(np.linalg.norm(own - there, axis=1).max()))
    return worst


def make_affine(plane: dict[str, Any], origin: np.ndarray, step: np.ndarray) -> np.ndarray:
    """RAS+ matrix of ``(column, row, slice)``; PixelSpacing is (between rows, between columns)."""
    affine = np.eye(4)
    affine[:3, 0] = np.array(plane["orientation"][:3]) * plane["spacing"][1]
    affine[:3, 1] = np.array(plane["orientation"][3:]) * plane["spacing"][0]
    affine[:3, 2] = step
    affine[:3, 3] = origin
    return lps_to_ras(affine)


def _is_uneven(steps: np.ndarray, tolerance_mm: float) -> bool:
    ideal = np.arange(1, len(steps) + 1) * (steps.sum() / len(steps))
    return bool(np.abs(np.cumsum(steps) - ideal).max() > tolerance_mm)


def _name_uneven(steps: np.ndarray) -> tuple[str, str]:
    smallest = float(steps.min())
    multiples = steps / smallest
    if smallest > 0 and np.abs(multiples - np.round(multiples)).max() < 0.02 and np.round(multiples).max() < 1000:
        missing = int(np.round(multiples).sum() - len(steps))
        if missing:
            return "missing-slice", f"{missing} slices are missing (steps of {smallest:.4g} to {steps.max():.4g} mm)"
    return "uneven-spacing", f"steps from {smallest:.4g} to {steps.max():.4g} mm"


def _largest_block(steps: np.ndarray, tolerance_mm: float) -> slice:
    best = slice(0, 1)
    for start in range(len(steps)):
        stop = start + 1
        while stop <= len(steps) and not _is_uneven(steps[start:stop], tolerance_mm):
            stop += 1
        if stop - start > best.stop - best.start:
            best = slice(start, stop)
    return best
