"""The plan: every case with its name, fold and files, and every verdict known before anything is made."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.book import Book, Verdict
from data_prep.engine.files import write_lines, write_whole
from data_prep.errors import DatasetError, UsageError
from data_prep.identity import Pseudonyms
from data_prep.layouts import LAYOUTS, Entry, Layout
from data_prep.model import Case, Description, Json, Make, Ref, Source
from data_prep.splits import assign_folds, official_conflict
from data_prep.tree import Tree

PLAN_VERSION = 2


@dataclass
class Plan:
    """Everything that is decided before the first file is written.

    Args:
        source: name of the source.
        options: of the source.
        description: of the data set.
        layout: name of the layout.
        is_personal: names of inputs may not appear in the data set.
        roots: input folders, absolute.
        entries: planned cases, sorted by name.
        verdicts: inputs that are settled already.
        shown: name of every input in the public report.
        notes: remarks on the whole data set.
        stamps: tree path to ``[size, mtime_ns]`` of the files that cases read.
        expected: number of inputs per kind, counted from the input itself; the report must agree.
    """

    source: str
    options: dict[str, Json]
    description: Description
    layout: str
    is_personal: bool
    roots: list[str]
    entries: list[Entry]
    verdicts: dict[Ref, Verdict]
    shown: dict[str, str]
    notes: list[str] = field(default_factory=list)
    stamps: dict[str, list[int]] = field(default_factory=dict)
    expected: dict[str, int] = field(default_factory=dict)

    @property
    def layout_object(self) -> Layout:
        return LAYOUTS[self.layout]

    def absolute(self, path: str) -> str:
        if len(self.roots) == 1:
            root = Path(self.roots[0])
            return str(root if root.is_file() else root / path)
        head, rest = path.split("/", 1)
        root = Path(self.roots[int(head.removeprefix("input")) - 1])
        return str(root if root.is_file() else root / rest)

    def fingerprint(self, entry: Entry, link: str) -> str:
        """Changes whenever the files of a case would have to be made again."""
        from data_prep.operations import find_operation

        makes = [
            [
                make.operation,
                find_operation(make.operation).operation_version,  # type: ignore[attr-defined]
                [[path, *self.stamps[path]] for path in make.inputs],
                dict(make.params),
                output,
            ]
            for make, output in zip(entry.case.makes, entry.outputs, strict=True)
        ]
        content = [PLAN_VERSION, makes, link, self.is_personal, entry.case.same_grid, entry.case.landmarks]
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def table(self) -> str:
        """The plan as CSV for a person to review."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", "patient", "part", "fold", "target", "operations", "inputs", "outputs"])
        for entry in self.entries:
            case = entry.case
            writer.writerow(
                [
                    entry.name,
                    entry.group,
                    case.split or "train",
                    "" if entry.fold is None else entry.fold,
                    "" if case.target is None else json.dumps(case.target),
                    " ".join(dict.fromkeys(make.operation for make in case.makes)),
                    " ".join(dict.fromkeys(path for make in case.makes for path in make.inputs)),
                    " ".join(entry.outputs),
                ]
            )
        return text.getvalue()

    def save(self, folder: Path) -> None:
        """Write ``plan.jsonl`` (for ``merge``) and ``plan.csv`` (for people)."""
        write_lines(folder / "plan.jsonl", self._lines())
        write_whole(folder / "plan.csv", self.table())

    def _lines(self) -> Iterator[str]:
        """One JSON line per case, verdict and input, so that a large plan never is in memory a second time."""
        header = {
            "version": PLAN_VERSION,
            "source": self.source,
            "options": self.options,
            "description": dataclasses.asdict(self.description),
            "layout": self.layout,
            "is_personal": self.is_personal,
            "roots": self.roots,
            "notes": self.notes,
            "expected": self.expected,
        }
        yield json.dumps(header, default=str)
        for entry in self.entries:
            yield json.dumps({"entry": dataclasses.asdict(entry)}, default=str)
        for ref, verdict in self.verdicts.items():
            yield json.dumps({"verdict": [dataclasses.astuple(ref), dataclasses.astuple(verdict)]})
        for path, shown in self.shown.items():
            yield json.dumps({"input": [path, shown, self.stamps.get(path)]})

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            UsageError: no plan there, or one of another version.
        """
        try:
            with open(folder / "plan.jsonl", encoding="utf-8") as file:
                header = json.loads(file.readline())
                if header.pop("version") != PLAN_VERSION:
                    raise UsageError("the plan was made by another version; run the shards again.")
                description = header.pop("description")
                for key in ("channels", "regions_class_order"):
                    description[key] = None if description[key] is None else tuple(description[key])
                plan = cls(description=Description(**description), entries=[], verdicts={}, shown={}, **header)
                for line in file:
                    content = json.loads(line)
                    if "entry" in content:
                        plan.entries.append(_fat(content["entry"]))
                    elif "verdict" in content:
                        ref, verdict = content["verdict"]
                        plan.verdicts[Ref(*ref)] = Verdict(*verdict)
                    else:
                        path, shown, stamp = content["input"]
                        plan.shown[path] = shown
                        if stamp is not None:
                            plan.stamps[path] = stamp
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError("there is no plan for this data set, or it is damaged; run the shards first.") from error
        return plan


def make_plan(
    source: Source, tree: Tree, pseudonyms: Pseudonyms, layout: str, num_folds: int | None, seed: int
) -> Plan:
    """Let `source` read `tree`, then settle names, folds and paths.

    Raises:
        UsageError: options, layout and data do not fit.
        DatasetError: nothing to convert, or the data contradict themselves.
    """
    book = Book(tree, seed)
    description = source.plan(tree, book)
    book.close()
    LAYOUTS[layout].check(description)
    if not book.cases and not any(verdict.status == "failed" for verdict in book.verdicts.values()):
        reasons = sorted({verdict.reason for verdict in book.verdicts.values() if verdict.status == "skipped"})
        if not set(reasons) - {"junk", "unrecognized", "linked-folder"}:
            raise DatasetError(
                f"nothing to convert in {len(tree)} files ({', '.join(reasons) or 'the input is empty'})."
            )
        # The source knew the files and left all of them out: that is a result, and the report says why.
        book.note(f"nothing to convert: every input was skipped ({', '.join(reasons)})")
    cases = list(book.cases.values())
    for case in cases:
        if len(case.landmarks) != len(description.landmark_names):
            raise DatasetError(
                f"a case has {len(case.landmarks)} landmarks, the data set {len(description.landmark_names)}; "
                "the source must refuse incomplete cases."
            )
    conflicts = official_conflict(cases)
    if conflicts:
        book.note(
            f"{len(conflicts)} patients are in more than one part of the publisher's own split; "
            "scores on its test part are not independent of training"
        )
    folds = assign_folds(cases, num_folds, seed)
    names = pseudonyms.names(sorted(book.cases))
    entries = [
        Entry(
            case=case,
            name=names[case.key],
            group=pseudonyms.group(case.group),
            fold=folds.get(case.key),
            outputs=LAYOUTS[layout].outputs(description, names[case.key], case),
        )
        for case in cases
    ]
    entries.sort(key=lambda entry: entry.name)
    used = sorted({path for case in cases for make in case.makes for path in make.inputs})
    return Plan(
        source=source.name,
        options=source.to_json(),
        description=description,
        layout=layout,
        is_personal=pseudonyms.identifiers == "personal",
        roots=[str(root) for root in tree.roots],
        entries=entries,
        verdicts=book.verdicts,
        shown={ref.path: pseudonyms.input(ref.path) for ref in book.inputs()},
        notes=book.notes,
        stamps={path: [tree.stamp(path).size, tree.stamp(path).mtime_ns] for path in used},
        expected=dict(Counter(ref.kind for ref in tree.expected)),
    )


def in_shard(name: str, shard: tuple[int, int]) -> bool:
    """Whether a case belongs to shard ``(number, count)``; depends on its name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % shard[1] == shard[0] - 1


def all_lines(plan: Plan) -> Iterator[tuple[Ref, Verdict | None, list[str]]]:
    """Every input with its settled verdict, if any, and the names of the cases that use it."""
    users: dict[Ref, list[str]] = {}
    for entry in plan.entries:
        for ref in entry.case.inputs:
            users.setdefault(ref, []).append(entry.name)
    for ref in sorted(users.keys() | plan.verdicts.keys()):
        yield ref, plan.verdicts.get(ref), users.get(ref, [])


def _fat(content: dict[str, Any]) -> Entry:
    case = content["case"]

    def make(value: dict[str, Any]) -> Make:
        return Make(value["operation"], tuple(value["inputs"]), value["params"])

    case |= {
        "images": tuple(make(one) for one in case["images"]),
        "label_map": make(case["label_map"]) if case["label_map"] else None,
        "views": tuple(case["views"]),
        "landmarks": tuple(tuple(point) for point in case["landmarks"]),
        "refs": tuple(Ref(**ref) for ref in case["refs"]),
        "masks": tuple(make(one) for one in case["masks"]),
        "samples": tuple(tuple(sample) for sample in case["samples"]),
    }
    return Entry(Case(**case), content["name"], content["group"], content["fold"], tuple(content["outputs"]))
