"""Keys of pseudonyms stay inside the test's folder; nothing outside is read or written."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _key_file(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("key") / "data_prep.key"
    path.write_bytes(b"a key for tests, the same everywhere")
    monkeypatch.setenv("MONAI_MAMBA_KEY_FILE", str(path))
