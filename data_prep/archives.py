"""Unpacking of zip and tar archives that cannot write outside their folder, overwrite a file or fill the disk."""

from __future__ import annotations

import errno
import os
import re
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_prep.errors import ArchiveError

MAX_ENTRIES = 4_000_000
#: so many entries may any archive have
MIN_ENTRIES = 10_000
MAX_BYTES = 4 << 40
# Images compress by 2 to 10, zero-filled masks by several hundred; deflate ends at 1032.
MAX_RATIO = 1100
_BLOCK = 1 << 20
_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    is_folder: bool
    handle: object


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive."""
    return path.name.lower().endswith(_ENDINGS)


def unpack(
    path: Path, folder: Path, *, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES, max_ratio: int = MAX_RATIO
) -> int:
    """Unpack an archive into a new folder.

    All names are checked before the first byte is written. Owners and permissions are not taken over, and every file
    gets the time of the archive, so that unpacking again changes nothing.

    Args:
        path: ``.zip``, ``.tar``, ``.tar.gz``, ``.tgz``, ``.tar.bz2`` or ``.tar.xz``.
        folder: must not exist yet.

    Returns:
        The number of files.

    Raises:
        ArchiveError: damaged, encrypted, too large, or with an entry that is absolute, leads outside, is a link or a
            device, or falls together with another one on any file system.
    """
    try:
        # An entry takes 76 bytes in a zip file and its name in a packed tar; a million empty ones would fill memory.
        max_entries = min(max_entries, MIN_ENTRIES + path.stat().st_size // 32)
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                return _extract(_zip_entries(archive, max_entries), archive.open, path, folder, max_bytes, max_ratio)
        with tarfile.open(path) as tar:
            return _extract(_tar_entries(tar, max_entries), tar.extractfile, path, folder, max_bytes, max_ratio)
    except ArchiveError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise ArchiveError("the archive is damaged or cannot be read.") from error
    except Exception as error:  # zipfile and tarfile raise a dozen different classes
        raise ArchiveError("the archive is damaged, encrypted or of an unknown kind.") from error


def _zip_entries(archive: zipfile.ZipFile, max_entries: int) -> Iterator[_Entry]:
    infos = archive.infolist()
    if len(infos) > max_entries:
        raise ArchiveError(f"the archive has more than {max_entries} entries.")
    for info in infos:
        if info.flag_bits & 1:
            raise ArchiveError("the archive is encrypted; unpack it yourself and give the folder.")
        mode = info.external_attr >> 16
        kind = stat.S_IFMT(mode)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ArchiveError("the archive holds a link or a device.")
        # orig_filename: zipfile cuts names at NUL and changes separators, which would hide what is meant.
        yield _Entry(info.orig_filename, info.file_size, info.is_dir(), info)


def _tar_entries(archive: tarfile.TarFile, max_entries: int) -> Iterator[_Entry]:
    for number, info in enumerate(archive):
        if number >= max_entries:
            raise ArchiveError(f"the archive has more than {max_entries} entries.")
        if not (info.isreg() or info.isdir()):
            raise ArchiveError("the archive holds a link or a device.")
        if info.isreg() and info.sparse is not None:
            raise ArchiveError("the archive holds a sparse file.")
        yield _Entry(info.name, info.size, info.isdir(), info)


def _extract(
    entries: Iterator[_Entry], opener: object, path: Path, folder: Path, max_bytes: int, max_ratio: int
) -> int:
    listed: list[tuple[tuple[str, ...], _Entry]] = []
    seen: dict[tuple[str, ...], bool] = {}
    total = 0
    limit = min(max_bytes, path.stat().st_size * max_ratio + _BLOCK)
    for entry in entries:
        parts = _safe_parts(entry.name)
        if not parts:
            if entry.is_folder:
                continue
            raise ArchiveError("the archive holds an entry without a name.")
        folded = tuple(unicodedata.normalize("NFKC", part).casefold() for part in parts)
        for depth in range(1, len(folded)):
            if seen.setdefault(folded[:depth], True) is False:
                raise ArchiveError("the archive holds a file and a folder of the same name.")
        if folded in seen and not (entry.is_folder and seen[folded]):
            raise ArchiveError("the archive holds two entries that are the same name on some file system.")
        seen[folded] = entry.is_folder
        if entry.size < 0:
            raise ArchiveError("the archive holds an entry of negative size.")
        total += 0 if entry.is_folder else entry.size
        if total > limit:
            raise ArchiveError("the archive unpacks to far more than its own size; it is refused as a bomb.")
        listed.append((parts, entry))
    folder.mkdir(parents=True)
    time = path.stat().st_mtime_ns
    count = 0
    for parts, entry in listed:
        target = folder.joinpath(*parts)
        if entry.is_folder:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = opener(entry.handle)  # type: ignore[operator]
        if stream is None:
            raise ArchiveError("the archive holds an entry without data.")
        _write(stream, target, entry.size)
        os.utime(target, ns=(time, time))
        count += 1
    return count


def _write(stream: IO[bytes], target: Path, size: int) -> None:
    left = size
    try:
        with stream, open(target, "xb") as file:  # x: nothing is ever overwritten
            while block := stream.read(_BLOCK):
                left -= len(block)
                if left < 0:
                    raise ArchiveError("an entry of the archive is longer than it claims.")
                file.write(block)
    except (EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ArchiveError("the archive is damaged.") from error
    if left:
        raise ArchiveError("an entry of the archive is shorter than it claims.")
    os.chmod(target, 0o644)


def _safe_parts(name: str) -> tuple[str, ...]:
    if "\x00" in name or "\\" in name:
        raise ArchiveError("the archive holds a name with a NUL character or a backslash.")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise ArchiveError("the archive holds an absolute name.")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    for part in parts:
        if part == ".." or unicodedata.normalize("NFKC", part) in ("..", "."):
            raise ArchiveError("the archive holds a name that leads outside (`..`).")
        if "/" in unicodedata.normalize("NFKC", part) or ":" in part or _DEVICES.fullmatch(part):
            raise ArchiveError("the archive holds a name that is a device or a stream on some system.")
        if len(part.encode("utf-8", "surrogateescape")) > 255 or any(ord(c) < 32 for c in part):
            raise ArchiveError("the archive holds a name that is too long or has control characters.")
    if len(name) > 2000:
        raise ArchiveError("the archive holds a name that is too long.")
    return parts
