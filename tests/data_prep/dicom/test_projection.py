"""X-rays: polarity, windows, lookup tables, padding."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom.dataset import Dataset

from data_prep.dicom.projection import breast_box, projection, render
from data_prep.errors import DicomReadError
from data_prep.operations import Job
from tests.data_prep.dicom_factories import make_slice


def _image(pixels: np.ndarray, **attributes: object):
    dataset = make_slice(0, shape=pixels.shape)
    dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 0, 12, 11
    dataset.RescaleIntercept = "0"
    dataset.PixelData = pixels.astype(np.uint16).tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


RAMP = np.linspace(0, 4000, 24).reshape(4, 6).round()


def test_monochrome2_keeps_its_order():
    pixels, _ = render(_image(RAMP))
    assert pixels.min() == 0 and pixels.max() == 65535 and (np.diff(pixels.ravel().astype(int)) > 0).all()


@pytest.mark.parametrize(
    "attributes",
    [
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    ],
    ids=["monochrome1", "inverse", "both-once"],
)
def test_inverted_images_are_turned_once(attributes):
    pixels, notes = render(_image(RAMP, **attributes))
    assert pixels.ravel()[0] == 65535 and pixels.ravel()[-1] == 0
    assert any("inverted" in note for note in notes)


def test_window_is_applied_and_can_be_chosen_or_left_out():
    image = _image(RAMP, WindowCenter=["1000", "3000"], WindowWidth=["200", "400"])
    first, second, none = (render(image, window)[0] for window in (0, 1, -1))
    at = int(np.argmin(np.abs(RAMP.ravel() - 2000)))
    assert first.ravel()[at] == 65535 and second.ravel()[at] == 0 and 0 < none.ravel()[at] < 65535
    with pytest.raises(DicomReadError, match="no-window"):
        render(image, 2)


def test_lookup_table_comes_before_the_window():
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [4001, 0, 16], [min(65535, 2 * v) for v in range(4001)]
    image = _image(RAMP, VOILUTSequence=[item], WindowCenter="10", WindowWidth="2")
    assert len(np.unique(render(image)[0])) > 10


def test_padding_becomes_background_and_does_not_stretch_the_range():
    padded = RAMP.copy()
    padded[0] = 4095
    pixels, _ = render(_image(padded, PixelPaddingValue=4095))
    assert (pixels[0] == 0).all() and pixels.max() == 65535


def test_breast_box_leaves_out_the_label_at_any_resolution():
    for scale in (1, 4):
        image = np.zeros((300 * scale, 200 * scale), np.uint16)
        image[60 * scale : 240 * scale, : 90 * scale] = 30000
        image[10 * scale : 20 * scale, 170 * scale : 195 * scale] = 65535
        top, bottom, left, right = np.array(breast_box(image)) / scale
        assert abs(top - 54) < 4 and abs(bottom - 246) < 4 and left == 0 and abs(right - 96) < 4


def film(scale: int) -> np.ndarray:
    """A breast of 180 x 90 at the left edge of a film: gray base, white borders, a label, a patch of zeros."""
    image = np.full((300, 200), 8000, np.float64) + np.random.default_rng(0).normal(0, 200, (300, 200))
    rows, columns = np.mgrid[:300, :200]
    depth = 1 - ((rows - 150) / 90) ** 2 - (columns / 90) ** 2
    image += np.where(depth > 0, 12000 + 30000 * np.clip(depth, 0, 1), 0)
    image[295:] = image[:, 196:] = 65535
    image[10:20, 150:190] = 65535
    image[100:160, 170:190] = 0
    return np.clip(image, 0, 65535).astype(np.uint16).repeat(scale, 0).repeat(scale, 1)


@pytest.mark.parametrize("scale", [1, 2, 4, 11])
def test_breast_box_on_film_with_gray_base_and_white_borders(scale):
    top, bottom, left, right = np.array(breast_box(film(scale))) / scale
    assert abs(top - 54) <= 3 and abs(bottom - 246) <= 3 and left == 0 and abs(right - 96) <= 3


def test_color_is_refused():
    image = _image(RAMP)
    image.NumberOfFrames = "2"
    image.PixelData = image.PixelData * 2
    with pytest.raises(DicomReadError, match="not-2d"):
        render(image)


def test_window_that_is_wider_than_what_occurs_is_not_stretched():
    pixels, _ = render(_image(RAMP, WindowCenter="4000", WindowWidth="8001"))
    assert pixels.ravel()[0] < 10 and abs(int(pixels.ravel()[-1]) - 65535 // 2) < 20


def test_padding_of_a_signed_image_written_with_an_unsigned_type_is_found():
    image = _image(RAMP, PixelRepresentation=1, BitsStored=16, HighBit=15)
    pixels = RAMP.astype(np.int16)
    pixels[0] = -2000
    image.PixelData = pixels.tobytes()
    image.add_new("PixelPaddingValue", "US", 63536)
    found, notes = render(image)
    assert (found[0] == 0).all() and found[1:].max() == 65535 and "padding set to background" in notes


@pytest.mark.parametrize(
    ("attributes", "note"),
    [
        ({"PixelSpacing": ["0.2", "0.1"]}, "2 times as high as wide (PixelSpacing)"),
        ({"PixelSpacing": [0, 0], "PixelAspectRatio": [1, 2]}, "0.5 times as high as wide (PixelAspectRatio)"),
        ({"PixelSpacing": ["0.1", "0.1"], "PixelAspectRatio": [1, 2]}, None),
    ],
)  # fmt: skip
def test_pixels_that_are_not_square_are_reported(tmp_path, attributes, note):
    path = tmp_path / "one.dcm"
    _image(RAMP, **attributes).save_as(path, enforce_file_format=True)
    outcome = projection(Job((path,), tmp_path / "one.png", tmp_path / "one.png", {}))
    found = [one for one in outcome.notes if "as high as wide" in one]
    assert found == ([f"pixels are {note}"] if note else [])
