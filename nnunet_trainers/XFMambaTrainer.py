"""``nnUNetv2_train DATASET 2d 0 -tr XFMambaTrainer``: slices with two groups of channels as two views."""

from __future__ import annotations

from monai_mamba.networks import XFMambaSeg
from monai_mamba.nnunet.trainer import MambaTrainer


class XFMambaTrainer(MambaTrainer):
    """XFMamba-T encoder on two aligned groups of channels (an even number of channels), U-shaped decoder, AdamW."""

    network_class = XFMambaSeg
    learning_rate = 5e-4


class XFMambaTrainerNoSSM(XFMambaTrainer):
    """The same network without scans, to measure what they are worth."""

    network_arguments = {"mixer": "none"}  # noqa: RUF012
