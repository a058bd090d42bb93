"""Files of label maps: what a network found, on the grid of its image, and the references beside it."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Container, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.transforms import LoadImage, ResampleToMatch
from PIL import Image
from torch import Tensor

from monai_mamba.errors import DatasetError, RunError
from monai_mamba.files import case_file, copy_file, whole_file, write_text
from monai_mamba.training.datalist import PICTURES
from monai_mamba.training.transforms import CheckLabelMapd, read_picture


def write_label_map(path: os.PathLike[str] | str, label_map: Any) -> None:
    """Write a label map ``(1, *spatial)`` with an affine (MONAI's ``MetaTensor``) as NIfTI.

    Raises:
        RunError: if it does not lie on the grid of the file its image came from.
    """
    from data_prep.nifti import write_nifti

    wanted = tuple(int(n) for n in np.ravel(label_map.meta.get("spatial_shape", label_map.shape[1:])))[:3]
    if label_map.shape[0] != 1 or tuple(label_map.shape[1:]) != wanted:
        raise RunError(f"{path}: the label map has the shape {tuple(label_map.shape)}, the image {wanted}")
    affine = np.asarray(label_map.affine.cpu(), dtype=np.float64)
    original = label_map.meta.get("original_affine")
    if original is not None:
        original = np.asarray(original, dtype=np.float64)
        if not np.abs(affine - original).max() <= 1e-3:
            raise RunError(f"{path}: the label map did not come back to the grid of its image")
        affine = original  # without the rounding of the way there and back
    with whole_file(path) as temporary:
        write_nifti(temporary, np.asarray(label_map[0].cpu()).astype(np.uint8), affine)


def read_reference(case: Mapping[str, Any], image_key: str, num_classes: int, like: Tensor) -> Tensor:
    """Return the label map of a case on the grid of its image as that was read, ``(1, *spatial)``, uint8.

    Args:
        case: with the files of the image and of the ``label``.
        image_key: key of the image.
        num_classes: values are 0 to ``num_classes - 1``.
        like: the image as it was read, with its affine if it is a volume; a picture may have been resized.

    Raises:
        DatasetError: if the file cannot be read, does not lie on the grid of its image, or holds another value.
    """
    check = CheckLabelMapd("label", num_classes=num_classes, image_key=image_key)
    try:
        if str(case["label"]).lower().endswith(PICTURES):
            with Image.open(case["label"]) as picture:
                values = torch.from_numpy(np.array(picture).astype(np.int64))[None]
            check({"case": case["case"], image_key: read_picture(case[image_key]), "label": values})
            size = tuple(like.shape[1:])
            label = torch.nn.functional.interpolate(values[None].float(), size, mode="nearest-exact")[0]
        else:
            load = LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True)
            files: dict[Hashable, Any] = {
                "case": case["case"],
                image_key: load(case[image_key]),
                "label": load(case["label"]),
            }
            label = ResampleToMatch(mode="nearest", padding_mode="zeros")(check(files)["label"], like)
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(f"{case['label']}: cannot be read as a label map: {error}".splitlines()[0]) from error
    return torch.as_tensor(label).as_subclass(Tensor).round().to(torch.uint8)


def image_files(cases: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return case to image file, of several channels the first, for the pictures of a report."""
    return {str(case["case"]): case["image"] if isinstance(case["image"], str) else case["image"][0] for case in cases}


def gather_references(
    cases: Sequence[dict[str, Any]],
    structures: Sequence[str],
    folder: os.PathLike[str] | str,
    left_out: Container[str] = (),
) -> None:
    """Copy the label maps of cases into one folder under the names of the cases, as ``monai-mamba evaluate`` wants it.

    ``dataset.json`` names the structures, ``cases.csv`` the patients. What an earlier call left is replaced.

    Args:
        cases: cases of `monai_mamba.training.datalist.load_cases` with ``label``.
        structures: names of the label values, background first.
        folder: for ``<case>.nii.gz``.
        left_out: names of cases that were not predicted, `monai_mamba.training.loading.CaseLoader.left_out`.

    Raises:
        DatasetError: if a label map is no NIfTI file.
    """
    folder = Path(folder)
    cases = [case for case in cases if str(case["case"]) not in left_out]
    if (folder / "dataset.json").is_file() and (folder / "cases.csv").is_file():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        target = case_file(folder, str(case["case"]), ".nii.gz")
        if str(case["label"]).endswith(".nii.gz"):
            copy_file(case["label"], target)
        elif str(case["label"]).endswith(".nii"):
            with whole_file(target) as temporary:
                nib.save(nib.Nifti1Image.from_filename(case["label"]), temporary)
        else:
            raise DatasetError(f"{case['label']}: label maps must be NIfTI files (.nii or .nii.gz)")
    write_text(
        folder / "dataset.json",
        json.dumps({"labels": {name: value for value, name in enumerate(structures)}, "file_ending": ".nii.gz"}),
    )
    with whole_file(folder / "cases.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "patient"])
        writer.writerows([case["case"], case["patient"]] for case in cases)
