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
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), bool, str})  # types of arguments
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
    _LIBRARY.impl(name, _protected(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.monai_mamba, name).default
    torch.library.register_vmap(f"{_NAMESPACE}::{name}", _one_by_one(op), lib=_LIBRARY)
    return op


def _one_by_one(op: Any) -> Callable[..., Any]:
    """`torch.vmap` of an operator: a call for each item, as there is none for all of them."""

    def batched(info: Any, axes: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        if info.batch_size < 1:
            raise ValueError(f"{op._opname} cannot be mapped over an axis of length 0; leave the call out")
        calls = [
            op(*(i if axis is None else i.select(axis, k) for i, axis in zip(inputs, axes, strict=True)))
            for k in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        results = type(calls[0])(map(torch.stack, zip(*calls, strict=True)))
        return results, type(results)([0] * len(results))

    return batched


def _protected(kernel: Callable[..., Any]) -> Callable[..., Any]:
    # PyTorch's compiler watches every Python function that runs within compiled code, as the kernel of a backward pass
    # there does, and would compile it. Subclasses of tensors have methods of their own with other arguments, as MONAI's
    # MetaTensor has `new_empty`.
    hidden = None

    def call(*inputs: Any) -> Any:
        nonlocal hidden
        if not _PLAIN.issuperset(map(type, inputs)):
            with torch._C.DisableTorchFunctionSubclass():
                inputs = tuple(i.as_subclass(Tensor) if isinstance(i, Tensor) else i for i in inputs)
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
    """Refuse to differentiate an operator that computes derivatives, or to map it, once somebody asks for it."""

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise BackendError(f"{what} has first derivatives only; for derivatives of derivatives {_CURE}")

    def refuse_many(*inputs: Any) -> None:
        raise BackendError(
            f"{what} has no derivatives for several vectors at once (is_grads_batched, vectorize=True); ask for them "
            f"one by one, or {_CURE}"
        )

    torch.library.register_autograd(f"{_NAMESPACE}::{op._opname}", refuse, lib=_LIBRARY)
    _LIBRARY.impl(op._opname, refuse_many, "Batched")
