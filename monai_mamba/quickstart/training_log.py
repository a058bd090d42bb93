"""Read what nnU-Net prints while it trains: for the live display and for the training curve of the report."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

_EPOCH = re.compile(r"\bEpoch (\d+)\s*$")
_TRAIN_LOSS = re.compile(r"\btrain_loss (\S+)")
_VAL_LOSS = re.compile(r"\bval_loss (\S+)")
_PSEUDO_DICE = re.compile(r"\bPseudo dice \[(.*)\]")
_EPOCH_TIME = re.compile(r"\bEpoch time: ([0-9.]+) s")
_NUMBER = re.compile(r"nan|-?\d+\.?\d*(?:e[+-]?\d+)?(?![\d(])")


@dataclass
class Epoch:
    """What nnU-Net logged of one epoch; ``dice`` has one value per structure, NaN where none was sampled."""

    number: int
    train_loss: float | None = None
    val_loss: float | None = None
    dice: list[float] = field(default_factory=list)
    seconds: float | None = None


class LogParser:
    """Collect epochs from nnU-Net's lines; an epoch that is repeated after a resume replaces the first one."""

    def __init__(self) -> None:
        self.epochs: dict[int, Epoch] = {}
        self._current: Epoch | None = None

    def feed(self, line: str) -> Epoch | None:
        """Take one line; return the epoch if the line completes it."""
        if match := _EPOCH.search(line):
            self._current = Epoch(int(match[1]))
        elif (epoch := self._current) is None:
            return None
        elif match := _TRAIN_LOSS.search(line):
            epoch.train_loss = _number(match[1])
        elif match := _VAL_LOSS.search(line):
            epoch.val_loss = _number(match[1])
        elif match := _PSEUDO_DICE.search(line):
            # Written as "np.float32(0.81), np.float32(0.79)" by numpy 2 and as "0.81, 0.79" by numpy 1.
            inner = re.sub(r"np\.float\d+\(|\)", "", match[1])
            epoch.dice = [float(number) for number in _NUMBER.findall(inner)]
        elif match := _EPOCH_TIME.search(line):
            epoch.seconds = float(match[1])
            self.epochs[epoch.number] = epoch
            self._current = None
            return epoch
        return None


def read_training_logs(folder: Path) -> list[Epoch]:
    """All finished epochs of a fold's ``training_log_*.txt``, in order; a resumed training has several files."""
    parser = LogParser()
    for file in sorted(folder.glob("training_log_*.txt"), key=lambda f: f.stat().st_mtime_ns):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            parser.feed(line)
    return [parser.epochs[number] for number in sorted(parser.epochs)]


def _number(text: str) -> float | None:
    try:
        return float(re.sub(r"np\.float\d+\(|\)", "", text))
    except ValueError:
        return None
