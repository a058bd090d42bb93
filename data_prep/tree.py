"""The input as the engine sees it: a sorted list of files, tables with counted rows, and cached header facts."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.errors import DatasetError, UsageError
from data_prep.model import Json, Ref

#: larger tables than this are not tables of a data set
MAX_TABLE_BYTES = 1 << 30
#: seconds to wait for another run that writes to the index
_LOCK_SECONDS = 2.0
#: paths, function of a path and further arguments, these -> values in the same order
ReadMany = Callable[[Sequence[Path], Callable[..., Json], tuple[Json, ...]], Iterable[Json]]
_JUNK_NAMES = {".ds_store", "thumbs.db", "desktop.ini", ".gitkeep", ".directory"}


@dataclass(frozen=True, slots=True)
class Stamp:
    """Size and time of a file; when both stay the same, the content is taken to be the same."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Row:
    """One data row of a table: ``row["column"]``.

    Args:
        ref: name of the row in the report.
        columns: column to position; shared by all rows of a table.
        cells: outer blanks and line breaks removed.
        is_whole: the row has as many cells as the header; blank cells beyond it do not count.
    """

    ref: Ref
    columns: Mapping[str, int]
    cells: tuple[str, ...]
    is_whole: bool = True

    def __getitem__(self, column: str) -> str:
        try:
            return self.cells[self.columns[column]]
        except IndexError:
            raise KeyError(column) from None

    def get(self, column: str, default: str = "") -> str:
        try:
            return self[column]
        except KeyError:
            return default


class Tree:
    """All files below the input folders, sorted, with stamps.

    Paths are strings relative to the input with forward slashes; with more than one input folder they start with
    ``input1/``, ``input2/`` and so on. Links to folders are not followed and are reported.

    Args:
        roots: folders (or single files) to read.
        index: SQLite file that caches header facts between runs; ``None`` keeps nothing.
        read_many: reads facts of many files, see `data_prep.engine.scan.Scanner`; else they are read one by one.

    Raises:
        UsageError: a root does not exist.
    """

    def __init__(
        self, roots: Sequence[os.PathLike[str] | str], index: Path | None = None, read_many: ReadMany | None = None
    ) -> None:
        if not roots:
            raise UsageError("no input folder was given; name at least one.")
        self.roots = [Path(root).absolute() for root in roots]
        for root in self.roots:
            if not root.exists():
                raise UsageError(f"the input {root} does not exist; check the path.")
        self._stamps: dict[str, Stamp] = {}
        self.linked_folders: list[str] = []
        self.unreadable: list[str] = []
        for number, root in enumerate(self.roots, 1):
            self._walk(root, f"input{number}/" if len(self.roots) > 1 else "")
        self._stamps = dict(sorted(self._stamps.items()))
        self._tables: dict[str, list[Row]] = {}
        self._cache = FactCache(index)
        self._read_many = read_many

    def _walk(self, root: Path, prefix: str) -> None:
        if root.is_file():
            self._add(prefix + root.name, root)
            return
        stack = [(str(root), prefix)]
        while stack:
            folder, before = stack.pop()
            try:
                entries = list(os.scandir(folder))
            except OSError:
                self.unreadable.append(before.rstrip("/") or ".")
                continue
            for entry in entries:
                name = before + entry.name
                if entry.is_dir(follow_symlinks=False):
                    stack.append((entry.path, name + "/"))
                elif entry.is_symlink() and entry.is_dir():
                    self.linked_folders.append(name)
                else:
                    self._add(name, entry)

    def _add(self, name: str, entry: os.DirEntry[str] | Path) -> None:
        try:
            status = entry.stat()
            self._stamps[name] = Stamp(status.st_size, status.st_mtime_ns)
        except OSError:
            self.unreadable.append(name)

    def __contains__(self, path: str) -> bool:
        return path in self._stamps

    def __len__(self) -> int:
        return len(self._stamps)

    @property
    def files(self) -> list[str]:
        """Every file, sorted, junk included."""
        return list(self._stamps)

    def stamp(self, path: str) -> Stamp:
        return self._stamps[path]

    def absolute(self, path: str) -> Path:
        """Where the tree path `path` lies on disk.

        Raises:
            KeyError: `path` is not a file of this tree; paths read from files are thereby never followed outside.
        """
        if path not in self._stamps:
            raise KeyError(path)
        if len(self.roots) == 1:
            root, rest = self.roots[0], path
        else:
            head, rest = path.split("/", 1)
            root = self.roots[int(head.removeprefix("input")) - 1]
        return root if root.is_file() else root.joinpath(*PurePosixPath(rest).parts)

    def match(self, *patterns: str) -> list[str]:
        """Files that are not junk and match one of the patterns.

        Args:
            patterns: globs against the whole tree path, where ``*`` stops at a slash and ``**/`` is any folder or
                none, as in `pathlib`; case matters.
        """
        expressions = [_compile(pattern) for pattern in patterns]
        return [path for path in self._stamps if not is_junk(path) and any(e.fullmatch(path) for e in expressions)]

    def one(self, *patterns: str, what: str) -> str:
        """The only match of `patterns`.

        Raises:
            UsageError: none or several match; `what` says in the message what was looked for.
        """
        found = self.match(*patterns)
        if len(found) != 1:
            raise UsageError(
                f"expected exactly one {what} ({' or '.join(patterns)}) in the input, found {len(found)}; "
                + ("check that the input is the unpacked download." if not found else "remove all but one.")
            )
        return found[0]

    def read_bytes(self, path: str, limit: int = MAX_TABLE_BYTES) -> bytes:
        """Content of a small file.

        Raises:
            DatasetError: larger than `limit` or unreadable.
        """
        if self.stamp(path).size > limit:
            raise DatasetError(f"{PurePosixPath(path).name} has {self.stamp(path).size} bytes, more than {limit}.")
        try:
            return self.absolute(path).read_bytes()
        except OSError as error:
            raise DatasetError(f"{PurePosixPath(path).name} cannot be read: {error.strerror}.") from error

    def json(self, path: str) -> Json:
        """Parsed JSON file.

        Raises:
            DatasetError: not valid JSON in UTF-8.
        """
        try:
            return json.loads(self.read_bytes(path).decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{PurePosixPath(path).name} is not valid JSON.") from error

    def table(
        self,
        path: str,
        *,
        columns: Sequence[str] | None = None,
        required: Sequence[str] = (),
        delimiter: str = ",",
        rename: Mapping[str, str] | None = None,
    ) -> list[Row]:
        """Rows of a CSV file; every row must get a verdict (a case's `refs`, or `Book.skip`, or `Book.fail`).

        Cells lose outer blanks and line breaks, header names lose outer blanks; quoted line breaks are understood.
        `data_prep.tables.read_rows` does this and sorts out rows that are cut short.

        Args:
            path: tree path of the file.
            columns: column names for a file *without* a header row.
            required: columns that must be there.
            delimiter: of the cells.
            rename: header names of some releases to those by which the columns are asked for.

        Raises:
            DatasetError: not UTF-8 or Latin-1 text, a required column is missing, or a header name occurs twice.
        """
        name = PurePosixPath(path).name
        text = self._text(path)
        rows: list[Row] = []
        try:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
            header = list(columns) if columns is not None else [cell.strip() for cell in next(reader, [])]
            header = [(rename or {}).get(column, column) for column in header]
            if len(set(header)) != len(header):
                raise DatasetError(f"{name} has a column name that occurs twice.")
            missing = [column for column in required if column not in header]
            if missing:
                raise DatasetError(f"{name} lacks the columns {missing}; it has {header}.")
            columns_of = {column: number for number, column in enumerate(header)}
            # Most cells of large tables are a few values again and again.
            known: dict[str, str] = {}
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                clean = (" ".join(cell.split()) for cell in cells[: len(header)])
                values = tuple(known.setdefault(cell, cell) if len(cell) < 32 else cell for cell in clean)
                is_whole = len(cells) >= len(header) and not any(cell.strip() for cell in cells[len(header) :])
                rows.append(Row(Ref(path, "row", str(len(rows) + 1)), columns_of, values, is_whole))
        except csv.Error as error:
            raise DatasetError(f"{name} is not a valid table: {error}.") from error
        self._tables[path] = rows
        return rows

    def first_cells(self, path: str, delimiter: str = ",") -> list[str]:
        """Cells of the first line of a CSV file, to tell a header from data.

        Raises:
            DatasetError: not text, or not a table.
        """
        try:
            reader = csv.reader(io.StringIO(self._text(path).lstrip(), newline=""), delimiter=delimiter)
            return [cell.strip() for cell in next(reader, [])]
        except csv.Error as error:
            raise DatasetError(f"{PurePosixPath(path).name} is not a valid table: {error}.") from error

    def _text(self, path: str) -> str:
        data = self.read_bytes(path)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        if "\0" in text:
            raise DatasetError(f"{PurePosixPath(path).name} is not a text table: it holds NUL bytes.")
        return text

    @property
    def expected(self) -> Iterator[Ref]:
        """Every input that needs a verdict: all files, linked folders, and rows of the tables that were read."""
        for path in self._stamps:
            yield Ref(path)
        for path in sorted({*self.linked_folders, *self.unreadable} - self._stamps.keys()):
            yield Ref(path)
        for path in sorted(self._tables):
            for row in self._tables[path]:
                yield row.ref

    def facts(self, path: str, version: str, read: Callable[..., Json], *arguments: Json) -> Json:
        """``read(absolute path, *arguments)``, kept between runs while the file's stamp and `version` stay the same.

        The value must be JSON and hold nothing that identifies a person: it is written to the index. `version` names
        the arguments, too.
        """
        known = self._cache.get(path, self.stamp(path), version)
        if known is None:
            known = [read(self.absolute(path), *arguments)]
            self._cache.put(path, self.stamp(path), version, known)
        return known[0]

    def read_facts(self, paths: Sequence[str], version: str, read: Callable[..., Json], *arguments: Json) -> None:
        """Read the facts of many files that are not known yet: with progress, and by all workers.

        Worth it in front of a loop over `facts`, which does the same one by one.
        """
        if self._read_many is None:
            return
        missing = [path for path in paths if self._cache.get(path, self.stamp(path), version) is None]
        values = self._read_many([self.absolute(path) for path in missing], read, arguments) if missing else []
        for path, value in zip(missing, values, strict=True):
            self._cache.put(path, self.stamp(path), version, [value])

    @property
    def num_facts(self) -> int:
        """Number of facts that were read anew."""
        return self._cache.num_read

    def close(self) -> None:
        """End the cache and let go of the tables; a plan keeps what it needs of them."""
        self._cache.close()
        self._tables.clear()


class FactCache:
    """Header facts by path, stamp and version, in SQLite; a damaged cache is thrown away, not trusted.

    The file is made when the first fact is kept. Where it cannot be made or is in use by another run, facts are kept
    for this run alone.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._pending = 0
        self.num_read = 0

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            try:
                self._db = self._connect()
            except (sqlite3.DatabaseError, OSError):
                self._discard()
        assert self._db is not None
        return self._db

    def _connect(self) -> sqlite3.Connection:
        if self._path is not None:
            # Paths of the input stand in it.
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        db = sqlite3.connect(
            ":memory:" if self._path is None else self._path, isolation_level="DEFERRED", timeout=_LOCK_SECONDS
        )
        db.execute("CREATE TABLE IF NOT EXISTS facts (path BLOB PRIMARY KEY, stamp TEXT, value TEXT)")
        db.execute("SELECT * FROM facts LIMIT 1").fetchone()
        return db

    def _discard(self) -> None:
        """Go on with an empty cache, in the place of a damaged file where that is possible."""
        if self._db is not None:
            self._db.close()
        try:
            if self._path is not None:
                self._path.unlink(missing_ok=True)
            self._db = self._connect()
        except (sqlite3.DatabaseError, OSError):
            self._path = None
            self._db = self._connect()

    def get(self, path: str, stamp: Stamp, version: str) -> list[Json] | None:
        """The fact in a list, or ``None`` when it is not known."""
        if self._db is None and (self._path is None or not self._path.exists()):
            return None
        try:
            found = self._open().execute("SELECT stamp, value FROM facts WHERE path = ?", (_key(path),)).fetchone()
            known: list[Json] | None = json.loads(found[1]) if found and found[0] == _mark(stamp, version) else None
        except sqlite3.OperationalError:  # in use
            return None
        except (sqlite3.DatabaseError, ValueError):
            self._discard()
            return None
        return known

    def put(self, path: str, stamp: Stamp, version: str, value: list[Json]) -> None:
        self.num_read += 1
        row = _key(path), _mark(stamp, version), json.dumps(value)
        try:
            self._open().execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", row)
        except sqlite3.DatabaseError:  # in use by another run, or the disk is full
            self._path = None
            if self._db is not None:
                self._db.close()
            self._db = self._connect()
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", row)
        self._pending += 1
        if self._pending >= 5000:
            self._commit()

    def _commit(self) -> None:
        self._pending = 0
        if self._db is not None:
            with contextlib.suppress(sqlite3.DatabaseError):
                self._db.commit()

    def close(self) -> None:
        self._commit()
        if self._db is not None:
            self._db.close()


def _key(path: str) -> bytes:
    """A name as it is on disk, where it may be no text at all."""
    return path.encode("utf-8", "surrogateescape")


def _mark(stamp: Stamp, version: str) -> str:
    return f"{stamp.size}:{stamp.mtime_ns}:{version}"


def is_junk(path: str) -> bool:
    """Whether a file is litter of an operating system: AppleDouble, ``.DS_Store``, ``__MACOSX`` and the like."""
    parts = path.split("/")
    name = parts[-1].lower()
    return name.startswith("._") or name in _JUNK_NAMES or "__MACOSX" in parts


def _compile(pattern: str) -> re.Pattern[str]:
    out = []
    position = 0
    while position < len(pattern):
        if pattern.startswith("**/", position):
            out.append("(?:[^/]+/)*")
            position += 3
        elif pattern[position] == "*":
            out.append("[^/]*")
            position += 1
        elif pattern[position] == "?":
            out.append("[^/]")
            position += 1
        elif pattern[position] == "[" and "]" in pattern[position:]:
            end = pattern.index("]", position)
            out.append(pattern[position : end + 1])
            position = end + 1
        else:
            out.append(re.escape(pattern[position]))
            position += 1
    return re.compile("".join(out))
