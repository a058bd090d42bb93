"""X-rays and mammograms as 16-bit PNG in which dense tissue is bright, with the window the file asks for."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from PIL import Image

from data_prep.dicom.convert import padding_range
from data_prep.dicom.headers import named_errors, read_dataset
from data_prep.dicom.pixels import decode
from data_prep.errors import DicomReadError
from data_prep.geometry import Grid
from data_prep.memory import bounded
from data_prep.operations import Job, Outcome, operation
from data_prep.operations.pictures import MAX_PIXELS, write_png

#: bytes that all copies of a pixel may take, of which many are float64
_MEMORY_PER_PIXEL = 160
#: pixels whose sides differ by less than this part are square
_SQUARE = 0.005


@operation(version=1)
@named_errors
def projection(job: Job) -> Outcome:
    """One X-ray or mammogram.

    Steps: stored values, modality LUT or rescale, padding to background, VOI LUT or window, inversion of MONOCHROME1
    (or of an INVERSE presentation LUT), linear to 16 bit.

    Params:
        window: number of the VOI LUT or window, from 0; -1 for none (the full range of values).
        max_side: shrink so that the longer side has at most this many pixels.
        crop_breast: cut to the breast (see `breast_box`).
        notes: of the plan.
    """
    dataset = read_dataset(job.inputs[0], pixels=True)
    with bounded(job.inputs, _MEMORY_PER_PIXEL * int(dataset.get("Rows") or 0) * int(dataset.get("Columns") or 0)):
        return _make_png(job, dataset)


def _make_png(job: Job, dataset: Any) -> Outcome:
    pixels, notes = render(dataset, int(job.params.get("window", 0)))
    notes = [*job.params.get("notes", []), *notes, *_aspect_note(dataset)]
    if job.params.get("crop_breast"):
        top, bottom, left, right = breast_box(pixels)
        notes.append(f"cropped to rows {top}-{bottom} and columns {left}-{right}")
        pixels = pixels[top:bottom, left:right]
    small = shrink(pixels, job.params.get("max_side", 0))
    write_png(job.output, Image.fromarray(np.ascontiguousarray(small)))
    return Outcome(Grid((small.shape[1], small.shape[0]), None), is_resampled=small is not pixels, notes=tuple(notes))


def _aspect_note(dataset: Any) -> list[str]:
    """A remark where pixels are not square, which a PNG does not say."""
    for name in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        values = [float(value) for value in dataset.get(name) or []]
        if len(values) == 2 and min(values) > 0:
            ratio = values[0] / values[1]
            return [f"pixels are {ratio:.4g} times as high as wide ({name})"] if abs(ratio - 1) > _SQUARE else []
    return []


def shrink(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """A picture whose longer side has at most `max_side` pixels, by means over areas; itself when it has, or for 0."""
    if not max_side or max(pixels.shape) <= max_side:
        return pixels
    scale = max_side / max(pixels.shape)
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    small = Image.fromarray(pixels.astype(np.float32)).resize(size, Image.Resampling.BOX)
    return np.clip(np.rint(np.asarray(small)), 0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)


def render(dataset: Any, window: int = 0) -> tuple[np.ndarray, list[str]]:
    """Pixels of a grey 2D image as uint16, dense tissue bright.

    Returns:
        ``(rows, columns)`` and notes on what was done.

    Raises:
        DicomReadError: color, several frames, too large, or not readable.
    """
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    if int(dataset.get("Rows") or 0) * int(dataset.get("Columns") or 0) > MAX_PIXELS:
        raise DicomReadError("too-large", f"more than {MAX_PIXELS} pixels")
    stored = decode(dataset)
    if stored.ndim != 2:
        raise DicomReadError("not-2d", f"the image has {stored.ndim} dimensions (color or several frames)")
    notes = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            padding = _padding(dataset, stored)
            values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
            low, high = _range(values, padding)
            num_windows = _num_windows(dataset)
            if window >= 0 and num_windows:
                if window >= num_windows:
                    raise DicomReadError("no-window", f"window {window} was asked for, the file has {num_windows}")
                lut_input = np.rint(values).astype(np.int64) if dataset.get("VOILUTSequence") else values
                values = np.asarray(apply_voi_lut(lut_input, dataset, index=window), dtype=np.float64)
                low, high = _voi_range(dataset, window)
                notes.append("window of the file")
    except DicomReadError:
        raise
    except Exception as error:
        raise DicomReadError("bad-window", f"lookup table or window cannot be used ({type(error).__name__})") from error
    if not np.isfinite([low, high]).all() or high <= low:
        high = low + 1
    scaled = np.clip((values - low) / (high - low), 0, 1)
    if is_inverted(dataset):
        scaled = 1 - scaled
        notes.append("inverted, so that dense tissue is bright")
    if padding is not None:
        scaled[padding] = 0
        notes.append("padding set to background")
    return np.rint(scaled * 65535).astype(np.uint16), notes


def is_inverted(dataset: Any) -> bool:
    """Whether small values mean bright: MONOCHROME1, or an INVERSE presentation LUT.

    DX and MG with MONOCHROME1 carry INVERSE as well (the standard asks for both); that is one inversion, not two.
    """
    shape = str(dataset.get("PresentationLUTShape") or "").upper()
    return str(dataset.get("PhotometricInterpretation") or "") == "MONOCHROME1" or shape == "INVERSE"


def _padding(dataset: Any, stored: np.ndarray) -> np.ndarray | None:
    span = padding_range(dataset)
    if span is None:
        return None
    mask = (stored >= span[0]) & (stored <= span[1])
    return mask if mask.any() and not mask.all() else None


def _range(values: np.ndarray, padding: np.ndarray | None) -> tuple[float, float]:
    inside = values if padding is None else values[~padding]
    return float(inside.min()), float(inside.max())


def _num_windows(dataset: Any) -> int:
    if dataset.get("VOILUTSequence"):
        return len(dataset.VOILUTSequence)
    center, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if center in (None, "") or width in (None, ""):
        return 0
    widths = [float(width)] if isinstance(width, (int, float, str)) else [float(one) for one in width]
    return len(widths) if all(one >= 1 for one in widths) else 0


def _voi_range(dataset: Any, window: int) -> tuple[float, float]:
    """Range of the window's output, so that its full width and not only what occurs becomes 0 to 65535."""
    from pydicom.pixels import apply_voi_lut

    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[window].LUTDescriptor[2])
        data = dataset.VOILUTSequence[window].LUTData
        return 0.0, float(min(2**bits - 1, max(data)) if not isinstance(data, bytes) else 2**bits - 1)
    low, high = apply_voi_lut(np.array([-1e9, 1e9]), dataset, index=window)
    return float(low), float(high)


#: a picture is analyzed on at most this many pixels a side, so that the result does not depend on the resolution
_COARSE = 512
#: tissue is brighter than the background by this share of the way to the median tissue
_TISSUE_SHARE = 0.15
#: strips thinner than twice this share of the longer side (borders of the film) are no tissue
_STRIP_SHARE = 0.012


def breast_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Rows and columns (top, bottom, left, right) of the breast in a mammogram.

    Otsu's threshold tells tissue from background roughly; the limit is then put just above the median background, which
    on films is far from zero. Strips along the border are opened away, and of the regions left the largest is the
    breast: labels burned into a corner are smaller and drop out. Two percent of the longer side are left as margin.
    """
    from scipy.ndimage import binary_opening
    from skimage.filters import threshold_otsu
    from skimage.measure import label, regionprops

    step = max(1, -(-max(pixels.shape) // _COARSE))
    small = pixels[::step, ::step].astype(np.float32)
    whole = 0, pixels.shape[0], 0, pixels.shape[1]
    if small.max() <= small.min():
        return whole
    is_bright = small > threshold_otsu(small)
    background, tissue = np.median(small[~is_bright]), np.median(small[is_bright])
    is_tissue = small > background + _TISSUE_SHARE * (tissue - background)
    opened = binary_opening(is_tissue, iterations=max(1, round(_STRIP_SHARE * max(small.shape))))
    regions = regionprops(label(opened))
    if not regions:
        return whole
    top, left, bottom, right = max(regions, key=lambda region: region.area).bbox
    margin = round(0.02 * max(pixels.shape))
    return (
        max(0, top * step - margin),
        min(pixels.shape[0], bottom * step + margin),
        max(0, left * step - margin),
        min(pixels.shape[1], right * step + margin),
    )
