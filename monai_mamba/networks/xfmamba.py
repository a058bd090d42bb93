"""XFMamba: classification of two views of one subject, fused by scans over both.

References:
    Zheng et al., XFMamba: Cross-Fusion Mamba for Multi-View Medical Image Classification, 2025, arXiv:2503.02619. Where
    paper and released code differ, the code is followed (docs/networks/xfmamba.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_mamba.layers.ss2d import RouteScan, check_mixer, depthwise, scan_parameters_without_decay
from monai_mamba.layers.taps import Taps
from monai_mamba.networks.vmamba import VMambaBackbone
from monai_mamba.ops import selective_scan, ss2d_scan

#: Renames from the released state dict to ours, applied in order with ``re.sub``.
PUBLISHED_KEYS: tuple[tuple[str, str], ...] = (
    (r"^mamba_feature_extrac\.", "backbone."),
    (r"^shallow_mamba_fusion\.shallowfuseSS2D\.fc1\.", "shallow_fusion.gate."),
    (r"^shallow_mamba_fusion\.(shallowfuseSS2D\.)?", "shallow_fusion."),
    (r"^fusemamba\.blocks\.0\.self_attention\.in_proj\.", "deep_fusion.unused_in_proj."),
    (r"^fusemamba\.blocks\.0\.self_attention\.in_proj_sec\.", "deep_fusion.in_proj."),
    (r"^fusemamba\.blocks\.0\.(self_attention\.)?", "deep_fusion."),
    (r"^classifier\.head\.", "head."),
)

FUSIONS = ("cross", "late", "early")


class CrossViewSwap(RouteScan):
    """Shallow fusion: two maps exchange every second channel and are scanned row by row.

    Each of the two mixed sequences has scan parameters of its own. What comes out is not sorted back by views (the
    paper's figure does so, the released code does not); it is scaled by a channel gate computed from the other view
    and added to the maps. Unlike the released code, the gradient follows the exchange.

    Args:
        channels: channels C of the maps.
        d_state: states per inner channel.
        ssm_ratio: the inner width is ``ssm_ratio * C``.
        mixer: ``"none"`` leaves the scans out and keeps the exchange and the gates.

    Shape:
        Two maps ``(B, H, W, C)``, channels last. Returns two of the same shape.

    References:
        XFMamba, arXiv:2503.02619, cross-view swapping Mamba (CVSM) block.
    """

    def __init__(self, channels: int, d_state: int = 16, ssm_ratio: float = 2.0, mixer: str = "mamba") -> None:
        check_mixer(mixer)
        d_inner = int(ssm_ratio * channels)
        super().__init__(d_inner, math.ceil(channels / 16), d_state, num_routes=2, with_scan=mixer == "mamba")
        self.norm = nn.BatchNorm2d(channels)
        self.in_proj = nn.Linear(channels, d_inner, bias=False)
        self.conv2d = nn.Conv2d(d_inner, d_inner, 3, padding=1, groups=d_inner)
        self.out_norm = nn.LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, channels, bias=False)
        hidden = max(1, d_inner // 16)
        self.gate = nn.Sequential(
            nn.Linear(d_inner, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, d_inner, bias=False)
        )

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        # Two calls: the statistics of batch normalisation are those of one view at a time.
        normed = [self.norm(view.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for view in (a, b)]
        projected = self.in_proj(torch.cat(normed))  # (2B, H, W, d_inner)
        gate_a, gate_b = torch.sigmoid(self.gate(projected.mean((1, 2))))[:, None, None].unflatten(0, (2, -1))
        from_a, from_b = F.silu(depthwise(self.conv2d, projected)).unflatten(0, (2, -1))
        is_even = torch.arange(self.d_inner, device=a.device) % 2 == 0
        swapped = torch.stack(
            [torch.where(is_even, from_b, from_a), torch.where(is_even, from_a, from_b)], dim=3
        )  # (B, H, W, 2, d_inner)
        y = self.out_norm(self._scan(swapped) if self.with_scan else swapped)
        y = self.out_proj(y * torch.stack([gate_b, gate_a], dim=3))
        return a + y[:, :, :, 0], b + y[:, :, :, 1]

    def _scan(self, u: Tensor) -> Tensor:
        delta, B, C = self.split_projection(torch.einsum("bhwkd,kcd->bhwkc", u, self.x_proj_weight))
        y = selective_scan(
            u.flatten(3).flatten(1, 2),  # (B, L, 2 * d_inner)
            delta.flatten(3).flatten(1, 2),
            self.decay_rates().flatten(0, 1),
            B.flatten(1, 2),
            C.flatten(1, 2),
            self.Ds,
            None,
            self.dt_projs_bias.flatten(),
            delta_softplus=True,
            channels_last=True,
        )
        return y.reshape(u.shape)


class MultiViewCombination(RouteScan):
    """Deep fusion: both maps and their mean are scanned along four routes, reading the states through the mean's C.

    The three results are added, gated by the mean, and added to the two maps.

    Args:
        channels: channels C of the maps.
        d_state: states per inner channel.
        ssm_ratio: the inner width is ``ssm_ratio * C``.
        mixer: ``"none"`` leaves the scans out and keeps the rest.

    Shape:
        Two maps ``(B, H, W, C)``, channels last. Returns one of the same shape.

    References:
        XFMamba, arXiv:2503.02619, multi-view combination Mamba (MVCM) block.
    """

    def __init__(self, channels: int, d_state: int = 16, ssm_ratio: float = 2.0, mixer: str = "mamba") -> None:
        check_mixer(mixer)
        d_inner = int(ssm_ratio * channels)
        super().__init__(d_inner, math.ceil(channels / 16), d_state, num_routes=4, with_scan=mixer == "mamba")
        self.norm = nn.LayerNorm(channels)
        # Part of every released file, used by nothing: kept so that files load and are written back whole.
        self.unused_in_proj = nn.Linear(channels, 2 * d_inner, bias=False).requires_grad_(False)
        self.in_proj = nn.Linear(channels, d_inner, bias=False)
        self.conv2d = nn.Conv2d(d_inner, d_inner, 3, padding=1, groups=d_inner)
        self.out_norm = nn.LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, channels, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        normed_a, normed_b = self.norm(torch.cat([a, b])).unflatten(0, (2, -1))
        projected = self.in_proj(torch.cat([normed_a, normed_b, (normed_a + normed_b) / 2]))  # (3B, H, W, d_inner)
        gate = F.silu(projected.unflatten(0, (3, -1))[2])
        u = F.silu(depthwise(self.conv2d, projected))
        y_a, y_b, y_mean = self.out_norm(self._scan(u) if self.with_scan else u).unflatten(0, (3, -1))
        return a + b + self.out_proj((y_a + y_b + y_mean) * gate)

    def _scan(self, u: Tensor) -> Tensor:
        delta, B, C = self.project(u)
        C_mean = C.unflatten(0, (3, -1))[2]
        D = self.Ds.unflatten(0, (self.num_routes, -1))
        return ss2d_scan(u, delta, self.decay_rates(), B, torch.cat([C_mean] * 3), D, self.dt_projs_bias)


class XFMamba(nn.Module):
    """XFMamba, classifier for two views of one subject.

    One VMamba backbone looks at both views; their last maps go through the shallow and the deep fusion.

    A study with one view: pass anything for the missing one and a ``view_mask``. Its image is replaced by the one
    that is there, before the backbone, which is how the published training presents studies with a single image. With
    ``view_dropout_rate`` the network is trained for it: that share of the training samples loses one view, either
    one.

    Args:
        in_channels: channels of one view; a one-channel image is repeated if the network has more.
        num_classes: outputs of the head; 0 for no head, then the pooled features are returned.
        depths, dims, ssm_ratio, drop_path_rate: of the backbone, a VMamba v2; the defaults are XFMamba-T.
        fusion_d_state, fusion_ssm_ratio: of the two fusion blocks.
        fusion: ``"cross"`` (XFMamba) or one of the baselines of the released code: ``"late"`` joins the two pooled
            maps before the head, ``"early"`` merges the two images by a 3x3 convolution before the backbone.
        view_dropout_rate: probability that a training sample loses one of its views.
        mixer: ``"mamba"``, or ``"none"`` for the same network without scans.
        use_checkpoint: save memory in training by computing the activations of each block twice.

    Shape:
        One tensor ``(B, 2 * in_channels, H, W)`` with the views one after the other on the channel axis, or two
        ``(B, in_channels, H, W)``; any size. ``view_mask``: booleans ``(B, 2)``, True where a view is there. Returns
        logits ``(B, num_classes)``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> network = XFMamba(num_classes=2)
        >>> network(torch.zeros(1, 6, 64, 64)).shape
        torch.Size([1, 2])

    References:
        Zheng et al., XFMamba, 2025, arXiv:2503.02619, section 2; parameter counts in docs/networks/xfmamba.md.
    """

    num_views = 2

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 2,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] | int = 96,
        ssm_ratio: float = 1.0,
        drop_path_rate: float = 0.2,
        fusion_d_state: int = 16,
        fusion_ssm_ratio: float = 2.0,
        fusion: str = "cross",
        view_dropout_rate: float = 0.0,
        mixer: str = "mamba",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"`fusion` must be one of {', '.join(map(repr, FUSIONS))}, got {fusion!r}")
        if num_classes < 0:
            raise ValueError(f"`num_classes` must be at least 0, got {num_classes}")
        if not 0 <= view_dropout_rate <= 1:
            raise ValueError(f"`view_dropout_rate` must be in [0, 1], got {view_dropout_rate}")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.fusion = fusion
        self.view_dropout_rate = view_dropout_rate
        self.backbone = VMambaBackbone(
            in_channels,
            depths,
            dims,
            ssm_ratio=ssm_ratio,
            drop_path_rate=drop_path_rate,
            mixer=mixer,
            use_checkpoint=use_checkpoint,
        )
        for level in range(len(self.backbone.dims) - 1):
            # Only the last map is used; the other normalisations are there because released files hold them.
            self.backbone.get_submodule(f"outnorm{level}").requires_grad_(False)
        channels = self.backbone.dims[-1]
        if fusion == "early":
            self.early_fusion = nn.Sequential(
                nn.Conv2d(2 * in_channels, in_channels, 3, padding=1), nn.BatchNorm2d(in_channels), nn.ReLU()
            )
        if fusion == "cross":
            self.shallow_fusion = CrossViewSwap(channels, fusion_d_state, fusion_ssm_ratio, mixer)
            self.deep_fusion = MultiViewCombination(channels, fusion_d_state, fusion_ssm_ratio, mixer)
            self.final_conv = nn.Conv2d(channels, channels, 1)
        taps = {"cross": ("view_a", "view_b", "shallow_a", "shallow_b", "deep"), "late": ("view_a", "view_b")}
        self.taps = Taps([*taps.get(fusion, ("fused",)), "embedding"])
        self.num_features = 2 * channels if fusion == "late" else channels
        self.head: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    @property
    def feature_layers(self) -> dict[str, str]:
        """Names of the feature maps and the modules they pass; ``fused`` is the layer for Grad-CAM."""
        layers = {name: f"taps.{name}" for name in self.taps}
        return layers | {"fused": "final_conv"} if self.fusion == "cross" else layers

    def no_weight_decay(self) -> set[str]:
        """Names of the scan parameters that are to be exempt from weight decay."""
        return scan_parameters_without_decay(self)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one with ``num_classes`` outputs; 0 for none."""
        device = next(self.parameters()).device
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes, device=device) if num_classes else nn.Identity()

    def split_views(self, x: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the two views of one stacked or two separate tensors, each ``(B, in_channels, H, W)``.

        Raises:
            ValueError: if the shapes do not fit.
        """
        if second is None:
            if x.ndim != 4 or x.shape[1] not in (2, 2 * self.in_channels):
                channels = " or ".join(str(n) for n in sorted({2, 2 * self.in_channels}))
                raise ValueError(
                    f"`x` must have shape (B, {channels}, H, W), both views on the channel axis, got {tuple(x.shape)};"
                    " or pass the views as two tensors"
                )
            x, second = x.chunk(2, dim=1)
        elif x.shape != second.shape:
            raise ValueError(f"the two views must have one shape, got {tuple(x.shape)} and {tuple(second.shape)}")
        if x.ndim != 4 or x.shape[1] not in (1, self.in_channels):
            raise ValueError(f"a view must have shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        return x.expand(-1, self.in_channels, -1, -1), second.expand(-1, self.in_channels, -1, -1)

    def fill_missing(self, a: Tensor, b: Tensor, view_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Replace missing views by the other one; in training drop some more at ``view_dropout_rate``.

        Raises:
            ValueError: if the mask has another shape or type, or a sample has no view at all.
        """
        if view_mask is not None:
            if view_mask.shape != (a.shape[0], 2) or view_mask.dtype != torch.bool:
                raise ValueError(
                    f"`view_mask` must be booleans of shape ({a.shape[0]}, 2), got {view_mask.dtype} of shape "
                    f"{tuple(view_mask.shape)}"
                )
            if not torch.compiler.is_compiling() and not view_mask.any(1).all():
                raise ValueError("`view_mask` leaves a sample without any view; remove that sample from the batch")
        if self.training and self.view_dropout_rate > 0:
            draw = torch.rand(a.shape[0], 2, device=a.device)
            dropped = draw[:, :1] < self.view_dropout_rate
            first = draw[:, 1:] < 0.5
            kept = ~(dropped & torch.cat([first, ~first], dim=1))
            # A sample that has only one view keeps it.
            view_mask = kept if view_mask is None else torch.where(view_mask.all(1, keepdim=True), kept, view_mask)
        if view_mask is None:
            return a, b
        has_a, has_b = view_mask.to(a.device)[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1) each
        return torch.where(has_a, a, b), torch.where(has_b, b, a)

    def fused_map(self, a: Tensor, b: Tensor) -> Tensor:
        """Last maps of the two views ``(B, C, H, W)`` to the map that is pooled."""
        shallow_a, shallow_b = self.shallow_fusion(
            self.taps["view_a"](a).permute(0, 2, 3, 1), self.taps["view_b"](b).permute(0, 2, 3, 1)
        )
        shallow_a = self.taps["shallow_a"](shallow_a.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        shallow_b = self.taps["shallow_b"](shallow_b.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        deep = self.deep_fusion(shallow_a, shallow_b).permute(0, 3, 1, 2)
        return self.final_conv(self.taps["deep"](deep))

    def forward(self, x: Tensor, second: Tensor | None = None, view_mask: Tensor | None = None) -> Tensor:
        a, b = self.fill_missing(*self.split_views(x, second), view_mask)
        if self.fusion == "early":
            maps = self.backbone.forward_features(self.early_fusion(torch.cat([a, b], dim=1)))
            pooled = self.taps["fused"](self.backbone.normalized(maps, -1)).mean((2, 3))
        else:
            maps = self.backbone.forward_features(torch.cat([a, b]))  # both views in one batch
            a, b = self.backbone.normalized(maps, -1).unflatten(0, (2, -1))
            if self.fusion == "late":
                pooled = torch.cat([self.taps["view_a"](a), self.taps["view_b"](b)], dim=1).mean((2, 3))
            else:
                pooled = self.fused_map(a, b).mean((2, 3))
        return self.head(self.taps["embedding"](pooled))
