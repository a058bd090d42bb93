"""Where files lie in the data set and which descriptions stand beside them: nnU-Net raw, and MONAI datalist."""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from data_prep.errors import UsageError
from data_prep.model import CASE_COLUMNS, Case, Description

CONVERTED_BY = "monai-mamba data_prep"


@dataclass(frozen=True, slots=True)
class Entry:
    """A case with the name, group and fold it has in the data set.

    Args:
        case: what is made.
        name: case id, used in file names.
        group: patient id as shown.
        fold: in which the case validates; ``None`` for official parts and without folds.
        outputs: paths below the data set, one per `Case.makes`.
    """

    case: Case
    name: str
    group: str
    fold: int | None
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """What came out of a case.

    Args:
        entry: of the plan.
        files: for each `Case.makes`, the path of its file (or of the input that stands for it).
        landmarks_voxel: `Case.landmarks` on the grid of the first image.
    """

    entry: Entry
    files: tuple[str, ...]
    landmarks_voxel: tuple[tuple[float, ...], ...] = ()


class Layout(ABC):
    """A way to lay out a data set."""

    name: ClassVar[str]
    #: whether the description may refer to inputs by path instead of holding them
    may_refer: ClassVar[bool] = False

    @abstractmethod
    def check(self, description: Description) -> None:
        """Raise `UsageError` when this layout cannot hold such a data set."""

    @abstractmethod
    def outputs(self, description: Description, name: str, case: Case) -> tuple[str, ...]:
        """Paths of a case's files, in the order of `Case.makes`."""

    @abstractmethod
    def documents(self, description: Description, made: Sequence[Made]) -> dict[str, str]:
        """Path to text of the descriptions; `made` is sorted by name."""


class NnunetLayout(Layout):
    """nnU-Net v2 raw data set: ``imagesTr/NAME_0000.nii.gz``, ``labelsTr/NAME.nii.gz``, ``dataset.json``."""

    name = "nnunet"
    may_refer = True

    def check(self, description: Description) -> None:
        if description.label_values is None:
            raise UsageError(f"nnU-Net segments; this data set is for {description.task}. Use --format monai.")
        has_regions = any(not isinstance(value, int) for value in description.labels.values())
        if has_regions != (description.regions_class_order is not None):
            raise UsageError("`regions_class_order` must be given exactly when `labels` holds regions.")
        if next(iter(description.labels), None) != "background":
            raise UsageError("nnU-Net needs `background` as the first label.")
        # nnU-Net asks for consecutive integers; a gap would train a class that never occurs.
        values = description.label_values or []
        if values != list(range(len(values))):
            raise UsageError(f"nnU-Net needs consecutive labels from 0, got {values}; map them in the source.")

    def outputs(self, description: Description, name: str, case: Case) -> tuple[str, ...]:
        part = "Ts" if case.split == "test" else "Tr"
        ending = description.file_ending
        images = tuple(f"images{part}/{name}_{i:04d}{ending}" for i in range(len(case.images)))
        return images + ((f"labels{part}/{name}{ending}",) if case.label_map else ())

    def documents(self, description: Description, made: Sequence[Made]) -> dict[str, str]:
        training = [one for one in made if one.entry.case.split != "test"]
        content: dict[str, Any] = {
            "channel_names": {str(i): channel for i, channel in enumerate(description.channels)},
            "labels": {
                name: value if isinstance(value, int) else list(value) for name, value in description.labels.items()
            },
        }
        if description.regions_class_order is not None:
            content["regions_class_order"] = list(description.regions_class_order)
        content |= {"numTraining": len(training), "file_ending": description.file_ending, "name": description.name}
        content |= _provenance(description)
        content |= description.extra
        if any(one.files != one.entry.outputs for one in training):
            content["dataset"] = {
                one.entry.name: {"images": list(one.files[:-1]), "label": one.files[-1]} for one in training
            }
        documents = {"dataset.json": _json(content), "cases.csv": _cases_table(made)}
        if description.landmark_names:
            cases = {one.entry.name: _landmarks(one) for one in made}
            documents["landmarks.json"] = _json({"landmark_names": list(description.landmark_names), "cases": cases})
        splits = _splits(training)
        if splits:
            documents["splits_final.json"] = _json(splits)
        return documents


class MonaiLayout(Layout):
    """MONAI: ``images/NAME.nii.gz`` (or ``NAME_VIEW``), ``labels/NAME.nii.gz``, ``datalist.json``, ``cases.csv``.

    Lists for segmentation are Auto3DSeg's, all others those of the bundles (docs/bundles.md, Data).
    """

    name = "monai"

    def check(self, description: Description) -> None:
        pass

    def outputs(self, description: Description, name: str, case: Case) -> tuple[str, ...]:
        ending = description.file_ending
        if case.views:
            images = tuple(f"images/{name}_{view}{ending}" for view in case.views)
        elif len(case.images) == 1:
            images = (f"images/{name}{ending}",)
        else:
            images = tuple(f"images/{name}_{i:04d}{ending}" for i in range(len(case.images)))
        label_map = (f"labels/{name}{ending}",) if case.label_map else ()
        names = [f"{name}_{view}" for view in case.views] or [name]
        masks = tuple(f"labels/{one}{ending}" for one in names) if case.masks else ()
        return images + label_map + masks

    def documents(self, description: Description, made: Sequence[Made]) -> dict[str, str]:
        # Auto3DSeg, which segments, looks for "testing"; the bundles of this package understand both.
        test = "testing" if description.task == "segmentation" else "test"
        keys = {"train": "training", "val": "validation", "test": test}
        lists: dict[str, list[dict[str, Any]]] = {"training": []}
        for one in made:
            entries = [_segmentation_entry(one)] if description.task == "segmentation" else _entries(one, description)
            lists.setdefault(keys[one.entry.case.split or "train"], []).extend(entries)
        content: dict[str, Any] = {
            "name": description.name,
            "description": description.text,
            "labels": {str(k): v if isinstance(v, int) else list(v) for k, v in description.labels.items()},
            **_names(description),
            "modality": {str(i): channel for i, channel in enumerate(description.channels)},
            "numTraining": len(lists["training"]),
            "numTest": len(lists.get(test, [])),
            **({"landmark_names": list(description.landmark_names)} if description.landmark_names else {}),
            **_provenance(description),
            **description.extra,
            **{key: lists[key] for key in keys.values() if key in lists},
        }
        return {"datalist.json": _json(content), "cases.csv": _cases_table(made)}


LAYOUTS: Mapping[str, Layout] = {"nnunet": NnunetLayout(), "monai": MonaiLayout()}


def _segmentation_entry(made: Made) -> dict[str, Any]:
    # Auto3DSeg joins the data folder to every string and to every list, so nothing but paths may be one of these.
    case, files = made.entry.case, list(made.files)
    images = files[: len(case.images)]
    entry: dict[str, Any] = {"image": images[0] if len(images) == 1 else images}
    if case.label_map:
        entry["label"] = files[len(images)]
    if made.entry.fold is not None:
        entry["fold"] = made.entry.fold
    return entry


def _entries(made: Made, description: Description) -> list[dict[str, Any]]:
    """What the bundles read: ``image``, or ``image1`` and ``image2`` for views; label, case, patient, study, fold."""
    case, name = made.entry.case, made.entry.name
    rest = made.files[len(case.images) :]
    entries = []
    for sample in case.samples or [tuple(range(len(case.images)))]:
        files = [made.files[i] for i in sample]
        entry: dict[str, Any] = {}
        if len(files) == 1:
            entry["image"] = files[0]
        elif case.views:
            entry.update({f"image{number}": path for number, path in enumerate(files, 1)})
        else:
            entry["image"] = files
        if case.masks:
            names = ["mask"] if len(files) == 1 else [f"mask{number}" for number in range(1, len(files) + 1)]
            entry.update({key: rest[i] for key, i in zip(names, sample, strict=True)})
        if case.label_map:
            entry["label"] = rest[0]
        elif isinstance(case.target, Mapping):
            entry["label"], entry["label_mask"] = case.target["values"], case.target["mask"]
        elif case.target is not None:
            entry["label"] = case.target
        if case.landmarks:
            entry |= _landmarks(made)
        entry |= {"case": name, "patient": made.entry.group}
        if case.samples:
            entry |= {"case": "_".join([name, *(case.views[i] for i in sample)]), "study": name}
        if made.entry.fold is not None:
            entry["fold"] = made.entry.fold
        entries.append(entry)
    return entries


def _names(description: Description) -> dict[str, list[str]]:
    if description.task not in ("classification", "multilabel"):
        return {}
    return {"classes": [name for name, _ in sorted(description.labels.items(), key=lambda item: item[1])]}  # type: ignore[arg-type, return-value]


def _landmarks(made: Made) -> dict[str, Any]:
    return {
        "landmarks": [list(point) for point in made.entry.case.landmarks],
        "landmarks_voxel": [list(point) for point in made.landmarks_voxel],
    }


def _splits(training: Sequence[Made]) -> list[dict[str, list[str]]]:
    official = [one.entry.name for one in training if one.entry.case.split == "val"]
    if official:
        return [{"train": [one.entry.name for one in training if one.entry.case.split != "val"], "val": official}]
    folds = sorted({one.entry.fold for one in training if one.entry.fold is not None})
    return [
        {
            "train": [one.entry.name for one in training if one.entry.fold != fold],
            "val": [one.entry.name for one in training if one.entry.fold == fold],
        }
        for fold in folds
    ]


def _provenance(description: Description) -> dict[str, str]:
    found = {"description": description.text, "reference": description.reference, "licence": description.license}
    return {key: value for key, value in found.items() if value} | {"converted_by": CONVERTED_BY}


def _cases_table(made: Sequence[Made]) -> str:
    columns = sorted({column for one in made for column in one.entry.case.meta})
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*CASE_COLUMNS, *columns])
    for one in made:
        case = one.entry.case
        target = "" if case.target is None else json.dumps(case.target)
        fold = "" if one.entry.fold is None else one.entry.fold
        row = [one.entry.name, one.entry.group, case.split or "train", fold, target]
        writer.writerow([*row, *(case.meta.get(column, "") for column in columns)])
    return text.getvalue()


def _json(content: Any) -> str:
    # Key order carries meaning for nnU-Net's regions, so keys are never sorted.
    return json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
