"""Landmarks of the fetal brain as Slicer lines: LFC, and FeTA images with lines drawn by the same group."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

import typer

from data_prep.book import Book
from data_prep.errors import CaseError, UsageError
from data_prep.markups import System, read_lines
from data_prep.model import Case, Description, Form, Make, OfficialSplit, Ref, Source
from data_prep.options import FormOption
from data_prep.tables import read_rows
from data_prep.tree import Row, Tree

#: measures by the number of their file
MEASURES = ("CBD", "BBD", "TCD", "FOD", "HDV", "ADV")
CEREBELLUM = ("TCD", "HDV", "ADV")
_PARTS: dict[str, OfficialSplit] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "feta21": "test",
}  # fmt: skip
Key = tuple[str, str]


@dataclass(frozen=True)
class LandmarkOptions:
    """Options of sources that read landmarks from volumes and markups."""

    coordinates: Annotated[
        System, typer.Option(help="Coordinate system of markups that name none; file: refuse these.")
    ] = "file"
    radius: Annotated[float, typer.Option(help="Radius in mm of a landmark's ball in the label map.", min=0.1)] = 3.0
    form: FormOption = "strict"


@dataclass(frozen=True)
class Lfc(LandmarkOptions, Source):
    """LFC, landmarks of the fetal cerebellum: MODE/ID.nii.gz and six Slicer lines in MODE_label/ID/NAME_N.mrk.json."""

    name: ClassVar[str] = "lfc"
    identifiers: ClassVar[Literal["public", "personal"]] = "public"
    layouts: ClassVar[tuple[str, ...]] = ("monai", "nnunet")

    points: Annotated[
        Literal["cerebellum", "all"],
        typer.Option(help="cerebellum: ends of TCD, HDV, ADV (6 points); all: ends of all six lines (12 points)."),
    ] = "cerebellum"

    def plan(self, tree: Tree, book: Book) -> Description:
        images, labels = self._find(tree, book)
        rows = self._read_ages(tree, book)
        measures = MEASURES if self.points == "all" else CEREBELLUM
        names = landmark_names(measures)
        if not images and not labels:
            raise UsageError("the input holds no train/ID.nii.gz and no train_label/ID/*.json; check that it is LFC.")
        for key in sorted(images.keys() | labels.keys()):
            mode, number = key
            row = rows.pop(key, None) if mode != "feta21" else None
            inputs: list[Ref | str] = [*images.get(key, []), *labels.get(key, []), *([row.ref] if row else [])]
            if len(images.get(key, [])) != 1:
                what = "missing-image" if key not in images else "ambiguous-image"
                book.fail(inputs, what, f"{len(images.get(key, []))} images for the markups of one id")
                continue
            try:
                lines = read_lines(tree, labels.get(key, []), MEASURES, self.coordinates)
            except CaseError as error:
                book.fail(inputs, error.reason, error.detail)
                continue
            book.add(
                make_landmark_case(
                    key=number if mode != "feta21" else f"feta21_{number}",
                    image=images[key][0],
                    landmarks=[point for measure in measures for point in lines[measure]],
                    refs=[*(Ref(path) for path in labels[key]), *([row.ref] if row else [])],
                    radius=self.radius,
                    form=self.form,
                    split=_PARTS[mode],
                    meta={"weeks": row["Gestational_Age_Weeks"]} if row else {},
                )
            )
        for row in rows.values():
            book.fail(row.ref, "missing-image", "the table names an id that has no image and no markups")
        return describe_landmarks("LFC", names, "MR T2")

    def _find(self, tree: Tree, book: Book) -> tuple[dict[Key, list[str]], dict[Key, list[str]]]:
        images: dict[Key, list[str]] = defaultdict(list)
        labels: dict[Key, list[str]] = defaultdict(list)
        for path in tree.match("**/*.nii", "**/*.nii.gz"):
            parts = PurePosixPath(path).parts
            stem = re.sub(r"\.nii(\.gz)?$", "", parts[-1])
            if len(parts) > 1 and parts[-2].lower() in _PARTS:
                images[_mode(parts[-2]), _number(stem)].append(path)
        for path in tree.match("**/*.json"):
            parts = PurePosixPath(path).parts
            mode = parts[-3].lower().removesuffix("_label") if len(parts) > 2 else ""
            if len(parts) > 2 and parts[-3].lower().endswith("_label") and mode in _PARTS:
                labels[_mode(mode), _number(parts[-2])].append(path)
        return images, labels

    def _read_ages(self, tree: Tree, book: Book) -> dict[Key, Row]:
        found = tree.match("**/gestational_age_samples.csv")
        if not found:
            return {}
        path = tree.one("**/gestational_age_samples.csv", what="gestational_age_samples.csv")
        rows: dict[Key, Row] = {}
        for row in read_rows(tree, book, path, required=["Sample_ID", "Gestational_Age_Weeks", "Split"]):
            mode = row["Split"].lower()
            key = (_mode(mode), _number(row["Sample_ID"]))
            if mode not in _PARTS or key in rows:
                book.fail(row.ref, "bad-row", "the part is unknown, or the id occurs twice")
            else:
                rows[key] = row
        return rows


def _mode(name: str) -> str:
    """Folder names of one part are one: ``valid`` and ``val``."""
    return "feta21" if name.lower() == "feta21" else _PARTS.get(name.lower(), name.lower())


def _number(text: str) -> str:
    """Ids are integers, written with and without leading zeros."""
    return f"{int(text):03d}" if text.isdecimal() and len(text) < 19 else text


def landmark_names(measures: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the end points of lines, in order."""
    return tuple(f"{measure}{end}" for measure in measures for end in (1, 2))


def make_landmark_case(
    key: str,
    image: str,
    landmarks: list[tuple[float, float, float]],
    refs: list[Ref],
    radius: float,
    form: Form,
    split: OfficialSplit | None,
    meta: dict[str, Any],
) -> Case:
    """A volume with its landmarks, and the same landmarks as small labels."""
    points = [list(point) for point in landmarks]
    return Case(
        key=key,
        group=key,
        images=(Make("operations.volumes:image", (image,), {"form": form}),),
        label_map=Make(
            "operations.landmarks:balls", (image,), {"landmarks": points, "radius_mm": radius, "form": form}
        ),
        landmarks=tuple(landmarks),
        split=split,
        refs=tuple(refs),
        meta=meta,
    )


def describe_landmarks(name: str, names: tuple[str, ...], channel: str, **more: Any) -> Description:
    """A landmark data set whose label map has one value per landmark."""
    labels = {"background": 0, **{landmark: value for value, landmark in enumerate(names, 1)}}
    return Description(name, "landmarks", (channel,), labels, landmark_names=names, **more)


SOURCE = Lfc
