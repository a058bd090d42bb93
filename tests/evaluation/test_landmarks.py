"""Landmarks: distances, means and rates."""

from __future__ import annotations

import numpy as np
import pytest

from monai_mamba.evaluation.landmarks import evaluate_landmarks, radial_errors


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
