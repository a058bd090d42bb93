"""Pixels as they are stored, and streams that must not be believed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import jpeg_ls
import numpy as np
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEGLSLossless, JPEGLSNearLossless

from data_prep.dicom.headers import read_dataset
from data_prep.dicom.pixels import checked_frames, decode, read_stream_header
from data_prep.errors import DicomReadError
from tests.data_prep.dicom_factories import make_slice

ROOT = Path(__file__).parents[3]
SAMPLES = ROOT / "tests" / "data" / "data_prep"
#: of each, the offset of the 2 or 4 bytes that hold the number of rows, from the marker of the stream's header
STREAMS = {
    "ts_j2k_lossless": (b"\xff\x4f\xff\x51", 12, 4),
    "ts_jpegls": (b"\xff\xf7", 5, 2),
    "ts_jpeg_lossless": (b"\xff\xc3", 5, 2),
}


def _sample(name):
    return read_dataset(sorted((SAMPLES / name).iterdir())[0], pixels=True)


def _frame(dataset):
    (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
    return bytearray(frame)


@pytest.mark.parametrize("is_signed", [0, 1])
@pytest.mark.parametrize(("allocated", "stored"), [(8, 8), (8, 7), (16, 12), (16, 15), (16, 16), (32, 24), (32, 32)])
def test_plain_pixels_equal_those_of_pydicom_and_ignore_what_is_above_the_high_bit(allocated, stored, is_signed):
    dataset = make_slice(0)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, stored, stored - 1
    dataset.PixelRepresentation = is_signed
    raw = np.random.default_rng(1).integers(0, 256, 120 * allocated // 8, dtype=np.uint8)
    dataset.PixelData = raw.tobytes()
    pixels = decode(dataset)
    np.testing.assert_array_equal(pixels, dataset.pixel_array)
    wide = raw.view(f"<u{allocated // 8}").astype(np.int64) & ((1 << stored) - 1)
    expected = np.where(is_signed & (wide >> (stored - 1)), wide - (1 << stored), wide).reshape(12, 10)
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("name", sorted(STREAMS))
def test_stream_announces_the_image_of_the_header(name):
    dataset = _sample(name)
    header = read_stream_header(bytes(_frame(dataset)))
    assert (header.rows, header.columns, header.samples) == (dataset.Rows, dataset.Columns, 1)
    assert dataset.BitsStored <= header.bits <= dataset.BitsAllocated
    assert header.tiles >= 1
    assert decode(dataset).shape == (dataset.Rows, dataset.Columns)


@pytest.mark.parametrize("name", sorted(STREAMS))
@pytest.mark.parametrize("lie", ["rows", "bits", "samples", "cut", "no-header"])
def test_stream_of_another_image_is_refused_before_it_is_decoded(name, lie, monkeypatch):
    dataset = _sample(name)
    stream, (marker, place, length) = _frame(dataset), STREAMS[name]
    start = stream.find(marker)
    is_j2k = name == "ts_j2k_lossless"
    if lie == "rows":
        stream[start + place : start + place + length] = (30_000).to_bytes(length, "big")
    elif lie == "bits":
        stream[start + (42 if is_j2k else 4)] = 31
    elif lie == "samples":
        stream[start + (41 if is_j2k else 9)] = 3
    elif lie == "cut":
        del stream[start + 8 :]
    else:
        stream[start : start + 2] = b"\0\0"
    dataset.PixelData = encapsulate([bytes(stream)])
    monkeypatch.setattr(type(dataset), "pixel_array", property(lambda _: pytest.fail("a decoder was asked")))
    with pytest.raises(DicomReadError, match="unreadable-pixels"):
        decode(dataset)


def test_tiles_by_the_million_are_refused():
    dataset = _sample("ts_j2k_lossless")
    stream = _frame(dataset)
    start = stream.find(STREAMS["ts_j2k_lossless"][0])
    stream[start + 24 : start + 32] = (1).to_bytes(4, "big") * 2
    dataset.PixelData = encapsulate([bytes(stream)])
    with pytest.raises(DicomReadError, match="tiles"):
        checked_frames(dataset)


@pytest.mark.parametrize(("name", "rows"), [("ts_rle", 60_000), ("ts_j2k_lossless", 65_535)])
def test_header_that_claims_more_than_its_stream_can_hold_is_refused(name, rows):
    dataset = _sample(name)
    dataset.Rows = dataset.Columns = rows
    with pytest.raises(DicomReadError, match="claims"):
        checked_frames(dataset)


@pytest.mark.parametrize("name", [*sorted(STREAMS), "ts_rle"])
def test_bytes_missing_inside_a_stream_are_noticed(name):
    """The length of the fragment then reaches beyond the end; decoders have made an image of the rest."""
    dataset = _sample(name)
    dataset.PixelData = dataset.PixelData[:9000] + dataset.PixelData[9063:]
    with pytest.raises(DicomReadError, match="cut off"):
        decode(dataset)


@pytest.mark.parametrize("name", ["plain", "ts_rle", "ts_j2k_lossless", "ts_jpegls", "ts_jpeg_lossless"])
@pytest.mark.parametrize("with_table", [False, True])
def test_more_pixels_than_frames_are_refused(name, with_table):
    """A description of a frame was lost, or their number: which pixels belong to which place is not known."""
    dataset = make_slice(0) if name == "plain" else _sample(name)
    if name == "plain":
        assert decode(dataset).shape == (12, 10)
        dataset.PixelData += b"\0\0"  # a few bytes more than needed do no harm
        assert decode(dataset).shape == (12, 10)
        dataset.PixelData = make_slice(0).PixelData * 2
    else:
        dataset.PixelData = encapsulate([bytes(_frame(dataset))] * 2, has_bot=with_table)
    with pytest.raises(DicomReadError, match="more"):
        decode(dataset)


def test_high_bit_that_contradicts_the_number_of_bits_is_refused():
    """12 bits of 16, flush left or merely described wrongly: GDCM shifts, pydicom does not."""
    dataset = make_slice(0)
    dataset.BitsStored, dataset.HighBit = 12, 15
    with pytest.raises(DicomReadError, match="HighBit 15"):
        decode(dataset)


def test_frame_in_several_fragments_is_read():
    dataset = _sample("ts_j2k_lossless")
    good = decode(dataset)
    dataset.PixelData = encapsulate([bytes(_frame(dataset))], fragments_per_frame=3, has_bot=False)
    np.testing.assert_array_equal(decode(dataset), good)


def test_fewer_streams_than_frames_are_refused():
    dataset = _sample("ts_rle")
    dataset.NumberOfFrames = "2000"
    with pytest.raises(DicomReadError, match="unreadable-pixels"):
        decode(dataset)


def test_panic_of_the_rle_decoder_is_an_error_of_the_case():
    dataset = _sample("ts_rle")
    frame = _frame(dataset)
    last_segment = int.from_bytes(frame[8:12], "little")
    frame[last_segment:last_segment] = b"\x81\0"  # 128 values more than the image has
    dataset.PixelData = encapsulate([bytes(frame)])
    with pytest.raises(DicomReadError, match="PanicException"):
        decode(dataset)


@pytest.mark.parametrize("lossy_error", [0, 2])
@pytest.mark.parametrize("is_signed", [0, 1])
@pytest.mark.parametrize(("allocated", "stored"), [(8, 8), (8, 7), (16, 8), (16, 12), (16, 15), (16, 16)])
def test_jpeg_ls_equals_what_pydicom_makes_of_it(allocated, stored, is_signed, lossy_error):
    """Two decoders, one for the odd kinds."""
    dataset = make_slice(0)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, stored, stored - 1
    dataset.PixelRepresentation, dataset.NumberOfFrames = is_signed, "2"
    raw = np.random.default_rng(1).integers(0, 1 << stored, (2, 12, 10)).astype(f"<u{allocated // 8}")
    streams = [bytes(jpeg_ls.encode_buffer(frame.tobytes(), 12, 10, 1, stored, lossy_error)) for frame in raw]
    dataset.PixelData = encapsulate(streams)
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGLSNearLossless if lossy_error else JPEGLSLossless
    pixels = decode(dataset)
    assert pixels.dtype == dataset.pixel_array.dtype
    np.testing.assert_array_equal(pixels, dataset.pixel_array)


def test_damaged_jpeg_ls_stream_is_refused_at_once():
    """pyjpegls computes for four seconds on this one."""
    dataset = read_dataset(sorted((SAMPLES / "ts_jpegls").iterdir())[2], pixels=True)
    frame = bytes(_frame(dataset))
    dataset.PixelData = encapsulate([frame[:43116] + bytes([214, 59, 128]) + frame[43116:-3]])
    start = time.process_time()
    with pytest.raises(DicomReadError, match="unreadable-pixels"):
        decode(dataset)
    assert time.process_time() - start < 1


FRAGMENTS = """
import resource, sys
from data_prep.dicom.headers import read_dataset
from data_prep.dicom.pixels import decode
from data_prep.errors import DicomReadError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

decode(read_dataset(sys.argv[1], pixels=True))
import SimpleITK
before = peak()
for length in (0x10, 0x40000000, 0xC0000000):
    dataset = read_dataset(sys.argv[1], pixels=True)
    data = dataset.PixelData
    # The fragment is longer than its length says, and what follows looks like a tag and a length.
    tail = b"\\x57\\xa6\\x54\\xac" + length.to_bytes(4, "little") + data[-4:]
    dataset.PixelData = data[:8000] + bytes(12) + data[8000:-12] + tail
    try:
        decode(dataset)
    except DicomReadError as error:
        assert error.reason == "unreadable-pixels"
    else:
        sys.exit("decoded")
print((peak() - before) >> 10)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_damaged_fragments_cost_no_memory():
    """The decoder of SimpleITK takes what stands behind a damaged fragment for a length, and asked for 4 GB."""
    path = sorted((SAMPLES / "ts_jpeg_lossless").iterdir())[0]
    command = [sys.executable, "-c", FRAGMENTS, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50
