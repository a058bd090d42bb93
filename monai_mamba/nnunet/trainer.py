"""The trainer behind every trainer class of this package: nnU-Net's own, with our networks and safe checkpoints."""

from __future__ import annotations

import os
import pydoc
from functools import partial
from typing import Any

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from monai_mamba.errors import CheckpointError
from monai_mamba.networks import NNMambaSeg
from monai_mamba.nnunet.checkpoint import load_or_previous, previous_path, replace_atomically
from monai_mamba.nnunet.compilation import (
    MeasuredCompilation,
    compile_setting,
    measuring_conditions,
    refusal_to_measure,
)
from monai_mamba.nnunet.guard import GradientGuard
from monai_mamba.nnunet.randomness import capture_random_state, restore_random_state
from monai_mamba.nnunet.workers import explained_failures, export_failure, loading_failure, worker_processes

#: Length of a run, for callers that cannot edit a class: the commands of this package and tests.
EPOCHS_VARIABLE = "MONAI_MAMBA_EPOCHS"
ITERATIONS_VARIABLE = "MONAI_MAMBA_ITERATIONS"
#: A published weight file to start from, for trainers whose network or encoder has published weights.
WEIGHTS_VARIABLE = "MONAI_MAMBA_WEIGHTS"

_NUM_LEVELS = 4  # of deep supervision: full, 1/2, 1/4, 1/8
_DEEPEST_STRIDE = 2**_NUM_LEVELS


def _positive_from_environment(name: str) -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"`{name}` must be a positive whole number, got {text!r}; unset it or correct it")
    return int(text)


def _allowed_threads() -> int:
    """Number of threads this process may compute with: ``OMP_NUM_THREADS`` if set, but no more than its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # a list has one entry per level of nesting
    return min(int(asked), cores) if asked.isdecimal() and int(asked) else cores


class MambaTrainer(nnUNetTrainer):
    """Trains one of our segmentation networks by nnU-Net's recipe.

    Variants are class attributes. The constructor takes exactly nnU-Net's arguments, because nnU-Net stores them by
    name and passes no others.

    Attributes:
        network_class: a network with deep supervision at full, 1/2, 1/4 and 1/8 resolution.
        network_arguments: passed on to it.
        planned_network: the network that plans may be made for, if it is another one.
        optimizer_name: ``"adamw"``, ``"adam"`` or ``"sgd"`` (momentum 0.99, Nesterov), each with nnU-Net's polynomial
            decay of the learning rate.
        learning_rate, decay: learning rate at the first epoch, weight decay.
        with_deep_supervision: losses at 1/2, 1/4 and 1/8 resolution too.
        with_autocast: float16 autocast on CUDA, as nnU-Net does; the scan computes in float32 either way.
        pretrained_weights: a published weight file for the network or its encoder, see
            :func:`monai_mamba.weights.load_pretrained`; the variable ``MONAI_MAMBA_WEIGHTS`` goes before it.
        compile_backend: of torch.compile for `nnUNet_compile=measure`.
        epochs, iterations_per_epoch, val_iterations_per_epoch, max_batch_size: None for nnU-Net's own.
    """

    network_class: type[nn.Module] = NNMambaSeg
    network_arguments: dict[str, Any] = {}  # noqa: RUF012 - read only; subclasses replace it
    planned_network: type[nn.Module] | None = None
    optimizer_name = "adamw"
    learning_rate = 2e-3
    decay = 3e-5
    with_deep_supervision = True
    with_autocast = True
    pretrained_weights: str | None = None
    compile_backend: Any = "inductor"
    epochs: int | None = None
    iterations_per_epoch: int | None = None
    val_iterations_per_epoch: int | None = None
    max_batch_size: int | None = None
    checkpoint_interval: int | None = None

    # Set by nnU-Net's constructor, which is not annotated.
    network: Any
    num_epochs: int
    num_iterations_per_epoch: int
    num_val_iterations_per_epoch: int
    save_every: int
    batch_size: int
    inference_allowed_mirroring_axes: Any

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        compile_setting()  # a wrong value is refused before anything is written
        is_continued = plans.get("continue_training", False)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._check_plans()
        if self.device.type == "cpu":
            # nnU-Net takes every core of the computer, also those a scheduler or a container gave to others, and then
            # waits for threads that do not run.
            torch.set_num_threads(min(torch.get_num_threads(), _allowed_threads()))
        self.worker_processes: list[Any] = []
        self._random_state: dict[str, Any] | None = None
        self._weights = None if is_continued else os.environ.get(WEIGHTS_VARIABLE) or self.pretrained_weights
        self.initial_lr = self.learning_rate
        self.weight_decay = self.decay
        self.enable_deep_supervision = self.with_deep_supervision
        self.num_epochs = _positive_from_environment(EPOCHS_VARIABLE) or self.epochs or self.num_epochs
        asked = _positive_from_environment(ITERATIONS_VARIABLE)
        self.num_iterations_per_epoch = asked or self.iterations_per_epoch or self.num_iterations_per_epoch
        # A run shortened from outside keeps nnU-Net's ratio of training to validation.
        shortened = None if asked is None else min(self.num_val_iterations_per_epoch, max(1, round(asked / 5)))
        self.num_val_iterations_per_epoch = (
            self.val_iterations_per_epoch or shortened or self.num_val_iterations_per_epoch
        )
        self.save_every = self.checkpoint_interval or self.save_every

    @classmethod
    def build_network_architecture(
        cls, plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """Build the network for a plan; nnU-Net calls this to train and to predict."""
        # The heads depend on the trainer alone: nnU-Net builds the network without deep supervision to predict and then
        # loads the training's weights strictly.
        network: Any = cls._make_network(
            len(configuration_manager.patch_size),
            in_channels=num_input_channels,
            out_channels=num_output_channels,
            deep_supervision=cls.with_deep_supervision,
            **cls.network_arguments,
        )
        network.decoder.deep_supervision = enable_deep_supervision
        return network if cls.with_autocast else cls.without_autocast(network)

    @staticmethod
    def without_autocast(network: Any) -> nn.Module:
        """Return the network, computing in float32 whatever autocast it is called in."""
        network.forward = torch.autocast("cuda", enabled=False)(network.forward)
        return network

    @classmethod
    def _make_network(cls, spatial_dims: int, **arguments: Any) -> nn.Module:
        if issubclass(cls.network_class, NNMambaSeg):
            return cls.network_class(spatial_dims, **arguments)
        if spatial_dims != 2:
            raise ValueError(
                f"{cls.__name__} segments slices: use the configuration 2d, got one with a patch of {spatial_dims} axes"
            )
        return cls.network_class(**arguments)

    def _check_plans(self) -> None:
        name = self.configuration_manager.network_arch_class_name
        planned = pydoc.locate(name) if name.startswith("monai_mamba.") else None
        own = self.planned_network or self.network_class
        if isinstance(planned, type) and not (issubclass(own, planned) or issubclass(planned, own)):
            raise ValueError(
                f"the plans {self.plans_manager.plans_name!r} are made for {name}, {type(self).__name__} trains "
                f"{own.__name__}; choose the trainer of that network with -tr, or other plans with -p"
            )
        patch, batch = self.configuration_manager.patch_size, self.configuration_manager.batch_size
        if len(patch) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in (*patch, batch)):
            raise ValueError(
                f"`patch_size` of the plans {self.plans_manager.plans_name!r} must be two or three positive whole "
                f"numbers and `batch_size` one, got {patch} and {batch}; plan again, or correct "
                f"{self.configuration_name} in the plans file"
            )
        if self.network_arguments.get("norm") == "instance" and max(patch) <= _DEEPEST_STRIDE:
            raise ValueError(
                f"`patch_size` {patch} of the plans {self.plans_manager.plans_name!r} leaves {type(self).__name__} one "
                f"voxel at 1/{_DEEPEST_STRIDE} resolution, which instance norm cannot normalise; more than "
                f"{_DEEPEST_STRIDE} along one axis are needed: plan with monai-mamba nnunet plan, or choose a trainer "
                "with batch norm"
            )

    def initialize(self) -> None:
        super().initialize()
        if self._weights:
            self._load_published(self._weights)
        self._guard = GradientGuard()
        self._guard.watch(self.optimizer)
        if not self.with_autocast:
            self.grad_scaler = None  # gradients of float32 need no scaling
        self._compilation = self._make_compilation() if compile_setting() == "measure" else None

    def _do_i_compile(self) -> bool:
        # nnU-Net compiles by default on CUDA. Here that is the user's word: on a CPU it gains a few percent at most for
        # minutes of waiting (benchmarks/compile.py), and nobody has measured it on CUDA.
        return compile_setting() == "on" and super()._do_i_compile()

    def _make_compilation(self) -> MeasuredCompilation | None:
        if reason := refusal_to_measure(self.device, self.is_ddp):
            self.print_to_log_file(f"nnUNet_compile=measure: {reason}; training stays plain")
            return None
        return MeasuredCompilation(
            self.network,
            self.optimizer,
            self.grad_scaler,
            self._guard,
            self.device,
            compile=partial(torch.compile, backend=self.compile_backend),
            conditions=measuring_conditions(self.device, self.configuration_manager.patch_size, self.batch_size),
            log=self.print_to_log_file,
        )

    def _set_batch_size_and_oversample(self) -> None:
        super()._set_batch_size_and_oversample()
        if self.max_batch_size is not None:
            self.batch_size = min(self.batch_size, self.max_batch_size)

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        # The network halves every axis, whatever the plan's U-Net would do.
        if not self.enable_deep_supervision:
            return None
        dims = len(self.configuration_manager.patch_size)
        return [[0.5**level] * dims for level in range(_NUM_LEVELS)]

    def _build_loss(self):
        loss = super()._build_loss()
        if self.enable_deep_supervision:
            # nnU-Net switches its lowest resolution off; here all four take part, as in the published training.
            weights = [0.5**level for level in range(_NUM_LEVELS)]
            loss.weight_factors = tuple(weight / sum(weights) for weight in weights)
        return loss

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        # nnU-Net switches it on after every validation, wanted or not.
        super().set_deep_supervision_enabled(enabled and self.enable_deep_supervision)

    def configure_optimizers(self):
        parameters = self._parameter_groups()
        optimizer: torch.optim.Optimizer
        if self.optimizer_name == "sgd":
            optimizer = torch.optim.SGD(parameters, self.initial_lr, momentum=0.99, nesterov=True)
        elif self.optimizer_name == "adam":
            optimizer = torch.optim.Adam(parameters, self.initial_lr)
        elif self.optimizer_name == "adamw":
            optimizer = torch.optim.AdamW(parameters, self.initial_lr)
        else:
            raise ValueError(f"`optimizer_name` must be 'adamw', 'adam' or 'sgd', got {self.optimizer_name!r}")
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        # Called by initialize() before the DDP wrapper is put on.
        network = getattr(self.network, "_orig_mod", self.network)
        exempt = network.no_weight_decay()
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in network.named_parameters():
            groups[name in exempt].append(parameter)
        return [
            {"params": groups[False], "weight_decay": self.weight_decay},
            {"params": groups[True], "weight_decay": 0.0},
        ]

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        finite = [output["loss"] for output in train_outputs if np.isfinite(output["loss"])]
        if len(finite) < len(train_outputs):
            self.print_to_log_file(
                f"{len(train_outputs) - len(finite)} of {len(train_outputs)} losses of this epoch were not finite; "
                f"{self._guard.num_skipped} steps were skipped since the training was started"
            )
            # As many as before: nnU-Net stacks the losses of all processes.
            mean = np.asarray(np.mean(finite) if finite else np.nan)
            train_outputs = [o if np.isfinite(o["loss"]) else {**o, "loss": mean} for o in train_outputs]
        super().on_train_epoch_end(train_outputs)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self._compilation is not None:
            self._compilation.steps_left = (self.num_epochs - self.current_epoch) * self.num_iterations_per_epoch

    def train_step(self, batch: dict) -> dict:
        with self._guard.count():
            if self._compilation is None:
                return super().train_step(batch)
            return self._compilation.step(partial(self._train_step_with, batch))

    def _train_step_with(self, batch: dict, network: nn.Module) -> dict:
        # The compiled network is there for the training step alone: all else, validation and checkpoints too, sees the
        # plain one on the same parameters.
        plain, self.network = self.network, network
        try:
            return super().train_step(batch)
        finally:
            self.network = plain

    def run_training(self) -> None:
        with explained_failures(self, loading_failure):
            super().run_training()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with explained_failures(self, export_failure):
            super().perform_actual_validation(save_probabilities)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.worker_processes = worker_processes(self.dataloader_train, self.dataloader_val)
        # Only now: starting draws a first batch of each kind. The processes of DDP must differ, and one state is kept.
        if self._random_state is not None and self.local_rank == 0:
            restore_random_state(self._random_state)
        self._random_state = None

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        # What nnU-Net's own method writes, and the state of the random generators.
        checkpoint = {
            "network_weights": self._plain_network().state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "random_state": capture_random_state(),
            "compilation": None if self._compilation is None else self._compilation.state(),
        }
        replace_atomically(filename, lambda name: torch.save(checkpoint, name))

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continue from a checkpoint; a damaged file is replaced by the one before it, with a line in the log.

        Unlike nnU-Net's, this runs no code that a file may carry, and takes a checkpoint of another device.

        Raises:
            CheckpointError: if no file can be read, or it is of another trainer or configuration; nothing has changed
                then.
        """
        if not self.was_initialized:
            self.initialize()
        checkpoint = (
            filename_or_checkpoint
            if isinstance(filename_or_checkpoint, dict)
            else load_or_previous(filename_or_checkpoint, self.device)
        )
        weights = {key.removeprefix("module."): value for key, value in checkpoint["network_weights"].items()}
        self._check_checkpoint(
            checkpoint, weights, None if isinstance(filename_or_checkpoint, dict) else filename_or_checkpoint
        )
        self._plain_network().load_state_dict(weights)
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.my_init_kwargs = checkpoint["init_args"]
        self.current_epoch = checkpoint["current_epoch"]
        self.logger.load_checkpoint(checkpoint["logging"])
        self._best_ema = checkpoint["_best_ema"]
        self.inference_allowed_mirroring_axes = checkpoint.get(
            "inference_allowed_mirroring_axes", self.inference_allowed_mirroring_axes
        )
        self._random_state = checkpoint.get("random_state")
        if self._compilation is not None:
            self._compilation.resume(checkpoint.get("compilation"))

    def _check_checkpoint(self, checkpoint: dict, weights: dict[str, torch.Tensor], path: str | None) -> None:
        if missing := [
            key for key in ("optimizer_state", "init_args", "logging", "current_epoch") if key not in checkpoint
        ]:
            raise CheckpointError(
                f"it is no checkpoint of a training, `{missing[0]}` is missing; to start from weights alone use "
                f"-pretrained_weights or {WEIGHTS_VARIABLE}",
                path,
            )
        other = checkpoint.get("trainer_name", "an unknown trainer")
        configuration = checkpoint["init_args"].get("configuration")
        if configuration != self.configuration_name:
            raise CheckpointError(
                f"it is of the configuration {configuration}, this is {self.configuration_name}; each has its folder",
                path,
            )
        own = self._plain_network().state_dict()
        unlike = sorted(own.keys() ^ weights.keys()) or [k for k in own if own[k].shape != weights[k].shape]
        if unlike:
            raise CheckpointError(
                f"it was written by {other}, and {len(unlike)} of its tensors do not fit {type(self).__name__} (the "
                f"first: `{unlike[0]}`); continue with -tr {other}, or start anew without --c",
                path,
            )

    def _load_published(self, path: str) -> None:
        from monai_mamba.weights import load_pretrained

        report = load_pretrained(self._plain_network(), path, adapt_in_channels=True, reset_head=True)
        self.print_to_log_file(f"Published weights: {report.summary()}")
        for record in report.select("adapted"):
            self.print_to_log_file(f"  {record.target}: {record.reason}")

    def _plain_network(self) -> nn.Module:
        network = self.network.module if self.is_ddp else self.network
        return getattr(network, "_orig_mod", network)

    def on_train_end(self) -> None:
        super().on_train_end()
        if self.local_rank == 0:
            # nnU-Net removes the latest checkpoint once the final one is written; so goes its predecessor.
            previous_path(os.path.join(self.output_folder, "checkpoint_latest.pth")).unlink(missing_ok=True)
