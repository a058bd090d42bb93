"""Pictures keep their gray values: 16 bits are scaled, not clipped; files used as they are keep every byte."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import CaseError
from data_prep.operations import Job
from data_prep.operations.pictures import as_it_is, picture
from tests.data_prep.factories import write_picture


def _ramp(path):
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(path)


def test_sixteen_bits_are_scaled_to_eight_and_not_clipped(tmp_path):
    _ramp(tmp_path / "a.png")
    picture(Job((tmp_path / "a.png",), tmp_path / "b.png", tmp_path / "b.png", {"mode": "L"}))
    found = np.asarray(Image.open(tmp_path / "b.png")).ravel()
    np.testing.assert_allclose(found, np.linspace(0, 255, 64), atol=1)


def test_file_used_as_it_is_keeps_its_bytes_and_is_decoded(tmp_path):
    write_picture(tmp_path / "a.jpg")
    as_it_is(Job((tmp_path / "a.jpg",), tmp_path / "b.jpg", tmp_path / "b.jpg"))
    assert (tmp_path / "b.jpg").read_bytes() == (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "c.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:200])
    with pytest.raises(CaseError, match="damaged-picture"):
        as_it_is(Job((tmp_path / "c.jpg",), tmp_path / "d.jpg", tmp_path / "d.jpg"))


def test_personal_or_rotated_file_is_not_used_as_it_is(tmp_path):
    write_picture(tmp_path / "a.jpg")
    with pytest.raises(CaseError, match="personal-file"):
        as_it_is(Job((tmp_path / "a.jpg",), tmp_path / "b.jpg", tmp_path / "b.jpg", personal=True))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "a.jpg").save(tmp_path / "turned.jpg", exif=exif)
    with pytest.raises(CaseError, match="rotated"):
        as_it_is(Job((tmp_path / "turned.jpg",), tmp_path / "b.jpg", tmp_path / "b.jpg"))
