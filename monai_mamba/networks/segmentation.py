"""Segmentation of 2D images with the encoders of MedMamba, VMamba and XFMamba.

The papers classify; segmentation is their stated future work. The encoders are the published ones, so their weights
load; the decoder is a plain U-shaped one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from monai_mamba.layers.checkpoint import checkpointed
from monai_mamba.layers.convolution import DoubleConv, convolution, pad_to_multiple, upsample
from monai_mamba.layers.deep_supervision import DeepSupervisionDecoder, fit_to_image
from monai_mamba.layers.ss2d import scan_parameters_without_decay
from monai_mamba.networks.medmamba import MedMamba
from monai_mamba.networks.vmamba import VMambaBackbone
from monai_mamba.networks.xfmamba import CrossViewSwap, MultiViewCombination


class SegmentationDecoder(DeepSupervisionDecoder):
    """U-shaped decoder from maps at 1/32, 1/16, 1/8 and 1/4 of the image to its full size.

    The encoders see nothing finer than patches of four pixels; two pairs of convolutions on the image itself give the
    skips at 1/2 and full size.

    Args:
        in_channels: channels of the image.
        encoder_channels: channels of the four maps, finest first.
        widths: channels of the decoder at 1/4, 1/8 and 1/16.
        out_channels: classes, background included.
        detail_filters: width at full size; twice of it at 1/2.
        norm: ``"instance"`` or ``"batch"``.
        deep_supervision: add heads at 1/2, 1/4 and 1/8.
        use_checkpoint: save memory in training by computing activations twice.
    """

    def __init__(
        self,
        in_channels: int,
        encoder_channels: Sequence[int],
        widths: Sequence[int],
        out_channels: int,
        detail_filters: int,
        norm: str,
        deep_supervision: bool,
        use_checkpoint: bool,
    ) -> None:
        super().__init__(deep_supervision)
        self.use_checkpoint = use_checkpoint
        fine, half = detail_filters, 2 * detail_filters
        self.detail = nn.ModuleList(
            [DoubleConv(2, in_channels, fine, norm=norm), DoubleConv(2, fine, half, stride=2, norm=norm)]
        )
        skips = [fine, half, *encoder_channels[:3]]
        outputs = [fine, half, *widths]
        below = [half, *widths, encoder_channels[3]]
        self.blocks = nn.ModuleList(
            DoubleConv(2, deeper + skip, output, norm=norm)
            for deeper, skip, output in zip(reversed(below), reversed(skips), reversed(outputs), strict=True)
        )
        heads = outputs[:4] if deep_supervision else outputs[:1]
        self.seg_layers = nn.ModuleList(convolution(2, width, out_channels, 1) for width in heads)

    def forward(self, image: Tensor, features: list[Tensor]) -> list[Tensor]:
        """Return the logits, full resolution first; only those if deep supervision is off."""

        def run(module: nn.Module, x: Tensor) -> Tensor:
            return checkpointed(module, x) if self.use_checkpoint and torch.is_grad_enabled() else module(x)

        fine = run(self.detail[0], image)
        skips, x = [fine, run(self.detail[1], fine), *features[:3]], features[3]
        maps: list[Tensor] = []
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            x = run(block, torch.cat([upsample(x), skip], dim=1))
            maps.insert(0, x)
        layers = self.seg_layers if self.deep_supervision else self.seg_layers[:1]
        # As many maps as layers: torch.compile of torch 2.8 refuses a zip of unlike lengths.
        return [layer(m) for layer, m in zip(layers, maps[: len(layers)], strict=True)]


class _EncoderDecoder(nn.Module):
    """What the segmentation networks share: checks, padding to a multiple of 32, and cutting back."""

    #: Each axis is padded to a multiple of this many pixels before the first layer.
    size_multiple = 32

    def __init__(
        self,
        encoder: nn.Module,
        in_channels: int,
        encoder_channels: Sequence[int],
        widths: Sequence[int],
        out_channels: int,
        detail_filters: int,
        norm: str,
        deep_supervision: bool,
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        for name, value in (("out_channels", out_channels), ("detail_filters", detail_filters)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.in_channels = in_channels
        self.encoder = encoder
        self.decoder = SegmentationDecoder(
            in_channels, encoder_channels, widths, out_channels, detail_filters, norm, deep_supervision, use_checkpoint
        )

    @property
    def feature_layers(self) -> dict[str, str]:
        """Names of the feature maps and the modules they pass."""
        known: dict[str, str] = getattr(self.encoder, "feature_layers", {})
        stages = {name: f"encoder.{path}" for name, path in known.items() if name != "embedding"}
        return stages | {"decoder": "decoder.blocks.4"}

    def no_weight_decay(self) -> set[str]:
        """Names of the scan parameters that are to be exempt from weight decay."""
        return scan_parameters_without_decay(self)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the four maps of the padded image, finest first."""
        features: list[Tensor] = self.encoder(x)
        return features

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"`x` must have shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        image_size = x.shape[2:]
        x = pad_to_multiple(x, self.size_multiple)
        logits = fit_to_image(self.decoder(x, self.encode(x)), image_size)
        return logits if self.decoder.deep_supervision else logits[0]


class MedMambaSeg(_EncoderDecoder):
    """MedMamba encoder with a U-shaped decoder for 2D segmentation.

    Images of any size are accepted: inside, each axis is padded to a multiple of 32 and the result is cropped.

    Args:
        in_channels: channels of the image.
        out_channels: classes, background included.
        depths, dims, d_state, drop_path_rate, mixer: of :class:`~monai_mamba.networks.MedMamba`; four stages.
        detail_filters: width of the decoder at full size.
        norm: of the decoder, ``"instance"`` or ``"batch"``.
        deep_supervision: add heads at 1/2, 1/4 and 1/8 resolution and return a list of logits, full resolution first.
            A network built so can be switched by ``network.decoder.deep_supervision``.
        use_checkpoint: save memory in training by computing activations twice.

    Shape:
        ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``; with deep supervision a list, level k of size
        ``round(size / 2**k)``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> network = MedMambaSeg(in_channels=1, out_channels=4)
        >>> network(torch.zeros(1, 1, 40, 56)).shape
        torch.Size([1, 4, 40, 56])
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: Sequence[int] | int = 96,
        d_state: int = 16,
        drop_path_rate: float = 0.1,
        detail_filters: int = 32,
        norm: str = "instance",
        deep_supervision: bool = False,
        mixer: str = "mamba",
        use_checkpoint: bool = False,
    ) -> None:
        encoder = MedMamba(
            in_channels,
            num_classes=0,
            depths=_four(depths),
            dims=dims,
            d_state=d_state,
            drop_path_rate=drop_path_rate,
            mixer=mixer,
            use_checkpoint=use_checkpoint,
        )
        super().__init__(
            encoder,
            in_channels,
            encoder.dims,
            encoder.dims[:3],
            out_channels,
            detail_filters,
            norm,
            deep_supervision,
            use_checkpoint,
        )

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the four stages."""
        assert isinstance(self.encoder, MedMamba)
        return self.encoder.forward_features(x)


class VMambaSeg(_EncoderDecoder):
    """VMamba encoder with a U-shaped decoder for 2D segmentation.

    Args:
        in_channels: channels of the image.
        out_channels: classes, background included.
        depths, dims, ssm_ratio, drop_path_rate, mixer: of :class:`~monai_mamba.networks.VMamba` (v2); four stages.
        detail_filters, norm, deep_supervision, use_checkpoint: as in :class:`MedMambaSeg`.

    Shape:
        As :class:`MedMambaSeg`; any size.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] | int = 96,
        ssm_ratio: float = 1.0,
        drop_path_rate: float = 0.2,
        detail_filters: int = 32,
        norm: str = "instance",
        deep_supervision: bool = False,
        mixer: str = "mamba",
        use_checkpoint: bool = False,
    ) -> None:
        encoder = VMambaBackbone(
            in_channels,
            _four(depths),
            dims,
            ssm_ratio=ssm_ratio,
            drop_path_rate=drop_path_rate,
            mixer=mixer,
            use_checkpoint=use_checkpoint,
        )
        super().__init__(
            encoder,
            in_channels,
            encoder.dims,
            encoder.dims[:3],
            out_channels,
            detail_filters,
            norm,
            deep_supervision,
            use_checkpoint,
        )


class TwoViewEncoder(nn.Module):
    """Encoder of XFMamba for two aligned groups of channels: joined maps of both, the last one fused.

    Shape:
        ``(B, 2 C, H, W)`` to maps with 2, 2, 2 and 1 times the backbone's channels, finest first.
    """

    def __init__(
        self, backbone: VMambaBackbone, fusion_d_state: int = 16, fusion_ssm_ratio: float = 2.0, mixer: str = "mamba"
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.shallow_fusion = CrossViewSwap(backbone.dims[-1], fusion_d_state, fusion_ssm_ratio, mixer)
        self.deep_fusion = MultiViewCombination(backbone.dims[-1], fusion_d_state, fusion_ssm_ratio, mixer)

    @property
    def feature_layers(self) -> dict[str, str]:
        """Names of the backbone's stages, whose maps hold both views in the batch, and the modules they pass."""
        return {name: f"backbone.{path}" for name, path in self.backbone.feature_layers.items()}

    def forward(self, x: Tensor) -> list[Tensor]:
        *finer, last = self.backbone(torch.cat(x.chunk(2, dim=1)))
        fused = self.deep_fusion(*self.shallow_fusion(*last.permute(0, 2, 3, 1).unflatten(0, (2, -1))))
        joined = (torch.cat(m.unflatten(0, (2, -1)).unbind(), dim=1) for m in finer)
        return [*joined, fused.permute(0, 3, 1, 2)]


class XFMambaSeg(_EncoderDecoder):
    """XFMamba encoder with a U-shaped decoder for 2D segmentation of two aligned views.

    The first half of the input channels is one view, the second half the other, e.g. two MR sequences or two phases on
    one grid. One backbone looks at both; their last maps are fused as in XFMamba, the finer ones are joined.

    Args:
        in_channels: channels of the image, both views together; even.
        out_channels: classes, background included.
        depths, dims, ssm_ratio, drop_path_rate, fusion_d_state, fusion_ssm_ratio, mixer: of
            :class:`~monai_mamba.networks.XFMamba`; four stages.
        detail_filters, norm, deep_supervision, use_checkpoint: as in :class:`MedMambaSeg`.

    Shape:
        As :class:`MedMambaSeg`; any size.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        in_channels: int = 2,
        out_channels: int = 2,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] | int = 96,
        ssm_ratio: float = 1.0,
        drop_path_rate: float = 0.2,
        fusion_d_state: int = 16,
        fusion_ssm_ratio: float = 2.0,
        detail_filters: int = 32,
        norm: str = "instance",
        deep_supervision: bool = False,
        mixer: str = "mamba",
        use_checkpoint: bool = False,
    ) -> None:
        if in_channels < 2 or in_channels % 2:
            raise ValueError(f"`in_channels` must be even, half of the channels for each view, got {in_channels}")
        backbone = VMambaBackbone(
            in_channels // 2,
            _four(depths),
            dims,
            ssm_ratio=ssm_ratio,
            drop_path_rate=drop_path_rate,
            mixer=mixer,
            use_checkpoint=use_checkpoint,
        )
        super().__init__(
            TwoViewEncoder(backbone, fusion_d_state, fusion_ssm_ratio, mixer),
            in_channels,
            [2 * width for width in backbone.dims[:3]] + [backbone.dims[3]],
            backbone.dims[:3],
            out_channels,
            detail_filters,
            norm,
            deep_supervision,
            use_checkpoint,
        )


def _four(depths: Sequence[int]) -> tuple[int, ...]:
    if len(depths) != 4:
        raise ValueError(f"`depths` must name four stages, the decoder needs 1/4 to 1/32, got {tuple(depths)}")
    return tuple(depths)
