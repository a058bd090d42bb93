"""Rows that are cut short, renamed columns, tables without a header."""

from __future__ import annotations

import pytest

from data_prep.book import Book
from data_prep.errors import DatasetError
from data_prep.model import Ref
from data_prep.tables import read_rows
from data_prep.tree import Tree


def _read(tmp_path, text: str, **options):
    (tmp_path / "t.csv").write_text(text, newline="")
    tree = Tree([tmp_path])
    book = Book(tree)
    return read_rows(tree, book, "t.csv", **options), book, tree


@pytest.mark.parametrize(
    ("line", "is_whole"),
    [("1,2", True), ("1,2,,", True), ("1", False), ("1,2,3", False), ('1,"2\r\n"', True), ('1,"2', True)],
    ids=["whole", "blank cells behind", "short", "long", "line break in a cell", "quote left open"],
)
def test_only_whole_rows_are_used(tmp_path, line, is_whole):
    rows, book, _ = _read(tmp_path, f"a,b\r\n0,0\r\n{line}", required=["a"])
    assert [row["a"] for row in rows] == (["0", "1"] if is_whole else ["0"])
    assert book.verdicts[Ref("t.csv")].status == "ok"
    failed = {ref.item: verdict.reason for ref, verdict in book.verdicts.items() if verdict.status == "failed"}
    assert failed == ({} if is_whole else {"2": "damaged-row"})


def test_renamed_column_counts_as_the_required_one(tmp_path):
    rows, _, _ = _read(tmp_path, "breast density,x\n3,1\n", required=["breast_density"],
                       rename={"breast density": "breast_density"})  # fmt: skip
    assert rows[0]["breast_density"] == "3"


def test_missing_column_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"lacks the columns \['c'\]; it has \['a', 'b'\]"):
        _read(tmp_path, "a,b\n1,2\n", required=["a", "c"])


def test_first_cells_tell_a_header_from_data(tmp_path):
    _, _, tree = _read(tmp_path, "\ufeffx/y.png,1\nz,0\n", required=[], columns=["path", "label"])
    assert tree.first_cells("t.csv") == ["x/y.png", "1"]


@pytest.mark.parametrize(
    ("text", "cells"),
    [("a, b\r\n1,2", ["a", "b"]), ("", []), ('\n"a\nb",c\n', ["a\nb", "c"]), ("a\x00b", None), ("x" * 200_000, None)],
    ids=["header", "empty", "line break in a name", "NUL", "a field without end"],
)
def test_first_cells_of_anything_are_cells_or_one_error(tmp_path, text, cells):
    (tmp_path / "t.csv").write_text(text, newline="")
    if cells is None:
        with pytest.raises(DatasetError):
            Tree([tmp_path]).first_cells("t.csv")
    else:
        assert Tree([tmp_path]).first_cells("t.csv") == cells
