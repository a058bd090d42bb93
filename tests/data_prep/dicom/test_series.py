"""Series as scanners, archives and anonymizers leave them: every voxel at its place, or a refusal by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from scipy.spatial.transform import Rotation

from data_prep.dicom.convert import mosaic
from data_prep.operations import Job
from data_prep.sources.dicom import Dicom
from tests.data_prep.dicom.test_samples import MORE, more
from tests.data_prep.dicom_factories import assert_every_voxel_is_where_its_header_says, make_slice, uid
from tests.data_prep.factories import convert_tree, report_lines

Series = list[FileDataset]
N = 8


def _slices(count: int = N, **options: Any) -> Series:
    return [make_slice(number, **options) for number in range(count)]


def _turn(slices: Series, row: Sequence[float], column: Sequence[float], step: float = 2.5, origin=(-20, -30, 40)):
    normal = np.cross(row, column)
    for number, one in enumerate(slices):
        one.ImageOrientationPatient = [f"{value:.13f}"[:16] for value in (*row, *column)]
        one.ImagePositionPatient = [f"{value:.10g}"[:16] for value in np.array(origin) + number * step * normal]
    return slices


def _euler(*angles: float) -> np.ndarray:
    return Rotation.from_euler("xyz", angles).as_matrix()


def _place(slices: Series, positions: Sequence[Sequence[float]]) -> Series:
    for one, position in zip(slices, positions, strict=True):
        one.ImagePositionPatient = [f"{value:.8f}"[:16] for value in position]
    return slices


def _each(slices: Series, **values: Any) -> Series:
    for number, one in enumerate(slices):
        for name, value in values.items():
            setattr(one, name, value(number) if callable(value) else value)
    return slices


def _without(slices: Series, *names: str) -> Series:
    for one in slices:
        for name in names:
            delattr(one, name)
    return slices


def _pixels(slices: Series, change: Callable[[np.ndarray], np.ndarray], **values: Any) -> Series:
    for one in slices:
        one.PixelData = change(np.frombuffer(one.PixelData, "<i2").reshape(one.Rows, one.Columns)).tobytes()
    return _each(slices, **values)


def _syntax(slices: Series, syntax: str) -> Series:
    for one in slices:
        if syntax in (RLELossless, JPEG2000Lossless):
            one.compress(syntax, generate_instance_uid=False)
        one.file_meta.TransferSyntaxUID = syntax
    return slices


def _second(**options: Any) -> Series:
    """Another set of slices at the same places in the same series."""
    return _each(_slices(series="b", seed=4, modality="MR", **options), SeriesInstanceUID=uid("series", "a"))


def _interleaved(offset_mm: float) -> Series:
    """Two stacks beside each other whose heights alternate evenly."""
    first, second = _slices(), _each(_slices(series="b", seed=4), SeriesInstanceUID=uid("series", "a"))
    _place(second, [(-20 + offset_mm, -30, 41.25 + 2.5 * k) for k in range(N)])
    return first + second


def enhanced(
    *,
    order: Sequence[int] | None = None,
    times: int = 1,
    stacks: int = 1,
    turn: np.ndarray | None = None,
    is_ct: bool = False,
    parts: Sequence[str] = ("MAGNITUDE",),
    own_rescale: bool = False,
) -> FileDataset:
    """An enhanced multi-frame object of six slices per stack, time point and part."""
    turn = np.eye(3) if turn is None else turn
    base = make_slice(0, modality="CT" if is_ct else "MR")
    base.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1" if is_ct else "1.2.840.10008.5.1.4.1.1.4.1"
    base.file_meta.MediaStorageSOPClassUID = base.SOPClassUID
    _without([base], "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope")
    _without([base], "RescaleIntercept", "SliceThickness")
    frames, pixels, generator = [], [], np.random.default_rng(0)
    for time in range(times):
        for part in parts:
            for number in range(6 * stacks):
                stack, place = divmod(number, 6)
                frame, content, position, orientation = Dataset(), Dataset(), Dataset(), Dataset()
                content.TemporalPositionIndex, content.StackID = time + 1, str(stack + 1)
                content.InStackPositionNumber, content.DimensionIndexValues = (
                    place + 1,
                    [stack + 1, place + 1, time + 1],
                )
                at = np.array([-20, -30, 40 + 200 * stack]) + place * 2.5 * turn[:, 2]
                position.ImagePositionPatient = [f"{value:.8f}"[:16] for value in at]
                orientation.ImageOrientationPatient = [f"{v:.12f}"[:16] for v in (*turn[:, 0], *turn[:, 1])]
                frame.FrameContentSequence, frame.PlanePositionSequence = [content], [position]
                frame.PlaneOrientationSequence = [orientation]
                if not is_ct:
                    kind = Dataset()
                    kind.ComplexImageComponent = part
                    frame.MRImageFrameTypeSequence = [kind]
                if own_rescale:
                    rescale = Dataset()
                    rescale.RescaleSlope, rescale.RescaleIntercept = f"{1 + 0.1 * place:.3f}", str(-10 * place)
                    rescale.RescaleType = "US"
                    frame.PixelValueTransformationSequence = [rescale]
                frames.append(frame)
                pixels.append(generator.integers(0, 2000, (12, 10)).astype("<i2").tobytes())
    picked = range(len(frames)) if order is None else order
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness, measures.SpacingBetweenSlices = ["0.8", "0.7"], "9", "11"
    shared.PixelMeasuresSequence = [measures]
    base.SharedFunctionalGroupsSequence = [shared]
    base.PerFrameFunctionalGroupsSequence = [frames[k] for k in picked]
    base.NumberOfFrames, base.PixelData = str(len(frames)), b"".join(pixels[k] for k in picked)
    return base


def _nuclear() -> FileDataset:
    one, detector = _each(_slices(1), Modality="NM", NumberOfFrames="6")[0], Dataset()
    one.PixelData *= 6
    detector.ImagePositionPatient, detector.ImageOrientationPatient = one.ImagePositionPatient, [1, 0, 0, 0, 1, 0]
    one.DetectorInformationSequence, one.SpacingBetweenSlices, one.SliceVector = [detector], "3", [1, 2, 3, 4, 5, 6]
    return _without([one], "ImagePositionPatient", "ImageOrientationPatient")[0]


def _cine(number: int) -> FileDataset:
    """A file of five frames with one position: its first frame must not pass for a slice."""
    one = _each([make_slice(number)], NumberOfFrames="5")[0]
    one.PixelData *= 5
    return one


def _sign_not_extended(pixels: np.ndarray) -> np.ndarray:
    return (pixels - 1000).astype("<u2") & 0x0FFF


# name -> series
EXACT: dict[str, Callable[[], Series]] = {
    "sagittal": lambda: _turn(_slices(), [0, 1, 0], [0, 0, -1]),
    "sagittal against the normal": lambda: _turn(_slices(), [0, 1, 0], [0, 0, -1], step=-2.5),
    "coronal": lambda: _turn(_slices(modality="MR"), [1, 0, 0], [0, 0, -1]),
    "axial against the normal": lambda: _turn(_slices(), [1, 0, 0], [0, 1, 0], step=-2.5),
    "axial, rows to the right": lambda: _turn(_slices(), [-1, 0, 0], [0, 1, 0]),
    "axial, turned by 180 degrees": lambda: _turn(_slices(), [-1, 0, 0], [0, -1, 0]),
    "axial, transposed": lambda: _turn(_slices(), [0, 1, 0], [1, 0, 0]),
    "double oblique": lambda: _turn(_slices(modality="MR"), *_euler(0.4, 0.7, -1.2)[:, :2].T),
    "oblique by 45 degrees": lambda: _turn(_slices(), *_euler(*[np.pi / 4] * 3)[:, :2].T, step=-3.3),
    "near a half turn": lambda: _turn(_slices(modality="MR"), *_euler(np.pi - 1e-3, 2e-3, np.pi + 3e-3)[:, :2].T),
    "far from the origin": lambda: _turn(_slices(), [1, 0, 0], [0, 1, 0], origin=(-1234.567, 2345.678, -3456.789)),
    "scientific notation": lambda: _each(
        _slices(),
        ImagePositionPatient=lambda k: ["-2.0E+01", "-3E1", f"{40 + 2.5 * k:.6E}"],
        ImageOrientationPatient=["1.0E0", "0e0", "-0.0", "0", "1E+00", "0"],
    ),
    # 0.04 degrees over 17.5 mm are 0.012 mm, which a right-angled grid meets within 0.006 mm.
    "tilt of rounding": lambda: _place(_slices(), [(-20, -30 + 0.00174 * k, 40 + 2.5 * k) for k in range(N)]),
    "jitter of rounding": lambda: _place(_slices(), [(-20, -30, 40 + 2.5 * k + 0.004 * (-1) ** k) for k in range(N)]),
    "SpacingBetweenSlices contradicts": lambda: _each(_slices(), SpacingBetweenSlices="7.5", SliceThickness="9"),
    "InstanceNumber descends": lambda: _each(
        _slices(), InstanceNumber=lambda k: N - k, SliceLocation=lambda k: str(-k)
    ),
    "implicit VR": lambda: _syntax(_slices(), ImplicitVRLittleEndian),
    "big endian": lambda: _pixels(_syntax(_slices(), ExplicitVRBigEndian), lambda pixels: pixels.astype(">i2")),
    "deflated": lambda: _syntax(_slices(), DeflatedExplicitVRLittleEndian),
    "RLE": lambda: _syntax(_slices(), RLELossless),
    "one UID for every instance": lambda: _each(_slices(), SOPInstanceUID=uid("one")),
    "unsigned, 12 of 16 bits": lambda: _each(_slices(), PixelRepresentation=0, BitsStored=12, HighBit=11),
    "signed, 12 bits, not extended": lambda: _pixels(_slices(), _sign_not_extended, BitsStored=12, HighBit=11),
    "8 bits": lambda: _pixels(
        _slices(modality="MR"),
        lambda pixels: (pixels % 256).astype("u1"),
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
    ),
    "unsigned above 32767": lambda: _without(
        _pixels(_slices(modality="MR"), lambda pixels: pixels.astype("<u2") * 30, PixelRepresentation=0),
        "RescaleSlope",
        "RescaleIntercept",
    ),
    "32 bits": lambda: _without(
        _pixels(
            _slices(modality="MR"),
            lambda pixels: pixels.astype("<u4") * 100000,
            BitsAllocated=32,
            BitsStored=32,
            HighBit=31,
            PixelRepresentation=0,
        ),
        "RescaleSlope",
        "RescaleIntercept",
    ),
    "intercept per slice": lambda: _each(_slices(), RescaleIntercept=lambda k: str(k - 1024)),
    "PET slopes": lambda: _each(
        _slices(),
        Modality="PT",
        SOPClassUID="1.2.840.10008.5.1.4.1.1.128",
        RescaleIntercept="0",
        RescaleSlope=lambda k: f"{0.37 + 0.011 * k:.6f}",
        Units="BQML",
    ),
    "enhanced, frames in any order": lambda: [enhanced(order=[3, 1, 5, 0, 2, 4])],
    "enhanced CT, oblique": lambda: [enhanced(is_ct=True, turn=_euler(0.3, 0.5, 0.2))],
    "enhanced, against the normal": lambda: [enhanced(order=[5, 4, 3, 2, 1, 0], turn=_euler(0.3, 0.1, 0.9))],
    "enhanced, rescale per frame": lambda: [enhanced(own_rescale=True)],
}

# name -> series, options, (status, reason)
REFUSED: dict[str, tuple[Callable[[], Series], dict[str, Any], str]] = {
    "two blocks with a gap": (lambda: _slices() + _slices(30)[20:], {}, "missing-slice"),
    "two stacks side by side": (lambda: _interleaved(100), {}, "uneven-positions"),
    "two stacks side by side, tilt allowed": (lambda: _interleaved(100), {"tilt": "resample"}, "uneven-positions"),
    "bent row, uneven allowed": (
        lambda: _place(_slices(), [(-20 + 3 * (k == 4), -30, 40 + 2.5 * k + (k > 3)) for k in range(N)]),
        {"uneven": "resample"},
        "uneven-positions",
    ),
    "slow drift": (
        lambda: _place(_slices(), [(-20, -30, 40 + 2.5 * k + 4e-3 * k * k) for k in range(N)]), {}, "uneven-spacing"
    ),
    "tilt of 0.04 degrees": (
        lambda: _place(_slices(60), [(0, 1.745e-3 * k, 2.5 * k) for k in range(60)]), {}, "gantry-tilt"
    ),
    "orientation alternates": (
        lambda: [_turn(_slices(), *_euler(8e-4 * (k % 2), 0, 0)[:, :2].T)[k] for k in range(N)],
        {},
        "mixed-orientations",
    ),
    "two frames of reference": (
        lambda: _each(_slices(), FrameOfReferenceUID=lambda k: uid("frame", k > 3)), {}, "mixed-frames-of-reference"
    ),
    "two patients": (lambda: _each(_slices(), PatientID=lambda k: f"P{k > 3}"), {}, "mixed-patients"),
    "one UID, other pixels": (
        lambda: _slices() + _pixels([make_slice(3)], lambda pixels: pixels[::-1]), {}, "same-position"
    ),
    "cine files": (lambda: [_cine(k) for k in range(4)], {}, "frames-without-position"),
    "nuclear medicine": (lambda: [_nuclear()], {}, "frames-without-position"),
    "two time points, no tag": (lambda: _slices(modality="MR") + _second(), {}, "same-position"),
    "enhanced, two stacks": (lambda: [enhanced(stacks=2)], {}, "missing-slice"),
    "enhanced, three times": (lambda: [enhanced(times=3)], {}, "time-points"),
    "a slice without position at the end": (
        lambda: _slices(N - 1) + _without([make_slice(N - 1)], "ImagePositionPatient"), {}, "no-position"
    ),
    "detector spacing alone": (
        lambda: _without(_each(_slices(), ImagerPixelSpacing=["0.5", "0.5"]), "PixelSpacing"), {}, "no-position"
    ),
}  # fmt: skip


def _write(folder: Path, slices: Series) -> Path:
    """Names say nothing about the order."""
    folder.mkdir(parents=True)
    for name, number in enumerate(np.random.default_rng(1).permutation(len(slices))):
        one = slices[number]
        if one.file_meta.TransferSyntaxUID == ExplicitVRBigEndian:
            plain = Dataset()  # forgets in which byte order it was made
            plain.update(one)
            plain.file_meta = one.file_meta
            one = plain
        pydicom.dcmwrite(folder / f"IM{name:04d}", one, enforce_file_format=True)
    return folder


def _convert(tmp_path: Path, slices: Series, converter: str, **options: Any) -> tuple[list[Path], set[Any]]:
    folder = _write(tmp_path / "in", slices)
    convert_tree(Dicom(converter=converter, **options), folder, tmp_path / "out")
    verdicts = {verdict for (kind, _, _), verdict in report_lines(tmp_path / "out").items() if kind == "file"}
    return sorted((tmp_path / "out").glob("images/*.nii.gz")), verdicts


def _alternating(names: Sequence[str]) -> Iterator[Any]:
    """Each series with one converter quickly, with the other one among the slow tests."""
    for number, name in enumerate(names):
        both = ["dcm2niix", "simpleitk"][:: 1 if number % 2 else -1]
        yield pytest.param(name, both[0], id=f"{name}-{both[0]}")
        yield pytest.param(name, both[1], id=f"{name}-{both[1]}", marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "converter"), _alternating(list(EXACT)))
def test_series_puts_every_voxel_where_its_header_says(tmp_path, capsys, name, converter):
    images, verdicts = _convert(tmp_path, EXACT[name](), converter)
    assert verdicts == {("ok", "")}
    assert_every_voxel_is_where_its_header_says(images[0], sorted((tmp_path / "in").iterdir()))


@pytest.mark.parametrize(("name", "converter"), _alternating(list(REFUSED)))
def test_series_that_is_no_volume_is_refused_by_name(tmp_path, capsys, name, converter):
    make, options, reason = REFUSED[name]
    images, verdicts = _convert(tmp_path, make(), converter, **options)
    assert images == []
    assert ("failed", reason) in verdicts


def test_file_without_preamble_is_read(tmp_path, capsys):
    folder = _write(tmp_path / "in", _slices())
    for path in folder.iterdir():
        with open(path, "rb") as file:
            content = file.read()
        at = 144 + int.from_bytes(content[140:144], "little")  # behind the meta information
        path.write_bytes(content[at:])
    convert_tree(Dicom(), folder, tmp_path / "out")
    (image,) = (tmp_path / "out").glob("images/*.nii.gz")
    assert_every_voxel_is_where_its_header_says(image, sorted(folder.iterdir()))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("echo time", lambda: _each(_slices(modality="MR"), EchoTime="4.6") + _each(_second(), EchoTime="9.2")),
        (
            "b-value",
            lambda: _each(_slices(modality="MR"), DiffusionBValue=0.0) + _each(_second(), DiffusionBValue=800.0),
        ),
        (
            "magnitude and phase",
            lambda: _each(_slices(modality="MR"), ImageType=["ORIGINAL", "PRIMARY", "M_FFE", "M", "FFE"])
            + _each(_second(), ImageType=["ORIGINAL", "PRIMARY", "PHASE MAP", "P", "FFE"]),
        ),
        ("size", lambda: _slices(modality="MR") + _second(shape=(16, 20))),
        ("parts of an enhanced object", lambda: [enhanced(parts=["MAGNITUDE", "PHASE"])]),
    ],
)  # fmt: skip
def test_images_of_two_kinds_in_one_series_become_two_volumes(tmp_path, capsys, name, make):
    images, verdicts = _convert(tmp_path, make(), "simpleitk")
    assert verdicts == {("ok", "")} and len(images) == 2
    sums = sorted(int(np.asanyarray(nibabel.load(image).dataobj).sum(dtype=np.int64)) for image in images)
    files = [pydicom.dcmread(path) for path in (tmp_path / "in").iterdir()]
    total = sum(
        int(one.pixel_array.sum(dtype=np.int64)) + int(one.get("RescaleIntercept", 0)) * one.Rows * one.Columns
        for one in files
    )
    assert sum(sums) == total and sums[0] != sums[1]


@pytest.mark.parametrize("tag", ["TemporalPositionIdentifier", "TriggerTime", "AcquisitionNumber"])
def test_first_of_two_time_points_is_taken_when_asked_for(tmp_path, capsys, tag):
    first, second = _each(_second(), **{tag: 1}), _each(_slices(modality="MR"), **{tag: 2})
    for one in (first[0], second[0]):  # equal pixels at two times are not a copy
        one.PixelData = bytes(len(one.PixelData))
    images, verdicts = _convert(tmp_path, second + first, "dcm2niix", time="first")
    assert verdicts == {("ok", ""), ("skipped", "not-taken")}
    lines = report_lines(tmp_path / "out")
    taken = [path for path in sorted((tmp_path / "in").iterdir()) if lines["file", path.name, ""][0] == "ok"]
    assert {int(pydicom.dcmread(path)[tag].value) for path in taken} == {1}
    assert_every_voxel_is_where_its_header_says(images[0], taken)


def test_copy_in_another_transfer_syntax_is_dropped(tmp_path, capsys):
    images, verdicts = _convert(tmp_path, _slices() + _syntax([make_slice(3)], RLELossless), "dcm2niix")
    assert verdicts == {("ok", ""), ("skipped", "duplicate")}
    assert nibabel.load(images[0]).shape[2] == N


def test_padding_is_set_to_air_by_the_rescale_of_each_slice(tmp_path, capsys):
    slices = _pixels(_slices(), lambda pixels: np.where(np.arange(12)[:, None] < 3, -2000, pixels).astype("<i2"))
    _each(slices, RescaleIntercept=lambda k: "-1024" if k < 4 else "0")
    for number, one in enumerate(slices):
        # Half of the scanners write the signed value with an unsigned type.
        one.add_new("PixelPaddingValue", "SS" if number % 2 else "US", -2000 if number % 2 else 63536)
    images, _ = _convert(tmp_path, slices, "dcm2niix")
    data = np.asanyarray(nibabel.load(images[0]).dataobj)
    assert (data[:, :3] == data[:, 3:].min()).all()
    at = [one.pixel_array[5, 5] + float(one.RescaleIntercept) for one in slices]
    assert list(data[5, 5]) == at


def _linear(one: FileDataset) -> FileDataset:
    """Pixels that are a linear function of the place, which linear interpolation keeps."""
    rows, columns = np.meshgrid(np.arange(one.Rows), np.arange(one.Columns), indexing="ij")
    row, column = np.array(one.ImageOrientationPatient, dtype=float).reshape(2, 3)
    spacing = [float(value) for value in one.PixelSpacing]
    place = np.array(one.ImagePositionPatient, dtype=float) + columns[..., None] * row * spacing[1]
    place = place + rows[..., None] * column * spacing[0]
    one.RescaleSlope, one.RescaleIntercept = "0.01", "0"
    one.PixelData = np.rint(_field(place) / 0.01).astype("<i2").tobytes()
    return one


def _field(lps: np.ndarray) -> np.ndarray:
    return lps @ [0.7, -0.4, 0.9] + 20


@pytest.mark.parametrize("name", ["tilt", "uneven", "tilt and uneven", "missing slice"])
def test_resampled_voxels_hold_what_lies_at_their_place(tmp_path, capsys, name):
    turn = _euler(0.2, -0.3, 0.1)
    heights = np.array([0, 2, 4, 7, 8, 11, 12, 14.0]) if "uneven" in name else 2.0 * np.arange(N)
    slices = _turn(_slices(shape=(24, 20)), *turn[:, :2].T)
    tilt = 0.3 if "tilt" in name else 0.0
    _place(slices, [turn[:, 2] * h + turn[:, 1] * h * tilt + [3, -4, 5] for h in heights])
    if name == "missing slice":
        del slices[3]
    images, verdicts = _convert(
        tmp_path, [_linear(one) for one in slices], "dcm2niix", tilt="resample", uneven="resample"
    )
    assert verdicts == {("resampled", "")}
    image = nibabel.load(images[0])
    data, voxels = image.get_fdata(), np.argwhere(np.ones(image.shape, dtype=bool))
    places = (voxels @ image.affine[:3, :3].T + image.affine[:3, 3]) * [-1, -1, 1]
    off = np.abs(data[tuple(voxels.T)] - _field(places)).reshape(image.shape)
    inside = off < 0.05
    # Outside of the slanted block lies the smallest value; inside, nothing else than what belongs there.
    assert (data[~inside] <= data.min() + 8).mean() > 0.5
    assert inside[3:17, 6:18].all()
    assert image.header.get_zooms()[2] == pytest.approx(2.0, abs=1e-3)


@more
def test_tiles_of_a_mosaic_lie_where_its_protocol_says(tmp_path):
    """The centers of the slices in the private protocol are not used by the conversion."""
    source = sorted((MORE / "dicom_edge" / "mosaic_siemens").iterdir())[0]
    path = tmp_path / "mosaic.nii.gz"
    mosaic(Job((source,), path, path))
    text, centers = pydicom.dcmread(source)[0x0029, 0x1020].value, np.zeros((36, 3))
    pattern = rb"sSliceArray\.asSlice\[(\d+)\]\.sPosition\.d(Sag|Cor|Tra)\s*=\s*([-\d.e]+)"
    for number, axis, value in re.findall(pattern, text):
        centers[int(number), [b"Sag", b"Cor", b"Tra"].index(axis)] = float(value)
    affine = nibabel.load(path).affine
    ours = np.array([(affine @ [32, 32, k, 1])[:3] * [-1, -1, 1] for k in range(36)])
    assert np.abs(ours - centers).max() < 0.001
