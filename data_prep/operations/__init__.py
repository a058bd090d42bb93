"""Operations make one output file from input files; they run in workers, and a plan names them.

An operation is a function of a `Job` that writes ``job.output`` and returns an `Outcome`. It decides nothing that the
plan could have decided, opens no file but its inputs, and raises `CaseError` when the case cannot be made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

from data_prep.errors import CaseError
from data_prep.geometry import Grid
from data_prep.model import Json

Link = Literal["copy", "hardlink", "symlink", "dataset-json"]


@dataclass(frozen=True)
class Job:
    """What an operation gets.

    Args:
        inputs: absolute paths, in the order of `Make.inputs`.
        output: temporary file to write; it does not exist yet.
        final: where the file will lie in the end.
        params: of the `Make`.
        link: how an input that can be used as it is comes into the data set; see `place`.
        personal: headers of the input may hold names; nothing of them may be copied.
    """

    inputs: tuple[Path, ...]
    output: Path
    final: Path
    params: Mapping[str, Json] = field(default_factory=dict)
    link: Link = "copy"
    personal: bool = False


@dataclass(frozen=True)
class Outcome:
    """What an operation reports.

    Args:
        grid: voxel grid of the file that was made.
        labels: values found in a label map.
        is_resampled: the voxels were interpolated onto another grid, which the user asked for.
        notes: what else was done to the data; no identity.
        record: numbers of what was done, for the manifest; no identity.
        linked: the input that stands for the output when nothing was written (link ``dataset-json``).
    """

    grid: Grid | None = None
    labels: tuple[int, ...] | None = None
    is_resampled: bool = False
    notes: tuple[str, ...] = ()
    record: tuple[Json, ...] = ()
    linked: Path | None = None


Operation = Callable[[Job], Outcome]


def operation(version: int) -> Callable[[Operation], Operation]:
    """Mark a function as an operation; a new `version` makes old results be made again."""

    def mark(function: Operation) -> Operation:
        function.operation_version = version  # type: ignore[attr-defined]
        return function

    return mark


def find_operation(name: str) -> Operation:
    """The operation ``"module:function"`` below ``data_prep``.

    Raises:
        LookupError: no such operation.
    """
    module_name, _, function_name = name.partition(":")
    module = import_module(f"data_prep.{module_name}")
    function = getattr(module, function_name, None)
    if not hasattr(function, "operation_version"):
        raise LookupError(f"data_prep has no operation {name!r}")
    return function  # type: ignore[return-value]


def place(source: Path, job: Job) -> Path | None:
    """Bring `source` to ``job.output`` unchanged, in the way the user chose.

    Returns:
        `source` when nothing was written and the data set refers to it, else ``None``.
    """
    if job.link == "dataset-json":
        return source
    if job.link == "symlink":
        job.output.symlink_to(os.path.relpath(os.path.realpath(source), os.path.realpath(job.final.parent)))
        return None
    if job.link == "hardlink":
        try:
            os.link(source, job.output)
            return None
        except OSError as error:
            raise CaseError("no-hardlink", "input and output lie on different file systems; use --link copy") from error
    with open(source, "rb") as reader, open(job.output, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())
    return None
