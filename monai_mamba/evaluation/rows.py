"""Reading CSV tables that come from outside, and refusing them by file, case and column."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from monai_mamba.errors import DatasetError


def read_rows(path: os.PathLike[str] | str, what: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header, whose column ``case`` is filled.

    Args:
        path: the file.
        what: what it should be, for messages.

    Raises:
        DatasetError: if it cannot be read, is empty, has a column twice, or a row without a case or with more cells
            than the header.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot be read as {what}: {error}") from error
    if not rows:
        raise DatasetError(f"{path}: holds no predictions" if columns else f"{path}: is empty, holds no predictions")
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise DatasetError(f"{path}: has the column `{twice[0]}` twice")
    if "case" not in columns:
        raise DatasetError(f"{path}: needs the column `case`, has {', '.join(columns)}")
    for number, row in enumerate(rows, start=2):
        if None in row:
            raise DatasetError(f"{path}: row {number} has more cells than the header")
        if not row["case"]:
            raise DatasetError(f"{path}: row {number} has no case")
    return rows


def read_numbers(
    rows: Sequence[dict[str, str]], columns: Sequence[str], path: os.PathLike[str] | str, *, may_be_empty: bool = False
) -> np.ndarray:
    """Return columns as numbers ``(rows, columns)``.

    Args:
        rows: from :func:`read_rows`.
        columns: names.
        path: the file, for messages.
        may_be_empty: give NaN for empty cells instead of refusing them.

    Raises:
        DatasetError: if a cell holds no finite number.
    """
    values = np.empty((len(rows), len(columns)))
    for index, row in enumerate(rows):
        for position, name in enumerate(columns):
            text = row[name]
            if may_be_empty and not text:
                values[index, position] = np.nan
                continue
            try:
                values[index, position] = float(text)
            except (TypeError, ValueError):
                raise DatasetError(
                    f"{path}: `{name}` must be numbers in every row, case {row['case']} has {text or 'nothing'!r}"
                ) from None
            if not np.isfinite(values[index, position]):
                raise DatasetError(
                    f"{path}: `{name}` must be finite numbers in every row, case {row['case']} has {text}"
                )
    return values


def read_patients(path: os.PathLike[str] | str, cases: Sequence[str]) -> dict[str, str]:
    """Return the patient of each case out of a table with the columns ``case`` and ``patient``.

    Raises:
        DatasetError: if a case is missing or has two patients.
    """
    patients: dict[str, str] = {}
    for row in read_rows(path, "a table of patients"):
        if not row.get("patient"):
            raise DatasetError(f"{path}: needs the column `patient`, filled for every case")
        if patients.setdefault(row["case"], row["patient"]) != row["patient"]:
            raise DatasetError(f"{path}: the case {row['case']} has two patients")
    missing = [case for case in cases if case not in patients]
    if missing:
        raise DatasetError(
            f"{path}: has no patient for the case {missing[0]}; its first case is {next(iter(patients))}"
        )
    return {case: patients[case] for case in cases}
