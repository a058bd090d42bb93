"""Stored pixel values of a data set, from decoders that are asked only what cannot make them take memory at will.

A decoder believes the stream: what it announces in a damaged file can be gigabytes. So the fragments are taken apart
here, and every frame's own header is compared with the data set's before anything is decoded.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames, parse_fragments
from pydicom.uid import RLELossless

from data_prep.dicom.headers import plain, whole
from data_prep.errors import DicomReadError

#: transfer syntaxes of plain values; in the deflated one, the file is unpacked as a whole
UNCOMPRESSED = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"}
_LITTLE_ENDIAN = UNCOMPRESSED - {"1.2.840.10008.1.2.2"}
#: baseline, extended, and the two lossless processes of JPEG
_JPEG = {f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70)}
_JPEG_LS = {f"1.2.840.10008.1.2.4.{number}" for number in (80, 81)}
#: JPEG, JPEG-LS and JPEG 2000, whose streams begin with a size of their own
_WITH_SIZE = "1.2.840.10008.1.2.4."
#: first bytes of a stream of JPEG and JPEG-LS, and of JPEG 2000
_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff")
#: two bytes of RLE hold 128 at most
_MAX_RLE_RATIO = 64
#: no limit by format for the others (a blank JPEG 2000 frame has next to no bytes), so one for frames that are large
_MAX_RATIO, _FREE_BYTES = 1000, 64 << 20
#: the decoder of JPEG 2000 takes kilobytes for every tile
_MAX_TILES = 4096


def decode(dataset: Any) -> np.ndarray:
    """Stored pixel values with the plugins of pydicom, and with SimpleITK's own decoders when all of these refuse.

    JPEG-LS goes to SimpleITK alone where it reads it: on some damaged streams pyjpegls computes for seconds.

    Raises:
        DicomReadError: nobody can, the pixel data is shorter than the header says, or the compressed streams are of
            another image than the header.
    """
    syntax, frames = str(dataset.file_meta.get("TransferSyntaxUID", "")), []
    try:
        if syntax in UNCOMPRESSED:
            _check_length(dataset)
            _check_bits(dataset)
        pixels = _native_pixels(dataset)
        if pixels is not None:
            return pixels
        if syntax not in UNCOMPRESSED:
            frames = checked_frames(dataset)
        if not (syntax in _JPEG_LS and _is_full_width(dataset)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return np.asarray(dataset.pixel_array)
    except (MemoryError, DicomReadError):
        raise
    except BaseException as error:
        # A decoder in Rust that panics raises what is no Exception, and would end the worker.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if syntax not in _JPEG or not frames:
            raise DicomReadError("unreadable-pixels", f"the pixel data is damaged ({type(error).__name__})") from error
    try:
        return _decode_jpeg(dataset, frames)
    except MemoryError:
        raise
    except Exception as error:
        raise DicomReadError("unreadable-pixels", "no decoder can read the pixel data") from error


def _check_length(dataset: Any) -> None:
    """Refuse pixel data that holds a frame more than the header knows of: what lies where is then not known."""
    count = int(plain(dataset, "NumberOfFrames") or 1)
    rows, columns, samples, bits = (
        whole(dataset, name, 1) for name in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")
    )
    frame, length = rows * columns * samples * bits / 8, len(dataset.get("PixelData") or b"")
    if length >= (count + 1) * frame:
        raise DicomReadError("unreadable-pixels", f"the pixel data holds more than its {count} frames")


def _check_bits(dataset: Any) -> None:
    """Refuse values that do not end at their lowest bit: some readers shift them, some do not."""
    stored, high = whole(dataset, "BitsStored", -1), whole(dataset, "HighBit", -1)
    if stored >= 0 and high >= 0 and high != stored - 1:
        raise DicomReadError("unreadable-pixels", f"HighBit {high} does not fit BitsStored {stored}")


def _is_full_width(dataset: Any) -> bool:
    """Whether values use the last of their bytes, as all but odd files do; SimpleITK reads only these in JPEG-LS."""
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    return int(dataset.get("SamplesPerPixel") or 1) == 1 and (allocated == stored == 8 or 8 < stored <= allocated == 16)


@dataclass(frozen=True)
class StreamHeader:
    """What a compressed stream says of itself."""

    rows: int
    columns: int
    samples: int
    bits: int
    tiles: int = 1


def checked_frames(dataset: Any) -> list[bytes]:
    """The compressed stream of every frame, each of which announces the image that the header describes.

    Raises:
        DicomReadError: a fragment is cut off, there are fewer streams than frames, or a stream is of another size or
            too short for its image.
        ValueError: the fragments are damaged.
    """
    count = int(dataset.get("NumberOfFrames") or 1)
    table, *items = parse_fragments(dataset.PixelData)[1]
    last = items[-1] if items else table
    if last + 8 + int.from_bytes(dataset.PixelData[last + 4 : last + 8], "little") > len(dataset.PixelData):
        # pydicom hands out what there is, and some decoders make an image of it.
        raise DicomReadError("unreadable-pixels", "the last fragment of the pixel data is cut off")
    offsets = None
    if dataset.get("ExtendedOffsetTable") and dataset.get("ExtendedOffsetTableLengths"):
        offsets = dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths
    frames = list(generate_frames(dataset.PixelData, number_of_frames=count, extended_offsets=offsets))
    if len(frames) < count:
        raise DicomReadError("unreadable-pixels", f"{len(frames)} compressed streams for {count} frames")
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    # Without a table of offsets, fragments beyond the last frame are taken for parts of it.
    starts = [at for at in items if syntax == RLELossless or dataset.PixelData[at + 8 : at + 11] in _STARTS]
    if max(len(frames), len(starts)) > count:
        raise DicomReadError("unreadable-pixels", f"the pixel data holds more than its {count} frames")
    rows, columns, bits = int(dataset.Rows), int(dataset.Columns), int(dataset.BitsAllocated)
    samples = int(dataset.get("SamplesPerPixel") or 1)
    for frame in frames:
        claimed = rows * columns * samples * -(-bits // 8)
        if syntax == RLELossless:
            allowed = _MAX_RLE_RATIO * len(frame)
        else:
            allowed = _FREE_BYTES + _MAX_RATIO * len(frame)
        if claimed > allowed:
            raise DicomReadError(
                "unreadable-pixels", f"the header claims {claimed} bytes from a stream of {len(frame)} bytes"
            )
        if not syntax.startswith(_WITH_SIZE):
            continue
        header = read_stream_header(frame)
        if header is None or (header.rows, header.columns, header.samples) != (rows, columns, samples):
            raise DicomReadError("unreadable-pixels", "the compressed stream has another size than the header says")
        if header.bits > bits or header.tiles > _MAX_TILES:
            raise DicomReadError("unreadable-pixels", "the compressed stream has more bits or tiles than its image")
    return frames


def read_stream_header(stream: bytes) -> StreamHeader | None:
    """What a JPEG, JPEG-LS or JPEG 2000 stream announces (SOF, SIZ); ``None`` when it does not say."""

    def number(start: int, count: int) -> int:
        return int.from_bytes(stream[start : start + count], "big")

    at = stream[:512].find(b"\xff\x4f\xff\x51")  # JPEG 2000: start of codestream, then its size
    if at >= 0:
        width, height, left, top, tile_width, tile_height, tile_left, tile_top = (
            number(at + 8 + 4 * place, 4) for place in range(8)
        )
        if tile_width == 0 or tile_height == 0:
            return None
        tiles = -(-(width - tile_left) // tile_width) * -(-(height - tile_top) // tile_height)
        bits = (stream[at + 42] & 0x7F) + 1 if at + 42 < len(stream) else 0
        return StreamHeader(height - top, width - left, number(at + 40, 2), bits, tiles)
    at = 2
    while at + 10 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF:  # any number of these may stand before a marker
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return StreamHeader(number(at + 5, 2), number(at + 7, 2), stream[at + 9], stream[at + 4])
        at += 2 + number(at + 2, 2)
    return None


def _decode_jpeg(dataset: Any, frames: list[bytes]) -> np.ndarray:
    """Stored values by SimpleITK's own decoders, of lossless JPEG, 12-bit JPEG and JPEG-LS.

    They get a file with the pixels alone, put together anew: on damaged headers and between damaged fragments they
    have asked for gigabytes.
    """
    import SimpleITK as sitk

    count, size = int(dataset.get("NumberOfFrames") or 1), (int(dataset.Rows), int(dataset.Columns))
    bare = Dataset()
    for name in ("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated",
                 "BitsStored", "HighBit", "PixelRepresentation"):  # fmt: skip
        if name in dataset:
            bare[name] = dataset[name]
    bare.SOPClassUID, bare.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    bare.PixelData = encapsulate(frames[:count], has_bot=False)
    bare["PixelData"].is_undefined_length = True
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    with tempfile.TemporaryDirectory(prefix="jpeg-") as folder:
        path = Path(folder) / "pixels.dcm"
        bare.save_as(path, enforce_file_format=True)
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        values = sitk.GetArrayFromImage(reader.Execute())
    if values.shape != (count, *size):
        raise ValueError("size")
    return values if count > 1 else values[0]


def _native_pixels(dataset: Any) -> np.ndarray | None:
    """Pixels of the plain kind, which is nearly all there is: grey, little endian, not compressed.

    pydicom takes a millisecond per slice for the same, a quarter of the time of a conversion; it is left everything
    else, and the naming of faults (``None``).
    """
    bits, used, high = (whole(dataset, name) for name in ("BitsAllocated", "BitsStored", "HighBit"))
    data = dataset.get("PixelData")
    is_plain = str(dataset.file_meta.get("TransferSyntaxUID", "")) in _LITTLE_ENDIAN and isinstance(data, bytes)
    if not is_plain or bits not in (8, 16, 32) or high != used - 1 or whole(dataset, "SamplesPerPixel") != 1:
        return None
    shape = [int(plain(dataset, "NumberOfFrames") or 1), whole(dataset, "Rows"), whole(dataset, "Columns")]
    count = shape[0] * shape[1] * shape[2]
    if not 0 < count * bits // 8 <= len(data) or not 0 < used <= bits:
        return None
    kind = "i" if whole(dataset, "PixelRepresentation") == 1 else "u"
    pixels = np.frombuffer(data, f"<{kind}{bits // 8}", count)
    if used < bits:
        # What stands above the highest bit is not part of the value; shifting down again extends the sign.
        pixels = (pixels << (bits - used)) >> (bits - used)
    return pixels.reshape(shape if shape[0] > 1 else shape[1:])
