"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop the whole branch of a sample with probability ``rate`` while training, and scale up what stays.

    Args:
        rate: probability of dropping; 0 makes this the identity.

    Shape:
        ``(B, ...)``. Returns the same shape.

    Raises:
        ValueError: if ``rate`` is not in [0, 1).

    References:
        Huang et al., Deep Networks with Stochastic Depth, 2016, arXiv:1603.09382.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty((x.shape[0], *(1,) * (x.ndim - 1))).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def drop_path_schedule(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates that grow linearly from 0 to ``rate`` over all blocks, one list per stage."""
    total = sum(depths)
    rates = [rate * i / max(1, total - 1) for i in range(total)]
    stages, start = [], 0
    for depth in depths:
        stages.append(rates[start : start + depth])
        start += depth
    return stages
