"""Landmark detection inside nnU-Net: heat maps as targets, positions in mm as results."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor, nn

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.landmarks import evaluate_files
from monai_mamba.heat_maps import AMPLITUDE, SIGMA_VOX, decode_heat_maps, gaussian_heat_maps, voxel_to_world
from monai_mamba.networks import NNMambaLandmark, NNMambaSeg
from monai_mamba.nnunet.annotations import landmark_names, landmarks_in_array, raise_problems, read_landmarks
from monai_mamba.nnunet.geometry import preprocessed_affine
from monai_mamba.nnunet.task_data import LandmarkLoader
from monai_mamba.nnunet.task_trainer import PLANS_KEY, TaskTrainer
from monai_mamba.training import losses
from monai_mamba.training.landmark_files import FoundLandmarks, write_landmark_table, write_markups

#: Standard deviation of the heat maps in voxels, for callers that cannot edit a class.
SIGMA_VARIABLE = "MONAI_MAMBA_SIGMA"
TABLE = "landmarks.csv"


class HeatMapNetwork(NNMambaLandmark):
    """nnMamba for landmarks with a constant background channel of half the heat maps' height before the others.

    So the largest channel is the background where no heat map reaches half its height: nnU-Net's own exporter then
    writes a label map with a blob for every landmark.

    Args:
        amplitude: height of the heat maps that it is trained with.
        output_scale: factor on the outputs of the last layer, which begin with a spread of about one: Adam moves a
            weight by no more than the learning rate in a step, and from one to 255 that is a way of 1e5 steps.

    Shape:
        ``(B, in_channels, *spatial)`` to ``(B, 1 + num_landmarks, *spatial)``, float32.
    """

    def __init__(
        self, *arguments: Any, amplitude: float = AMPLITUDE, output_scale: float = 1.0, **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.amplitude = amplitude
        self.output_scale = output_scale

    def forward(self, x: Tensor) -> Tensor:
        heat_maps = super().forward(x)
        assert isinstance(heat_maps, Tensor)
        heat_maps = heat_maps.float() * self.output_scale
        return torch.cat([torch.full_like(heat_maps[:, :1], self.amplitude / 2), heat_maps], dim=1)


class HeatMapLoss(losses.HeatMapLoss):
    """Mean squared error between heat maps and Gaussians at the landmarks, in float32.

    Shape:
        output ``(B, 1 + landmarks, *spatial)``, of which the background is ignored; voxels ``(B, landmarks, dims)``,
        infinite for a landmark that is not in the patch (its heat map shall be empty), NaN for one that is not
        annotated (it asks for nothing).
    """

    def __init__(self, sigma_vox: float, amplitude: float) -> None:
        super().__init__()
        self.sigma_vox = sigma_vox
        self.amplitude = amplitude

    def forward(self, output: Tensor, voxels: Tensor) -> Tensor:
        heat_maps = output[:, 1:].float()
        target = gaussian_heat_maps(voxels, heat_maps.shape[2:], self.sigma_vox, self.amplitude)
        return super().forward(heat_maps, target)


class LandmarkTrainer(TaskTrainer):
    """Trains nnMamba to find landmarks; label k of the data set is landmark k.

    Attributes:
        sigma_vox: standard deviation of the Gaussians in voxels of the preprocessed image.
        amplitude: their height.
        head: last layer of the network. The published one, BatchNorm and ReLU, learns the places too, but at this
            learning rate its maps stay flat, so that no label map could be written from them.
        output_scale: of :class:`HeatMapNetwork`; 51 makes the Gaussians 5 high for the last layer.
    """

    network_class = HeatMapNetwork
    planned_network = NNMambaSeg
    metric = "MRE in mm"
    is_better_when_lower = True
    learning_rate = 1e-3
    sigma_vox = SIGMA_VOX
    amplitude = AMPLITUDE
    head = "conv1x1"
    output_scale = AMPLITUDE / 5
    epochs = 250

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        self.names = landmark_names(dataset_json)
        plans = deepcopy(plans)
        plans[PLANS_KEY] = {"landmark_names": self.names, "sigma_vox": self._sigma(), "amplitude": self.amplitude}
        super().__init__(plans, configuration, fold, dataset_json, device)
        if len(self.configuration_manager.patch_size) != 3 or self.is_cascaded:
            raise ValueError(
                f"{type(self).__name__} finds landmarks in volumes: use 3d_fullres or 3d_lowres, got {configuration}"
            )
        self.oversample_foreground_percent = 0.67
        self._landmarks_mm: dict[str, np.ndarray] = {}

    def _sigma(self) -> float:
        text = os.environ.get(SIGMA_VARIABLE, "")
        try:
            sigma = float(text) if text else self.sigma_vox
        except ValueError:
            sigma = -1.0
        if not 0 < sigma < np.inf:
            raise ValueError(f"`{SIGMA_VARIABLE}` must be a positive number of voxels, got {text!r}")
        return sigma

    @classmethod
    def build_network_architecture(
        cls, plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """Build the network for a plan; nnU-Net calls this to train and to predict."""
        network = HeatMapNetwork(
            len(configuration_manager.patch_size),
            num_input_channels,
            num_output_channels - 1,
            head=cls.head,
            amplitude=plans_manager.plans[PLANS_KEY]["amplitude"],
            output_scale=cls.output_scale,
            **cls.network_arguments,
        )
        return network if cls.with_autocast else cls.without_autocast(network)

    def _build_loss(self) -> nn.Module:
        return HeatMapLoss(self.plans_manager.plans[PLANS_KEY]["sigma_vox"], self.amplitude)

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        self._read_landmarks([name for part in self.get_tr_and_val_datasets() for name in part.identifiers])
        super().on_train_start()

    def _read_landmarks(self, cases: list[str]) -> None:
        reader = self.plans_manager.image_reader_writer_class()
        folder, ending = (
            join(self.preprocessed_dataset_folder_base, "gt_segmentations"),
            self.dataset_json["file_ending"],
        )
        self._landmarks_mm = read_landmarks(
            self.annotation_folders(),
            self.names,
            sorted(set(cases)),
            lambda c: reader.read_seg(join(folder, c + ending)),
        )

    def _affine_and_shape(self, dataset: Any, name: str) -> tuple[np.ndarray, tuple[int, ...]]:
        data, _, _, properties = dataset.load_case(name)
        shape = data.shape[1:]
        return preprocessed_affine(properties, shape, self.plans_manager.transpose_forward), shape

    def make_loader(self, dataset: Any, initial_patch_size: Any, transforms: Any, is_training: bool) -> LandmarkLoader:
        voxels, problems = {}, []
        for name in dataset.identifiers:
            try:
                voxels[name] = landmarks_in_array(self._landmarks_mm[name], *self._affine_and_shape(dataset, name))
            except DatasetError as error:
                problems.append(f"case {name}: {error}")
        raise_problems(problems, len(dataset.identifiers))
        return LandmarkLoader(
            *self.loader_arguments(dataset, initial_patch_size),
            landmarks=voxels,
            transforms=transforms,
            # An error can only be measured where there is a landmark.
            oversample_foreground_percent=self.oversample_foreground_percent if is_training else 1.0,
        )

    def validation_step(self, batch: dict) -> dict:
        images, voxels = self._images_and_targets(batch)
        output = self._forward(images)
        loss = self.loss(output, voxels)
        expected = voxels.cpu().numpy()
        expected[np.isinf(expected).any(-1)] = np.nan
        window = decoding_window(self.plans_manager.plans)
        found = np.stack([decode_heat_maps(maps, window) for maps in output[:, 1:]])
        errors = np.linalg.norm((found - expected) * np.asarray(self.configuration_manager.spacing), axis=-1)
        return {"loss": loss.cpu().numpy(), "errors": errors}

    def summarize(self, outputs: list[dict[str, Any]]) -> tuple[float, list[float]]:
        errors = np.concatenate([output["errors"] for output in outputs])
        count = (~np.isnan(errors)).sum(0)
        means = np.where(count > 0, np.nansum(errors, 0) / np.maximum(count, 1), np.nan)
        return (float(np.nanmean(means)) if count.any() else float("nan")), means.tolist()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Find the landmarks of the validation cases; write a table, markups and ``metrics.json``."""
        if self.local_rank != 0:
            return
        _, dataset = self.get_tr_and_val_datasets()
        self._read_landmarks(list(dataset.identifiers))
        folder = Path(self.output_folder) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        finder = LandmarkFinder(
            self._plain_network(), self.plans_manager, self.configuration_manager, self.dataset_json, self.device
        )
        found = []
        for name in dataset.identifiers:
            self.print_to_log_file(f"predicting {name}")
            data, _, _, properties = dataset.load_case(name)
            position_mm, peak = finder.find(torch.from_numpy(np.array(data[:])), properties)
            found.append(FoundLandmarks(name, name, position_mm, peak, self._landmarks_mm[name]))
            write_markups(folder / f"{name}.mrk.json", self.names, position_mm)
        write_landmark_table(folder / TABLE, self.names, found)
        report = evaluate_files(folder / TABLE, folder, report=False)
        mre = report["metrics"]["mre_mm"]["value"]
        self.logger.log_summary("final_val/mre_mm", mre)
        self.print_to_log_file(f"Validation complete\n{self.metric}: {mre}")


class LandmarkFinder:
    """Finds landmarks in preprocessed images by nnU-Net's sliding window, with the mean heat maps of several networks.

    The maximum is looked for on the preprocessed grid and taken to the world from there; nothing is resampled.

    Args:
        network: a :class:`HeatMapNetwork`.
        plans_manager, configuration_manager, dataset_json, device: of the model.
        weights: of the folds; None for those in the network.
        tile_step_size: of the sliding window, as a share of the patch.
    """

    def __init__(
        self,
        network: nn.Module,
        plans_manager: Any,
        configuration_manager: Any,
        dataset_json: dict,
        device: torch.device,
        weights: list[dict[str, Tensor]] | None = None,
        tile_step_size: float = 0.5,
    ) -> None:
        self._plans_manager = plans_manager
        self._predictor = nnUNetPredictor(tile_step_size, use_mirroring=False, device=device, allow_tqdm=False)
        self._predictor.manual_initialization(
            network,
            plans_manager,
            configuration_manager,
            weights or [network.state_dict()],
            dataset_json,
            "",
            None,
        )

    def find(self, image: Tensor, properties: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return positions ``(landmarks, 3)`` in mm, RAS+, and the heights of the heat maps' maxima ``(landmarks,)``.

        Args:
            image: preprocessed, ``(channels, *spatial)``.
            properties: of the preprocessed case.
        """
        heat_maps = self._predictor.predict_logits_from_preprocessed_data(image)[1:].float()
        affine = preprocessed_affine(properties, image.shape[1:], self._plans_manager.transpose_forward)
        voxels = decode_heat_maps(heat_maps, decoding_window(self._plans_manager.plans))
        return voxel_to_world(voxels, affine), heat_maps.flatten(1).amax(1).numpy()


def decoding_window(plans: dict[str, Any]) -> int:
    """Return how far around a maximum the center of mass is taken: two standard deviations of the heat maps."""
    return max(1, round(2 * plans[PLANS_KEY]["sigma_vox"]))
