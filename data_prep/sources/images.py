"""A folder per class with 2D images in it, as torchvision's ImageFolder reads it; official parts are kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar

import typer

from data_prep.book import Book
from data_prep.errors import UsageError
from data_prep.model import Case, Description, Make, OfficialSplit, Source
from data_prep.options import MaxSide
from data_prep.picture_sets import ENDINGS, PARTS, Picture, digest, settle_copies
from data_prep.tree import Tree


@dataclass(frozen=True)
class Images(Source):
    """Folder per class with PNG, JPEG, TIFF or BMP images; train, val and test folders above the classes are kept."""

    name: ClassVar[str] = "images"
    identifiers = "personal"
    layouts: ClassVar[tuple[str, ...]] = ("monai",)

    patient_regex: Annotated[
        str, typer.Option(help="Regular expression whose one group finds the patient in the path below the input.")
    ] = ""
    max_side: MaxSide = 0

    def plan(self, tree: Tree, book: Book) -> Description:
        pattern = self._pattern()
        found: list[tuple[str, str, OfficialSplit | None]] = []
        for path in tree.match("**/*"):
            if not path.lower().endswith(ENDINGS):
                continue
            folders = PurePosixPath(path).parts[:-1]
            if not folders or folders[-1].lower() in PARTS:
                book.skip(path, "no-class", "the image lies in no class folder")
                continue
            part = PARTS.get(folders[-2].lower()) if len(folders) > 1 else None
            found.append((path, folders[-1], part))
        if not found:
            raise UsageError("the input holds no image in a class folder (CLASS/image.png); check the path.")
        classes = {name: number for number, name in enumerate(sorted({name for _, name, _ in found}))}
        pictures = [Picture(path, classes[name], path, split=part) for path, name, part in found]
        for one in settle_copies(tree, book, pictures, keep_copies=False, by_part=True):
            path = one.path
            match = pattern.search(path) if pattern else None
            if pattern and not match:
                book.fail(path, "no-patient", "--patient-regex does not fit the path")
                continue
            params: dict[str, Any] = {"max_side": self.max_side} if self.max_side else {}
            book.add(
                Case(
                    key=path,
                    group=match[1] if match else digest(tree, path),
                    images=(Make("operations.pictures:picture", (path,), params),),
                    target=one.target,
                    split=one.split,
                    same_grid=False,
                )
            )
        return Description("Images", "classification", ("image",), classes, file_ending=".png")

    def _pattern(self) -> re.Pattern[str] | None:
        if not self.patient_regex:
            return None
        try:
            pattern = re.compile(self.patient_regex)
        except re.error as error:
            raise UsageError("--patient-regex is not a regular expression.") from error
        if pattern.groups != 1:
            raise UsageError("--patient-regex must have exactly one group in parentheses.")
        return pattern


SOURCE = Images
