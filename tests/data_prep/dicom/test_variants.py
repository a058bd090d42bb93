"""Small lies and oddities, each in an otherwise good series: exact by every header, or refused by name.

The quick tests use synthetic series, the slow ones the same variants of real ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset
from scipy.spatial.transform import Rotation

from data_prep.sources.dicom import Dicom
from tests.data_prep.dicom.test_samples import MORE, more
from tests.data_prep.dicom.test_series import _write, enhanced
from tests.data_prep.dicom_factories import assert_every_voxel_is_where_its_header_says, make_slice, uid
from tests.data_prep.factories import convert_tree, report_lines

Series = list[FileDataset]


def _position(one: FileDataset) -> np.ndarray:
    return np.array([float(value) for value in one.ImagePositionPatient])


def _place(one: FileDataset, position: np.ndarray) -> None:
    one.ImagePositionPatient = [f"{value:.9g}"[:16] for value in position]


def _step(series: Series) -> np.ndarray:
    return (_position(series[-1]) - _position(series[0])) / (len(series) - 1)


def _twin(one: FileDataset, name: str = "twin") -> FileDataset:
    other = copy.deepcopy(one)
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = uid(name, one.SOPInstanceUID)
    return other


def _shuffled_numbers(series: Series) -> None:
    for number, one in enumerate(series):
        one.InstanceNumber, one.SliceLocation = (7 * number + 3) % len(series), str(-number)


def _other_rescale(series: Series) -> None:
    series.append(_twin(series[1]))
    for one in series:
        one.RescaleSlope, one.RescaleIntercept = "1", "-1024"
    series[-1].RescaleIntercept = "0"


def _lost_rescale(series: Series) -> None:
    for one in series:
        one.RescaleSlope, one.RescaleIntercept = "1", "-1024"
    del series[1].RescaleSlope, series[1].RescaleIntercept


def _numbered(name: str, value: Callable[[int], Any]) -> Callable[[Series], None]:
    def change(series: Series) -> None:
        for number, one in enumerate(series):
            setattr(one, name, value(number))

    return change


def _half_step(series: Series) -> None:
    """A second time point, moved by half a slice: together they would be an even series of half the step."""
    half = _step(series) / 2
    for one in list(series):
        other = _twin(one)
        _place(other, _position(one) + half)
        other.TemporalPositionIdentifier = 2
        series.append(other)
        one.TemporalPositionIdentifier = 1


def _tilted(series: Series) -> None:
    row = np.array([float(value) for value in series[0].ImageOrientationPatient[:3]])
    for number, one in enumerate(series):
        _place(one, _position(one) + 0.05 * number * np.linalg.norm(_step(series)) * row)


def _turned(series: Series) -> None:
    axes = np.array([float(value) for value in series[-1].ImageOrientationPatient]).reshape(2, 3)
    turned = Rotation.from_rotvec(np.radians(0.05) * np.cross(*axes)).apply(axes)
    series[-1].ImageOrientationPatient = [f"{value:.12f}"[:16] for value in turned.ravel()]


def _wider(series: Series) -> None:
    series[-1].PixelSpacing = [f"{1.01 * float(value):.8g}" for value in series[-1].PixelSpacing]


def _without(name: str, where: slice = slice(None)) -> Callable[[Series], None]:
    def change(series: Series) -> None:
        for one in series[where]:
            one.pop(name, None)

    return change


def _detector_spacing(series: Series) -> None:
    for one in series:
        one.ImagerPixelSpacing = one.PixelSpacing
        del one.PixelSpacing


def _screen(series: Series) -> None:
    """A screenshot that was given the place behind the last slice."""
    shot = _twin(series[-1])
    shot.SOPClassUID = shot.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    _place(shot, _position(series[-1]) + _step(series))
    series.append(shot)


def _localizer(series: Series) -> None:
    one = _twin(series[0])
    one.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    _place(one, _position(series[-1]) + _step(series))
    series.append(one)


def _aspect(first: int, second: int) -> Callable[[Series], None]:
    return _numbered("PixelAspectRatio", lambda number: [first, second])


def _upside_down(series: Series) -> None:
    first, step = _position(series[0]), _step(series)
    for number, one in enumerate(series):
        _place(one, first - number * step)


def _half(value: Callable[[int, int], Any], name: str) -> Callable[[Series], None]:
    def change(series: Series) -> None:
        for number, one in enumerate(series):
            setattr(one, name, value(number, len(series)))

    return change


# name -> change, options, and the reasons of files that are left out; {""} when all become volumes
VARIANTS: dict[str, tuple[Callable[[Series], Any], dict[str, Any], set[str]]] = {
    "as it is": (lambda series: None, {}, {""}),
    "instance numbers shuffled": (_shuffled_numbers, {}, {""}),
    "a slice missing": (lambda series: series.pop(1), {}, {"missing-slice"}),
    "a copy": (lambda series: series.append(_twin(series[1])), {}, {"", "duplicate"}),
    "a copy with another rescale": (_other_rescale, {}, {"same-position"}),
    "a slice without rescale": (_lost_rescale, {}, {"bad-rescale"}),
    "acquisitions alternate": (_numbered("AcquisitionNumber", lambda k: k % 2), {}, {"time-points"}),
    "acquisitions alternate, merged": (_numbered("AcquisitionNumber", lambda k: k % 2), {"time": "merge"}, {""}),
    "acquisitions follow each other": (_half(lambda k, n: 1 + (2 * k >= n), "AcquisitionNumber"), {}, {""}),
    "trigger time of every slice": (_numbered("TriggerTime", lambda k: str(100 * (k % 7) + k)), {}, {""}),
    "time points half a step apart": (_half_step, {}, {"time-points"}),
    "first of these": (_half_step, {"time": "first"}, {"", "not-taken"}),
    "tilt": (_tilted, {}, {"gantry-tilt"}),
    "last slice turned by 0.05 degrees": (_turned, {}, {"mixed-orientations"}),
    "last slice with wider pixels": (_wider, {}, {"mixed-spacings"}),
    "last slice without orientation": (_without("ImageOrientationPatient", slice(-1, None)), {}, {"no-position"}),
    "last slice without spacing": (_without("PixelSpacing", slice(-1, None)), {}, {"no-position"}),
    "last slice without position": (_without("ImagePositionPatient", slice(-1, None)), {}, {"no-position"}),
    "spacing of the detector alone": (_detector_spacing, {}, {"no-position"}),
    "a screenshot among the slices": (_screen, {}, {"", "secondary-capture"}),
    "a localizer among the slices": (_localizer, {}, {"", "localizer"}),
    "aspect ratio contradicts": (_aspect(2, 1), {}, {"bad-geometry"}),
    "aspect ratio by habit": (_aspect(1, 1), {}, {""}),
    "negative SpacingBetweenSlices": (_numbered("SpacingBetweenSlices", lambda k: "-3"), {}, {""}),
    "upside down": (_upside_down, {}, {""}),
    "another frame of reference": (
        _half(lambda k, n: uid("f", 2 * k >= n), "FrameOfReferenceUID"), {}, {"mixed-frames-of-reference"}
    ),
    "another patient": (_half(lambda k, n: f"P{2 * k >= n}", "PatientID"), {}, {"mixed-patients"}),
    "one slice": (lambda series: series.__delitem__(slice(1, None)), {}, {"single-slice"}),
    "kernels alternate": (_numbered("ConvolutionKernel", lambda k: ["B30f", "B70f"][k % 2]), {}, {""}),
    "echo times alternate": (_numbered("EchoTime", lambda k: ["10", "80"][k % 2]), {}, {""}),
    "b-values alternate": (_numbered("DiffusionBValue", lambda k: [0.0, 800.0][k % 2]), {}, {""}),
    "last slice with another echo time": (
        _half(lambda k, n: ["10", "80"][k == n - 1], "EchoTime"), {}, {"", "stray-slice"}
    ),
    "polarities alternate": (_numbered("PhotometricInterpretation", lambda k: f"MONOCHROME{k % 2 + 1}"), {}, {""}),
}  # fmt: skip


def _check(tmp_path: Path, series: Series, name: str, converter: str = "simpleitk") -> None:
    change, options, reasons = VARIANTS[name]
    change(series)
    folder = _write(tmp_path / "in", series)
    convert_tree(Dicom(converter=converter, **options), folder, tmp_path / "out")
    lines = report_lines(tmp_path / "out")
    verdicts = {path: lines["file", path.name, ""] for path in sorted(folder.iterdir())}
    assert {reason for _, reason in verdicts.values()} == reasons
    assert all((status == "ok") == (not reason) for status, reason in verdicts.values())
    used = [path for path, (status, _) in verdicts.items() if status == "ok"]
    images = sorted((tmp_path / "out").glob("images/*.nii.gz"))
    assert bool(images) == bool(used)
    if len(images) == 1:
        assert_every_voxel_is_where_its_header_says(images[0], used)
    elif images:
        # Two contrasts: each file is in the volume of its kind, and every voxel belongs to a file.
        assert sum(nibabel.load(path).shape[2] for path in images) == len(used) and len(images) == 2
        kinds = [
            [path for path in used if str(pydicom.dcmread(path).get(tag)) == value]
            for tag in ("ConvolutionKernel", "EchoTime", "DiffusionBValue", "PhotometricInterpretation")
            for value in sorted({str(pydicom.dcmread(path).get(tag)) for path in used})
        ]
        kinds = [kind for kind in kinds if len(kind) < len(used)]
        for image in images:
            assert any(_holds(image, kind) for kind in kinds)


def _holds(image: Path, files: list[Path]) -> bool:
    try:
        assert_every_voxel_is_where_its_header_says(image, files)
    except (AssertionError, IndexError):
        return False
    return True


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variant_of_a_series_is_exact_or_refused_by_name(tmp_path, capsys, name):
    number = list(VARIANTS).index(name)
    series = [make_slice(k, angle=0.3 * (number % 2), modality=["CT", "MR"][number % 2]) for k in range(8)]
    _check(tmp_path, series, name, ["simpleitk", "dcm2niix"][number % 8 == 0])


REAL = {
    "T1 oblique": ("mr_t1_dicom/anat-T1w", 8),
    "CT JPEG 2000": ("ct_totalsegmentator/example_ct_dicom", 6),
    "MR lossless JPEG": ("dicom_edge/ts_jpeg_lossless", 4),
    "MR RLE": ("dicom_edge/ts_rle", 4),
    "tumor T1": ("../brain_tumor_progression_dicom/PGBM-003/11-T1post-18670", 8),
}


@more
@pytest.mark.slow
@pytest.mark.parametrize("converter", ["simpleitk", "dcm2niix"])
@pytest.mark.parametrize("base", list(REAL))
@pytest.mark.parametrize("name", list(VARIANTS))
def test_variant_of_a_real_series_is_exact_or_refused_by_name(tmp_path, capsys, name, base, converter):
    folder, count = REAL[base]
    files = [path for path in sorted((MORE / folder).iterdir()) if path.is_file()]
    series = sorted(map(pydicom.dcmread, files), key=lambda one: tuple(_position(one)))
    axis = int(np.argmax(np.abs(_step(series))))
    series = sorted(series, key=lambda one: _position(one)[axis])[:count]
    for one in series:
        one.PatientID, one.AcquisitionNumber = "P1", 1
        if "FrameOfReferenceUID" not in one:
            one.FrameOfReferenceUID = uid("frame")
    _check(tmp_path, series, name, converter)


def _frame_group(one: FileDataset, number: int, sequence: str, **values: Any) -> None:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    setattr(one.PerFrameFunctionalGroupsSequence[number], sequence, [item])


def _frame_spacings(one: FileDataset) -> None:
    for number in range(6):
        _frame_group(one, number, "PixelMeasuresSequence", PixelSpacing=["0.8", "0.7" if number < 5 else "0.71"])


def _frame_rescales(one: FileDataset) -> None:
    for number in range(5):
        _frame_group(
            one, number, "PixelValueTransformationSequence", RescaleSlope="2", RescaleIntercept="1", RescaleType="US"
        )


def _frame_without_position(one: FileDataset) -> None:
    del one.PerFrameFunctionalGroupsSequence[5].PlanePositionSequence


def _b_values(one: FileDataset) -> None:
    for number in range(12):
        _frame_group(one, number, "MRDiffusionSequence", DiffusionBValue=800.0 * (number >= 6))
        one.PerFrameFunctionalGroupsSequence[number].FrameContentSequence[0].TemporalPositionIndex = 1


def _phases(one: FileDataset) -> None:
    for number in range(12):
        _frame_group(one, number, "CardiacSynchronizationSequence", NominalCardiacTriggerDelayTime=50.0 * (number >= 6))
        one.PerFrameFunctionalGroupsSequence[number].FrameContentSequence[0].TemporalPositionIndex = 1


def _echoes(one: FileDataset) -> None:
    for number in range(12):
        _frame_group(one, number, "MREchoSequence", EffectiveEchoTime=10.0 + 70 * (number >= 6))
        one.PerFrameFunctionalGroupsSequence[number].FrameContentSequence[0].TemporalPositionIndex = 1


def _times_half_a_step_apart(one: FileDataset) -> None:
    for number in range(6, 12):
        item = one.PerFrameFunctionalGroupsSequence[number].PlanePositionSequence[0]
        item.ImagePositionPatient = [-20, -30, 40 + 2.5 * (number - 6) + 1.25]


def _lost_description(one: FileDataset) -> None:
    """The pixels of the third frame are still there, so those of all that follow would move up by one place."""
    del one.PerFrameFunctionalGroupsSequence[2]
    one.NumberOfFrames = "5"
    for number, frame in enumerate(one.PerFrameFunctionalGroupsSequence):
        frame.PlanePositionSequence[0].ImagePositionPatient = [-20, -30, 40 + 2.5 * number]


ENHANCED: dict[str, tuple[Callable[[FileDataset], None], dict[str, Any], str, int]] = {
    "a frame with other spacing": (_frame_spacings, {}, "mixed-spacings", 0),
    "a frame whose description is lost": (_lost_description, {}, "unreadable-pixels", 0),
    "a frame without rescale": (_frame_rescales, {}, "bad-rescale", 0),
    "a frame without position": (_frame_without_position, {}, "no-position", 0),
    "two b-values": (_b_values, {"times": 2}, "", 2),
    "two phases": (_phases, {"times": 2}, "time-points", 0),
    "two echoes": (_echoes, {"times": 2}, "", 2),
    "two times half a step apart": (_times_half_a_step_apart, {"times": 2}, "time-points", 0),
}


@pytest.mark.parametrize("name", list(ENHANCED))
def test_variant_of_an_enhanced_object_is_exact_or_refused_by_name(tmp_path, capsys, name):
    change, options, reason, count = ENHANCED[name]
    one = enhanced(**options)
    change(one)
    convert_tree(Dicom(), _write(tmp_path / "in", [one]), tmp_path / "out")
    assert {found for (kind, _, _), (_, found) in report_lines(tmp_path / "out").items() if kind == "file"} == {reason}
    images = list((tmp_path / "out").glob("images/*.nii.gz"))
    assert len(images) == count
    frames = [frame.astype(float) for frame in one.pixel_array]
    for image in images:
        data = np.asanyarray(nibabel.load(image).dataobj)
        places = [k for k, frame in enumerate(frames) if any(np.array_equal(data[..., s].T, frame) for s in range(6))]
        assert data.shape[2] == 6 and places in (list(range(6)), list(range(6, 12)))


def test_tilt_that_only_a_tag_knows_of_is_reported(tmp_path, capsys):
    series = [make_slice(k) for k in range(6)]
    for one in series:
        one.GantryDetectorTilt = "12.5"
    assert convert_tree(Dicom(), _write(tmp_path / "in", series), tmp_path / "out") == 0
    assert "GantryDetectorTilt is 12.5" in (tmp_path / "private-out" / "report.csv").read_text()


@more
@pytest.mark.parametrize("change", ["SpacingBetweenSlices", "count", "protocol"])
def test_mosaic_that_contradicts_itself_is_refused(tmp_path, capsys, change):
    one = pydicom.dcmread(sorted((MORE / "dicom_edge" / "mosaic_siemens").iterdir())[0])
    if change == "SpacingBetweenSlices":
        one.SpacingBetweenSlices = str(float(one.SpacingBetweenSlices) * 1.5)
    elif change == "count":
        one[0x0019, 0x100A].value = 25
    else:
        one[0x0029, 0x1020].value = one[0x0029, 0x1020].value.replace(
            b"asSlice[1].sPosition.dTra", b"asSlice[1].sPosition.dCor"
        )
    convert_tree(Dicom(time="first"), _write(tmp_path / "in", [one]), tmp_path / "out")
    assert not list((tmp_path / "out").glob("images/*"))


@more
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("PatientID", "other", "mixed-patients"),
        ("FrameOfReferenceUID", uid("other"), "mixed-frames-of-reference"),
        ("PixelSpacing", ["3", "3"], "mixed-spacings"),
    ],
)
def test_mosaics_that_do_not_belong_together_are_refused(tmp_path, capsys, name, value, reason):
    mosaics = [pydicom.dcmread(path) for path in sorted((MORE / "dicom_edge" / "mosaic_siemens").iterdir())]
    setattr(mosaics[1], name, value)
    convert_tree(Dicom(time="first"), _write(tmp_path / "in", mosaics), tmp_path / "out")
    assert {found for (kind, _, _), (_, found) in report_lines(tmp_path / "out").items() if kind == "file"} == {reason}


@pytest.mark.parametrize("is_same", [True, False])
def test_channels_of_other_frames_of_reference_are_no_case(tmp_path, capsys, is_same):
    for name in ("t1", "t2"):
        series = [make_slice(k, series=name, modality="MR") for k in range(5)]
        for one in series:
            one.FrameOfReferenceUID = uid("frame", "" if is_same else name)
        _write(tmp_path / "in" / name, series)
    options: dict[str, Any] = {"channel": ["a=series t1", "b=series t2"]}
    code = convert_tree(Dicom(**options), tmp_path / "in", tmp_path / "out")
    reasons = {reason for (kind, _, _), (_, reason) in report_lines(tmp_path / "out").items() if kind == "series"}
    assert (code, reasons) == ((0, {""}) if is_same else (3, {"mixed-frames-of-reference"}))
    assert convert_tree(Dicom(other_frames=True, **options), tmp_path / "in", tmp_path / "out2") == 0
