"""A file that was cut down is read like the whole one, damaged or not."""

from __future__ import annotations

import io
import random

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian

from data_prep.dicom import headers
from data_prep.dicom.convert import _TAGS
from data_prep.dicom.skim import skim
from data_prep.errors import DicomReadError
from tests.data_prep.corpora import mutate, series
from tests.data_prep.dicom_factories import make_slice

WANTED = frozenset(int(pydicom.tag.Tag(name)) for name in headers._TAGS)


def _nested(is_implicit: bool = False) -> bytes:
    """A slice with sequences that nobody wants: of both kinds of length, nested, empty."""
    one = make_slice(0)
    code, inner = Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "113100", "DCM", "Basic profile"
    inner.PurposeOfReferenceCodeSequence = [code, code]
    for name in ("DeidentificationMethodCodeSequence", "ReferencedImageSequence", "RequestAttributesSequence"):
        setattr(one, name, [inner, code])
        one[name].is_undefined_length = name != "ReferencedImageSequence"
        for item in one[name].value:
            item.is_undefined_length_sequence_item = name == "RequestAttributesSequence"
    one.ProcedureCodeSequence = []
    one.add_new((0x0029, 0x0010), "LO", "VENDOR")
    one.add_new((0x0029, 0x1010), "OB", bytes(1000))
    if is_implicit:
        one.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    buffer = io.BytesIO()
    one.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _read(path, pixels):
    """Elements as they are in the file, or the error."""
    try:
        dataset = headers.read_dataset(path, pixels=pixels, tags=_TAGS if pixels else headers._TAGS)
    except DicomReadError:
        return "refused"
    found = {}
    for name in _TAGS if pixels else headers._TAGS:
        try:
            element = dataset.get_item(name)
            if element is not None:
                found[name] = element.value if isinstance(element.value, bytes) else str(element.value)
        except Exception as error:
            found[name] = type(error).__name__
    return found


@pytest.mark.parametrize("is_implicit", [False, True])
def test_sequences_nobody_wants_are_left_out(tmp_path, is_implicit):
    data = _nested(is_implicit)
    short = skim(data, WANTED, pixels=False)
    assert short is not None and len(short) < len(data) / 2 and b"113100" not in short
    assert skim(data[:-50], WANTED, pixels=False) == short
    whole = skim(data, WANTED, pixels=True)
    assert whole is not None and whole.endswith(make_slice(0).PixelData)
    assert pydicom.dcmread(io.BytesIO(whole)).ImagePositionPatient == make_slice(0).ImagePositionPatient


def test_file_that_is_not_plain_or_not_read_to_its_pixels_is_left_to_pydicom():
    data = _nested()
    assert skim(data[: data.index(b"VENDOR")], WANTED, pixels=False) is None
    assert skim(data[132:], WANTED, pixels=False) is None
    one = make_slice(0)
    one.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    one.save_as(buffer, enforce_file_format=True)
    assert skim(buffer.getvalue(), WANTED, pixels=False) is None


def _check(tmp_path, monkeypatch, count):
    rng = np.random.default_rng(5)
    good = [data for number in range(14) for data in series(number)[:2]] + [_nested(), _nested(True)]
    random.Random(1).shuffle(good)
    num_short = 0
    for number in range(count):
        data = good[number % len(good)]
        if number >= len(good):
            data = mutate(data, rng)
        path = tmp_path / "one.dcm"
        path.write_bytes(data)
        for pixels in (False, True):
            num_short += skim(data, WANTED, pixels=pixels) is not None
            ours = _read(path, pixels)
            with monkeypatch.context() as patch:
                patch.setattr(headers, "skim", lambda *_, **__: None)
                assert ours == _read(path, pixels), number
    assert num_short > count


def test_a_hundred_files_are_read_as_pydicom_reads_them(tmp_path, monkeypatch):
    _check(tmp_path, monkeypatch, 100)


@pytest.mark.slow
def test_five_thousand_files_are_read_as_pydicom_reads_them(tmp_path, monkeypatch):
    _check(tmp_path, monkeypatch, 5000)
