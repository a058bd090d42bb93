"""MURA v1.1: X-rays of the upper limb, several images per study, normal or abnormal."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import PurePosixPath
from typing import Annotated, ClassVar, Literal

import typer

from data_prep.book import Book
from data_prep.errors import UsageError
from data_prep.model import Case, Description, Make, OfficialSplit, Ref, Source
from data_prep.options import MaxSide
from data_prep.tables import read_rows
from data_prep.tree import Row, Tree

BODY_PARTS = ("elbow", "finger", "forearm", "hand", "humerus", "shoulder", "wrist")
CLASSES = {"negative": 0, "positive": 1}
#: seed and share of the patients held out for validation in the published code of XFMamba
PUBLISHED_SEED, PUBLISHED_SHARE = 42, 0.08
_STUDY = re.compile(
    r"(?:.*/)?(?P<key>(?P<part>train|valid)/(?P<body>XR_[A-Z]+)/(?P<patient>patient\d+)/"
    r"(?P<study>study\d+_(?P<label>positive|negative)))"
)
_IMAGE = re.compile(_STUDY.pattern + r"/(?P<image>image(?P<number>\d+)\.png)", re.ASCII)


@dataclass
class _Study:
    """Images of one study by number, its label by the table if there is one, and the rows that belong to it."""

    match: re.Match[str]
    images: dict[int, str] = field(default_factory=dict)
    label: int | None = None
    place: int = 0
    """Line in the table of studies."""
    refs: list[Ref] = field(default_factory=list)

    @property
    def body_part(self) -> str:
        return self.match["body"].removeprefix("XR_").lower()


@dataclass(frozen=True)
class Mura(Source):
    """MURA v1.1: X-rays of the upper limb as pairs of images of a study, normal (0) or abnormal (1)."""

    name: ClassVar[str] = "mura"
    identifiers = "public"
    layouts: ClassVar[tuple[str, ...]] = ("monai",)

    pairs: Annotated[
        Literal["all", "first2", "canonical", "none"],
        typer.Option(
            help="Entries of a study: all pairs (published); its first two images; 1-2, 3-4, ..., so that every image "
            "is used; or single images."
        ),
    ] = "all"
    single: Annotated[
        Literal["duplicate", "skip"],
        typer.Option(help="A study with one image: pair the image with itself (published), or leave it out."),
    ] = "duplicate"
    body_part: Annotated[
        list[str], typer.Option(help=f"Only this part, several times for several: {', '.join(BODY_PARTS)}.")
    ] = ()  # type: ignore[assignment]
    split: Annotated[
        Literal["official", "published"],
        typer.Option(
            help="Official valid is the test part; training has folds by patient (official), or XFMamba's "
            "validation: 8 % of the patients."
        ),
    ] = "official"
    max_side: MaxSide = 0
    gray: Annotated[
        bool, typer.Option("--gray/--keep-channels", help="Write the few RGB files in gray, as the others are.")
    ] = True

    def plan(self, tree: Tree, book: Book) -> Description:
        unknown = sorted(self._body_parts - set(BODY_PARTS))
        if unknown:
            raise UsageError(f"--body-part {unknown[0]} is not in MURA; choose among {', '.join(BODY_PARTS)}.")
        studies = self._studies(tree, book)
        if not studies:
            raise UsageError(
                "the input has no image of MURA (MURA-v1.1/train/XR_ELBOW/patient00001/study1_positive/image1.png); "
                "check that it is the unpacked download."
            )
        self._read_tables(tree, book, studies)
        chosen = [study for study in studies.values() if self._is_chosen(study, book)]
        validation = self._published_validation(studies.values()) if self.split == "published" else set()
        for study in chosen:
            self._add(study, study.match["patient"] in validation, book)
        return Description(
            name="MURA",
            task="classification",
            channels=("xray",) if self.pairs == "none" else ("first", "second"),
            labels=CLASSES,
            file_ending=".png",
            license="MURA research use agreement of Stanford University",
            reference="Rajpurkar et al., MURA, arXiv:1712.06957",
            text="X-rays of the upper limb; label 1: the study was read as abnormal",
        )

    def _studies(self, tree: Tree, book: Book) -> dict[str, _Study]:
        """Studies by their path from ``train`` or ``valid`` on, in the order of the tree."""
        studies: dict[str, _Study] = {}
        for path in tree.match("**/*.png"):
            match = _IMAGE.fullmatch(path)
            if match is None:
                continue
            study = studies.setdefault(match["key"], _Study(match))
            number = int(match["number"])
            if number in study.images:
                book.fail(path, "same-place", "the download is in the input more than once")
            else:
                study.images[number] = path
        return studies

    def _read_tables(self, tree: Tree, book: Book, studies: dict[str, _Study]) -> None:
        """Labels from the tables; what tables and folders do not agree on fails."""
        images: dict[str, set[str]] = {}  # by part, what the tables list
        labeled: dict[str, set[str]] = {}
        for path in tree.match("**/train_image_paths.csv", "**/valid_image_paths.csv"):
            part = PurePosixPath(path).name.split("_")[0]
            listed = images.setdefault(part, set())
            for row in _rows(tree, book, path, ("image_path",)):
                match = _IMAGE.fullmatch(row["image_path"].replace("\\", "/"))
                study = studies.get(match["key"]) if match else None
                if match is None or match["part"] != part:
                    book.fail(row.ref, "bad-path", "not a path of an image of this part")
                elif study is None or int(match["number"]) not in study.images:
                    book.fail(row.ref, "missing-image", "the table lists an image that is not in the folder")
                elif f"{match['key']}/{match['image']}" in listed:
                    book.skip(row.ref, "duplicate-row", "listed before")
                else:
                    listed.add(f"{match['key']}/{match['image']}")
                    study.refs.append(row.ref)
        for path in tree.match("**/train_labeled_studies.csv", "**/valid_labeled_studies.csv"):
            part = PurePosixPath(path).name.split("_")[0]
            listed = labeled.setdefault(part, set())
            for place, row in enumerate(_rows(tree, book, path, ("study_path", "label"))):
                match = _STUDY.fullmatch(row["study_path"].replace("\\", "/").rstrip("/"))
                study = studies.get(match["key"]) if match else None
                if match is None or match["part"] != part:
                    book.fail(row.ref, "bad-path", "not a path of a study of this part")
                elif row["label"] not in ("0", "1"):
                    book.fail(row.ref, "bad-label", "a label must be 0 or 1")
                elif study is None:
                    book.fail(row.ref, "missing-images", "the table lists a study that is not in the folder")
                elif match["key"] in listed:
                    book.skip(row.ref, "duplicate-row", "listed before")
                else:
                    listed.add(match["key"])
                    study.label, study.place = int(row["label"]), place
                    study.refs.append(row.ref)
        for key, study in studies.items():
            part = study.match["part"]
            for number, path in list(study.images.items()):
                if part in images and f"{key}/{PurePosixPath(path).name}" not in images[part]:
                    book.skip(path, "not-listed", "in the folder, but not in the table of images")
                    del study.images[number]
            if part not in labeled:
                study.label = CLASSES[study.match["label"]]
        for part in sorted({study.match["part"] for study in studies.values()} - labeled.keys()):
            book.note(f"{part}_labeled_studies.csv is not in the input; labels are those of the folders' names")

    def _is_chosen(self, study: _Study, book: Book) -> bool:
        """Whether the study becomes a case; if not, its inputs get their verdict."""
        inputs: list[Ref | str] = [*study.images.values(), *study.refs]
        if self._is_other_part(study):
            book.skip(inputs, "other-body-part", study.body_part)
        elif not study.images:
            book.fail(inputs, "missing-images", "no image of the study can be used")
        elif study.label is None:
            book.fail(inputs, "missing-label", "the study is not in the table of studies")
        elif study.label != CLASSES[study.match["label"]]:
            book.fail(inputs, "contradicting-label", "the table and the folder's name do not agree")
        elif len(study.images) == 1 and self.single == "skip" and self.pairs != "none":
            book.skip(inputs, "single-image", "a study with one image")
        else:
            return True
        return False

    @property
    def _body_parts(self) -> set[str]:
        """As in `BODY_PARTS`, however they were written: wrist, WRIST or XR_WRIST."""
        return {part.lower().removeprefix("xr_") for part in self.body_part}

    def _is_other_part(self, study: _Study) -> bool:
        return bool(self.body_part) and study.body_part not in self._body_parts

    def _add(self, study: _Study, is_validation: bool, book: Book) -> None:
        numbers = sorted(study.images)
        samples = make_pairs(len(numbers), self.pairs)
        used = sorted({i for sample in samples for i in sample})
        book.skip([study.images[numbers[i]] for i in range(len(numbers)) if i not in used], "further-image", "--pairs")
        params: dict[str, object] = {"mode": "L" if self.gray else "keep"}
        if self.max_side:
            params["max_side"] = self.max_side
        split: OfficialSplit = "test" if study.match["part"] == "valid" else "val" if is_validation else "train"
        place = {i: position for position, i in enumerate(used)}
        book.add(
            Case(
                key=f"{study.match['body']}-{study.match['patient']}-{study.match['study']}",
                group=study.match["patient"],
                images=tuple(Make("operations.pictures:picture", (study.images[numbers[i]],), params) for i in used),
                views=tuple(f"image{numbers[i]}" for i in used),
                samples=tuple(tuple(place[i] for i in sample) for sample in samples),
                target=study.label,
                split=split,
                stratum=f"{study.match['body']} {study.label}",
                refs=tuple(study.refs),
                meta={"body_part": study.body_part, "num_images": len(numbers)},
                same_grid=False,
            )
        )

    def _published_validation(self, studies: Iterable[_Study]) -> set[str]:
        """Patients of the published validation part: 8 %, stratified by the majority label of their studies."""
        from sklearn.model_selection import train_test_split

        labels: dict[str, list[int]] = defaultdict(list)
        for study in sorted(studies, key=lambda study: study.place):
            if study.match["part"] == "train" and study.label is not None and not self._is_other_part(study):
                labels[study.match["patient"]].append(study.label)
        patients = sorted(labels)
        # Of equal counts the label of the earlier line counts, as in the published code.
        majority = [max(dict.fromkeys(labels[patient]), key=labels[patient].count) for patient in patients]
        try:
            held_out = train_test_split(
                patients,
                test_size=PUBLISHED_SHARE,
                random_state=PUBLISHED_SEED,
                stratify=majority if len(set(majority)) > 1 else None,
            )[1]
        except ValueError as error:
            raise UsageError(
                f"--split published cannot hold out 8 % of {len(patients)} patients; take --split official."
            ) from error
        return set(held_out)


def make_pairs(count: int, rule: str) -> tuple[tuple[int, ...], ...]:
    """Positions of the images of each entry of a study with `count` images.

    Args:
        count: number of images, at least 1.
        rule: see `Mura.pairs`.
    """
    if rule == "none":
        return tuple((i,) for i in range(count))
    if count == 1:
        return ((0, 0),)
    if rule == "all":
        return tuple(combinations(range(count), 2))
    if rule == "first2":
        return ((0, 1),)
    pairs = [(i, i + 1) for i in range(0, count - 1, 2)]
    return tuple(pairs if count % 2 == 0 else [*pairs, (count - 2, count - 1)])


def _rows(tree: Tree, book: Book, path: str, columns: Sequence[str]) -> list[Row]:
    """Rows of a table that has no header when it is the publisher's, and has one when somebody saved it again."""
    first = tree.first_cells(path)
    if any("/" in cell for cell in first) or not first:
        return read_rows(tree, book, path, required=columns, columns=columns)
    rename = {} if set(columns) <= set(first) else dict(zip(first, columns, strict=False))
    return read_rows(tree, book, path, required=columns, rename=rename)


SOURCE = Mura
