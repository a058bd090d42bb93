"""``nnUNetv2_train DATASET 3d_fullres 0 -tr nnMambaTrainer`` and its variants."""

from __future__ import annotations

from monai_mamba.nnunet.planned_networks import NNMAMBA_ARGUMENTS
from monai_mamba.nnunet.trainer import MambaTrainer


class nnMambaTrainer(MambaTrainer):
    """nnMamba with instance normalisation, a 1x1 convolution as the last layer, and AdamW; what to use."""

    network_arguments = NNMAMBA_ARGUMENTS


class nnMambaTrainerNoSSM(nnMambaTrainer):
    """The same network without scans, to measure what they are worth."""

    network_arguments = NNMAMBA_ARGUMENTS | {"mixer": "none"}


class nnMambaTrainerBatchNorm(nnMambaTrainer):
    """The published normalisation over the batch."""

    network_arguments = NNMAMBA_ARGUMENTS | {"norm": "batch"}


class nnMambaTrainerPublishedNetwork(nnMambaTrainer):
    """The network as published: BatchNorm, also behind the last convolution, with ReLU."""

    network_arguments = {"head": "double_conv", "norm": "batch"}  # noqa: RUF012


class nnMambaTrainerPublished(nnMambaTrainerPublishedNetwork):
    """The optimiser of the authors too: Adam at 2e-4."""

    optimizer_name = "adam"
    learning_rate = 2e-4


class nnMambaTrainerNoAMP(nnMambaTrainer):
    """float32 throughout on CUDA."""

    with_autocast = False


class nnMambaTrainerNoDeepSupervision(nnMambaTrainer):
    """Loss at full resolution only."""

    with_deep_supervision = False


class nnMambaTrainerSGD(nnMambaTrainer):
    """nnU-Net's optimiser: SGD at 1e-2 with Nesterov momentum 0.99."""

    optimizer_name = "sgd"
    learning_rate = 1e-2


class nnMambaTrainer_2epochs(nnMambaTrainer):
    epochs = 2


class nnMambaTrainer_5epochs(nnMambaTrainer):
    epochs = 5


class nnMambaTrainer_50epochs(nnMambaTrainer):
    epochs = 50


class nnMambaTrainer_250epochs(nnMambaTrainer):
    epochs = 250


class nnMambaTrainerQuick(nnMambaTrainer):
    """A short run for a CPU: half the width, two images a batch, eight epochs of 50 iterations."""

    network_arguments = NNMAMBA_ARGUMENTS | {"init_filters": 16}
    epochs = 8
    iterations_per_epoch = 50
    val_iterations_per_epoch = 5
    max_batch_size = 2
    checkpoint_interval = 1


class nnMambaTrainerQuickNoSSM(nnMambaTrainerQuick):
    """The short run without scans."""

    network_arguments = NNMAMBA_ARGUMENTS | {"init_filters": 16, "mixer": "none"}
