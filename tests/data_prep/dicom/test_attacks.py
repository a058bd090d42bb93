"""Damaged and misleading DICOM: an exact volume, or a refusal by name; never a traceback, never a wrong affine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from data_prep.sources.dicom import Dicom
from tests.data_prep.dicom_factories import make_slice, oracle_distance, rotation, uid, write_series
from tests.data_prep.factories import convert_tree, report_lines


def _shift(slices, rng):
    """One slice moved by 0.02 to 5 mm in any direction."""
    number = rng.integers(len(slices))
    move = rng.normal(size=3)
    _move(slices[number], move / np.linalg.norm(move) * 10 ** rng.uniform(-1.7, 0.7))


def _move(dataset, offset):
    position = np.array([float(x) for x in dataset.ImagePositionPatient]) + offset
    dataset.ImagePositionPatient = [f"{value:.10g}"[:16] for value in position]


def _missing(slices, rng):
    del slices[rng.integers(1, len(slices) - 1)]


def _duplicate_position(slices, rng):
    first, second = rng.choice(len(slices), 2, replace=False)
    slices[first].ImagePositionPatient = slices[second].ImagePositionPatient


def _copy(slices, rng):
    twin = pydicom.dataset.FileDataset(
        "", slices[0], file_meta=slices[0].file_meta, preamble=b"\0" * 128
    )  # the same object under another name
    slices.append(twin)


def _reversed(slices, rng):
    for number, one in enumerate(reversed(slices)):
        one.InstanceNumber = number + 1


def _orientation(slices, rng):
    row, column = rotation(rng.uniform(0.001, 1.5))
    slices[rng.integers(len(slices))].ImageOrientationPatient = [f"{v:.13f}"[:16] for v in (*row, *column)]


def _tilt(slices, rng):
    angle = np.radians(rng.uniform(0.1, 30))
    direction = np.array([float(x) for x in slices[0].ImageOrientationPatient][3 * int(rng.integers(2)) :][:3])
    for number, one in enumerate(slices):
        _move(one, number * 2.5 * np.tan(angle) * direction)


def _series_uid(slices, rng):
    for number in rng.choice(len(slices), rng.integers(1, 4), replace=False):
        slices[number].SeriesInstanceUID = uid("other")


def _jitter(slices, rng):
    row, column = (np.array([float(x) for x in slices[0].ImageOrientationPatient][i : i + 3]) for i in (0, 3))
    for one in slices:
        _move(one, np.cross(row, column) * rng.uniform(-0.5, 0.5))


def _not_a_number(slices, rng):
    one = slices[rng.integers(len(slices))]
    text = rng.choice(["nan", "inf", "-inf", "1e400", "abc", ""])
    element = one["ImagePositionPatient" if rng.integers(2) else "PixelSpacing"]
    values = [str(value) for value in element.value]
    values[rng.integers(len(values))] = str(text)
    one.add(pydicom.DataElement(element.tag, "LO", values))  # written as text under another VR


def _pixel_spacing(slices, rng):
    slices[rng.integers(len(slices))].PixelSpacing = [f"{rng.uniform(0.3, 2):.4f}", "0.7"]


def _rescale(slices, rng):
    for one in slices:
        one.RescaleSlope, one.RescaleIntercept = f"{rng.uniform(0.1, 3):.6f}", f"{rng.uniform(-1000, 10):.3f}"


def _not_orthogonal(slices, rng):
    for one in slices:
        one.ImageOrientationPatient = ["1", "0", "0", f"{rng.uniform(0.001, 0.5):.6f}", "1", "0"]


def _no_position(slices, rng):
    del slices[rng.integers(len(slices))].ImagePositionPatient


def _rows(slices, rng):
    one = slices[rng.integers(len(slices))]
    one.Rows += int(rng.integers(-4, 5)) or 1


def _frames(slices, rng):
    slices[rng.integers(len(slices))].NumberOfFrames = str(rng.integers(2, 9))


def _first_or_last(slices, rng):
    del slices[0 if rng.integers(2) else -1]


def _swapped_steps(slices, rng):
    """Two halves at different steps."""
    row, column = (np.array([float(x) for x in slices[0].ImageOrientationPatient][i : i + 3]) for i in (0, 3))
    half = len(slices) // 2
    for number in range(half, len(slices)):
        _move(slices[number], np.cross(row, column) * (number - half) * rng.uniform(0.05, 2.5))


def _echo(slices, rng):
    for number, one in enumerate(slices):
        one.EchoTime = "10" if number % 2 else "80"


ATTACKS = {
    function.__name__.strip("_"): function
    for function in (
        _shift,
        _missing,
        _duplicate_position,
        _copy,
        _reversed,
        _orientation,
        _tilt,
        _series_uid,
        _jitter,
        _not_a_number,
        _pixel_spacing,
        _rescale,
        _not_orthogonal,
        _no_position,
        _rows,
        _frames,
        _first_or_last,
        _swapped_steps,
        _echo,
    )
}
# What must be refused whatever the numbers are.
REFUSED = {"missing", "duplicate_position", "tilt", "jitter", "not_orthogonal", "no_position", "swapped_steps"}


def _attack(folder: Path, name: str, seed: int, converter: str) -> str:
    rng = np.random.default_rng([seed, sorted(ATTACKS).index(name)])
    write_series(
        folder / "in",
        int(rng.integers(6, 12)),
        edit=lambda slices: ATTACKS[name](slices, rng),
        angle=float(rng.uniform(0, 0.6)) * int(rng.integers(2)),
        step=float(rng.uniform(0.5, 6)),
        shuffle=seed,
        modality="CT" if rng.integers(2) else "MR",
    )
    code = convert_tree(Dicom(converter=converter), folder / "in", folder / "out")
    lines = report_lines(folder / "out")
    paths = sorted((folder / "in").iterdir())
    verdicts = {path.name: lines["file", path.name, ""] for path in paths}
    statuses = {status for status, _ in lines.values()}
    # Nothing converted is not "all fine": 1 even where every file was rightly skipped.
    assert code == (3 if "failed" in statuses else 0 if statuses & {"ok", "resampled"} else 1)
    assert all(status == "ok" or reason for status, reason in verdicts.values()), verdicts
    outputs = sorted((folder / "out").glob("images/*.nii.gz"))
    for path in paths:
        if verdicts[path.name][0] == "ok":
            dataset = pydicom.dcmread(path)
            assert min(oracle_distance(output, [dataset]) for output in outputs) <= 0.01, (name, seed)
    return "exact" if outputs else "refused"


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_attack_ends_exact_or_refused(tmp_path, name, capsys):
    ends = {_attack(tmp_path / "0", name, 0, "dcm2niix"), _attack(tmp_path / "1", name, 1, "simpleitk")}
    if name in REFUSED:
        assert ends == {"refused"}


@pytest.mark.slow
def test_500_attacks_give_no_wrong_affine(tmp_path, capsys):
    """No output of any of 500 attacks puts a voxel more than 0.01 mm from its place."""
    names = sorted(ATTACKS)
    for number in range(500):
        name = names[number % len(names)]
        end = _attack(tmp_path / str(number), name, 100 + number, "dcm2niix" if number % 4 == 0 else "simpleitk")
        assert end == "refused" or name not in REFUSED, (name, number)


def test_factory_series_is_accepted_and_exact(tmp_path):
    """The attacks start from something good."""
    slices = write_series(tmp_path / "in", 8, angle=0.3)
    assert convert_tree(Dicom(), tmp_path / "in", tmp_path / "out") == 0
    (path,) = (tmp_path / "out" / "images").iterdir()
    assert oracle_distance(path, slices) < 0.001
    assert make_slice(0).Rows == 12
