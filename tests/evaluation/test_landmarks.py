"""Landmarks: distances, means and rates."""

from __future__ import annotations

import json

import numpy as np
import pytest

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.landmarks import evaluate_files, evaluate_landmarks, radial_errors


def test_errors_are_distances_and_unknown_where_the_reference_is():
    reference = np.array([[[0.0, 0, 0], [1, 1, 1]], [[np.nan] * 3, [5, 5, 5]]])
    errors = radial_errors(np.array([[[3.0, 4, 0], [1, 1, 1]], [[0, 0, 0], [5, 5, 7]]]), reference)
    np.testing.assert_allclose(errors, [[5, 0], [np.nan, 2]])


def test_figures_by_hand():
    errors = np.array([[1.0, 3.0], [2.0, np.nan], [3.0, 5.0]])
    result = evaluate_landmarks(errors, ["a", "b"], ["p", "q", "r"], radii_mm=(2, 4), num_draws=100)
    assert result["mre_mm_a"].value == 2
    assert result["mre_mm_b"].value == 4
    assert result["mre_mm"].value == 3
    assert result["sdr_2mm"].value == pytest.approx(2 / 5)
    assert result["sdr_4mm"].value == pytest.approx(4 / 5)
    assert result["mre_mm_a"].low < 2 < result["mre_mm_a"].high
    assert result["mre_mm_b"].draws < 100  # draws of the second case alone cannot measure it


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)], ids=["names", "patients"])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="`errors_mm`"):
        evaluate_landmarks(np.zeros(shape), ["a", "b"], ["p", "q"])


HEADER = "case,patient,landmark,x_mm,y_mm,z_mm,reference_x_mm,reference_y_mm,reference_z_mm\n"
TABLE = HEADER + "1,p,a,0,0,0,3,0,4\n1,p,b,1,1,1,,,\n2,q,a,0,0,0,1,0,0\n2,q,b,0,0,0,0,2,0\n"


def test_table_gives_errors_rates_and_curve(tmp_path):
    (tmp_path / "t.csv").write_text(TABLE)
    metrics = evaluate_files(tmp_path / "t.csv", tmp_path / "out", tmp_path / "t.csv", num_draws=50)
    assert metrics["errors_mm"]["1"]["a"] == 5
    assert metrics["per_landmark"]["b"]["value"] == 2
    assert metrics["metrics"]["mre_mm"]["value"] == (3 + 2) / 2
    assert metrics["metrics"]["sdr_2mm"]["value"] == pytest.approx(2 / 3)
    assert metrics["sdr_curve"]["share"][50] == 1
    assert metrics["comparison"]["difference"]["mre_mm"]["high"] == 0
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["errors_mm"]["1"]["b"] is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TABLE.replace("reference_z_mm", "rz"), "lacks reference_z_mm"),
        (TABLE + "2,q,b,0,0,0,0,2,0\n", "landmark b of the case 2 appears twice"),
        (TABLE.replace("1,1,1,,,", "1,1,1,2,,"), "half empty"),
        (TABLE.replace("1,p,b,1", "1,p,b,"), "must be numbers"),
        (TABLE.replace("1,p,b", "1,q,b"), "two patients"),
        (HEADER + "1,p,b,1,1,1,,,\n", "no landmark has a reference"),
    ],
    ids=["column", "twice", "half", "no-position", "patients", "no-reference"],
)
def test_bad_table_is_refused(tmp_path, text, reason):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DatasetError, match=reason):
        evaluate_files(tmp_path / "t.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_comparison_needs_the_same_references(tmp_path):
    (tmp_path / "a.csv").write_text(TABLE)
    (tmp_path / "b.csv").write_text(TABLE.replace("0,2,0\n", "0,3,0\n"))
    with pytest.raises(DatasetError, match="different references"):
        evaluate_files(tmp_path / "a.csv", tmp_path / "out", tmp_path / "b.csv")
