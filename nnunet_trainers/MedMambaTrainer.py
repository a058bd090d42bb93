"""``nnUNetv2_train DATASET 2d 0 -tr MedMambaTrainer``: segmentation of slices with the MedMamba encoder."""

from __future__ import annotations

from monai_mamba.networks import MedMambaSeg
from monai_mamba.nnunet.trainer import MambaTrainer


class MedMambaTrainer(MambaTrainer):
    """MedMamba-T encoder, U-shaped decoder, AdamW."""

    network_class = MedMambaSeg
    learning_rate = 5e-4


class MedMambaTrainerNoSSM(MedMambaTrainer):
    """The same network without scans, to measure what they are worth."""

    network_arguments = {"mixer": "none"}  # noqa: RUF012
