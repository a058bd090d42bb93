"""The folder of a run: what belongs to it, what it was started with and how far it has come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from monai_mamba import __version__
from monai_mamba.errors import RunError
from monai_mamba.files import write_text

_STATE = "run.json"
_FORMAT = "monai-mamba quickstart 1"


@dataclass
class RunFolder:
    """A run on disk. ``run.json`` is rewritten, whole, after every step.

    Attributes:
        path: the folder.
        options: what decides the result (data, trainer, epochs, seed); fixed for the life of the run.
        steps: name of every finished step and the seconds it took, over all attempts.
    """

    path: Path
    options: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    seconds_spent: dict[str, float] = field(default_factory=dict)

    @property
    def exists(self) -> bool:
        """Whether the run was begun before."""
        return (self.path / _STATE).is_file()

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read a run's state, or an empty one if the folder is new or empty.

        Raises:
            RunError: if the folder holds anything but a run of ours.
        """
        state = path / _STATE
        if not state.is_file():
            if path.exists() and (not path.is_dir() or any(p.name != ".lock" for p in path.iterdir())):
                raise RunError(
                    f"{path}: already exists and is not the output of a quickstart; nothing was touched, "
                    "choose another --output"
                )
            return cls(path)
        try:
            content = json.loads(state.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r} is not {_FORMAT!r}")
            return cls(path, dict(content["options"]), dict(content["steps"]), dict(content["seconds_spent"]))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{state}: cannot be resumed from: {error}; choose another --output") from error

    def settle(self, name: str, requested: Any, default: Any) -> Any:
        """Fix an option: as requested, else as the run was started, else the default.

        Raises:
            RunError: if another value is requested than the run was started with.
        """
        if not self.exists:
            self.options[name] = default if requested is None else requested
        elif requested is not None and requested != self.options.get(name):
            raise RunError(
                f"{self.path}: was started with {name} {self.options.get(name)}, not {requested}; "
                "leave the option out to resume, or choose another --output"
            )
        return self.options.get(name)

    def save(self) -> None:
        """Write ``run.json``."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {
            "format": _FORMAT,
            "monai_mamba": __version__,
            "options": self.options,
            "steps": self.steps,
            "seconds_spent": self.seconds_spent,
        }
        write_text(self.path / _STATE, json.dumps(content, indent=2) + "\n")

    def step(self, name: str, work: Callable[[], None]) -> None:
        """Do a step unless an earlier attempt finished it; the time of interrupted attempts is counted too."""
        if name in self.steps:
            return
        start = time.perf_counter()
        try:
            work()
        finally:
            self.seconds_spent[name] = self.seconds_spent.get(name, 0.0) + time.perf_counter() - start
            self.save()
        self.steps[name] = self.seconds_spent[name]
        self.save()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out of this folder.

        Raises:
            RunError: if another process works in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise RunError(f"{self.path}: another quickstart is running in this folder") from error
