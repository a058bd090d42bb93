"""The Mamba layer of nnMamba: pointwise convolutions around one or four ("siamese") scans."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_mamba.layers.convolution import convolution, normalization
from monai_mamba.layers.mamba import MambaMixer

MIXERS = ("mamba", "single", "none")


def siamese_scan(mixer: MambaMixer, tokens: Tensor) -> Tensor:
    """Average one mixer over the sequence as it is, reversed in channels, in tokens, and in both.

    Each result is turned back before the average. The four passes go through the mixer as one batch of ``4 B``.

    Shape:
        ``(B, L, C)``. Returns the same shape.
    """
    flips: tuple[tuple[int, ...], ...] = ((), (2,), (1,), (1, 2))
    batch = torch.cat([tokens.flip(dims) if dims else tokens for dims in flips])  # (4B, L, C)
    parts = mixer(batch).unflatten(0, (4, -1)).unbind()  # not chunk: its number of parts depends on the batch
    total = parts[0]
    for dims, part in zip(flips[1:], parts[1:], strict=True):
        total = total + part.flip(dims)
    return total / 4


class MambaLayer(nn.Module):
    """Mamba in convolution with channel and spatial siamese learning (MICCSS), the token mixer of nnMamba.

    A pointwise convolution with normalisation and ReLU gives ``a``; its voxels, in array order, are the tokens; the
    scan's result is added to ``a``; a second pointwise convolution with normalisation and ReLU follows.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of the map.
        d_state, d_conv, expand: of the :class:`MambaMixer`.
        siamese: four scans (segmentation, landmarks) or one (classification).
        mixer: ``"mamba"``; ``"single"``, the layer of the authors' nnU-Net v1 fork, which ends after a single scan,
            without addition and second convolution; or ``"none"``, which leaves the scan out and keeps the
            convolutions, to measure what the scan is worth.
        norm: ``"batch"`` (published) or ``"instance"``.

    Shape:
        ``(B, channels, *spatial)``. Returns the same shape.

    References:
        Gong et al., nnMamba: 3D Biomedical Image Segmentation, Classification and Landmark Detection with State Space
        Model, 2024, arXiv:2402.03526, section 2.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        siamese: bool = True,
        mixer: str = "mamba",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"`mixer` must be one of {', '.join(map(repr, MIXERS))}, got {mixer!r}")
        self.siamese = siamese and mixer == "mamba"
        self.is_bare = mixer == "single"
        self.proj_in = convolution(spatial_dims, channels, channels, 1, bias=False)
        self.norm_in = normalization(norm, spatial_dims, channels)
        if not self.is_bare:
            self.proj_out = convolution(spatial_dims, channels, channels, 1, bias=False)
            self.norm_out = normalization(norm, spatial_dims, channels)
        self.mamba = MambaMixer(channels, d_state, d_conv, expand) if mixer != "none" else None

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm_in(self.proj_in(x)))
        if self.mamba is not None:
            tokens = a.flatten(2).transpose(1, 2)  # (B, L, C)
            mixed = siamese_scan(self.mamba, tokens) if self.siamese else self.mamba(tokens)
            mixed = mixed.transpose(1, 2).reshape(a.shape)
            if self.is_bare:
                return mixed
            a = a + mixed
        return F.relu(self.norm_out(self.proj_out(a)))
