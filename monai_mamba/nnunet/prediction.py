"""Predictions that nnU-Net's exporter cannot write: landmarks in mm and classes, with nnU-Net's own arguments."""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from monai_mamba.errors import CheckpointError, DatasetError
from monai_mamba.nnunet import landmarks
from monai_mamba.nnunet.checkpoint import load_or_previous
from monai_mamba.nnunet.classification import TABLE as CLASS_TABLE
from monai_mamba.nnunet.classification import CaseClassifier, ClassifierTrainer, ClassRow, write_probabilities
from monai_mamba.nnunet.landmarks import LandmarkFinder, LandmarkTrainer
from monai_mamba.nnunet.task_trainer import PLANS_KEY, TaskTrainer
from monai_mamba.training.landmark_files import FoundLandmarks, write_landmark_table, write_markups


@dataclass(frozen=True)
class TrainedModel:
    """A model folder of nnU-Net with the weights of some folds.

    Attributes:
        trainer: class that trained it.
        plans_manager, configuration_manager, dataset_json: of the training.
        weights: one state dict per fold, on the CPU.
    """

    trainer: type[TaskTrainer]
    plans_manager: Any
    configuration_manager: Any
    dataset_json: dict[str, Any]
    weights: list[dict[str, torch.Tensor]]

    @classmethod
    def load(cls, folder: Path, folds: Sequence[int | str], checkpoint: str, kind: type[TaskTrainer]) -> TrainedModel:
        """Read a model; no code that its files may carry is run.

        Args:
            folder: ``.../DATASET/TRAINER__PLANS__CONFIGURATION``.
            folds: numbers or ``"all"``.
            checkpoint: file name, ``checkpoint_final.pth``.
            kind: trainer class that the model must come from.

        Raises:
            CheckpointError: if a file is missing or damaged, or the model is of another kind.
        """
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

        plans, dataset_json = (_read(folder / name) for name in ("plans.json", "dataset.json"))
        checkpoints = [load_or_previous(folder / f"fold_{fold}" / checkpoint, torch.device("cpu")) for fold in folds]
        trainer = recursive_find_trainer_class_by_name(checkpoints[0]["trainer_name"])
        if not issubclass(trainer, kind) or PLANS_KEY not in plans:
            raise CheckpointError(
                f"it was trained by {trainer.__name__}, which is no {kind.__name__}; segmentations are predicted by "
                "nnUNetv2_predict, landmarks by predict-landmarks, classes by predict-classes",
                folder,
            )
        plans_manager = PlansManager(plans)
        return cls(
            trainer,
            plans_manager,
            plans_manager.get_configuration(checkpoints[0]["init_args"]["configuration"]),
            dataset_json,
            [one["network_weights"] for one in checkpoints],
        )

    def build_network(self) -> torch.nn.Module:
        """Return the network with the weights of the first fold."""
        channels = determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
        heads = self.plans_manager.get_label_manager(self.dataset_json).num_segmentation_heads
        network = self.trainer.build_network_architecture(
            self.plans_manager, self.configuration_manager, channels, heads, enable_deep_supervision=False
        )
        network.load_state_dict(self.weights[0])
        return network

    def preprocess(self, files: list[str]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return image ``(channels, *spatial)`` and properties of a case."""
        preprocessor = self.configuration_manager.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case(
            files, None, self.plans_manager, self.configuration_manager, self.dataset_json
        )
        return torch.from_numpy(data), properties


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"it cannot be read ({error}); check -d, -tr, -p and -c, and that the training is finished"
        raise CheckpointError(reason, path) from error
    return content


def list_cases(folder: str, file_ending: str) -> dict[str, list[str]]:
    """Return the images of every case in a folder, ``CASE_0000.ENDING`` and so on.

    Raises:
        DatasetError: if there is none.
    """
    lists = create_lists_from_splitted_dataset_folder(folder, file_ending, num_processes=1)
    cases = {Path(files[0]).name[: -len(file_ending) - 5]: files for files in lists if files}
    if not cases:
        raise DatasetError(f"{folder}: holds no images CASE_0000{file_ending}; nnU-Net numbers the channels so")
    return cases


def preprocessed_cases(
    model: TrainedModel, cases: dict[str, list[str]], num_threads: int
) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]] | tuple[str, Exception]]:
    """Preprocess cases ahead of the network, never more than ``num_threads`` of them; errors come in place of cases."""
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[tuple[str, Future]] = deque()
        names = iter(cases)
        while True:
            while len(waiting) < num_threads and (name := next(names, None)) is not None:
                waiting.append((name, pool.submit(model.preprocess, cases[name])))
            if not waiting:
                return
            name, future = waiting.popleft()
            try:
                yield name, *future.result()
            except Exception as error:  # whatever a reader raises for a damaged file
                yield name, error


def _for_each_case(
    model: TrainedModel, arguments: argparse.Namespace, predict: Callable[[str, torch.Tensor, dict[str, Any]], None]
) -> int:
    cases = list_cases(arguments.i, model.dataset_json["file_ending"])
    channels = len(model.dataset_json["channel_names"])
    failed = 0
    for name, *result in preprocessed_cases(model, cases, arguments.npp):
        try:
            if isinstance(result[0], Exception):
                raise result[0]
            if len(cases[name]) != channels:
                raise DatasetError(f"it has {len(cases[name])} images, the model takes {channels}")
            predict(name, *result)
            print(f"{name}: done", flush=True)
        except Exception as error:
            failed += 1
            print(f"{name}: failed: {type(error).__name__}: {error}", flush=True)
    print(f"{len(cases) - failed} of {len(cases)} cases predicted; results in {arguments.o}")
    return 1 if failed else 0


def predict_landmarks(argv: Sequence[str]) -> int:
    """Find the landmarks of the cases in a folder: ``landmarks.csv``, and ``CASE.mrk.json`` for 3D Slicer.

    Args:
        argv: of the command line.

    Returns:
        0, or 1 if a case could not be predicted.
    """
    arguments = _parse(argv, "predict-landmarks", predict_landmarks.__doc__)
    model = _load(arguments, LandmarkTrainer)
    names = model.plans_manager.plans[PLANS_KEY]["landmark_names"]
    finder = LandmarkFinder(
        model.build_network(),
        model.plans_manager,
        model.configuration_manager,
        model.dataset_json,
        arguments.device,
        model.weights,
        arguments.step_size,
    )
    found = []

    def predict(name: str, image: torch.Tensor, properties: dict[str, Any]) -> None:
        position_mm, peak = finder.find(image, properties)
        write_markups(arguments.o / f"{name}.mrk.json", names, position_mm)
        found.append(FoundLandmarks(name, name, position_mm, peak))

    code = _for_each_case(model, arguments, predict)
    write_landmark_table(arguments.o / landmarks.TABLE, names, found)
    return code


def predict_classes(argv: Sequence[str]) -> int:
    """Classify the cases in a folder: ``probabilities.csv`` and ``probabilities.json``.

    Args:
        argv: of the command line.

    Returns:
        0, or 1 if a case could not be predicted.
    """
    arguments = _parse(argv, "predict-classes", predict_classes.__doc__)
    model = _load(arguments, ClassifierTrainer)
    classifier = CaseClassifier(
        model.build_network(),
        model.configuration_manager.patch_size,
        arguments.device,
        model.weights,
        arguments.step_size,
    )
    rows = []

    def predict(name: str, image: torch.Tensor, _properties: dict[str, Any]) -> None:
        rows.append(ClassRow(name, classifier.classify(image)))

    code = _for_each_case(model, arguments, predict)
    write_probabilities(arguments.o / CLASS_TABLE, model.plans_manager.plans[PLANS_KEY]["classes"], rows)
    return code


def _load(arguments: argparse.Namespace, kind: type[TaskTrainer]) -> TrainedModel:
    folder = arguments.m or get_output_folder(arguments.d, arguments.tr, arguments.p, arguments.c)
    model = TrainedModel.load(Path(folder), arguments.f, arguments.chk, kind)
    arguments.o.mkdir(parents=True, exist_ok=True)
    return model


def _parse(argv: Sequence[str], command: str, description: str | None) -> argparse.Namespace:
    """Read nnU-Net's arguments of prediction, as far as they mean something here."""
    parser = argparse.ArgumentParser(
        prog=f"monai-mamba nnunet {command}", description=(description or "").partition("\n")[0]
    )
    parser.add_argument("-i", required=True, help="folder with images CASE_0000.ENDING")
    parser.add_argument("-o", required=True, type=Path, help="folder for the results")
    parser.add_argument("-m", type=Path, help="model folder, in place of -d, -tr, -p and -c")
    parser.add_argument("-d", help="data set, name or number")
    parser.add_argument("-tr", help="trainer")
    parser.add_argument("-p", default="nnUNetPlans", help="plans (default: nnUNetPlans)")
    parser.add_argument("-c", help="configuration, e.g. 3d_fullres")
    parser.add_argument("-f", nargs="+", default=["0", "1", "2", "3", "4"], help="folds, whose mean is taken")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="name of the checkpoint")
    parser.add_argument("-step_size", type=float, default=0.5, help="of the windows, as a share of their size")
    parser.add_argument("-npp", type=int, default=2, help="cases that are preprocessed ahead (default: 2)")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"))
    arguments = parser.parse_args(argv)
    if arguments.m is None and (missing := [name for name in ("d", "tr", "c") if getattr(arguments, name) is None]):
        parser.error(f"-{missing[0]} is missing; give -d, -tr and -c, or the model folder by -m")
    if not 0 < arguments.step_size <= 1:
        parser.error(f"-step_size must be above 0 and at most 1, got {arguments.step_size}")
    if arguments.npp < 1:
        parser.error(f"-npp must be at least 1, got {arguments.npp}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("-device cuda: there is no CUDA device; add -device cpu")
    arguments.device = torch.device(arguments.device)
    return arguments
