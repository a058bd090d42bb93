"""What became of every key of a weight file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

#: loaded: same name; renamed: other name, same values; adapted: values or shape changed; ignored: in the file only;
#: kept: in the network only, left as it was.
ACTIONS = ("loaded", "renamed", "adapted", "ignored", "kept")


@dataclass(frozen=True)
class KeyRecord:
    """One key.

    Attributes:
        action: one of `ACTIONS`.
        source: key in the file, None for ``kept``.
        target: key in the network, None for ``ignored``.
        reason: why, where the action does not speak for itself.
    """

    action: str
    source: str | None
    target: str | None
    reason: str = ""


@dataclass(frozen=True)
class LoadReport:
    """What was recognised and what became of every key.

    Attributes:
        layout: what the file is, e.g. ``"MedMamba"``.
        arguments: arguments of the network read from names and shapes.
        source: the file and the group in it, or ``"state dict"``.
        records: one per key of the file and per key of the network that the file does not have.
    """

    layout: str
    arguments: dict[str, Any]
    source: str
    records: Sequence[KeyRecord] = field(repr=False)

    def select(self, *actions: str) -> list[KeyRecord]:
        """Return the records of these actions."""
        return [record for record in self.records if record.action in actions]

    @property
    def missing(self) -> list[str]:
        """Keys of the network that the file does not have."""
        return [record.target for record in self.records if record.action == "kept" and record.target]

    @property
    def left_over(self) -> list[str]:
        """Keys of the file that went nowhere."""
        return [record.source for record in self.records if record.action == "ignored" and record.source]

    def summary(self) -> str:
        """Return one line with the counts."""
        counts = Counter(record.action for record in self.records)
        parts = [f"{counts[action]} {action}" for action in ACTIONS if counts[action]]
        return f"{self.layout} from {self.source}: {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "layout": self.layout,
            "arguments": self.arguments,
            "source": self.source,
            "keys": [asdict(record) for record in self.records],
        }

    def __str__(self) -> str:
        lines = [self.summary()]
        for record in self.select("adapted", "ignored", "kept"):
            key = record.source if record.target is None else record.target
            lines.append(f"  {record.action}: {key}" + (f" ({record.reason})" if record.reason else ""))
        return "\n".join(lines)
