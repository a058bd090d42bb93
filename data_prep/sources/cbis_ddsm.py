"""CBIS-DDSM: film mammograms in two views with lesions, as NBIA downloads of DICOM or as Kaggle's JPEG edition."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Literal

import numpy as np
import typer
from PIL import Image

from data_prep.book import Book
from data_prep.dicom import headers
from data_prep.dicom.pixels import decode
from data_prep.dicom.projection import breast_box, is_inverted, shrink
from data_prep.errors import CaseError, UsageError
from data_prep.geometry import Grid
from data_prep.model import Case, Description, Make, OfficialSplit, Ref, Source
from data_prep.operations import Job, Outcome, operation
from data_prep.operations.pictures import MAX_PIXELS, open_picture, write_png
from data_prep.options import CropBreast, MaxSide
from data_prep.tables import read_rows
from data_prep.tree import Row, Tree

_TABLE = re.compile(r"(?:.*/)?(?P<kind>mass|calc)_case_description_(?P<part>train|test)_set\.csv")
_COLUMNS = [
    "patient_id", "left or right breast", "image view", "abnormality id", "abnormality type", "pathology",
    "image file path", "cropped image file path", "ROI mask file path",
]  # fmt: skip
_RENAME = {"breast density": "breast_density"}
_PATHOLOGY = {"MALIGNANT": 1, "BENIGN": 0, "BENIGN_WITHOUT_CALLBACK": 0}
_PATIENT = re.compile(r"P_\d{5}")
#: first folder of a table's path: set, patient, side, view, and the lesion's number for crops and masks
_SUBJECT = re.compile(
    r"(?:Mass|Calc)-(?:Training|Test)_(?P<patient>P_\d{5})_(?P<side>LEFT|RIGHT)_(?P<view>CC|MLO)(?:_\d+)?"
)
_UID = re.compile(r"\d+(?:\.\d+){5,}")
_VIEWS = ("CC", "MLO")
#: seed and share of training in the published code of XFMamba
PUBLISHED_SEED, PUBLISHED_SHARE = 42, 0.8
#: a mask may be resized to its mammogram when their aspects differ by no more than this share
_MAX_ASPECT_DIFFERENCE = 0.05
#: a JPEG mask is one when no more than this share of its pixels is neither black nor white
_MAX_GRAY_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class _Lesion:
    """One row of the four tables, with the files its series hold."""

    patient: str
    side: str
    view: str
    kind: str
    part: str
    malignant: int
    image: str
    rois: tuple[str, ...]
    row: Row

    @property
    def inputs(self) -> list[Ref]:
        return [self.row.ref, Ref(self.image)]


@dataclass(frozen=True)
class CbisDdsm(Source):
    """CBIS-DDSM: mammograms as pairs of CC and MLO, benign or malignant, from NBIA (DICOM) or Kaggle (JPEG)."""

    name: ClassVar[str] = "cbis-ddsm"
    identifiers = "public"
    layouts: ClassVar[tuple[str, ...]] = ("monai",)

    views: Annotated[
        Literal["pair", "single"], typer.Option(help="CC and MLO of a breast as one case, or every image by itself.")
    ] = "pair"
    pairing: Annotated[
        Literal["breast", "published"],
        typer.Option(
            help="One case per patient and side; or per patient, side and type of lesion (mass, calcification), as "
            "XFMamba does."
        ),
    ] = "breast"
    label: Annotated[
        Literal["any", "first"],
        typer.Option(help="Malignant when any lesion is; or as the table's first lesion of the case (published)."),
    ] = "any"
    split: Annotated[
        Literal["official", "published"],
        typer.Option(
            help="Official training (folds by patient) and test part; or XFMamba's 80 % of the training cases by case, "
            "in which patients leak."
        ),
    ] = "official"
    overlap: Annotated[
        Literal["drop-train", "keep"],
        typer.Option(help="Patients in training and test part: leave out their training cases, or keep them (leaks)."),
    ] = "drop-train"
    masks: Annotated[
        bool, typer.Option("--masks", help="Write a mask of all lesions per image (0 and 255) beside the images.")
    ] = False
    crop_breast: CropBreast = False
    max_side: MaxSide = 0
    square: Annotated[
        bool, typer.Option("--square", help="Pad with background to a square, so that later resizing keeps the aspect.")
    ] = False

    def plan(self, tree: Tree, book: Book) -> Description:
        if self.split == "published" and (self.pairing, self.views) != ("published", "pair"):
            raise UsageError("--split published divides the published pairs; add --pairing published (and no --views).")
        if self.views == "single" and self.pairing == "published":
            raise UsageError("--pairing published makes pairs; it does not go with --views single.")
        lesions = self._read_lesions(tree, book)
        groups = self._groups(lesions, book)
        parts = self._parts(groups, book)
        if self.masks:
            _read_sizes(tree, [path for lesion in lesions for path in (lesion.image, *lesion.rois)])
        for key, members in groups.items():
            if key in parts:
                self._add(tree, book, key, members, parts[key])
        return Description(
            name="CBIS-DDSM",
            task="classification",
            channels=("cc", "mlo") if self.views == "pair" else ("mammogram",),
            labels={"benign": 0, "malignant": 1},
            file_ending=".png",
            license="CC BY 3.0",
            reference="Lee et al., CBIS-DDSM, Scientific Data 4:170177, 2017, doi:10.7937/K9/TCIA.2016.7O02S9CY",
            text="film mammograms; label 1: a lesion of the case is malignant",
        )

    # --- reading ---------------------------------------------------------------------------------------------------

    def _read_lesions(self, tree: Tree, book: Book) -> list[_Lesion]:
        tables = {path: match for path in tree.match("**/*.csv") if (match := _TABLE.fullmatch(path))}
        if not tables:
            raise UsageError(
                "the input has none of the tables mass_case_description_train_set.csv, ..._test_set.csv, "
                "calc_case_description_train_set.csv, ..._test_set.csv; they are separate downloads, give their folder "
                "as a further input."
            )
        names = [PurePosixPath(path).name for path in tables]
        if len(set(names)) < len(names):
            raise UsageError("a table of cases is in the input more than once; leave one copy of each.")
        absent = {f"{kind}_case_description_{part}_set.csv" for kind in ("mass", "calc") for part in ("train", "test")}
        if absent := absent - set(names):
            book.note(
                f"not in the input: {', '.join(sorted(absent))}; patients are compared over the other tables only"
            )
        series = _Series(tree, book)
        if not series.folders:
            raise UsageError("the input has no mammogram (.dcm of an NBIA download or jpeg/SERIES/*.jpg of Kaggle's).")
        lesions = []
        # Calcifications before masses, training before test: the order of the published code.
        for path, match in sorted(
            tables.items(), key=lambda item: (item[1]["kind"], item[1]["part"] == "test", item[0])
        ):
            for row in read_rows(tree, book, path, required=_COLUMNS, rename=_RENAME):
                lesion = self._lesion(row, match["kind"], match["part"], series, book)
                if lesion is not None:
                    lesions.append(lesion)
        series.settle(lesions)
        return lesions

    def _lesion(self, row: Row, kind: str, part: str, series: _Series, book: Book) -> _Lesion | None:
        patient, side, view = row["patient_id"], row["left or right breast"].upper(), row["image view"].upper()
        pathology = row["pathology"].upper()
        subject = _SUBJECT.fullmatch(row["image file path"].replace("\\", "/").split("/")[0])
        images = series.files(row["image file path"])
        if not _PATIENT.fullmatch(patient) or side not in ("LEFT", "RIGHT") or view not in _VIEWS:
            book.fail(row.ref, "bad-row", "patient, side or view is not P_ and five digits, LEFT or RIGHT, CC or MLO")
        elif pathology not in _PATHOLOGY:
            book.fail(row.ref, "unknown-label", "pathology must be MALIGNANT, BENIGN or BENIGN_WITHOUT_CALLBACK")
        elif subject and (subject["patient"], subject["side"], subject["view"]) != (patient, side, view):
            book.fail(row.ref, "contradicting-path", "the path names another patient, side or view than the row")
        elif not images:
            book.fail(row.ref, "missing-image", "the series of the full image is not in the input")
        else:
            image = max(images, key=lambda path: (series.num_pixels(path), path)) if len(images) > 1 else images[0]
            rois = {*series.files(row["cropped image file path"]), *series.files(row["ROI mask file path"])} - {image}
            return _Lesion(patient, side, view, kind, part, _PATHOLOGY[pathology], image, tuple(sorted(rois)), row)
        return None

    # --- cases -----------------------------------------------------------------------------------------------------

    def _groups(self, lesions: Sequence[_Lesion], book: Book) -> dict[str, list[_Lesion]]:
        """Lesions of each case; those of incomplete pairs get their verdict."""
        groups: dict[str, list[_Lesion]] = defaultdict(list)
        for lesion in lesions:
            key = f"{lesion.patient}_{lesion.side}"
            if self.views == "single":
                key += f"_{lesion.view}"
            elif self.pairing == "published":
                key += f"_{lesion.kind}"
            groups[key].append(lesion)
        for key, members in list(groups.items()):
            if self.views == "pair" and {lesion.view for lesion in members} != set(_VIEWS):
                inputs = [ref for lesion in members for ref in lesion.inputs]
                book.skip(inputs, "missing-view", "the case has no CC or no MLO")
                book.skip(
                    [roi for lesion in members for roi in lesion.rois], "missing-view", "of a case without a pair"
                )
                del groups[key]
        return dict(groups)

    def _parts(self, groups: Mapping[str, Sequence[_Lesion]], book: Book) -> dict[str, OfficialSplit]:
        # A breast with lesions in both parts is one case, and that one must not be trained on.
        is_test = {key: any(lesion.part == "test" for lesion in members) for key, members in groups.items()}
        if both := sum(any(lesion.part == "train" for lesion in groups[key]) for key, test in is_test.items() if test):
            book.note(f"{both} cases have lesions in the training and in the test tables; they are test cases")
        parts: dict[str, OfficialSplit] = {key: "test" if test else "train" for key, test in is_test.items()}
        if self.split == "published":
            parts |= _published_validation([key for key in groups if not is_test[key]])
            book.note("--split published is by case: patients are in several parts; use it to repeat figures only")
            return parts
        test_patients = {groups[key][0].patient for key, test in is_test.items() if test}
        overlapping = {
            key for key, members in groups.items() if not is_test[key] and members[0].patient in test_patients
        }
        if overlapping:
            patients = {groups[key][0].patient for key in overlapping}
            book.note(
                f"{len(patients)} patients are in the training and in the test tables; "
                + ("their training cases are left out" if self.overlap == "drop-train" else "kept, so that they leak")
            )
        if self.overlap == "drop-train":
            for key in overlapping:
                del parts[key]
                refs = [ref for lesion in groups[key] for ref in (*lesion.inputs, *map(Ref, lesion.rois))]
                book.skip(refs, "patient-in-test", "a training case of a patient of the test part (--overlap)")
        return parts

    def _add(self, tree: Tree, book: Book, key: str, members: Sequence[_Lesion], part: OfficialSplit) -> None:
        views = _VIEWS if self.views == "pair" else (members[0].view,)
        images = {view: next(lesion.image for lesion in members if lesion.view == view) for view in views}
        params = {"crop_breast": self.crop_breast, "max_side": self.max_side, "square": self.square}
        masks: list[Make] = []
        rois = sorted({roi for lesion in members for roi in lesion.rois})
        if self.masks:
            for view in views:
                found = [_mask_of(tree, lesion) for lesion in members if lesion.view == view]
                if None in found:
                    inputs = [ref for lesion in members for ref in lesion.inputs]
                    book.fail(
                        [*inputs, *map(Ref, rois)], "missing-mask", "a lesion has no file that is surely its mask"
                    )
                    return
                inputs_of_mask = (images[view], *dict.fromkeys(path for path in found if path))
                masks.append(Make("sources.cbis_ddsm:lesion_mask", inputs_of_mask, params))
        taken = {path for make in masks for path in make.inputs}
        unused = [roi for roi in rois if roi not in taken]
        book.skip(unused, "cropped-lesion" if self.masks else "lesion-image", "crops and masks; masks with --masks")
        others = {lesion.image for lesion in members} - set(images.values())
        book.skip(others, "same-view", "the view of this breast is there from the other set of tables")
        malignant = max(lesion.malignant for lesion in members) if self.label == "any" else members[0].malignant
        densities = [int(density) for lesion in members if (density := lesion.row.get("breast_density")).isdecimal()]
        meta: dict[str, str | int | float] = {
            "side": members[0].side.lower(),
            "num_lesions": len({(lesion.kind, lesion.row["abnormality id"]) for lesion in members}),
            "types": "+".join(sorted({lesion.kind for lesion in members})),
        }
        if densities:
            meta["density"] = max(densities)
        book.add(
            Case(
                key=key,
                group=members[0].patient,
                images=tuple(Make("sources.cbis_ddsm:mammogram", (images[view],), params) for view in views),
                views=tuple(view.lower() for view in views) if self.views == "pair" else (),
                masks=tuple(masks),
                target=malignant,
                split=part,
                refs=tuple(lesion.row.ref for lesion in members),
                meta=meta,
                same_grid=False,
            )
        )


class _Series:
    """Files of every series: by the folder metadata.csv names, by a folder called like the series, or by headers."""

    def __init__(self, tree: Tree, book: Book) -> None:
        self._tree, self._book = tree, book
        self.folders: dict[str, list[str]] = defaultdict(list)
        for path in tree.match("**/*.dcm", "**/*.jpg", "**/*.jpeg"):
            self.folders[str(PurePosixPath(path).parent)].append(path)
        self._by_uid: dict[str, str] = {}
        for folder in self.folders:
            name = PurePosixPath(folder).name
            if _UID.fullmatch(name):
                self._by_uid[name] = folder
        for table in tree.match("**/metadata.csv"):
            self._read_metadata(table)
        for table in tree.match("**/dicom_info.csv", "**/meta.csv"):
            book.skip(table, "not-needed", "series are found by their folders")
        self._by_hash: dict[str, str] | None = None

    def _read_metadata(self, table: str) -> None:
        base = PurePosixPath(table).parent
        for row in read_rows(self._tree, self._book, table, required=["Series UID", "File Location"]):
            parts = [part for part in row["File Location"].replace("\\", "/").split("/") if part not in ("", ".")]
            folder = next(
                (name for start in range(len(parts)) if (name := str(base.joinpath(*parts[start:]))) in self.folders),
                None,
            )
            if folder is None:
                self._book.skip(row.ref, "not-downloaded", "the folder of this series is not in the input")
            else:
                self._by_uid.setdefault(row["Series UID"], folder)
                self._book.use(row.ref)

    def files(self, table_path: str) -> list[str]:
        """Files of the series that a table's path names: SUBJECT/STUDY/SERIES/000000.dcm, none of which exist so."""
        parts = table_path.replace("\\", "/").split("/")
        uid = parts[-2].strip() if len(parts) > 1 else ""
        if uid and uid not in self._by_uid:
            folder = self._from_headers().get(headers.hash_uid(uid))
            if folder is not None:
                self._by_uid[uid] = folder
        return self.folders.get(self._by_uid.get(uid, ""), [])

    def _from_headers(self) -> dict[str, str]:
        """Series to folder by the first header of every folder that no name and no table explains."""
        if self._by_hash is None:
            self._by_hash = {}
            unnamed = sorted(set(self.folders) - set(self._by_uid.values()))
            firsts = [self.folders[folder][0] for folder in unnamed if self.folders[folder][0].endswith(".dcm")]
            self._tree.read_facts(firsts, headers.FACTS_VERSION, headers.read_facts)
            for folder in unnamed:
                path = self.folders[folder][0]
                if path.endswith(".dcm"):
                    facts = self._tree.facts(path, headers.FACTS_VERSION, headers.read_facts)
                    if facts.get("series"):
                        self._by_hash.setdefault(facts["series"], folder)
        return self._by_hash

    def num_pixels(self, path: str) -> int:
        rows, columns = _size(self._tree, path)
        return rows * columns

    def settle(self, lesions: Iterable[_Lesion]) -> None:
        """Images that no row refers to."""
        used = {path for lesion in lesions for path in (lesion.image, *lesion.rois)}
        for paths in self.folders.values():
            self._book.skip(
                [path for path in paths if path not in used], "not-listed", "no usable row names its series"
            )


def _published_validation(keys: Sequence[str]) -> dict[str, OfficialSplit]:
    """Published rule: of each type of lesion, cases in the order of the tables, shuffled, the last 20 % validate."""
    generator = random.Random(PUBLISHED_SEED)
    parts: dict[str, OfficialSplit] = {}
    for kind in ("calc", "mass"):
        members = [key for key in keys if key.endswith(f"_{kind}")]
        generator.shuffle(members)
        parts.update(dict.fromkeys(members[int(PUBLISHED_SHARE * len(members)) :], "val"))
    return parts


# --- crop or mask ----------------------------------------------------------------------------------------------------


def _mask_of(tree: Tree, lesion: _Lesion) -> str | None:
    """The mask among a lesion's files, by content: the tables swap crop and mask in many rows.

    A mask has the size of the mammogram and two values, a crop is smaller and has many. Sizes decide where they can,
    pixels where they cannot.
    """
    full = _size(tree, lesion.image)
    same_size = [path for path in lesion.rois if full != (0, 0) and _size(tree, path) == full]
    if len(same_size) == 1:
        return same_size[0]
    binary = [path for path in same_size or lesion.rois if tree.facts(path, "two-values-1", _has_two_values)]
    return binary[0] if len(binary) == 1 else None


def _read_sizes(tree: Tree, paths: Iterable[str]) -> None:
    """Let all workers read what `_size` will ask for."""
    files = sorted(set(paths))
    tree.read_facts([path for path in files if path.endswith(".dcm")], headers.FACTS_VERSION, headers.read_facts)
    tree.read_facts([path for path in files if not path.endswith(".dcm")], "picture-size-1", _picture_size)


def _size(tree: Tree, path: str) -> tuple[int, int]:
    """Rows and columns by the header; zeros when it cannot be read."""
    if path.endswith(".dcm"):
        facts = tree.facts(path, headers.FACTS_VERSION, headers.read_facts)
        return facts.get("rows", 0), facts.get("columns", 0)
    rows, columns = tree.facts(path, "picture-size-1", _picture_size)
    return rows, columns


def _picture_size(path: Path) -> list[int]:
    try:
        with Image.open(path) as image:
            return [image.height, image.width]
    except Exception:  # Pillow's readers raise many classes; the case itself reports the damage
        return [0, 0]


def _has_two_values(path: Path) -> bool:
    try:
        return to_mask(read_mammogram(path)) is not None
    except CaseError:
        return False


# --- operations ------------------------------------------------------------------------------------------------------


def read_mammogram(path: Path) -> np.ndarray:
    """Pixels of a mammogram, crop or mask, dense tissue bright: uint16 of DICOM, uint8 of JPEG.

    DICOM values are put on 16 bits by their number of stored bits, not stretched: 12-bit values times 65535/4095. The
    data set has no windows and no rescaling.

    Raises:
        CaseError: damaged, color, several frames, signed, or too large.
    """
    if path.suffix.lower() != ".dcm":
        return np.asarray(open_picture(path)[0].convert("L"))
    dataset = headers.read_dataset(path, pixels=True)
    if int(dataset.get("Rows") or 0) * int(dataset.get("Columns") or 0) > MAX_PIXELS:
        raise CaseError("too-large", f"more than {MAX_PIXELS} pixels")
    stored = decode(dataset)
    if stored.ndim != 2:
        raise CaseError("not-2d", f"the image has {stored.ndim} dimensions (color or several frames)")
    bits = int(dataset.get("BitsStored") or 16)
    limit = (1 << bits) - 1
    if not 1 <= bits <= 16 or stored.min() < 0 or stored.max() > limit:
        raise CaseError("value-range", f"stored values do not fit into {bits} unsigned bits")
    values = np.rint(stored.astype(np.float64) * (65535 / limit)).astype(np.uint16) if bits < 16 else stored
    return 65535 - values.astype(np.uint16) if is_inverted(dataset) else values.astype(np.uint16)


def to_mask(pixels: np.ndarray) -> np.ndarray | None:
    """The picture as booleans when it has two values, in JPEG (8 bits) nearly so, else ``None``."""
    if pixels.dtype == np.uint8:
        gray = np.count_nonzero((pixels > 64) & (pixels < 192)) / pixels.size
        return pixels >= 128 if gray <= _MAX_GRAY_SHARE and pixels.max() >= 192 else None
    low, high = pixels.min(), pixels.max()
    is_binary = bool(((pixels == low) | (pixels == high)).all()) and high > low
    return pixels > low if is_binary else None


@operation(version=1)
@headers.named_errors
def mammogram(job: Job) -> Outcome:
    """One mammogram as PNG, 16 bits from DICOM and 8 bits from JPEG.

    Params:
        crop_breast: cut to the breast (`data_prep.dicom.projection.breast_box`).
        max_side: shrink so that the longer side has at most this many pixels; 0 does not.
        square: pad with zeros to a square, the image in the middle.
    """
    pixels = read_mammogram(job.inputs[0])
    notes = []
    if job.params["crop_breast"]:
        top, bottom, left, right = breast_box(pixels)
        notes.append(f"cropped to rows {top}-{bottom} and columns {left}-{right}")
        pixels = pixels[top:bottom, left:right]
    small = shrink(pixels, job.params["max_side"])
    is_shrunk = small is not pixels
    if job.params["square"]:
        small = pad_to_square(small)
    write_png(job.output, Image.fromarray(np.ascontiguousarray(small)))
    return Outcome(Grid((small.shape[1], small.shape[0]), None), is_resampled=is_shrunk, notes=tuple(notes))


@operation(version=1)
@headers.named_errors
def lesion_mask(job: Job) -> Outcome:
    """All lesions of a mammogram as one PNG of 0 and 255, cut, shrunk and padded as the mammogram is.

    Inputs are the mammogram and the masks. Params as for `mammogram`.
    """
    image = read_mammogram(job.inputs[0])
    total = np.zeros(image.shape, bool)
    notes = []
    for path in job.inputs[1:]:
        mask = to_mask(read_mammogram(path))
        if mask is None:
            raise CaseError("not-a-mask", "a file that should be a mask has more than two values")
        if mask.shape != image.shape:
            aspect = (mask.shape[0] / mask.shape[1]) / (image.shape[0] / image.shape[1])
            sizes = f"mask of {mask.shape[1]} x {mask.shape[0]}, image of {image.shape[1]} x {image.shape[0]}"
            if abs(aspect - 1) > _MAX_ASPECT_DIFFERENCE:
                raise CaseError("mask-size", sizes)
            notes.append(f"resized: {sizes}")
            resized = Image.fromarray(mask.astype(np.uint8)).resize(image.shape[::-1], Image.Resampling.NEAREST)
            mask = np.asarray(resized) > 0
        total |= mask
    if job.params["crop_breast"]:
        top, bottom, left, right = breast_box(image)
        if total.any() and not total[top:bottom, left:right].any():
            raise CaseError("lesion-outside", "the lesion lies outside of what was taken for the breast")
        total = total[top:bottom, left:right]
    values = total.astype(np.uint8) * np.uint8(255)
    small = shrink(values, job.params["max_side"])
    is_shrunk = small is not values
    # Half of a pixel's area decides; a lesion smaller than a pixel still keeps its brightest one.
    binary = small >= min(128, int(small.max()) or 128)
    if job.params["square"]:
        binary = pad_to_square(binary)
    write_png(job.output, Image.fromarray(binary.astype(np.uint8) * np.uint8(255)))
    return Outcome(
        Grid((binary.shape[1], binary.shape[0]), None), is_resampled=is_shrunk or bool(notes), notes=tuple(notes)
    )


def pad_to_square(pixels: np.ndarray) -> np.ndarray:
    """Zeros on both sides of the shorter axis, one more behind when they are odd."""
    side = max(pixels.shape)
    before = [(side - length) // 2 for length in pixels.shape]
    return np.pad(pixels, [(b, side - length - b) for b, length in zip(before, pixels.shape, strict=True)])


SOURCE = CbisDdsm
