"""How much memory a training step needs, found by running it on tensors that have shapes and no contents.

Nothing is guessed from the architecture: network, loss and backward pass run under torch's fake tensors, every storage
is counted from the moment an operator returns it until nobody holds it any more, and the highest sum is the answer. So
it covers parameters, gradients, what autograd saves, the scan's states, the deep supervision heads and the loss, for
any network. Not seen are copies that a library makes inside one operator: for oneDNN (CPU) they are added by a rule,
for cuDNN they are not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Numbers an optimiser keeps for each parameter.
OPTIMIZER_STATES = {"sgd": 1, "adam": 2, "adamw": 2}
PRECISIONS = ("float32", "autocast")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training step.

    Attributes:
        parameters: weights and buffers.
        gradients: of the weights.
        optimizer: what the optimiser keeps between steps.
        peak: all that lives at the worst moment of the step, the above included.
    """

    parameters: int
    gradients: int
    optimizer: int
    peak: int

    @property
    def activations(self) -> int:
        """What the worst moment adds to parameters and optimiser: maps, scan states, loss, and gradients so far."""
        return self.peak - self.parameters - self.optimizer


def training_memory(
    network: nn.Module,
    image_shape: Sequence[int],
    loss: Callable[[Any, Any], Tensor],
    target_channels: int = 1,
    optimizer: str = "adamw",
    precision: str = "float32",
) -> TrainingMemory:
    """Return the memory of a training step of nnU-Net.

    Args:
        network: in training mode and with deep supervision as it will be trained; it is not changed.
        image_shape: ``(B, C, *spatial)``.
        loss: takes the network's output and targets: one for a tensor, a list for a list.
        target_channels: channels of the label maps; 1, or the number of regions.
        optimizer: ``"adamw"``, ``"adam"`` or ``"sgd"`` (with momentum).
        precision: ``"float32"`` as on a CPU, or ``"autocast"``: 16 bits where nnU-Net uses them on CUDA.

    Raises:
        ValueError: if ``optimizer`` or ``precision`` is unknown.
    """
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"`optimizer` must be one of {', '.join(OPTIMIZER_STATES)}, got {optimizer!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    with FakeTensorMode(), _LiveStorage(count_copies=precision == "float32") as live:
        weights = {name: torch.empty_strided(p.shape, p.stride(), dtype=p.dtype) for name, p in _tensors(network)}
        for name, parameter in network.named_parameters():
            weights[name].requires_grad_(parameter.requires_grad)
        parameters = [tensor for tensor in weights.values() if tensor.requires_grad]
        size_of_parameters = sum(tensor.nbytes for tensor in weights.values())
        states = [torch.empty_like(p) for p in parameters for _ in range(OPTIMIZER_STATES[optimizer])]
        live.reset_peak()
        image = torch.empty(tuple(image_shape))
        with _autocast(precision):
            output = torch.func.functional_call(network, weights, (image,))
            levels = output if isinstance(output, (list, tuple)) else [output]
            targets = [torch.zeros(image_shape[0], target_channels, *level.shape[2:]) for level in levels]
            value = loss(output, targets if len(targets) > 1 else targets[0])
        value.backward()  # with the output alive, as in nnU-Net, which holds it until the step returns
        peak = live.peak
        size_of_gradients = sum(p.nbytes for p in parameters)
        size_of_states = sum(t.nbytes for t in states)
    return TrainingMemory(size_of_parameters, size_of_gradients, size_of_states, peak)


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def _autocast(precision: str):
    # torch cannot autocast for CUDA where there is none; its rules for the CPU cast the same heavy operators.
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "autocast" else nullcontext()


class _LiveStorage(TorchDispatchMode):
    """Sums the bytes of all storages that operators have returned and that are still held.

    Args:
        count_copies: add, while a convolution runs, the copies of its operands that oneDNN makes to reorder them.
    """

    def __init__(self, count_copies: bool) -> None:
        super().__init__()
        self.count_copies = count_copies
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def reset_peak(self) -> None:
        self.peak = self.current

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        copies = _reordered_bytes(func, args, out) if self.count_copies else 0
        self.peak = max(self.peak, self.current + copies)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.current += size
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


def _reordered_bytes(func, args, out) -> int:
    if func._overloadpacket not in _CONVOLUTIONS:
        return 0
    return sum(t.nbytes for t in tree_leaves((args, out)) if isinstance(t, Tensor))


def nnunet_loss(has_regions: bool, levels: int) -> Callable[[Any, Any], Tensor]:
    """Return nnU-Net's loss for plain or region-based training over that many resolutions."""
    from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": True, "smooth": 1e-5, "ddp": False}
    if has_regions:
        loss = DC_and_BCE_loss({}, dice | {"do_bg": True}, dice_class=MemoryEfficientSoftDiceLoss)
    else:
        loss = DC_and_CE_loss(dice | {"do_bg": False}, {}, dice_class=MemoryEfficientSoftDiceLoss)
    return loss if levels == 1 else DeepSupervisionWrapper(loss, [0.5**level for level in range(levels)])
