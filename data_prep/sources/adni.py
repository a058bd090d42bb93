"""ADNI: T1 images of the LONI archive with diagnoses from ADNIMERGE or DXSUM."""

from __future__ import annotations

import datetime
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, ClassVar, Literal

import typer

from data_prep.book import Book
from data_prep.errors import CaseError, UsageError
from data_prep.model import Case, Description, Make, OfficialSplit, Ref, Source
from data_prep.options import Converter, FormOption, Uneven
from data_prep.preparation import VolumeOptions, prepare
from data_prep.sources.dicom import Dicom
from data_prep.tables import read_rows
from data_prep.tree import Row, Tree

COLLECTION_COLUMNS = ("Image Data ID", "Subject", "Visit", "Modality", "Description", "Type", "Acq Date")
_DATED = r"(_\d{1,2}[A-Za-z]{3}\d{4})?\.csv"
_TABLES = {
    "adnimerge": re.compile(f"ADNIMERGE{_DATED}", re.IGNORECASE),
    "dxsum": re.compile(f"DXSUM(_PDXCONV_ADNIALL)?{_DATED}", re.IGNORECASE),
}
_PTID = re.compile(r"(?<!\d)(\d{3})_S_(\d{4,5})(?!\d)")
_IMAGE = re.compile(r"_I(\d{1,12})\.(dcm|ima|nii|nii\.gz|xml)$", re.IGNORECASE)
_FOLDER = re.compile(r"/I(\d{1,12})/[^/]+$")
_GROUPS = {
    "cn": "CN", "nl": "CN", "nc": "CN", "smc": "CN", "mci": "MCI", "emci": "MCI", "lmci": "MCI", "ad": "AD",
    "dementia": "AD",
}  # fmt: skip
# DXCHANGE of ADNI-GO/2 codes the change since the last visit; the state after it counts.
_DXCHANGE = {1: "CN", 7: "CN", 9: "CN", 2: "MCI", 4: "MCI", 8: "MCI", 3: "AD", 5: "AD", 6: "AD"}
_DIAGNOSIS = {1: "CN", 2: "MCI", 3: "AD"}
_PHASES = {"adni1": "ADNI1", "adnigo": "ADNIGO", "adni2": "ADNI2", "adni3": "ADNI3", "adni4": "ADNI4"}
CLASSES = {
    "nc-ad": ("NC", "AD"),
    "smci-pmci": ("sMCI", "pMCI"),
    "all": ("NC", "sMCI", "pMCI", "AD"),
}
_DAYS_PER_MONTH = 30.4375


@dataclass(frozen=True)
class Exam:
    """A visit with a diagnosis.

    Args:
        month: since baseline.
        group: CN, MCI or AD.
    """

    month: int
    group: str


@dataclass
class Subject:
    """What the diagnosis table says of one person, known here by the last part of the PTID (RID)."""

    rows: list[Ref] = field(default_factory=list)
    exams: list[Exam] = field(default_factory=list)
    baseline_groups: set[str] = field(default_factory=set)
    is_smc: bool = False
    baseline_date: datetime.date | None = None
    phase: str = ""


@dataclass(frozen=True)
class _Scan:
    """A row of the collection that may become a case."""

    image_id: int
    row: Row
    subject: int
    label: str
    month: int
    phase: str
    date: datetime.date

    @property
    def order(self) -> tuple[datetime.date, int]:
        return self.date, self.image_id


@dataclass(frozen=True)
class Adni(VolumeOptions, Source):
    """ADNI T1 MRI: image folders, the collection's CSV and ADNIMERGE or DXSUM, given together as inputs."""

    name: ClassVar[str] = "adni"
    identifiers: ClassVar[Literal["public", "personal"]] = "personal"
    layouts: ClassVar[tuple[str, ...]] = ("monai",)

    task: Annotated[
        Literal["nc-ad", "smci-pmci", "all"], typer.Option(help="Classes: NC and AD; sMCI and pMCI; or all four.")
    ] = "nc-ad"
    window_months: Annotated[
        int, typer.Option(help="pMCI: dementia within so many months; sMCI: followed as long without it.", min=6)
    ] = 36
    smc_as_nc: Annotated[
        bool, typer.Option("--smc-as-nc", help="Subjective memory concern counts as NC; else it is left out.")
    ] = False
    late_conversion: Annotated[
        Literal["drop", "smci", "pmci"], typer.Option(help="MCI with dementia after the window only.")
    ] = "drop"
    reversion: Annotated[
        Literal["drop", "keep"], typer.Option(help="MCI with a later diagnosis of CN: leave out, or judge by the rest.")
    ] = "drop"
    dx: Annotated[
        Literal["auto", "adnimerge", "dxsum"], typer.Option(help="Table of diagnoses; auto: ADNIMERGE if it is there.")
    ] = "auto"
    visits: Annotated[
        Literal["baseline", "all"],
        typer.Option(help="all: also later scans, as long as the diagnosis at that visit is that of the baseline."),
    ] = "baseline"
    series_regex: Annotated[str, typer.Option(help="Description of the series, case ignored.")] = (
        "MP-?RAGE|SPGR|IR-FSPGR"
    )
    type: Annotated[
        Literal["original", "processed", "any"],
        typer.Option(help="Column Type of the collection; processed: both kinds."),
    ] = "original"
    one_per_visit: Annotated[
        Literal["first", "last", "largest", "all"], typer.Option(help="Which of several scans of one visit.")
    ] = "first"
    split: Annotated[
        Literal["folds", "published"],
        typer.Option(help="published: subjects of ADNI-1 train, those new in ADNI-2 are the test; others left out."),
    ] = "folds"
    form: FormOption = "strict"
    uneven: Uneven = "error"
    converter: Converter = "dcm2niix"

    def plan(self, tree: Tree, book: Book) -> Description:
        steps = self.steps()
        try:
            series = re.compile(self.series_regex, re.IGNORECASE)
        except re.error as error:
            raise UsageError("--series-regex is not a regular expression.") from error
        collections, diagnoses, kind = self._find_tables(tree, book)
        subjects = (read_adnimerge if kind == "adnimerge" else read_dxsum)(tree, book, diagnoses)
        rows = _read_collections(tree, book, collections)
        files, masks = self._find_files(tree, book)
        for row in rows.values():
            subject = subjects.get(_rid(row["Subject"]) or -1)
            if subject and row.get("Group").upper() == "SMC":
                subject.is_smc = True
        verdicts = {rid: self.classify(subject) for rid, subject in subjects.items()}
        visits: dict[tuple[int, int], list[_Scan]] = defaultdict(list)
        for image_id, row in sorted(rows.items()):
            paths = files.get(image_id, [])
            found = self._judge(image_id, row, paths, series, subjects, verdicts)
            if isinstance(found, _Scan):
                visits[found.subject, found.month].append(found)
            else:
                is_failure, reason, detail = found
                (book.fail if is_failure else book.skip)([row.ref, *paths, *masks.get(image_id, [])], reason, detail)
        for image_id in sorted((files.keys() | masks.keys()) - rows.keys()):
            book.skip(
                [*files.get(image_id, []), *masks.get(image_id, [])], "not-in-collection", "no row names the image"
            )
        kept = set()
        for _, scans in sorted(visits.items()):
            if self._add_visit(tree, book, scans, files, masks, steps):
                kept.add(scans[0].subject)
        self._settle_subjects(book, subjects, verdicts, kept, {_rid(row["Subject"]) for row in rows.values()})
        classes = CLASSES[self.task]
        return Description(
            "ADNI",
            "classification",
            ("T1",),
            {name: number for number, name in enumerate(classes)},
            license="ADNI data use agreement; not to be passed on",
            reference="adni.loni.usc.edu",
            text=f"ADNI T1, {self.task}, window {self.window_months} months",
        )

    # --- tables --------------------------------------------------------------------------------------------------

    def _find_tables(self, tree: Tree, book: Book) -> tuple[list[str], str, str]:
        """Collections, the one table of diagnoses and its kind; every other CSV file is skipped."""
        collections: list[str] = []
        found: dict[str, list[str]] = {"adnimerge": [], "dxsum": []}
        for path in tree.match("**/*.csv"):
            kinds = [kind for kind, pattern in _TABLES.items() if pattern.fullmatch(PurePosixPath(path).name)]
            if kinds:
                found[kinds[0]].append(path)
            elif "Image Data ID" in tree.first_cells(path):
                collections.append(path)
            else:
                book.skip(path, "other-table", "neither a collection nor ADNIMERGE nor DXSUM")
        if not collections:
            raise UsageError(
                "the input holds no collection CSV (column `Image Data ID`), which the archive offers beside each "
                "download; give it as a further input."
            )
        kind = self.dx if self.dx != "auto" else "adnimerge" if found["adnimerge"] else "dxsum"
        if len(found[kind]) != 1:
            names = ", ".join(PurePosixPath(path).name for path in found[kind])
            raise UsageError(
                f"expected exactly one table of diagnoses ({'ADNIMERGE' if kind == 'adnimerge' else 'DXSUM'}*.csv) in "
                f"the input, found {len(found[kind])}{': ' + names if names else ''}; "
                + ("give only the newest." if names else "give ADNIMERGE or DXSUM as a further input.")
            )
        for other in {"adnimerge", "dxsum"} - {kind}:
            book.skip(found[other], "not-needed", f"diagnoses are taken from the other table; see --dx {other}")
        return collections, found[kind][0], kind

    def _find_files(self, tree: Tree, book: Book) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """Image files and brain masks by image id."""
        files: dict[int, list[str]] = defaultdict(list)
        masks: dict[int, list[str]] = defaultdict(list)
        mask = re.compile(rf"_I(\d{{1,12}}){re.escape(self.mask_suffix)}\.nii(\.gz)?$", re.IGNORECASE)
        for path in tree.match("**/*"):
            name = PurePosixPath(path).name
            if self.mask_suffix and (match := mask.search(name)):
                masks[int(match[1])].append(path)
            elif match := _IMAGE.search(name):
                if match[2].lower() == "xml":
                    book.skip(path, "xml", "the tables hold what is needed")
                else:
                    files[int(match[1])].append(path)
            elif name.lower().endswith((".dcm", ".ima")) and (match := _FOLDER.search("/" + path)):
                files[int(match[1])].append(path)
        return files, masks

    # --- labels --------------------------------------------------------------------------------------------------

    def classify(self, subject: Subject) -> tuple[str, str, str]:
        """The class of a subject, or why there is none.

        Returns:
            ``(class, "", "")`` or ``("", reason, detail)``.
        """
        groups = subject.baseline_groups
        if not groups:
            return "", "no-baseline-diagnosis", "the table has no diagnosis at baseline"
        if len(groups) > 1:
            return "", "contradicting-baseline", f"baseline is both {' and '.join(sorted(groups))}"
        group = next(iter(groups))
        if group == "CN":
            if subject.is_smc and not self.smc_as_nc:
                return "", "subjective-memory-concern", "counts as NC with --smc-as-nc"
            return "NC", "", ""
        if group == "AD":
            return "AD", "", ""
        window = self.window_months
        later = sorted((exam for exam in subject.exams if exam.month > 0), key=lambda exam: exam.month)
        first_dementia = next((exam.month for exam in later if exam.group == "AD"), None)
        if any(exam.group == "CN" for exam in later) and self.reversion == "drop":
            return "", "reversion", "MCI went back to CN; kept with --reversion keep"
        if first_dementia is not None and first_dementia <= window:
            return "pMCI", "", ""
        if first_dementia is not None:
            if self.late_conversion == "drop":
                return "", "late-conversion", f"dementia after {window} months only; see --late-conversion"
            return {"smci": "sMCI", "pmci": "pMCI"}[self.late_conversion], "", ""
        followed = later[-1].month if later else 0
        if followed < window:
            return "", "short-follow-up", f"MCI, followed for {followed} of {window} months"
        return "sMCI", "", ""

    def _judge(
        self,
        image_id: int,
        row: Row,
        paths: Sequence[str],
        series: re.Pattern[str],
        subjects: dict[int, Subject],
        verdicts: dict[int, tuple[str, str, str]],
    ) -> _Scan | tuple[bool, str, str]:
        """A scan that is wanted, or (is it a failure, reason, detail)."""
        rid = _rid(row["Subject"])
        if rid is None:
            return True, "bad-subject", "the subject is not of the form NNN_S_NNNN"
        if row["Modality"].upper() not in ("MRI", "MR"):
            return False, "other-modality", "only MRI is converted"
        is_original = row["Type"].lower() == "original"
        if self.type != "any" and is_original != (self.type == "original"):
            return False, "other-type", f"--type {self.type}"
        if not series.search(row["Description"]):
            return False, "other-series", "--series-regex does not fit the description"
        if rid not in subjects:
            return False, "no-diagnosis", "the table of diagnoses does not know the subject"
        subject, (label, reason, detail) = subjects[rid], verdicts[rid]
        if not label:
            return False, reason, detail
        if label not in CLASSES[self.task]:
            return False, "other-class", f"{label} is no class of --task {self.task}"
        if self.split == "published" and subject.phase not in ("ADNI1", "ADNI2"):
            return False, "other-phase", "--split published takes subjects of ADNI-1 and ADNI-2"
        date = _date(row["Acq Date"])
        if date is None:
            return True, "bad-date", "Acq Date is not a date"
        month = visit_month(row["Visit"])
        if month is None and subject.baseline_date is not None:
            month = _month_of(date, subject.baseline_date)
        if month is None:
            return True, "unknown-visit", "neither Visit nor the dates say which visit it is"
        if month > 0 and self.visits == "baseline":
            return False, "other-visit", "not of the baseline; see --visits all"
        if month > 0:
            groups = {exam.group for exam in subject.exams if exam.month == month}
            if groups != subject.baseline_groups:
                detail = "no diagnosis" if not groups else "another diagnosis than at baseline"
                return False, "diagnosis-changed" if groups else "no-diagnosis-at-visit", detail
        if not paths:
            if row.get("Downloaded").lower() in ("", "no"):
                return False, "not-downloaded", "no file of the image in the input"
            return True, "missing-image", "no file of the image in the input"
        if any(_rid(match[0]) != rid for path in paths for match in _PTID.finditer(path)):
            return True, "contradicting-subject", "the path of the image names another subject than its row"
        return _Scan(image_id, row, rid, label, month, subject.phase, date)

    # --- images --------------------------------------------------------------------------------------------------

    def _add_visit(
        self,
        tree: Tree,
        book: Book,
        scans: Sequence[_Scan],
        files: dict[int, list[str]],
        masks: dict[int, list[str]],
        steps: list[dict[str, object]],
    ) -> bool:
        """Plan the scan that is wanted of one visit, or all; when it cannot be planned, the next one."""
        ordered = sorted(scans, key=lambda scan: scan.order, reverse=self.one_per_visit == "last")
        if self.one_per_visit == "largest":
            ordered.sort(key=lambda scan: -sum(tree.stamp(path).size for path in files[scan.image_id]))
        is_done = False
        for scan in ordered:
            paths, own_masks = files[scan.image_id], masks.get(scan.image_id, [])
            inputs: list[Ref | str] = [scan.row.ref, *paths, *own_masks]
            if is_done and self.one_per_visit != "all":
                book.skip(inputs, "other-scan-taken", f"--one-per-visit {self.one_per_visit}")
                continue
            try:
                make, refs = self._plan_image(tree, book, paths)
                if self.mask_suffix and len(own_masks) != 1:
                    raise CaseError("missing-mask", f"{len(own_masks)} brain masks of the image (--mask-suffix)")
                make = prepare(make, steps, own_masks[0] if own_masks else None)
            except CaseError as error:
                book.fail(inputs, error.reason, error.detail)
                continue
            split: OfficialSplit | None = None
            if self.split == "published":
                split = "train" if scan.phase == "ADNI1" else "test"
            book.add(
                Case(
                    key=f"I{scan.image_id}",
                    group=f"subject {scan.subject}",
                    images=(make,),
                    target=CLASSES[self.task].index(scan.label),
                    split=split,
                    refs=(scan.row.ref, *refs),
                    meta={"class": scan.label, "month": scan.month, "phase": scan.phase},
                )
            )
            is_done = True
        return is_done

    def _plan_image(self, tree: Tree, book: Book, paths: Sequence[str]) -> tuple[Make, tuple[Ref, ...]]:
        """How the volume of one image id is made.

        Raises:
            CaseError: no volume or several, or files of two formats.
        """
        volumes = [path for path in paths if path.lower().endswith((".nii", ".nii.gz"))]
        if volumes:
            if len(paths) > 1:
                raise CaseError("ambiguous-image", f"{len(paths)} files, {len(volumes)} of them NIfTI, of one image")
            return Make("operations.volumes:image", (volumes[0],), {"form": self.form}), ()
        reader = Dicom(uneven=self.uneven, converter=self.converter)
        series, _ = reader.read(tree, book, paths)
        broken = [path for path in paths if (known := book.verdicts.get(Ref(path))) and known.status == "failed"]
        if broken:
            # Without its last slices a series is still a straight, even stack, only shorter.
            reason = book.verdicts[Ref(broken[0])].reason
            raise CaseError(reason, f"{len(broken)} of {len(paths)} DICOM files of the image cannot be read")
        found = [volume for key in sorted(series) for volume in reader.plan_series(tree, key, series[key], book)]
        if len(found) == 1:
            return found[0].make, (found[0].ref,)
        if found:
            raise CaseError("ambiguous-image", f"the DICOM files of one image make {len(found)} volumes")
        why = Counter(book.verdicts[Ref(path)].reason for path in paths if Ref(path) in book.verdicts)
        raise CaseError(why.most_common(1)[0][0] if why else "no-volume", "the DICOM files make no volume")

    def _settle_subjects(
        self,
        book: Book,
        subjects: dict[int, Subject],
        verdicts: dict[int, tuple[str, str, str]],
        kept: set[int],
        with_rows: set[int | None],
    ) -> None:
        """A verdict for every row of the table of diagnoses, and the number of subjects per reason."""
        dropped: Counter[str] = Counter()
        for rid, subject in subjects.items():
            label, reason, detail = verdicts[rid]
            if rid in kept:
                book.use(subject.rows)
                continue
            if rid not in with_rows:
                reason, detail = "no-image-listed", "the collection has no image of the subject"
            elif label and label not in CLASSES[self.task]:
                reason, detail = "other-class", f"{label} is no class of --task {self.task}"
            elif label:
                reason, detail = "no-image", "none of the subject's images was taken; their rows say why"
            dropped[reason] += 1
            book.skip(subject.rows, reason, detail)
        counts = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items())) or "none"
        book.note(f"{len(kept)} subjects with an image and a class; left out: {counts}")
        if self.split == "published":
            book.note(
                "--split published: ADNI-1 trains and ADNI-2 tests as published; the authors' list of subjects is lost"
            )


def _read_collections(tree: Tree, book: Book, paths: Iterable[str]) -> dict[int, Row]:
    """Rows by image id; what several downloads list alike is taken once."""
    rows: dict[int, Row] = {}
    for path in paths:
        for row in read_rows(tree, book, path, required=COLLECTION_COLUMNS):
            match = re.fullmatch(r"[Ii]?(\d{1,12})", row["Image Data ID"])
            if not match:
                book.fail(row.ref, "bad-image-id", "Image Data ID is not a number with or without I")
                continue
            known = rows.setdefault(int(match[1]), row)
            if known is row:
                continue
            if all(known.get(column) == row.get(column) for column in COLLECTION_COLUMNS[1:]):
                book.skip(row.ref, "duplicate", "the image is listed already")
            else:
                book.fail(row.ref, "contradicting-row", "the image is listed before with other values")
    return rows


def read_adnimerge(tree: Tree, book: Book, path: str) -> dict[int, Subject]:
    """Subjects of ADNIMERGE; rows that cannot be used get their verdict here."""
    subjects: dict[int, Subject] = defaultdict(Subject)
    for row in read_rows(tree, book, path, required=["PTID", "VISCODE", "EXAMDATE", "DX_bl", "DX"]):
        rid = _rid(row["PTID"])
        if rid is None:
            book.fail(row.ref, "bad-subject", "PTID is not of the form NNN_S_NNNN")
            continue
        subject = subjects[rid]
        subject.rows.append(row.ref)
        subject.phase = subject.phase or _phase(row.get("ORIGPROT") or row.get("COLPROT"))
        at_baseline = row["DX_bl"].lower()
        subject.is_smc |= at_baseline == "smc"
        if at_baseline in _GROUPS:
            subject.baseline_groups.add(_GROUPS[at_baseline])
        month = visit_month(row["VISCODE"])
        if month == 0:
            subject.baseline_date = subject.baseline_date or _date(row["EXAMDATE"])
        # Older exports write the change: "MCI to Dementia".
        group = _GROUPS.get(row["DX"].lower().rsplit(" to ", 1)[-1])
        if group and month is not None:
            subject.exams.append(Exam(month, group))
            if month == 0:
                subject.baseline_groups.add(group)
    return dict(subjects)


def read_dxsum(tree: Tree, book: Book, path: str) -> dict[int, Subject]:
    """Subjects of DXSUM, whose phases code diagnoses in three different columns."""
    rename = (
        {"PHASE": "Phase", "USERDATE": "EXAMDATE"} if "EXAMDATE" not in tree.first_cells(path) else {"PHASE": "Phase"}
    )
    rows: dict[int, list[tuple[Row, str, datetime.date | None, int | None]]] = defaultdict(list)
    subjects: dict[int, Subject] = defaultdict(Subject)
    for row in read_rows(tree, book, path, required=["Phase", "RID", "VISCODE"], rename=rename):
        text = row["RID"].removesuffix(".0")
        rid = int(text) if text.isdecimal() and len(text) < 10 else _rid(row.get("PTID"))
        if rid is None:
            book.fail(row.ref, "bad-subject", "RID is not a number")
            continue
        codes = (row.get("VISCODE2").lower(), row["VISCODE"].lower())
        if codes[0] == "f" or (not codes[0] and codes[1] == "f"):
            book.skip(row.ref, "screening-failure", "the person was not enrolled at that visit")
            continue
        subjects[rid].rows.append(row.ref)
        month = visit_month(codes[0] or codes[1])
        rows[rid].append((row, codes[0] or codes[1], _date(row.get("EXAMDATE")), month))
    for rid, members in rows.items():
        subject = subjects[rid]
        baseline = [one for one in members if one[3] == 0]
        # The visit itself counts; what was known at screening stands in only where it says nothing.
        baseline.sort(key=lambda one: one[1].startswith("sc"))
        dates = [date for _, _, date, _ in baseline if date]
        subject.baseline_date = dates[0] if dates else None
        subject.phase = _phase(min(members, key=lambda one: (one[2] or datetime.date.max, one[0].ref))[0]["Phase"])
        groups = [group for one in baseline if (group := _dxsum_group(one[0]))]
        subject.baseline_groups = set(groups[:1])
        for row, _, date, known in members:
            month = known
            if month is None and date and subject.baseline_date:
                month = _month_of(date, subject.baseline_date)
            group = _dxsum_group(row)
            if month is not None and group:
                subject.exams.append(Exam(month, group))
    return dict(subjects)


def _dxsum_group(row: Row) -> str | None:
    for column, codes in (("DIAGNOSIS", _DIAGNOSIS), ("DXCHANGE", _DXCHANGE), ("DXCURREN", _DIAGNOSIS)):
        text = row.get(column).removesuffix(".0").lower()
        if text.isdecimal() and len(text) < 4 and int(text) in codes:
            return codes[int(text)]
        if text in _GROUPS:
            return _GROUPS[text]
    return None


def visit_month(text: str) -> int | None:
    """Months since baseline of a visit code, or of a visit's long name; ``None`` when it does not say.

    Codes such as ``y1`` or ``v04`` count from the start of a phase, not from the baseline, and say nothing.
    """
    code = text.strip().lower()
    if code in ("sc", "bl", "scmri", "m0", "m00"):
        return 0
    match = re.fullmatch(r"m(\d{1,3})", code) or re.search(r"\bmonth (\d{1,3})\b", code)
    if match:
        return int(match[1])
    if re.search(r"\b(screening|baseline)\b", code) and "cont" not in code:
        return 0
    return None


def _month_of(date: datetime.date, baseline: datetime.date) -> int | None:
    """Month of the visit a date belongs to; visits are half a year apart. ``None`` before the baseline visit."""
    month = 6 * round((date - baseline).days / _DAYS_PER_MONTH / 6)
    return month if month >= 0 else None


def _rid(text: str) -> int | None:
    """The number that is unique in the whole study: the last part of the PTID."""
    match = _PTID.fullmatch(text.strip())
    return int(match[2]) if match else None


def _phase(text: str) -> str:
    return _PHASES.get(text.lower().replace("-", "").replace(" ", ""), "")


def _date(text: str) -> datetime.date | None:
    """A date written 3/20/2015, 3/20/15 or 2015-03-20, with or without leading zeros."""
    for form in ("%m/%d/%Y", "%Y-%m-%d", "%m/%d/%y"):
        try:
            return datetime.datetime.strptime(text.strip().split(" ")[0], form).date()
        except ValueError:
            continue
    return None


SOURCE = Adni
