"""Handlers for MONAI's engines: reproducible epochs, checkpoints that resume bit for bit, guards and predictions."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.data.utils import set_rnd
from torch import nn

from monai_mamba.errors import CheckpointError, RunError
from monai_mamba.evaluation.classification import multi_label_auc
from monai_mamba.files import case_file, whole_file, write_text
from monai_mamba.training.bundle import MODEL_CARD, rank, seed_everything
from monai_mamba.training.label_maps import write_label_map
from monai_mamba.training.landmark_files import FoundLandmarks, write_landmark_table, write_markups
from monai_mamba.training.outputs import class_probabilities

logger = logging.getLogger(__name__)


class EpochSeeds:
    """Seed every epoch by its number, so that epoch n is the same in a resumed run as in one that never stopped.

    All global generators and the random states of MONAI's transforms are set, and the loader starts anew. A
    ``DistributedSampler`` is told the epoch.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        loader: Any = engine.state.dataloader
        epoch = engine.state.epoch
        seed_everything(self.seed, epoch, rank())
        set_rnd(loader.dataset, seed=(self.seed * 100003 + epoch * 1009 + rank()) % 2**31)
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        engine.set_data(loader)


class EndWithData:
    """End an epoch when there are no more batches, fewer than announced if a whole one could not be read.

    Ignite would begin anew with the first batch, and score its cases twice.
    """

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda engine: engine.terminate_epoch())


class NonFiniteGuard:
    """Stop a training whose loss is not finite and save the batch that did it.

    Args:
        folder: where ``non_finite_batch.pt`` is written.

    Raises:
        RunError: at the first loss that is NaN or infinite; the network and its last checkpoint are untouched.
    """

    def __init__(self, folder: os.PathLike[str] | str) -> None:
        self.folder = Path(folder)

    def attach(self, engine: Engine) -> None:
        from monai.engines import IterationEvents

        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        output: Any = engine.state.output
        loss = float(output["loss"].detach())
        if math.isfinite(loss):
            return
        batch: Any = engine.state.batch
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "non_finite_batch.pt"
        tensors = {k: torch.as_tensor(v) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        with whole_file(path) as temporary:
            torch.save({**tensors, "case": [str(case) for case in batch.get("case", [])]}, temporary)
        raise RunError(
            f"the loss is {loss} in epoch {engine.state.epoch}, iteration {engine.state.iteration}; the batch is in "
            f"{path}. Lower the learning rate, or train with precision fp32"
        )


class RunKeeper:
    """Keep the last and the best state of a training, stop it early, and resume it exactly.

    ``last.pt`` holds all that continues the run: network, optimizer, scheduler, scaler, epoch, best value and patience.
    ``model.pt`` holds the network of the best validation only, as model-zoo bundles do, and ``model.json`` beside it
    what it was trained for. MONAI's own handlers cannot be resumed exactly: they forget the best value and the
    patience, so that a resumed run replaces the best network by its first one.

    Args:
        folder: where both files are written.
        network: the network, also one wrapped by ``DistributedDataParallel``.
        optimizer: the optimizer.
        lr_scheduler: the scheduler, stepped by somebody else; None for none.
        patience: stop after this many validations without a better value; 0 never stops.
        higher_is_better: False if the key metric of the evaluator is a loss or an error.
        resume: start from ``last.pt``; it must be there.
        settings: what must be the same in a resumed run, written into ``last.pt``.
    """

    LAST = "last.pt"
    BEST = "model.pt"
    CARD = MODEL_CARD

    def __init__(
        self,
        folder: os.PathLike[str] | str,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any = None,
        patience: int = 0,
        higher_is_better: bool = True,
        resume: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if patience < 0:
            raise ValueError(f"`patience` must be at least 0, got {patience}")
        self.folder = Path(folder)
        self.network = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.patience = patience
        self.higher_is_better = higher_is_better
        self.resume = resume
        self.settings = dict(settings or {})
        self.best: float | None = None
        self.best_epoch = 0
        self.waited = 0
        self._start = 0.0
        self._first_epoch = 0

    def attach_to(self, trainer: Engine, evaluator: Engine) -> None:
        """Follow a training and its validation; call it once, before the training is run."""
        if self.resume:
            self._load(trainer)
        trainer.add_event_handler(Events.STARTED, self._on_start)
        evaluator.add_event_handler(Events.COMPLETED, self._on_validated, trainer)
        # After the validation handler and the scheduler, which were attached before.
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._on_epoch)

    def _on_start(self, trainer: Engine) -> None:
        self._start, self._first_epoch = time.monotonic(), trainer.state.epoch

    def _on_validated(self, evaluator: Engine, trainer: Engine) -> None:
        name = evaluator.state.key_metric_name  # type: ignore[attr-defined]
        value = float(evaluator.state.metrics[name])
        if math.isnan(value):
            logger.warning("epoch %d: %s cannot be measured (a class is missing?)", trainer.state.epoch, name)
        sign = 1 if self.higher_is_better else -1
        if not math.isnan(value) and (self.best is None or sign * value > sign * self.best):
            self.best, self.best_epoch, self.waited = value, trainer.state.epoch, 0
            self._write(self.BEST, self.network.state_dict())
            if rank() == 0:
                card = {**self.settings, "epoch": self.best_epoch, "metric": name, "value": value}
                write_text(self.folder / self.CARD, json.dumps(card, indent=1))
        else:
            self.waited += 1
            if self.patience and self.waited >= self.patience:
                logger.info("no better %s for %d validations: stopping", name, self.waited)
                trainer.terminate()
        evaluator.state.best_metric = self.best  # type: ignore[attr-defined]

    def _on_epoch(self, trainer: Engine) -> None:
        self._write(self.LAST, self._state(trainer))
        epoch, last = trainer.state.epoch, trainer.state.max_epochs or 0
        seconds = (time.monotonic() - self._start) / max(epoch - self._first_epoch, 1)
        left = int(seconds * (last - epoch))
        logger.info(
            "epoch %d/%d done, %.1f s each, %d:%02d:%02d left; best %s in epoch %d",
            epoch,
            last,
            seconds,
            left // 3600,
            left % 3600 // 60,
            left % 60,
            "none yet" if self.best is None else f"{self.best:.4f}",
            self.best_epoch,
        )

    def _state(self, trainer: Any) -> dict[str, Any]:
        scaler = getattr(trainer, "scaler_", None) or getattr(trainer, "scaler", None)
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "epoch": trainer.state.epoch,
            "epoch_length": trainer.state.epoch_length,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "waited": self.waited,
            "settings": self.settings,
        }

    def _write(self, name: str, content: Any) -> None:
        if rank() != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / name) as temporary:
            torch.save(content, temporary)

    def _load(self, trainer: Any) -> None:
        path = self.folder / self.LAST
        if not path.is_file():
            raise CheckpointError(f"{path}: there is nothing to resume; start without `--resume`")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            differing = {k: v for k, v in self.settings.items() if state["settings"].get(k, v) != v}
            if differing:
                was = {k: state["settings"][k] for k in differing}
                raise CheckpointError(
                    f"{path}: was trained with {was}, now asked for {differing}; resume with the former"
                )
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.lr_scheduler is not None and state["lr_scheduler"] is not None:
                self.lr_scheduler.load_state_dict(state["lr_scheduler"])
            scaler = getattr(trainer, "scaler", None)
            if scaler is not None and state["scaler"]:
                scaler.load_state_dict(state["scaler"])
            self.best, self.best_epoch, self.waited = state["best"], state["best_epoch"], state["waited"]
            epoch = int(state["epoch"])
        except (KeyError, RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: cannot be resumed from: {error}") from error
        if epoch >= trainer.state.max_epochs:
            raise CheckpointError(f"{path}: all {epoch} epochs are done; ask for more with `--max_epochs`")
        trainer.state.epoch = epoch
        trainer.state.iteration = epoch * trainer.state.epoch_length
        logger.info("resuming after epoch %d", epoch)


class PredictionWriter:
    """Write what an evaluator predicts into one CSV file, a row per case.

    Columns: ``case``, ``patient``, ``label`` (or ``label_<class>`` for several labels at once, empty where it is not
    known) and ``prob_<class>``.
    `monai_mamba.evaluation` and ``monai-mamba evaluate`` read it.

    Args:
        path: the file; it appears when the evaluation is over.
        classes: names of the classes in the order of the outputs.
        multi_label: outputs are independent probabilities (sigmoid) instead of one distribution (softmax).
    """

    def __init__(self, path: os.PathLike[str] | str, classes: Sequence[str], multi_label: bool = False) -> None:
        self.path = Path(path)
        self.classes = list(classes)
        self.multi_label = multi_label
        self._rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        from monai.engines import IterationEvents

        engine.add_event_handler(Events.STARTED, lambda: self._rows.clear())
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Engine) -> None:
        batch: Any = engine.state.batch
        output: Any = engine.state.output
        # The engine's output holds logits here; postprocessing, for the metrics, comes after.
        probs = class_probabilities(output["pred"], len(self.classes), self.multi_label)
        for index, row in enumerate(probs.tolist()):
            entry: dict[str, Any] = {"case": batch["case"][index], "patient": batch["patient"][index]}
            if "label" in batch:
                label = torch.as_tensor(batch["label"][index])
                if self.multi_label:
                    values = ("" if math.isnan(value) else int(value) for value in label.tolist())
                    entry.update({f"label_{n}": v for n, v in zip(self.classes, values, strict=True)})
                else:
                    entry["label"] = int(label)
            entry.update({f"prob_{n}": f"{p:.9g}" for n, p in zip(self.classes, row, strict=True)})
            self._rows.append(entry)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self._rows[0]))
            writer.writeheader()
            writer.writerows(self._rows)
        logger.info("wrote %d predictions to %s", len(self._rows), self.path)


class MeanAUC(Metric):
    """Mean area under the ROC curve over the classes, each against the rest, from known labels (not NaN) alone.

    Classes without known positives or negatives are left out; without any other the value is NaN. MONAI's metric is NaN
    as soon as one of them occurs.

    Args:
        output_transform: to probabilities and labels ``(classes,)`` of the cases, MONAI's
            ``from_engine(["pred", "label"])``.
    """

    def __init__(self, output_transform: Any) -> None:
        super().__init__(output_transform)

    def reset(self) -> None:
        self._probs: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []

    def update(self, output: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]) -> None:
        for kept, values in zip((self._probs, self._labels), output, strict=True):
            kept.extend(torch.as_tensor(value).detach().double().cpu() for value in values)

    def compute(self) -> float:
        if not self._probs:
            return math.nan
        return multi_label_auc(torch.stack(self._labels).numpy(), torch.stack(self._probs).numpy())[0]


class MeanRadialError(Metric):
    """Mean distance of all landmarks from their references in mm, of the ``error_mm`` that `HeatMapsToLandmarksd` made.

    Landmarks without a reference (NaN) do not count; without any the value is NaN.

    Args:
        output_transform: to the list of errors ``(landmarks,)`` of the cases, MONAI's ``from_engine("error_mm")``.
    """

    def __init__(self, output_transform: Any) -> None:
        super().__init__(output_transform)

    def reset(self) -> None:
        self._errors: list[torch.Tensor] = []

    def update(self, output: Sequence[torch.Tensor]) -> None:
        self._errors.extend(torch.as_tensor(error).flatten().cpu() for error in output)

    def compute(self) -> float:
        errors = torch.cat(self._errors) if self._errors else torch.empty(0)
        return float(errors[~errors.isnan()].mean())


def is_lower(current: float, best: float) -> bool:
    """Compare errors in millimeters, for the ``metric_cmp_fn`` of MONAI's evaluators, whose first best value is -1."""
    return best < 0 or current < best


class SingleOutput:
    """Switch deep supervision off while an evaluator runs, so that the network returns one map, and on again after it.

    Args:
        network: a network with ``decoder.deep_supervision``, also one wrapped by ``DistributedDataParallel``.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._switch, False)
        engine.add_event_handler(Events.COMPLETED, self._switch, True)

    def _switch(self, enabled: bool) -> None:
        if len(self.network.decoder.seg_layers) > 1:
            self.network.decoder.deep_supervision = enabled


class LandmarkWriter:
    """Write the landmarks an evaluator finds: one table, and per case a file of markups for 3D Slicer.

    Args:
        folder: gets ``landmarks.csv`` (`monai_mamba.evaluation.landmarks` reads it) and ``<case>.mrk.json``.
        names: of the landmarks in the order of the outputs.
        markups: write the files of markups too.
        table: name of the table.
    """

    def __init__(
        self, folder: os.PathLike[str] | str, names: Sequence[str], markups: bool = True, table: str = "landmarks.csv"
    ) -> None:
        self.folder = Path(folder)
        self.names = list(names)
        self.markups = markups
        self.table = table
        self._cases: list[FoundLandmarks] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda: self._cases.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Engine) -> None:
        batch: Any = engine.state.batch
        output: Any = engine.state.output
        for case, found in zip(batch, output, strict=True):
            if len(found["pred_mm"]) != len(self.names):
                raise RunError(
                    f"the network has {len(found['pred_mm'])} outputs, the data set {len(self.names)} landmarks"
                )
            reference = case.get("landmarks")
            self._cases.append(
                FoundLandmarks(
                    case=str(case["case"]),
                    patient=str(case["patient"]),
                    position_mm=found["pred_mm"].numpy(),
                    peak=found["peak"].numpy(),
                    reference_mm=None if reference is None else torch.as_tensor(reference).cpu().numpy(),
                )
            )

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_landmark_table(self.folder / self.table, self.names, self._cases)
        if self.markups:
            for found in self._cases:
                write_markups(case_file(self.folder, found.case, ".mrk.json"), self.names, found.position_mm)
        logger.info("wrote the landmarks of %d cases to %s", len(self._cases), self.folder / self.table)


class LabelMapWriter:
    """Write the label maps an evaluator finds as ``<case>.nii.gz``, on the grid of the image file.

    The header holds the grid and nothing else of the image's. The evaluator's postprocessing must have turned the
    logits into a label map ``(1, *spatial)`` on the grid of the file (MONAI's ``Invertd`` and ``AsDiscreted``).

    Args:
        folder: gets one file per case, whole or not at all.
    """

    def __init__(self, folder: os.PathLike[str] | str) -> None:
        self.folder = Path(folder)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        batch: Any = engine.state.batch
        output: Any = engine.state.output
        for case, found in zip(batch, output, strict=True):
            write_label_map(case_file(self.folder, str(case["case"]), ".nii.gz"), found["pred"])
