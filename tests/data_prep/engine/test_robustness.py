"""Killed, out of space, mutated: nothing half done, nothing lost, no traceback."""

from __future__ import annotations

import gzip
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.engine import worker
from data_prep.errors import ImageReadError
from data_prep.nifti import open_nifti, verify_stream
from data_prep.sources.decathlon import Decathlon
from data_prep.sources.dicom import Dicom
from tests.data_prep.factories import (
    convert_tree,
    decathlon_tree,
    dicom_series,
    report_lines,
    save_dicom,
    tree_bytes,
    write_nifti_volume,
)


def _kill_repeatedly(tmp_path: Path, kills: int, num_cases: int) -> None:
    root = decathlon_tree(tmp_path, num_cases)
    convert_tree(Decathlon(), root, tmp_path / "a" / "toy")
    out = tmp_path / "b" / "toy"
    command = [sys.executable, "-m", "data_prep", "decathlon", str(root), "--out", str(out), "--workers", "1"]
    generator = np.random.default_rng(0)
    wholes = tree_bytes(tmp_path / "a" / "toy")
    for _ in range(kills):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(float(generator.uniform(0.8, 4.0)))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if out.exists():
            for path in out.glob("*Tr/*"):  # a final name means a whole file
                assert path.read_bytes() == wholes[str(path.relative_to(out))]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert tree_bytes(out) == wholes


def test_run_killed_and_repeated_equals_an_undisturbed_one(tmp_path):
    _kill_repeatedly(tmp_path, 3, 25)


@pytest.mark.slow
def test_run_killed_fifty_times_equals_an_undisturbed_one(tmp_path):
    _kill_repeatedly(tmp_path, 50, 100)


@pytest.mark.parametrize("number", [28, 13], ids=["ENOSPC", "EACCES"])
@pytest.mark.parametrize("moment", range(0, 40, 5))
def test_run_with_failing_writes_leaves_nothing_half_done(tmp_path, monkeypatch, number, moment):
    root = decathlon_tree(tmp_path)
    convert_tree(Decathlon(), root, tmp_path / "a" / "toy")
    wholes = tree_bytes(tmp_path / "a" / "toy")
    out = tmp_path / "b" / "toy"
    count = 0
    original = os.fsync

    def failing(handle):
        nonlocal count
        count += 1
        if count == moment + 1:
            raise OSError(number, os.strerror(number))
        return original(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        try:
            convert_tree(Decathlon(), root, out)
        except Exception as error:
            assert isinstance(error, OSError) or "disk is full" in str(error)
    for name, content in tree_bytes(out).items() if out.exists() else ():
        if name.split("/")[0] in ("imagesTr", "labelsTr", "imagesTs"):
            assert content == wholes[name]
    assert convert_tree(Decathlon(), root, out) == 0
    assert tree_bytes(out) == wholes


def test_case_that_takes_too_long_or_kills_its_worker_costs_itself_only(tmp_path, monkeypatch):
    root = decathlon_tree(tmp_path)
    source = tmp_path / "sitecustomize.py"
    source.write_text(
        "import os, time\n"
        "import data_prep.operations.volumes as v\n"
        "original = v.open_nifti\n"
        "def slow(path, *rest):\n"
        "    if 'toy_001' in str(path): time.sleep(60)\n"
        "    if 'toy_002' in str(path): os._exit(9)\n"
        "    return original(path, *rest)\n"
        "v.open_nifti = slow\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert convert_tree(Decathlon(), root, tmp_path / "toy", engine="process", workers=2, case_timeout=5.0) == 3
    lines = report_lines(tmp_path / "toy")
    assert lines["case", "toy_001", ""] == ("failed", "timeout")
    assert lines["case", "toy_002", ""] == ("failed", "worker-died")
    assert sum(verdict == ("ok", "") for (kind, _, _), verdict in lines.items() if kind == "case") == 5


def mutate(content: bytes, generator: np.random.Generator) -> bytes:
    data = bytearray(content)
    kind = generator.integers(5)
    at = int(generator.integers(0, len(data)))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for place in generator.integers(0, len(data), 8):
            data[place] ^= 1 << int(generator.integers(8))
    elif kind == 2:
        place = int(generator.integers(132, min(len(data) - 4, 1500)))
        data[place : place + 4] = struct.pack("<I", 0x7FFFFFFF)
    elif kind == 3:
        del data[at : at + int(generator.integers(1, 64))]
    else:
        data[at:at] = generator.bytes(int(generator.integers(1, 64)))
    return bytes(data)


def _mutants(tmp_path: Path, count: int) -> None:
    """Every mutant stands for one slice of a series: it is refused by name, or the result is exactly as without it."""
    series = dicom_series(6, (16, 16))
    folder = save_dicom(tmp_path / "in", series)
    names = sorted(path.name for path in folder.iterdir())
    good = {name: (folder / name).read_bytes() for name in names}
    generator = np.random.default_rng(11)
    for number in range(count):
        name = names[int(generator.integers(len(names)))]
        (folder / name).write_bytes(mutate(good[name], generator))
        start = time.monotonic()
        out = tmp_path / f"out{number}"
        code = convert_tree(Dicom(converter="simpleitk"), folder, out, format="monai")
        assert time.monotonic() - start < 10
        lines = report_lines(out)
        assert ("file", name, "") in lines
        for path in out.glob("images/*.nii.gz"):
            grid = open_nifti(path).grid
            # Exact, or shorter at one end because the damaged end slice was refused by name.
            step = grid.affine[2, 2]
            is_whole = grid.shape == (16, 16, 6) and code == 0
            was_named = lines["file", name, ""][0] in ("failed", "skipped")
            assert is_whole or was_named, (number, lines)
            assert abs(step - 2.5) < 1e-3 or not is_whole or was_named
        (folder / name).write_bytes(good[name])


def test_mutated_dicom_is_refused_or_exact(tmp_path):
    _mutants(tmp_path, 15)


@pytest.mark.slow
def test_mutated_dicom_is_refused_or_exact_2000_times(tmp_path):
    _mutants(tmp_path, 2000)


def _nifti_attack(raw: bytes, generator: np.random.Generator) -> bytes:
    data = bytearray(raw)
    kind = int(generator.integers(10))
    if kind == 0:
        struct.pack_into("<h", data, 40 + 2 * int(generator.integers(1, 4)), int(generator.choice([0, -5, 32767])))
    elif kind == 1:
        struct.pack_into("<8h", data, 40, 3, 32767, 32767, 32767, 1, 1, 1, 1)
    elif kind == 2:
        struct.pack_into("<f", data, 108, float(generator.choice([0, 100, np.nan, 1e30])))
    elif kind == 3:
        struct.pack_into("<f", data, 280 + 4 * int(generator.integers(12)), np.nan)
        struct.pack_into("<h", data, 252, 0)
    elif kind == 4:
        struct.pack_into("<12f", data, 280, *([0.0] * 12))
        struct.pack_into("<h", data, 252, 0)
    elif kind == 5:
        return bytes(data[: int(generator.integers(0, len(data) - 1))])
    elif kind == 6:
        data[344:348] = b"ni1\0"
    elif kind == 7:
        struct.pack_into("<f", data, 112, float(generator.choice([np.inf, 1e38, -1e36])))
    elif kind == 8:
        struct.pack_into("<2h", data, 252, 0, 0)
    else:
        struct.pack_into("<h", data, 70, int(generator.choice([0, 9999, 1536])))
    return bytes(data)


@pytest.mark.parametrize("packed", [False, True], ids=["nii", "nii.gz"])
def test_300_nifti_attacks_are_refused_quickly(tmp_path, packed):
    write_nifti_volume(tmp_path / "good.nii", (12, 10, 8))
    raw = (tmp_path / "good.nii").read_bytes()
    generator = np.random.default_rng(1)
    for number in range(150):
        attacked = _nifti_attack(raw, generator)
        path = tmp_path / "x.nii.gz"
        path.write_bytes(gzip.compress(attacked, 1) if packed else attacked)
        start = time.monotonic()
        with pytest.raises(ImageReadError):
            verify_stream(open_nifti(path))
        assert time.monotonic() - start < 0.5, number


def test_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    write_nifti_volume(tmp_path / "good.nii", (12, 10, 8))
    raw = (tmp_path / "good.nii").read_bytes()
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(raw + bytes(300 << 20), 1))
    start = time.monotonic()
    with pytest.raises(ImageReadError, match="more than"):
        verify_stream(open_nifti(tmp_path / "bomb.nii.gz"))
    assert time.monotonic() - start < 0.5


def test_worker_answers_with_class_and_place_of_an_unexpected_error(tmp_path, monkeypatch):
    import data_prep.operations as operations

    def broken(job):
        raise KeyError("Doe^Jane")

    broken.operation_version = 1
    monkeypatch.setattr(operations, "find_operation", lambda name: broken)
    make = {"operation": "x:y", "inputs": [], "params": {}, "output": "a.nii"}
    task = {"name": "a", "out": str(tmp_path), "work": str(tmp_path / "w"), "makes": [make], "link": "copy"}
    result = worker.execute(task | {"personal": True, "same_grid": True})
    assert (result["status"], result["reason"]) == ("failed", "unexpected-error")
    assert "KeyError in test_robustness.py" in result["detail"]
    assert "Doe" not in str(result)
