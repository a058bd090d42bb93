"""Published rows, against scikit-learn, and the edges."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support, recall_score, roc_auc_score

from monai_mamba.evaluation import classification
from monai_mamba.evaluation.bootstrap import bootstrap
from monai_mamba.evaluation.calibration import fit_temperature, reliability, scale_temperature


@pytest.mark.parametrize(
    ("matrix", "published"),
    [
        (
            [[19, 23], [0, 114]],
            {"precision": 91.6, "sensitivity": 72.6, "specificity": 72.6, "f1": 76.6, "accuracy": 85.3},
        ),
        (
            [[176, 58], [5, 385]],
            {"precision": 92.1, "sensitivity": 87.0, "specificity": 87.0, "f1": 88.6, "accuracy": 89.9},
        ),
    ],
    ids=["breastmnist", "pneumoniamnist"],
)
def test_matrix_gives_the_published_row(matrix, published):
    # MedMamba, arXiv:2403.03849, results of MedMamba-T in percent with one digit.
    metrics = classification.matrix_metrics(np.array(matrix))
    assert {name: round(100 * value, 1) for name, value in metrics.items()} == published


def test_matrix_with_a_class_never_predicted_gives_precision_zero():
    each = classification.class_metrics(np.array([[5, 0, 0], [2, 0, 1], [0, 0, 4]]))
    assert each["precision"][1] == each["f1"][1] == each["sensitivity"][1] == 0
    assert each["specificity"] == pytest.approx([1 - 2 / 7, 1.0, 1 - 1 / 8])


def test_matrix_of_one_class_only_has_specificity_zero():
    assert classification.class_metrics(np.array([[4, 0], [0, 0]]))["specificity"].tolist() == [0.0, 1.0]


def test_auc_of_three_classes_is_the_mean_of_one_against_rest():
    generator = np.random.default_rng(0)
    probs = generator.dirichlet([1, 1, 1], 60)
    label = generator.integers(0, 3, 60)
    assert classification.auc(label, probs) == pytest.approx(roc_auc_score(label, probs, multi_class="ovr"))


@pytest.mark.parametrize("num_classes", [2, 5])
def test_all_metrics_equal_those_of_scikit_learn(num_classes):
    generator = np.random.default_rng(7)
    probs = np.round(generator.dirichlet(np.ones(num_classes), 90), 1)  # with ties
    label = generator.integers(0, num_classes, 90)
    scores = classification.score(label, probs)
    truth, pred = np.eye(num_classes, dtype=int)[label], np.eye(num_classes, dtype=int)[probs.argmax(1)]
    precision, sensitivity, f1, _ = precision_recall_fscore_support(truth, pred, average="macro", zero_division=0)
    specificity = recall_score(1 - truth, 1 - pred, average="macro")
    auc = roc_auc_score(truth[:, 1], probs[:, 1]) if num_classes == 2 else roc_auc_score(truth, probs)
    expected = [(label == probs.argmax(1)).mean(), precision, sensitivity, specificity, f1, auc]
    assert list(scores) == list(classification.METRICS)
    assert list(scores.values()) == pytest.approx(expected, abs=1e-12)


def test_multi_label_metrics_equal_those_of_scikit_learn_and_leave_out_what_cannot_be_measured():
    generator = np.random.default_rng(8)
    label, probs = generator.integers(0, 2, (50, 4)), np.round(generator.random((50, 4)), 1)
    label[:, 2] = 0
    means, each = classification.multi_label_score(label, probs)
    kept = [0, 1, 3]
    truth, pred = label[:, kept], (probs[:, kept] >= 0.5).astype(int)
    precision, sensitivity, f1, _ = precision_recall_fscore_support(truth, pred, average="macro")
    specificity = recall_score(1 - truth, 1 - pred, average="macro")
    expected = [(truth == pred).mean(), precision, sensitivity, specificity, f1, roc_auc_score(truth, probs[:, kept])]
    assert list(means.values()) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(each[2])
    one = classification.multi_label_score(label, probs, np.array([0.5, 0.9, 0.5, 0.1]))[0]
    assert one["sensitivity"] != means["sensitivity"]
    nothing = classification.multi_label_score(label[:, 2:3], probs[:, 2:3])[0]
    assert np.isnan(list(nothing.values())).all()


def test_auc_with_a_missing_class_is_nan():
    assert np.isnan(classification.auc(np.array([0, 0, 1]), np.full((3, 3), 1 / 3)))


def test_multi_label_auc_leaves_out_classes_without_positives():
    label = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])
    mean, each = classification.multi_label_auc(label, np.array([[0.9, 0.1], [0.2, 0.4], [0.1, 0.3], [0.3, 0.2]]))
    assert each[0] == mean == 0.5
    assert np.isnan(each[1])


def test_unknown_labels_count_nowhere():
    generator = np.random.default_rng(3)
    label, probs = generator.integers(0, 2, (60, 3)).astype(float), generator.random((60, 3))
    hidden = generator.random((60, 3)) < 0.3
    means, each = classification.multi_label_score(np.where(hidden, np.nan, label), probs)
    parts = [
        classification.multi_label_score(label[~h, c : c + 1], probs[~h, c : c + 1]) for c, h in enumerate(hidden.T)
    ]
    assert each.tolist() == pytest.approx([part[1][0] for part in parts])
    for name in ("precision", "sensitivity", "specificity", "f1", "auc"):
        assert means[name] == pytest.approx(np.mean([part[0][name] for part in parts])), name
    assert means["accuracy"] == pytest.approx(((probs >= 0.5) == (label == 1))[~hidden].mean())
    other = np.where(hidden, 1 - probs, probs)  # whatever was answered there
    assert classification.multi_label_score(np.where(hidden, np.nan, label), other)[0] == means


def test_youden_threshold_separates_what_can_be_separated():
    label, probability = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.45, 0.8])
    threshold = classification.youden_threshold(label, probability)
    assert threshold == 0.45
    decided = classification.decide(np.stack([1 - probability, probability], 1), threshold)
    assert decided.tolist() == label.tolist()


def test_youden_threshold_of_one_class_is_refused():
    with pytest.raises(ValueError, match="both classes"):
        classification.youden_threshold(np.ones(3), np.ones(3))


def test_delong_equals_the_definition_by_pairs():
    generator = np.random.default_rng(1)
    label = np.repeat([0, 1], [17, 12])
    scores = np.round(generator.normal(label, 1.0, 29), 1)  # with ties
    positive, negative = scores[label == 1], scores[label == 0]
    psi = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    variance = psi.mean(1).var(ddof=1) / 12 + psi.mean(0).var(ddof=1) / 17
    result = classification.delong(label, scores)
    assert result.auc == pytest.approx(roc_auc_score(label, scores), abs=1e-12)
    assert result.standard_error == pytest.approx(np.sqrt(variance), abs=1e-12)


def test_delong_interval_covers_the_true_auc():
    # Two normals one standard deviation apart: the AUC is Phi(1 / sqrt 2) = 0.7602. 95 % of 400 draws, +- 3 sigma.
    generator = np.random.default_rng(2)
    label = np.repeat([0, 1], [60, 60])
    results = [classification.delong(label, generator.normal(label, 1.0)) for _ in range(400)]
    assert 0.917 <= np.mean([r.low <= 0.76025 <= r.high for r in results]) <= 0.983


def test_delong_test_of_equal_models_is_one_and_of_different_ones_small():
    generator = np.random.default_rng(3)
    label = np.repeat([0, 1], [80, 80])
    good, noise = generator.normal(2 * label, 1.0), generator.normal(0, 1.0, 160)
    assert classification.delong_test(label, good, good) == (0.0, 1.0)
    difference, p_value = classification.delong_test(label, good, noise)
    assert difference > 0.2
    assert p_value < 1e-6


def test_bootstrap_draws_patients_so_that_copies_add_nothing():
    generator = np.random.default_rng(4)
    values = generator.normal(size=40)
    patients = np.arange(40).astype(str)

    def width(values, patients):
        interval = bootstrap(lambda rows: {"mean": values[rows].mean()}, patients, 800)["mean"]
        assert interval.value == pytest.approx(values.mean())
        return interval.high - interval.low

    once = width(values, patients)
    assert once == pytest.approx(2 * 1.96 * values.std() / np.sqrt(40), rel=0.1)
    # Every image five times under the same patient: by image the interval would shrink by sqrt 5.
    assert width(np.repeat(values, 5), np.repeat(patients, 5)) == pytest.approx(once, rel=0.1)


def test_bootstrap_counts_the_draws_that_could_be_measured():
    label = np.array([0, 1])
    interval = bootstrap(
        lambda rows: {"auc": classification.auc(label[rows], np.eye(2)[label[rows]])}, ["a", "b"], 200
    )["auc"]
    assert (interval.value, interval.low, interval.high) == (1, 1, 1)
    assert 60 < interval.draws < 140  # half of the draws hold one class only


@pytest.mark.parametrize(("patients", "level"), [([], 0.95), (["a"], 1.0)], ids=["empty", "level"])
def test_bootstrap_refuses(patients, level):
    with pytest.raises(ValueError, match=r"`patients`|`level`"):
        bootstrap(lambda rows: {}, patients, level=level)


def test_temperature_undoes_a_known_distortion():
    generator = np.random.default_rng(5)
    honest = generator.dirichlet([1, 1], 4000)
    label = (generator.random(4000) < honest[:, 1]).astype(int)
    assert reliability(label, honest).expected_error < 0.04
    sure = scale_temperature(honest, 1 / 3)
    assert fit_temperature(label, sure) == pytest.approx(3, rel=0.1)
    assert reliability(label, sure).expected_error > 0.1


def test_reliability_by_hand():
    diagram = reliability(np.array([0, 1, 1]), np.array([[0.95, 0.05], [0.9, 0.1], [0.3, 0.7]]), num_bins=10)
    assert diagram.count.tolist() == [0] * 6 + [1, 0, 1, 1]
    assert diagram.expected_error == pytest.approx((0.05 + 0.9 + 0.3) / 3)
