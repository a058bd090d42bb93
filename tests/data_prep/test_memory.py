"""The bound on the memory of a case."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from data_prep.errors import CaseError
from data_prep.memory import bounded, data_in_use

pytestmark = pytest.mark.skipif(data_in_use() is None, reason="only Linux enforces the limit")


def test_more_than_the_bound_is_refused_by_name_and_the_limit_is_taken_back(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(CaseError, match="too-much-memory"), bounded([], 0):
        np.empty(400 << 20, dtype=np.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    np.empty(400 << 20, dtype=np.uint8)


def test_pixels_and_files_justify_more(tmp_path):
    path = tmp_path / "large.dcm"
    with open(path, "wb") as file:
        file.truncate(30 << 20)
    with bounded([path], 0):
        np.empty(400 << 20, dtype=np.uint8)
    with bounded([], 200 << 20):
        np.empty(400 << 20, dtype=np.uint8)


def test_programs_are_bound_as_well():
    with bounded([], 0):
        code = "bytearray(2 << 30)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MemoryError" in done.stderr
