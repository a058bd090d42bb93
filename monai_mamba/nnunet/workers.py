"""Why nnU-Net's background workers died: its message says that they did, the cause is elsewhere or nowhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from monai_mamba.errors import RunError

#: Part of the messages of batchgenerators (data loading) and of nnU-Net (export of predictions).
_COMPLAINT = "background workers are no longer alive"


@contextmanager
def explained_failures(trainer: Any, explain: Callable[[Any], str]) -> Iterator[None]:
    """Turn the complaint about dead workers into an error with cause and cure, which the log gets too.

    Args:
        trainer: that runs.
        explain: :func:`loading_failure` or :func:`export_failure`.

    Raises:
        RunError: in place of the complaint.
    """
    try:
        yield
    except RuntimeError as error:
        if _COMPLAINT not in str(error):
            raise
        trainer.print_to_log_file("A background worker died; looking for the cause ...")
        text = explain(trainer)
        trainer.print_to_log_file(text)
        raise RunError(text) from error


def export_failure(_trainer: Any) -> str:
    """Explain the death of a process that resamples and writes the predictions of nnU-Net's validation."""
    return (
        "a process that resamples and writes the validation's predictions was ended from outside, almost always "
        f"because memory ran out ({_memory()}). The training is finished and saved: repeat the validation with "
        "nnUNet_def_n_proc=1 and --val"
    )


def worker_processes(*augmenters: Any) -> list[Any]:
    """Return the processes behind nnU-Net's augmenters; none where they load in the main process.

    An augmenter forgets its processes when one dies, so they are noted while all is well.
    """
    return [process for augmenter in augmenters for process in getattr(augmenter, "_processes", [])]


def loading_failure(trainer: Any) -> str:
    """Find out why a worker of the data loading died: its signal, a damaged case, or an error that can be repeated."""
    cure = (
        "Set nnUNet_n_proc_DA to a smaller number of workers, or to 0: then the main process loads the data and shows "
        "every error as it is"
    )
    processes = trainer.worker_processes
    signals = sorted({-p.exitcode for p in processes if p.exitcode is not None and p.exitcode < 0})
    # Signal 15 is how batchgenerators ends the workers that are left.
    if killed := [number for number in signals if number != 15]:
        reason = "almost always because memory ran out" if killed == [9] else "which is a crash in compiled code"
        return (
            f"a background worker of the data loading was ended by signal {killed[0]}, {reason} ({_memory()}). {cure}"
        )
    if found := _first_damaged_case(trainer):
        return (
            f"a background worker of the data loading stopped at {found}. Preprocess this data set again "
            "(nnUNetv2_preprocess), or repair the file"
        )
    try:
        for loader in (trainer.dataloader_train, trainer.dataloader_val):
            if loader is not None:
                for _ in range(3):
                    next(loader.generator)
    except Exception as error:
        return (
            f"the data loading fails in the main process too: {type(error).__name__}: {error}. The worker's own "
            "traceback stands further up"
        )
    return (
        "a background worker of the data loading ended without leaving a reason that can be found again: every case "
        "can be read and a batch can be made. If no traceback stands further up, it was ended from outside, almost "
        f"always because memory ran out ({_memory()}). {cure}"
    )


def _first_damaged_case(trainer: Any) -> str | None:
    for dataset in trainer.get_tr_and_val_datasets():
        for name in dataset.identifiers:
            try:
                data, seg, *_ = dataset.load_case(name)
                data[:], seg[:]
            except Exception as error:
                return f"case {name}: {type(error).__name__}: {error} (in {dataset.source_folder})"
    return None


def _memory() -> str:
    try:
        page = os.sysconf("SC_PAGE_SIZE") / 2**30
        free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    except (AttributeError, ValueError, OSError):  # not on this operating system
        return "see your system's monitor"
    return f"{free:.1f} of {total:.1f} GiB are free now"
