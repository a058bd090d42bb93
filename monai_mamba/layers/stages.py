"""The stages of hierarchical 2D networks: blocks at one resolution, then a step to the next."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from monai_mamba.layers.checkpoint import checkpointed
from monai_mamba.layers.taps import Taps


class Stage(nn.Module):
    """Blocks at one resolution; ``downsample`` prepares the next stage and is applied by :func:`run_stages`."""

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module, use_checkpoint: bool) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpointed(block, x) if self.use_checkpoint and torch.is_grad_enabled() else block(x)
        return x


def run_stages(x: Tensor, stages: nn.ModuleList, taps: Taps) -> list[Tensor]:
    """Return what each stage makes of the map, before the step to the next; each passes its tap ``stage1``, ...

    Shape:
        ``(B, H, W, C)`` to a list of ``(B, C_i, H_i, W_i)``, channels first.
    """
    maps = []
    for i, stage in enumerate(stages):
        assert isinstance(stage, Stage)
        maps.append(taps[f"stage{i + 1}"](stage(x).permute(0, 3, 1, 2)))
        x = stage.downsample(maps[-1].permute(0, 2, 3, 1))
    return maps
