"""Read data sets for the bundles: a folder with a ``datalist.json``.

The file is a MONAI data list with three sections and what is needed to trust it::

    {
      "name": "...", "license": "...",
      "classes": ["malignant", "benign"],
      "training":   [{"image": "images/0001.png", "label": 0, "case": "0001", "patient": "p17"}, ...],
      "validation": [...],
      "test":       [...]
    }

Files are relative to the folder. A study with two views has ``image1`` and ``image2``; a multi-label task has a list
of 0 and 1 as ``label``, one per class; a segmentation has a label map's file as ``label``; landmarks are a list
``[[x, y, z], ...]`` in ``landmarks_mm`` (world, RAS+) under the names in ``"landmarks"``. ``case`` defaults to the
name of the first file and ``patient`` to ``case``. No patient may be in two sections. Without a section ``validation``
the training cases of one ``fold`` validate.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from monai_mamba.errors import DatasetError

MANIFEST = "datalist.json"
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
    if not isinstance(manifest, dict) or not any(section in manifest for section in SECTIONS):
        raise DatasetError(f"{path}: must be an object with the sections {', '.join(SECTIONS)}")
    return manifest


def load_cases(
    dataset_dir: os.PathLike[str] | str,
    section: str,
    *,
    on_corrupt: str = "error",
    limit: int | None = None,
    fold: int = 0,
) -> list[dict[str, Any]]:
    """Return the cases of one section, with absolute file names.

    Args:
        dataset_dir: folder with a ``datalist.json``.
        section: ``"training"``, ``"validation"`` or ``"test"``.
        on_corrupt: ``"error"`` checks that files exist and leaves it to the transforms to stop at one that cannot be
            read; ``"drop"`` opens every file now and leaves out those that cannot be read, with a warning that counts
            and names them.
        limit: take only this many cases, evenly spaced over the section; for trials.
        fold: without a section ``validation``, the training cases with this ``fold`` validate.

    Returns:
        One dictionary per case with ``case``, ``patient``, the files and the label.

    Raises:
        DatasetError: if a file is missing, a label is out of range or of the wrong kind, a class of the training
            section is empty, a case appears twice, or a patient is in two sections.
    """
    if section not in SECTIONS:
        raise ValueError(f"`section` must be one of {', '.join(SECTIONS)}, got {section!r}")
    if on_corrupt not in CORRUPT_POLICIES:
        raise ValueError(f"`on_corrupt` must be one of {', '.join(CORRUPT_POLICIES)}, got {on_corrupt!r}")
    manifest = read_manifest(dataset_dir)
    source = Path(dataset_dir) / MANIFEST
    sections = _sections(manifest, fold)
    if not sections[section]:
        raise DatasetError(f"{source}: the section `{section}` is missing or empty")
    by_section = {name: [_complete(case, source, name) for case in sections[name]] for name in SECTIONS}
    _check_leaks(by_section, source)
    cases = [_resolve(case, Path(dataset_dir), source) for case in by_section[section]]
    if classes := manifest.get("classes"):
        _check_labels(cases, classes, source, section)
    if on_corrupt == "drop":
        cases = _without_corrupt(cases, source)
    for case in cases:
        if isinstance(case.get("label"), list):
            case["label"] = np.asarray(case["label"])  # lists would be collated by class, not by case
    if limit is not None and limit < len(cases):
        cases = [cases[i * len(cases) // limit] for i in range(limit)]
    return cases


def _sections(manifest: dict[str, Any], fold: int) -> dict[str, list[Any]]:
    """The three sections; ``testing`` is Auto3DSeg's name of the test section."""
    sections = {name: list(manifest.get(name, [])) for name in SECTIONS}
    sections["test"] = sections["test"] or list(manifest.get("testing", []))
    if not sections["validation"]:
        held_out = [isinstance(case, dict) and case.get("fold") == fold for case in sections["training"]]
        sections["validation"] = [case for case, held in zip(sections["training"], held_out, strict=True) if held]
        sections["training"] = [case for case, held in zip(sections["training"], held_out, strict=True) if not held]
    return sections


def list_inputs(dataset_dir: os.PathLike[str] | str, section: str = "test") -> list[dict[str, Any]]:
    """Return cases to predict: a section of a data set, or every picture or volume of a folder without a data list.

    Raises:
        DatasetError: if there is nothing to predict.
    """
    folder = Path(dataset_dir)
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
    classes = read_manifest(dataset_dir).get("classes")
    if not isinstance(classes, list) or not classes:
        raise DatasetError(f"{Path(dataset_dir) / MANIFEST}: `classes` must be a list of names")
    return [str(name) for name in classes]


def landmark_names(dataset_dir: os.PathLike[str] | str) -> list[str]:
    """Return the names of the landmarks in the order of the network's outputs.

    Raises:
        DatasetError: if the data list names none.
    """
    names = read_manifest(dataset_dir).get("landmarks")
    if not isinstance(names, list) or not names:
        raise DatasetError(f"{Path(dataset_dir) / MANIFEST}: `landmarks` must be a list of names")
    return [str(name) for name in names]


def _complete(case: Any, source: Path, section: str) -> dict[str, Any]:
    files = [key for key in FILE_KEYS if isinstance(case, dict) and key in case]
    if not files:
        raise DatasetError(f"{source}: a case of `{section}` has no `image` (nor `image1` and `image2`): {case!r:.200}")
    case = {"case": Path(case[files[0]]).name.split(".")[0], **case}
    return {"patient": case["case"], **case}


def _resolve(case: dict[str, Any], folder: Path, source: Path) -> dict[str, Any]:
    resolved = dict(case)
    keys = [key for key in FILE_KEYS if key in case] + (["label"] if isinstance(case.get("label"), str) else [])
    for key in keys:
        path = folder / case[key]
        # A data list comes from outside: it may only name files of its own folder.
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DatasetError(f"{source}: case {case['case']}: `{key}` leaves the folder: {case[key]}")
        if not path.is_file():
            raise DatasetError(f"{source}: case {case['case']}: {path} does not exist")
        resolved[key] = str(path)
    return resolved


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
    for case in cases:
        label = case.get("label")
        if isinstance(label, list):
            if len(label) != len(classes) or any(value not in (0, 1) for value in label):
                raise DatasetError(
                    f"{source}: case {case['case']}: `label` must be {len(classes)} zeros or ones, got {label}"
                )
            for index, value in enumerate(label):
                counts[index] += value
        elif isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
            counts[label] += 1
        elif not isinstance(label, str):
            raise DatasetError(
                f"{source}: case {case['case']}: `label` must be a whole number from 0 to {len(classes) - 1}, "
                f"got {label!r}"
            )
    empty = [classes[index] for index, count in counts.items() if count == 0]
    if section == "training" and empty and not isinstance(cases[0].get("label"), str):
        raise DatasetError(f"{source}: no case of `training` is of the class {', '.join(empty)}")


def _without_corrupt(cases: list[dict[str, Any]], source: Path) -> list[dict[str, Any]]:
    from monai_mamba.training.transforms import read_picture

    readers: dict[bool, Callable[[str], object]] = {True: read_picture, False: _read_volume}
    kept, dropped = [], []
    for case in cases:
        try:
            for key in FILE_KEYS:
                if key in case:
                    readers[case[key].lower().endswith(PICTURES)](case[key])
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
