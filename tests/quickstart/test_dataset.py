from __future__ import annotations

import gzip
import json
import os
import re

import nibabel as nib
import numpy as np
import pytest

from monai_mamba.errors import DatasetError
from monai_mamba.quickstart import dataset as datasets
from monai_mamba.quickstart.dataset import PACKAGED_DATASET, check_dataset, read_dataset, split_cases, write_nnunet_raw

CASE = "case_003"
IMAGE = "imagesTr/case_003.nii.gz"
LABEL = "labelsTr/case_003.nii.gz"


def _check(folder):
    return check_dataset(read_dataset(folder))


def test_packaged_data_is_sound_and_holds_out_eight_of_24():
    dataset = read_dataset(PACKAGED_DATASET)
    assert check_dataset(dataset) == []
    training, held_out = split_cases(dataset, seed=0)
    assert (len(training), len(held_out)) == (16, 8)
    assert {c.name for c in held_out} == set(dataset.held_out)
    assert dataset.labels == {0: "background", 1: "Anterior", 2: "Posterior"}


def test_packaged_data_has_no_two_cases_of_one_person():
    # Cases 2k-1 and 2k of the decathlon's hippocampus set are the two sides of one person (data/README.md).
    numbers = sorted(int(re.search(r"\d+", case.name)[0]) for case in read_dataset(PACKAGED_DATASET).cases)
    assert min(np.diff(numbers)) >= 15


def test_packaged_data_carries_licence_and_attribution():
    for file in (PACKAGED_DATASET / "LICENSE", PACKAGED_DATASET.parent / "README.md"):
        text = " ".join(file.read_text().split())
        assert "CC BY-SA 4.0" in text and "Antonelli" in text and "Vanderbilt" in text


def test_packaged_headers_hold_no_free_text():
    for case in read_dataset(PACKAGED_DATASET).cases:
        for path in (case.image, case.label):
            header = nib.load(path).header
            assert header["db_name"].item() == b"" and header["intent_name"].item() == b""
            assert len(header.extensions) == 0


def test_sound_data_set_is_accepted(decathlon):
    assert _check(decathlon.folder) == []
    dataset = read_dataset(decathlon.folder)
    assert dataset.name == "Tinyset" and dataset.channel_names == ("MRI",) and len(dataset.cases) == 8


def test_label_that_never_occurs_is_remarked(decathlon):
    decathlon.description["labels"]["3"] = "ghost"
    decathlon.save()
    assert any("ghost" in remark for remark in _check(decathlon.folder))


def _spoil_label_value(value):
    def spoil(d):
        label = d.read(d.label(CASE)).astype(np.float32)
        label[0, 0, 0] = value
        d.write(d.label(CASE), label)

    return spoil


def _spoil_label_affine(column_change):
    def spoil(d):
        affine = d.affine.copy()
        affine[0] += column_change
        d.write(d.label(CASE), d.read(d.label(CASE)), affine)

    return spoil


def _keep(part):
    def spoil(d):
        content = d.image(CASE).read_bytes()
        d.image(CASE).write_bytes(content[: int(len(content) * part)])

    return spoil


def _edit_bytes(start, value):
    """Change bytes of the image's uncompressed file."""

    def spoil(d):
        raw = bytearray(gzip.decompress(d.image(CASE).read_bytes()))
        raw[start : start + len(value)] = value
        d.image(CASE).write_bytes(gzip.compress(bytes(raw)))

    return spoil


def _wrong_checksum(d):
    content = bytearray(d.label(CASE).read_bytes())
    content[-6] ^= 0x10
    d.label(CASE).write_bytes(bytes(content))


def _edit_image(edit):
    return lambda d: d.write(d.image(CASE), edit(d.read(d.image(CASE))))


def _with_nan(image):
    image[1, 1, 1] = np.nan
    return image


def _single_slice(d):
    for path in (d.image(CASE), d.label(CASE)):
        d.write(path, d.read(path)[:, :, :1])


BAD_FILES = {
    "missing-label": (lambda d: d.label(CASE).unlink(), LABEL, "label is missing"),
    "missing-image": (lambda d: d.image(CASE).unlink(), IMAGE, "image is missing"),
    "unknown-label-value": (_spoil_label_value(7), LABEL, "label value(s) 7 not in dataset.json"),
    "fractional-label-value": (_spoil_label_value(0.5), LABEL, "label value(s) 0.5"),
    "negative-label-value": (_spoil_label_value(-1), LABEL, "label value(s) -1"),
    "nan-label-value": (_spoil_label_value(np.nan), LABEL, "label value(s) nan"),
    "other-shape": (lambda d: d.write(d.label(CASE), d.read(d.label(CASE))[:-1]), LABEL, "shape 11 x 14 x 10 differs"),
    "shifted-affine": (_spoil_label_affine([0, 0, 0, 0.5]), LABEL, "up to 0.5 mm apart"),
    "flipped-affine": (_spoil_label_affine([-2, 0, 0, 0]), LABEL, "mm apart"),
    "affine-nan": (_edit_bytes(280, np.full(1, np.nan, "<f4").tobytes()), IMAGE, "affine"),
    "truncated-header": (_keep(0.01), IMAGE, ""),
    "truncated-voxels": (_keep(0.6), IMAGE, "truncated"),
    "truncated-checksum": (lambda d: d.image(CASE).write_bytes(d.image(CASE).read_bytes()[:-4]), IMAGE, "truncated"),
    "wrong-checksum": (_wrong_checksum, LABEL, "CRC"),
    "claims-terabytes": (_edit_bytes(42, np.full(3, 30000, "<i2").tobytes()), IMAGE, "truncated"),
    "negative-size": (_edit_bytes(42, np.array([-5], "<i2").tobytes()), IMAGE, ""),
    "not-nifti": (lambda d: d.image(CASE).write_bytes(gzip.compress(b"no image" * 100)), IMAGE, "cannot be read"),
    "empty-file": (lambda d: d.image(CASE).write_bytes(b""), IMAGE, "cannot be read as NIfTI"),
    "4d-image-one-modality": (_edit_image(lambda i: np.stack([i, i], -1)), IMAGE, "does not have the 1 channel(s)"),
    "nan-voxel": (_edit_image(_with_nan), IMAGE, "NaN"),
    "constant-image": (_edit_image(np.zeros_like), IMAGE, "all voxels are equal"),
    "complex-voxels": (_edit_image(lambda i: i.astype(np.complex64)), IMAGE, "not supported"),
    "same-image-twice": (lambda d: d.write(d.image(CASE), d.read(d.image("case_001"))), IMAGE, "same image as case"),
    "single-slice": (_single_slice, IMAGE, "single slice"),
}


@pytest.mark.parametrize(("spoil", "file", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_named_with_its_reason(decathlon, spoil, file, reason):
    spoil(decathlon)
    with pytest.raises(DatasetError) as caught:
        _check(decathlon.folder)
    assert os.path.join(decathlon.folder, file) in str(caught.value)
    assert reason in str(caught.value)


def test_all_bad_files_are_named_at_once(decathlon):
    for name in ("case_001", "case_004"):
        decathlon.image(name).write_bytes(b"")
    with pytest.raises(DatasetError, match=r"case_001.*case_004"):
        _check(decathlon.folder)


def test_long_list_of_bad_files_is_counted(decathlon):
    for name in decathlon.names:
        decathlon.image(name).write_bytes(b"")
    with pytest.raises(DatasetError, match="and 3 more"):
        _check(decathlon.folder)


def _set(key, value):
    return lambda description: description.update({key: value})


def _first_case(**entries):
    return lambda description: description["training"][0].update(entries)


BAD_DESCRIPTIONS = {
    "no-training": (lambda d: d.pop("training"), "`training`"),
    "empty-training": (_set("training", []), "`training`"),
    "entry-without-label": (lambda d: d["training"][2].pop("label"), "entry 3 of `training`"),
    "entry-not-object": (lambda d: d["training"].append("x.nii.gz"), "entry 9"),
    "path-leaves-folder": (_first_case(image="../secret.nii.gz"), "must be relative"),
    "absolute-path": (_first_case(image="/etc/image.nii.gz"), "must be relative"),
    "not-a-nifti-name": (_first_case(image="imagesTr/case_000.png"), "no NIfTI file"),
    "case-twice": (lambda d: d["training"].append(d["training"][0]), "listed twice"),
    "label-of-two-cases": (_first_case(label="labelsTr/case_001.nii.gz"), "belongs to two cases"),
    "no-modality": (lambda d: d.pop("modality"), "`modality`"),
    "modality-with-gap": (_set("modality", {"0": "T1", "2": "T2"}), "`modality`"),
    "no-labels": (lambda d: d.pop("labels"), "`labels`"),
    "labels-only-background": (_set("labels", {"0": "background"}), "`labels`"),
    "labels-with-gap": (_set("labels", {"0": "background", "1": "a", "4": "b"}), "0, 1, 4"),
    "labels-without-background": (_set("labels", {"1": "a", "2": "b"}), "`labels`"),
    "label-name-twice": (_set("labels", {"0": "background", "1": "a", "2": "A"}), "twice"),
    "label-ignore": (_set("labels", {"0": "background", "1": "a", "2": "ignore"}), "reserved"),
    "unknown-held-out": (_set("held_out", ["nobody"]), "nobody"),
    "held-out-not-list": (_set("held_out", "case_001"), "must be a list"),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD_DESCRIPTIONS.values(), ids=BAD_DESCRIPTIONS)
def test_bad_description_is_named_with_its_reason(decathlon, spoil, reason):
    spoil(decathlon.description)
    decathlon.save()
    with pytest.raises(DatasetError, match=r"dataset\.json") as caught:
        read_dataset(decathlon.folder)
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "[" * 100_000], ids=["empty", "cut", "list", "text", "deep"])
def test_description_that_is_no_object_is_refused(decathlon, text):
    (decathlon.folder / "dataset.json").write_text(text)
    with pytest.raises(DatasetError, match=r"dataset\.json"):
        read_dataset(decathlon.folder)


def test_missing_and_empty_folder_are_told_apart(tmp_path, decathlon):
    with pytest.raises(DatasetError, match="no such folder"):
        read_dataset(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="the folder is empty"):
        read_dataset(tmp_path / "empty")
    (decathlon.folder / "dataset.json").unlink()
    with pytest.raises(DatasetError, match=r"dataset\.json is missing"):
        read_dataset(decathlon.folder)


def test_nnunet_layout_is_recognized(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}, "labels": {"background": 0}}))
    with pytest.raises(DatasetError, match="nnU-Net's own layout"):
        read_dataset(tmp_path)


def test_split_follows_the_seed_and_keeps_a_quarter_out(decathlon):
    dataset = read_dataset(decathlon.folder)
    training, held_out = split_cases(dataset, seed=1)
    assert (len(training), len(held_out)) == (6, 2)
    assert not {c.name for c in training} & {c.name for c in held_out}
    assert split_cases(dataset, seed=1) == (training, held_out)
    assert any(split_cases(dataset, seed=s) != (training, held_out) for s in range(2, 12))


def test_split_follows_the_data_sets_own_choice(decathlon):
    decathlon.description["held_out"] = ["case_002", "case_005"]
    decathlon.save()
    for seed in (0, 1):
        _, held_out = split_cases(read_dataset(decathlon.folder), seed)
        assert [c.name for c in held_out] == ["case_002", "case_005"]


@pytest.mark.parametrize(("num_cases", "fits"), [(6, False), (7, True)], ids=["4-to-train", "5-to-train"])
def test_fewer_than_five_training_cases_are_refused(decathlon, num_cases, fits):
    decathlon.description["training"] = decathlon.description["training"][:num_cases]
    decathlon.save()
    dataset = read_dataset(decathlon.folder)
    if fits:
        assert len(split_cases(dataset, 0)[0]) == 5
    else:
        with pytest.raises(DatasetError, match="at least 5 training cases"):
            split_cases(dataset, 0)


def test_nnunet_raw_has_training_and_held_out_apart(decathlon, tmp_path):
    dataset = read_dataset(decathlon.folder)
    training, held_out = split_cases(dataset, 0)
    target = tmp_path / "raw" / "Dataset001_Tinyset"
    write_nnunet_raw(dataset, training, held_out, target)
    assert sorted(p.name for p in (target / "imagesTr").iterdir()) == [f"{c.name}_0000.nii.gz" for c in training]
    assert sorted(p.name for p in (target / "labelsTs").iterdir()) == sorted(f"{c.name}.nii.gz" for c in held_out)
    assert json.loads((target / "dataset.json").read_text()) == {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "left": 1, "right": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    copied = target / "imagesTr" / f"{training[0].name}_0000.nii.gz"
    assert copied.read_bytes() == training[0].image.read_bytes()
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_nnunet_raw_splits_channels_exactly(decathlon, tmp_path):
    decathlon.description["modality"] = {"0": "T1", "1": "T2"}
    decathlon.save()
    rng = np.random.default_rng(1)
    volumes = {name: rng.normal(size=(*decathlon.shape, 2)).astype(np.float32) for name in decathlon.names}
    for name, volume in volumes.items():
        decathlon.write(decathlon.image(name), volume)
    dataset = read_dataset(decathlon.folder)
    assert check_dataset(dataset) == []
    training, held_out = split_cases(dataset, 0)
    write_nnunet_raw(dataset, training, held_out, tmp_path / "out")
    for channel in (0, 1):
        written = nib.load(tmp_path / "out" / "imagesTr" / f"{training[0].name}_{channel:04d}.nii.gz")
        assert np.array_equal(np.asarray(written.dataobj), volumes[training[0].name][..., channel])
        assert np.array_equal(written.affine, decathlon.affine)


def test_nnunet_raw_compresses_plain_nifti(decathlon, tmp_path):
    for entry in decathlon.description["training"]:
        for key in ("image", "label"):
            packed = decathlon.folder / entry[key]
            nib.save(nib.load(packed), str(packed).removesuffix(".gz"))
            packed.unlink()
            entry[key] = entry[key].removesuffix(".gz")
    decathlon.save()
    dataset = read_dataset(decathlon.folder)
    assert check_dataset(dataset) == []
    training, held_out = split_cases(dataset, 0)
    write_nnunet_raw(dataset, training, held_out, tmp_path / "out")
    written = nib.load(tmp_path / "out" / "imagesTr" / f"{training[0].name}_0000.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), decathlon.read(training[0].image))


def test_nnunet_raw_leaves_no_half_folder_when_a_copy_fails(decathlon, tmp_path, monkeypatch):
    dataset = read_dataset(decathlon.folder)
    training, held_out = split_cases(dataset, 0)

    def full_disk(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(datasets, "copy_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_nnunet_raw(dataset, training, held_out, tmp_path / "Dataset001_X")
    assert not (tmp_path / "Dataset001_X").exists()


def test_fingerprint_changes_with_the_data(decathlon):
    before = datasets.fingerprint(read_dataset(decathlon.folder))
    assert datasets.fingerprint(read_dataset(decathlon.folder)) == before
    decathlon.write(decathlon.image(CASE), np.zeros((3, 3, 3), np.float32))
    assert datasets.fingerprint(read_dataset(decathlon.folder)) != before
