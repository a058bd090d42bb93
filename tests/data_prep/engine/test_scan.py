"""Facts of files: the same by one process and by several, kept between runs, and with progress."""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
import time
from pathlib import Path

import pytest

from data_prep import tree as tree_module
from data_prep.dicom import headers
from data_prep.engine import progress, scan
from data_prep.engine.files import sha256
from data_prep.engine.scan import Scanner
from data_prep.sources.dicom import Dicom
from data_prep.tree import Tree
from tests.data_prep.dicom_factories import write_series
from tests.data_prep.factories import convert_tree, tree_bytes


@pytest.fixture
def folder(tmp_path):
    """Two series, a damaged file, one that is no DICOM, and a name that is no text."""
    write_series(tmp_path / "in" / "a", 6)
    write_series(tmp_path / "in" / "b", 5, series="b", seed=3)
    path = tmp_path / "in" / "a" / "IM0002"
    (tmp_path / "in" / "damaged.dcm").write_bytes(path.read_bytes()[:700])
    (tmp_path / "in" / "note.txt").write_text("no image")
    if sys.platform == "linux":
        os.rename(tmp_path / "in/b/IM0000", os.fsencode(tmp_path / "in/b") + b"/IM\xff")
    return tmp_path / "in"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_two_processes_read_what_one_reads_in_the_same_order(folder, monkeypatch):
    files = _files(folder)
    expected = [headers.read_facts(path) for path in files]
    assert list(Scanner(1)(files, headers.read_facts, ())) == expected
    asked = []
    original = scan.read_isolated
    monkeypatch.setattr(scan, "read_isolated", lambda *message: asked.append(1) or original(*message))
    monkeypatch.setattr(scan, "PAYS_FROM", 1)
    monkeypatch.setattr(scan, "CHUNK", 3)
    assert list(Scanner(2)(files, headers.read_facts, ())) == expected
    assert len(asked) == -(-len(files) // 3)


def test_data_set_of_two_scanning_processes_is_that_of_one(folder, tmp_path, monkeypatch, capsys):
    convert_tree(Dicom(), folder, tmp_path / "one" / "out")
    monkeypatch.setattr(scan, "PAYS_FROM", 1)
    convert_tree(Dicom(), folder, tmp_path / "two" / "out", engine="process", workers=2)
    assert tree_bytes(tmp_path / "one" / "out") == tree_bytes(tmp_path / "two" / "out")


def test_function_that_no_other_process_finds_is_called_here(folder, monkeypatch):
    monkeypatch.setattr(scan, "PAYS_FROM", 1)
    monkeypatch.setattr(scan, "read_isolated", lambda *_: pytest.fail("a worker was asked"))
    assert sum(Scanner(2)(_files(folder), lambda path, factor: factor, (2,))) == 2 * len(_files(folder))


def test_file_that_a_worker_cannot_read_fails_with_its_own_error(folder, monkeypatch):
    monkeypatch.setattr(scan, "PAYS_FROM", 1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(Scanner(2)([*_files(folder), folder / "nowhere"], sha256, ()))


def test_worker_that_dies_costs_no_file(folder, monkeypatch):
    monkeypatch.setattr(scan, "PAYS_FROM", 1)
    monkeypatch.setattr(scan, "read_isolated", lambda *_: None)
    files = _files(folder)
    assert list(Scanner(2)(files, sha256, ())) == [sha256(path) for path in files]


def test_progress_comes_as_lines_while_a_case_takes_long(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    with progress.progress("cases", 4, 1) as tick:
        time.sleep(0.12)
        tick(True)
        time.sleep(0.12)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("1/4 cases, 0 failed") and "none finished yet" in lines[0]
    assert lines[-1].startswith("2/4 cases, 1 failed") and lines[-1].endswith("s left")


def test_scan_shows_its_progress(folder, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    list(Scanner(1)(_files(folder), lambda path: time.sleep(0.01), ()))
    total = len(_files(folder))
    assert f"/{total} files, 0 failed" in capsys.readouterr().err


def test_progress_is_a_bar_on_a_terminal(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(Scanner(1)(_files(folder), headers.read_facts, ()))
    assert f"{len(_files(folder))}/{len(_files(folder))}" in capsys.readouterr().err


def test_dry_run_fills_the_cache_and_the_run_uses_it(folder, tmp_path, monkeypatch, capsys):
    assert convert_tree(Dicom(), folder, tmp_path / "out", dry_run=True) == 0
    assert "is kept for the run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    private = tmp_path / "private-out"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert [path.name for path in private.iterdir()] == ["index-1-of-1.sqlite"]
    monkeypatch.setattr(headers, "read_facts", lambda path: pytest.fail("a header was read again"))
    assert convert_tree(Dicom(), folder, tmp_path / "out", dry_run=True) == 0
    assert convert_tree(Dicom(), folder, tmp_path / "out") == 3  # the damaged file


def test_dry_run_works_where_nothing_can_be_kept(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert convert_tree(Dicom(), folder, tmp_path / "out", dry_run=True, private=tmp_path / "file" / "private") == 0
    assert "2 cases" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["locked", "damaged", "cut"])
def test_cache_that_cannot_be_used_is_no_obstacle(folder, tmp_path, monkeypatch, capsys, state):
    convert_tree(Dicom(), folder, tmp_path / "out", dry_run=True)
    index = tmp_path / "private-out" / "index-1-of-1.sqlite"
    other = sqlite3.connect(index)
    if state == "locked":
        other.execute("BEGIN EXCLUSIVE")
    elif state == "damaged":
        index.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20)
    else:
        index.write_bytes(index.read_bytes()[:5000])
    monkeypatch.setattr(tree_module, "_LOCK_SECONDS", 0.05)
    assert convert_tree(Dicom(), folder, tmp_path / "out") == 3
    other.close()
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2


def test_fact_that_changed_is_read_again(tmp_path):
    path = tmp_path / "in" / "file"
    path.parent.mkdir()
    for content in ("one", "other"):
        path.write_text(content)
        tree = Tree([tmp_path / "in"], tmp_path / "index.sqlite", Scanner())
        tree.read_facts(["file"], "v1", Path.read_text)
        assert tree.facts("file", "v1", Path.read_text) == content and tree.num_facts == 1
        assert tree.facts("file", "v2", len_of) == len(content) and tree.num_facts == 2
        tree.close()


def len_of(path: Path) -> int:
    return len(path.read_text())
