"""Gradient checkpointing that leaves running statistics alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
    # With momentum 0 the batch is normalised as before and the running statistics stay bit for bit what they are.
    # (To switch the tracking off instead would change what autograd saves, which the checkpoint refuses.)
    before = [(n.momentum, None if n.num_batches_tracked is None else n.num_batches_tracked.clone()) for n in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


def checkpointed(module: nn.Module, *inputs: Any) -> Any:
    """Call ``module`` and forget its activations; they are computed again in the backward pass.

    The second run must not update the running statistics of batch normalisation a second time, or training with
    checkpointing would end with another network than training without it.
    """
    return checkpoint(
        module,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _frozen_statistics(module)),
    )
