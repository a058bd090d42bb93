"""Errors of the data preparation: everything a user can meet without having made a programming mistake.

`CaseError` ends one case; the run goes on and the report names the reason. Every other class ends the command.
"""

from __future__ import annotations

from monai_mamba.errors import DatasetError, MonaiMambaError


class DataPrepError(MonaiMambaError):
    """Base of the errors that end a command; the text names the cause and the cure and no person."""


class UsageError(DataPrepError):
    """Options that contradict each other or the data; exit code 2."""


class AccountingError(DataPrepError):
    """The verdicts do not add up to the inputs: a mistake in this package, never hidden; exit code 4."""


class CaseError(DataPrepError):
    """One case cannot be made.

    Args:
        reason: short fixed code with dashes, for example ``"missing-slice"``; reports are grouped by it.
        detail: numbers and names that help to find the cause. Never a name, id, date or UID of a person.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class DicomReadError(CaseError):
    """A DICOM file or series is damaged, not an image, or its geometry cannot be trusted."""


class ImageReadError(CaseError):
    """A NIfTI, PNG or JPEG file is damaged, too large for its file, or claims impossible values."""


class ArchiveError(DataPrepError):
    """An archive is damaged or unsafe to unpack."""


__all__ = [
    "AccountingError",
    "ArchiveError",
    "CaseError",
    "DataPrepError",
    "DatasetError",
    "DicomReadError",
    "ImageReadError",
    "UsageError",
]
