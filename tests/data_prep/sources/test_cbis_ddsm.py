"""CBIS-DDSM: three layouts, swapped crops and masks, pairs, labels, patients in both parts, the published split."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from data_prep.check import check_data_set
from data_prep.cli import main
from data_prep.errors import DatasetError, UsageError
from data_prep.sources.cbis_ddsm import CbisDdsm, pad_to_square, to_mask
from monai_mamba.training.datalist import load_cases
from tests.data_prep.factories import convert_tree, report_lines, tree_bytes, write_bytes, write_csv

SHAPE = (120, 80)
#: set, patient, side, view, lesion, pathology
LESIONS = [
    ("Mass-Training", 1, "LEFT", "CC", 1, "BENIGN"),
    ("Mass-Training", 1, "LEFT", "MLO", 1, "BENIGN"),
    ("Mass-Training", 1, "LEFT", "MLO", 2, "MALIGNANT"),
    ("Mass-Training", 1, "RIGHT", "CC", 1, "BENIGN"),
    ("Mass-Training", 3, "LEFT", "CC", 1, "BENIGN"),
    ("Mass-Training", 3, "LEFT", "MLO", 1, "BENIGN"),
    ("Mass-Test", 4, "LEFT", "CC", 1, "MALIGNANT"),
    ("Mass-Test", 4, "LEFT", "MLO", 1, "MALIGNANT"),
    ("Calc-Training", 2, "RIGHT", "CC", 1, "BENIGN_WITHOUT_CALLBACK"),
    ("Calc-Training", 2, "RIGHT", "MLO", 1, "BENIGN_WITHOUT_CALLBACK"),
    ("Calc-Training", 3, "LEFT", "CC", 1, "MALIGNANT"),
    ("Calc-Training", 3, "LEFT", "MLO", 1, "MALIGNANT"),
    ("Calc-Training", 4, "RIGHT", "CC", 1, "BENIGN"),
    ("Calc-Training", 4, "RIGHT", "MLO", 1, "BENIGN"),
    ("Calc-Test", 5, "LEFT", "CC", 1, "BENIGN"),
    ("Calc-Test", 5, "LEFT", "MLO", 1, "BENIGN"),
]


def _uid(*parts: object) -> str:
    return generate_uid(entropy_srcs=["cbis", *map(str, parts)])


def mammogram_pixels(patient: int, side: str, view: str) -> np.ndarray:
    """16 bits: a bright breast at the left edge, a film label in the corner; the same in the mass and calc set."""
    generator = np.random.default_rng([patient, side == "LEFT", view == "CC"])
    pixels = np.zeros(SHAPE, np.uint16)
    pixels[20:100, :50] = generator.integers(20000, 60000, (80, 50))
    pixels[2:8, 70:78] = 65535
    return pixels


def mask_pixels(lesion: int) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[30 * lesion : 30 * lesion + 12, 10:20] = 255
    return mask


def _write_dicom(path: Path, pixels: np.ndarray, series: str) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = _uid(series, path.name)
    data = pydicom.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = series, _uid("study"), "MG"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def _write_jpeg(path: Path, pixels: np.ndarray, series: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    Image.fromarray(values).save(path, quality=85)


def cbis_tree(root: Path, layout: str = "descriptive", lesions=LESIONS) -> Path:
    """The download of NBIA (``descriptive`` or ``classic`` folders) or of ``kaggle``, with the four tables.

    Dirt: line breaks in cells, "breast density" in the calc tables, backslashes in metadata.csv, crop and mask in one
    series or swapped between the columns, a mask of another size (patient 5, CC), a table of Kaggle's own.
    """
    root = root / "in"
    manifest = root / "manifest-1600709154662"
    metadata = []
    tables: dict[str, list[list[object]]] = {}
    written = set()

    def write_series(subject: str, what: str, files: list[np.ndarray]) -> str:
        series = _uid(subject, what)
        if series in written:
            return f"{subject}/{_uid('study')}/{series}/000000.dcm\n"
        written.add(series)
        number = len(written)
        folder = {
            "descriptive": f"CBIS-DDSM/{subject}/07-20-2016-DDSM-NA-{30000 + number}/1.000000-{what}-{10000 + number}",
            "classic": f"CBIS-DDSM/{subject}/{_uid('study')}/{series}",
            "kaggle": f"jpeg/{series}",
        }[layout]
        for i, pixels in enumerate(files, 1):
            if layout == "kaggle":
                _write_jpeg(root / folder / f"{i}-{100 + i:03d}.jpg", pixels, series)
            else:
                _write_dicom(manifest / folder / f"1-{i}.dcm", pixels, series)
        location = ".\\" + folder.replace("/", "\\")
        metadata.append([series, "CBIS-DDSM", subject, what, str(len(files)), location])
        return f"{subject}/{_uid('study')}/{series}/000000.dcm\n"

    for name, patient, side, view, lesion, pathology in lesions:
        subject = f"{name}_P_{patient:05d}_{side}_{view}"
        full = mammogram_pixels(patient, side, view)
        image = write_series(subject, "full mammogram images", [full])
        crop, mask = full[25:45, 8:24], mask_pixels(lesion)
        if patient == 5 and view == "CC":
            mask = mask.repeat(2, 0).repeat(2, 1)
        if patient % 2:  # one series with both, in either order
            both = [mask, crop] if view == "CC" else [crop, mask]
            crop_path = mask_path = write_series(f"{subject}_{lesion}", "ROI mask images", both)
        else:  # two series, whose columns are swapped
            crop_path = write_series(f"{subject}_{lesion}", "cropped images", [mask])
            mask_path = write_series(f"{subject}_{lesion}", "ROI mask images", [crop])
        kind = name.split("-")[0].lower()
        table = f"{kind}_case_description_{'train' if 'Training' in name else 'test'}_set.csv"
        abnormality = {"mass": "mass", "calc": "calcification"}[kind]
        tables.setdefault(table, []).append(
            [f"P_{patient:05d}", 3, side, view, lesion, abnormality, pathology, 4, image, crop_path, mask_path]
        )
    for table, rows in tables.items():
        density = "breast density" if table.startswith("calc") else "breast_density"
        header = ["patient_id", density, "left or right breast", "image view", "abnormality id", "abnormality type"]
        header += ["pathology", "subtlety", "image file path", "cropped image file path", "ROI mask file path"]
        write_csv((root / "csv" if layout == "kaggle" else root) / table, [header, *rows])
    if layout == "kaggle":
        write_csv(root / "csv" / "dicom_info.csv", [["file_path", "image_path"], ["a", "b"]])
    else:
        header = ["Series UID", "Collection", "Subject ID", "Series Description", "Number of Images", "File Location"]
        write_csv(manifest / "metadata.csv", [header, *metadata])
        write_bytes(manifest / "CBIS-DDSM" / "LICENSE", b"CC BY")
    return root


def _datalist(out: Path) -> dict:
    return json.loads((out / "datalist.json").read_text())


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("layout", ["descriptive", "classic", "kaggle"])
def test_every_layout_gives_pairs_and_every_input_a_verdict(tmp_path, layout):
    root, out = cbis_tree(tmp_path, layout), tmp_path / "out"
    assert convert_tree(CbisDdsm(masks=True), root, out) == 0
    found = _datalist(out)
    assert {(e["case"], e["label"]) for e in found["training"]} == {
        ("P_00001_LEFT", 1), ("P_00002_RIGHT", 0), ("P_00003_LEFT", 1),
    }  # fmt: skip
    assert {(e["case"], e["label"]) for e in found["test"]} == {("P_00004_LEFT", 1), ("P_00005_LEFT", 0)}
    entry = next(e for e in found["training"] if e["case"] == "P_00001_LEFT")
    assert entry["image1"] == "images/P_00001_LEFT_cc.png" and entry["mask2"] == "labels/P_00001_LEFT_mlo.png"
    image = _pixels(out / entry["image2"])
    expected = mammogram_pixels(1, "LEFT", "MLO")
    if layout == "kaggle":
        assert image.dtype == np.uint8 and image.shape == SHAPE
    else:
        np.testing.assert_array_equal(image, expected)
    masks = np.maximum(mask_pixels(1), mask_pixels(2))
    np.testing.assert_array_equal(_pixels(out / entry["mask2"]), masks)
    np.testing.assert_array_equal(_pixels(out / "labels/P_00002_RIGHT_cc.png"), mask_pixels(1))  # swapped columns
    lines = report_lines(out)
    rows = [verdict for (kind, path, _), verdict in lines.items() if kind == "row" and "case_description" in path]
    assert len(rows) == len(LESIONS)
    assert sorted({reason for status, reason in rows if status == "skipped"}) == ["missing-view", "patient-in-test"]
    assert sum(kind == "file" for kind, _, _ in lines) == sum(path.is_file() for path in root.rglob("*"))
    assert not any(status == "failed" for status, _ in lines.values())
    assert ("skipped", "same-view") in lines.values() and ("skipped", "cropped-lesion") in lines.values()
    assert "1 patients are in the training and in the test tables" in (out / "report.json").read_text()
    assert check_data_set(out).problems == []
    assert len(load_cases(out, "test")) == 2
    table = (out / "cases.csv").read_text().splitlines()
    assert table[0].split(",")[5:] == ["density", "num_lesions", "side", "types"]
    assert table[1].endswith(",3,2,left,mass") and ",3,2,left,calc+mass" in table[3]


def test_mask_of_another_size_is_resized_and_reported(tmp_path):
    out = tmp_path / "out"
    convert_tree(CbisDdsm(masks=True), cbis_tree(tmp_path), out)
    np.testing.assert_array_equal(_pixels(out / "labels/P_00005_LEFT_cc.png"), mask_pixels(1))
    assert report_lines(out)["case", "P_00005_LEFT", ""] == ("resampled", "")
    assert "mask of 160 x 240, image of 80 x 120" in (out / "report.csv").read_text()


def test_series_are_found_by_their_headers_without_metadata(tmp_path):
    root, out = cbis_tree(tmp_path), tmp_path / "out"
    next(root.rglob("metadata.csv")).unlink()
    assert convert_tree(CbisDdsm(), root, out) == 0
    assert len(_datalist(out)["training"]) == 3


def test_published_pairing_and_first_label(tmp_path):
    out = tmp_path / "out"
    assert convert_tree(CbisDdsm(pairing="published", label="first", overlap="keep"), cbis_tree(tmp_path), out) == 0
    found = {entry["case"]: entry["label"] for entry in _datalist(out)["training"]}
    assert found == {
        "P_00001_LEFT_mass": 0, "P_00003_LEFT_mass": 0, "P_00002_RIGHT_calc": 0, "P_00003_LEFT_calc": 1,
        "P_00004_RIGHT_calc": 0,
    }  # fmt: skip


def test_single_views_have_the_label_of_their_own_lesions(tmp_path):
    out = tmp_path / "out"
    assert convert_tree(CbisDdsm(views="single", masks=True), cbis_tree(tmp_path), out) == 0
    found = {entry["case"]: entry for entry in _datalist(out)["training"]}
    assert found["P_00001_LEFT_CC"]["label"] == 0 and found["P_00001_LEFT_MLO"]["label"] == 1
    assert found["P_00001_LEFT_CC"]["mask"] == "labels/P_00001_LEFT_CC.png"
    assert "P_00001_RIGHT_CC" in found


def test_crop_shrink_and_square_move_image_and_mask_alike(tmp_path):
    out = tmp_path / "out"
    source = CbisDdsm(masks=True, crop_breast=True, max_side=41, square=True)
    assert convert_tree(source, cbis_tree(tmp_path), out) == 0
    image, mask = _pixels(out / "images/P_00001_LEFT_cc.png"), _pixels(out / "labels/P_00001_LEFT_cc.png")
    assert image.shape == mask.shape == (41, 41) and image.dtype == np.uint16
    # Rows 18 to 102 and columns 0 to 52 of the breast became 41 rows and 25 columns in the middle.
    assert (image[:, :8] == 0).all() and (image[:, 33:] == 0).all() and image[:, 8:30].any()
    assert set(np.unique(mask)) == {0, 255}
    rows, columns = np.nonzero(mask)
    np.testing.assert_allclose([rows.min(), rows.max()], [(30 - 18) * 41 / 84, (41 - 18) * 41 / 84], atol=1.1)
    np.testing.assert_allclose([columns.min() - 8, columns.max() - 8], [10 * 41 / 84, 19 * 41 / 84], atol=1.1)


def test_published_split_is_that_of_the_published_rule(tmp_path):
    lesions = [
        (f"{name}-Training", patient, "LEFT", view, 1, "BENIGN")
        for name, patients in (("Mass", range(30, 18, -1)), ("Calc", range(41, 48)))
        for patient in patients
        for view in ("CC", "MLO")
    ]
    lesions.append(("Mass-Training", 41, "LEFT", "CC", 1, "BENIGN"))  # of a calc patient, and without a pair
    out = tmp_path / "out"
    root = cbis_tree(tmp_path, "classic", [*lesions, *LESIONS[6:8], *LESIONS[14:]])
    assert convert_tree(CbisDdsm(pairing="published", split="published"), root, out) == 0
    random.seed(42)
    calc = [f"P_{patient:05d}_LEFT_calc" for patient in range(41, 48)]
    mass = [f"P_{patient:05d}_LEFT_mass" for patient in range(30, 18, -1)]
    random.shuffle(calc)
    random.shuffle(mass)
    found = _datalist(out)
    assert {entry["case"] for entry in found["validation"]} == {*calc[5:], *mass[9:]}
    assert {entry["case"] for entry in found["training"]} == {*calc[:5], *mass[:9]}
    assert {entry["case"] for entry in found["test"]} == {"P_00004_LEFT_mass", "P_00005_LEFT_calc"}
    with pytest.raises(UsageError, match="add --pairing published"):
        convert_tree(CbisDdsm(split="published"), root, tmp_path / "b")


def _edit(root: Path, old: str, new: str, table: str = "mass_case_description_train_set.csv") -> None:
    path = next(root.rglob(table))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _remove(root: Path, subject: str, what: str) -> None:
    for path in root.rglob("*.dcm"):
        if path.parts[-4] == subject and what in path.parent.name:
            path.unlink()


FIRST = ("row", "mass_case_description_train_set.csv", "1")


@pytest.mark.parametrize(
    ("damage", "ref", "verdict"),
    [
        (lambda r: _edit(r, "BENIGN", "UNPROVEN"), FIRST, ("failed", "unknown-label")),
        (lambda r: _edit(r, "LEFT,CC", "RIGHT,CC"), FIRST, ("failed", "contradicting-path")),
        (lambda r: _edit(r, "P_00001,3", "P_1,3"), FIRST, ("failed", "bad-row")),
        (lambda r: _edit(r, "P_00001,3", "P_00001"), FIRST, ("failed", "damaged-row")),
        (lambda r: _remove(r, "Mass-Training_P_00001_LEFT_CC", "full"), FIRST, ("failed", "missing-image")),
        (lambda r: _remove(r, "Mass-Training_P_00001_LEFT_CC_1", "ROI"), FIRST, ("failed", "missing-mask")),
        (
            lambda r: next(r.rglob("Mass-Training_P_00001_LEFT_CC/*/*/1-1.dcm")).write_bytes(b"x"),
            FIRST,
            ("failed", "unreadable-dicom"),
        ),
    ],
    ids=["pathology", "side", "patient", "row cut short", "image gone", "mask gone", "image damaged"],
)
def test_damage_has_its_verdict_and_costs_no_other_case(tmp_path, damage, ref, verdict):
    root, out = cbis_tree(tmp_path), tmp_path / "out"
    damage(root)
    assert convert_tree(CbisDdsm(masks=True), root, out) == 3
    lines = report_lines(out)
    assert lines[ref] == verdict
    assert lines["case", "P_00002_RIGHT", ""] == ("ok", "")


def test_shards_and_merge_equal_one_run(tmp_path):
    root, source = cbis_tree(tmp_path), CbisDdsm(masks=True, crop_breast=True)
    for shard in ("1/2", "2/2"):
        assert convert_tree(source, root, tmp_path / "a" / "ddsm", shard=shard) == 0
    assert main(["merge", str(tmp_path / "a" / "ddsm")]) == 0
    convert_tree(source, root, tmp_path / "b" / "ddsm")
    assert tree_bytes(tmp_path / "a" / "ddsm") == tree_bytes(tmp_path / "b" / "ddsm")


def test_dry_run_tells_what_is_left_out_and_writes_nothing(tmp_path, capsys):
    root = cbis_tree(tmp_path)
    assert convert_tree(CbisDdsm(), root, tmp_path / "out", dry_run=True) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1 + 5
    assert "skipped: patient-in-test: 8" in shown.err and "note: 1 patients are in the training" in shown.err
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_unusable_inputs_are_one_error(tmp_path):
    root = cbis_tree(tmp_path)
    with pytest.raises(UsageError, match="none of the tables"):
        convert_tree(CbisDdsm(), root / "manifest-1600709154662", tmp_path / "out")
    _edit(root, "ROI mask file path", "mask")
    with pytest.raises(DatasetError, match=r"lacks the columns \['ROI mask file path'\]"):
        convert_tree(CbisDdsm(), root, tmp_path / "out")


def test_a_mask_has_two_values_and_a_jpeg_mask_nearly_so():
    mask = mask_pixels(1)
    np.testing.assert_array_equal(to_mask(mask.astype(np.uint16) * 257), mask > 0)
    lossy = np.clip(mask.astype(int) + np.random.default_rng(0).integers(-30, 30, SHAPE), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(to_mask(lossy), mask > 0)
    assert to_mask(mammogram_pixels(1, "LEFT", "CC")) is None
    assert to_mask(np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)) is None
    assert to_mask(np.zeros(SHAPE, np.uint16)) is None


def test_padding_puts_the_image_in_the_middle():
    padded = pad_to_square(np.ones((5, 2), np.uint16))
    assert padded.shape == (5, 5) and padded[:, 1:3].all() and padded.sum() == 10
