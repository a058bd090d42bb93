"""VMamba: hierarchical 2D network whose blocks mix the pixels with scans along four routes.

Both generations: v2 (overlapping stem, MLP in each block, no gate, one state per channel) and v0 (the first release:
patch stem, no MLP, gate, sixteen states).

References:
    Liu et al., VMamba: Visual State Space Model, 2024, arXiv:2401.10166.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from monai_mamba.layers.drop_path import DropPath, drop_path_schedule
from monai_mamba.layers.patches import (
    PatchMerging,
    ToChannelsFirst,
    ToChannelsLast,
    check_image,
    check_odd_size,
    stage_dims,
)
from monai_mamba.layers.ss2d import SS2D, scan_parameters_without_decay
from monai_mamba.layers.stages import Stage, run_stages
from monai_mamba.layers.taps import Taps

#: Renames from published state dicts to ours, applied in order with ``re.sub``: only the earliest files need them.
PUBLISHED_KEYS: tuple[tuple[str, str], ...] = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
)

STEMS = ("overlap", "patch")
DOWNSAMPLES = ("conv", "merge")


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them, on the last axis."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VSSBlock(nn.Module):
    """Scans along four routes, then an MLP; each normalised before and added to its input.

    Args:
        channels: channels C of the map.
        d_state, ssm_ratio, gate: of the :class:`~monai_mamba.layers.ss2d.SS2D`; with the gate its convolution has a
            bias, as published.
        mlp_ratio: hidden width of the MLP in units of C; 0 for no MLP.
        drop_path_rate: rate of stochastic depth of both branches.
        mixer: ``"none"`` for the block without scans.

    Shape:
        ``(B, H, W, C)``, channels last. Returns the same shape.
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        gate: bool = False,
        drop_path_rate: float = 0.0,
        mixer: str = "mamba",
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.op = SS2D(channels, d_state, ssm_ratio, conv_bias=gate, gate=gate, mixer=mixer)
        self.drop_path = DropPath(drop_path_rate)
        self.mlp: nn.Module | None = None
        if mlp_ratio > 0:
            self.norm2 = nn.LayerNorm(channels)
            self.mlp = MLP(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


def _stem(kind: str, in_channels: int, channels: int) -> nn.Sequential:
    # The places in the sequences are the published keys.
    if kind == "patch":
        return nn.Sequential(
            nn.Conv2d(in_channels, channels, 4, stride=4),
            ToChannelsLast(),
            nn.LayerNorm(channels),
        )
    return nn.Sequential(
        nn.Conv2d(in_channels, channels // 2, 3, stride=2, padding=1),
        ToChannelsLast(),
        nn.LayerNorm(channels // 2),
        ToChannelsFirst(),
        nn.GELU(),
        nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1),
        ToChannelsLast(),
        nn.LayerNorm(channels),
    )


def _downsample(kind: str, channels: int, odd_size: str) -> nn.Module:
    if kind == "merge":
        return PatchMerging(channels, odd_size)
    return nn.Sequential(
        ToChannelsFirst(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        ToChannelsLast(),
        nn.LayerNorm(2 * channels),
    )


class VMambaEncoder(nn.Module):
    """Stem and stages of VMamba, shared by the classifier and the feature extractor.

    Args: see :class:`VMamba`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] | int = 96,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        gate: bool = False,
        stem: str = "overlap",
        downsample: str = "conv",
        odd_size: str = "pad",
        drop_path_rate: float = 0.2,
        mixer: str = "mamba",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        depths = tuple(depths)
        self.dims = stage_dims(dims, depths)
        check_odd_size(odd_size)
        if in_channels < 1:
            raise ValueError(f"`in_channels` must be at least 1, got {in_channels}")
        for name, value, known in (("stem", stem, STEMS), ("downsample", downsample, DOWNSAMPLES)):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}")
        if ssm_ratio <= 0 or mlp_ratio < 0:
            raise ValueError(
                f"`ssm_ratio` must be positive and `mlp_ratio` not negative, got {ssm_ratio} and {mlp_ratio}"
            )
        self.in_channels = in_channels
        # Overlapping convolutions round every size up; only patches can be too large for the image.
        patches = 4 if stem == "patch" else 1
        halvings = len(depths) - 1 if downsample == "merge" else 0
        self.minimum_size = patches * 2**halvings if odd_size == "crop" else 1
        self._pad_to = patches if odd_size == "pad" else 1
        self.patch_embed = _stem(stem, in_channels, self.dims[0])
        rates = drop_path_schedule(drop_path_rate, depths)
        self.layers = nn.ModuleList(
            Stage(
                [VSSBlock(dim, d_state, ssm_ratio, mlp_ratio, gate, rate, mixer) for rate in stage_rates],
                _downsample(downsample, dim, odd_size) if i + 1 < len(self.dims) else nn.Identity(),
                use_checkpoint,
            )
            for i, (dim, stage_rates) in enumerate(zip(self.dims, rates, strict=True))
        )
        self.taps = Taps(f"stage{i + 1}" for i in range(len(self.dims)))
        self.apply(_initialize)

    @property
    def feature_layers(self) -> dict[str, str]:
        """Names of the feature maps and the modules they pass; the last stage is the layer for Grad-CAM."""
        return {name: f"taps.{name}" for name in self.taps}

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per pixel of each map of :meth:`forward_features`."""
        return tuple(4 * 2**i for i in range(len(self.dims)))

    def no_weight_decay(self) -> set[str]:
        """Names of the scan parameters that are to be exempt from weight decay."""
        return scan_parameters_without_decay(self)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Return the map of each stage, ``(B, dims[i], H / strides[i], W / strides[i])``, finest first."""
        x = check_image(x, self.in_channels, self.minimum_size, 'enlarge the images or build with odd_size="pad"')
        x = F.pad(x, (0, -x.shape[3] % self._pad_to, 0, -x.shape[2] % self._pad_to))
        return run_stages(self.patch_embed(x), self.layers, self.taps)


class NormalizedHead(nn.Module):
    """Layer normalisation of each pixel, mean over the pixels, linear layer: ``(B, C, H, W)`` to ``(B, classes)``."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.embedding = nn.Identity()
        self.head: nn.Module = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(self.norm(x.permute(0, 2, 3, 1)).mean((1, 2))))


class VMamba(VMambaEncoder):
    """VMamba, classifier for 2D images.

    Args:
        in_channels: channels of the image; a one-channel image is repeated if the network has more.
        num_classes: outputs of the head; 0 for no head, then the pooled features are returned.
        depths: blocks per stage.
        dims: channels per stage; a number is doubled from stage to stage.
        d_state: states per inner channel of the scans; 1 in v2, 16 in v0.
        ssm_ratio: inner width of the scans in units of the map's channels.
        mlp_ratio: hidden width of the MLPs in units of the map's channels; 0 for none (v0).
        gate: gate the scans (v0) or not (v2).
        stem: ``"overlap"``, two 3x3 convolutions of stride 2 (v2), or ``"patch"``, one 4x4 of stride 4 (v0).
        downsample: ``"conv"``, 3x3 of stride 2 (v2), or ``"merge"``, patch merging (v0).
        odd_size: what patches do with what does not fill one, ``"pad"`` zeros or ``"crop"``. Convolutions round up.
        drop_path_rate: rate of stochastic depth at the last block; it grows linearly from 0.
        mixer: ``"mamba"``, or ``"none"`` for the same network without scans.
        use_checkpoint: save memory in training by computing the activations of each block twice.

    Shape:
        ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``. Any size goes; with patches and
        ``odd_size="crop"`` both sides must be at least 32.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> network = VMamba(num_classes=2)
        >>> network(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 2])

    References:
        Liu et al., VMamba, 2024, arXiv:2401.10166, section 4 and appendix (variants).
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] | int = 96,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        gate: bool = False,
        stem: str = "overlap",
        downsample: str = "conv",
        odd_size: str = "pad",
        drop_path_rate: float = 0.2,
        mixer: str = "mamba",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            depths,
            dims,
            d_state,
            ssm_ratio,
            mlp_ratio,
            gate,
            stem,
            downsample,
            odd_size,
            drop_path_rate,
            mixer,
            use_checkpoint,
        )
        if num_classes < 0:
            raise ValueError(f"`num_classes` must be at least 0, got {num_classes}")
        self.num_classes = num_classes
        self.classifier = NormalizedHead(self.dims[-1], num_classes)

    @property
    def feature_layers(self) -> dict[str, str]:
        """Names of the feature maps and the modules they pass; ``stage4`` is the layer for Grad-CAM."""
        return {**super().feature_layers, "embedding": "classifier.embedding"}

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear layer by a freshly initialised one with ``num_classes`` outputs; 0 for none."""
        device = self.classifier.norm.weight.device
        self.num_classes = num_classes
        self.classifier.head = nn.Linear(self.dims[-1], num_classes, device=device) if num_classes else nn.Identity()
        _initialize(self.classifier.head)

    def forward_head(self, features: Tensor) -> Tensor:
        """Turn the last map into logits."""
        return self.classifier(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x)[-1])


class VMambaBackbone(VMambaEncoder):
    """VMamba as a feature extractor: the maps of all stages, each with a layer normalisation of its own.

    Takes the arguments of :class:`VMamba` but ``num_classes``. The normalisations ``outnorm0`` to ``outnorm3`` are not
    part of the published classifiers, whose weights otherwise load as they are.

    Shape:
        ``(B, in_channels, H, W)`` to a list of ``(B, dims[i], H / strides[i], W / strides[i])``, finest first.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for i, dim in enumerate(self.dims):
            self.add_module(f"outnorm{i}", nn.LayerNorm(dim))

    def normalized(self, maps: list[Tensor], level: int) -> Tensor:
        """Normalise one of the maps of :meth:`forward_features`."""
        norm = self.get_submodule(f"outnorm{level % len(self.dims)}")
        return norm(maps[level].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.forward_features(x)
        return [self.normalized(maps, level) for level in range(len(maps))]


def _initialize(module: nn.Module) -> None:
    # As released; convolutions and the bare parameters of the scans keep the values of their constructors.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
