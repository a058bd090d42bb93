"""Our networks as nnU-Net's own trainer builds them: from a plans file.

A configuration of a plans file names one of these classes as ``network_class_name``; nnU-Net calls it with its own
argument names and everything under ``arch_kwargs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai_mamba.networks import MedMambaSeg, NNMambaSeg, VMambaSeg, XFMambaSeg

#: Resolutions of the segmentation heads: full, 1/2, 1/4, 1/8.
NUM_LEVELS = 4
#: nnMamba as nnMambaTrainer trains it. Measured better than the published network for nnU-Net's batches of two images:
#: docs/nnunet.md, "Why these defaults".
NNMAMBA_ARGUMENTS: dict[str, Any] = {"head": "conv1x1", "norm": "instance"}


def planned_strides(spatial_dims: int) -> list[list[int]]:
    """Strides for the plans file: nnU-Net sizes the targets of deep supervision by all but the last of them."""
    return [[1] * spatial_dims] + [[2] * spatial_dims] * NUM_LEVELS


class _Planned:
    """Takes nnU-Net's arguments; before an arbitrary segmentation network in the order of bases.

    Args:
        input_channels: channels of the image.
        num_classes: output channels.
        deep_supervision: return the logits of all resolutions. The heads exist either way, so that weights of a
            training load into the network that predicts.
        strides: must be :func:`planned_strides`; our networks halve every axis.
        arguments: of the network.

    Raises:
        ValueError: if ``strides`` are others.
    """

    spatial_dims = 2

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = True,
        *,
        strides: Sequence[Sequence[int]],
        **arguments: Any,
    ) -> None:
        spatial_dims = int(arguments.get("spatial_dims", self.spatial_dims))
        expected = planned_strides(spatial_dims)
        if [list(stride) for stride in strides] != expected:
            raise ValueError(
                f"`strides` of the plans must be {expected} for {type(self).__name__}, which halves every axis of "
                f"{spatial_dims}, got {[list(stride) for stride in strides]}; write the plans with monai-mamba nnunet "
                "plan"
            )
        super().__init__(  # type: ignore[call-arg]
            in_channels=input_channels, out_channels=num_classes, deep_supervision=True, **arguments
        )
        self.decoder.deep_supervision = deep_supervision  # type: ignore[attr-defined]


class PlannedNNMambaSeg(_Planned, NNMambaSeg):
    """nnMamba by plans; ``arch_kwargs`` holds ``spatial_dims`` and any other argument of the network."""

    spatial_dims = 3


class PlannedMedMambaSeg(_Planned, MedMambaSeg):
    """MedMamba with a decoder by plans."""


class PlannedVMambaSeg(_Planned, VMambaSeg):
    """VMamba with a decoder by plans."""


class PlannedXFMambaSeg(_Planned, XFMambaSeg):
    """XFMamba with a decoder by plans; the channels are two groups."""
