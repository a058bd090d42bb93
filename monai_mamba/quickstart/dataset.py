"""Read, check and convert data sets in the layout of the Medical Segmentation Decathlon.

Everything that nnU-Net would trip over an hour later, or silently learn from, is refused here, before anything is
written: the message names the file and the reason.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import nibabel as nib
import numpy as np

from monai_mamba.errors import DatasetError
from monai_mamba.files import copy_file, whole_file, write_text

#: The sample that is installed with the package, see ``data/README.md``.
PACKAGED_DATASET = Path(__file__).parent / "data" / "hippocampus"

#: nnU-Net's five folds need as many training cases.
MIN_TRAINING_CASES = 5
HELD_OUT_FRACTION = 0.25

#: Image and label may disagree by this part of a voxel, anywhere in the volume: header fields are float32.
MAX_GEOMETRY_ERROR_VOX = 0.01
#: Deflate cannot compress by more than 1032 to 1, so a header that claims more than the file can hold is damaged.
_MAX_GZIP_RATIO = 1100
_MAX_LISTED = 5


@dataclass(frozen=True)
class Case:
    """One image with its label; ``name`` is the file name without its suffix."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class DecathlonDataset:
    """What ``dataset.json`` says, with all paths found on disk.

    Attributes:
        folder: where ``dataset.json`` lies.
        name: name of the data set, made of letters, digits, ``-`` and ``_``.
        channel_names: one name per image channel, in order.
        labels: name of every label value; 0 is the background.
        cases: all cases with a label.
        held_out: names of the cases that the data set itself keeps from training (key ``held_out``); may be empty.
    """

    folder: Path
    name: str
    channel_names: tuple[str, ...]
    labels: dict[int, str]
    cases: tuple[Case, ...]
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaseFacts:
    """What the check of a case found out: sizes in voxels, spacing in mm, label values that occur."""

    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    label_values: frozenset[int]
    image_digest: str


def read_dataset(folder: os.PathLike[str] | str) -> DecathlonDataset:
    """Read ``dataset.json`` and find every file it names.

    Raises:
        DatasetError: if the folder, ``dataset.json`` or a file is missing, or ``dataset.json`` contradicts itself.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: there is no such folder; give a folder in the decathlon's layout")
    path = folder / "dataset.json"
    if not path.is_file():
        what = "the folder is empty" if not any(folder.iterdir()) else "dataset.json is missing"
        raise DatasetError(
            f"{folder}: {what}; a data set in the decathlon's layout has imagesTr, labelsTr and dataset.json"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: the top level must be an object, got {type(content).__name__}")
    if "training" not in content and "channel_names" in content:
        raise DatasetError(
            f"{path}: this is nnU-Net's own layout, not the decathlon's; it needs no quickstart: "
            "use nnUNetv2_plan_and_preprocess and nnUNetv2_train directly"
        )
    cases = _read_cases(folder, path, content.get("training"))
    name = re.sub(r"[^A-Za-z0-9_-]+", "", str(content.get("name", ""))) or "Dataset"
    return DecathlonDataset(
        folder=folder,
        name=name[:60],
        channel_names=_read_channels(path, content.get("modality")),
        labels=_read_labels(path, content.get("labels")),
        cases=cases,
        held_out=_read_held_out(path, content.get("held_out", []), cases),
    )


def check_dataset(dataset: DecathlonDataset, on_case: Callable[[Case], None] | None = None) -> list[str]:
    """Read every voxel of every case and refuse the data set if any case is not fit for training.

    Args:
        dataset: what :func:`read_dataset` returned.
        on_case: called after each case, for a progress display.

    Returns:
        Remarks for the user: things that are allowed but may not be meant.

    Raises:
        DatasetError: naming the files that do not fit and why; all cases are looked at first.
    """
    problems: list[str] = []
    facts: dict[str, CaseFacts] = {}
    for case in dataset.cases:
        try:
            facts[case.name] = check_case(case, dataset)
        except DatasetError as error:
            problems.append(str(error))
        if on_case:
            on_case(case)
    names_of_image: dict[str, str] = {}
    for case in dataset.cases:
        if case.name not in facts:
            continue
        first = names_of_image.setdefault(facts[case.name].image_digest, case.name)
        if first != case.name:
            problems.append(
                f"{case.image}: the same image as case {first}; a copy that is trained on and tested on makes the "
                "result meaningless, remove one"
            )
    if problems:
        more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        raise DatasetError("; ".join(problems[:_MAX_LISTED]) + more)
    occurring = frozenset().union(*(f.label_values for f in facts.values()))
    return [
        f"label {value} ({name}) occurs in no case; it cannot be learned and is not scored"
        for value, name in dataset.labels.items()
        if value not in occurring and value != 0
    ]


def check_case(case: Case, dataset: DecathlonDataset) -> CaseFacts:
    """Check one case: readable, right number of channels, image and label on one grid, only known label values.

    Raises:
        DatasetError: naming the file and the reason.
    """
    image, image_data = _read_nifti(case.image)
    label, label_data = _read_nifti(case.label)
    num_channels = len(dataset.channel_names)
    found_channels = 1 if image_data.ndim == 3 else image_data.shape[3] if image_data.ndim == 4 else 0
    if found_channels != num_channels:
        raise DatasetError(
            f"{case.image}: shape {_sizes(image_data.shape)} does not have the {num_channels} channel(s) that "
            f"`modality` in dataset.json lists ({', '.join(dataset.channel_names)})"
        )
    if label_data.ndim == 4 and label_data.shape[3] == 1:
        label_data = label_data[..., 0]
    if label_data.shape != image_data.shape[:3]:
        raise DatasetError(
            f"{case.label}: shape {_sizes(label_data.shape)} differs from its image's {_sizes(image_data.shape[:3])}"
        )
    if min(image_data.shape[:3]) < 2:
        raise DatasetError(
            f"{case.image}: shape {_sizes(image_data.shape)} is a single slice; quickstart trains 3D networks"
        )
    _check_same_geometry(case, image.affine, label.affine, image_data.shape[:3])
    if not np.isfinite(image_data).all():
        raise DatasetError(f"{case.image}: holds voxels that are NaN or infinite")
    if image_data.min() == image_data.max():
        raise DatasetError(f"{case.image}: all voxels are equal ({image_data.flat[0]:g}); the image is empty")
    values = np.unique(label_data)
    unknown = [v for v in values.tolist() if v not in dataset.labels]
    if unknown:
        raise DatasetError(
            f"{case.label}: label value(s) {', '.join(f'{v:g}' for v in unknown[:_MAX_LISTED])} not in dataset.json, "
            f"which has {', '.join(map(str, dataset.labels))}"
        )
    spacing = tuple(float(s) for s in nib.affines.voxel_sizes(image.affine))
    digest = hashlib.sha256(np.ascontiguousarray(image_data).data).hexdigest()
    return CaseFacts(image_data.shape, spacing, frozenset(int(v) for v in values.tolist()), digest)


def split_cases(dataset: DecathlonDataset, seed: int) -> tuple[list[Case], list[Case]]:
    """Split into cases for nnU-Net (training and its own validation) and cases that are only predicted.

    The data set's own choice (``held_out`` in dataset.json) is kept; otherwise a quarter is drawn with ``seed``.

    Raises:
        DatasetError: if fewer than 5 cases would be left to train on.
    """
    if dataset.held_out:
        held_out = set(dataset.held_out)
    else:
        num_held_out = max(1, round(HELD_OUT_FRACTION * len(dataset.cases)))
        names = sorted(case.name for case in dataset.cases)
        held_out = set(random.Random(seed).sample(names, num_held_out))
    training = [case for case in dataset.cases if case.name not in held_out]
    if len(training) < MIN_TRAINING_CASES:
        raise DatasetError(
            f"{dataset.folder / 'dataset.json'}: {len(dataset.cases)} labeled cases leave {len(training)} to train on "
            f"and {len(held_out)} to test on; nnU-Net's five folds need at least {MIN_TRAINING_CASES} training cases"
        )
    return training, [case for case in dataset.cases if case.name in held_out]


def write_nnunet_raw(
    dataset: DecathlonDataset, training: Sequence[Case], held_out: Sequence[Case], target: Path
) -> None:
    """Write the data set in nnU-Net's raw layout; ``target`` appears when it is complete.

    Held-out images go to ``imagesTs``, their labels to ``labelsTs``, where nnU-Net never looks while training.

    Args:
        dataset: the checked data set.
        training: cases for ``imagesTr`` and ``labelsTr``.
        held_out: cases for ``imagesTs`` and ``labelsTs``.
        target: folder to make, ``nnUNet_raw/DatasetXXX_Name``.
    """
    building = target.with_name(f".building-{target.name}")
    shutil.rmtree(building, ignore_errors=True)
    for part, cases in (("Tr", training), ("Ts", held_out)):
        images, labels = building / f"images{part}", building / f"labels{part}"
        images.mkdir(parents=True)
        labels.mkdir()
        for case in cases:
            _write_channels(
                case.image, [images / f"{case.name}_{c:04d}.nii.gz" for c in range(len(dataset.channel_names))]
            )
            _write_channels(case.label, [labels / f"{case.name}.nii.gz"])
    description = {
        "channel_names": {str(i): name for i, name in enumerate(dataset.channel_names)},
        "labels": {"background" if value == 0 else name: value for value, name in dataset.labels.items()},
        "numTraining": len(training),
        "file_ending": ".nii.gz",
    }
    write_text(building / "dataset.json", json.dumps(description, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(building, target)


def fingerprint(dataset: DecathlonDataset) -> str:
    """Digest of ``dataset.json`` and of the names and sizes of all files: a resumed run must be about the same data."""
    digest = hashlib.sha256((dataset.folder / "dataset.json").read_bytes())
    for path in itertools.chain(*((case.image, case.label) for case in dataset.cases)):
        digest.update(f"{path.relative_to(dataset.folder).as_posix()}|{path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _read_cases(folder: Path, path: Path, entries: Any) -> tuple[Case, ...]:
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"{path}: `training` must be a list of cases with `image` and `label`, and not be empty")
    cases: dict[str, Case] = {}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise DatasetError(f"{path}: entry {number} of `training` names no image")
        if not isinstance(entry.get("label"), str):
            raise DatasetError(f"{path}: entry {number} of `training` ({entry['image']}) names no label")
        image = _find(folder, path, entry["image"], "image")
        label = _find(folder, path, entry["label"], "label")
        name = re.sub(r"\.nii(\.gz)?$", "", image.name)
        if name in cases:
            raise DatasetError(f"{path}: case {name} is listed twice in `training`; every image may occur once")
        cases[name] = Case(name, image, label)
    labels = [case.label for case in cases.values()]
    repeated = next((p for p in labels if labels.count(p) > 1), None)
    if repeated is not None:
        raise DatasetError(f"{path}: label {repeated.name} belongs to two cases of `training`")
    return tuple(cases.values())


def _find(folder: Path, path: Path, name: str, kind: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or not name.isprintable():
        raise DatasetError(f"{path}: {kind} path {name!r} must be relative and stay inside the data set's folder")
    if not name.endswith((".nii", ".nii.gz")):
        raise DatasetError(f"{path}: {kind} {name} is no NIfTI file; convert it to .nii.gz")
    file = folder.joinpath(*parts)
    if not file.is_file():
        raise DatasetError(f"{file}: {kind} is missing, but dataset.json lists it")
    return file


def _read_channels(path: Path, modality: Any) -> tuple[str, ...]:
    if not isinstance(modality, dict) or not modality or set(modality) != {str(i) for i in range(len(modality))}:
        raise DatasetError(f'{path}: `modality` must name the channels as {{"0": "MRI", ...}}, got {modality!r:.80}')
    return tuple(str(modality[str(i)]) for i in range(len(modality)))


def _read_labels(path: Path, labels: Any) -> dict[int, str]:
    if not isinstance(labels, dict) or not all(re.fullmatch(r"\d{1,4}", str(key)) for key in labels):
        raise DatasetError(
            f'{path}: `labels` must map values to names as {{"0": "background", "1": "liver"}}, got {labels!r:.80}'
        )
    names = {int(key): str(name) for key, name in sorted(labels.items(), key=lambda item: int(item[0]))}
    if list(names) != list(range(len(names))) or len(names) < 2:
        raise DatasetError(
            f"{path}: `labels` must be 0 for the background, then 1, 2, 3 without a gap, got "
            f"{', '.join(map(str, names)) or 'nothing'}; nnU-Net needs consecutive values"
        )
    structures = [names[value].strip().lower() for value in names if value != 0]
    for name in structures:
        if not name or structures.count(name) > 1 or name in ("background", "ignore"):
            raise DatasetError(
                f"{path}: `labels` has the name {name!r} twice, empty or reserved; give each its own name"
            )
    return names


def _read_held_out(path: Path, names: Any, cases: Sequence[Case]) -> tuple[str, ...]:
    known = {case.name for case in cases}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{path}: `held_out` must be a list of case names")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DatasetError(f"{path}: `held_out` names {unknown[0]}, which is not in `training`")
    return tuple(dict.fromkeys(names))


def _read_nifti(path: Path) -> tuple[Any, np.ndarray]:
    """Return the nibabel image and its voxels; whatever goes wrong becomes a DatasetError with path and reason."""
    try:
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise DatasetError(f"{path}: not a NIfTI file but {type(image).__name__}")
        if min(image.shape, default=0) < 1:
            raise DatasetError(f"{path}: the header claims the shape {_sizes(image.shape)}")
        claimed = int(np.prod([int(n) for n in image.shape], dtype=object)) * image.get_data_dtype().itemsize
        possible = path.stat().st_size * (_MAX_GZIP_RATIO if path.suffix == ".gz" else 1)
        if claimed > possible:
            raise DatasetError(
                f"{path}: truncated: the header claims {claimed} bytes of voxels, more than the file holds"
            )
        if image.get_data_dtype().kind not in "iuf":
            raise DatasetError(f"{path}: voxels of type {image.get_data_dtype()} are not supported")
        data = np.asanyarray(image.dataobj)
        if path.suffix == ".gz":
            # nibabel stops after the last voxel; the checksum that tells a damaged file comes behind it.
            with gzip.open(path) as file:
                while file.read(1 << 22):
                    pass
    except DatasetError:
        raise
    except EOFError as error:
        raise DatasetError(f"{path}: truncated: the compressed data ends too early") from error
    except Exception as error:  # nibabel, zlib and numpy raise a dozen kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetError(f"{path}: cannot be read as NIfTI: {reason}") from error
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-12:
        raise DatasetError(f"{path}: the affine in the header is singular or not finite")
    return image, data


def _check_same_geometry(case: Case, image_affine: np.ndarray, label_affine: np.ndarray, shape: Sequence[int]) -> None:
    corners = np.array([[*c, 1] for c in itertools.product(*((0, n - 1) for n in shape))], dtype=float)  # (8, 4)
    shift_mm = np.linalg.norm((corners @ (image_affine - label_affine).T)[:, :3], axis=1).max()
    smallest_mm = nib.affines.voxel_sizes(image_affine).min()
    if shift_mm > MAX_GEOMETRY_ERROR_VOX * smallest_mm:
        raise DatasetError(
            f"{case.label}: its affine differs from its image's: voxels lie up to {shift_mm:.3g} mm apart; "
            "resample the label onto the image or repair the header"
        )


def _write_channels(source: Path, targets: Sequence[Path]) -> None:
    image = nib.load(source)
    assert isinstance(image, nib.Nifti1Image)
    if len(image.shape) == 3 and source.name.endswith(".nii.gz"):
        copy_file(source, targets[0])
        return
    for channel, target in enumerate(targets):
        volume = image.slicer[..., channel] if len(image.shape) == 4 else image
        with whole_file(target) as temporary:
            nib.save(volume, temporary)


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
