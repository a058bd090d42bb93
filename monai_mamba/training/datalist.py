"""Read data sets for the bundles: a folder with a ``datalist.json``.

The file is a MONAI data list with three sections and what is needed to trust it::

    {
      "name": "...", "license": "...",
      "classes": ["malignant", "benign"],
      "training":   [{"image": "images/0001.png", "label": 0, "case": "0001", "patient": "p17"}, ...],
      "validation": [...],
      "test":       [...]
    }

Files are relative to the folder. Several channels are a list of files. A study with two views has ``image1`` and
``image2``. What a case is labeled with depends on the task:

* classification: ``label`` is a class number, ``classes`` names them; several labels at once are a list of 0 and 1, and
  ``label_mask`` beside it has 0 for those that are not known (uncertain findings of CheXpert);
* segmentation: ``label`` is the file of a label map, ``"labels": {"background": 0, "organ": 1}`` names its values;
* landmarks: ``landmarks`` is a list ``[[x, y, z], ...]`` in mm (world, RAS+), null for one that the case does not have,
  ``landmark_names`` names them.

``case`` defaults to the name of the first file and ``patient`` to ``case``. No patient may be in two sections.

The MONAI layout that ``monai-mamba-data`` writes is read as it is: ``testing`` is the test section, without a
``validation`` section the training cases of one ``fold`` validate, and ``cases.csv`` beside the data list tells the
cases and patients where the data list must not (segmentation, in Auto3DSeg's form).
"""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from monai_mamba.errors import DatasetError

MANIFEST = "datalist.json"
#: Table of ``monai-mamba-data``, beside the data list.
CASES = "cases.csv"
SECTIONS = ("training", "validation", "test")
#: Keys that hold file names; of two views, of volumes and of label maps.
FILE_KEYS = ("image", "image1", "image2")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
VOLUMES = (".nii", ".nii.gz")
CORRUPT_POLICIES = ("error", "drop")

logger = logging.getLogger(__name__)


def read_manifest(dataset_dir: os.PathLike[str] | str) -> dict[str, Any]:
    """Return the content of a data set's ``datalist.json``.

    Raises:
        DatasetError: if it is missing or not a data list.
    """
    path = Path(dataset_dir) / MANIFEST
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; `dataset_dir` must be a folder with a {MANIFEST} (docs/bundles.md)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetError(f"{path}: is not valid JSON: {error}") from error
    if isinstance(manifest, dict) and "testing" in manifest:
        manifest.setdefault("test", manifest.pop("testing"))
    if not isinstance(manifest, dict) or not any(section in manifest for section in SECTIONS):
        raise DatasetError(f"{path}: must be an object with the sections {', '.join(SECTIONS)}")
    for section in SECTIONS:
        cases = manifest.get(section, [])
        if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
            raise DatasetError(f"{path}: `{section}` must be a list of cases")
    return manifest


def load_cases(
    dataset_dir: os.PathLike[str] | str,
    section: str,
    *,
    fold: int = 0,
    on_corrupt: str = "error",
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Return the cases of one section, with absolute file names.

    Args:
        dataset_dir: folder with a ``datalist.json``.
        section: ``"training"``, ``"validation"`` or ``"test"``.
        fold: which training cases validate if there is no validation section and they carry a ``fold``.
        on_corrupt: ``"error"`` checks that files exist, and the run stops at the first one that cannot be read when
            its turn comes; ``"drop"`` opens every file now and leaves out those that cannot be read, with a warning
            that counts and names them. What gets damaged later is left to `monai_mamba.training.loading`.
        limit: take only this many cases, evenly spaced over the section; for trials.

    Returns:
        One dictionary per case with ``case``, ``patient``, the files and the label; several labels at once as an array
        ``(classes,)`` of zeros and ones, NaN for those that are not known; ``landmarks`` as an array ``(landmarks, 3)``
        in mm with NaN for those that are missing.

    Raises:
        DatasetError: if a file is missing, a label is out of range or of the wrong kind (a test section without any
            is fine, to predict it), a class of the training section is empty, a case appears twice, or a patient is in
            two sections.
    """
    if section not in SECTIONS:
        raise ValueError(f"`section` must be one of {', '.join(SECTIONS)}, got {section!r}")
    check_corrupt_policy(on_corrupt)
    manifest = _with_folds(read_manifest(dataset_dir), fold)
    source = Path(dataset_dir) / MANIFEST
    if not manifest.get(section):
        raise DatasetError(f"{source}: the section `{section}` is missing or empty")
    patients = _read_patients(Path(dataset_dir) / CASES)
    by_section = {name: [_complete(c, source, name, patients) for c in manifest.get(name, [])] for name in SECTIONS}
    _check_leaks(by_section, source)
    cases = [_resolve(case, Path(dataset_dir), source) for case in by_section[section]]
    # Label maps are checked when they are read.
    is_unlabeled = section == "test" and not any("label" in case or "landmarks" in case for case in cases)
    has_label_maps = any(isinstance(case.get("label"), str) for case in cases)
    if any("landmarks" in case for case in cases):
        names = landmark_names(dataset_dir)
        for case in cases:
            case["landmarks"] = _read_landmarks(case, names, source)
        unknown = np.isnan(np.stack([case["landmarks"] for case in cases])).all((0, 2))
        if section == "training" and unknown.any():
            lacking = ", ".join(name for name, is_unknown in zip(names, unknown, strict=True) if is_unknown)
            raise DatasetError(f"{source}: no case of `training` has the landmark {lacking}")
    elif not is_unlabeled and not has_label_maps and ("classes" in manifest or "labels" in manifest):
        _check_labels(cases, class_names(dataset_dir), source, section)
    if on_corrupt == "drop":
        cases = _without_corrupt(cases, source)
    if has_label_maps and section == "training":
        _check_structures(cases, structure_names(dataset_dir), source)
    for case in cases:
        if isinstance(case.get("label"), list):  # lists would be collated by class, not by case
            label, mask = np.asarray(case["label"], dtype=np.float32), case.pop("label_mask", None)
            case["label"] = label if mask is None else np.where(np.asarray(mask) == 1, label, np.float32(np.nan))
    if limit is not None and limit < len(cases):
        cases = [cases[i * len(cases) // limit] for i in range(limit)]
    return cases


def check_corrupt_policy(on_corrupt: str) -> str:
    """Return ``on_corrupt`` if it is one of ``CORRUPT_POLICIES``, else raise ValueError."""
    if on_corrupt not in CORRUPT_POLICIES:
        raise ValueError(f"`on_corrupt` must be one of {', '.join(CORRUPT_POLICIES)}, got {on_corrupt!r}")
    return on_corrupt


def list_inputs(dataset_dir: os.PathLike[str] | str, section: str = "test") -> list[dict[str, Any]]:
    """Return cases to predict: a section of a data set, or every picture or volume of a folder without a data list.

    Raises:
        DatasetError: if there is nothing to predict.
    """
    folder = Path(dataset_dir)
    if folder.is_file():
        raise DatasetError(
            f"{folder}: is a file; `dataset_dir` must be a folder with a {MANIFEST}, pictures or volumes"
        )
    if (folder / MANIFEST).is_file():
        return load_cases(folder, section)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name.lower().endswith((*PICTURES, *VOLUMES)))
    if not files:
        raise DatasetError(f"{folder}: holds neither a {MANIFEST} nor a picture ({', '.join(PICTURES)}) nor a volume")
    return [{"image": str(f), "case": str(f.relative_to(folder)), "patient": str(f.relative_to(folder))} for f in files]


def class_names(dataset_dir: os.PathLike[str] | str) -> list[str]:
    """Return the names of the classes in the order of the network's outputs.

    Raises:
        DatasetError: if the data list names none.
    """
    manifest = read_manifest(dataset_dir)
    classes = manifest.get("classes")
    if classes is None and isinstance(manifest.get("labels"), dict):
        classes = _by_value(manifest["labels"], Path(dataset_dir) / MANIFEST)
    if not isinstance(classes, list) or not classes:
        raise DatasetError(f"{Path(dataset_dir) / MANIFEST}: `classes` must be a list of names")
    return [str(name) for name in classes]


def is_multi_label(dataset_dir: os.PathLike[str] | str) -> bool:
    """True if a case of the data set may be of several classes at once: its ``label`` is a list."""
    manifest = read_manifest(dataset_dir)
    return any(isinstance(case.get("label"), list) for section in SECTIONS for case in manifest.get(section, []))


def structure_names(dataset_dir: os.PathLike[str] | str) -> list[str]:
    """Return the names of the values of the label maps, ``background`` first.

    Raises:
        DatasetError: if the data list names none, or they are not 0, 1, 2, ...
    """
    path = Path(dataset_dir) / MANIFEST
    labels = read_manifest(dataset_dir).get("labels")
    if not isinstance(labels, dict) or len(labels) < 2:
        raise DatasetError(f'{path}: `labels` must name the values of the label maps, {{"background": 0, "organ": 1}}')
    return _by_value(labels, path)


def landmark_names(dataset_dir: os.PathLike[str] | str) -> list[str]:
    """Return the names of the landmarks in the order of the network's outputs.

    Raises:
        DatasetError: if the data list names none.
    """
    names = read_manifest(dataset_dir).get("landmark_names")
    if not isinstance(names, list) or not names:
        raise DatasetError(f"{Path(dataset_dir) / MANIFEST}: `landmark_names` must be a list of names")
    return [str(name) for name in names]


def _by_value(labels: dict[str, Any], path: Path) -> list[str]:
    if any(isinstance(value, list) for value in labels.values()):
        raise DatasetError(f"{path}: `labels` holds regions of several values; train those with nnU-Net")
    names = sorted(labels, key=lambda name: str(labels[name]).zfill(9))
    if [labels[name] for name in names] != list(range(len(names))):
        raise DatasetError(f"{path}: the values of `labels` must be 0, 1, 2, ... without a gap, got {labels}")
    return names


def _with_folds(manifest: dict[str, Any], fold: int) -> dict[str, Any]:
    training = manifest.get("training", [])
    if manifest.get("validation") or not any("fold" in case for case in training):
        return manifest
    folds = sorted({case["fold"] for case in training if "fold" in case})
    if fold not in folds:
        raise ValueError(f"`fold` must be one of {', '.join(map(str, folds))}, got {fold}")
    return {
        **manifest,
        "training": [case for case in training if case.get("fold") != fold],
        "validation": [case for case in training if case.get("fold") == fold],
    }


def _read_patients(path: Path) -> dict[str, str]:
    """Case to patient, from the table of ``monai-mamba-data``; empty without one."""
    if not path.is_file():
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {row["case"]: row["patient"] for row in csv.DictReader(file)}
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: must have the columns `case` and `patient`: {error}") from error


def _complete(case: dict[str, Any], source: Path, section: str, patients: dict[str, str]) -> dict[str, Any]:
    case = dict(case)
    files = [file for key in FILE_KEYS if key in case for file in _listed(case[key])]
    if not files or not all(isinstance(file, str) for file in files):
        raise DatasetError(f"{source}: a case of `{section}` has no `image` (nor `image1` and `image2`): {case!r:.200}")
    stem = Path(files[0]).name.split(".")[0]
    if patients and "case" not in case:
        # Files are called CASE or CASE_0000.
        known = [stem[:end] for end in range(len(stem), 0, -1) if stem[end : end + 1] in ("", "_")]
        stem = next((name for name in known if name in patients), stem)
    name = str(case.get("case", stem))
    return {**case, "case": name, "patient": str(case.get("patient", patients.get(name, name)))}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _resolve(case: dict[str, Any], folder: Path, source: Path) -> dict[str, Any]:
    def resolve(key: str, name: str) -> str:
        path = folder / name
        # A data list comes from outside: it may only name files of its own folder.
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DatasetError(f"{source}: case {case['case']}: `{key}` leaves the folder: {name}")
        if not path.is_file():
            raise DatasetError(f"{source}: case {case['case']}: {path} does not exist")
        return str(path)

    resolved = dict(case)
    keys = [key for key in FILE_KEYS if key in case] + (["label"] if isinstance(case.get("label"), str) else [])
    for key in keys:
        paths = [resolve(key, name) for name in _listed(case[key])]
        resolved[key] = paths if isinstance(case[key], list) else paths[0]
    return resolved


def _read_landmarks(case: dict[str, Any], names: list[str], source: Path) -> np.ndarray:
    points = case.get("landmarks")
    is_whole = isinstance(points, list) and len(points) == len(names)
    try:
        rows = [[np.nan] * 3 if point is None else [float(x) for x in point] for point in points or []]
    except (TypeError, ValueError):
        rows, is_whole = [], False
    if not is_whole or any(len(row) != 3 or np.isinf(row).any() for row in rows):
        raise DatasetError(
            f"{source}: case {case['case']}: `landmarks` must be {len(names)} points [x, y, z] in mm, or null for one "
            f"that the case does not have, got {points!r:.120}"
        )
    return np.asarray(rows, dtype=np.float64)


def _check_leaks(by_section: dict[str, list[dict[str, Any]]], source: Path) -> None:
    seen_patient: dict[str, str] = {}
    seen_case: set[str] = set()
    for section, cases in by_section.items():
        for case in cases:
            if case["case"] in seen_case:
                raise DatasetError(f"{source}: the case {case['case']} appears twice")
            seen_case.add(case["case"])
            first = seen_patient.setdefault(str(case["patient"]), section)
            if first != section:
                raise DatasetError(
                    f"{source}: the patient of case {case['case']} is in `{first}` and in `{section}`; split by patient"
                )


def _check_labels(cases: list[dict[str, Any]], classes: list[str], source: Path, section: str) -> None:
    counts = dict.fromkeys(range(len(classes)), 0)
    is_multi_label = any(isinstance(case.get("label"), list) for case in cases)
    for case in cases:
        label, mask = case.get("label"), case.get("label_mask")
        if is_multi_label:
            if not _is_zeros_and_ones(label, len(classes)):
                raise DatasetError(
                    f"{source}: case {case['case']}: `label` must be {len(classes)} zeros or ones, got {label!r:.120}"
                )
            if mask is not None and not _is_zeros_and_ones(mask, len(classes)):
                raise DatasetError(
                    f"{source}: case {case['case']}: `label_mask` must be {len(classes)} ones, or zeros for labels "
                    f"that are not known, got {mask!r:.120}"
                )
            for index, value in enumerate(label):
                counts[index] += int(value == 1 and (mask is None or mask[index] == 1))
        elif mask is not None:
            raise DatasetError(
                f"{source}: case {case['case']}: `label_mask` belongs to a list of labels, `label` is {label!r}; leave "
                "a case without a label out"
            )
        elif isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
            counts[label] += 1
        else:
            raise DatasetError(
                f"{source}: case {case['case']}: `label` must be a whole number from 0 to {len(classes) - 1}, "
                f"got {label!r}"
            )
    empty = [classes[index] for index, count in counts.items() if count == 0]
    if section == "training" and empty:
        raise DatasetError(f"{source}: no case of `training` is of the class {', '.join(empty)}")


def _is_zeros_and_ones(values: Any, number: int) -> TypeGuard[list[int]]:
    return isinstance(values, list) and len(values) == number and all(value in (0, 1) for value in values)


def _check_structures(cases: list[dict[str, Any]], names: list[str], source: Path) -> None:
    """Refuse a structure that no label map holds; reads as many as it takes to see all, most often the first ones."""
    import nibabel as nib

    missing = set(range(1, len(names)))
    for case in cases:
        if not missing:
            return
        try:
            missing -= set(np.unique(nib.load(case["label"]).dataobj).tolist())  # type: ignore[attr-defined]
        except Exception:
            return  # a file that cannot be read, or is no NIfTI, is refused with its name when its turn comes
    if missing:
        absent = ", ".join(names[value] for value in sorted(missing))
        raise DatasetError(f"{source}: no label map of `training` holds the structure {absent}")


def _without_corrupt(cases: list[dict[str, Any]], source: Path) -> list[dict[str, Any]]:
    from monai_mamba.training.transforms import read_picture

    readers: dict[bool, Callable[[str], object]] = {True: read_picture, False: _read_volume}
    kept, dropped = [], []
    for case in cases:
        try:
            for key in (*FILE_KEYS, "label"):
                for path in _listed(case.get(key)):
                    if isinstance(path, str):
                        readers[path.lower().endswith(PICTURES)](path)
            kept.append(case)
        except DatasetError as error:
            dropped.append(str(error))
    if not kept:
        raise DatasetError(f"{source}: none of the {len(cases)} cases can be read; the first: {dropped[0]}")
    if dropped:
        logger.warning("%s: %d of %d cases dropped: %s", source, len(dropped), len(cases), "; ".join(dropped))
    return kept


def _read_volume(path: str) -> object:
    import nibabel as nib

    try:
        return nib.load(path).get_fdata()  # type: ignore[attr-defined]
    except Exception as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error
