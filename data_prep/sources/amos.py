"""AMOS22: abdominal CT and MRI with 15 organs."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

import typer

from data_prep.book import Book
from data_prep.errors import DatasetError, UsageError
from data_prep.model import Case, Description, Make, OfficialSplit, Ref, Source
from data_prep.options import FormOption
from data_prep.tables import read_rows
from data_prep.tree import Row, Tree

ORGANS = (
    "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta", "postcava",
    "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus",
)  # fmt: skip
LABELS = {"background": 0, **{organ: number for number, organ in enumerate(ORGANS, 1)}}
#: spelling of the published dataset.json
_MISSPELLED = {"arota": "aorta"}
#: CT up to this number, MRI above (readme of the download: "less than 500"; its test set has CT up to 500)
LAST_CT = 500
_PARTS = ("Tr", "Va", "Ts")
_FILE = re.compile(r"(?P<key>amos_(?P<number>\d{4}))\.nii(?:\.gz)?")
_SCANNER = "Manufacturer's Model Name"


@dataclass(frozen=True)
class Amos(Source):
    """AMOS22: abdominal CT and MRI with 15 organs (imagesTr, labelsTr, imagesVa, labelsVa, imagesTs, dataset.json)."""

    name: ClassVar[str] = "amos"
    identifiers = "public"
    layouts: ClassVar[tuple[str, ...]] = ("nnunet", "monai")

    modality: Annotated[
        Literal["both", "ct", "mr"], typer.Option(help="Which scans: numbers up to 500 are CT, above MRI.")
    ] = "both"
    val: Annotated[
        Literal["separate", "merge"],
        typer.Option(help="The publisher's validation part: keep it as the only split, or put it into the folds."),
    ] = "separate"
    snap_labels: Annotated[
        float,
        typer.Option(
            help="Put label maps on the image's grid when no voxel lies farther away than this, in mm (recorded); "
            "0 refuses them.",
            min=0.0,
            max=1.0,
        ),
    ] = 0.0
    form: FormOption = "strict"

    def plan(self, tree: Tree, book: Book) -> Description:
        root, content = self._root(tree, book)
        scanners = self._scanners(tree, book, root)
        listed = _listed(content)
        found: dict[str, list[tuple[str, str, str | None]]] = defaultdict(list)  # part, image, label map
        for part in _PARTS:
            labels = {path: _key(path) for path in tree.match(f"{root}labels{part}/*.nii*")}
            by_key = {key: path for path, key in labels.items() if key}
            for path in tree.match(f"{root}images{part}/*.nii*"):
                key = _key(path)
                if key is None:
                    book.skip(path, "unrecognized-name", "the name is not amos_ and four digits")
                else:
                    found[key].append((part, path, by_key.get(key)))
                    labels.pop(by_key.get(key, ""), None)
            for path, key in labels.items():
                if key is None:
                    book.skip(path, "unrecognized-name", "the name is not amos_ and four digits")
                elif key in by_key and any(image for where, image, _ in found.get(key, ()) if where == part):
                    book.fail(path, "two-files", "the label map is there as .nii and as .nii.gz")
                else:
                    book.fail(path, "missing-image", f"a label map without an image in images{part}")
        if not found:
            raise UsageError(
                "the input has no imagesTr/amos_0001.nii.gz; check that it is the unpacked AMOS22 download."
            )
        for key, members in found.items():
            if len(members) > 1:
                files = [path for _, image, label in members for path in (image, label) if path]
                book.fail(files, "duplicate-number", "the number occurs twice")
            else:
                self._add(tree, book, root, key, *members[0], scanners.get(key))
        for key, name in listed.items():
            if key not in found:
                book.fail(
                    Ref(f"{root}dataset.json", "item", name), "missing-files", "listed in dataset.json, not there"
                )
        for key, row in scanners.items():
            if key not in book.cases:
                book.skip(row.ref, "no-such-case", "the table describes a scan that is not converted")
        channel = {"ct": "CT", "mr": "MR", "both": "nonCT"}[self.modality]
        return Description(
            name={"ct": "AMOS22-CT", "mr": "AMOS22-MR", "both": "AMOS22"}[self.modality],
            task="segmentation",
            channels=(channel,),
            labels=LABELS,
            license=str(content.get("licence") or content.get("license") or "CC BY-NC-SA 4.0"),
            reference=str(content.get("reference") or "Ji et al., AMOS, NeurIPS 2022"),
            text=str(content.get("description") or "abdominal CT and MRI with 15 organs"),
        )

    def _root(self, tree: Tree, book: Book) -> tuple[str, dict[str, Any]]:
        """Folder of the download, and its dataset.json, checked against the published labels."""
        roots = sorted(
            {str(PurePosixPath(path).parents[1]) for path in tree.match("imagesTr/*.nii*", "*/imagesTr/*.nii*")}
        )
        if len(roots) > 1:
            raise UsageError(
                f"expected one imagesTr in the input, found {len(roots)}; convert each download by itself."
            )
        root = "" if not roots or roots[0] == "." else roots[0] + "/"
        path = f"{root}dataset.json"
        if path not in tree:
            book.note("the download has no dataset.json: files listed there and missing here could not be found out")
            return root, {}
        content = tree.json(path)
        book.use(path)
        try:
            names = {int(value): _MISSPELLED.get(str(name), str(name)) for value, name in content["labels"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DatasetError("dataset.json is not that of AMOS22: `labels` must map numbers to organs.") from error
        if names != {value: organ for organ, value in LABELS.items()}:
            raise DatasetError("dataset.json names other organs than AMOS22; use the command decathlon for other sets.")
        return root, content

    def _scanners(self, tree: Tree, book: Book, root: str) -> dict[str, Row]:
        """Rows of the table of scanners; its birth and acquisition dates are never looked at."""
        rows: dict[str, Row] = {}
        for path in tree.match("labeled_data_meta*.csv", f"{root}labeled_data_meta*.csv"):
            for row in read_rows(tree, book, path, required=["amos_id"]):
                key = f"amos_{int(row['amos_id']):04d}" if row["amos_id"].isdecimal() else row["amos_id"]
                if key in rows or not _FILE.fullmatch(f"{key}.nii"):
                    book.fail(row.ref, "bad-number" if key not in rows else "duplicate-row", "amos_id")
                else:
                    rows[key] = row
        return rows

    def _add(
        self, tree: Tree, book: Book, root: str, key: str, part: str, image: str, label: str | None, row: Row | None
    ) -> None:
        files = [image, *([label] if label else [])]
        modality = "ct" if int(key.removeprefix("amos_")) <= LAST_CT else "mr"
        if self.modality not in ("both", modality):
            book.skip(files, "other-modality", modality)
            return
        # Before the publication of the labels, validation and test scans had none at all.
        if label is None and (part == "Tr" or tree.match(f"{root}labels{part}/*.nii*")):
            book.fail(files, "missing-label", f"no label map in labels{part}")
            return
        split: OfficialSplit | None = None
        if part == "Ts" or label is None:
            split = "test"
        elif self.val == "separate":
            split = "val" if part == "Va" else "train"
        label_map = None
        if label is not None:
            params: dict[str, Any] = {"form": self.form, "allowed": list(LABELS.values())}
            inputs: tuple[str, ...] = (label,)
            if self.snap_labels:
                params["snap_mm"], inputs = self.snap_labels, (label, image)
            label_map = Make("operations.volumes:label_map", inputs, params)
        meta = {"modality": modality, "folder": part}
        if row is not None:
            meta["scanner"] = re.sub(r"[^A-Za-z0-9 ._-]+", "", row.get(_SCANNER))[:40]
        book.add(
            Case(
                key=key,
                group=key,
                images=(Make("operations.volumes:image", (image,), {"form": self.form}),),
                label_map=label_map,
                split=split,
                stratum=modality,
                refs=(row.ref,) if row else (),
                meta=meta,
            )
        )


def _key(path: str) -> str | None:
    match = _FILE.fullmatch(PurePosixPath(path).name)
    return match["key"] if match else None


def _listed(content: dict[str, Any]) -> dict[str, str]:
    """Keys that dataset.json promises, with the names it uses."""
    listed = {}
    try:
        for section in ("training", "validation", "test"):
            for entry in content.get(section, []):
                name = str(entry["image"] if isinstance(entry, dict) else entry)
                key = _key(name)
                if key is not None:
                    listed[key] = PurePosixPath(name).name
    except (KeyError, TypeError) as error:
        raise DatasetError(
            "dataset.json lists training, validation or test in a form that is not understood."
        ) from error
    return listed


SOURCE = Amos
