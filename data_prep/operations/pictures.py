"""Pictures: PNG and JPEG files as PNG, without the metadata they carried."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_prep.errors import CaseError, ImageReadError
from data_prep.geometry import Grid
from data_prep.operations import Job, Outcome, operation, place

#: a picture may not claim more pixels than this
MAX_PIXELS = 200_000_000
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")


@operation(version=2)
def picture(job: Job) -> Outcome:
    """A PNG of the same pixels.

    A PNG that needs no change is used as it is unless headers may be personal; everything else is written anew.

    Params:
        mode: ``"keep"`` (default), ``"L"`` or ``"RGB"``: number of channels of the result.
        max_side: shrink so that the longer side has at most this many pixels, keeping the aspect.
    """
    mode, max_side = job.params.get("mode", "keep"), job.params.get("max_side")
    image, was_rotated = open_picture(job.inputs[0])
    wanted = image.mode if mode == "keep" else mode
    notes = ("rotated as its EXIF orientation says",) if was_rotated else ()
    is_changed = was_rotated or wanted != image.mode
    if wanted != image.mode:
        if image.mode == "I;16":  # Pillow would clip 16 bits to 8 instead of scaling them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert(wanted)
    is_shrunk = False
    if max_side is not None and max(image.size) > max_side:
        is_shrunk = True
        scale = max_side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    grid = Grid(image.size, None)
    if image.format == "PNG" and not is_changed and not is_shrunk and not job.personal:
        return Outcome(grid, linked=place(job.inputs[0], job))
    write_png(job.output, image)
    return Outcome(grid, is_resampled=is_shrunk, notes=notes)


@operation(version=1)
def as_it_is(job: Job) -> Outcome:
    """A PNG or JPEG whose file is not touched, so that it can be linked; decoded once to see that it is whole.

    Only for sources whose identifiers are public: whatever else the file holds comes along.
    """
    if job.personal:
        raise CaseError("personal-file", "a file of a source with personal identifiers cannot be used as it is")
    image, was_rotated = open_picture(job.inputs[0])
    if was_rotated:
        raise CaseError("rotated", "the EXIF orientation asks for turning the picture; convert it to PNG")
    return Outcome(Grid(image.size, None), linked=place(job.inputs[0], job))


def open_picture(path: Path) -> tuple[Image.Image, bool]:
    """Decode a picture to the end, in ``L``, ``RGB``, ``RGBA`` or ``I;16``, upright.

    Returns:
        The picture and whether its EXIF orientation made it necessary to turn it.

    Raises:
        ImageReadError: not a picture, damaged, or more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ImageReadError("too-large", f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
            image.load()
            form = image.format
            upright = ImageOps.exif_transpose(image)
    except ImageReadError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many classes
        raise ImageReadError("damaged-picture", "the picture cannot be decoded") from error
    was_rotated = upright is not image and image.getexif().get(0x0112, 1) != 1
    if not was_rotated:
        upright = image
    if upright.mode not in ("L", "RGB", "RGBA", "I;16"):
        sixteen_bit = upright.mode in ("I", "I;16B", "I;16L")
        upright = upright.convert("I;16" if sixteen_bit else "L" if upright.mode in ("1", "LA") else "RGB")
    else:
        upright.format = form
    return upright, was_rotated


def write_png(path: os.PathLike[str] | str, image: Image.Image) -> None:
    """Write pixels only: no text, no EXIF, no color profile, no time; the same pixels give the same bytes."""
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    with open(path, "wb") as file:
        bare.save(file, format="PNG", compress_level=6)
        file.flush()
        os.fsync(file.fileno())
