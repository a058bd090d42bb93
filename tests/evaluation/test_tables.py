"""Tables of predictions: what is refused, and that figures come from the right cases."""

from __future__ import annotations

import json

import numpy as np
import pytest

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.tables import compare, evaluate, evaluate_files, group_predictions, read_predictions

GOOD = "case,patient,label,prob_a,prob_b\n1,p,0,0.8,0.2\n2,p,1,0.4,0.6\n3,q,1,0.1,0.9\n4,r,0,0.45,0.55\n5,s,0,0.7,0.3\n"


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no predictions"),
        ("case,label\n1,0\n", "prob_<class>"),
        ("case,prob_a,prob_b\n1,0.5,0.5\n", "no `label`"),
        ("case,label,prob_a,prob_b\n1,2,0.5,0.5\n", "from 0 to 1"),
        ("case,label,prob_a,prob_b\n1,0,0.5,0.6\n", "add up to 1"),
        ("case,label,prob_a,prob_b\n1,0,1.5,-0.5\n", "outside 0 to 1"),
        ("case,label,prob_a,prob_b\n1,0,nan,0.5\n", "finite"),
        ("case,label,prob_a,prob_b\n1,0,0.5\n", "numbers in every row"),
        ("case,label,prob_a,prob_b\n1,0,0.5,0.5\n1,0,0.5,0.5\n", "the case 1 appears twice"),
        ("case,label,prob_a,prob_b\n", "holds no predictions"),
        ("case,label,prob_a\n1,0,1\n", "two at least"),
        ("case,label,prob_a,prob_b,prob_a\n1,0,0.5,0.5,0.5\n", "column `prob_a` twice"),
        ("case,label,prob_a,prob_b\n1,0,0.5,0.5,0.7\n", "row 2 has more cells"),
        ("case,label,prob_a,prob_b\n,0,0.5,0.5\n", "row 2 has no case"),
        ("case,study,label,prob_a,prob_b\n1,,0,0.5,0.5\n", "column `study` is empty"),
        ("label,prob_a,prob_b\n0,0.5,0.5\n", "column `case`"),
    ],
    ids=[
        "empty",
        "no-probs",
        "no-label",
        "label-range",
        "sum",
        "range",
        "nan",
        "short-row",
        "twice",
        "header-only",
        "one-class-column",
        "column-twice",
        "long-row",
        "no-case",
        "no-study",
        "no-case-column",
    ],
)
def test_bad_table_is_refused(tmp_path, text, reason):
    with pytest.raises(DatasetError, match=reason):
        read_predictions(write(tmp_path / "t.csv", text))


def test_missing_table_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="cannot be read"):
        read_predictions(tmp_path / "none.csv")


def test_report_is_complete_and_valid_json(tmp_path):
    test = write(tmp_path / "t.csv", GOOD)
    evaluate_files(test, tmp_path / "out", validation=test, compare_with=test, num_draws=50)
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["confusion_matrix"]["counts"] == [[2, 1], [0, 2]]
    assert report["metrics"]["auc"]["value"] == 1
    assert report["youden"]["threshold"] == 0.6
    assert report["youden"]["metrics"]["accuracy"]["value"] == 1
    assert report["comparison"]["delong"]["p_value"] == 1
    assert report["patients"] == 4
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 1000
    assert report["per_class"]["b"]["sensitivity"]["value"] == 1
    assert report["provenance"]["inputs"]["Predictions"]["name"] == "t.csv"
    assert len(report["provenance"]["inputs"]["Predictions"]["sha256"]) == 64


def test_threshold_comes_from_validation_only(tmp_path):
    test = read_predictions(write(tmp_path / "t.csv", GOOD))
    shifted = GOOD.replace("0.4,0.6", "0.95,0.05").replace("0.8,0.2", "0.99,0.01")
    validation = read_predictions(write(tmp_path / "v.csv", shifted))
    assert "youden" not in evaluate(test, num_draws=5)
    assert evaluate(test, validation, num_draws=5)["youden"]["threshold"] in (0.05, 0.9)


def test_grouping_averages_the_pairs_of_a_study(tmp_path):
    rows = "case,patient,study,label,prob_a,prob_b\n1,p,s1,1,0.2,0.8\n2,p,s1,1,0.6,0.4\n3,p,s2,0,0.9,0.1\n"
    grouped = group_predictions(read_predictions(write(tmp_path / "t.csv", rows)), "study")
    assert grouped.case.tolist() == ["s1", "s2"]
    np.testing.assert_allclose(grouped.probs, [[0.4, 0.6], [0.9, 0.1]])
    with pytest.raises(DatasetError, match="different labels"):
        group_predictions(read_predictions(tmp_path / "t.csv"), "patient")


def test_multi_label_table_names_unmeasurable_classes(tmp_path):
    rows = "case,label_x,label_y,prob_x,prob_y\n1,1,0,0.8,0.8\n2,0,0,0.3,0.4\n3,1,0,0.6,0.1\n"
    report = evaluate(read_predictions(write(tmp_path / "t.csv", rows)), num_draws=20)
    assert report["classes_without_both_labels"] == ["y"]
    assert report["metrics"]["auc"]["value"] == 1


def test_comparison_needs_the_same_cases(tmp_path):
    first = read_predictions(write(tmp_path / "a.csv", GOOD))
    second = read_predictions(write(tmp_path / "b.csv", GOOD.replace("5,s", "6,s")))
    with pytest.raises(DatasetError, match="same cases"):
        compare(first, second)


def test_test_table_of_one_class_is_refused(tmp_path):
    table = write(tmp_path / "t.csv", "case,label,prob_a,prob_b\n1,1,0.5,0.5\n2,1,0.4,0.6\n")
    with pytest.raises(DatasetError, match="all 2 cases are of the class b"):
        evaluate_files(table, tmp_path / "out")
    several = write(tmp_path / "m.csv", "case,label_x,prob_x\n1,1,0.5\n2,1,0.4\n")
    with pytest.raises(DatasetError, match="no class has cases with label 0"):
        evaluate_files(several, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_studies_are_scored_beside_the_pairs(tmp_path):
    rows = "case,patient,study,label,prob_a,prob_b\n1,p,s1,1,0.2,0.8\n2,p,s1,1,0.6,0.4\n3,q,s2,0,0.9,0.1\n"
    report = evaluate(read_predictions(write(tmp_path / "t.csv", rows)), num_draws=20)
    assert report["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert (report["by_study"]["cases"], report["by_study"]["metrics"]["accuracy"]["value"]) == (2, 1)
    mixed = read_predictions(write(tmp_path / "t.csv", rows.replace("2,p,s1,1", "2,p,s1,0")))
    assert "different labels" in evaluate(mixed, num_draws=20)["by_study"]["refused"]
    with pytest.raises(DatasetError, match="need the column `study`"):
        group_predictions(read_predictions(write(tmp_path / "t.csv", GOOD)), "study")


def test_further_column_is_scored_by_its_values(tmp_path):
    lines = GOOD.splitlines()
    text = "\n".join([lines[0] + ",part", *(f"{line},{'xy'[i % 2]}" for i, line in enumerate(lines[1:]))])
    table = read_predictions(write(tmp_path / "t.csv", text + "\n"))
    by = evaluate(table, by="part", num_draws=10)["by"]
    assert [by["values"][value]["cases"] for value in "xy"] == [3, 2]
    assert by["mean_auc"] == pytest.approx(np.nanmean([by["values"][v]["metrics"]["auc"]["value"] for v in "xy"]))
    with pytest.raises(DatasetError, match=r"`by` must be a further column .* it has part"):
        evaluate(table, by="ward", num_draws=10)


def test_multi_label_thresholds_come_from_validation(tmp_path):
    rows = "case,label_x,label_y,prob_x,prob_y\n1,1,0,0.4,0.8\n2,0,1,0.1,0.9\n3,1,0,0.3,0.1\n"
    table = read_predictions(write(tmp_path / "t.csv", rows))
    report = evaluate(table, table, num_draws=20)
    assert report["youden"]["threshold"] == {"x": 0.3, "y": 0.9}
    assert report["metrics"]["sensitivity"]["value"] == 0.5
    assert report["youden"]["metrics"]["sensitivity"]["value"] == 1


def test_empty_labels_are_unknown_and_counted(tmp_path):
    rows = "case,label_x,label_y,prob_x,prob_y\n1,1,0,0.8,0.8\n2,0,,0.3,0.4\n3,,1,0.1,0.9\n4,0,,0.2,0.1\n"
    table = read_predictions(write(tmp_path / "t.csv", rows))
    report = evaluate(table, table, num_draws=20)
    assert report["known_labels"] == {"x": 3, "y": 2}
    assert report["positives"] == {"x": 1, "y": 1}
    assert report["youden"]["threshold"] == {"x": 0.8, "y": 0.9}
    assert report["metrics"]["auc"]["value"] == 1  # case 3 would spoil it
    assert compare(table, table, num_draws=5)["difference"]["auc"]["value"] == 0
    evaluate_files(tmp_path / "t.csv", tmp_path / "out", num_draws=5)
    assert "known" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(DatasetError, match="`label` must be numbers in every row"):
        read_predictions(write(tmp_path / "s.csv", "case,label,prob_a,prob_b\n1,,0.5,0.5\n2,1,0.4,0.6\n"))
