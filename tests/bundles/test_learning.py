"""The networks learn: trainings of minutes, defined by ``benchmarks/learning.py``, against what has to be reached."""

from __future__ import annotations

import pytest

from tests.benchmark_scripts import load_benchmark

# Minutes of CPU each; on a busy machine they take longer than a quick test may.
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def learning():
    return load_benchmark("learning")


@pytest.fixture
def train(learning, tmp_path, record_property):
    def run(*what, **options) -> dict:
        figures = learning.train_and_score(tmp_path, **learning.find_run(*what, **options))
        print(what, options, figures)
        record_property("figures", figures)
        return figures

    return run


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["mamba", "none"], ids=["scans", "no-scans"])
@pytest.mark.parametrize(
    ("group", "name", "needed"),
    [("pneumonia", "MedMamba-T, PneumoniaMNIST", 0.95), ("breast", "MedMamba-T, BreastMNIST", 0.75)],
    ids=["pneumonia", "breast"],
)
def test_medmamba_learns_pictures_of_64_pixels(train, group, name, needed, mixer):
    assert train(group, name, mixer=mixer)["validation_auc"][0] > needed


@pytest.mark.slow
def test_two_views_are_needed_and_xfmamba_uses_both(train):
    assert train("two_view", "XFMamba (two blocks of 32), same organ?")["test_auc"][0] > 0.9


@pytest.mark.slow
def test_one_view_alone_does_not_solve_the_task_of_two(train):
    assert train("two_view", "first view alone (VMamba of that size), same organ?")["test_auc"][0] < 0.7


@pytest.mark.slow
def test_landmarks_are_found_within_two_voxels(train):
    figures = train("landmarks", "NNMambaLandmark (16 filters), augmented")  # voxels are 1 mm
    assert figures["test_mre_mm"][0] <= 2
    assert figures["test_mre_mm"][0] < figures["mean_position_mm"] / 2


def test_definitions_name_what_the_slow_tests_train(learning):
    run = learning.find_run("breast", "MedMamba-T, BreastMNIST", "none")
    assert run["mixer"] == "none" and run["settings"]["image_size"] >= 64
    with pytest.raises(KeyError):
        learning.find_run("breast", "ResNet")


def test_table_holds_the_defined_runs_and_their_spread(learning, tmp_path, monkeypatch):
    page = tmp_path / "results.md"
    page.write_text(f"before\n{learning.MARKS[0]}\nold\n{learning.MARKS[1]}\nafter\n")
    monkeypatch.setattr(learning, "PAGE", page)
    rows = []
    for group, name, key in (
        ("breast", "MedMamba-T, BreastMNIST", "validation_auc"),
        ("landmarks", "NNMambaLandmark (16 filters), augmented", "test_mre_mm"),
    ):
        definition = next(run for run in learning.RUNS[group] if run[0] == name)
        for number, seed in enumerate(definition[5][:2]):
            value = 0.5 + 0.1 * number
            figures = {key: [value, 0.1, 0.9], "best_epoch": 1, "cpu_seconds": 60, "mean_position_mm": 7.0}
            figures |= {"test_auc": [value, 0, 1], "test_accuracy": [value, 0, 1]} if "auc" in key else {}
            figures |= {"test_sdr_2mm": [value, 0, 1], "validation_mre_mm": value} if "mre" in key else {}
            rows.append({"name": name, "mixer": "mamba", "seed": seed, "settings": definition[3], **figures})
    learning.write_table([*rows, {**rows[0], "settings": {"max_epochs": 1}}])  # the last is defined no more
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| MedMamba-T, BreastMNIST | yes |") == 3
    assert "| MedMamba-T, BreastMNIST | yes | 2 | AUC 0.550 (0.500 to 0.600) | AUC 0.550 (0.500 to 0.600) |" in text
    assert "mean error, mm: 0.550 (0.500 to 0.600)" in text
