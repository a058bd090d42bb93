"""MedMamba: hierarchical 2D classifier whose blocks give half of the channels to convolutions and half to scans.

References:
    Yue and Li, MedMamba: Vision Mamba for Medical Image Classification, 2024, arXiv:2403.03849. Where paper and
    released code differ, the code is followed (docs/networks/medmamba.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_mamba.layers.drop_path import DropPath, drop_path_schedule
from monai_mamba.layers.patches import PatchMerging, check_image, check_odd_size, stage_dims
from monai_mamba.layers.ss2d import SS2D, scan_parameters_without_decay
from monai_mamba.layers.stages import Stage, run_stages
from monai_mamba.layers.taps import Taps

#: Renames from the released state dict to ours, applied in order with ``re.sub``.
PUBLISHED_KEYS: tuple[tuple[str, str], ...] = (
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"\.conv33conv33conv11\.", ".conv_branch."),
)


def conv_branch(channels: int) -> nn.Sequential:
    """Two 3x3 convolutions and a pointwise one, each followed by ReLU, with batch normalisation before and between."""
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1),
        nn.ReLU(),
    )


class SSConvSSMBlock(nn.Module):
    """A convolution branch and a scan branch, each on half of the channels, interleaved and added to the input.

    Args:
        channels: channels C of the map.
        d_state: states per inner channel of the scans.
        drop_path_rate: rate of stochastic depth, on the scan branch only.
        with_conv_branch: False leaves the convolution branch out; needs ``channel_split=False``.
        channel_split: False gives all channels to every branch and adds the results.
        channel_shuffle: False concatenates the two halves instead of interleaving them.
        mixer: ``"none"`` for the block without scans.

    Shape:
        ``(B, H, W, C)``, channels last. Returns the same shape.

    Raises:
        ValueError: if the switches do not fit together or C is odd where it must be split.

    References:
        MedMamba, arXiv:2403.03849, section 3.2 and figure 3; the switches are those of table 7.
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 16,
        drop_path_rate: float = 0.0,
        with_conv_branch: bool = True,
        channel_split: bool = True,
        channel_shuffle: bool = True,
        mixer: str = "mamba",
    ) -> None:
        super().__init__()
        if channel_split and not with_conv_branch:
            raise ValueError(
                "`with_conv_branch=False` leaves half of the channels without a branch; set channel_split=False too"
            )
        if channel_split and channels % 2:
            raise ValueError(f"`channels` must be even for the channel split, got {channels}; use {channels + 1}")
        branch_channels = channels // 2 if channel_split else channels
        self.channel_split = channel_split
        self.channel_shuffle = channel_shuffle
        self.norm = nn.LayerNorm(branch_channels)
        self.op = SS2D(branch_channels, d_state=d_state, mixer=mixer)
        self.drop_path = DropPath(drop_path_rate)
        self.conv_branch = conv_branch(branch_channels) if with_conv_branch else None

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1) if self.channel_split else (x, x)
        scanned = self.drop_path(self.op(self.norm(right)))
        if self.conv_branch is None:
            return x + scanned
        convolved = self.conv_branch(left.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if not self.channel_split:
            return x + scanned + convolved
        if self.channel_shuffle:
            return x + torch.stack([convolved, scanned], dim=-1).flatten(-2)  # channel 2i from one, 2i + 1 the other
        return x + torch.cat([convolved, scanned], dim=-1)


class PatchEmbed(nn.Module):
    """Cut the image into square patches and project each to a normalised pixel of the first map.

    Shape:
        ``(B, in_channels, H, W)`` to ``(B, H // patch_size, W // patch_size, channels)``.
    """

    def __init__(self, in_channels: int, channels: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class MedMamba(nn.Module):
    """MedMamba, classifier and encoder for 2D images.

    Args:
        in_channels: channels of the image; a one-channel image is repeated if the network has more.
        num_classes: outputs of the head; 0 for no head, then the pooled features are returned.
        depths: blocks per stage.
        dims: channels per stage; a number is doubled from stage to stage.
        patch_size: side of the patches of the stem.
        d_state: states per inner channel of the scans.
        drop_path_rate: rate of stochastic depth at the last block; it grows linearly from 0.
        dropout_rate: dropout on the pooled features.
        odd_size: ``"crop"`` drops the pixels and map rows that do not fill a patch (published), ``"pad"`` appends
            zeros for them.
        with_conv_branch, channel_split, channel_shuffle: ablations of the paper's table 7, see
            :class:`SSConvSSMBlock`.
        mixer: ``"mamba"``, or ``"none"`` for the same network without scans.
        use_checkpoint: save memory in training by computing the activations of each block twice.

    Shape:
        ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``. With ``odd_size="crop"`` both sides must be at least
        ``patch_size * 2 ** (len(depths) - 1)``, 32 by default; with ``"pad"`` any size goes, also the 28 pixels of
        MedMNIST.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> network = MedMamba(in_channels=1, num_classes=6)
        >>> network(torch.zeros(1, 1, 64, 64)).shape
        torch.Size([1, 6])

    References:
        Yue and Li, MedMamba, 2024, arXiv:2403.03849, section 3 and table 1.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: Sequence[int] | int = (96, 192, 384, 768),
        patch_size: int = 4,
        d_state: int = 16,
        drop_path_rate: float = 0.1,
        dropout_rate: float = 0.0,
        odd_size: str = "crop",
        with_conv_branch: bool = True,
        channel_split: bool = True,
        channel_shuffle: bool = True,
        mixer: str = "mamba",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        depths = tuple(depths)
        dims = stage_dims(dims, depths)
        check_odd_size(odd_size)
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("num_classes", num_classes, 0),
            ("patch_size", patch_size, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.dims = dims
        self.odd_size = odd_size
        self.minimum_size = patch_size * 2 ** (len(depths) - 1) if odd_size == "crop" else 1
        self.patch_embed = PatchEmbed(in_channels, dims[0], patch_size)
        rates = drop_path_schedule(drop_path_rate, depths)
        self.layers = nn.ModuleList(
            Stage(
                [
                    SSConvSSMBlock(dim, d_state, rate, with_conv_branch, channel_split, channel_shuffle, mixer)
                    for rate in stage_rates
                ],
                PatchMerging(dim, odd_size) if i + 1 < len(dims) else nn.Identity(),
                use_checkpoint,
            )
            for i, (dim, stage_rates) in enumerate(zip(dims, rates, strict=True))
        )
        self.taps = Taps([*(f"stage{i + 1}" for i in range(len(dims))), "embedding"])
        self.dropout = nn.Dropout(dropout_rate)
        self.head: nn.Module = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_initialize)

    @property
    def feature_layers(self) -> dict[str, str]:
        """Names of the feature maps and the modules they pass; ``stage4`` is the layer for Grad-CAM."""
        return {name: f"taps.{name}" for name in self.taps}

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per pixel of each map of :meth:`forward_features`."""
        return tuple(self.patch_size * 2**i for i in range(len(self.dims)))

    def no_weight_decay(self) -> set[str]:
        """Names of the scan parameters that are to be exempt from weight decay."""
        return scan_parameters_without_decay(self)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one with ``num_classes`` outputs; 0 for none."""
        device = self.patch_embed.proj.weight.device
        self.num_classes = num_classes
        self.head = nn.Linear(self.dims[-1], num_classes, device=device) if num_classes else nn.Identity()
        _initialize(self.head)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Return the map of each stage, ``(B, dims[i], H / strides[i], W / strides[i])``, finest first."""
        x = check_image(x, self.in_channels, self.minimum_size, 'enlarge the images or build with odd_size="pad"')
        if self.odd_size == "pad":
            x = F.pad(x, (0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size))
        return run_stages(self.patch_embed(x), self.layers, self.taps)

    def forward_head(self, features: Tensor) -> Tensor:
        """Turn the last map into logits."""
        return self.head(self.dropout(self.taps["embedding"](features.mean((2, 3)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x)[-1])


def _initialize(module: nn.Module) -> None:
    # The released code initialises so; the bare parameters of the scans keep the values of their constructor.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
