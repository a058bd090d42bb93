from __future__ import annotations

import json

import pytest

from monai_mamba.errors import RunError
from monai_mamba.quickstart.run_folder import RunFolder


def _begun(path, **options):
    run = RunFolder.read(path)
    for name, value in options.items():
        run.settle(name, value, None)
    run.save()
    return run


@pytest.mark.parametrize("make", [False, True], ids=["absent", "empty"])
def test_new_folder_is_taken(tmp_path, make):
    path = tmp_path / "run"
    if make:
        path.mkdir()
    run = RunFolder.read(path)
    assert not run.exists and run.settle("seed", None, 0) == 0


def test_folder_with_foreign_content_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(RunError, match="not the output of a quickstart"):
        RunFolder.read(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(RunError, match="already exists"):
        RunFolder.read(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other"}', "[]"], ids=["empty", "no-keys", "other", "list"])
def test_damaged_state_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json"):
        RunFolder.read(tmp_path)


def test_options_left_out_are_those_of_the_start(tmp_path):
    _begun(tmp_path / "run", trainer="A", epochs=3)
    again = RunFolder.read(tmp_path / "run")
    assert again.settle("trainer", None, "default") == "A"
    assert again.settle("epochs", 3, None) == 3


def test_other_options_than_at_the_start_are_refused(tmp_path):
    _begun(tmp_path / "run", epochs=3)
    with pytest.raises(RunError, match="started with epochs 3, not 5"):
        RunFolder.read(tmp_path / "run").settle("epochs", 5, None)


def test_finished_step_is_not_done_again(tmp_path):
    run = _begun(tmp_path / "run")
    done = []
    run.step("plan", lambda: done.append(1))
    RunFolder.read(tmp_path / "run").step("plan", lambda: done.append(2))
    assert done == [1]


def test_interrupted_step_is_done_again_and_its_time_counts(tmp_path):
    run = _begun(tmp_path / "run")

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.step("train", interrupted)
    spent = json.loads((tmp_path / "run" / "run.json").read_text())["seconds_spent"]["train"]
    again = RunFolder.read(tmp_path / "run")
    done = []
    again.step("train", lambda: done.append(1))
    assert done == [1] and again.steps["train"] > spent


def test_second_process_is_kept_out(tmp_path):
    run = _begun(tmp_path / "run")
    with run.locked(), pytest.raises(RunError, match="another quickstart"), RunFolder.read(tmp_path / "run").locked():
        pass
    with run.locked():
        pass
