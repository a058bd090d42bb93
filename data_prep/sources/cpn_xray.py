"""CPN X-ray: chest X-rays with COVID-19, pneumonia or neither, in three class folders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from data_prep.book import Book
from data_prep.errors import UsageError
from data_prep.model import Description
from data_prep.picture_sets import SceneSource, class_pictures, skip_archives
from data_prep.tree import Tree

CLASSES = ("COVID", "NORMAL", "PNEUMONIA")
#: names of the folders in the editions that are about
_ALIASES = {"covid19": "covid", "covid-19": "covid", "covid_19": "covid", "viral pneumonia": "pneumonia"}


@dataclass(frozen=True)
class CpnXray(SceneSource):
    """CPN X-ray: COVID, NORMAL and PNEUMONIA folders of chest X-rays; train and test folders above them are kept."""

    name: ClassVar[str] = "cpn-xray"

    def plan(self, tree: Tree, book: Book) -> Description:
        indices = {name.lower(): number for number, name in enumerate(CLASSES)}
        pictures = class_pictures(tree, book, indices, _ALIASES)
        skip_archives(tree, book, bool(pictures))
        missing = [name for number, name in enumerate(CLASSES) if number not in {one.target for one in pictures}]
        if missing:
            raise UsageError(f"the input holds no pictures in a folder {' or '.join(missing)}; check the path.")
        self.add(tree, book, pictures)
        return Description(
            "CPN",
            "classification",
            ("xray",),
            {name: number for number, name in enumerate(CLASSES)},
            file_ending=".png",
            license="CC BY 4.0",
            reference="Mendeley Data dvntn9yhd2",
        )


SOURCE = CpnXray
