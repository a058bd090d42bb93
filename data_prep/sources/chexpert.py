"""CheXpert: chest X-rays with 14 findings, of which some are uncertain."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

import typer

from data_prep.book import Book
from data_prep.errors import UsageError
from data_prep.model import Case, Description, Make, OfficialSplit, Ref, Source
from data_prep.options import MaxSide
from data_prep.splits import partition, torch_permutation
from data_prep.tables import read_rows
from data_prep.tree import Row, Tree

#: in the order of XFMamba's outputs, whose 13 classes are those without the last
FINDINGS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding",
)  # fmt: skip
_FINDINGS_BY_NUMBER = {
    "14": FINDINGS,
    "13": FINDINGS[:-1],
    "5": ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"),
}
#: "mixed": U-Ones where Irvin et al. 2019, table 3, found it better, else U-Zeros
_ONES_IN_MIXED = ("Atelectasis", "Edema")
#: ranges of label smoothing of uncertain findings, Pham et al. 2019, arXiv:1911.06475, section 3.3
_SMOOTH = {"lsr": (0.55, 0.85), "lsr-zeros": (0.0, 0.3)}
_TABLES: Mapping[str, OfficialSplit] = {
    "train.csv": "train", "valid.csv": "val", "val_labels.csv": "val", "test.csv": "test", "test_labels.csv": "test",
}  # fmt: skip
_IMAGE = re.compile(
    r"(?:.*/)?(?P<key>(?P<patient>patient\d+)/(?P<study>study\d+)/(?P<image>view\d+_(?P<view>frontal|lateral)))"
    r"\.(?:jpg|jpeg|png)",
    re.ASCII,
)
#: seed of the published random split of XFMamba, and its shares
PUBLISHED_SEED, _TRAIN_SHARE, _VAL_SHARE = 42, 0.75, 0.125


@dataclass(frozen=True, slots=True)
class _View:
    """One row of a table with its image and its labels."""

    key: str
    patient: str
    study: str
    image: str
    view: str
    part: OfficialSplit
    path: str
    row: Row
    values: tuple[float | None, ...]

    @property
    def inputs(self) -> list[Ref]:
        return [Ref(self.path), self.row.ref]


@dataclass(frozen=True)
class Chexpert(Source):
    """CheXpert: chest X-rays with 14 findings, full size, -small or in batches, as pairs of views or single images."""

    name: ClassVar[str] = "chexpert"
    identifiers = "public"
    layouts: ClassVar[tuple[str, ...]] = ("monai",)

    views: Annotated[
        Literal["pair", "frontal", "lateral", "single"],
        typer.Option(help="First frontal with first lateral image of a study; or one kind, or all, as single images."),
    ] = "pair"
    uncertain: Annotated[
        Literal["zeros", "ones", "ignore", "mixed", "multiclass", "lsr", "lsr-zeros"],
        typer.Option(
            help="Uncertain findings (-1): 0; 1; left out by label_mask; 1 for atelectasis and edema and 0 else; a "
            "class of their own (2); or a random value of 0.55 to 0.85 (lsr) or 0 to 0.3 (lsr-zeros)."
        ),
    ] = "zeros"
    blank: Annotated[
        Literal["zeros", "ignore"], typer.Option(help="Findings not mentioned: 0, or left out by label_mask.")
    ] = "zeros"
    findings: Annotated[
        Literal["14", "13", "5"],
        typer.Option(help="All; all but No Finding; or the five of the CheXpert competition."),
    ] = "14"
    split: Annotated[
        Literal["official", "patient", "published"],
        typer.Option(
            help="Parts: of the publisher; train.csv by patient 75/12.5/12.5; or XFMamba's random split of train.csv "
            "by study, in which patients leak."
        ),
    ] = "official"
    max_side: MaxSide = 0
    keep_jpeg: Annotated[
        bool, typer.Option("--keep-jpeg", help="Take the JPEG files as they are (can be linked) instead of PNG.")
    ] = False

    def plan(self, tree: Tree, book: Book) -> Description:
        if self.keep_jpeg and self.max_side:
            raise UsageError("--keep-jpeg and --max-side contradict each other: a smaller image is written as PNG.")
        if self.split == "published" and self.views != "pair":
            raise UsageError(f"--split published is a split of pairs; --views {self.views} does not go with it.")
        views = self._views(tree, book)
        if self.split != "official":
            for view in (view for view in views if view.part != "train"):
                book.skip(view.inputs, "other-part", f"--split {self.split} divides train.csv alone")
            views = [view for view in views if view.part == "train"]
        cases = self._cases(views, book)
        strata = self._strata(cases)
        parts = self._parts(cases, strata, book)
        for case in cases:
            book.add(self._case(case, parts[case[0].key], strata[case[0].key]))
        return Description(
            name="CheXpert",
            task="multilabel",
            channels=("frontal", "lateral") if self.views == "pair" else ("xray",),
            labels={finding: number for number, finding in enumerate(self._findings)},
            file_ending=".jpg" if self.keep_jpeg else ".png",
            license="CheXpert research use agreement of Stanford University",
            reference="Irvin et al., CheXpert, AAAI 2019, arXiv:1901.07031",
            text=f"chest X-rays; uncertain findings: {self.uncertain}, not mentioned: {self.blank}",
        )

    @property
    def _findings(self) -> tuple[str, ...]:
        return _FINDINGS_BY_NUMBER[self.findings]

    # --- reading ---------------------------------------------------------------------------------------------------

    def _views(self, tree: Tree, book: Book) -> list[_View]:
        """Rows with their images, in the order of the tables; all others get their verdict."""
        images: dict[str, list[str]] = defaultdict(list)
        for path in tree.match("**/*.jpg", "**/*.jpeg", "**/*.png"):
            match = _IMAGE.fullmatch(path)
            if match:
                images[match["key"]].append(path)
        tables = {path: _TABLES[PurePosixPath(path).name] for path in tree.match(*(f"**/{name}" for name in _TABLES))}
        if not tables or not images:
            raise UsageError(
                "the input needs train.csv, valid.csv or test.csv and images (patient00001/study1/view1_frontal.jpg); "
                "check that it is the unpacked download, with all of its batches."
            )
        for part in sorted(set(tables.values())):
            names = sorted(PurePosixPath(path).name for path, of in tables.items() if of == part)
            if len(names) > 1:
                raise UsageError(
                    f"the input has several tables of the part {part} ({', '.join(names)}); "
                    "convert full size and -small one by one."
                )
        views: list[_View] = []
        used: set[str] = set()
        for path, part in sorted(tables.items()):
            for row in read_rows(tree, book, path, required=["Path", *self._findings]):
                view = self._view(row, part, images, book)
                if view is not None and view.path in used:
                    book.skip(row.ref, "duplicate-row", "the image was listed before")
                elif view is not None:
                    used.add(view.path)
                    views.append(view)
        for paths in images.values():
            for image in paths:
                if image not in used and Ref(image) not in book.verdicts:
                    book.skip(image, "not-listed", "in the folder, but in no table that was read")
        return views

    def _view(self, row: Row, part: OfficialSplit, images: Mapping[str, Sequence[str]], book: Book) -> _View | None:
        name = row["Path"].replace("\\", "/")
        match = _IMAGE.fullmatch(name)
        if match is None:
            book.fail(row.ref, "bad-path", "not patientNNNNN/studyN/viewN_frontal.jpg or _lateral.jpg")
            return None
        candidates = images.get(match["key"], ())
        found = [path for path in candidates if f"/{path}".endswith(f"/{name}")] if len(candidates) > 1 else candidates
        if not candidates:
            book.fail(row.ref, "missing-image", "the table lists an image that is not in the input")
            return None
        if len(found) != 1:
            detail = "the image is in several folders, of which the table names none or several"
            book.fail([row.ref, *(Ref(path) for path in candidates)], "ambiguous-image", detail)
            return None
        column = row.get("Frontal/Lateral").lower() or match["view"]
        values = tuple(_number(row[finding]) for finding in self._findings)
        inputs = [row.ref, Ref(found[0])]
        if column != match["view"]:
            book.fail(inputs, "contradicting-view", "the column Frontal/Lateral and the file's name do not agree")
        elif any(value not in (None, 0.0, 1.0, -1.0) for value in values):
            book.fail(inputs, "unknown-label", "a finding must be 1, 0, -1 or blank")
        else:
            return _View(
                match["key"],
                match["patient"],
                match["study"],
                match["image"],
                match["view"],
                part,
                found[0],
                row,
                values,
            )
        return None

    # --- cases -----------------------------------------------------------------------------------------------------

    def _cases(self, views: Sequence[_View], book: Book) -> list[list[_View]]:
        """The views of each case."""
        if self.views != "pair":
            for view in views:
                if self.views not in ("single", view.view):
                    book.skip(view.inputs, "other-view", view.view)
            return [[view] for view in views if self.views in ("single", view.view)]
        studies: dict[tuple[str, str, str], list[_View]] = defaultdict(list)
        for view in views:
            studies[view.part, view.patient, view.study].append(view)
        cases = []
        for members in studies.values():
            inputs = [ref for view in members for ref in view.inputs]
            pair = [next((view for view in members if view.view == kind), None) for kind in ("frontal", "lateral")]
            if None in pair:
                book.skip(inputs, "missing-view", "a study without a frontal or without a lateral image")
            elif len({view.values for view in pair if view}) > 1:
                book.fail(inputs, "contradicting-labels", "the views of one study have different findings")
            else:
                cases.append([view for view in pair if view])
                further = [view for view in members if view not in pair]
                book.skip(
                    [ref for view in further for ref in view.inputs], "further-view", "a pair has the first of each"
                )
        return cases

    def _parts(
        self, cases: Sequence[Sequence[_View]], strata: Mapping[str, str], book: Book
    ) -> dict[str, OfficialSplit]:
        """Part of every case by the key of its first view."""
        if self.split == "official":
            return {views[0].key: views[0].part for views in cases}
        if self.split == "patient":
            members = [(views[0].key, views[0].patient, strata[views[0].key]) for views in cases]
            return partition(members, {"train": 6, "val": 1, "test": 1}, book.seed)
        # XFMamba: studies in the order of patient and study as text, random_split with int(share * count).
        keys = [views[0].key for views in sorted(cases, key=lambda views: (views[0].patient, views[0].study))]
        order = torch_permutation(len(keys), PUBLISHED_SEED)
        num_train, num_val = int(_TRAIN_SHARE * len(keys)), int(_VAL_SHARE * len(keys))
        book.note("--split published is by study: patients are in several parts; use it to repeat figures only")
        return {
            keys[number]: "train" if place < num_train else "val" if place < num_train + num_val else "test"
            for place, number in enumerate(order)
        }

    def _strata(self, cases: Sequence[Sequence[_View]]) -> dict[str, str]:
        """The rarest positive finding of each case; whole label vectors would be thousands of strata."""
        positive = {
            views[0].key: [number for number, value in enumerate(views[0].values) if value == 1.0] for views in cases
        }
        counts = Counter(number for numbers in positive.values() for number in numbers)
        return {
            key: str(min(numbers, key=lambda number: (counts[number], number))) if numbers else ""
            for key, numbers in positive.items()
        }

    def _case(self, views: Sequence[_View], part: OfficialSplit, stratum: str) -> Case:
        first = views[0]
        params: dict[str, Any] = {} if self.keep_jpeg else {"mode": "L"}
        if self.max_side:
            params["max_side"] = self.max_side
        operation = "operations.pictures:as_it_is" if self.keep_jpeg else "operations.pictures:picture"
        is_pair = self.views == "pair"
        return Case(
            key=f"{first.patient}-{first.study}" + ("" if is_pair else f"-{first.image}"),
            group=first.patient,
            images=tuple(Make(operation, (view.path,), params) for view in views),
            views=("frontal", "lateral") if is_pair else (),
            target=self._target(first),
            split=part,
            stratum=stratum,
            refs=tuple(view.row.ref for view in views),
            meta=_meta(first.row) | {"view": "pair" if is_pair else first.view},
            same_grid=False,
        )

    def _target(self, view: _View) -> Any:
        values: list[float] = []
        mask: list[int] = []
        for finding, value in zip(self._findings, view.values, strict=True):
            is_known = True
            if value is None:
                value, is_known = 0.0, self.blank == "zeros"
            elif value == -1.0:
                value, is_known = self._of_uncertain(view, finding), self.uncertain != "ignore"
            values.append(int(value) if value == int(value) else value)
            mask.append(int(is_known))
        if "ignore" in (self.uncertain, self.blank):
            return {"values": values, "mask": mask}
        return values

    def _of_uncertain(self, view: _View, finding: str) -> float:
        if self.uncertain in _SMOOTH:
            low, high = _SMOOTH[self.uncertain]
            # A value of the study and finding alone: the same in every run and for every number of workers.
            digest = hashlib.sha256(f"{view.patient}/{view.study}/{finding}".encode()).digest()
            return round(low + (high - low) * int.from_bytes(digest[:8], "big") / 2**64, 4)
        if self.uncertain == "mixed":
            return float(finding in _ONES_IN_MIXED)
        return {"ones": 1.0, "multiclass": 2.0}.get(self.uncertain, 0.0)


def _number(text: str) -> float | None:
    """The cell as a number, ``None`` when it is blank, NaN when it is no number."""
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _meta(row: Row) -> dict[str, str | int | float]:
    """White-listed columns."""
    meta: dict[str, str | int | float] = {}
    if row.get("Sex") in ("Male", "Female"):
        meta["sex"] = row["Sex"]
    if row.get("Age").isdecimal() and len(row["Age"]) <= 3:
        meta["age"] = int(row["Age"])
    if row.get("AP/PA") in ("AP", "PA", "LL", "RL"):
        meta["projection"] = row["AP/PA"]
    return meta


SOURCE = Chexpert
