"""Parameters, multiply-accumulates and floating-point operations of a network, without running it.

What is counted: every convolution and matrix product as multiply-accumulates (MACs), and every scan by the formula
VMamba and mamba-ssm use, ``9 B L D N + B L D`` operations (one ``B L D`` more with a gate). FLOPs are ``2 MACs`` plus
the scan. Normalisations, activations, pooling and interpolation are not counted; they are a few per cent.

Papers print something they call FLOPs which is MACs, with the scan added (VMamba) or left out (the others);
``Published`` in the registry says which.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from monai_mamba.layers.mamba import MambaMixer
from monai_mamba.layers.ss2d import RouteScan
from monai_mamba.ops import use_backend


def scan_operations(batch: int, length: int, channels: int, d_state: int, skip: bool = True, gate: bool = False) -> int:
    """Operations of one selective scan: ``9 B L D N``, and ``B L D`` each for skip and gate.

    References:
        The count of mamba-ssm's authors (state-spaces/mamba, issue 110), used by VMamba.
    """
    return batch * length * channels * (9 * d_state + skip + gate)


def _selective_scan_formula(u, delta, A, B, C, D=None, z=None, *rest, **_):
    batch, length, channels = u.shape
    return scan_operations(batch, length, channels, A.shape[1], D is not None, z is not None)


def _ss2d_formula(x, delta, A, B, C, D=None, *rest, **_):
    batch, height, width, channels = x.shape
    return A.shape[0] * scan_operations(batch, height * width, channels, A.shape[2], D is not None)


def _causal_conv_formula(x, weight, *rest, **_):
    return 2 * x.numel() * weight.shape[1]


_SCANS = {
    torch.ops.monai_mamba.selective_scan_fwd: _selective_scan_formula,
    torch.ops.monai_mamba.ss2d_scan_fwd: _ss2d_formula,
}
_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.monai_mamba.causal_conv1d_fwd)
_FORMULAS = {**flop_registry, **_SCANS, torch.ops.monai_mamba.causal_conv1d_fwd: _causal_conv_formula}


class _Counter(TorchDispatchMode):
    """Adds up operations under the innermost module that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.running = [""]
        self.operations: dict[str, Counter] = defaultdict(Counter)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            found = formula(*args, **(kwargs or {}), out_val=out)
            self.operations[self.running[-1]][func._overloadpacket] += found
        return out


@dataclass(frozen=True)
class Counts:
    """What a network, or a part of it, costs.

    Attributes:
        parameters: all parameters, shared ones once.
        trainable: those that require a gradient.
        convolution_macs: multiply-accumulates of the convolutions.
        linear_macs: of the linear layers and other matrix products, without those in ``projection_macs``.
        projection_macs: of the products inside the scan layers that compute step sizes, B and C; counters that look at
            modules only do not see them.
        scan_operations: operations of the scans by the formula above.
    """

    parameters: int
    trainable: int
    convolution_macs: int
    linear_macs: int
    projection_macs: int
    scan_operations: int

    @property
    def macs(self) -> int:
        """All multiply-accumulates."""
        return self.convolution_macs + self.linear_macs + self.projection_macs

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-accumulate, and the scans."""
        return 2 * self.macs + self.scan_operations

    def as_dict(self) -> dict[str, int]:
        """All figures by name."""
        return {**asdict(self), "macs": self.macs, "flops": self.flops}


@dataclass(frozen=True)
class PartSummary:
    """One module of a network: its path, class, output shape (of the first tensor), and costs."""

    path: str
    kind: str
    output_shape: tuple[int, ...] | None
    counts: Counts


def count(network: nn.Module, *inputs: Tensor | Sequence[int]) -> Counts:
    """Count parameters and operations of one forward pass in eval mode.

    Nothing is computed: tensors have shapes only, so a large network takes a second and no memory.

    Args:
        network: any network; only the scans of this package are counted by their formula.
        inputs: what the network is called with, as tensors or shapes.

    Example:
        >>> counts = count(create_model("medmamba_t"), (1, 3, 224, 224))
    """
    return summarize(network, *inputs, depth=0)[0].counts


def summarize(network: nn.Module, *inputs: Tensor | Sequence[int], depth: int = 1) -> list[PartSummary]:
    """Count a network and its modules down to a depth; the whole network comes first, with path ``""``."""
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else tuple(x) for x in inputs]
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    outputs: dict[str, tuple[int, ...]] = {}
    modules = dict(network.named_modules())
    counter = _Counter()
    handles = []
    for path, module in modules.items():

        def enter(_module, _inputs, path=path) -> None:
            counter.running.append(path)

        def leave(_module, _inputs, output, path=path) -> None:
            counter.running.pop()
            outputs[path] = _shape_of(output)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    weights = {
        name: torch.empty_like(value, device="meta")
        for name, value in (*network.named_parameters(), *network.named_buffers())
    }
    training = [module for module in modules.values() if module.training]
    network.eval()
    try:
        with torch.no_grad(), use_backend(None), counter:
            arguments = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
            torch.func.functional_call(network, weights, arguments)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return [
        PartSummary(path, type(module).__name__, outputs.get(path), _counts(path, modules, counter.operations))
        for path, module in modules.items()
        if path.count(".") < depth or path == ""
    ]


def _shape_of(output) -> tuple[int, ...]:
    while isinstance(output, (list, tuple)) and output:
        output = output[0]
    return tuple(output.shape) if isinstance(output, Tensor) else ()


def _counts(path: str, modules: dict[str, nn.Module], operations: dict[str, Counter]) -> Counts:
    convolution = linear = projection = scan = 0
    for where, found in operations.items():
        if where != path and path and not where.startswith(f"{path}."):
            continue
        for op, value in found.items():
            if op in _SCANS:
                scan += value
            elif op in _CONVOLUTIONS:
                convolution += value
            elif _feeds_a_scan(where, modules):
                projection += value
            else:
                linear += value
    parameters = list(modules[path].parameters())
    return Counts(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        convolution_macs=convolution // 2,
        linear_macs=linear // 2,
        projection_macs=projection // 2,
        scan_operations=scan,
    )


def _feeds_a_scan(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the matrix products at this place compute step sizes, B or C."""
    parent, _, name = path.rpartition(".")
    return isinstance(modules[path], (RouteScan, MambaMixer)) or (
        name == "x_proj" and isinstance(modules[parent], MambaMixer)
    )
