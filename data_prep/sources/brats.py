"""BraTS 2021, BraTS 2023 and BraTS 2024 GLI: four MR channels and a tumor map per visit."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Literal

import typer

from data_prep.book import Book
from data_prep.engine.files import sha256
from data_prep.errors import CaseError, UsageError
from data_prep.model import Case, Description, Form, Make, Source
from data_prep.nifti import open_nifti
from data_prep.operations.volumes import to_integers
from data_prep.options import FormOption
from data_prep.tree import Tree

CHANNELS = ("t1n", "t1c", "t2w", "t2f")
_OLD_NAMES = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}
_SEG = "seg"
#: BraTS2021_00000_flair.nii.gz
_FILE_2021 = re.compile(r"(?P<id>BraTS2021_(?P<patient>\d{5}))_(?P<kind>t1|t1ce|t2|flair|seg)\.nii(?:\.gz)?")
#: BraTS-GLI-00000-000-t2f.nii.gz: challenge, patient, time point, channel
_FILE_2023 = re.compile(
    r"(?P<id>BraTS-(?P<challenge>[A-Z]{3})-(?P<patient>\d{5})-(?P<time>\d{3}))-(?P<kind>t1n|t1c|t2w|t2f|seg)\.nii(?:\.gz)?"
)
_YEAR_IN_FOLDER = re.compile(r"brats[-_ ]?(?:gli[-_ ]?)?(20\d\d)(?!\d)", re.IGNORECASE)
#: time points of the post-treatment edition are numbered from here
_FIRST_TIME_2024 = 100
_CORE_REGIONS = {"whole tumor": (1, 2, 3), "tumor core": (1, 3), "enhancing tumor": (3,)}


@dataclass(frozen=True)
class Edition:
    """What differs between the editions.

    Args:
        values: label values of the files.
        replace: to consecutive values.
        classes: names of the values after `replace`.
        regions: the challenge's regions in these values.
        regions_class_order: value that each region paints, the last one on top.
        license: of the data.
        foreign: a value that tells another edition's files, and what it means there.
    """

    values: tuple[int, ...]
    replace: tuple[tuple[int, int], ...]
    classes: Mapping[str, int]
    regions: Mapping[str, tuple[int, ...]]
    regions_class_order: tuple[int, ...]
    license: str
    foreign: Mapping[int, str]


EDITIONS: Mapping[str, Edition] = {
    "2021": Edition(
        (0, 1, 2, 4),
        ((4, 3),),
        {"background": 0, "necrotic tumor core": 1, "edema": 2, "enhancing tumor": 3},
        _CORE_REGIONS,
        (2, 1, 3),
        "CC BY 4.0 (edition of The Cancer Imaging Archive)",
        {3: "enhancing tumor of BraTS 2023 and later; in 2021 that is 4"},
    ),
    "2023": Edition(
        (0, 1, 2, 3),
        (),
        {"background": 0, "necrotic tumor core": 1, "edema": 2, "enhancing tumor": 3},
        _CORE_REGIONS,
        (2, 1, 3),
        "terms of the BraTS 2023 challenge (Synapse)",
        {4: "enhancing tumor of BraTS 2021, or resection cavity of BraTS 2024"},
    ),
    "2024": Edition(
        (0, 1, 2, 3, 4),
        (),
        {
            "background": 0,
            "non-enhancing tumor core": 1,
            "surrounding FLAIR hyperintensity": 2,
            "enhancing tumor": 3,
            "resection cavity": 4,
        },
        {**_CORE_REGIONS, "resection cavity": (4,)},
        (2, 1, 3, 4),
        "terms of the BraTS 2024 challenge (Synapse)",
        {},
    ),
}


@dataclass(frozen=True)
class _Visit:
    """One visit in one folder: its files by channel, and the edition that its name and folder speak for."""

    key: str
    challenge: str
    patient: str
    time_point: int
    edition: str
    folder: str
    files: Mapping[str, tuple[str, ...]]

    @property
    def paths(self) -> list[str]:
        return [path for paths in self.files.values() for path in paths]


@dataclass(frozen=True)
class Brats(Source):
    """BraTS 2021, BraTS 2023 and BraTS 2024 GLI: one folder per visit with four channels and a tumor map."""

    name: ClassVar[str] = "brats"
    identifiers = "public"
    layouts: ClassVar[tuple[str, ...]] = ("nnunet", "monai")

    edition: Annotated[
        Literal["auto", "2021", "2023", "2024"],
        typer.Option(help="Edition; auto tells it by the names and checks it by the label values."),
    ] = "auto"
    labels: Annotated[
        Literal["regions", "classes"],
        typer.Option(help="Whole tumor, tumor core, enhancing tumor as overlapping regions, or the classes as drawn."),
    ] = "regions"
    form: FormOption = "strict"

    def plan(self, tree: Tree, book: Book) -> Description:
        visits = self._visits(tree)
        if not visits:
            raise UsageError(
                "the input holds no file of BraTS 2021 (BraTS2021_00000_flair.nii.gz), 2023 or 2024 "
                "(BraTS-GLI-00000-000-t2f.nii.gz); check that it is the unpacked download."
            )
        edition = self.edition if self.edition != "auto" else _edition_by_name(visits)
        _refuse_several_challenges(visits)
        self._refuse_foreign_labels(tree, visits, edition)
        rules = EDITIONS[edition]
        has_labels = any(_SEG in visit.files for visit in visits)
        for visit in _without_copies(tree, book, visits):
            self._add(visit, rules, has_labels, book)
        regions = self.labels == "regions"
        return Description(
            name=f"BraTS{edition}",
            task="segmentation",
            channels=CHANNELS,
            labels={"background": 0, **rules.regions} if regions else rules.classes,
            regions_class_order=rules.regions_class_order if regions else None,
            license=rules.license,
            reference=f"Brain Tumor Segmentation Challenge {edition}",
            text=f"BraTS {edition}: native and contrast-enhanced T1, T2, FLAIR",
        )

    def _visits(self, tree: Tree) -> list[_Visit]:
        found: dict[tuple[str, str], list[tuple[str, re.Match[str]]]] = defaultdict(list)
        for path in tree.match("**/*.nii", "**/*.nii.gz"):
            name = PurePosixPath(path).name
            match = _FILE_2021.fullmatch(name) or _FILE_2023.fullmatch(name)
            if match:
                found[str(PurePosixPath(path).parent), match["id"]].append((path, match))
        visits = []
        for (folder, key), members in sorted(found.items()):
            files: dict[str, list[str]] = defaultdict(list)
            for path, match in members:
                files[_OLD_NAMES.get(match["kind"], match["kind"])].append(path)
            parts = members[0][1].groupdict()
            challenge, time_point = parts.get("challenge", ""), int(parts.get("time", 0))
            # The year in the folder's name says more than the number of the time point.
            year = _YEAR_IN_FOLDER.findall(f"{_root_name(tree, folder)}/{folder}")
            if not challenge:
                edition = "2021"
            elif year and year[-1] in ("2023", "2024"):
                edition = year[-1]
            else:
                edition = "2024" if time_point >= _FIRST_TIME_2024 else "2023"
            patient = f"BraTS-{challenge}-{parts['patient']}" if challenge else key
            visits.append(
                _Visit(key, challenge, patient, time_point, edition, folder, {k: tuple(v) for k, v in files.items()})
            )
        return visits

    def _refuse_foreign_labels(self, tree: Tree, visits: Sequence[_Visit], edition: str) -> None:
        version = f"brats-labels-1-{self.form}"
        if EDITIONS[edition].foreign:
            maps = [path for visit in visits for path in visit.files.get(_SEG, ())]
            tree.read_facts(maps, version, _label_values, self.form)
        for value, meaning in EDITIONS[edition].foreign.items():
            having = [
                visit.key
                for visit in visits
                for path in visit.files.get(_SEG, ())
                if value in tree.facts(path, version, _label_values, self.form)
            ]
            if having:
                raise UsageError(
                    f"{len(having)} of {len(visits)} visits hold the label {value}, which BraTS {edition} does not "
                    f"have ({meaning}); the first is {having[0]}. Take out the files of the other edition, or name the "
                    "right one with --edition."
                )

    def _add(self, visit: _Visit, rules: Edition, has_labels: bool, book: Book) -> None:
        twice = [kind for kind, paths in visit.files.items() if len(paths) > 1]
        missing = [channel for channel in CHANNELS if channel not in visit.files]
        # A visit without a map is to be predicted where the publisher says so, and an accident elsewhere.
        is_test = _SEG not in visit.files and (not has_labels or re.search("valid|test", visit.folder, re.IGNORECASE))
        if twice:
            book.fail(visit.paths, "two-files", f"{', '.join(sorted(twice))} is there as .nii and as .nii.gz")
        elif missing:
            book.fail(visit.paths, "missing-channel", ", ".join(missing))
        elif _SEG not in visit.files and not is_test:
            book.fail(visit.paths, "missing-label", "the visit has no -seg file")
        else:
            images = tuple(
                Make("operations.volumes:image", visit.files[channel], {"form": self.form}) for channel in CHANNELS
            )
            label_map = None
            if not is_test:
                replace = [list(pair) for pair in rules.replace]
                allowed = sorted({dict(rules.replace).get(value, value) for value in rules.values})
                params = {"form": self.form, "allowed": allowed, "replace": replace}
                label_map = Make("operations.volumes:label_map", visit.files[_SEG], params)
            book.add(
                Case(
                    key=visit.key,
                    group=visit.patient,
                    images=images,
                    label_map=label_map,
                    split="test" if is_test else None,
                    meta={"time_point": visit.time_point} if visit.challenge else {},
                )
            )


def _root_name(tree: Tree, folder: str) -> str:
    number = int(folder.split("/")[0].removeprefix("input")) - 1 if len(tree.roots) > 1 else 0
    return tree.roots[number].name


def _edition_by_name(visits: Sequence[_Visit]) -> str:
    counts = Counter(visit.edition for visit in visits)
    if len(counts) > 1:
        first = {visit.edition: visit.key for visit in reversed(visits)}
        listed = ", ".join(f"{number} of BraTS {year} (first {first[year]})" for year, number in sorted(counts.items()))
        raise UsageError(
            f"the input mixes editions by their names: {listed}. Their labels differ; convert each edition by itself."
        )
    return next(iter(counts))


def _refuse_several_challenges(visits: Sequence[_Visit]) -> None:
    counts = Counter(visit.challenge or "2021" for visit in visits)
    if len(counts) > 1:
        raise UsageError(
            f"the input mixes challenges: {', '.join(f'{n} visits of {name}' for name, n in sorted(counts.items()))}; "
            "convert each by itself."
        )


def _without_copies(tree: Tree, book: Book, visits: Sequence[_Visit]) -> list[_Visit]:
    """The visits, each once: equal copies in several folders are skipped, contradicting ones fail."""
    by_key: dict[str, list[_Visit]] = defaultdict(list)
    for visit in visits:
        by_key[visit.key].append(visit)
    kept = []
    for copies in by_key.values():
        if len(copies) > 1:
            contents = [
                {kind: [sha256(tree.absolute(path)) for path in paths] for kind, paths in visit.files.items()}
                for visit in copies
            ]
            if any(content != contents[0] for content in contents[1:]):
                for visit in copies:
                    book.fail(visit.paths, "contradicting-copies", "the visit is in several folders with other content")
                continue
            for visit in copies[1:]:
                book.skip(visit.paths, "duplicate", "the same visit is in another folder")
        kept.append(copies[0])
    return kept


def _label_values(path: Path, form: Form) -> list[int]:
    """Values of a label map; none when it cannot be read, which the case itself will report."""
    import numpy as np

    try:
        return [int(value) for value in np.unique(to_integers(open_nifti(path, form).read()))]
    except CaseError:
        return []


SOURCE = Brats
