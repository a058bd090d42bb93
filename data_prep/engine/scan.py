"""Facts of many files at once, on the worker processes where these pay."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from data_prep.engine.progress import progress
from data_prep.engine.worker import close_workers, read_isolated
from data_prep.model import Json

#: a worker needs a second to start, in which one process reads a thousand headers
PAYS_FROM = 2000
#: files that a worker gets at once
CHUNK = 32
#: seconds they may take
_TIMEOUT = 600.0


@dataclass(frozen=True)
class Scanner:
    """Reads files in the order in which they are given, whoever reads them; for `data_prep.tree.Tree`.

    Args:
        workers: number of processes; fewer files than `PAYS_FROM` are read in this one.
    """

    workers: int = 1

    def __call__(self, paths: Sequence[Path], read: Callable[..., Json], arguments: tuple[Json, ...]) -> Iterator[Json]:
        """``read(path, *arguments)`` of every path."""
        with progress("files", len(paths)) as tick:
            for value in self._values(paths, read, arguments):
                tick(False)
                yield value

    def _values(self, paths: Sequence[Path], read: Callable[..., Json], arguments: tuple[Json, ...]) -> Iterator[Json]:
        name = _address(read)
        if self.workers < 2 or len(paths) < PAYS_FROM or name is None:
            yield from (read(path, *arguments) for path in paths)
            return
        chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]

        def ask(chunk: Sequence[Path]) -> list[list[Json] | None]:
            message = {"read": name, "paths": [str(path) for path in chunk], "arguments": list(arguments)}
            return read_isolated(message, _TIMEOUT) or [None] * len(chunk)

        with ThreadPoolExecutor(self.workers, thread_name_prefix="data-prep-scan") as pool:
            try:
                for chunk, values in zip(chunks, pool.map(ask, chunks), strict=True):
                    for path, value in zip(chunk, values, strict=True):
                        # What a worker could not read fails here, with the error it has.
                        yield value[0] if value is not None else read(path, *arguments)
            finally:
                close_workers()
                pool.shutdown(wait=True, cancel_futures=True)


def _address(function: Callable[..., Any]) -> str | None:
    """``"module:name"`` under which another process finds a function of this package; none for all others."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    if not module.startswith("data_prep.") or hasattr(function, "__self__"):
        return None
    try:
        return f"{module}:{name}" if find(f"{module}:{name}") is function else None
    except (ImportError, AttributeError):
        return None


def find(address: str) -> Callable[..., Any]:
    """The function at an address."""
    module, name = address.split(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return cast("Callable[..., Any]", found)


def read_values(message: dict[str, Any]) -> list[list[Json] | None]:
    """In a worker: the value of every path, in a list of its own; ``None`` where reading fails."""
    read = find(message["read"])
    values: list[list[Json] | None] = []
    for path in message["paths"]:
        try:
            values.append([read(Path(path), *message["arguments"])])
        except Exception:
            values.append(None)
    return values
