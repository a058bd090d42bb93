"""Hold two results of ``benchmarks/scan.py`` against each other.

    python benchmarks/compare.py before.json after.json

Prints the ratio after / before of every time and ratio that both have. Compare results of one machine only, and trust
ratios (columns with ``_per_``) more than times: they come out of one run each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

_NAMES = ("variant", "shape", "map", "sequence", "operator")


def rows_of(result: dict) -> dict[tuple[str, ...], dict[str, float]]:
    """Every row under its table and name."""
    found = {}
    for table, rows in result["tables"].items():
        for row in rows:
            numbers = {k: v for k, v in row.items() if isinstance(v, float) and not k.endswith("_error")}
            found[(table, *(row[name] for name in _NAMES if name in row))] = numbers
    return found


def compare(before: dict, after: dict) -> list[str]:
    """One line for every row that both results have."""
    old, new = rows_of(before), rows_of(after)
    lines = []
    for name in sorted(old.keys() & new.keys()):
        both = [k for k in old[name] if k in new[name] and old[name][k] > 0]
        lines.append(" / ".join(name) + ": " + ", ".join(f"{k} x{new[name][k] / old[name][k]:.2f}" for k in both))
    for name in sorted(old.keys() ^ new.keys()):
        lines.append(" / ".join(name) + ": only in one of the two")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    before, after = (json.loads(path.read_text()) for path in (arguments.before, arguments.after))
    if before["machine"] != after["machine"]:
        print(f"Different machines: {before['machine']} and {after['machine']}; times say little.")
    print("\n".join(compare(before, after)))


if __name__ == "__main__":
    main()
