"""Damaged files by the hundred: each ends in a verdict, quickly, in little memory, and no voxel moves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def _run(kind: str, count: int, folder: Path) -> dict:
    command = [sys.executable, "-m", "tests.data_prep.corpora", kind, str(count), str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert sum(result["verdicts"].values()) == count
    # Resident memory of the command or its worker, whichever is larger.
    assert result["peak_mb"] < 300, result
    return result


def test_mutated_dicom_files_end_in_a_verdict(tmp_path):
    _run("dicom", 40, tmp_path / "in")


def test_attacked_nifti_files_are_refused(tmp_path):
    assert _run("nifti", 40, tmp_path / "in")["slowest_s"] < 2


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_2000_mutated_dicom_files_end_in_a_verdict_within_two_seconds(tmp_path):
    assert _run("dicom", 2000, tmp_path / "in")["slowest_s"] < 2


@pytest.mark.slow
def test_300_attacked_nifti_files_are_refused(tmp_path):
    assert _run("nifti", 300, tmp_path / "in")["slowest_s"] < 2
