"""nnMamba: residual convolution encoder with Mamba layers, for 2D and 3D images.

References:
    Gong et al., nnMamba: 3D Biomedical Image Segmentation, Classification and Landmark Detection with State Space
    Model, 2024, arXiv:2402.03526. Where paper and released code differ, the code is followed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_mamba.layers.checkpoint import checkpointed
from monai_mamba.layers.convolution import (
    ChannelGate,
    DoubleConv,
    convolution,
    normalization,
    pad_to_multiple,
    upsample,
)
from monai_mamba.layers.deep_supervision import DeepSupervisionDecoder, fit_to_image
from monai_mamba.layers.mamba import MambaMixer
from monai_mamba.layers.siamese import MambaLayer

#: Renames from the released state dict to ours, applied in order with ``re.sub``. The released one lists the Mamba
#: layer of a stage once per block that uses it; ours lists it once.
PUBLISHED_KEYS: tuple[tuple[str, str], ...] = (
    (r"^in_conv\.", "encoder.stem."),
    (r"^layer1\.[1-9]\d*\.mamba_layer\.", "encoder.stages.0.mixer."),
    (r"^layer2\.[1-9]\d*\.mamba_layer\.", "encoder.stages.1.mixer."),
    (r"^layer3\.[1-9]\d*\.mamba_layer\.", "encoder.stages.2.mixer."),
    (r"^layer1\.(\d+)\.", r"encoder.stages.0.blocks.\1."),
    (r"^layer2\.(\d+)\.", r"encoder.stages.1.blocks.\1."),
    (r"^layer3\.(\d+)\.", r"encoder.stages.2.blocks.\1."),
    (r"^att1\.", "decoder.gates.2."),
    (r"^att2\.", "decoder.gates.1."),
    (r"^att3\.", "decoder.gates.0."),
    (r"^conv5\.", "decoder.blocks.0."),
    (r"^conv6\.", "decoder.blocks.1."),
    (r"^conv7\.", "decoder.blocks.2."),
    (r"^conv8\.", "decoder.seg_layers.0."),
    (r"^ds([123])_cls_conv\.", r"decoder.seg_layers.\1."),
    (r"^(encoder\.stem|decoder\.\w+\.\d+)\.conv\.0\.", r"\1.conv1."),
    (r"^(encoder\.stem|decoder\.\w+\.\d+)\.conv\.1\.", r"\1.norm1."),
    (r"^(encoder\.stem|decoder\.\w+\.\d+)\.conv\.3\.", r"\1.conv2."),
    (r"^(encoder\.stem|decoder\.\w+\.\d+)\.conv\.4\.", r"\1.norm2."),
    (r"\.bn([12])\.", r".norm\1."),
    (r"^mamba_layer_stem\.", "encoder.stem_mixer."),
    (r"mixer\.nin\.", "mixer.proj_in."),
    (r"mixer\.norm\.", "mixer.norm_in."),
    (r"mixer\.nin2\.", "mixer.proj_out."),
    (r"mixer\.norm2\.", "mixer.norm_out."),
    (r"^mamba_seq\.mamba\.", "sequential_head."),
    (r"^mlp\.", "head."),
    (r"(\.gates\.\d)\.layer1\.", r"\1.squeeze."),
    (r"(\.gates\.\d)\.layer2\.", r"\1.excite."),
)

HEADS = ("double_conv", "conv1x1")


class ResidualBlock(nn.Module):
    """Two 3x3(x3) convolutions with a residual path; a Mamba layer's view of the input joins before the addition.

    Shape:
        ``(B, in_channels, *spatial)`` to ``(B, out_channels, *ceil(spatial / stride))``.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = convolution(spatial_dims, in_channels, out_channels, 3, stride, bias=False)
        self.norm1 = normalization(norm, spatial_dims, out_channels)
        self.conv2 = convolution(spatial_dims, out_channels, out_channels, 3, bias=False)
        self.norm2 = normalization(norm, spatial_dims, out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                convolution(spatial_dims, in_channels, out_channels, 1, stride, bias=False),
                normalization(norm, spatial_dims, out_channels),
            )

    def forward(self, x: Tensor, mixer: nn.Module | None = None) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if mixer is not None:
            out = out + mixer(x)
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResidualStage(nn.Module):
    """A strided block and then blocks that all share one Mamba layer."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        mixer: MambaLayer | None,
        norm: str,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(spatial_dims, in_channels if i == 0 else out_channels, out_channels, 2 if i == 0 else 1, norm)
            for i in range(num_blocks)
        )
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x, self.mixer)
        return x


class NNMambaEncoder(nn.Module):
    """Strided stem and three residual stages: features at 1/2, 1/4, 1/8 and 1/16 with 1, 2, 4 and 8 times the width.

    The Mamba layers sit in the stages (segmentation) or, a single one without the flips, behind the stem
    (classification).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        init_filters: int,
        num_blocks: int,
        mixer: str,
        norm: str,
        use_checkpoint: bool,
        mixer_in_stem: bool = False,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.stem = DoubleConv(spatial_dims, in_channels, init_filters, stride=2, norm=norm)
        self.stem_mixer = (
            MambaLayer(spatial_dims, init_filters, d_state=8, siamese=False, mixer=mixer, norm=norm)
            if mixer_in_stem
            else None
        )
        widths = [init_filters * 2**i for i in range(4)]
        self.stages = nn.ModuleList(
            ResidualStage(
                spatial_dims,
                widths[i],
                widths[i + 1],
                num_blocks,
                MambaLayer(spatial_dims, widths[i + 1], mixer=mixer, norm=norm)
                if num_blocks > 1 and not mixer_in_stem
                else None,
                norm,
            )
            for i in range(3)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        def run(module: nn.Module, x: Tensor) -> Tensor:
            return checkpointed(module, x) if self.use_checkpoint and torch.is_grad_enabled() else module(x)

        x = run(self.stem, x)
        if self.stem_mixer is not None:
            x = x + run(self.stem_mixer, x)
        features = [x]
        for stage in self.stages:
            x = run(stage, x)
            features.append(x)
        return features


class NNMambaDecoder(DeepSupervisionDecoder):
    """U-shaped decoder with channel gates on the skips and one segmentation layer per resolution it reports."""

    def __init__(
        self,
        spatial_dims: int,
        init_filters: int,
        out_channels: int,
        head: str,
        norm: str,
        deep_supervision: bool,
        use_checkpoint: bool,
    ) -> None:
        super().__init__(deep_supervision)
        self.use_checkpoint = use_checkpoint
        skips = [init_filters * 4, init_filters * 2, init_filters]
        self.gates = nn.ModuleList(ChannelGate(width) for width in skips)
        self.blocks = nn.ModuleList(DoubleConv(spatial_dims, 3 * width, width, norm=norm) for width in skips)
        # What depends on the number of classes is in `seg_layers`, all else stays when weights are transferred.
        self.full_resolution = (
            nn.Identity()
            if head == "double_conv"
            else DoubleConv(spatial_dims, init_filters, init_filters // 2, norm=norm)
        )
        self.seg_layers = nn.ModuleList(
            [
                DoubleConv(spatial_dims, init_filters, out_channels, norm=norm)
                if head == "double_conv"
                else convolution(spatial_dims, init_filters // 2, out_channels, 1)
            ]
        )
        if deep_supervision:
            self.seg_layers.extend(convolution(spatial_dims, width, out_channels, 1) for width in reversed(skips))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return the logits, full resolution first; only those if deep supervision is off."""

        def run(module: nn.Module, x: Tensor) -> Tensor:
            return checkpointed(module, x) if self.use_checkpoint and torch.is_grad_enabled() else module(x)

        *skips, x = features
        maps = []
        for gate, block, skip in zip(self.gates, self.blocks, reversed(skips), strict=True):
            x = run(block, torch.cat([upsample(x), gate(skip)], dim=1))
            maps.append(x)
        logits = [run(self.seg_layers[0], run(self.full_resolution, upsample(x)))]
        if self.deep_supervision:
            logits += [layer(m) for layer, m in zip(self.seg_layers[1:], reversed(maps), strict=True)]
        return logits


class NNMambaSeg(nn.Module):
    """nnMamba for segmentation, and for landmark heat maps.

    The published network has ``head="double_conv"`` (its logits pass a batch normalisation and a ReLU, so they are
    never negative), 32 filters and three blocks. Images of any size are accepted: inside, each axis is padded to a
    multiple of 16 and the result is cropped.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background included.
        init_filters: width at half resolution; at least 16. It doubles with every halving of the resolution.
        num_blocks: residual blocks per stage; all but the first share the stage's Mamba layer.
        mixer: ``"mamba"``; ``"single"`` for the network of the authors' nnU-Net v1 fork, see
            :class:`~monai_mamba.layers.siamese.MambaLayer`; ``"none"`` for the same network without scans.
        head: ``"double_conv"`` (published), or ``"conv1x1"``: two convolutions at full resolution to half the width
            and a 1x1 convolution to the classes, with logits of either sign.
        norm: ``"batch"`` (published) or ``"instance"``.
        deep_supervision: add heads at 1/2, 1/4 and 1/8 resolution and return a list of logits, full resolution first.
            A network built so can be switched by ``network.decoder.deep_supervision``.
        use_checkpoint: save memory in training by computing activations twice.

    Shape:
        ``(B, in_channels, *spatial)`` to ``(B, out_channels, *spatial)``; with deep supervision a list, level k of
        size ``round(spatial / 2**k)`` (Python's rounding, as nnU-Net sizes its targets).

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> network = NNMambaSeg(spatial_dims=3, in_channels=1, out_channels=3)
        >>> network(torch.zeros(1, 1, 40, 56, 40)).shape
        torch.Size([1, 3, 40, 56, 40])

    References:
        Gong et al., nnMamba, 2024, arXiv:2402.03526, section 2; parameter counts in docs/networks/nnmamba.md.
    """

    #: Each axis is padded to a multiple of this many voxels before the first layer.
    size_multiple = 16

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        init_filters: int = 32,
        num_blocks: int = 3,
        mixer: str = "mamba",
        head: str = "double_conv",
        norm: str = "batch",
        deep_supervision: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("num_blocks", num_blocks)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if init_filters < 16:
            raise ValueError(
                f"`init_filters` must be at least 16 (the channel gates divide it by 16), got {init_filters}"
            )
        if head not in HEADS:
            raise ValueError(f"`head` must be one of {', '.join(map(repr, HEADS))}, got {head!r}")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.norm = norm
        self.encoder = NNMambaEncoder(spatial_dims, in_channels, init_filters, num_blocks, mixer, norm, use_checkpoint)
        self.decoder = NNMambaDecoder(
            spatial_dims, init_filters, out_channels, head, norm, deep_supervision, use_checkpoint
        )

    @property
    def feature_layers(self) -> dict[str, str]:
        """Names of the feature maps and the modules that return them."""
        return _encoder_layers() | {"decoder": "decoder.blocks.2"}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the Mamba layers want to be exempt from weight decay."""
        return _parameters_without_decay(self)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        _check_image(x, self.spatial_dims, self.in_channels, self.norm, self.training)
        image_size = x.shape[2:]
        logits = fit_to_image(self.decoder(self.encoder(pad_to_multiple(x, self.size_multiple))), image_size)
        return logits if self.decoder.deep_supervision else logits[0]


class NNMambaLandmark(NNMambaSeg):
    """nnMamba for landmark detection: one heat map per landmark.

    The published landmark network is the segmentation network; its heat maps are never negative. It was trained with
    Gaussians of 5 voxels standard deviation and a mean squared error.

    Args:
        num_landmarks: landmarks, one output channel each.
        spatial_dims, in_channels, init_filters, num_blocks, mixer, head, norm, use_checkpoint: of
            :class:`NNMambaSeg`.

    Shape:
        ``(B, in_channels, *spatial)`` to ``(B, num_landmarks, *spatial)``.

    References:
        nnMamba, arXiv:2402.03526, section 3.3; the training pipeline is that of the LFC data set.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        num_landmarks: int = 6,
        init_filters: int = 32,
        num_blocks: int = 3,
        mixer: str = "mamba",
        head: str = "double_conv",
        norm: str = "batch",
        use_checkpoint: bool = False,
    ) -> None:
        if num_landmarks < 1:
            raise ValueError(f"`num_landmarks` must be at least 1, got {num_landmarks}")
        super().__init__(
            spatial_dims,
            in_channels,
            num_landmarks,
            init_filters,
            num_blocks,
            mixer,
            head,
            norm,
            use_checkpoint=use_checkpoint,
        )
        self.num_landmarks = num_landmarks

    def locate(self, x: Tensor) -> Tensor:
        """Return the voxel of the maximum of each heat map, ``(B, num_landmarks, spatial_dims)``, whole numbers.

        This is the published decoding; it knows no fractions of a voxel.
        """
        heat_maps = self(x)
        voxels = torch.unravel_index(heat_maps.flatten(2).argmax(2), heat_maps.shape[2:])
        return torch.stack(voxels, dim=-1)


class NNMambaClassifier(nn.Module):
    """nnMamba for classification and regression of whole images.

    One Mamba layer (a single scan, eight states) behind the stem, three residual stages without any, and an MLP on the
    means of the three stages' maps.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        num_classes: outputs; 1 for a binary logit or a number.
        init_filters: width at half resolution. It doubles with every halving of the resolution.
        num_blocks: residual blocks per stage.
        sequential_head: send the means through a Mamba over seven tokens before the MLP (channel-sequential learning,
            the release of July 2024) instead of joining them (every later release).
        mixer: ``"mamba"``, or ``"none"`` for the same network without scans.
        norm: ``"batch"`` (published) or ``"instance"``.
        dropout_rate: dropout within the MLP.
        use_checkpoint: save memory in training by computing activations twice.

    Shape:
        ``(B, in_channels, *spatial)`` of any size to logits ``(B, num_classes)``.

    Raises:
        ValueError: if an argument is out of its range.

    References:
        Gong et al., nnMamba, 2024, arXiv:2402.03526, section 2; parameter counts in docs/networks/nnmamba.md.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        num_classes: int = 1,
        init_filters: int = 32,
        num_blocks: int = 3,
        sequential_head: bool = False,
        mixer: str = "mamba",
        norm: str = "batch",
        dropout_rate: float = 0.5,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("num_classes", num_classes),
            ("init_filters", init_filters),
            ("num_blocks", num_blocks),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.norm = norm
        self.encoder = NNMambaEncoder(
            spatial_dims, in_channels, init_filters, num_blocks, mixer, norm, use_checkpoint, mixer_in_stem=True
        )
        self.with_sequential_head = sequential_head
        self.sequential_head = (
            MambaMixer(2 * init_filters, d_state=8, d_conv=2) if sequential_head and mixer == "mamba" else None
        )
        self.embedding = nn.Identity()
        self.head = nn.Sequential(
            nn.Linear(14 * init_filters, init_filters),
            nn.ReLU(),
            nn.Dropout(dropout_rate),
            nn.Linear(init_filters, num_classes),
        )

    @property
    def feature_layers(self) -> dict[str, str]:
        """Names of the feature maps and the modules that return them; ``stage3`` is the layer for Grad-CAM."""
        return _encoder_layers() | {"embedding": "embedding"}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the Mamba layers want to be exempt from weight decay."""
        return _parameters_without_decay(self)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer of the MLP by a freshly initialised one with ``num_classes`` outputs."""
        last = self.head[3]
        assert isinstance(last, nn.Linear)
        self.head[3] = nn.Linear(last.in_features, num_classes, device=last.weight.device)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Return the maps at 1/2, 1/4, 1/8 and 1/16 of the image, sizes rounded up."""
        _check_image(x, self.spatial_dims, self.in_channels, self.norm, self.training)
        return self.encoder(x)

    def forward_head(self, features: list[Tensor]) -> Tensor:
        """Turn the maps into logits."""
        means = [feature.flatten(2).mean(2) for feature in features[1:]]  # 2C, 4C, 8C
        if not self.with_sequential_head:
            return self.head(self.embedding(torch.cat(means, dim=1)))
        channels = means[0].shape[1]
        tokens = torch.cat([mean.unflatten(1, (channels, -1)) for mean in means], dim=2)  # (B, 2C, 7)
        if self.sequential_head is not None:
            tokens = tokens + self.sequential_head(F.relu(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.embedding(tokens.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _encoder_layers() -> dict[str, str]:
    return {"stem": "encoder.stem"} | {f"stage{i + 1}": f"encoder.stages.{i}" for i in range(3)}


def _parameters_without_decay(network: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}"
        for prefix, module in network.named_modules()
        if isinstance(module, MambaMixer)
        for name in module.no_weight_decay()
    }


def _check_image(x: Tensor, spatial_dims: int, in_channels: int, norm: str, training: bool) -> None:
    """Refuse a wrong shape, and an image whose deepest map has one value to normalise: the result were a constant."""
    if x.ndim != spatial_dims + 2 or x.shape[1] != in_channels:
        raise ValueError(
            f"`x` must have shape (B, {in_channels}, *spatial) with {spatial_dims} spatial axes, got {tuple(x.shape)}"
        )
    if any(size > 16 for size in x.shape[2:]):
        return
    if norm == "instance" or (norm == "batch" and training and x.shape[0] == 1):
        values = "one batch item with " if norm == "batch" else ""
        raise ValueError(
            f"`x` of shape {tuple(x.shape)} leaves {values}a single voxel at 1/16 resolution, which norm={norm!r} "
            "cannot normalise; use more than 16 voxels along one axis"
            + (" or a larger batch" if norm == "batch" else "")
        )
