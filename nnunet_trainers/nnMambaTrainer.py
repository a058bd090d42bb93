"""``nnUNetv2_train DATASET 3d_fullres 0 -tr nnMambaTrainer`` and its variants."""

from __future__ import annotations

from monai_mamba.nnunet.trainer import MambaTrainer

#: Logits of either sign. After the published head, BatchNorm and ReLU, a class can stay at zero for a whole run:
#: docs/nnunet.md, "Why these defaults".
HEAD = {"head": "conv1x1"}


class nnMambaTrainer(MambaTrainer):
    """nnMamba with a 1x1 convolution as the last layer, and AdamW; what to use."""

    network_arguments = HEAD


class nnMambaTrainerNoSSM(nnMambaTrainer):
    """The same network without scans, to measure what they are worth."""

    network_arguments = HEAD | {"mixer": "none"}


class nnMambaTrainerPublishedHead(nnMambaTrainer):
    """The published last layers, two convolutions with BatchNorm and ReLU."""

    network_arguments = {"head": "double_conv"}  # noqa: RUF012


class nnMambaTrainerPublished(nnMambaTrainerPublishedHead):
    """The network as published and the optimiser of the authors too: Adam at 2e-4."""

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

    network_arguments = HEAD | {"init_filters": 16}
    epochs = 8
    iterations_per_epoch = 50
    val_iterations_per_epoch = 5
    max_batch_size = 2
    checkpoint_interval = 1


class nnMambaTrainerQuickNoSSM(nnMambaTrainerQuick):
    """The short run without scans."""

    network_arguments = HEAD | {"init_filters": 16, "mixer": "none"}
