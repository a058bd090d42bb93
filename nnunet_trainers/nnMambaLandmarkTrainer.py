"""``nnUNetv2_train DATASET 3d_fullres 0 -tr nnMambaLandmarkTrainer``: positions of landmarks."""

from __future__ import annotations

from monai_mamba.nnunet.landmarks import LandmarkTrainer


class nnMambaLandmarkTrainer(LandmarkTrainer):
    """nnMamba with heat maps of 5 voxels standard deviation; label k is landmark k."""


class nnMambaLandmarkTrainerNoSSM(nnMambaLandmarkTrainer):
    """The same network without scans, to measure what they are worth."""

    network_arguments = {"mixer": "none"}  # noqa: RUF012


class nnMambaLandmarkTrainerPublished(nnMambaLandmarkTrainer):
    """The last layer and the optimiser of the authors: BatchNorm and ReLU without a factor, Adam at 1e-3."""

    head = "double_conv"
    output_scale = 1.0
    optimizer_name = "adam"
    decay = 0.0


class nnMambaLandmarkTrainerQuick(nnMambaLandmarkTrainer):
    """A short run for a CPU: half the width, two images a batch, eight epochs of 50 iterations."""

    network_arguments = {"init_filters": 16}  # noqa: RUF012
    epochs = 8
    iterations_per_epoch = 50
    val_iterations_per_epoch = 5
    max_batch_size = 2
    checkpoint_interval = 1


class nnMambaLandmarkTrainerQuickNoSSM(nnMambaLandmarkTrainerQuick):
    """The short run without scans."""

    network_arguments = {"init_filters": 16, "mixer": "none"}  # noqa: RUF012
