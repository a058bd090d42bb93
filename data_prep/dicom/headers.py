"""What is read of a DICOM header, once per file, and cached: numbers, codes, hashes of UIDs; no name, id or date."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import math
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from data_prep.dicom.skim import skim
from data_prep.dicom.views import view_facts
from data_prep.errors import CaseError, DicomReadError
from data_prep.operations import Job, Operation, Outcome

# pydicom quotes damaged values in its warnings, and Python prints those of unconfigured loggers to standard error.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")

#: part of the cache key: raise it when `read_facts` changes
FACTS_VERSION = "dicom-3"
#: a header larger than this is not one of an image
MAX_FRAMES = 100_000
_MAX_PIXELS = 1 << 31
_DEFLATED = b"1.2.840.10008.1.2.1.99"
#: most headers of single images end within this
_HEAD_BYTES = 1 << 16

_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID", "PatientName",
    "FrameOfReferenceUID", "Modality", "ImageType", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "ImagerPixelSpacing", "SpacingBetweenSlices", "EchoTime", "AcquisitionNumber", "TemporalPositionIdentifier",
    "TriggerTime", "DiffusionBValue", "InstanceNumber", "BurnedInAnnotation", "ViewPosition", "ImageLaterality",
    "Laterality", "BodyPartExamined", "PixelPaddingValue", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence",
    "ConvolutionKernel", "GantryDetectorTilt", "PixelAspectRatio", "PatientOrientation", "ViewCodeSequence",
    "SegmentationType",
]  # fmt: skip
#: words of ImageType that decide something; all others could be free text
_WORDS = frozenset(
    "ORIGINAL DERIVED PRIMARY SECONDARY LOCALIZER SCOUT MOSAIC MPR MIP MINIP PROJECTION REFORMATTED M P R I "
    "MAGNITUDE PHASE REAL IMAGINARY AXIAL SUBTRACTION ADC FA TRACEW CSA SCREEN".split()
) | {"PROJECTION IMAGE", "MIN IP", "SCREEN SAVE", "CSA MPR", "CSA MIP"}
PROJECTION_MODALITIES = frozenset({"CR", "DX", "MG", "RG", "PX", "IO", "XA", "RF"})
#: SOP classes that are images for sure: CT, MR, PET, NM, CR, DX, MG, XA, RF, secondary capture; their enhanced kinds
IMAGE_CLASSES = frozenset(
    "1.2.840.10008.5.1.4.1.1." + end
    for end in (
        "1 1.1 1.1.1 1.2 1.2.1 1.3 1.3.1 2 2.1 2.2 4 4.1 4.3 4.4 7 7.1 7.2 7.3 7.4 12.1 12.2 20 128 128.1 130".split()
    )
)


_tag = functools.cache(Tag)


@functools.cache
def _numbers_of(names: tuple[str, ...]) -> frozenset[int]:
    return frozenset(int(Tag(name)) for name in names)


def _check_inflated_size(path: os.PathLike[str] | str, file: BinaryIO) -> None:
    """Refuse a deflated file that is a bomb; pydicom unpacks it whole before it looks at anything."""
    limit = 20 * os.stat(path).st_size + (64 << 20)
    content = file.read()
    file.seek(0)
    start = 144 + int.from_bytes(content[140:144], "little")  # behind the meta information
    inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    data = content[start:]
    while data and not inflater.eof:
        size += len(inflater.decompress(data, 1 << 20))
        data = inflater.unconsumed_tail
        if size > limit:
            raise DicomReadError("unreadable-dicom", f"the deflated data set unpacks to more than {limit} bytes")


def read_dataset(path: os.PathLike[str] | str, *, pixels: bool = False, tags: Sequence[str] | None = None) -> Dataset:
    """Read one DICOM file; every way in which pydicom can fall over it becomes one error.

    Raises:
        DicomReadError: not DICOM, truncated or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = None if tags is None else _numbers_of(tuple(tags))
            with open(path, "rb") as file:
                head = file.read(-1 if pixels else _HEAD_BYTES)
                if _DEFLATED in head[:1024]:
                    file.seek(0)
                    _check_inflated_size(path, file)
                short = None if wanted is None else skim(head, wanted, pixels=pixels)
                file.seek(0)
                source = io.BytesIO(short or head) if pixels or short else file
                is_bare = head[128:132] != b"DICM" and _starts_like_a_data_set(head)
                rest = None if short or wanted is None else [Tag(number) for number in wanted]
                dataset = pydicom.dcmread(source, stop_before_pixels=not pixels, specific_tags=rest, force=is_bare)
            if "TransferSyntaxUID" not in dataset.file_meta:
                # Written without preamble and meta information, as before 1993; the decoder needs the syntax.
                is_implicit, is_little = dataset.original_encoding
                syntax = ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
                dataset.file_meta.TransferSyntaxUID = syntax if is_little else ExplicitVRBigEndian
            return dataset
    except (MemoryError, DicomReadError):
        raise
    except Exception as error:
        raise DicomReadError("unreadable-dicom", f"the header cannot be read ({type(error).__name__})") from error


def named_errors(function: Operation) -> Operation:
    """Turn whatever the values of a damaged file make pydicom raise into one error of the case.

    pydicom converts a value when it is first looked at, so any access to a data set can fail in a dozen ways.
    """

    @functools.wraps(function)
    def guarded(job: Job) -> Outcome:
        try:
            return function(job)
        except (CaseError, MemoryError, OSError):
            raise
        except Exception as error:
            raise DicomReadError("damaged-dicom", f"a value of the file is damaged ({type(error).__name__})") from error

    return guarded


def is_dicom(path: Path) -> bool:
    """Whether a file has the DICOM preamble, or starts like a data set without one; names and endings tell nothing."""
    try:
        with open(path, "rb") as file:
            head = file.read(132)
    except OSError:
        return False
    return head[128:132] == b"DICM" or _starts_like_a_data_set(head)


def _starts_like_a_data_set(head: bytes) -> bool:
    """Group 0002 or 0008, a low element, and then a VR or a short length."""
    if len(head) < 132 or head[:2] not in (b"\x02\x00", b"\x08\x00") or head[3] != 0 or head[2] > 0x18:
        return False
    return head[4:6] in (b"UL", b"CS", b"UI", b"OB", b"SH", b"DA") or int.from_bytes(head[4:8], "little") <= 256


def hash_uid(value: Any) -> str:
    """Short hash of an identifier, so that it can be compared but is not written."""
    text = str(value or "")
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest() if text else ""


def read_facts(path: Path) -> dict[str, Any]:
    """Facts of one file as JSON; for `Tree.facts`.

    Returns:
        ``{"kind": "none"}`` for files that are not DICOM, ``{"kind": "damaged", "detail": ...}``, or
        ``{"kind": "image" | "other", ...}`` with the values that `data_prep.dicom.stacks` works on.
    """
    if not is_dicom(path):
        return {"kind": "none"}
    try:
        dataset = read_dataset(path, tags=_TAGS)
        if dataset.preamble is None and "SOPClassUID" not in dataset:
            return {"kind": "none"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _facts(dataset)
    except DicomReadError as error:
        return {"kind": "damaged", "detail": error.detail}
    except Exception as error:  # values are converted when they are first looked at, and may fail in many ways
        return {"kind": "damaged", "detail": f"a value of the header is damaged ({type(error).__name__})"}


def _facts(dataset: Dataset) -> dict[str, Any]:
    modality = _code(plain(dataset, "Modality"))
    sop_class = str(plain(dataset, "SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    facts: dict[str, Any] = {
        "kind": "image" if "Rows" in dataset and "Columns" in dataset else "other",
        "modality": modality,
        "sop_class": sop_class if sop_class.startswith("1.2.840.10008.") else "",
        "syntax": str(dataset.file_meta.get("TransferSyntaxUID") or ""),
        "sop": hash_uid(plain(dataset, "SOPInstanceUID")),
        "series": hash_uid(plain(dataset, "SeriesInstanceUID")),
        "study": hash_uid(plain(dataset, "StudyInstanceUID")),
        "patient": hash_uid(plain(dataset, "PatientID") or plain(dataset, "PatientName")),
        "frame_of_reference": hash_uid(plain(dataset, "FrameOfReferenceUID")),
        "burned_in": str(plain(dataset, "BurnedInAnnotation") or "").upper() == "YES",
    }
    references = [hash_uid(item.get("SeriesInstanceUID")) for item in dataset.get("ReferencedSeriesSequence") or []]
    for frame in dataset.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            for series in study.get("RTReferencedSeriesSequence") or []:
                references.append(hash_uid(series.get("SeriesInstanceUID")))
    facts["references"] = sorted(set(references))
    if facts["kind"] == "other":
        if sop_class in IMAGE_CLASSES or not sop_class:
            return {"kind": "damaged", "detail": "the header breaks off, or lacks the size of the image"}
        return facts
    image_type = plain(dataset, "ImageType") or []
    photometric = plain(dataset, "PhotometricInterpretation")
    kernel = plain(dataset, "ConvolutionKernel")
    words = {str(word).strip().upper() for word in ([image_type] if isinstance(image_type, str) else image_type)}
    facts |= {
        "words": sorted(words & _WORDS),
        "rows": int(dataset.Rows),
        "columns": int(dataset.Columns),
        "samples": int(dataset.get("SamplesPerPixel") or 1),
        "frames": int(plain(dataset, "NumberOfFrames") or 1),
        "photometric": _code(photometric) or ("UNKNOWN" if photometric else ""),
        "acquisition": _number(plain(dataset, "AcquisitionNumber")),
        "kernel": hash_uid("\\".join(kernel) if isinstance(kernel, list) else kernel),
        "tilt": _number(plain(dataset, "GantryDetectorTilt")),
        "aspect": _numbers(plain(dataset, "PixelAspectRatio"), 2),
        "segmentation": _code(plain(dataset, "SegmentationType")),
        **(view_facts(dataset) if modality in PROJECTION_MODALITIES else {}),
        "slices": [],
    }
    if not 0 < facts["rows"] * facts["columns"] * facts["samples"] <= _MAX_PIXELS or facts["rows"] < 1:
        return {"kind": "damaged", "detail": "impossible size of the image"}
    if not 1 <= facts["frames"] <= MAX_FRAMES:
        return {"kind": "damaged", "detail": "impossible number of frames"}
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence")
    if per_frame:
        shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
        if len(per_frame) != facts["frames"]:
            return {"kind": "damaged", "detail": "the number of frames and of their descriptions differ"}
        facts["slices"] = [frame_facts(item, shared, dataset) for item in per_frame]
    elif facts["frames"] == 1:
        facts["slices"] = [slice_facts(dataset)]
    # Frames without functional groups (NM, US, cine) have no position each, so they give no slices.
    return facts


def plain(dataset: Dataset, name: str) -> Any:
    """Value of an attribute of type DS, IS, CS, LO, PN or UI as text, or a list of texts.

    pydicom's own conversion and checks of values take most of the time that a header costs; text that has not been
    converted yet is taken as it stands in the file.
    """
    element = dataset.get_item(_tag(name))
    if element is None:
        return None
    if not isinstance(element, RawDataElement) or element.VR not in _TEXT_VR or not isinstance(element.value, bytes):
        return dataset.get(name)
    values = [part.strip(" \0") for part in element.value.decode("latin-1").split("\\")]
    return values if len(values) > 1 else values[0]


def whole(dataset: Dataset, name: str, default: int = 0) -> int:
    """Value of an attribute of type US, without pydicom's conversion, for the same reason; `default` when empty."""
    element = dataset.get_item(_tag(name))
    if isinstance(element, RawDataElement) and element.VR in ("US", None) and len(element.value or b"") == 2:
        return int.from_bytes(element.value, "little" if element.is_little_endian else "big")
    return default if element is None else int(dataset.get(name) or default)


# An element without VR stands in a file of implicit VR, and what it is follows from its name.
_TEXT_VR = frozenset(["DS", "IS", "CS", "LO", "PN", "UI", "SH", None])


def slice_facts(dataset: Dataset) -> dict[str, Any]:
    """Plane of a single-frame file: position, orientation, spacing, and what tells images at one place apart."""
    return {
        "position": _numbers(plain(dataset, "ImagePositionPatient"), 3),
        "orientation": _numbers(plain(dataset, "ImageOrientationPatient"), 6),
        "spacing": _numbers(plain(dataset, "PixelSpacing"), 2),
        "between": _number(plain(dataset, "SpacingBetweenSlices")),
        "echo": _number(plain(dataset, "EchoTime")),
        "temporal": _number(plain(dataset, "TemporalPositionIdentifier")),
        "trigger": _number(plain(dataset, "TriggerTime")),
        "b": _number(dataset.get("DiffusionBValue")),
        "part": "",
    }


def frame_facts(frame: Dataset, shared: Dataset, dataset: Dataset) -> dict[str, Any]:
    """The same for one frame of a multi-frame file, from its functional groups."""

    def group(name: str) -> Dataset:
        items = frame.get(name) or shared.get(name)
        return items[0] if items else Dataset()

    part = _code(group("MRImageFrameTypeSequence").get("ComplexImageComponent"))
    measures, content = group("PixelMeasuresSequence"), group("FrameContentSequence")
    echo = group("MREchoSequence").get("EffectiveEchoTime")
    return {
        "position": _numbers(group("PlanePositionSequence").get("ImagePositionPatient"), 3),
        "orientation": _numbers(group("PlaneOrientationSequence").get("ImageOrientationPatient"), 6),
        "spacing": _numbers(measures.get("PixelSpacing"), 2),
        "between": _number(measures.get("SpacingBetweenSlices")),
        "echo": _number(echo if echo is not None else dataset.get("EchoTime")),
        "temporal": _number(content.get("TemporalPositionIndex")),
        "trigger": _number(group("CardiacSynchronizationSequence").get("NominalCardiacTriggerDelayTime")),
        "b": _number(group("MRDiffusionSequence").get("DiffusionBValue")),
        "part": part if part in _WORDS else "",
    }


def _code(value: Any) -> str:
    text = str(value or "").strip().upper()
    return text if text.replace("_", "").isalnum() and len(text) <= 16 else ""


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _numbers(value: Any, count: int) -> list[float] | None:
    """`count` finite numbers; ``None`` when absent, and an empty list when there but unusable."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = [value]
    try:
        numbers = [float(item) for item in value]
    except (TypeError, ValueError, OverflowError):
        return []
    return numbers if len(numbers) == count and all(math.isfinite(n) for n in numbers) else []
