"""What has been made already: one JSON line per finished case, appended by the parent process alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Append-only file of case results; a line that a power loss cut short is ignored and made again.

    Args:
        folder: where the journals lie; those of all shards are read, the own one is written.
        shard: ``(number, count)``, counted from 1.
    """

    def __init__(self, folder: Path, shard: tuple[int, int]) -> None:
        self.folder = folder
        self.path = folder / f"journal-{shard[0]}-of-{shard[1]}.jsonl"
        self.known = read_journals(folder)
        self._file = open(self.path, "ab")
        if self._file.tell() and not self._ends_with_newline():
            self._file.write(b"\n")

    def _ends_with_newline(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; on disk when this returns."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.known[record["name"]] = record

    def close(self) -> None:
        self._file.close()


def read_journals(folder: Path) -> dict[str, dict[str, Any]]:
    """Case name to its latest record, over the journals of all shards, the most recently written journal last."""
    known: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("journal-*-of-*.jsonl"), key=lambda p: (p.stat().st_mtime_ns, p.name)):
        with open(path, "rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    known[record["name"]] = record
                except (ValueError, KeyError, TypeError):
                    continue
    return known
