"""Parts of two-dimensional hierarchical networks: layout changes, patch merging, checks of sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ODD_SIZES = ("crop", "pad")


class ToChannelsLast(nn.Module):
    """View ``(B, C, H, W)`` as ``(B, H, W, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    """View ``(B, H, W, C)`` as ``(B, C, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class PatchMerging(nn.Module):
    """Halve a map: each 2x2 patch becomes one pixel with its 4 C channels, normalised and projected to 2 C.

    Args:
        channels: channels C of the map.
        odd_size: ``"crop"`` drops the last row or column of an odd map, ``"pad"`` appends zeros to it.

    Shape:
        ``(B, H, W, C)`` to ``(B, H / 2, W / 2, 2 C)``, rounded down or up by ``odd_size``.

    References:
        Liu et al., Swin Transformer, 2021, arXiv:2103.14030, section 3.1.
    """

    def __init__(self, channels: int, odd_size: str = "crop") -> None:
        super().__init__()
        check_odd_size(odd_size)
        self.odd_size = odd_size
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            if self.odd_size == "pad":
                x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
            else:
                x = x[:, : height - height % 2, : width - width % 2]
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)  # (B, H/2, W/2, 4C)
        return self.reduction(self.norm(x))


def check_odd_size(odd_size: str) -> None:
    """Raise ``ValueError`` unless ``odd_size`` is ``"crop"`` or ``"pad"``."""
    if odd_size not in ODD_SIZES:
        raise ValueError(f"`odd_size` must be one of {', '.join(map(repr, ODD_SIZES))}, got {odd_size!r}")


def check_image(x: Tensor, in_channels: int, minimum: int = 1, cure: str = "resize or pad the images") -> Tensor:
    """Check a batch of 2D images and repeat a single channel to the channels the network was built for.

    Shape:
        ``(B, in_channels or 1, H, W)``. Returns ``(B, in_channels, H, W)``.

    Raises:
        ValueError: if the shape does not fit or a side is smaller than ``minimum``.
    """
    if x.ndim != 4 or x.shape[1] not in (1, in_channels):
        channels = f"{in_channels}" if in_channels == 1 else f"{in_channels} (or 1)"
        raise ValueError(f"`x` must have shape (B, {channels}, H, W), got {tuple(x.shape)}")
    if min(x.shape[2:]) < minimum:
        raise ValueError(f"`x` must be at least {minimum} pixels high and wide, got {tuple(x.shape[2:])}; {cure}")
    return x.expand(-1, in_channels, -1, -1)


def stage_dims(dims: Sequence[int] | int, depths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the channels per stage.

    Raises:
        ValueError: if widths and depths do not fit together.
    """
    if not depths or min(depths) < 1:
        raise ValueError(f"`depths` must name at least one block for each stage, got {depths}")
    widths = tuple(dims * 2**i for i in range(len(depths))) if isinstance(dims, int) else tuple(dims)
    if len(widths) != len(depths) or min(widths) < 1:
        raise ValueError(f"`dims` must give a positive width for each of the {len(depths)} `depths`, got {dims}")
    if any(b != 2 * a for a, b in itertools.pairwise(widths)):
        raise ValueError(f"`dims` must double from stage to stage, got {widths}")
    return widths
