"""PAD-UFES-20: skin lesions photographed with telephones, six diagnoses."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar

from data_prep.book import Book
from data_prep.errors import UsageError
from data_prep.model import Description
from data_prep.picture_sets import ENDINGS, Picture, PictureSource, skip_archives
from data_prep.tables import read_rows
from data_prep.tree import Tree

CLASSES = ("ACK", "BCC", "MEL", "NEV", "SCC", "SEK")
#: Bowen's disease is counted as squamous cell carcinoma, as the publisher does
_MERGED = {"BOD": "SCC"}
_META = ("age", "gender", "region", "fitspatrick", "biopsed")


@dataclass(frozen=True)
class PadUfes20(PictureSource):
    """PAD-UFES-20: metadata.csv and imgs_part_1 to 3 (folders or zip files) with PAT_PATIENT_LESION_NUMBER.png."""

    name: ClassVar[str] = "pad-ufes-20"

    def plan(self, tree: Tree, book: Book) -> Description:
        table = tree.one("**/metadata.csv", what="metadata.csv of PAD-UFES-20")
        images: dict[str, list[str]] = defaultdict(list)
        for path in tree.match("**/*"):
            if path.lower().endswith(ENDINGS):
                images[PurePosixPath(path).stem.lower()].append(path)
        skip_archives(tree, book, bool(images))
        pictures, seen = [], set()
        for row in read_rows(tree, book, table, required=["patient_id", "lesion_id", "diagnostic", "img_id"]):
            stem = PurePosixPath(row["img_id"]).stem.lower()
            files = images.pop(stem, [])
            diagnosis = row["diagnostic"].upper()
            diagnosis = _MERGED.get(diagnosis, diagnosis)
            if stem in seen:
                book.fail(row.ref, "same-image-twice", "another row names the same image")
            elif not files:
                book.fail(row.ref, "missing-image", "the table names a picture that is not there")
            elif diagnosis not in CLASSES:
                book.fail([row.ref, *files], "unknown-class", f"the diagnosis is none of {', '.join(CLASSES)} and BOD")
            elif not row["patient_id"]:
                book.fail([row.ref, *files], "no-patient", "the row names no patient")
            else:
                book.skip(files[1:], "duplicate", "a picture of this name is there already")
                meta = {column: row.get(column) for column in _META} | {"lesion": row["lesion_id"]}
                target = CLASSES.index(diagnosis)
                name = PurePosixPath(files[0]).stem
                pictures.append(Picture(files[0], target, name, row["patient_id"], refs=(row.ref,), meta=meta))
            seen.add(stem)
        if not pictures and not seen:
            raise UsageError("metadata.csv has no rows; check the download.")
        book.skip([path for files in images.values() for path in files], "not-listed", "no row names the picture")
        self.add(tree, book, pictures)
        return Description(
            "PadUfes20",
            "classification",
            ("skin",),
            {name: number for number, name in enumerate(CLASSES)},
            file_ending=".png",
            license="CC BY 4.0",
            reference="Pacheco et al., PAD-UFES-20, Data in Brief 32, 2020; Mendeley Data zr7vgbcyr2",
        )


SOURCE = PadUfes20
