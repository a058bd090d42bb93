"""Classification inside nnU-Net: folds, windows, tables, and what stops a training before it starts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.tables import read_predictions
from monai_mamba.nnunet.annotations import ClassTable

CLASSES = {"classes": ["thin", "thick"], "cases": {f"case_{i}": i % 2 for i in range(6)}}


@pytest.fixture
def make_classifier(planned, monkeypatch, tmp_path):
    from monai_mamba.nnunet.lookup import find_trainer
    from tests.nnunet.conftest import _FOLDERS

    for name in _FOLDERS:
        monkeypatch.setenv(name, str(planned.root / name.removeprefix("nnUNet_")))
    files = [planned.preprocessed / "classes.json", planned.preprocessed / "splits_final.json"]
    kept = files[1].read_bytes() if files[1].exists() else None
    files[1].unlink(missing_ok=True)

    def make(content=CLASSES, configuration="3d_fullres", name="nnMambaClassifierTrainerQuickNoSSM"):
        if content is not None:
            files[0].write_text(json.dumps(content))
        plans = json.loads((planned.preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
        dataset_json = json.loads((planned.preprocessed / "dataset.json").read_text())
        trainer = find_trainer(name)(plans, configuration, 0, dataset_json, torch.device("cpu"))
        trainer.output_folder = str(tmp_path)
        trainer.log_file = str(tmp_path / "log.txt")
        return trainer

    yield make
    for file in files:
        file.unlink(missing_ok=True)
    if kept is not None:
        files[1].write_bytes(kept)


def test_folds_keep_shares_of_classes_and_patients_whole():
    from monai_mamba.nnunet.classification import stratified_folds

    cases = [f"c{i:02d}" for i in range(60)]
    label = {case: int(i % 6 == 0) for i, case in enumerate(cases)}
    table = ClassTable(["a", "b"], label, {f"c{i:02d}": f"p{i // 12 * 6 + i % 6}" for i in range(60)})
    folds = stratified_folds(table, cases)
    assert len(folds) == 5 and sorted(case for fold in folds for case in fold["val"]) == cases
    for fold in folds:
        assert sum(label[case] for case in fold["val"]) == 2
        assert not {table.patient(c) for c in fold["train"]} & {table.patient(c) for c in fold["val"]}
    with pytest.raises(DatasetError, match="the class 'b' has 1 patients"):
        stratified_folds(ClassTable(["a", "b"], {c: int(c == "c00") for c in cases}), cases)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_loss_and_probabilities_of_one_logit_and_of_several(num_classes):
    from monai_mamba.nnunet.classification import ClassLoss, probabilities

    logits = torch.randn(5, num_classes)
    label = torch.tensor([0, 1, num_classes - 1, 0, 1])
    expected = torch.nn.functional.cross_entropy(logits, label)
    torch.testing.assert_close(ClassLoss()(logits, label), expected)
    torch.testing.assert_close(probabilities(logits), logits.softmax(1))
    if num_classes == 2:
        single = logits[:, 1:] - logits[:, :1]
        torch.testing.assert_close(ClassLoss()(single, label), expected)
        torch.testing.assert_close(probabilities(single), logits.softmax(1))


def test_windows_cover_larger_images_and_smaller_ones_are_padded():
    from monai_mamba.nnunet.classification import CaseClassifier

    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, x):
            seen.append(x[0, 0])
            return torch.tensor([[x[0, 0].max().logit().item()]])

    image = torch.full((1, 16, 40, 30), 0.2)
    image[0, 0, 39, 29] = 0.8
    probs = CaseClassifier(Recorder(), (16, 32, 32), torch.device("cpu")).classify(image)
    assert [tuple(part.shape) for part in seen] == [(16, 32, 32)] * 2
    assert seen[0].max() == pytest.approx(0.2) and seen[1].max() == pytest.approx(0.8)
    np.testing.assert_allclose(probs, [0.5, 0.5], atol=1e-5)  # the mean of 0.2 and 0.8


def test_trainer_balances_classes_trains_a_step_and_writes_probabilities(make_classifier, planned, tmp_path):
    cases = {**CLASSES["cases"], "case_2": 1}  # four of one class, two of the other
    trainer = make_classifier({**CLASSES, "cases": cases})
    trainer.on_train_start()
    # whole cases of 18 x 40 x 36
    assert list(trainer.configuration_manager.patch_size) == [32, 48, 48]
    loader = trainer.dataloader_train.data_loader
    weight = {0: 0.0, 1: 0.0}
    for name, probability in zip(loader.indices, loader.sampling_probabilities, strict=True):
        weight[cases[name]] += probability
    assert weight == pytest.approx({0: 0.5, 1: 0.5})
    batch = next(trainer.dataloader_train)
    assert batch["target"].tolist() == [cases[name] for name in batch["keys"]]
    assert batch["data"].shape == (2, 1, 32, 48, 48)
    assert np.isfinite(trainer.train_step(batch)["loss"])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        outputs = [trainer.validation_step(next(trainer.dataloader_val)) for _ in range(3)]
    _, val = trainer.do_split()
    assert {key for output in outputs for key in output["keys"]} == set(val)
    value, recalls = trainer.summarize(outputs)
    assert 0 <= value <= 1 and len(recalls) == 2
    trainer.perform_actual_validation()
    table = read_predictions(tmp_path / "validation" / "probabilities.csv")
    assert table.classes == ["thin", "thick"] and sorted(table.case) == sorted(val)
    assert [cases[name] for name in table.case] == table.label.tolist()
    metrics = json.loads((tmp_path / "validation" / "metrics.json").read_text())
    assert np.sum(metrics["confusion_matrix"]) == len(val) and 0 <= metrics["accuracy"] <= 1
    splits = json.loads((planned.preprocessed / "splits_final.json").read_text())
    assert all({cases[name] for name in fold["val"]} == {0, 1} for fold in splits)


def test_each_case_counts_once_however_often_it_came(make_classifier):
    trainer = make_classifier()
    output = {"keys": ["a", "b", "a"], "label": [0, 1, 0], "probs": np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])}
    value, recalls = trainer.summarize([output])
    assert value == 0 and recalls == [0, 1]  # the last prediction of `a` is wrong
    assert np.isnan(trainer.summarize([{"keys": ["a"], "label": [0], "probs": np.array([[0.9, 0.1]])}])[0])


def test_stock_prediction_is_told_where_to_go(make_classifier):
    trainer = make_classifier()
    network = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 3).eval()
    with pytest.raises(DatasetError, match="monai-mamba nnunet predict-classes"):
        network(torch.zeros(1, 1, 32, 32, 32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**CLASSES, "cases": {"case_0": 0, "case_1": 1}}, r"4 of 6 cases: case case_2: it has no class"),
        ({**CLASSES, "cases": dict.fromkeys(CLASSES["cases"], 0)}, "the class 'thick' has 0 patients"),
    ],
    ids=["missing", "empty"],
)
def test_bad_classes_stop_a_training_before_it_starts(make_classifier, content, message):
    with pytest.raises(DatasetError, match=message):
        make_classifier(content).on_train_start()


def test_training_without_classes_says_where_they_belong(make_classifier):
    with pytest.raises(DatasetError, match=r"there is no .*classes\.json nor .*raw.*classes\.json; docs/nnunet\.md"):
        make_classifier(None)


def test_slices_of_volumes_have_no_class(make_classifier):
    with pytest.raises(DatasetError, match="a slice has no class of its own: use 3d_fullres"):
        make_classifier(configuration="2d").on_train_start()
