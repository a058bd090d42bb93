"""Pictures that cannot be read when their turn comes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.transforms import Lambdad
from PIL import Image

from monai_mamba.errors import DatasetError
from monai_mamba.training.handlers import EndWithData
from monai_mamba.training.loading import CaseDataset, CaseLoader
from monai_mamba.training.transforms import ReadPictured


@pytest.fixture
def cases(tmp_path):
    for number in range(6):
        Image.fromarray(np.full((4, 4), 10 * number, np.uint8)).save(tmp_path / f"{number}.png")
    return [{"case": f"c{number}", "image": str(tmp_path / f"{number}.png")} for number in range(6)]


def damage(cases, *numbers):
    for number in numbers:
        with open(cases[number]["image"], "r+b") as file:
            file.truncate(30)


def loader_of(cases, on_corrupt="drop", then=None, **options):
    transforms = [ReadPictured("image", channels=1), *([then] if then else [])]
    return CaseLoader(CaseDataset(cases, transforms, on_corrupt), **{"batch_size": 2, **options})


def run(loader, epochs=1):
    """Cases of every batch that an engine sees, by epoch."""
    seen = {}
    engine = Engine(lambda engine, batch: seen.setdefault(engine.state.epoch, []).append(batch["case"]))
    EndWithData().attach(engine)
    completed = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: completed.append(engine.state.epoch))
    engine.run(loader, max_epochs=epochs, epoch_length=len(loader))
    assert completed == list(range(1, epochs + 1))
    return seen


@pytest.mark.parametrize("num_workers", [0, 1], ids=["same-process", "worker"])
def test_dropped_cases_are_named_once_and_counted_in_every_epoch(cases, caplog, num_workers):
    loader = loader_of(cases, num_workers=num_workers)
    damage(cases, 0, 4, 5)  # after the data list was checked; the last batch is lost as a whole
    assert run(loader, epochs=2) == {1: [["c1"], ["c2", "c3"]], 2: [["c1"], ["c2", "c3"]]}
    messages = [record.getMessage() for record in caplog.records]
    for number in (0, 4, 5):
        assert sum(f"case c{number} left out: {cases[number]['image']}: cannot be read" in m for m in messages) == 1
    assert messages.count("3 of 6 cases left out in this pass") == 2
    assert list(loader.left_out) == ["c0", "c4", "c5"]


def test_a_lost_batch_in_the_middle_does_not_start_the_data_anew(cases):
    damage(cases, 2, 3)
    assert run(loader_of(cases)) == {1: [["c0", "c1"], ["c4", "c5"]]}
    assert run(loader_of(cases, batch_size=1)) == {1: [["c0"], ["c1"], ["c4"], ["c5"]]}


@pytest.mark.parametrize("num_workers", [0, 1], ids=["same-process", "worker"])
def test_error_stops_and_names_case_file_and_cure(cases, num_workers):
    damage(cases, 3)
    with pytest.raises(DatasetError, match=r"case c3: .*3\.png: cannot be read as a picture.*on_corrupt=drop"):
        run(loader_of(cases, "error", num_workers=num_workers))


def test_nothing_readable_is_refused(cases):
    damage(cases, *range(6))
    with pytest.raises(DatasetError, match=r"none of the 6 cases can be read; the last: case c5: .*5\.png"):
        run(loader_of(cases))


def test_a_lost_batch_stops_processes_that_would_wait_for_each_other(cases, monkeypatch):
    damage(cases, 2, 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DatasetError, match=r"case c2: .* several processes cannot skip a batch"):
        run(loader_of(cases))


def test_only_reading_is_forgiven(cases):
    def refuse(image):
        raise DatasetError("another grid")

    with pytest.raises(RuntimeError):
        run(loader_of(cases, then=Lambdad("image", refuse)))
    with pytest.raises(ValueError, match="`on_corrupt` must be one of error, drop"):
        loader_of(cases, "ignore")


def test_dropping_changes_nothing_where_all_can_be_read(cases):
    torch.manual_seed(3)
    first = run(loader_of(cases, "error", shuffle=True), epochs=2)
    torch.manual_seed(3)
    assert run(loader_of(cases, "drop", shuffle=True), epochs=2) == first
