"""MedMNIST: 2D and 3D arrays, every kind of task, official parts, and archives that are not what they claim."""

from __future__ import annotations

import io
import json
import zipfile

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from data_prep.check import check_data_set
from data_prep.errors import CaseError, DatasetError, UsageError
from data_prep.npz import ItemReader
from data_prep.sources.medmnist import SETS, MedMnist
from tests.data_prep.factories import convert_tree, report_lines

SIZES = {"train": 5, "val": 2, "test": 3}


def arrays_of(name, size=28):
    info, generator = SETS[name], np.random.default_rng(len(name))
    shape = (size,) * (3 if name.endswith("3d") else 2) + ((3,) if info.channels == 3 else ())
    arrays = {}
    for part, count in SIZES.items():
        arrays[f"{part}_images"] = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
        width, top = (len(info.classes), 2) if info.kind == "multi-label" else (1, len(info.classes))
        arrays[f"{part}_labels"] = generator.integers(0, top, (count, width), dtype=np.uint8)
    return arrays


def write_npz(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("name", "size"),
    [("bloodmnist", 64), ("breastmnist", 28), ("chestmnist", 28), ("retinamnist", 28), ("organmnist3d", 28)],
)
def test_medmnist_pixels_targets_and_parts_are_those_of_the_arrays(tmp_path, name, size):
    arrays = arrays_of(name, size)
    path = write_npz(tmp_path / "in" / (f"{name}.npz" if size == 28 else f"{name}_{size}.npz"), arrays)
    out = tmp_path / "out"
    assert convert_tree(MedMnist(), path, out) == 0
    content = json.loads((out / "datalist.json").read_text())
    assert content["classes"] == list(SETS[name].classes) and content["task_type"] == SETS[name].kind
    for part, section in (("train", "training"), ("val", "validation"), ("test", "test")):
        assert len(content[section]) == SIZES[part]
        for index, entry in enumerate(content[section]):
            file = out / entry["image"]
            found = np.asarray(Image.open(file)) if file.suffix == ".png" else np.asanyarray(nib.load(file).dataobj)
            np.testing.assert_array_equal(found, arrays[f"{part}_images"][index])
            label = arrays[f"{part}_labels"][index].tolist()
            assert entry["label"] == (label if SETS[name].kind == "multi-label" else label[0])
    assert report_lines(out)["item", path.name, "val/1"] == ("ok", "")
    assert check_data_set(out).problems == []


def test_medmnist_chooses_by_set_and_size(tmp_path):
    for name, size in (("breastmnist", 28), ("breastmnist", 64), ("pneumoniamnist", 28)):
        write_npz(tmp_path / "in" / (f"{name}.npz" if size == 28 else f"{name}_64.npz"), arrays_of(name, size))
    with pytest.raises(UsageError, match="--set and --size"):
        convert_tree(MedMnist(), tmp_path / "in", tmp_path / "out")
    with pytest.raises(UsageError, match="not a set of MedMNIST"):
        convert_tree(MedMnist(set="mnist"), tmp_path / "in", tmp_path / "out")
    assert convert_tree(MedMnist(set="breastmnist", size=64), tmp_path / "in", tmp_path / "out") == 0
    assert Image.open(tmp_path / "out/images/train_000000.png").size == (64, 64)
    assert report_lines(tmp_path / "out")["file", "pneumoniamnist.npz", ""] == ("skipped", "other-set")


def test_medmnist_renamed_file_needs_its_set(tmp_path):
    path = write_npz(tmp_path / "in/data.npz", arrays_of("octmnist"))
    with pytest.raises(UsageError, match="--set"):
        convert_tree(MedMnist(), path, tmp_path / "out")
    assert convert_tree(MedMnist(set="octmnist"), path, tmp_path / "out") == 0


def test_medmnist_label_out_of_range_fails_its_item(tmp_path):
    arrays = arrays_of("breastmnist")
    arrays["train_labels"][2] = 7
    path = write_npz(tmp_path / "in/breastmnist.npz", arrays)
    assert convert_tree(MedMnist(), path, tmp_path / "out") == 3
    lines = report_lines(tmp_path / "out")
    assert lines["item", "breastmnist.npz", "train/2"] == ("failed", "unknown-class")
    assert lines["item", "breastmnist.npz", "train/1"] == ("ok", "")


def _pickled(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays_of("breastmnist").items():
            content = io.BytesIO()
            value = np.array([print] * 5, dtype=object) if name == "train_labels" else array
            np.lib.format.write_array(content, value, allow_pickle=True)
            archive.writestr(f"{name}.npy", content.getvalue())


def _claiming(path):
    """A header of 100 TB before a few bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays_of("breastmnist").items():
            content = io.BytesIO()
            header = {"descr": "|u1", "fortran_order": False, "shape": (10**8, 1000, 1000)}
            np.lib.format.write_array_header_1_0(content, header)
            archive.writestr(f"{name}.npy", content.getvalue() + array.tobytes())


def _save(change):
    def write(path):
        arrays = arrays_of("breastmnist")
        change(arrays)
        np.savez_compressed(path, **arrays)

    return write


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (_pickled, "unsafe-array"),
        (_claiming, "another size"),
        (_save(lambda a: a.pop("val_labels")), "val_labels"),
        (_save(lambda a: a.update(val_labels=a["val_labels"][:1])), "counts-differ"),
        (_save(lambda a: a.update(val_images=a["val_images"].astype(np.float32))), "wrong-type"),
        (_save(lambda a: a.update(val_images=a["val_images"][..., None])), "wrong-shape"),
        (lambda path: path.write_bytes(b"PK no archive"), "damaged-archive"),
        (lambda path: path.write_bytes(b""), "damaged-archive"),
    ],
    ids=["pickle", "size claimed", "array missing", "counts", "float", "shape", "no archive", "empty"],
)
def test_medmnist_hostile_or_damaged_archive_is_one_error(tmp_path, write, match):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/breastmnist.npz")
    with pytest.raises(DatasetError, match=match):
        convert_tree(MedMnist(), tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compressed", [True, False], ids=["deflate", "stored"])
def test_medmnist_damaged_pixels_are_found_before_anything_is_written(tmp_path, compressed):
    path = tmp_path / "breastmnist.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays_of("breastmnist", 64))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("test_images.npy")
    data[info.header_offset + 30 + info.compress_size // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="checksum"):
        convert_tree(MedMnist(size=28), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_item_reader_names_the_item_where_an_array_breaks_off(tmp_path):
    path = write_npz(tmp_path / "x.npz", arrays_of("bloodmnist"))
    reader = ItemReader(path, "train_images")
    with pytest.raises(CaseError, match="missing-item"):
        reader.read(5)
    reader._skip = lambda count: (_ for _ in ()).throw(EOFError)
    with pytest.raises(CaseError, match="breaks off before item 4"):
        reader.read(4)


def test_item_reader_goes_back_and_forth(tmp_path):
    arrays = arrays_of("bloodmnist")
    reader = ItemReader(write_npz(tmp_path / "x.npz", arrays), "train_images")
    for index in (3, 4, 0, 2, 2):
        np.testing.assert_array_equal(reader.read(index), arrays["train_images"][index])
    reader.close()


def test_medmnist_workers_do_not_change_the_result(tmp_path):
    from tests.data_prep.factories import tree_bytes

    path = write_npz(tmp_path / "in/bloodmnist.npz", arrays_of("bloodmnist"))
    assert convert_tree(MedMnist(), path, tmp_path / "one") == 0
    assert convert_tree(MedMnist(), path, tmp_path / "two", engine="process", workers=2) == 0
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "two")
