"""Errors for what comes from outside: files, environments, configurations.

Wrong arguments of a Python call are ``ValueError`` or ``TypeError``; the classes here are for everything a user
can meet without having made a programming mistake. Only the command line turns them into one line and an exit code.
"""

from __future__ import annotations

import os


class MonaiMambaError(Exception):
    """Base of all errors of this package; its text is fit to be shown to a user as it stands."""


class BackendError(MonaiMambaError, RuntimeError):
    """A scan backend was forced that is not available here or cannot serve the call."""


class CheckpointError(MonaiMambaError):
    """A weight or checkpoint file is damaged, unsafe, or does not fit the network.

    Args:
        reason: what is wrong and what to do.
        path: the file, where there is one; it stands in front of the reason.
    """

    def __init__(self, reason: str, path: os.PathLike[str] | str | None = None) -> None:
        super().__init__(reason if path is None else f"{os.fspath(path)}: {reason}")
        self.reason = reason
        self.path = None if path is None else os.fspath(path)


class ExportError(MonaiMambaError, RuntimeError):
    """A network cannot be written for another runtime, or the written file gives other results."""


class DatasetError(MonaiMambaError):
    """A data set is incomplete or contradicts itself; the text names the file and the reason."""


class RunError(MonaiMambaError):
    """A run of several steps cannot go on; the text names the step, the reason and where the log is."""
