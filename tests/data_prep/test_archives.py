"""Hostile archives: nothing outside the folder, nothing overwritten, nothing unpacked by halves into a final place."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import pytest

from data_prep.archives import unpack
from data_prep.errors import ArchiveError
from data_prep.sources.decathlon import Decathlon
from tests.data_prep.factories import convert_tree, decathlon_tree

NAMES = {
    "parent": "../evil", "parent-inside": "a/../../evil", "parent-deep": "a/b/../../../evil", "absolute": "/tmp/evil",
    "double-slash": "//tmp/evil", "drive": "C:/evil", "drive-relative": "C:evil", "drive-lower": "d:\\evil",
    "backslash": "..\\evil", "backslash-inside": "a\\..\\..\\evil", "unc": "\\\\server\\share\\evil",
    "nul": "a\x00b", "stream": "file.txt:stream", "device": "con", "device-ending": "aux.txt", "device-com": "a/COM1",
    "device-lpt": "lpt9.dcm", "control": "a\nb", "tab": "a\tb", "escape": "a\x1b[2J", "long-part": "x" * 300,
    "long-name": "/".join(["y" * 90] * 30), "fullwidth-dots": "\uff0e\uff0e/evil", "fullwidth-slash": "..\uff0fevil",
    "only-dots": "..", "dot-end": "a/..", "two-dot-leader": "\u2025/evil",
}  # fmt: skip
PAIRS = {
    "same": ("a", "a"), "case": ("A.txt", "a.txt"), "case-folder": ("Dir/x", "dir/X"), "unicode": ("\u00e9", "e\u0301"),
    "ligature": ("\ufb01", "fi"), "file-then-folder": ("a", "a/b"), "folder-then-file": ("a/b", "a"),
    "sharp-s": ("stra\u00dfe", "STRASSE"), "kelvin": ("\u212a", "k"), "slashes": ("a/b", "a//b"),
    "dot": ("a/b", "a/./b"),
}  # fmt: skip


def _zip(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, name in enumerate(entries):
            info = zipfile.ZipInfo(f"placeholder{number}")
            info.filename = name
            archive.writestr(info, b"evil")
    return path


def _tar(path, entries):
    with tarfile.open(path, "w") as archive:
        for name in entries:
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
    return path


def _refused(path, tmp_path, **limits):
    before = {p for p in tmp_path.rglob("*")}
    with pytest.raises(ArchiveError):
        unpack(path, tmp_path / "out", **limits)
    new = {p for p in tmp_path.rglob("*")} - before
    assert all(p == tmp_path / "out" or (tmp_path / "out") in p.parents for p in new)


@pytest.mark.parametrize("make", [_zip, _tar], ids=["zip", "tar"])
@pytest.mark.parametrize("name", [pytest.param(value, id=key) for key, value in NAMES.items()])
def test_hostile_name_is_refused(tmp_path, make, name):
    if make is _tar and "\x00" in name:
        pytest.skip("tar cannot hold it")
    _refused(make(tmp_path / f"a.{make.__name__[1:]}", ["good", name]), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [_zip, _tar], ids=["zip", "tar"])
@pytest.mark.parametrize("names", [pytest.param(value, id=key) for key, value in PAIRS.items()])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_colliding_names_are_refused(tmp_path, make, names):
    _refused(make(tmp_path / f"a.{make.__name__[1:]}", names), tmp_path)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
    ids=["symlink", "hardlink", "character", "block", "fifo"],
)  # fmt: skip
def test_links_and_devices_in_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    _refused(tmp_path / "a.tar", tmp_path)


def test_symlink_in_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    _refused(tmp_path / "a.zip", tmp_path)


def test_bomb_and_many_entries_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(30 << 20))
    _refused(tmp_path / "bomb.zip", tmp_path, max_ratio=100)
    _refused(_zip(tmp_path / "many.zip", [str(n) for n in range(50)]), tmp_path, max_entries=40)


def test_million_empty_entries_are_refused_before_they_fill_the_memory(tmp_path):
    header = tarfile.TarInfo("x").tobuf()
    with gzip.open(tmp_path / "many.tar.gz", "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(header * 10_000)
    tracemalloc.start()
    _refused(tmp_path / "many.tar.gz", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 << 20


def test_lying_size_and_damage_are_refused(tmp_path):
    data = bytearray(_zip(tmp_path / "a.zip", ["x"]).read_bytes())
    at = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 1)
    (tmp_path / "lie.zip").write_bytes(data)
    _refused(tmp_path / "lie.zip", tmp_path)
    for name, content in {"empty.zip": b"", "cut.zip": bytes(data[: len(data) // 2]), "not.tar": b"x" * 600}.items():
        (tmp_path / name).write_bytes(content)
        _refused(tmp_path / name, tmp_path)
    (tmp_path / "cut.tar.gz").write_bytes(zlib.compress(b"x" * 999))
    _refused(tmp_path / "cut.tar.gz", tmp_path)


def test_archive_of_a_download_converts_like_its_folder(tmp_path):
    root = decathlon_tree(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "task.zip", "w") as archive:
        for path in root.rglob("*"):
            if path.is_file():
                archive.write(path, path.relative_to(root.parent))
    out = tmp_path / "Dataset004_Toy"
    assert convert_tree(Decathlon(), tmp_path / "task.zip", out) == 0
    assert len(list((out / "imagesTr").iterdir())) == 6
    assert not list((tmp_path / "private-Dataset004_Toy").glob("unpacked*"))
