"""NumPy ``.npz`` archives: headers checked against the archive, no pickle, and one item of an array at a time.

`numpy.load` unpacks a whole array; the largest sets hold 12 GB. `ItemReader` reads forward and keeps one item.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from data_prep.errors import CaseError, ImageReadError

#: deflate cannot compress more than this
_MAX_RATIO = 1032
_MAX_ITEM_BYTES = 256 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ArrayHeader:
    """What an array of an archive claims to be, and where its data begin in the unpacked member."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def item_bytes(self) -> int:
        """Size of one item along the first axis."""
        size = self.dtype.itemsize
        for length in self.shape[1:]:
            size *= length
        return size


def read_headers(path: Path) -> dict[str, ArrayHeader]:
    """Names and headers of all arrays, each compared with the size of its member.

    Raises:
        ImageReadError: not an archive of arrays, an array of objects, or sizes that are not possible.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            if len(set(names)) != len(names) or any(not name.endswith(".npy") for name in names):
                raise ImageReadError("damaged-archive", "the archive holds other things than arrays, or one twice")
            headers = {}
            for info in infos:
                with archive.open(info) as file:
                    headers[info.filename[:-4]] = _read_header(file, info)
            return headers
    except ImageReadError:
        raise
    except Exception as error:  # zipfile and numpy raise a dozen classes for damaged input
        raise ImageReadError("damaged-archive", "the file is not a readable npz archive") from error


def _read_header(file: IO[bytes], info: zipfile.ZipInfo) -> ArrayHeader:
    version = npy.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = npy.read_array_header_2_0(file)
    else:
        raise ImageReadError("damaged-archive", "an array has an unknown version of the format")
    if dtype.hasobject:
        raise ImageReadError("unsafe-array", "an array of Python objects would run code when it is read; it is refused")
    if fortran and len(shape) > 1:
        raise ImageReadError("damaged-archive", "an array is stored in Fortran order; save it again in C order")
    header = ArrayHeader(tuple(int(n) for n in shape), dtype, file.tell())
    count = header.item_bytes * (header.shape[0] if header.shape else 1)
    if not header.shape or min(header.shape) < 0 or header.offset + count != info.file_size:
        raise ImageReadError("damaged-archive", "an array has another size than its header says")
    if info.file_size > info.compress_size * _MAX_RATIO + _CHUNK:
        raise ImageReadError("damaged-archive", "an array unpacks to more than deflate can")
    return header


def first_damaged(path: Path) -> str:
    """Name of the first array whose checksum does not fit, or an empty string; reads everything, keeps nothing.

    The checksum stands at the end of an array, so a reader of single items would meet it too late.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as file:
                    try:
                        while file.read(_CHUNK):
                            pass
                    except (OSError, EOFError, zlib.error, zipfile.BadZipFile):
                        return info.filename
    except (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        return path.name
    return ""


def read_small(path: Path, name: str, header: ArrayHeader, max_bytes: int) -> np.ndarray:
    """A whole array.

    Raises:
        ImageReadError: larger than `max_bytes`, or damaged.
    """
    count = header.item_bytes * header.shape[0]
    if count > max_bytes:
        raise ImageReadError("too-large", f"{count} bytes, the limit is {max_bytes}")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            data = file.read()
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise ImageReadError("damaged-archive", "the labels cannot be read") from error


class ItemReader:
    """Items of one array, cheapest in ascending order: going back means unpacking from the start.

    Args:
        path: of the archive.
        name: of the array.
    """

    def __init__(self, path: Path, name: str) -> None:
        headers = read_headers(path)
        if name not in headers:
            raise ImageReadError("missing-array", "the archive lacks the array")
        self.header = headers[name]
        if self.header.item_bytes > _MAX_ITEM_BYTES:
            raise ImageReadError("too-large", f"{self.header.item_bytes} bytes per item")
        self._archive = zipfile.ZipFile(path)
        self._name = f"{name}.npy"
        self._file: IO[bytes] | None = None
        self._next = 0

    def read(self, index: int) -> np.ndarray:
        """Item `index`.

        Raises:
            ImageReadError: there is none, or the archive is damaged before its end.
        """
        if not 0 <= index < self.header.shape[0]:
            raise ImageReadError("missing-item", f"item {index} of an array of {self.header.shape[0]}")
        size = self.header.item_bytes
        try:
            if self._file is None or index < self._next:
                if self._file is not None:
                    self._file.close()
                self._file = self._archive.open(self._name)
                self._next = 0
                self._skip(self.header.offset)
            self._skip((index - self._next) * size)
            data = self._file.read(size)
            self._next = index + 1
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            self._file = None
            raise ImageReadError("damaged-archive", f"the array breaks off before item {index}") from error
        if len(data) != size:
            self._file = None
            raise ImageReadError("damaged-archive", f"the array breaks off before item {index}")
        return np.frombuffer(data, self.header.dtype).reshape(self.header.shape[1:])

    def _skip(self, count: int) -> None:
        assert self._file is not None
        while count > 0:
            chunk = self._file.read(min(count, _CHUNK))
            if not chunk:
                raise EOFError
            count -= len(chunk)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._archive.close()


_readers: dict[tuple[str, int, int, str], ItemReader] = {}


def shared_reader(path: Path, name: str) -> ItemReader:
    """The reader of an array that this process keeps open from case to case; one at a time.

    Raises:
        ImageReadError: see `ItemReader`.
    """
    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns, name)
    if key not in _readers:
        close_readers()
        _readers[key] = ItemReader(path, name)
    return _readers[key]


def close_readers() -> None:
    """Close what `shared_reader` keeps open in this process."""
    while _readers:
        _readers.popitem()[1].close()


def check_names(headers: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise `CaseError` when an array is missing."""
    missing = [name for name in wanted if name not in headers]
    if missing:
        raise CaseError("missing-array", f"the archive lacks {', '.join(missing)}")
