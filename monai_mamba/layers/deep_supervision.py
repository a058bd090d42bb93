"""What segmentation decoders share: heads at several resolutions, in the places where nnU-Net looks for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from monai_mamba.layers.convolution import resample_to_grid


class DeepSupervisionDecoder(nn.Module):
    """Base of decoders with a segmentation layer per resolution they report.

    The names ``deep_supervision`` and ``seg_layers`` are nnU-Net's: it switches the first, and leaves out the second
    when it loads pretrained weights. ``seg_layers[k]`` belongs to the resolution 1 / 2**k.
    """

    seg_layers: nn.ModuleList

    def __init__(self, deep_supervision: bool) -> None:
        super().__init__()
        self._deep_supervision = deep_supervision

    @property
    def deep_supervision(self) -> bool:
        """Whether the logits of all resolutions are returned. Can be switched if the heads were built."""
        return self._deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        if enabled and len(self.seg_layers) == 1:
            raise ValueError(
                "`deep_supervision` cannot be switched on: the network was built without the heads; build it with "
                "deep_supervision=True"
            )
        self._deep_supervision = enabled


def fit_to_image(logits: list[Tensor], image_size: Sequence[int]) -> list[Tensor]:
    """Cut the logits of a padded image down to the image; level k gets ``round(size / 2**k)``, at least 1."""
    sizes = [list(image_size)]  # as it is: while TorchScript traces, sizes are tensors, which cannot be rounded
    sizes += [[max(1, round(n / 2**level)) for n in image_size] for level in range(1, len(logits))]
    return [
        resample_to_grid(value, image_size, size, 2**level)
        for level, (value, size) in enumerate(zip(logits, sizes, strict=True))
    ]
