"""FeTA: fetal brain MR with tissue labels, the landmarks of its biometry, or lines drawn in Slicer."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import typer

from data_prep.book import Book
from data_prep.errors import CaseError, UsageError
from data_prep.geometry import LPS_TO_RAS
from data_prep.markups import read_lines
from data_prep.model import Case, Description, Make, Ref, Source
from data_prep.nifti import open_nifti
from data_prep.sources.lfc import MEASURES as LINES
from data_prep.sources.lfc import LandmarkOptions, describe_landmarks, landmark_names, make_landmark_case
from data_prep.tables import read_rows
from data_prep.tree import Row, Tree

TISSUES = ("eCSF", "GM", "WM", "ventricles", "cerebellum", "deep GM", "brainstem")
MEASURES = ("LCC", "HV", "bBIP", "sBIP", "TCD")
#: the publisher's own page gives two; the file is compared with biometry.tsv
_NUMBERINGS = (MEASURES, ("HV", "LCC", "bBIP", "sBIP", "TCD"))
#: end points are rounded to voxels, which the publisher puts at up to 0.45 mm
_LENGTH_TOLERANCE_MM = 1.0
#: world axis (RAS+ of the re-aligned space) along which the first end of a measure lies further
_FIRST_END = {"LCC": 1, "HV": 2, "bBIP": 0, "sBIP": 0, "TCD": 0}
_SUBJECT = re.compile(r"(?:^|/)(sub-[A-Za-z0-9]+)/")
_IDS = {"sub": "participant_id", "subject": "participant_id", "Subject": "participant_id"}
_MAX_TRANSFORM_BYTES = 1 << 16
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Feta(LandmarkOptions, Source):
    """FeTA (BIDS): sub-XXX/anat/*_T2w.nii.gz with the biometry's landmarks, Slicer lines, or tissue labels."""

    name: ClassVar[str] = "feta"
    identifiers: ClassVar[Literal["public", "personal"]] = "public"
    layouts: ClassVar[tuple[str, ...]] = ("monai", "nnunet")

    task: Annotated[
        Literal["biometry", "lines", "tissue"],
        typer.Option(
            help="biometry: ends of the publisher's measures; lines: six Slicer lines per subject as for lfc; "
            "tissue: the seven tissue labels."
        ),
    ] = "biometry"
    measures: Annotated[
        str, typer.Option(help="Measures to take, in this order; a subject that lacks one is refused. Default: all.")
    ] = ""

    def plan(self, tree: Tree, book: Book) -> Description:
        measures = self._measures()
        images = _by_subject(book, _published(tree, "**/*_T2w.nii*"), "image")
        if not images:
            raise UsageError("the input holds no sub-XXX/anat/*_T2w.nii.gz; check that it is FeTA.")
        people = self._people(tree, book)
        if self.task == "tissue":
            self._plan_tissue(tree, book, images, people)
            labels = {"background": 0, **{name: value for value, name in enumerate(TISSUES, 1)}}
            return Description("FeTA", "segmentation", ("MR T2",), labels, **_CREDITS)
        if self.task == "lines":
            self._plan_lines(tree, book, images, people, measures)
        else:
            self._plan_biometry(tree, book, images, people, measures)
        return describe_landmarks("FeTA", landmark_names(measures), "MR T2", **_CREDITS)

    def _measures(self) -> tuple[str, ...]:
        known = LINES if self.task == "lines" else MEASURES
        chosen = tuple(name.strip() for name in self.measures.split(",") if name.strip()) or known
        unknown = [name for name in chosen if name not in known]
        if unknown or len(set(chosen)) != len(chosen):
            raise UsageError(f"--measures {self.measures}: choose from {','.join(known)}, each once.")
        return chosen

    def _people(self, tree: Tree, book: Book) -> dict[str, Row]:
        """Rows of participants.tsv, which need not be there."""
        people: dict[str, Row] = {}
        for path in tree.match("participants.tsv", "*/participants.tsv"):
            people |= _rows_by_subject(tree, book, path, ["participant_id"])
        return people

    def _settle_rows(self, book: Book, rows: Mapping[str, Row], images: Mapping[str, Any]) -> None:
        for subject, row in rows.items():
            if subject not in images:
                book.fail(row.ref, "missing-image", "the table names a subject whose image is not there")

    # --- tissue --------------------------------------------------------------------------------------------------

    def _plan_tissue(self, tree: Tree, book: Book, images: dict[str, str], people: dict[str, Row]) -> None:
        labels = _by_subject(book, _published(tree, "**/*_dseg.nii*"), "label")
        self._settle_rows(book, people, images)
        for subject in sorted(images.keys() | labels.keys()):
            row = people.get(subject)
            refs = (row.ref,) if row else ()
            both: list[Ref | str] = [*refs, *(found[subject] for found in (images, labels) if subject in found)]
            if subject not in images:
                book.fail(both, "missing-image", "tissue labels without an image")
                continue
            if subject not in labels:
                book.fail(both, "missing-label", "an image without tissue labels")
                continue
            params = {"form": self.form, "allowed": list(range(len(TISSUES) + 1))}
            book.add(
                Case(
                    subject,
                    subject,
                    (Make("operations.volumes:image", (images[subject],), {"form": self.form}),),
                    Make("operations.volumes:label_map", (labels[subject],), params),
                    refs=refs,
                    meta=_meta(images[subject], row),
                )
            )

    # --- lines ---------------------------------------------------------------------------------------------------

    def _plan_lines(
        self, tree: Tree, book: Book, images: dict[str, str], people: dict[str, Row], measures: Sequence[str]
    ) -> None:
        markups: dict[str, list[str]] = defaultdict(list)
        for path in tree.match("**/*.json"):
            match = _SUBJECT.search(path)
            if match and re.search(r"\d(\.mrk)?\.json$", path):
                markups[match[1]].append(path)
        self._settle_rows(book, people, images)
        for subject in sorted(images.keys() | markups.keys()):
            row = people.get(subject)
            refs = [*(Ref(path) for path in markups.get(subject, [])), *([row.ref] if row else [])]
            inputs: list[Ref | str] = [*refs, *([images[subject]] if subject in images else [])]
            if subject not in images:
                book.fail(inputs, "missing-image", "markups of a subject whose image is not there")
            elif subject not in markups:
                book.skip(inputs, "not-measured", "the subject has no markups")
            else:
                try:
                    lines = read_lines(tree, markups[subject], LINES, self.coordinates)
                except CaseError as error:
                    book.fail(inputs, error.reason, error.detail)
                    continue
                points = [point for measure in measures for point in lines[measure]]
                self._add(book, subject, images[subject], points, refs, row)

    # --- biometry ------------------------------------------------------------------------------------------------

    def _plan_biometry(
        self, tree: Tree, book: Book, images: dict[str, str], people: dict[str, Row], measures: Sequence[str]
    ) -> None:
        table = tree.one("**/biometry.tsv", what="biometry.tsv (derivatives/biometry)")
        lengths = _rows_by_subject(tree, book, table, ["participant_id", *MEASURES])
        # The publisher's script rounds the points to voxels of the original space, in another folder.
        found = [path for path in tree.match("**/*_meas.nii*") if "/biometry_mapped/" not in "/" + path]
        masks = _by_subject(book, found, "measurement")
        transforms = _by_subject(book, tree.match("**/*_trf.txt"), "transform")
        self._settle_rows(book, people, images)
        self._settle_rows(book, lengths, images)
        for subject in sorted(images.keys() | masks.keys() | transforms.keys()):
            files = [found[subject] for found in (masks, transforms) if subject in found]
            rows = [found[subject] for found in (people, lengths) if subject in found]
            refs = [*(Ref(path) for path in files), *(row.ref for row in rows)]
            inputs: list[Ref | str] = [*refs, *([images[subject]] if subject in images else [])]
            if subject not in images:
                book.fail(inputs, "missing-image", "measurements of a subject whose image is not there")
                continue
            if not files:
                book.skip(inputs, "not-measured", "the publisher measured no landmarks of the subject")
                continue
            try:
                if len(files) < 2:
                    raise CaseError("missing-file", "a measurement needs *_meas.nii.gz and *_trf.txt")
                if subject not in lengths:
                    raise CaseError(
                        "not-in-table", "biometry.tsv has no row of the subject, which decides the numbering"
                    )
                pairs = read_measurements(tree.absolute(masks[subject]), lengths[subject])
                missing = [measure for measure in measures if measure not in pairs]
                if missing:
                    raise CaseError("missing-landmark", f"not measured: {', '.join(missing)}; see --measures")
                ends = [end for measure in measures for end in pairs[measure]]
                points = to_original_space(tree.absolute(transforms[subject]), ends)
            except CaseError as error:
                book.fail(inputs, error.reason, error.detail)
                continue
            self._add(book, subject, images[subject], points, refs, people.get(subject))

    def _add(self, book: Book, subject: str, image: str, points: list[Point], refs: list[Ref], row: Row | None) -> None:
        meta = _meta(image, row)
        book.add(make_landmark_case(subject, image, points, refs, self.radius, self.form, None, meta))


_CREDITS: dict[str, Any] = {
    "license": "see the publisher's terms",
    "reference": "FeTA challenge; Payette et al., Scientific Data 8:167, 2021; biometry: Zenodo 11192452",
}


def _published(tree: Tree, pattern: str) -> list[str]:
    """Files that are not derived; the publisher's scripts write re-aligned images to ``derivatives``."""
    return [path for path in tree.match(pattern) if "/derivatives/" not in "/" + path]


def _rows_by_subject(tree: Tree, book: Book, path: str, required: Sequence[str]) -> dict[str, Row]:
    """The only row of each subject; of several all fail."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in read_rows(tree, book, path, required=required, delimiter="\t", rename=_IDS):
        rows[row["participant_id"]].append(row)
    for subject in [subject for subject, members in rows.items() if len(members) > 1]:
        book.fail([row.ref for row in rows.pop(subject)], "ambiguous-row", "several rows of one subject")
    return {subject: members[0] for subject, members in rows.items()}


def _by_subject(book: Book, paths: Sequence[str], what: str) -> dict[str, str]:
    """The only file of each subject; further ones fail."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        match = _SUBJECT.search(path)
        if match is None:
            book.skip(path, "no-subject", "the file lies in no folder sub-XXX")
        else:
            found[match[1]].append(path)
    for subject in [subject for subject, members in found.items() if len(members) > 1]:
        book.fail(found.pop(subject), f"ambiguous-{what}", "several files of this kind for one subject")
    return {subject: members[0] for subject, members in found.items()}


def _meta(image: str, row: Row | None) -> dict[str, str]:
    method = re.search(r"_rec-([A-Za-z0-9]+)_", PurePosixPath(image).name)
    meta = {"method": method[1] if method else ""}
    if row is not None:
        meta |= {"weeks": row.get("Gestational age"), "pathology": row.get("Pathology")}
    return meta


def read_measurements(path: Path, lengths: Row) -> dict[str, tuple[Point, Point]]:
    """End points of each measure in the re-aligned space, world mm in RAS+, in a fixed order.

    Which number means which measure is decided by the distances, because the publisher's page gives two orders.

    Args:
        path: ``*_meas.nii.gz``, two voxels per measure.
        lengths: row of biometry.tsv.

    Raises:
        CaseError: not two voxels, or no numbering, or more than one, fits the table.
    """
    nifti = open_nifti(path)
    affine = nifti.grid.affine
    assert affine is not None
    data = nifti.read()
    ends: dict[int, tuple[Point, Point]] = {}
    for value in sorted(int(v) for v in np.unique(data) if v):
        places = np.argwhere(data == value)
        if len(places) != 2 or not 1 <= value <= len(MEASURES):
            raise CaseError("damaged-measurement", f"value {value} marks {len(places)} voxels; 1 to 5 mark 2 each")
        world = places @ affine[:3, :3].T + affine[:3, 3]
        ends[value] = (_point(world[0]), _point(world[1]))
    wanted = {name: _number(lengths[name]) for name in MEASURES}
    fitting = []
    for numbering in _NUMBERINGS:
        named = {numbering[value - 1]: pair for value, pair in ends.items()}
        # A measure without a length in the table was not made, so a numbering that finds it is the wrong one.
        differences = [abs(math.dist(*pair) - (wanted[name] or math.inf)) for name, pair in named.items()]
        if differences and max(differences) <= _LENGTH_TOLERANCE_MM:
            fitting.append(named)
    distinct = [one for one, _ in itertools.groupby(fitting)]
    if len(distinct) != 1:
        detail = "no numbering of the measures fits" if not distinct else "more than one numbering fits"
        raise CaseError("ambiguous-numbering", f"{detail} biometry.tsv within {_LENGTH_TOLERANCE_MM:g} mm")
    return {name: _in_order(name, pair) for name, pair in distinct[0].items()}


def _in_order(measure: str, pair: tuple[Point, Point]) -> tuple[Point, Point]:
    axis = _FIRST_END[measure]
    return pair if pair[0][axis] >= pair[1][axis] else (pair[1], pair[0])


def to_original_space(path: Path, points: Sequence[Point]) -> list[Point]:
    """Carry points from the re-aligned space, in which experts measured, to that of the image.

    The publisher resamples an image with this transform, so it maps points of the re-aligned space to the original.

    Args:
        path: ``*_trf.txt``, an ITK transform, in LPS.
        points: mm, RAS+.

    Raises:
        CaseError: not an ITK transform, or not a rigid one.
    """
    transform = _read_transform(path)
    signs = np.diag(LPS_TO_RAS)[:3]
    moved = [_point(np.array(transform.TransformPoint([float(x) for x in signs * p])) * signs) for p in points]
    for (first, to_first), (second, to_second) in itertools.combinations(zip(points, moved, strict=True), 2):
        if abs(math.dist(first, second) - math.dist(to_first, to_second)) > 0.01 * math.dist(first, second) + 0.05:
            raise CaseError("not-rigid", "the transform changes distances by more than 1 %")
    return moved


def _read_transform(path: Path) -> Any:
    """The only transform of an ITK file in text form.

    ITK's own reader ends the process on some damaged files, so the text is read here and handed over as numbers.
    """
    import SimpleITK as sitk

    kinds = {
        "AffineTransform": (sitk.AffineTransform, 12),
        "MatrixOffsetTransformBase": (sitk.AffineTransform, 12),
        "Euler3DTransform": (sitk.Euler3DTransform, 6),
        "VersorRigid3DTransform": (sitk.VersorRigid3DTransform, 6),
    }
    try:
        if path.stat().st_size > _MAX_TRANSFORM_BYTES:
            raise CaseError("damaged-transform", "the file is too large for a transform")
        text = path.read_bytes().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise CaseError("damaged-transform", "the transform cannot be read") from error
    lines = [line.partition(":") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    values = {name.strip(): value.split() for name, _, value in lines}
    if not text.startswith("#Insight Transform File") or len(lines) != len(values) or len(lines) != 3:
        raise CaseError("damaged-transform", "the file does not hold one ITK transform in text form")
    kind = values.get("Transform", [""])[0].split("_")
    if kind[0] not in kinds or kind[1:] not in (["double", "3", "3"], ["float", "3", "3"]):
        raise CaseError("damaged-transform", f"the transform is none of {', '.join(kinds)} of three dimensions")
    make, count = kinds[kind[0]]
    try:
        parameters = [float(value) for value in values["Parameters"]]
        fixed = [float(value) for value in values["FixedParameters"]]
        if not all(map(math.isfinite, parameters + fixed)) or len(parameters) != count or len(fixed) not in (3, 4):
            raise ValueError
        transform = make() if make is not sitk.AffineTransform else sitk.AffineTransform(3)
        transform.SetFixedParameters(fixed if make is sitk.Euler3DTransform else fixed[:3])
        transform.SetParameters(parameters)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CaseError("damaged-transform", "the parameters of the transform cannot be used") from error
    return transform


def _point(values: np.ndarray) -> Point:
    return float(values[0]), float(values[1]), float(values[2])


def _number(text: str) -> float | None:
    """A length, or ``None`` where the table has a blank, ``n/a`` or ``nan``."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


SOURCE = Feta
