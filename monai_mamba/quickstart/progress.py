"""Show how far a run is: a live display on a terminal, one line per event in a log file."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunProgress:
    """Progress of named steps; use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._live = self.console.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._last_line = ""
        self._start = 0.0

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str, style: str = "") -> None:
        """Print a line that stays."""
        self.console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)

    def start(self, name: str, total: int | None = None) -> None:
        """Begin a step of ``total`` parts, None if unknown."""
        self._name, self._start, self._last_line = name, time.perf_counter(), ""
        self._task = self._bar.add_task(name, total=total, note="")
        if not self._live:
            self.say(f"{name} ...")

    def update(self, completed: int, total: int | None = None, note: str = "") -> None:
        """Tell that ``completed`` of ``total`` parts are done."""
        if self._task is not None:
            self._bar.update(self._task, completed=completed, total=total, note=note, refresh=True)
        line = f"  {self._name}: {completed}{f'/{total}' if total else ''} {note}".rstrip()
        if not self._live and note and line != self._last_line:
            self.say(line)
            self._last_line = line

    def finish(self, note: str = "") -> None:
        """End the step with a line that stays."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        self.say(f"✓ {self._name} ({time.perf_counter() - self._start:.0f} s){f': {note}' if note else ''}")
