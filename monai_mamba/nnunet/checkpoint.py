"""Checkpoints that survive being killed while they are written."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from monai_mamba.errors import CheckpointError

_LOGGER = logging.getLogger(__name__)


def previous_path(path: str | os.PathLike[str]) -> Path:
    """Name under which the checkpoint before the newest is kept: ``checkpoint_latest.previous.pth``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def replace_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Write a file under a temporary name, then put it in place of the old one, which is kept beside it.

    At every moment ``path`` is absent (before the first call), the old file or the new file, each whole.

    Args:
        path: final name.
        write: called with the temporary name; must leave a whole file there.

    Raises:
        OSError: if the disk is full or the folder is not writable; the old file is then untouched.
    """
    path = Path(path)
    # A fixed name, so that what a killed process left behind is overwritten by the next save.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(str(temporary))
        _flush(temporary)
        if path.exists():
            _keep(path, previous_path(path))
        os.replace(temporary, path)
        _flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _keep(path: Path, previous: Path) -> None:
    staged = previous.with_name(f".{previous.name}.tmp")
    staged.unlink(missing_ok=True)
    try:
        os.link(path, staged)  # the file keeps its final name all the while
    except OSError:  # a file system without hard links
        shutil.copyfile(path, staged)
        _flush(staged)
    os.replace(staged, previous)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_or_previous(path: str | os.PathLike[str], device: torch.device) -> dict:
    """Load a training checkpoint written by our trainers, or the one before it if that file is damaged.

    Only tensors and plain values are unpickled (``weights_only=True``).

    Raises:
        CheckpointError: if neither file can be loaded.
    """
    reasons = []
    for candidate in (Path(path), previous_path(path)):
        if not candidate.exists():
            reasons.append(f"{candidate}: does not exist")
            continue
        try:
            with _safe_globals():
                checkpoint = torch.load(candidate, map_location=device, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged or foreign file
            reasons.append(f"{candidate}: {_first_line(error)}")
            continue
        if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
            reasons.append(f"{candidate}: not a checkpoint of nnU-Net (no `network_weights`)")
            continue
        if reasons:
            _LOGGER.warning("using %s instead: %s", candidate, "; ".join(reasons))
        return checkpoint
    raise CheckpointError("no checkpoint could be loaded: " + "; ".join(reasons))


def _safe_globals():
    """Allow what nnU-Net stores besides tensors and plain values: numpy numbers in its log, the device."""
    kinds = (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)
    rebuild = np.float64(0).__reduce__()[0]  # its module was renamed in numpy 2
    return torch.serialization.safe_globals([rebuild, np.dtype, torch.device, *(type(np.dtype(k)) for k in kinds)])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
