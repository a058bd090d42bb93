"""Label maps for data sets that have none: nnU-Net plans nothing without ``labelsTr``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from data_prep.errors import CaseError
from data_prep.operations import Job
from data_prep.operations.landmarks import balls
from monai_mamba.errors import DatasetError
from monai_mamba.files import whole_file, write_text
from monai_mamba.nnunet.annotations import (
    CLASSES_FILE,
    LANDMARKS_FILE,
    MARKUPS_FOLDER,
    landmark_names,
    raise_problems,
    read_classes,
    read_landmarks,
)


def prepare(folder: Path, radius_mm: float = 3.0) -> list[Path]:
    """Write the missing label maps of a raw data set with landmarks or classes; check its annotations on the way.

    With landmarks, label k is a ball at landmark k. With classes, the label ``image`` is where an image is not zero:
    nnU-Net then plans and normalises by that region.

    Args:
        folder: ``nnUNet_raw/DatasetXXX_NAME`` with ``dataset.json``, ``imagesTr`` and ``landmarks.json``,
            ``landmarksTr`` or ``classes.json``.
        radius_mm: of the balls.

    Returns:
        The files that were written; label maps that exist are left as they are.

    Raises:
        DatasetError: if an annotation is missing or wrong, or an image cannot be read. Nothing was written then, but
            for label maps of cases before one whose image is damaged.
    """
    dataset_file = folder / "dataset.json"
    try:
        dataset_json = json.loads(dataset_file.read_text(encoding="utf-8"))
        ending = dataset_json["file_ending"]
        num_channels = len(dataset_json["channel_names"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{dataset_file}: needs `file_ending` and `channel_names`: {error}") from error
    cases = sorted(path.name[: -len(ending) - 5] for path in (folder / "imagesTr").glob(f"*_0000{ending}"))
    if not cases:
        raise DatasetError(f"{folder / 'imagesTr'}: holds no images CASE_0000{ending}")
    missing = [case for case in cases if not (folder / "labelsTr" / f"{case}{ending}").exists()]
    points: dict[str, np.ndarray] = {}
    if (folder / CLASSES_FILE).exists():
        read_classes([folder], cases)
        labels = {"background": 0, "image": 1}
    elif (folder / LANDMARKS_FILE).exists() or (folder / MARKUPS_FOLDER).exists():
        names = _names(folder, dataset_json)
        points = read_landmarks([folder], names, cases, _no_label_map)
        labels = {"background": 0, **{name: value for value, name in enumerate(names, 1)}}
        if ending not in (".nii", ".nii.gz"):
            raise DatasetError(f"{dataset_file}: balls can be drawn on NIfTI images only, got {ending}")
    else:
        raise DatasetError(f"{folder}: holds neither {CLASSES_FILE} nor {LANDMARKS_FILE} nor {MARKUPS_FOLDER}")
    (folder / "labelsTr").mkdir(exist_ok=True)
    written, problems = [], []
    for case in missing:
        images = [folder / "imagesTr" / f"{case}_{channel:04d}{ending}" for channel in range(num_channels)]
        target = folder / "labelsTr" / f"{case}{ending}"
        try:
            with whole_file(target) as temporary:
                if points:
                    _draw_balls(images[0], temporary, points[case], radius_mm)
                else:
                    _draw_region(images, temporary)
            written.append(target)
        except (CaseError, DatasetError, RuntimeError) as error:
            problems.append(f"case {case}: {error}")
    raise_problems(problems, len(cases))
    content = {"numTraining": len(cases), **dataset_json, "labels": dataset_json.get("labels") or labels}
    if content != dataset_json:
        write_text(dataset_file, json.dumps(content, indent=1))
        written.append(dataset_file)
    return written


def _names(folder: Path, dataset_json: dict[str, Any]) -> list[str]:
    if dataset_json.get("labels"):
        return landmark_names(dataset_json)
    try:
        return [str(name) for name in json.loads((folder / LANDMARKS_FILE).read_text())["landmark_names"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{folder}: name the landmarks, as `labels` of dataset.json ({{'background': 0, NAME: 1, ...}}) or as "
            f"`landmark_names` of {LANDMARKS_FILE}: {error}"
        ) from error


def _no_label_map(case: str) -> Any:
    raise DatasetError("there is no file of landmarks")


def _draw_balls(image: Path, output: Path, points_mm: np.ndarray, radius_mm: float) -> None:
    if np.isnan(points_mm).any():
        raise DatasetError(
            "a landmark is null; label maps cannot leave one out, give this case a label map of your own"
        )
    balls(Job((image,), output, output, {"landmarks": points_mm.tolist(), "radius_mm": radius_mm}))


def _draw_region(images: list[Path], output: Path) -> None:
    region = None
    for path in images:
        image = sitk.ReadImage(str(path)) != 0
        region = image if region is None else region | image
    sitk.WriteImage(sitk.Cast(region, sitk.sitkUInt8), str(output), True)
