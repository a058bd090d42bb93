"""Cuts a DICOM file down to the elements that are asked for, so that pydicom has next to nothing to skip.

Nested sequences that nobody wants take pydicom most of the time of a header: it parses them even to pass over them.
Here they are stepped over by their lengths and delimiters. Nothing is interpreted: the elements that are kept go to
pydicom as they stand in the file, and a file in which anything is odd goes to pydicom whole.
"""

from __future__ import annotations

import struct
from collections.abc import Set

from pydicom.filereader import ENCODED_VR
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

_IMPLICIT, _EXPLICIT = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1"
#: syntaxes whose data set is no little endian: deflated, big endian
_OTHERS = {b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.2"}
_UNDEFINED = 0xFFFFFFFF
_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_MAX_DEPTH = 16
_SHORT = {vr for vr in ENCODED_VR if vr.decode() not in EXPLICIT_VR_LENGTH_32}
_LONG = ENCODED_VR - _SHORT
_read_explicit, _read_implicit = struct.Struct("<HH2sH").unpack_from, struct.Struct("<HHL").unpack_from
_read_long = struct.Struct("<L").unpack_from


class _OddError(Exception):
    """Something that only a whole reader can judge."""


def skim(data: bytes, wanted: Set[int], *, pixels: bool) -> bytes | None:
    """The same DICOM file with the wanted elements alone.

    Args:
        data: a file from its preamble on, or its beginning.
        wanted: tags; SpecificCharacterSet is always kept.
        pixels: keep the pixel data, too, for which `data` must be the whole file; else stop in front of it.

    Returns:
        A file, or ``None`` when this one is not of the plain kind, or does not reach to its pixel data.
    """
    if data[128:132] != b"DICM":
        return None
    try:
        start, syntax = _read_meta(data)
        if not syntax or syntax in _OTHERS:
            return None
        return _cut(data, start, wanted | {0x00080005}, syntax == _IMPLICIT, pixels)
    except (_OddError, struct.error):
        return None


def _read_meta(data: bytes) -> tuple[int, bytes]:
    """Where the data set starts, and its transfer syntax."""
    at, syntax = 132, b""
    while True:
        if data[at : at + 2] != b"\x02\x00":
            return at, syntax
        tag, value, length = _element(data, at, False)
        if length == _UNDEFINED:
            raise _OddError
        if tag == 0x00020010:
            syntax = data[value : value + length].rstrip(b"\0 ")
        at = value + length


def _element(data: bytes, at: int, is_implicit: bool) -> tuple[int, int, int]:
    """Tag, place of the value and its length."""
    if is_implicit:
        group, element, length = _read_implicit(data, at)
        return group << 16 | element, at + 8, length
    group, element, vr, length = _read_explicit(data, at)
    if vr in _SHORT:
        return group << 16 | element, at + 8, length
    if vr in _LONG and vr != b"UN":
        return group << 16 | element, at + 12, _read_long(data, at + 8)[0]
    if vr == b"UN":
        (length,) = _read_long(data, at + 8)
        if length != _UNDEFINED:  # else its content is of implicit VR, whatever the file is
            return group << 16 | element, at + 12, length
    if group == 0xFFFE:  # items and delimiters have no VR
        return group << 16 | element, at + 8, _read_long(data, at + 4)[0]
    raise _OddError


def _cut(data: bytes, at: int, wanted: Set[int], is_implicit: bool, pixels: bool) -> bytes | None:
    if is_implicit and data[at + 4 : at + 6].isalpha() and data[at + 4 : at + 6].isupper():
        return None  # says implicit VR, and looks explicit
    parts, end = [data[:at]], len(data)
    while at + 8 <= end:
        tag, value, length = _element(data, at, is_implicit)
        if tag in _PIXELS:
            return b"".join([*parts, data[at:]] if pixels else parts)
        if tag >> 16 == 0xFFFE:
            return None
        after = _after_sequence(data, value, is_implicit, 0) if length == _UNDEFINED else value + length
        if after > end:
            return None
        if tag in wanted:
            parts.append(data[at:after])
        at = after
    # Without pixel data, the end of a whole file looks like the end of what was read of a longer one.
    return None


def _after_sequence(data: bytes, at: int, is_implicit: bool, depth: int) -> int:
    """Place behind the delimiter of a sequence of undefined length whose first item is at `at`."""
    if depth > _MAX_DEPTH:
        raise _OddError
    while True:
        group, element, length = _read_implicit(data, at)
        tag, at = group << 16 | element, at + 8
        if tag == _END_OF_SEQUENCE:
            return at
        if tag != _ITEM:
            raise _OddError
        if length != _UNDEFINED:
            at += length
            continue
        while True:
            tag, value, length = _element(data, at, is_implicit)
            if tag == _END_OF_ITEM:
                at = value
                break
            if tag >> 16 == 0xFFFE:
                raise _OddError
            at = _after_sequence(data, value, is_implicit, depth + 1) if length == _UNDEFINED else value + length
