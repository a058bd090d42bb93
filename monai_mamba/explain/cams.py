"""Class activation maps of the package's networks: Grad-CAM and Grad-CAM++ by MONAI.

MONAI needs feature maps with the channels first and one image in the batch. The blocks here are channels-last; their
maps pass `monai_mamba.layers.taps` channels-first, and these are the layers that are looked at.

Networks that return maps (segmentation, landmarks) become classifiers of a region: the score of a class is the mean
of its logits, or of its heat map, over the region (Seg-Grad-CAM).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.visualize import GradCAM, GradCAMpp
from monai.visualize.class_activation_maps import ModelWithHooks
from torch import Tensor, nn

from monai_mamba.layers.convolution import pad_to_multiple
from monai_mamba.layers.taps import extract_features

METHODS: dict[str, Callable[..., Any]] = {"gradcam": GradCAM, "gradcam++": GradCAMpp}
#: The deepest layer is taken whose map has at least this many pixels along every axis: a map of 2 x 2 says nothing.
MIN_MAP_SIZE = 4
#: Name of the last map of the decoder in `feature_layers`; it is looked at only if it is asked for.
DECODER = "decoder"


class ActivationMaps:
    """Class activation maps of one network, one per view.

    The network is copied, because MONAI's hooks cannot be taken away again.

    Args:
        network: a network of this package, in evaluation mode.
        image: an input ``(C, *spatial)`` as all the others will be.
        method: ``"gradcam"`` or ``"gradcam++"``.
        layer: name of the layer out of :func:`map_layers`; None takes the deepest stage whose map has ``MIN_MAP_SIZE``
            pixels a side. The decoder is left to those who ask for it: as in Seg-Grad-CAM's paper, the bottom of the
            encoder tells more than maps that resemble the prediction.

    Attributes:
        layer: name of the layer.
        map_size: size of its map.
        num_views: maps per image.

    Raises:
        ValueError: if method or layer is unknown, or the image too small for any layer.

    References:
        Selvaraju et al., Grad-CAM, ICCV 2017; Chattopadhay et al., Grad-CAM++, WACV 2018; Vinogradova et al., Towards
        Interpretable Semantic Segmentation via Gradient-Weighted Class Activation Mapping, AAAI 2020.
    """

    def __init__(self, network: nn.Module, image: Tensor, method: str = "gradcam", layer: str | None = None) -> None:
        layers = check_choice(network, method, layer)
        # Networks that pad do it before their first layer: done here, maps and image keep one frame.
        self._multiple = int(getattr(network, "size_multiple", 1))
        with torch.no_grad():
            features = extract_features(network, self._padded(image, _device(network)), names=layers.values())
        sizes = {name: tuple(features[path].shape[2:]) for name, path in layers.items()}
        if layer is None:
            fitting = [name for name, size in sizes.items() if name != DECODER and min(size) >= MIN_MAP_SIZE]
            if not fitting:
                shown = ", ".join(f"{name} {'x'.join(map(str, size))}" for name, size in sizes.items())
                raise ValueError(f"`image` is too small for a map of {MIN_MAP_SIZE} pixels a side: {shown}")
            layer = fitting[-1]
        self.layer, self.map_size = layer, sizes[layer]
        self.num_views = int(features[layers[layer]].shape[0])
        self.method = method
        self._network = copy.deepcopy(network).requires_grad_(True)
        path = f"network.{layers[layer]}"
        hooks = ModelWithHooks(_Scores(self._network), path, register_forward=True, register_backward=True)
        self._method = METHODS[method](nn_module=hooks, target_layers=path)

    def __call__(self, image: Tensor, class_index: int, region: Tensor | None = None) -> Tensor:
        """Return the maps ``(views, *spatial)`` of one input ``(C, *spatial)``, on the CPU.

        The values are from 0 to 1 over all views together, so that a view that says nothing stays dark; all zero if
        nothing in the layer speaks for the class.

        Args:
            image: the input.
            class_index: class, structure or landmark: the output to explain.
            region: mask ``(*spatial)`` of the outputs to explain; None for all of them, or for a classifier.

        Raises:
            ValueError: if the region is empty or not on the grid of the image.
        """
        device = _device(self._network)
        options = {} if region is None else {"region": self._padded_region(region, image, device)}
        padded = self._padded(image, device)
        coarse = self._method.compute_map(padded, class_idx=class_index, **options)
        self._network.zero_grad(set_to_none=True)
        maps = enlarge(coarse.detach().float().cpu(), padded.shape[2:])
        for axis, size in enumerate(image.shape[1:], start=1):
            maps = maps.narrow(axis, 0, size)
        return normalized(maps)

    def _padded(self, image: Tensor, device: torch.device) -> Tensor:
        return pad_to_multiple(image[None].to(device), self._multiple)

    def _padded_region(self, region: Tensor, image: Tensor, device: torch.device) -> Tensor:
        if region.shape != image.shape[1:] or not region.any():
            raise ValueError(
                f"`region` must mark voxels of the image of {tuple(image.shape[1:])}, got a mask of "
                f"{tuple(region.shape)} with {int(region.sum())} voxels"
            )
        missing = [-size % self._multiple for size in region.shape]
        widths = [width for size in reversed(missing) for width in (0, size)]
        return nn.functional.pad(region.to(device, torch.float32), widths)


def check_choice(network: nn.Module, method: str, layer: str | None) -> dict[str, str]:
    """Return :func:`map_layers` of a network; refuse a method or layer that there is not.

    Raises:
        ValueError: naming what there is.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}")
    layers = map_layers(network)
    if layer is not None and layer not in layers:
        raise ValueError(f"`layer` must be one of {', '.join(layers)}, got {layer!r}")
    return layers


def map_layers(network: nn.Module) -> dict[str, str]:
    """Return the layers whose maps can be shown, from the first to the deepest, and their module paths.

    For networks with two views these are the stages of the common backbone, which hold one map per view in the batch.
    Networks for segmentation and landmarks have the last map of their decoder, too.
    """
    backbone = getattr(network, "backbone", None)
    if isinstance(backbone, nn.Module):
        known: dict[str, str] = backbone.feature_layers  # type: ignore[assignment]
        return {name: f"backbone.{path}" for name, path in known.items() if name.startswith("stage")}
    known = getattr(network, "feature_layers", {})
    found = {name: path for name, path in known.items() if name.startswith("stage") or name == DECODER}
    if not found:
        raise ValueError(f"`network` names no stages in `feature_layers`, got {type(network).__name__}")
    return found


def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps ``(views, 1, *coarse)`` on the grid of the image, ``(views, *size)``, linearly interpolated."""
    mode = {2: "bilinear", 3: "trilinear"}[len(size)]
    return nn.functional.interpolate(maps, size=tuple(size), mode=mode, align_corners=False)[:, 0]


def normalized(maps: Tensor) -> Tensor:
    """Return maps from 0 to 1 over all views together; constant maps become zero."""
    low, high = maps.min(), maps.max()
    return torch.zeros_like(maps) if high <= low else (maps - low) / (high - low)


class _Scores(nn.Module):
    """Class scores with the value 0 and the gradients of the logits, or of the mean logits of a region.

    Grad-CAM++ multiplies with exp(score), which overflows for sure networks; it is a common factor that the maps'
    normalization takes away again. The mean over a region gives the same Grad-CAM as the published sum; Grad-CAM++,
    whose weights are no homogeneous function of the gradients, would depend on the size of the region with a sum.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, region: Tensor | None = None) -> Tensor:
        logits = self.network(x)
        if logits.ndim > 2:
            region = torch.ones_like(logits[0, 0]) if region is None else region
            logits = (logits * region).flatten(2).sum(2) / region.sum()
        elif logits.shape[1] == 1:  # one logit, for the second of two classes
            logits = torch.cat([-logits, logits], 1)
        return logits - logits.detach()


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
