"""Writing files so that a final name always means a whole file."""

from __future__ import annotations

import os
import re
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


def case_file(folder: os.PathLike[str] | str, case: str, suffix: str) -> Path:
    """Return where the output of a case lies: ``folder / case`` without the suffix of an image, plus ``suffix``.

    Cases of a folder of images are called by their path in it; the subfolders are made. What else a data list may call
    a case never leads out of ``folder``.
    """
    name = re.sub(r"\.(nii(\.gz)?|png|jpe?g|bmp|tiff?|dcm)$", "", case, flags=re.IGNORECASE)
    parts = [re.sub(r"[^\w.+@=, -]", "_", part) for part in re.split(r"[/\\]", name)]
    parts = [part for part in parts if part.strip(". ")] or ["case"]
    path = Path(folder).joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + suffix)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def whole_folder(path: os.PathLike[str] | str) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; rename it to ``path`` when the block ends without an error.

    Raises:
        FileExistsError: if ``path`` is there and not an empty folder.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"`{path}` exists and is not empty; give a new folder or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            path.rmdir()  # empty; Windows does not rename over it
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
