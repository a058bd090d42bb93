"""Kvasir: endoscopic pictures in eight class folders, version 1 (500 each) or 2 (1000 each)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from data_prep.book import Book
from data_prep.errors import UsageError
from data_prep.model import Description
from data_prep.picture_sets import SceneSource, class_pictures, skip_archives
from data_prep.tree import Tree

CLASSES = (
    "dyed-lifted-polyps", "dyed-resection-margins", "esophagitis", "normal-cecum", "normal-pylorus", "normal-z-line",
    "polyps", "ulcerative-colitis",
)  # fmt: skip
_VERSIONS = {500: "version 1", 1000: "version 2"}


@dataclass(frozen=True)
class Kvasir(SceneSource):
    """Kvasir version 1 or 2: kvasir-dataset/CLASS/NAME.jpg, eight classes of endoscopic findings."""

    name: ClassVar[str] = "kvasir"

    def plan(self, tree: Tree, book: Book) -> Description:
        classes = {name: number for number, name in enumerate(CLASSES)}
        pictures = class_pictures(tree, book, classes)
        skip_archives(tree, book, bool(pictures))
        if not pictures:
            raise UsageError("the input holds no folder with a class of Kvasir, such as `polyps`; check the path.")
        # Features of version 2 (NAME.txt lists) are not pictures; they end as unrecognized.
        counts = Counter(one.target for one in pictures)
        sizes = set(counts.values())
        version = _VERSIONS.get(min(sizes)) if len(sizes) == 1 and len(counts) == len(CLASSES) else None
        if version is None:
            book.note(
                f"{len(pictures)} pictures in {len(counts)} of 8 classes, {min(sizes)} to {max(sizes)} each: neither "
                "version 1 (500 each) nor version 2 (1000 each) as published"
            )
        self.add(tree, book, pictures)
        return Description(
            "Kvasir",
            "classification",
            ("endoscopy",),
            classes,
            file_ending=".png",
            license="research and education, see the publisher's terms",
            reference="Pogorelov et al., Kvasir, MMSys 2017",
            text=version or "",
        )


SOURCE = Kvasir
