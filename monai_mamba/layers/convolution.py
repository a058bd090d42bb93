"""Convolution, normalisation and resampling in two or three dimensions, by plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORMS: dict[tuple[str, int], type[nn.Module]] = {
    ("batch", 2): nn.BatchNorm2d,
    ("batch", 3): nn.BatchNorm3d,
    ("instance", 2): nn.InstanceNorm2d,
    ("instance", 3): nn.InstanceNorm3d,
}


def convolution(
    spatial_dims: int, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = True
) -> nn.Module:
    """Return a convolution that keeps the size (odd kernels) or divides it by the stride, rounding up.

    Raises:
        ValueError: if ``spatial_dims`` is neither 2 nor 3.
    """
    if spatial_dims not in _CONVOLUTIONS:
        raise ValueError(f"`spatial_dims` must be 2 or 3, got {spatial_dims!r}")
    return _CONVOLUTIONS[spatial_dims](
        in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=bias
    )


def normalization(name: str, spatial_dims: int, channels: int) -> nn.Module:
    """Return a normalisation with learnable scale and shift.

    Raises:
        ValueError: if the name is neither ``"batch"`` nor ``"instance"``.
    """
    try:
        norm = _NORMS[name, spatial_dims]
    except KeyError:
        raise ValueError(f"`norm` must be 'batch' or 'instance', got {name!r}") from None
    return norm(channels, affine=True)


class DoubleConv(nn.Module):
    """Twice: 3x3(x3) convolution, normalisation, ReLU. The first convolution has the stride.

    Shape:
        ``(B, in_channels, *spatial)`` to ``(B, out_channels, *ceil(spatial / stride))``.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, stride: int = 1, norm: str = "batch"
    ) -> None:
        super().__init__()
        self.conv1 = convolution(spatial_dims, in_channels, out_channels, 3, stride)
        self.norm1 = normalization(norm, spatial_dims, out_channels)
        self.conv2 = convolution(spatial_dims, out_channels, out_channels, 3)
        self.norm2 = normalization(norm, spatial_dims, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(x)), inplace=True)


class ChannelGate(nn.Module):
    """Scale each channel by a factor in (0, 1) computed from the channel means.

    Shape:
        ``(B, channels, *spatial)``. Returns the same shape.

    References:
        Hu et al., Squeeze-and-Excitation Networks, 2018, arXiv:1709.01507, section 3.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = channels // reduction
        if hidden < 1:
            raise ValueError(
                f"`channels` must be at least `reduction`={reduction} for the channel gate, got {channels}"
            )
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.flatten(2).mean(2)))))  # (B, C)
        return x * scale.reshape(*scale.shape, *(1,) * (x.ndim - 2))


def upsample(x: Tensor) -> Tensor:
    """Double the spatial size by bi- or trilinear interpolation (``align_corners=False``)."""
    return F.interpolate(x, scale_factor=2, mode="bilinear" if x.ndim == 4 else "trilinear", align_corners=False)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last plane at the far end of each spatial axis until it is divisible by ``multiple``.

    Repeated values keep the statistics of normalisation layers closer to the image than zeros would.
    """
    missing = [-size % multiple for size in x.shape[2:]]
    if not any(missing):
        return x
    widths = [width for size in reversed(missing) for width in (0, size)]
    return F.pad(x, widths, mode="replicate")


def resample_to_grid(x: Tensor, image_size: Sequence[int], size: Sequence[int], stride: int) -> Tensor:
    """Bring a map with cells of ``stride`` voxels to a grid of ``size`` cells over the first ``image_size`` voxels.

    Where the axis was not padded and divides evenly this is the identity; otherwise the map is interpolated linearly
    at the centers of the target cells, ``(i + 0.5) * image_size / size``.

    Shape:
        ``(B, C, *cells)`` to ``(B, C, *size)``.
    """
    for axis, (voxels, cells) in enumerate(zip(image_size, size, strict=True), start=2):
        if voxels == cells * stride:
            x = x.narrow(axis, 0, cells)
            continue
        center = (torch.arange(cells, device=x.device, dtype=torch.float32) + 0.5) * (voxels / cells)
        position = (center / stride - 0.5).clamp(0, x.shape[axis] - 1)
        low = position.floor().long()
        high = (low + 1).clamp(max=x.shape[axis] - 1)
        weight = (position - low).to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1 - axis))
        x = x.index_select(axis, low) * (1 - weight) + x.index_select(axis, high) * weight
    return x
