"""Data lists: what is read and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from monai_mamba.errors import DatasetError
from monai_mamba.training.datalist import list_inputs, load_cases


@pytest.fixture
def dataset(tmp_path):
    """A function that writes a data set with one case per section, changed by its argument."""

    def write(change=lambda manifest: None):
        (tmp_path / "images").mkdir(exist_ok=True)
        manifest = {"classes": ["a", "b"]}
        for section in ("training", "validation", "test"):
            manifest[section] = []
            for label in (0, 1):
                name = f"{section}{label}"
                Image.fromarray(np.full((4, 5), 100 + label, np.uint8)).save(tmp_path / "images" / f"{name}.png")
                manifest[section].append({"image": f"images/{name}.png", "label": label})
        change(manifest)
        (tmp_path / "datalist.json").write_text(json.dumps(manifest))
        return tmp_path

    return write


def test_cases_get_names_and_absolute_files(dataset):
    cases = load_cases(dataset(), "training")
    assert [case["case"] for case in cases] == [case["patient"] for case in cases] == ["training0", "training1"]
    assert cases[0]["image"].endswith("images/training0.png")


def test_limit_takes_cases_from_the_whole_section(dataset):
    assert [case["label"] for case in load_cases(dataset(), "test", limit=1)] == [0]


def case_of(section, index=0, **fields):
    return lambda manifest: manifest[section][index].update(fields)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (case_of("test", label=2), "from 0 to 1"),
        (case_of("test", label=-1), "from 0 to 1"),
        (case_of("test", label=True), "from 0 to 1"),
        (case_of("test", label=None), "from 0 to 1"),
        (case_of("test", label=[1]), "2 zeros or ones"),
        (case_of("test", image="images/none.png"), "does not exist"),
        (case_of("test", image="../../etc/hostname"), "leaves the folder"),
        (case_of("test", case="training0"), "twice"),
        (lambda m: [case.update(patient="p") for case in (m["training"][0], m["test"][1])], "split by patient"),
        (lambda m: m["test"].clear(), "missing or empty"),
        (lambda m: m["test"][0].pop("image"), "no `image`"),
    ],
    ids=["above", "below", "bool", "none", "multi", "missing", "outside", "twice", "leak", "empty", "no-image"],
)
def test_bad_data_list_is_refused(dataset, change, reason):
    with pytest.raises(DatasetError, match=reason):
        load_cases(dataset(change), "test")


def test_class_without_training_case_is_refused(dataset):
    with pytest.raises(DatasetError, match="class b"):
        load_cases(dataset(lambda m: m["training"].pop()), "training")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"training": '], ids=["empty", "list", "brace", "cut"])
def test_broken_file_is_refused(tmp_path, content):
    (tmp_path / "datalist.json").write_text(content)
    with pytest.raises(DatasetError, match=r"datalist\.json"):
        load_cases(tmp_path, "training")


def test_corrupt_pictures_are_dropped_counted_and_named(dataset, caplog):
    folder = dataset()
    path = folder / "images" / "test0.png"
    path.write_bytes(path.read_bytes()[:40])
    assert len(load_cases(folder, "test")) == 2
    assert [case["case"] for case in load_cases(folder, "test", on_corrupt="drop")] == ["test1"]
    assert "1 of 2 cases dropped" in caplog.text
    assert "test0.png" in caplog.text


def test_folder_of_pictures_is_listed_without_a_data_list(tmp_path):
    for name in ("b.png", "sub/a.JPG", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [case["case"] for case in list_inputs(tmp_path)] == ["b.png", "sub/a.JPG"]
    with pytest.raises(DatasetError, match="nor a picture"):
        list_inputs(tmp_path / "none")
