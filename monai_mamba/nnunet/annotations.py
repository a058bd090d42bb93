"""Landmarks and classes of the cases of an nnU-Net data set: found, read and checked before a training starts.

Landmarks come from, in this order:

* ``landmarks.json`` beside ``dataset.json``: ``{"landmark_names": ["a", "b"], "cases": {"case_1": {"landmarks":
  [[x, y, z], [x, y, z]]}}}``, world coordinates in mm, RAS+, null for a landmark that was not annotated;
* ``landmarksTr/CASE.mrk.json``: markups of 3D Slicer, with the names of the landmarks as labels of the points;
* the label maps: the center of label k is landmark k.

Classes come from ``classes.json`` beside ``dataset.json``: ``{"classes": ["healthy", "ill"], "cases": {"case_1":
"ill"}, "patients": {"case_1": "p1"}}``; ``patients`` may be left out.

nnU-Net copies ``dataset.json`` to its folder of preprocessed data, but not these files: both folders are looked into.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from monai_mamba.errors import DatasetError
from monai_mamba.heat_maps import voxel_to_world, world_to_voxel
from monai_mamba.nnunet.geometry import raw_affine

LANDMARKS_FILE = "landmarks.json"
MARKUPS_FOLDER = "landmarksTr"
CLASSES_FILE = "classes.json"
#: So many problems are listed in one error.
_MAX_LISTED = 5


@dataclass(frozen=True)
class ClassTable:
    """The class of every case.

    Attributes:
        classes: names, in the order of the network's outputs.
        cases: case to class number.
        patients: case to patient; a case that is not named is its own patient.
    """

    classes: list[str]
    cases: dict[str, int]
    patients: dict[str, str] = field(default_factory=dict)

    def patient(self, case: str) -> str:
        """Return the patient of a case."""
        return self.patients.get(case, case)


def landmark_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """Return the names of the labels 1, 2, ... of a data set, which are its landmarks.

    Raises:
        DatasetError: if the labels are regions, have gaps, or one is to be ignored.
    """
    labels = {name: value for name, value in dataset_json["labels"].items() if name != "background"}
    if "ignore" in labels or sorted(labels.values(), key=str) != sorted(range(1, len(labels) + 1), key=str):
        raise DatasetError(
            "dataset.json: for landmarks `labels` must be {'background': 0, NAME: 1, NAME: 2, ...}, one value per "
            f"landmark without gaps, regions or `ignore`; got {dataset_json['labels']}"
        )
    return sorted(labels, key=lambda name: labels[name])


def read_landmarks(
    folders: Sequence[os.PathLike[str] | str],
    names: Sequence[str],
    cases: Iterable[str],
    read_label: Callable[[str], Any],
) -> dict[str, np.ndarray]:
    """Return the landmarks of every case, ``(landmarks, 3)`` in mm, RAS+; NaN for those not annotated.

    Args:
        folders: where ``landmarks.json`` or ``landmarksTr`` may be, in the order of preference.
        names: of the landmarks.
        cases: that need landmarks.
        read_label: returns label map ``(1, z, y, x)`` and properties of a case, as nnU-Net's readers do.

    Raises:
        DatasetError: if a case or a landmark is missing, or a file does not have the form described above.
    """
    cases = list(cases)
    for folder in map(Path, folders):
        if (folder / LANDMARKS_FILE).is_file():
            return _from_json(folder / LANDMARKS_FILE, names, cases)
        if (folder / MARKUPS_FOLDER).is_dir():
            return _collect(cases, lambda case: _from_markups(folder / MARKUPS_FOLDER / f"{case}.mrk.json", names))  # noqa: B023
    return _collect(cases, lambda case: _from_labels(case, names, *read_label(case)))


def landmarks_in_array(points_mm: np.ndarray, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return landmarks in voxels of an array.

    Args:
        points_mm: ``(landmarks, 3)``, RAS+; NaN is passed on.
        affine: voxels of the array to mm.
        shape: of the array.

    Raises:
        DatasetError: if one lies outside of the array; the text names its number, from 1.
    """
    voxels = world_to_voxel(points_mm, affine)
    outside = ((voxels < -0.5) | (voxels > np.asarray(shape) - 0.5)).any(1)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise DatasetError(
            f"landmark {first + 1} at {np.round(points_mm[first], 2).tolist()} mm (RAS+) is voxel "
            f"{np.round(voxels[first], 1).tolist()} of an array of {tuple(shape)}: outside of the image, or in the "
            "empty margin that nnU-Net cuts away. Check whether the coordinates are LPS, or set the landmark to null"
        )
    return voxels


def read_classes(folders: Sequence[os.PathLike[str] | str], cases: Iterable[str] | None = None) -> ClassTable:
    """Return the class of every case.

    Args:
        folders: where ``classes.json`` may be, in the order of preference.
        cases: that need a class; None for those in the file.

    Raises:
        DatasetError: if the file or a case is missing, or the file does not have the form described above.
    """
    path = _find(folders, CLASSES_FILE)
    content = _read_json(path)
    classes, given = content.get("classes"), content.get("cases")
    if not isinstance(classes, list) or len(classes) < 2 or len({str(c) for c in classes}) < len(classes):
        raise DatasetError(f"{path}: `classes` must be a list of two or more names, got {classes!r}")
    if not isinstance(given, dict) or not given:
        raise DatasetError(f"{path}: `cases` must be an object of case names with a class each, got {given!r:.100}")
    classes = [str(name) for name in classes]

    def number(case: str) -> int:
        if case not in given:
            raise DatasetError("it has no class")
        value = given[case]
        if isinstance(value, str) and value in classes:
            return classes.index(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes):
            return value
        raise DatasetError(f"{value!r} is none of the classes {classes}, nor a number from 0 to {len(classes) - 1}")

    numbers = _collect(list(given) if cases is None else list(cases), number, f"{path}: ")
    patients = content.get("patients", {})
    if not isinstance(patients, dict):
        raise DatasetError(f"{path}: `patients` must be an object of case names with a patient each")
    return ClassTable(classes, numbers, {str(case): str(patient) for case, patient in patients.items()})


def _collect(cases: Sequence[str], read: Callable[[str], Any], where: str = "") -> dict[str, Any]:
    result, problems = {}, []
    for case in cases:
        try:
            result[case] = read(case)
        except DatasetError as error:
            problems.append(f"case {case}: {error}")
    raise_problems(problems, len(cases), where)
    return result


def raise_problems(problems: Sequence[str], num_cases: int, where: str = "") -> None:
    """Raise one error for what is wrong with several cases, if anything is."""
    if problems:
        more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        raise DatasetError(f"{where}{len(problems)} of {num_cases} cases: {'; '.join(problems[:_MAX_LISTED])}{more}")


def _find(folders: Sequence[os.PathLike[str] | str], name: str) -> Path:
    paths = [Path(folder) / name for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    raise DatasetError(f"there is no {' nor '.join(map(str, paths))}; docs/nnunet.md shows what it holds")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: must hold an object, got a {type(content).__name__}")
    return content


def _from_json(path: Path, names: Sequence[str], cases: Sequence[str]) -> dict[str, np.ndarray]:
    content = _read_json(path)
    if content.get("landmark_names") != list(names):
        raise DatasetError(
            f"{path}: `landmark_names` must be the labels of dataset.json in their order, {list(names)}, got "
            f"{content.get('landmark_names')}"
        )
    given = content.get("cases")
    if not isinstance(given, dict):
        raise DatasetError(f"{path}: `cases` must be an object of case names")

    def read(case: str) -> np.ndarray:
        entry = given.get(case)
        points = entry.get("landmarks") if isinstance(entry, dict) else None
        if not isinstance(points, list):
            raise DatasetError("it has no `landmarks`")
        if len(points) != len(names):
            raise DatasetError(f"it has {len(points)} landmarks, not {len(names)}; null stands for one not annotated")
        return np.array([_point(point, name) for point, name in zip(points, names, strict=True)])

    return _collect(cases, read, f"{path}: ")


def _point(point: Any, name: str) -> list[float]:
    if point is None:
        return [np.nan] * 3
    try:
        x, y, z = (float(value) for value in point)
    except (TypeError, ValueError):
        raise DatasetError(f"landmark {name!r} must be three numbers or null, got {point!r:.80}") from None
    if not np.isfinite([x, y, z]).all():
        raise DatasetError(f"landmark {name!r} is not finite: {point!r:.80}")
    return [x, y, z]


def _from_markups(path: Path, names: Sequence[str]) -> np.ndarray:
    if not path.is_file():
        raise DatasetError(f"{path} does not exist")
    points: dict[str, list[float]] = {}
    for markup in _read_json(path).get("markups", []):
        system = markup.get("coordinateSystem")
        if system not in ("RAS", "LPS"):
            raise DatasetError(f"{path}: `coordinateSystem` must be 'RAS' or 'LPS', got {system!r}")
        if markup.get("coordinateUnits", "mm") != "mm":
            raise DatasetError(f"{path}: `coordinateUnits` must be 'mm', got {markup['coordinateUnits']!r}")
        for control in markup.get("controlPoints", []):
            label = str(control.get("label"))
            if control.get("positionStatus", "defined") != "defined":
                continue
            if label in points:
                raise DatasetError(f"{path}: the label {label!r} is there twice")
            x, y, z = _point(control.get("position"), label)
            points[label] = [x, y, z] if system == "RAS" else [-x, -y, z]
    if missing := [name for name in names if name not in points]:
        raise DatasetError(f"{path}: there is no point {missing[0]!r}; it has {', '.join(points) or 'none'}")
    return np.array([points[name] for name in names])


def _from_labels(case: str, names: Sequence[str], label: np.ndarray, properties: Mapping[str, Any]) -> np.ndarray:
    values = np.rint(label[0]).astype(int)
    boxes = ndimage.find_objects(values, max_label=len(names))
    affine = raw_affine(properties)
    centers = []
    for value, (name, box) in enumerate(zip(names, boxes, strict=True), 1):
        if box is None:
            raise DatasetError(f"the label map has no voxel of landmark {name!r} (label {value})")
        mask = values[box] == value
        if (count := ndimage.label(mask, np.ones((3, 3, 3)))[1]) > 1:
            raise DatasetError(
                f"landmark {name!r} (label {value}) has {count} separate parts; its center means nothing"
            )
        centers.append(np.asarray(ndimage.center_of_mass(mask)) + [axis.start for axis in box])
    return voxel_to_world(np.array(centers), affine)
