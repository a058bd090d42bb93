"""Killed, out of space, mutated: nothing half done, nothing lost, no traceback."""

from __future__ import annotations

import builtins
import errno
import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.engine import worker
from data_prep.errors import DataPrepError, ImageReadError
from data_prep.nifti import open_nifti, verify_stream
from data_prep.sources.decathlon import Decathlon
from tests.data_prep.corpora import attack_nifti
from tests.data_prep.factories import (
    convert_tree,
    decathlon_tree,
    report_lines,
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
    for number in range(kills):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(float(generator.uniform(0.8, 4.0)))
        # The parent alone every second time: its worker is in the middle of a case when the next run starts.
        (os.killpg if number % 2 else os.kill)(process.pid, signal.SIGKILL)
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


class Fault:
    """Counts everything that writes, and lets the n-th of these fail; with ``None`` none does."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, moment: int | None) -> None:
        self.number, self.moment, self.count = number, moment, 0
        for name in ("fsync", "replace", "mkdir", "open"):
            patch.setattr(os, name, self._guarded(getattr(os, name), lambda *_: True))
        patch.setattr(builtins, "open", self._guarded(builtins.open, lambda _, mode="r", *__: set(mode) & set("wax")))

    def _guarded(self, function, does_write):
        def guarded(*arguments, **options):
            if does_write(*arguments):
                self.count += 1
                if self.count - 1 == self.moment:
                    raise OSError(self.number, os.strerror(self.number), str(arguments[0]))
            return function(*arguments, **options)

        return guarded


def _fail_at_every_write(tmp_path: Path, number: int, tries: int) -> None:
    root = decathlon_tree(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        count = Fault(patch, number, None)
        convert_tree(Decathlon(), root, tmp_path / "a" / "toy")
    wholes = tree_bytes(tmp_path / "a" / "toy")
    for moment in sorted({int(at) for at in np.linspace(0, count.count - 1, tries)}):
        out = tmp_path / f"b{moment}" / "toy"
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, number, moment)
            try:
                code = convert_tree(Decathlon(), root, out)
            except (OSError, DataPrepError) as error:  # the command line makes one line of these
                code = 1
                assert isinstance(error, OSError) or "disk is full" in str(error) or "key file" in str(error)
        assert fault.count > moment
        for name, content in tree_bytes(out).items() if out.exists() else ():
            if name.split("/")[0] in ("imagesTr", "labelsTr", "imagesTs"):
                assert content == wholes[name]
        if code == 0:  # a fault that costs nothing, for example in making a rename durable
            assert tree_bytes(out) == wholes
        assert convert_tree(Decathlon(), root, out) == 0
        assert tree_bytes(out) == wholes
        assert not list(out.glob(".tmp-*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=["ENOSPC", "EACCES"])
def test_run_with_failing_writes_leaves_nothing_half_done(tmp_path, capsys, number):
    _fail_at_every_write(tmp_path, number, 8)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=["ENOSPC", "EACCES"])
def test_run_with_thirty_failing_writes_leaves_nothing_half_done(tmp_path, capsys, number):
    _fail_at_every_write(tmp_path, number, 30)


@pytest.mark.slow
def test_run_on_a_full_disk_ends_with_one_line_and_can_be_repeated(tmp_path):
    """A real file system that is too small, for everything: data set, journal, index, report."""
    root = decathlon_tree(tmp_path, 12)
    convert_tree(Decathlon(), root, tmp_path / "a" / "toy")
    wholes, disk = tree_bytes(tmp_path / "a" / "toy"), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        command = [sys.executable, "-m", "data_prep", "decathlon", str(root), "--out", str(disk / "toy")]
        for kilobytes in range(16, 160, 16):
            subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)
            done = subprocess.run(command, capture_output=True, text=True)
            assert "Traceback" not in done.stderr and done.returncode in (0, 1, 2, 3), done.stderr
            for path in (disk / "toy").glob("*Tr/*"):
                assert path.read_bytes() == wholes[str(path.relative_to(disk / "toy"))]
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert subprocess.run(command, capture_output=True).returncode == 0
        assert tree_bytes(disk / "toy") == wholes
    finally:
        subprocess.run(["umount", disk], check=True)


def test_worker_ends_when_its_parent_is_killed(tmp_path):
    code = (
        "from data_prep.engine.worker import WorkerProcess; import time;"
        "print(WorkerProcess()._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker_id = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while time.monotonic() < end and Path(f"/proc/{worker_id}").exists():
        time.sleep(0.05)
        if " Z " in Path(f"/proc/{worker_id}/stat").read_text():  # dead; nobody has asked for its code yet
            break
    else:
        assert not Path(f"/proc/{worker_id}").exists()


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


@pytest.mark.parametrize("packed", [False, True], ids=["nii", "nii.gz"])
def test_300_nifti_attacks_are_refused_quickly(tmp_path, packed):
    write_nifti_volume(tmp_path / "good.nii", (12, 10, 8))
    raw = (tmp_path / "good.nii").read_bytes()
    generator = np.random.default_rng(1)
    for number in range(150):
        attacked = attack_nifti(raw, generator)
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
