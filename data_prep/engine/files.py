"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, text: str | bytes) -> None:
    """Write under a temporary name, flush to disk, rename; an equal file is left alone."""
    data = printable(text).encode() if isinstance(text, str) else text
    try:
        if path.stat().st_size == len(data) and path.read_bytes() == data:
            return
    except OSError:
        pass
    with _replacing(path) as file:
        file.write(data)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """`write_whole` for text that is too long to be in memory; an equal file is replaced by itself."""
    with _replacing(path) as file:
        for line in lines:
            file.write(f"{printable(line)}\n".encode())


def printable(text: str) -> str:
    """`text` with what is no text written out (``\\udcff``): names of files need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its place when the body has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power loss, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal checksum of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Delete temporary files and folders of an earlier run whose names start with `prefix`."""
    for path in folder.glob(f"{prefix}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
