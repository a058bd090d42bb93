"""The entries of our operators in PyTorch's dispatcher.

Every operator is a schema with a kernel, shapes for fake tensors, and derivatives: all that autograd, `torch.compile`,
`torch.export` and autocast need. `torch.library.custom_op` makes the same entries, but its first call imports the
compiler, which takes seconds, and in training it looks up every argument in the schema at every call, which takes
longer than many scans.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from monai_mamba.errors import BackendError

_NAMESPACE = "monai_mamba"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_CURE = "call it with backend='reference'"


def define(
    name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:  # OpOverload
    """Add an operator without derivatives.

    Args:
        name: its name within ``torch.ops.monai_mamba``.
        schema: arguments and results in PyTorch's notation; no defaults, which the dispatcher would drop on the way.
        kernel: computes it on every device. It must not return an argument, or a view of one.
        fake: makes empty results of the right shape and type, contiguous as those of the kernel.

    Returns:
        The operator.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _hidden_from_compiler(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.monai_mamba, name).default


def _hidden_from_compiler(kernel: Callable[..., Any]) -> Callable[..., Any]:
    # PyTorch's compiler watches every Python function that runs within compiled code, as the kernel of a backward pass
    # there does, and would compile it.
    hidden = None

    def call(*inputs: Any) -> Any:
        nonlocal hidden
        if "torch._dynamo" not in sys.modules:  # nobody has used the compiler
            return kernel(*inputs)
        if hidden is None:
            hidden = torch.compiler.disable(kernel)
        return hidden(*inputs)

    return call


def differentiate(
    op: Any, setup_context: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]], what: str
) -> None:
    """Give an operator first derivatives by reverse mode; everything else is refused.

    Args:
        op: what :func:`define` returned.
        setup_context: ``(ctx, inputs, output)``, keeps what the derivatives need. Gradients of results that nothing
            depends on are None.
        backward: ``(ctx, *gradients of the results)``, returns one gradient or None for each argument.
        what: how messages call the operator.
    """

    def forward_of(keyset: Any, inputs: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
        output = forward_of(keyset, inputs)
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)
        return output

    def backward_of(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, *backward(ctx, *gradients)

    name = op._opname
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_of)}
    derivative: Any = type("".join(map(str.title, name.split("_"))), (torch.autograd.Function,), members)

    def kernel(keyset: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(t) for t in inputs):
            raise BackendError(f"{what} has no derivatives by forward mode (jvp, jacfwd); for these {_CURE}")
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return forward_of(keyset, inputs)
        if torch._C._are_functorch_transforms_active():
            raise BackendError(f"{what} has no derivatives by torch.func (grad, vjp, jacrev); for these {_CURE}")
        return derivative.apply(keyset, *inputs)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def refuse_derivatives(op: Any, what: str) -> None:
    """Refuse to differentiate an operator that computes derivatives, once somebody asks for it."""

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise BackendError(f"{what} has first derivatives only; for derivatives of derivatives {_CURE}")

    torch.library.register_autograd(f"{_NAMESPACE}::{op._opname}", refuse, lib=_LIBRARY)
