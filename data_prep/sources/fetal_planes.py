"""FETAL_PLANES_DB: maternal and fetal ultrasound planes, with patients and an official train and test part."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, ClassVar, Literal

import typer

from data_prep.book import Book
from data_prep.errors import UsageError
from data_prep.model import Description, OfficialSplit, Ref
from data_prep.picture_sets import ENDINGS, Picture, PictureSource, skip_archives
from data_prep.tables import read_rows
from data_prep.tree import Tree

PLANES = ("Fetal abdomen", "Fetal brain", "Fetal femur", "Fetal thorax", "Maternal cervix", "Other")
BRAIN_PLANES = ("Other", "Trans-cerebellum", "Trans-thalamic", "Trans-ventricular")
_COLUMNS = ("Image_name", "Patient_num", "Plane", "Brain_plane", "Train")
_PARTS: dict[str, OfficialSplit] = {"1": "train", "0": "test"}


@dataclass(frozen=True)
class FetalPlanes(PictureSource):
    """FETAL_PLANES_DB: Images/NAME.png and FETAL_PLANES_DB_data.csv (semicolons or commas), parts by patient."""

    name: ClassVar[str] = "fetal-planes"

    target: Annotated[
        Literal["plane", "brain-plane"], typer.Option(help="The six planes, or the planes of the brain pictures.")
    ] = "plane"

    def plan(self, tree: Tree, book: Book) -> Description:
        table = tree.one("**/FETAL_PLANES_DB_data.csv", what="FETAL_PLANES_DB_data.csv")
        book.skip(tree.match("**/FETAL_PLANES_DB_data.xlsx"), "other-format", "the CSV file holds the same")
        images: dict[str, list[str]] = defaultdict(list)
        for path in tree.match("**/*"):
            if path.lower().endswith(ENDINGS):
                images[PurePosixPath(path).stem.lower()].append(path)
        skip_archives(tree, book, bool(images))
        classes = PLANES if self.target == "plane" else BRAIN_PLANES
        indices = {name.lower(): number for number, name in enumerate(classes)}
        delimiter = ";" if len(tree.first_cells(table, ";")) > 1 else ","
        pictures, seen = [], set()
        for row in read_rows(tree, book, table, required=_COLUMNS, delimiter=delimiter):
            stem = row["Image_name"].lower().removesuffix(".png")
            files = images.pop(stem, [])
            plane = row["Plane" if self.target == "plane" else "Brain_plane"].lower()
            inputs: list[Ref | str] = [row.ref, *files]
            if stem in seen:
                book.fail(inputs, "same-image-twice", "another row names the same image")
            elif not files:
                book.fail(row.ref, "missing-image", "the table names a picture that is not there")
            elif self.target == "brain-plane" and row["Plane"].lower() != "fetal brain":
                book.skip(inputs, "not-a-brain", "--target brain-plane takes pictures of the brain only")
            elif plane not in indices:
                book.fail(inputs, "unknown-class", f"the plane is none of {', '.join(classes)}")
            elif row["Train"] not in _PARTS or not row["Patient_num"]:
                book.fail(inputs, "bad-row", "Train must be 1 or 0, and Patient_num must be there")
            else:
                book.skip(files[1:], "duplicate", "a picture of this name is there already")
                meta = {"machine": row.get("US_Machine"), "operator": row.get("Operator"), "plane": row["Plane"]}
                split = _PARTS[row["Train"]]
                number = row["Patient_num"]
                group = f"Patient{int(number):05d}" if number.isdecimal() and len(number) < 10 else number
                name = PurePosixPath(files[0]).stem
                pictures.append(Picture(files[0], indices[plane], name, group, split, (row.ref,), meta))
            seen.add(stem)
        if not pictures and not seen:
            raise UsageError("FETAL_PLANES_DB_data.csv has no rows; check the download.")
        book.skip([path for files in images.values() for path in files], "not-listed", "no row names the picture")
        self.add(tree, book, pictures)
        return Description(
            "FetalPlanes",
            "classification",
            ("ultrasound",),
            {name: number for number, name in enumerate(classes)},
            file_ending=".png",
            license="CC BY 4.0",
            reference="Burgos-Artizzu et al., Scientific Reports 10:10200, 2020; Zenodo 3904280",
        )


SOURCE = FetalPlanes
