"""Small modules the networks are made of."""

from __future__ import annotations

from monai_mamba.layers.convolution import ChannelGate, DoubleConv
from monai_mamba.layers.mamba import MambaMixer
from monai_mamba.layers.siamese import MambaLayer

__all__ = ["ChannelGate", "DoubleConv", "MambaLayer", "MambaMixer"]
