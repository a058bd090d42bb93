"""A trained bundle, ready to be used: network, preprocessing and the meaning of the outputs, out of one folder.

Everything that works with a trained model (`monai-mamba predict`, `explain`, `robustness`) loads it here, from the
same ``configs/inference.json`` that ``python -m monai.bundle run`` takes.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.inferers import SimpleInferer
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    MapTransform,
    Orientationd,
    Spacingd,
)
from torch import nn

from monai_mamba.errors import CheckpointError, DatasetError
from monai_mamba.training.bundle import MODEL_CARD, local_device
from monai_mamba.training.datalist import MANIFEST, class_names, landmark_names, list_inputs
from monai_mamba.training.loading import read_failure
from monai_mamba.training.outputs import class_probabilities
from monai_mamba.training.transforms import ReadPictured
from monai_mamba.weights import read_state_dict

TASKS = ("classification", "two-view classification", "segmentation", "landmarks")
CONFIG = Path("configs") / "inference.json"
#: Transforms that only bring a file into memory, on a known grid; what follows them prepares it for the network.
_READING = (ReadPictured, LoadImaged, EnsureChannelFirstd, Orientationd, Spacingd)


@dataclass(frozen=True)
class Trained:
    """A trained network and how to use it.

    Attributes:
        network: in evaluation mode, on ``device``.
        task: one of ``TASKS``.
        image_keys: keys of a case that hold files: ``("image",)``, or ``("image1", "image2")`` for two views.
        reading: transform that reads the files of a case; images are as they were, on the grid of the network's input.
        preparing: transform from what was read to the network's input ``image`` ``(C, *spatial)``.
        classes: names of the classes in the order of the outputs; empty for landmarks.
        multi_label: several classes may be true at once.
        card: what the network was trained for (``model.json``), completed by the bundle's defaults.
        config: the bundle's inference configuration, for further entries such as ``inferer`` or ``landmarks``.
        device: where the network is.
        folder: the bundle.
        checkpoint: the file with the weights.
    """

    network: nn.Module
    task: str
    image_keys: tuple[str, ...]
    reading: Compose
    preparing: Compose
    classes: list[str]
    multi_label: bool
    card: dict[str, Any]
    config: ConfigParser = field(repr=False)
    device: torch.device
    folder: Path
    checkpoint: Path

    @property
    def preprocessing(self) -> Compose:
        """From a case with file names to the network's input."""
        return Compose([*self.reading.transforms, *self.preparing.transforms])

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry of the inference configuration, resolved; ``default`` if it has none."""
        return self.config.get_parsed_content(name) if name in self.config else default

    def require_task(self, *tasks: str) -> None:
        """Refuse a model of another task.

        Raises:
            CheckpointError: if the task is not one of ``tasks``.
        """
        if self.task not in tasks:
            raise CheckpointError(f"is a model for {self.task}; this needs one for {' or '.join(tasks)}", self.folder)

    def list_cases(
        self, dataset_dir: os.PathLike[str] | str, section: str = "test", limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Return the cases of a data set's section, or of a folder of files, that the model is for.

        Args:
            dataset_dir: folder with a ``datalist.json``, or with pictures or volumes.
            section: of the data set.
            limit: take only this many cases, evenly spaced.

        Raises:
            DatasetError: if there are none, the data set has other classes or landmarks than the model, or a case has
                not the files that the model needs.
        """
        cases = list_inputs(dataset_dir, section)
        if (Path(dataset_dir) / MANIFEST).is_file():
            is_landmarks = self.task == "landmarks"
            named = landmark_names(dataset_dir) if is_landmarks else class_names(dataset_dir)
            known = [str(name) for name in self.get("landmarks")] if is_landmarks else self.classes
            if named != known:
                raise DatasetError(
                    f"{Path(dataset_dir) / MANIFEST}: has the {'landmarks' if is_landmarks else 'classes'} "
                    f"{', '.join(named)}, the model in {self.folder} was trained for {', '.join(known)}"
                )
        for case in cases:
            self._check_keys(case)
        if limit is not None and limit < len(cases):
            cases = [cases[i * len(cases) // limit] for i in range(limit)]
        return cases

    def read(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """Return the case with its images read, ``(C, *spatial)`` each.

        Raises:
            DatasetError: if the case has not the files that the model needs, or one of them cannot be read.
        """
        self._check_keys(case)
        return self._apply(self.reading, case)

    def prepare(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """Return a case that was read with the network's input under ``image``."""
        return self._apply(self.preparing, case)

    @torch.no_grad()
    def logits(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the outputs for inputs ``(C, *spatial)`` as they come out of :meth:`prepare`."""
        return self.network(torch.stack(list(images)).to(self.device))

    @torch.no_grad()
    def infer(self, image: torch.Tensor) -> torch.Tensor:
        """Return the output ``(C, ...)`` for one input ``(C, *spatial)`` by the bundle's inferer, e.g. sliding window.

        Raises:
            ValueError: if the network cannot take an input of that size.
        """
        output: torch.Tensor = (self.get("inferer") or SimpleInferer())(image[None].to(self.device), self.network)
        return output[0]

    def probabilities(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return probabilities ``(cases, classes)`` for inputs ``(C, *spatial)``; classification only."""
        return class_probabilities(self.logits(images), len(self.classes), self.multi_label)

    def _check_keys(self, case: Mapping[str, Any]) -> None:
        missing = [key for key in self.image_keys if key not in case]
        if missing:
            raise DatasetError(
                f"case {case.get('case')}: has no {' nor '.join(f'`{key}`' for key in missing)}; the model in "
                f"{self.folder} is for {self.task} and needs {' and '.join(self.image_keys)}"
            )

    def _apply(self, transform: Compose, case: Mapping[str, Any]) -> dict[str, Any]:
        try:
            result: dict[str, Any] = transform(dict(case))
        except Exception as error:
            raise DatasetError(read_failure(case, error)) from error
        return result


def load_trained(
    folder: os.PathLike[str] | str,
    *,
    device: torch.device | str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Trained:
    """Load a trained bundle.

    The configuration is MONAI's and is resolved by MONAI, expressions included: load bundles that you trust, as with
    ``python -m monai.bundle run``. The weights are read as tensors only.

    Args:
        folder: the bundle (with ``configs/inference.json`` and ``models/model.pt``), or its folder ``models``.
        device: where to put the network; None takes the GPU if there is one.
        overrides: entries of the configuration by id, as on the command line of ``monai.bundle run``, e.g.
            ``{"network_def#dims": 48, "ckpt_dir": "runs/a"}``.

    Raises:
        CheckpointError: if the folder is no bundle, nothing was trained in it, or the weights do not fit.
    """
    folder = Path(folder)
    root = folder if (folder / CONFIG).is_file() or not (folder.parent / CONFIG).is_file() else folder.parent
    if not (root / CONFIG).is_file():
        raise CheckpointError(f"is no bundle: it has no {CONFIG}", folder)
    config = ConfigParser()
    try:
        config.read_config(str(root / CONFIG))
        config.update({"bundle_root": str(root), **(overrides or {})})
        if "ckpt_dir" not in (overrides or {}) and root != folder:
            config.update({"ckpt_dir": str(folder)})
        checkpoint = Path(config.get_parsed_content("checkpoint"))
        if not checkpoint.is_file():
            raise CheckpointError("does not exist; train the bundle first (docs/bundles.md)", checkpoint)
        task = config.get("task")
        network = config.get_parsed_content("network_def")
        transforms = list(config.get_parsed_content("preprocessing").transforms)
        card = dict(config.get_parsed_content("card"))
        classes = list(config.get_parsed_content("classes")) if "classes" in config else []
        multi_label = bool(config.get_parsed_content("multi_label")) if "multi_label" in config else False
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot be used: {_root_cause(error)}", root / CONFIG) from error
    if task not in TASKS:
        raise CheckpointError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}", root / CONFIG)
    try:
        if checkpoint.suffix == ".safetensors":
            weights = read_state_dict(checkpoint)
        else:
            weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"does not fit the network of {root / CONFIG}; if the training changed the network by an option, give it "
            f"again (--argument): {_first_reason(error)}",
            checkpoint,
        ) from error
    device = local_device() if device is None else torch.device(device)
    num_reading = next((i for i, t in enumerate(transforms) if not isinstance(t, _READING)), len(transforms))
    first = transforms[0] if transforms else None
    if num_reading == 0 or not isinstance(first, MapTransform):
        raise CheckpointError("`preprocessing` must start with a transform that reads the image", root / CONFIG)
    return Trained(
        network=network.to(device).eval(),
        task=task,
        image_keys=tuple(str(key) for key in first.keys),
        reading=Compose(transforms[:num_reading]),
        preparing=Compose(transforms[num_reading:]),
        classes=classes,
        multi_label=multi_label,
        card=card,
        config=config,
        device=device,
        folder=root,
        checkpoint=checkpoint,
    )


def fingerprints(trained: Trained) -> dict[str, str]:
    """Return the SHA-256 of the files that make up a trained model, by name."""
    files = [trained.checkpoint, trained.checkpoint.parent / MODEL_CARD, trained.folder / CONFIG]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def _first_reason(error: BaseException) -> str:
    """The first difference; torch puts a headline above the list."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return f"{lines[1] if len(lines) > 1 else lines[0]:.200}"


def data_source(dataset_dir: os.PathLike[str] | str) -> Path:
    """Return what stands for the data in the provenance: its data list, which names every file, or the folder."""
    manifest = Path(dataset_dir) / MANIFEST
    return manifest if manifest.is_file() else Path(dataset_dir)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}".splitlines()[0]
