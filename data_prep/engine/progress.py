"""How far a command has come: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

#: seconds between two lines where there is no terminal
LINE_SECONDS = 30.0


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[bool], None]]:
    """Show how many of `total` are done; the body calls what it gets once for each, with whether it failed.

    Args:
        what: is counted, ``"cases"``.
        total: number of all.
        done: number of those that were done before.
    """
    failed = made = 0
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, completed=done, note="")

            def tick(is_failed: bool) -> None:
                nonlocal failed
                failed += is_failed
                bar.update(task, advance=1, note=f"{failed} failed" if failed else "")

            yield tick
        return
    start = time.monotonic()

    def count(is_failed: bool) -> None:
        nonlocal failed, made
        failed += is_failed
        made += 1

    def report() -> None:
        while not finished.wait(LINE_SECONDS):
            rate = made / (time.monotonic() - start)
            left = f"{(total - done - made) / rate:.0f} s left" if made else "none finished yet"
            print(f"{done + made}/{total} {what}, {failed} failed, {rate:.2f}/s, {left}", file=sys.stderr, flush=True)

    # A thread, so that the lines keep coming while one case takes an hour.
    finished = threading.Event()
    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield count
    finally:
        finished.set()
        reporter.join()
