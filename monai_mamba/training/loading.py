"""Cases out of their files while a network is trained or evaluated, and what happens to those that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monai.data import DataLoader, Dataset, list_data_collate
from monai.transforms import LoadImaged

from monai_mamba.errors import DatasetError
from monai_mamba.training.bundle import num_processes
from monai_mamba.training.datalist import FILE_KEYS, check_corrupt_policy
from monai_mamba.training.transforms import ReadPictured

logger = logging.getLogger(__name__)
#: Transforms that open files. What fails in a later one is no damaged file and always stops.
_OPENING = (ReadPictured, LoadImaged)


@dataclass(frozen=True)
class Unreadable:
    """What stands for a case whose files cannot be read."""

    case: str
    reason: str


class CaseDataset(Dataset):
    """MONAI's data set, with a policy for files that cannot be read when their turn comes.

    Args:
        data: cases.
        transform: of a case; the transforms at its beginning open the files.
        on_corrupt: ``"error"`` stops, ``"drop"`` gives :class:`Unreadable`, which :class:`CaseLoader` leaves out.

    Raises:
        DatasetError: by ``"error"``, naming case, file and reason.
    """

    def __init__(
        self, data: Sequence[Mapping[str, Any]], transform: Callable[..., Any], on_corrupt: str = "error"
    ) -> None:
        super().__init__(data, transform)
        self.on_corrupt = check_corrupt_policy(on_corrupt)
        transforms = self.transform.transforms
        self._num_opening = next((i for i, t in enumerate(transforms) if not isinstance(t, _OPENING)), len(transforms))

    def _transform(self, index: int) -> Any:
        case = self.data[index]
        try:
            opened = self.transform(case, end=self._num_opening) if self._num_opening else case
        except Exception as error:
            reason = read_failure(case, error)
            if self.on_corrupt == "drop":
                return Unreadable(str(case.get("case")), reason)
            raise DatasetError(
                f"case {case.get('case')}: {reason}; repair the file, or leave such cases out with on_corrupt=drop"
            ) from error
        return self.transform(opened, start=self._num_opening)


class CaseLoader(DataLoader):
    """MONAI's loader, leaving out what :class:`CaseDataset` could not read: named once, counted in every pass.

    A batch gets smaller by what is left out. A batch of which nothing is left is skipped, so a pass may give fewer
    batches than ``len``; the handler `EndWithData` ends the epoch there.

    Args:
        dataset: a :class:`CaseDataset`.
        num_workers: processes that read.
        kwargs: of torch's loader.

    Attributes:
        left_out: case to reason, of all passes.

    Raises:
        DatasetError: if no case of a pass can be read, or none of a batch while several processes train together, who
            would wait for each other forever.
    """

    def __init__(self, dataset: Dataset, num_workers: int = 0, **kwargs: Any) -> None:
        super().__init__(dataset, num_workers, collate_fn=_collate, **kwargs)
        self.left_out: dict[str, str] = {}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Not a generator itself: torch draws the seed of the workers when its iterator is made, which has to be now.
        return self._readable(super().__iter__())

    def _readable(self, batches: Iterator[Any]) -> Iterator[Any]:
        num_left_out, num_batches = 0, 0
        for batch, left_out in batches:
            num_left_out += len(left_out)
            for one in left_out:
                if one.case not in self.left_out:
                    self.left_out[one.case] = one.reason
                    logger.warning("case %s left out: %s", one.case, one.reason)
            if batch is not None:
                num_batches += 1
                yield batch
            elif num_processes() > 1:
                raise DatasetError(
                    f"case {left_out[0].case}: {left_out[0].reason}; no case of its batch can be read, and several "
                    "processes cannot skip a batch: remove these cases from the data list"
                )
        if num_left_out:
            logger.warning("%d of %d cases left out in this pass", num_left_out, len(self.dataset))  # type: ignore[arg-type]
            if num_batches == 0:
                raise DatasetError(
                    f"none of the {len(self.dataset)} cases can be read; "  # type: ignore[arg-type]
                    f"the last: case {left_out[-1].case}: {left_out[-1].reason}"
                )


def read_failure(case: Mapping[str, Any], error: BaseException) -> str:
    """Return why a case cannot be read: our own error where there is one, else the files and the first cause."""
    # MONAI wraps whatever a transform raises; what we raised ourselves is at the end of the chain.
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, DatasetError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return str(cause)
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    files = [str(case[key]) for key in (*FILE_KEYS, "label") if isinstance(case.get(key), str | list)]
    return f"{', '.join(files)}: cannot be read: {type(error).__name__}: {error}".splitlines()[0]


def _collate(samples: Sequence[Any]) -> tuple[Any, list[Unreadable]]:
    """The batch, None if there is nothing to put into it, and what was left out of it."""
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    left_out = [sample for sample in samples if isinstance(sample, Unreadable)]
    return (list_data_collate(readable) if readable else None), left_out
