"""Handlers on a network of one weight: best and last state, early stopping, resuming, guards, predictions."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.transforms import RandGaussianNoised

from monai_mamba.errors import CheckpointError, RunError
from monai_mamba.training.bundle import seed_everything, start_from
from monai_mamba.training.handlers import EpochSeeds, MeanAUC, NonFiniteGuard, PredictionWriter, RunKeeper


def run_engines(folder, values, max_epochs=None, higher_is_better=True, **keeper_arguments):
    """Train for as long as there are validation values; return the keeper and the trainer."""
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def step(engine, batch):
        with torch.no_grad():
            network.weight.fill_(float(engine.state.epoch))

    trainer = Engine(step)
    trainer.state.max_epochs, trainer.state.epoch_length = max_epochs or len(values), 1
    evaluator = Engine(lambda engine, batch: None)
    evaluator.state.key_metric_name, evaluator.state.metrics = "auc", {}

    def validate(engine):
        evaluator.state.metrics["auc"] = values[engine.state.epoch - 1]
        evaluator.fire_event(Events.COMPLETED)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    keeper = RunKeeper(folder, network, optimizer, higher_is_better=higher_is_better, **keeper_arguments)
    keeper.attach_to(trainer, evaluator)
    trainer.run([0], max_epochs=trainer.state.max_epochs, epoch_length=1)
    return keeper, trainer


def best_weight(folder):
    return float(torch.load(folder / "model.pt", weights_only=True)["weight"])


@pytest.mark.parametrize(
    ("values", "higher", "epoch"),
    [([0.5, 0.9, 0.7], True, 2), ([0.5, 0.9, 0.3], False, 3), ([float("nan"), 0.2, float("nan")], True, 2)],
    ids=["highest", "lowest", "nan"],
)
def test_best_network_is_kept(tmp_path, values, higher, epoch):
    keeper, _ = run_engines(tmp_path, values, higher_is_better=higher, settings={"classes": ["a"]})
    assert keeper.best_epoch == best_weight(tmp_path) == epoch
    card = json.loads((tmp_path / "model.json").read_text())
    assert card == {"classes": ["a"], "epoch": epoch, "metric": "auc", "value": values[epoch - 1]}


@pytest.mark.parametrize(("patience", "epochs"), [(0, 5), (2, 4)], ids=["never", "two"])
def test_patience_stops_after_so_many_validations(tmp_path, patience, epochs):
    _, trainer = run_engines(tmp_path, [0.5, 0.6, 0.6, 0.4, 0.1], patience=patience)
    assert trainer.state.epoch == epochs


def test_resumed_run_remembers_best_value_and_patience(tmp_path):
    run_engines(tmp_path, [0.5, 0.9, 0.6], max_epochs=3)
    keeper, trainer = run_engines(tmp_path, [0, 0, 0, 0.8, 0.7], max_epochs=5, patience=3, resume=True)
    assert (keeper.best, keeper.best_epoch) == (0.9, 2)
    assert best_weight(tmp_path) == 2  # MONAI's saver would have put epoch 4 there
    assert trainer.state.epoch == 5
    assert keeper.waited == 3


def test_resuming_refuses_a_finished_run_other_settings_and_damage(tmp_path):
    run_engines(tmp_path, [0.5, 0.6], settings={"seed": 1})
    with pytest.raises(CheckpointError, match="all 2 epochs are done"):
        run_engines(tmp_path, [0.5, 0.6], resume=True)
    with pytest.raises(CheckpointError, match="'seed': 1"):
        run_engines(tmp_path, [0, 0, 1], resume=True, settings={"seed": 2})
    whole = (tmp_path / "last.pt").read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be resumed from"):
            run_engines(tmp_path, [0, 0, 1], resume=True)


def test_start_from_needs_a_file_that_fits(tmp_path):
    network = torch.nn.Linear(2, 1)
    assert start_from(network, None) is network
    torch.save(torch.nn.Linear(2, 1).state_dict(), tmp_path / "good.pt")
    torch.save(torch.nn.Linear(3, 1).state_dict(), tmp_path / "other.pt")
    start_from(network, tmp_path / "good.pt")
    assert torch.equal(network.weight, torch.load(tmp_path / "good.pt", weights_only=True)["weight"])
    for name in ("other.pt", "none.pt"):
        with pytest.raises(CheckpointError, match=name):
            start_from(network, tmp_path / name)


def cases(num):
    return [{"case": str(i), "patient": "p", "image": torch.full((1,), float(i)), "label": i % 2} for i in range(num)]


def test_epochs_draw_the_same_order_and_noise_whatever_happened_before():
    data = Dataset(cases(6), RandGaussianNoised("image", prob=1.0))
    seen = {}

    def epochs(start):
        torch.rand(start)
        loader = DataLoader(data, batch_size=2, shuffle=True, num_workers=0)
        engine = Engine(lambda engine, batch: seen.setdefault((start, engine.state.epoch), []).append(batch["image"]))
        EpochSeeds(3).attach(engine)
        engine.state.epoch = start
        engine.state.max_epochs, engine.state.epoch_length, engine.state.iteration = 3, 3, 3 * start
        engine.run(loader, max_epochs=3, epoch_length=3)

    epochs(0)
    epochs(2)
    assert torch.equal(torch.cat(seen[0, 3]), torch.cat(seen[2, 3]))
    assert not torch.equal(torch.cat(seen[0, 1]), torch.cat(seen[0, 2]))


@pytest.mark.parametrize("rank", [0, 1])
def test_seeds_differ_between_processes_and_epochs(rank):
    draws = []
    for epoch in (0, 1):
        seed_everything(1, epoch, rank)
        draws.append((np.random.rand(), float(torch.rand(1))))  # noqa: NPY002
    seed_everything(1, 0, 1 - rank)
    assert len({*draws, (np.random.rand(), float(torch.rand(1)))}) == 3  # noqa: NPY002


def test_loss_that_is_not_finite_stops_and_saves_the_batch(tmp_path):
    network = torch.nn.Linear(1, 2)
    data = cases(4)
    data[2]["image"] = torch.tensor([float("inf")])
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=DataLoader(Dataset(data), batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=torch.nn.CrossEntropyLoss(),
        train_handlers=[NonFiniteGuard(tmp_path)],
    )
    with pytest.raises(RunError, match="epoch 1, iteration 2"):
        trainer.run()
    batch = torch.load(tmp_path / "non_finite_batch.pt", weights_only=True)
    assert batch["case"] == ["2", "3"]
    assert torch.isinf(batch["image"][0])
    assert all(torch.isfinite(p).all() for p in network.parameters())


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_predictions_are_written_with_probabilities(tmp_path, num_outputs):
    network = torch.nn.Linear(1, num_outputs)
    with torch.no_grad():
        network.weight.zero_()
        network.bias.copy_(torch.tensor([np.log(3.0)]) if num_outputs == 1 else torch.tensor([0.0, np.log(3.0)]))
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Dataset(cases(3)), batch_size=2),
        network=network,
        val_handlers=[PredictionWriter(tmp_path / "out" / "p.csv", ["a", "b"])],
    )
    evaluator.run()
    with open(tmp_path / "out" / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["patient"], row["label"]) for row in rows] == [
        ("0", "p", "0"),
        ("1", "p", "1"),
        ("2", "p", "0"),
    ]
    assert [float(row["prob_b"]) for row in rows] == pytest.approx([0.75] * 3)


def test_predictions_with_another_number_of_classes_are_refused(tmp_path):
    writer = PredictionWriter(tmp_path / "p.csv", ["a", "b", "c"])
    engine = SimpleNamespace(state=SimpleNamespace(batch={"case": ["1"]}, output={"pred": torch.zeros(1, 2)}))
    with pytest.raises(RunError, match="2 outputs"):
        writer._collect(engine)


def test_mean_auc_leaves_out_unknown_labels_and_classes_that_cannot_be_measured():
    metric = MeanAUC(lambda output: output)
    label = torch.tensor([[1, 0, 0], [0, 0, float("nan")], [float("nan"), 0, 1]])
    probs = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.7, 0.1], [0.0, 0.3, 0.8]])
    metric.update((list(probs[:2]), list(label[:2])))
    metric.update((list(probs[2:]), list(label[2:])))
    assert metric.compute() == 1.0  # case 3 has the lowest probability of class 1, but is unknown there
    metric.reset()
    assert np.isnan(metric.compute())


def test_unknown_labels_are_written_as_empty_cells(tmp_path):
    writer = PredictionWriter(tmp_path / "p.csv", ["a", "b"], multi_label=True)
    batch = {"case": ["1"], "patient": ["1"], "label": torch.tensor([[float("nan"), 1.0]])}
    writer._collect(SimpleNamespace(state=SimpleNamespace(batch=batch, output={"pred": torch.zeros(1, 2)})))
    writer._write()
    assert (tmp_path / "p.csv").read_text().splitlines()[1] == "1,1,,1,0.5,0.5"
