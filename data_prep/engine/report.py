"""The report: a verdict for every input and every case, with counts that add up."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.engine.plan import Plan, all_lines
from data_prep.errors import AccountingError
from data_prep.model import STATUSES

COLUMNS = ["kind", "input", "item", "status", "reason", "detail", "case"]
_WORST = {"failed": 0, "resampled": 1, "ok": 2, "skipped": 3}


@dataclass(frozen=True)
class Report:
    """Rows in the order of `COLUMNS` (``input`` as the tree path), and counts by kind and status."""

    rows: list[list[str]]
    counts: dict[str, dict[str, int]]
    notes: list[str]

    @property
    def num_failed(self) -> int:
        return sum(kind["failed"] for kind in self.counts.values())

    def csv(self, shown: Mapping[str, str] | None = None, is_personal: bool = False) -> str:
        """As CSV; `shown` replaces tree paths by the names for the public.

        Numbers of rows would lead anyone who has the table to the person, and so would the order of the inputs; for
        personal sources both are left out.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        rows = [
            [kind, path if shown is None or kind == "case" else shown[path],
             "" if is_personal and kind in ("row", "item") else item, *rest]
            for kind, path, item, *rest in self.rows
        ]  # fmt: skip
        writer.writerows(sorted(rows) if is_personal else rows)
        return text.getvalue()

    def json(self, plan: Plan, versions: Mapping[str, str]) -> str:
        """Counts, reasons and tools; rows are in ``report.csv``."""
        reasons: dict[str, Counter[str]] = {}
        for kind, _, _, status, reason, _, _ in self.rows:
            if status in ("skipped", "failed", "resampled"):
                reasons.setdefault(kind, Counter())[f"{status}: {reason}" if reason else status] += 1
        content: dict[str, Any] = {
            "source": plan.source,
            "layout": plan.layout,
            "counts": self.counts,
            "reasons": {kind: dict(sorted(counter.items())) for kind, counter in sorted(reasons.items())},
            "notes": self.notes,
            "versions": dict(versions),
        }
        return json.dumps(content, indent=1) + "\n"


def make_report(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> Report:
    """Join the verdicts of the plan with the results of the cases.

    Args:
        plan: the plan.
        records: case name to its record in the journal.

    Raises:
        AccountingError: an input or a case has no verdict, or more than one.
    """
    rows: list[list[str]] = []
    for ref, settled, names in all_lines(plan):
        outcomes = [records[name] for name in names if name in records]
        if len(outcomes) != len(names):
            raise AccountingError("a planned case has no result.")
        candidates = [(one["status"], one["reason"], one["detail"]) for one in outcomes]
        if settled is not None:
            candidates.append((settled.status, settled.reason, settled.detail))
        if not candidates:
            raise AccountingError("an input has no verdict.")
        status, reason, detail = min(candidates, key=lambda one: _WORST[one[0]])
        rows.append([ref.kind, ref.path, ref.item, status, reason, detail, " ".join(sorted(names))])
    for entry in plan.entries:
        record = records[entry.name]
        detail = "; ".join([record["detail"], *record["notes"]]).strip("; ")
        rows.append(["case", entry.name, "", record["status"], record["reason"], detail, entry.name])
    counts: dict[str, dict[str, int]] = {}
    for kind, _, _, status, *_ in rows:
        counts.setdefault(kind, {"total": 0, **dict.fromkeys(STATUSES, 0)})
        counts[kind]["total"] += 1
        counts[kind][status] += 1
    for kind, number in plan.expected.items():
        total = counts.get(kind, {}).get("total", 0)
        if total != number:
            raise AccountingError(f"the input has {number} of kind {kind}, the report has {total}.")
    return Report(rows, dict(sorted(counts.items())), plan.notes)
