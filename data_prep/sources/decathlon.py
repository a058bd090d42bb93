"""Medical Segmentation Decathlon: one unpacked task folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar, Literal

from data_prep.book import Book
from data_prep.errors import DatasetError, UsageError
from data_prep.model import Case, Description, Make, Ref, Source
from data_prep.options import FormOption
from data_prep.preparation import IntensityOptions, prepare
from data_prep.tree import Tree


@dataclass(frozen=True)
class Decathlon(IntensityOptions, Source):
    """Medical Segmentation Decathlon: a TaskNN_Name folder with imagesTr, labelsTr, imagesTs and dataset.json."""

    name: ClassVar[str] = "decathlon"
    identifiers: ClassVar[Literal["public", "personal"]] = "public"
    layouts: ClassVar[tuple[str, ...]] = ("nnunet", "monai")

    form: FormOption = "strict"

    def plan(self, tree: Tree, book: Book) -> Description:
        table = tree.one("dataset.json", "*/dataset.json", what="dataset.json of a decathlon task")
        root = table.removesuffix("dataset.json")
        content = tree.json(table)
        book.use(table)
        try:
            channels = tuple(str(content["modality"][str(i)]) for i in range(len(content["modality"])))
            values = {str(name): int(value) for value, name in content["labels"].items()}
            listed_training = [(str(e["image"]), str(e["label"])) for e in content["training"]]
            listed_test = [str(e["image"] if isinstance(e, dict) else e) for e in content.get("test", [])]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DatasetError(
                "dataset.json is not a decathlon description: needs modality, labels, training."
            ) from error
        if not channels or 0 not in values.values():
            raise UsageError("dataset.json names no modality or no background; it is not a decathlon description.")
        if self.n4 and any(channel.upper() == "CT" for channel in channels):
            raise UsageError("--n4 corrects the coils of MR; this task has CT.")
        steps = self.steps()
        labels = dict(sorted(values.items(), key=lambda item: item[1]))

        def make_case(image: str, label: str | None) -> Case:
            key = PurePosixPath(image).name.removesuffix(".gz").removesuffix(".nii")
            images = tuple(
                prepare(
                    Make(
                        "operations.volumes:image",
                        (image,),
                        {"form": self.form} | ({"channel": i} if len(channels) > 1 else {}),
                    ),
                    steps,
                )
                for i in range(len(channels))
            )
            params = {"form": self.form, "allowed": sorted(values.values())}
            label_map = Make("operations.volumes:label_map", (label,), params) if label else None
            return Case(key, key, images, label_map, split=None if label else "test")

        mentioned: set[str] = set()
        for image, label in listed_training:
            image, label = _inside(root, image), _inside(root, label)
            mentioned |= {image, label}
            present = [path for path in (image, label) if path in tree]
            if len(present) == 2:
                book.add(make_case(image, label))
            elif present:
                lost = "label" if image in tree else "image"
                book.fail(present, f"missing-{lost}", f"dataset.json lists a {lost} that is not in the folder")
            else:
                book.fail(
                    Ref(table, "item", PurePosixPath(image).name),
                    "missing-files",
                    "listed in dataset.json, not in the folder",
                )
        for image in (_inside(root, name) for name in listed_test):
            mentioned.add(image)
            if image in tree:
                book.add(make_case(image, None))
            else:
                book.fail(
                    Ref(table, "item", PurePosixPath(image).name),
                    "missing-files",
                    "listed in dataset.json, not in the folder",
                )
        for path in tree.match(*(f"{root}{folder}/*.nii*" for folder in ("imagesTr", "labelsTr", "imagesTs"))):
            if path not in mentioned:
                book.skip(path, "not-listed", "in the folder, but not in dataset.json")
        return Description(
            name=PurePosixPath(root.rstrip("/") or str(tree.roots[0].name)).name.split("_", 1)[-1],
            task="segmentation",
            channels=channels,
            labels=labels,
            license=str(content.get("licence", content.get("license", ""))),
            reference=str(content.get("reference", "")),
            text=str(content.get("description", "")),
        )


def _inside(root: str, name: str) -> str:
    """A path of dataset.json as a tree path; a file outside the tree cannot be named, the tree does not know it."""
    return root + name.removeprefix("./")


SOURCE = Decathlon
