"""Writing files so that a final name always means a whole file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: os.PathLike[str] | str) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it to ``path`` when the block ends without an error.

    The temporary name has the suffixes of ``path``, because writers such as nibabel choose the format by them.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=".writing-", suffix="".join(path.suffixes[-2:]), dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; the result gets the usual permissions.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: os.PathLike[str] | str, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_file(source: os.PathLike[str] | str, target: os.PathLike[str] | str) -> None:
    """Copy the content of ``source`` to ``target``, whole or not at all."""
    with whole_file(target) as temporary:
        shutil.copyfile(source, temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
