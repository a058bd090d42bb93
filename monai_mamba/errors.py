"""Errors for what comes from outside: files, environments, configurations.

Wrong arguments of a Python call are ``ValueError`` or ``TypeError``; the classes here are for everything a user
can meet without having made a programming mistake. Only the command line turns them into one line and an exit code.
"""

from __future__ import annotations


class MonaiMambaError(Exception):
    """Base of all errors of this package; its text is fit to be shown to a user as it stands."""


class BackendError(MonaiMambaError, RuntimeError):
    """A scan backend was forced that is not available here or cannot serve the call."""


class CheckpointError(MonaiMambaError):
    """A weight or checkpoint file is damaged, unsafe, or does not fit the network."""


class DatasetError(MonaiMambaError):
    """A data set is incomplete or contradicts itself; the text names the file and the reason."""
