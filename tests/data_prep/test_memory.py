"""The bound on the memory of a case, in processes that are as fresh as the workers.

In a process that has run other tests, garbage collected under the bound, or gigabytes in use, would decide the outcome.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.memory import data_in_use

pytestmark = pytest.mark.skipif(data_in_use() is None, reason="only Linux enforces the limit")

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from data_prep.errors import CaseError
from data_prep.memory import bounded

before = resource.getrlimit(resource.RLIMIT_DATA)
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_more_than_the_bound_is_refused_by_name_and_the_limit_is_taken_back():
    code = """
try:
    with bounded([], 0):
        np.empty(400 << 20, dtype=np.uint8)
except CaseError as error:
    print(error)
assert resource.getrlimit(resource.RLIMIT_DATA) == before
np.empty(400 << 20, dtype=np.uint8)
"""
    assert "too-much-memory" in run(code)


def test_pixels_and_files_justify_more(tmp_path):
    path = tmp_path / "large.dcm"
    with open(path, "wb") as file:
        file.truncate(30 << 20)
    code = """
with bounded([Path(sys.argv[1])], 0):
    np.empty(400 << 20, dtype=np.uint8)
with bounded([], 200 << 20):
    np.empty(400 << 20, dtype=np.uint8)
print("ok")
"""
    assert run(code, str(path)) == "ok"


def test_programs_are_bound_as_well():
    code = """
with bounded([], 0):
    done = subprocess.run([sys.executable, "-c", "bytearray(2 << 30)"], capture_output=True, text=True)
print("MemoryError" in done.stderr)
"""
    assert run(code) == "True"
