"""Tables of a download: rows that can be used, and a verdict for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_prep.book import Book
from data_prep.tree import Row, Tree


def read_rows(
    tree: Tree,
    book: Book,
    path: str,
    *,
    required: Sequence[str],
    columns: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    delimiter: str = ",",
) -> list[Row]:
    """Rows of a CSV file with as many cells as its header; the others fail as ``damaged-row``.

    The table itself gets the verdict ``ok: metadata``; the rows returned need theirs from the source.

    Args:
        tree: the download.
        book: takes the verdicts.
        path: tree path of the table.
        required: columns that must be there.
        columns: column names for a file without a header row.
        rename: header names of some releases to those of `required`.
        delimiter: of the cells.

    Raises:
        DatasetError: not a table, or a required column is missing.
    """
    rows = tree.table(path, columns=columns, required=required, delimiter=delimiter, rename=rename)
    book.use(path)
    for row in rows:
        if not row.is_whole:
            book.fail(row.ref, "damaged-row", "the row has fewer or more cells than the table has columns")
    return [row for row in rows if row.is_whole]
