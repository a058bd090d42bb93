"""Patch and batch size for our networks' own memory, as a plans file for the unmodified nnU-Net.

nnU-Net's planner does the rest: target spacing, normalisation, resampling, the low resolution and the cascade.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from monai_mamba.errors import MonaiMambaError
from monai_mamba.networks import list_models, model_entry
from monai_mamba.nnunet import planned_networks
from monai_mamba.nnunet.memory import PRECISIONS, TrainingMemory, nnunet_loss, training_memory

GIB = 2**30
#: What CUDA, cuDNN's workspaces and a fragmented allocator may take besides tensors. An assumption, not a measurement.
RESERVE_BYTES = 1 * GIB
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
_MIN_BATCH_SIZE = 2


class PlanError(MonaiMambaError, ValueError):
    """No plan can be made; the text says why and what to do."""


@dataclass(frozen=True)
class PlannedNetwork:
    """A network the planner can plan for.

    Attributes:
        name: of the command, e.g. ``"nnmamba"``, ``"medmamba_t"``.
        multiple: the network pads every axis to a multiple of it.
        dims: dimensions of the images it takes.
    """

    name: str
    multiple: int
    dims: tuple[int, ...]

    def architecture(self, spatial_dims: int) -> dict[str, Any]:
        """The ``architecture`` of a configuration of the plans file."""
        if self.name == "nnmamba":
            class_name = "PlannedNNMambaSeg"
            arguments = {"spatial_dims": spatial_dims, **planned_networks.NNMAMBA_ARGUMENTS}
        else:
            entry = model_entry(f"{self.name}_seg")
            class_name, arguments = f"Planned{entry.constructor.__name__}", dict(entry.arguments)
        strides = planned_networks.planned_strides(spatial_dims)
        return {
            "network_class_name": f"{planned_networks.__name__}.{class_name}",
            "arch_kwargs": {"strides": strides, **arguments},
            "_kw_requires_import": [],
        }

    def build(self, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
        """Build the network as nnU-Net does from the plans."""
        architecture = self.architecture(spatial_dims)
        network_class = getattr(planned_networks, architecture["network_class_name"].rpartition(".")[2])
        network: nn.Module = network_class(in_channels, out_channels, True, **architecture["arch_kwargs"])
        return network

    def memory(
        self,
        patch_size: Sequence[int],
        batch_size: int,
        in_channels: int = 1,
        out_channels: int = 2,
        has_regions: bool = False,
        optimizer: str = "adamw",
        precision: str = "float32",
    ) -> TrainingMemory:
        """Predict the memory of a training step."""
        return training_memory(
            _built(self, len(patch_size), in_channels, out_channels),
            (batch_size, in_channels, *patch_size),
            nnunet_loss(has_regions, planned_networks.NUM_LEVELS),
            target_channels=out_channels if has_regions else 1,
            optimizer=optimizer,
            precision=precision,
        )


@functools.lru_cache(maxsize=2)
def _built(network: PlannedNetwork, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    return network.build(spatial_dims, in_channels, out_channels)


def planned_network(name: str) -> PlannedNetwork:
    """Return the network of that name.

    Raises:
        PlanError: if there is none.
    """
    known = planned_network_names()
    short = name.lower().replace("-", "_").removesuffix("_seg")
    if short not in known:
        raise PlanError(f"`--network` {name!r} is not known; choose one of {', '.join(known)}")
    return PlannedNetwork(short, 16, (2, 3)) if short == "nnmamba" else PlannedNetwork(short, 32, (2,))


def planned_network_names() -> list[str]:
    """Names that :func:`planned_network` takes."""
    others = (name.removesuffix("_seg") for name in list_models("*_seg") if not name.startswith("nnmamba"))
    return ["nnmamba", *others]


class MambaPlanner(ExperimentPlanner):
    """nnU-Net's planner, with patch and batch size for one of our networks.

    The patch starts, as nnU-Net's, as large as the median image; every axis is a multiple of what the network pads to.
    Until two of them fit into the memory, the axis that covers most of the median image is reduced. What is left
    becomes batch size, up to nnU-Net's limit of 5 % of the data set's voxels.

    Args:
        dataset_name_or_id: of nnU-Net.
        network: what to plan for.
        gpu_memory_gib: memory of the device; with ``"autocast"``, one GiB of it is left to CUDA.
        precision: ``"autocast"`` as nnU-Net trains on CUDA, ``"float32"`` for a CPU or NoAMP trainers.
        plans_name: name of the plans file.
        configurations: configurations to keep; None for all the data need and the network takes.
        report: called with lines to show.

    Raises:
        PlanError: if data set, configurations and memory do not allow a plan.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        network: PlannedNetwork,
        gpu_memory_gib: float = 8,
        precision: str = "autocast",
        plans_name: str = "nnMambaPlans",
        configurations: Sequence[str] | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(dataset_name_or_id, gpu_memory_target_in_gb=gpu_memory_gib, plans_name=plans_name)
        self.target = network
        self.precision = precision
        self.configurations = configurations
        self.report = report
        self.budget = gpu_memory_gib * GIB - (RESERVE_BYTES if precision == "autocast" else 0)
        channels = self.dataset_json.get("channel_names") or self.dataset_json["modality"]
        self.in_channels = len(channels)
        labels = LabelManager(self.dataset_json["labels"], self.dataset_json.get("regions_class_order"))
        self.out_channels = labels.num_segmentation_heads
        self.has_regions = labels.has_regions
        if network.name.startswith("xfmamba") and self.in_channels % 2:
            raise PlanError(
                f"`--network` {network.name} takes two groups of channels, {self.dataset_name} has {self.in_channels} "
                "channels; choose another network"
            )
        self._peaks: dict[tuple[tuple[int, ...], int], TrainingMemory] = {}

    @staticmethod
    def static_estimate_VRAM_usage(*arguments: Any) -> int:
        """Of nnU-Net's own network, which is not asked for here: small enough to leave the first patch as it is."""
        return 1

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Share the preprocessed images with nnU-Net's own plans where they are the same."""
        name = self.plans_identifier
        if configuration_name in ("2d", "3d_fullres"):
            name = "nnUNetPlans"
        return f"{name}_{configuration_name}"

    def get_plans_for_configuration(
        self, spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
    ) -> dict[str, Any]:
        """Plan one configuration."""
        dims = len(spacing)
        if not self._is_planned(dims):
            # save_plans leaves it out; nnU-Net must see no reason to look for a lower resolution.
            return {"patch_size": tuple(median_shape), "spacing": np.array(spacing)}
        with contextlib.redirect_stdout(io.StringIO()):
            plan: dict[str, Any] = super().get_plans_for_configuration(
                spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
            )
        patch_size = self._fit_patch(np.array(spacing), np.array(median_shape, dtype=float)[:dims])
        batch_size = self._fit_batch(patch_size, approximate_n_voxels_dataset)
        memory = self._memory(patch_size, batch_size)
        return {
            **plan,
            "patch_size": patch_size,
            "batch_size": batch_size,
            "architecture": self.target.architecture(dims),
            "planned_for": {
                "network": self.target.name,
                "precision": self.precision,
                "memory_gib": self.UNet_vram_target_GB,
                "predicted_peak_bytes": memory.peak,
            },
        }

    def _is_planned(self, dims: int) -> bool:
        wanted = self.configurations is None or any(name.startswith(str(dims)) for name in self.configurations)
        return wanted and dims in self.target.dims

    def _fit_patch(self, spacing: np.ndarray, median_shape: np.ndarray) -> tuple[int, ...]:
        multiple = self.target.multiple
        # The median image, but not more than a cube of 256 (a square of 2048) of the same shape in mm.
        edge = {2: 2048, 3: 256}[len(spacing)]
        cube = edge / spacing * np.prod(spacing) ** (1 / len(spacing))
        patch = [math.ceil(min(round(c), m) / multiple) * multiple for c, m in zip(cube, median_shape, strict=True)]
        # One voxel at the coarsest resolution would leave nothing to normalise over.
        smallest = 2 * multiple ** len(patch)
        if math.prod(patch) < smallest:
            patch[int(np.argmax(median_shape))] += multiple
        per_voxel = 0.0
        while True:
            voxels = math.prod(patch)
            if per_voxel * voxels < 1.1 * self.budget:  # beyond that the answer is known without asking
                memory = self._memory(tuple(patch), _MIN_BATCH_SIZE)
                if memory.peak <= self.budget:
                    return tuple(patch)
                per_voxel = memory.activations / voxels
            reducible = [axis for axis, size in enumerate(patch) if size > multiple]
            if voxels == smallest:
                needed = self._memory(tuple(patch), _MIN_BATCH_SIZE).peak + RESERVE_BYTES
                raise PlanError(
                    f"`--gpu-memory` {self.UNet_vram_target_GB:g}: a batch of two patches of "
                    f"{' x '.join(map(str, patch))} already needs {needed / GIB:.1f} GiB for {self.target.name}; give "
                    "more memory or choose a smaller network"
                )
            patch[max(reducible, key=lambda axis: patch[axis] / median_shape[axis])] -= multiple

    def _fit_batch(self, patch_size: tuple[int, ...], voxels_of_dataset: float) -> int:
        smallest = self._memory(patch_size, _MIN_BATCH_SIZE)
        fixed = smallest.parameters + smallest.optimizer
        affordable = int((self.budget - fixed) / (smallest.activations / _MIN_BATCH_SIZE))
        at_most = round(voxels_of_dataset * self.max_dataset_covered / math.prod(patch_size))
        batch_size = max(min(affordable, at_most), _MIN_BATCH_SIZE)
        while batch_size > _MIN_BATCH_SIZE and self._memory(patch_size, batch_size).peak > self.budget:
            batch_size -= 1
        return batch_size

    def _memory(self, patch_size: tuple[int, ...], batch_size: int) -> TrainingMemory:
        key = (patch_size, batch_size)
        if key not in self._peaks:
            self._peaks[key] = self.target.memory(
                patch_size,
                batch_size,
                self.in_channels,
                self.out_channels,
                self.has_regions,
                precision=self.precision,
            )
            self.report(
                f"{self.target.name}: {batch_size} patches of {' x '.join(map(str, patch_size))}: "
                f"{self._peaks[key].peak / GIB:.2f} GiB"
            )
        return self._peaks[key]

    def plan_experiment(self) -> dict[str, Any]:
        """Plan all configurations and write the plans file; return the plans."""
        with contextlib.redirect_stdout(io.StringIO()):
            plans: dict[str, Any] = super().plan_experiment()
        return plans

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Keep the configurations asked for and write the plans file."""
        planned = plans["configurations"]
        possible = [
            name
            for name in CONFIGURATIONS
            if name in planned and ("architecture" in planned[name] or name == "3d_cascade_fullres")
        ]
        if "3d_fullres" not in possible:
            possible = [name for name in possible if name == "2d"]
        wanted = list(self.configurations or possible)
        if missing := [name for name in wanted if name not in possible]:
            raise PlanError(
                f"`-c` {missing[0]}: {self._why_not(missing[0])}; possible here: {', '.join(possible) or 'none'}"
            )
        if "3d_cascade_fullres" in wanted:
            wanted += [name for name in ("3d_lowres", "3d_fullres") if name not in wanted]
        plans["configurations"] = {name: planned[name] for name in CONFIGURATIONS if name in wanted}
        if "3d_cascade_fullres" not in wanted and "3d_lowres" in wanted:
            plans["configurations"]["3d_lowres"].pop("next_stage", None)
        self._separate_other_data(plans)
        super().save_plans(plans)

    def _why_not(self, name: str) -> str:
        if name not in CONFIGURATIONS:
            return "there is no such configuration"
        if int(name[0]) not in self.target.dims:
            return f"{self.target.name} takes 2D images"
        if name in ("3d_lowres", "3d_cascade_fullres"):
            return "the patch covers enough of the images at full resolution, no lower one is needed"
        return "the images are 2D"

    def _separate_other_data(self, plans: dict[str, Any]) -> None:
        # Plans made by hand may have other images under nnU-Net's usual name.
        file = Path(str(nnUNet_preprocessed), self.dataset_name, "nnUNetPlans.json")
        if not file.is_file():
            return
        existing = json.loads(file.read_text())
        for name, configuration in plans["configurations"].items():
            other = existing["configurations"].get(name, {})
            if (
                "data_identifier" not in configuration
                or other.get("data_identifier") != configuration["data_identifier"]
            ):
                continue
            same = np.allclose(other["spacing"], configuration["spacing"]) and all(
                other[key] == configuration[key] for key in ("normalization_schemes", "use_mask_for_norm")
            )
            if not same or existing["transpose_forward"] != plans["transpose_forward"]:
                configuration["data_identifier"] = f"{self.plans_identifier}_{name}"


def plan_dataset(
    dataset: str,
    network: str = "nnmamba",
    gpu_memory_gib: float = 8,
    precision: str = "autocast",
    plans_name: str | None = None,
    configurations: Sequence[str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write a plans file for a data set of nnU-Net; return the plans.

    Args:
        dataset: number or name.
        network: a name of :func:`planned_network_names`.
        gpu_memory_gib, precision, configurations, report: of :class:`MambaPlanner`.
        plans_name: default ``nnMambaPlans``, ``medmamba_tPlans``, ...

    Raises:
        PlanError: if there is no such data set, or no plan can be made for it.
    """
    target = planned_network(network)
    if precision not in PRECISIONS:
        raise PlanError(f"`--precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        if not os.environ.get(variable):
            raise PlanError(f"the environment variable `{variable}` is not set; nnU-Net finds its folders by it")
    if plans_name is None:
        plans_name = "nnMambaPlans" if target.name == "nnmamba" else f"{target.name}Plans"
    if plans_name == "nnUNetPlans" or not plans_name.isidentifier():
        raise PlanError(
            f"`--plans-name` must be a name of letters and digits other than nnU-Net's own nnUNetPlans, got "
            f"{plans_name!r}"
        )
    try:
        name = maybe_convert_to_dataset_name(int(dataset) if dataset.isdecimal() else dataset)
    except (RuntimeError, ValueError) as error:
        raise PlanError(f"`-d` {dataset}: {' '.join(str(error).split())}") from error
    fingerprint = Path(str(nnUNet_preprocessed), name, "dataset_fingerprint.json")
    if not fingerprint.is_file():
        raise PlanError(f"{fingerprint} is missing; run first: nnUNetv2_extract_fingerprint -d {dataset}")
    if not Path(str(nnUNet_raw), name, "dataset.json").is_file():
        raise PlanError(f"{Path(str(nnUNet_raw), name)}/dataset.json is missing; the raw data set is needed to plan")
    planner = MambaPlanner(name, target, gpu_memory_gib, precision, plans_name, configurations, report)
    return planner.plan_experiment()
