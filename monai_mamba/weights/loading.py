"""Published weights into our networks and back, all or nothing, with an account of every key."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from monai_mamba.errors import CheckpointError
from monai_mamba.weights.io import STATE_DICT_NAMES, Limits, TensorSpec, WeightFile, is_finite
from monai_mamba.weights.layouts import LAYOUTS, Layout, LayoutError
from monai_mamba.weights.report import KeyRecord, LoadReport

Source = os.PathLike[str] | str | Mapping[str, Tensor]

#: Prefixes that wrappers put before every name: DataParallel, torch.compile, Lightning and hand-made wrappers.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "network.", "net.")
_MAX_NAMES = 10_000
#: Counters that thop leaves in the state dict of a network it has measured.
_COUNTERS = ("total_ops", "total_params")


@dataclass(frozen=True)
class Recognized:
    """What a set of names and shapes is.

    Attributes:
        layout: the published layout.
        arguments: of the network, read from names and shapes.
        names: key in the file to our name.
        ignored: keys that mean nothing to the network, with the reason.
    """

    layout: Layout
    arguments: dict[str, Any]
    names: dict[str, str]
    ignored: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Layout and, if it is a published one, variant and file."""
        return self.layout.describe(self.arguments)


@dataclass(frozen=True)
class _Weights:
    """Names and shapes of a source, and a way to read its tensors."""

    label: str
    path: str | None
    specs: dict[str, TensorSpec]
    load: Callable[[list[str]], dict[str, Tensor]]

    def refuse(self, reason: str) -> CheckpointError:
        return CheckpointError(reason, self.path or self.label)


def _open(source: Source, weights: str | None, limits: Limits | None) -> _Weights:
    if isinstance(source, str | os.PathLike):
        file = WeightFile(source, limits)
        name, specs = file.state_dict(weights)
        label = f"{os.path.basename(os.fspath(source))}" + (f" ({name})" if name else "")
        return _Weights(label, os.fspath(source), specs, lambda keys: file.load(name, keys))
    if not isinstance(source, Mapping):
        raise TypeError(f"`source` must be a path or a state dict, got {type(source).__name__}")
    tensors: Any = dict(source)
    if weights is not None:
        tensors = tensors.get(weights, {})
        if not isinstance(tensors, Mapping):
            raise CheckpointError(f"there is no state dict under {weights!r}", "state dict")
    elif nested := [name for name in STATE_DICT_NAMES if isinstance(tensors.get(name), Mapping)]:
        tensors = dict(tensors[nested[0]])
    # Arrays as numpy and safetensors.numpy give them are as good.
    tensors = {
        k: torch.from_numpy(v) if type(v).__module__ == "numpy" and hasattr(v, "ndim") else v
        for k, v in tensors.items()
    }
    wrong = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if wrong or not tensors:
        raise CheckpointError(
            f"`{wrong[0]}` is a {type(tensors[wrong[0]]).__name__}, not a tensor" if wrong else "it is empty",
            "state dict",
        )

    def load(keys: list[str]) -> dict[str, Tensor]:
        for key in keys:
            if not is_finite(tensors[key]):
                raise CheckpointError(f"tensor {key!r} holds NaN or infinite values", "state dict")
        return {key: tensors[key].detach() for key in keys}

    specs = {key: TensorSpec(tuple(value.shape), value.dtype) for key, value in tensors.items()}
    return _Weights("state dict", None, specs, load)


def recognize(shapes: Mapping[str, tuple[int, ...]], *, layout: str | None = None) -> Recognized:
    """Tell which published layout a set of names and shapes has, and which network it describes.

    Args:
        shapes: name to shape, as in a file.
        layout: name of the layout, to choose between those that share their names (``"nnmamba_landmark"``).

    Raises:
        CheckpointError: if no layout fits or names and shapes contradict each other.
    """
    if len(shapes) > _MAX_NAMES:
        raise CheckpointError(f"it has {len(shapes)} tensors, more than any network here")
    stripped = _strip_wrappers(shapes)
    ignored = {key: "counter of thop" for key, name in stripped.items() if name.rpartition(".")[2] in _COUNTERS}
    stripped = {key: name for key, name in stripped.items() if key not in ignored}
    if any(".finalconv11." in name for name in stripped.values()):
        raise CheckpointError(
            "it is a MedMamba file from before April 2024 (it has `finalconv11`): a different network, with a residual "
            "inside the scan branch and a convolution in place of the channel shuffle. Its weights cannot be used; "
            "get a later file or train again"
        )
    known = [entry for entry in LAYOUTS if layout is None or entry.name == layout]
    if not known:
        names = ", ".join(repr(entry.name) for entry in LAYOUTS)
        raise ValueError(f"`layout` must be one of {names}, got {layout!r}")
    for entry in known:
        names_here = {key: entry.rename(name) for key, name in stripped.items()}
        if entry.recognises(set(names_here.values())):
            ours: dict[str, tuple[int, ...]] = {}
            for key, name in names_here.items():
                ours.setdefault(name, tuple(shapes[key]))
            try:
                arguments = entry.arguments(ours)
            except (ValueError, IndexError, ZeroDivisionError) as error:
                raise CheckpointError(f"it looks like {entry.title}, but {error}") from error
            return Recognized(entry, arguments, names_here, ignored)
    shown = ", ".join(list(stripped.values())[:3])
    wanted = " or ".join(entry.title for entry in known)
    raise CheckpointError(f"its names ({shown}, ...; {len(stripped)} in all) are not those of {wanted}")


def _strip_wrappers(keys: Mapping[str, Any]) -> dict[str, str]:
    names = {key: key for key in keys}
    while True:
        for wrapper in _WRAPPERS:
            if names and all(name.startswith(wrapper) for name in names.values()):
                names = {key: name[len(wrapper) :] for key, name in names.items()}
                break
        else:
            return names


@dataclass
class _Plan:
    """Which tensor of the source goes where, made before anything is changed."""

    records: list[KeyRecord] = field(default_factory=list)
    moves: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    repeats: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def _make_plan(
    weights: _Weights,
    names: Mapping[str, str],
    ignored: Mapping[str, str],
    target: Mapping[str, Tensor],
    *,
    prefix: str = "",
    stem: str = "",
    head: str = "",
    other_head: str = "",
    detachable: str = "",
    optional: str = "",
    title: str = "",
    strict: bool = True,
    adapt_in_channels: bool = False,
    reset_head: bool = False,
) -> _Plan:
    """Compare a source with (a part of) a network; ``target`` is its whole state dict, ``prefix`` the part."""
    plan = _Plan()
    part = {key[len(prefix) :]: value for key, value in target.items() if key.startswith(prefix)}

    def is_head(name: str) -> bool:
        return bool(head) and re.match(head, name) is not None

    def is_of_other_head(name: str) -> bool:
        return reset_head and bool(other_head) and re.match(other_head, name) is not None

    for key, reason in ignored.items():
        plan.records.append(KeyRecord("ignored", key, None, reason))
    for key, name in names.items():
        spec, own = weights.specs[key], part.get(name)
        if reset_head and is_head(name):
            plan.records.append(KeyRecord("ignored", key, None, "the head is not loaded, as asked"))
            continue
        if own is None and detachable and re.match(detachable, name):
            plan.records.append(KeyRecord("ignored", key, None, "this network has no place for it"))
            continue
        if own is None and is_of_other_head(name):
            plan.records.append(KeyRecord("ignored", key, None, "belongs to another head than the network's"))
            continue
        if own is None:
            plan.records.append(KeyRecord("ignored", key, None, "unknown to the network"))
            if strict:
                plan.problems.append(f"`{key}` is unknown to the network")
            continue
        if name in plan.moves:
            first = plan.moves[name][0]
            if weights.specs[first] != spec:
                plan.problems.append(f"`{key}` and `{first}` are one tensor of the network but differ in shape or type")
            plan.repeats[key] = first
            plan.records.append(KeyRecord("ignored", key, None, f"repeats `{first}`"))
            continue
        change, reason = _fit(spec, own, adapt_in_channels and name == stem)
        if change is None:
            cure = ""
            if name == stem and len(spec.shape) == own.ndim:
                cure = "; `adapt_in_channels=True` converts it"
            elif is_head(name):
                cure = "; `reset_head=True` leaves the head as it is"
            problem = f"`{key}` has shape {spec.shape}, the network needs {tuple(own.shape)}{cure}"
            if strict:
                plan.problems.append(problem)
            plan.records.append(KeyRecord("ignored", key, None, f"shape {spec.shape} does not fit {tuple(own.shape)}"))
            continue
        plan.moves[name] = (key, change)
        action = "adapted" if reason else ("loaded" if key == prefix + name else "renamed")
        plan.records.append(KeyRecord(action, key, prefix + name, reason))
    for key in target:
        name = key[len(prefix) :]
        if not key.startswith(prefix):
            plan.records.append(KeyRecord("kept", None, key, f"not part of {title}"))
        elif name not in plan.moves:
            if is_head(name) and reset_head:
                reason = "the head is not loaded, as asked"
            elif is_of_other_head(name):
                reason = "belongs to another head than the file's"
            elif optional and re.match(optional, name):
                reason = "such files do not have it"
            else:
                reason = "missing from the file"
                if strict and not (is_head(name) and reset_head):
                    plan.problems.append(f"`{key}` is missing")
            plan.records.append(KeyRecord("kept", None, key, reason))
    return plan


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _fit(spec: TensorSpec, own: Tensor, is_stem: bool) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """Return how a tensor becomes one of the network, None if it cannot; and what is changed about it."""
    shape, wanted = spec.shape, tuple(own.shape)
    cast = ""
    if spec.dtype != own.dtype:
        if spec.dtype.is_floating_point != own.dtype.is_floating_point:
            return None, ""
        cast = f"{str(spec.dtype)[6:]} to {str(own.dtype)[6:]}"
    if shape == wanted:
        return _identity, cast
    if (*wanted, 1, 1) == shape or wanted == (*shape, 1, 1):
        return lambda tensor: tensor.reshape(wanted), "pointwise convolution and matrix are the same"
    if is_stem and len(shape) == len(wanted) and (shape[0], *shape[2:]) == (wanted[0], *wanted[2:]):
        return (
            lambda tensor: adapt_input_channels(tensor, wanted[1]),
            f"{shape[1]} to {wanted[1]} input channels",
        )
    return None, ""


def adapt_input_channels(weight: Tensor, in_channels: int) -> Tensor:
    """Make the first convolution's weight fit another number of image channels.

    To one channel the filters are summed, so a grey image gives what its repetition gave before. To more they are
    repeated in order and scaled by old over new, so that an image with equal channels gives the same response.

    Shape:
        ``(out, old, ...)`` to ``(out, in_channels, ...)``.
    """
    old = weight.shape[1]
    repeats = -(-in_channels // old)
    repeated = weight.repeat(1, repeats, *[1] * (weight.ndim - 2))[:, :in_channels]
    scale = weight.sum(1, keepdim=True) if in_channels == 1 else repeated * (old / in_channels)
    return scale.contiguous()


def _raise_problems(weights: _Weights, problems: list[str], introduction: str) -> None:
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        if any(problem.endswith(".running_mean` is unknown to the network") for problem in problems):
            more += (
                "; the file's network normalises over the batch, this one does not: build it with norm='batch' "
                "(nnU-Net: -tr nnMambaTrainerBatchNorm)"
            )
        raise weights.refuse(f"{introduction}: {shown}{more}. Nothing was loaded")


def _carry_out(weights: _Weights, plan: _Plan, target: Mapping[str, Tensor], prefix: str = "") -> None:
    """Read everything, check it, and only then change the network."""
    keys = [key for key, _ in plan.moves.values()]
    tensors = weights.load(keys + list(plan.repeats))
    for key, first in plan.repeats.items():
        if not torch.equal(tensors[key], tensors[first]):
            raise weights.refuse(
                f"`{key}` and `{first}` are one tensor of the network but hold different values. Nothing was loaded"
            )
    ready = {name: change(tensors[key]) for name, (key, change) in plan.moves.items()}
    with torch.no_grad():
        for name, tensor in ready.items():
            target[prefix + name].copy_(tensor)


@overload
def from_published(
    source: Source,
    *,
    layout: str | None = ...,
    weights: str | None = ...,
    limits: Limits | None = ...,
    return_report: Literal[False] = ...,
) -> nn.Module: ...


@overload
def from_published(
    source: Source,
    *,
    layout: str | None = ...,
    weights: str | None = ...,
    limits: Limits | None = ...,
    return_report: Literal[True],
) -> tuple[nn.Module, LoadReport]: ...


def from_published(
    source: Source,
    *,
    layout: str | None = None,
    weights: str | None = None,
    limits: Limits | None = None,
    return_report: bool = False,
) -> nn.Module | tuple[nn.Module, LoadReport]:
    """Build the network that a published weight file describes and load the file into it.

    Family, widths, depths, channels and classes are read from the names and shapes. Files saved from the networks of
    this package are recognised too.

    Args:
        source: path of a file of ``torch.save`` or safetensors, or a state dict.
        layout: name of a layout, to choose between networks whose files look the same: a landmark file of nnMamba
            is a segmentation file, ``"nnmamba_landmark"`` gives the landmark network.
        weights: key under which the weights lie, e.g. ``"model_ema"``; default the usual ones.
        limits: bounds of what the file may ask for.
        return_report: return the network and the :class:`~monai_mamba.weights.report.LoadReport`.

    Returns:
        The network on the CPU, in eval mode; deep supervision is switched off if it has the heads.

    Raises:
        CheckpointError: if the file is damaged, unsafe, of an unknown layout, or does not hold exactly the tensors of
            the network it describes.
    """
    opened = _open(source, weights, limits)
    try:
        found = recognize({key: spec.shape for key, spec in opened.specs.items()}, layout=layout)
    except CheckpointError as error:
        raise opened.refuse(error.reason) from error
    options: dict[str, Any] = {"optional": found.layout.optional, "title": found.layout.title}
    try:
        # On the meta device first: shapes that contradict each other must not be given memory.
        with torch.device("meta"):
            target = found.layout.build(found.arguments).state_dict()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise opened.refuse(f"it looks like {found.title}, but no such network can be built: {error}") from error
    plan = _make_plan(opened, found.names, found.ignored, target, **options)
    _raise_problems(opened, plan.problems, f"it looks like {found.title}, but it does not fit")
    with torch.random.fork_rng(devices=[]):
        network = found.layout.build(found.arguments)
    _carry_out(opened, plan, network.state_dict(keep_vars=True))
    network.eval()
    if found.arguments.get("deep_supervision"):
        network.decoder.deep_supervision = False  # type: ignore[union-attr]
    report = LoadReport(found.title, found.arguments, opened.label, plan.records)
    return (network, report) if return_report else network


def load_pretrained(
    model: nn.Module,
    source: Source,
    *,
    strict: bool = True,
    adapt_in_channels: bool = False,
    reset_head: bool = False,
    weights: str | None = None,
    limits: Limits | None = None,
) -> LoadReport:
    """Load weights into a network that exists, for transfer; all or nothing.

    The source may be the published file of the network itself, a file saved from it, or the file of a network that
    is a part of it: a VMamba file goes into the backbone of an XFMamba. What the file cannot have (norms of the
    feature maps, the parts of the network that are not the backbone) keeps its values; a classification head for
    which the network has no place is left out. Anything else that does not fit is an error.

    Args:
        model: the network; changed only if everything fits.
        source: path or state dict, as for :func:`from_published`.
        strict: False loads what fits by name and shape and reports the rest.
        adapt_in_channels: convert the first convolution to the image channels of ``model``, see
            :func:`adapt_input_channels`.
        reset_head: leave the head of ``model`` as it is, e.g. for other classes.
        weights: key under which the weights lie, e.g. ``"model_ema"``.
        limits: bounds of what the file may ask for.

    Returns:
        What became of every key.

    Raises:
        CheckpointError: if the file is damaged, unsafe or does not fit; ``model`` is unchanged then.
    """
    opened = _open(source, weights, limits)
    target = model.state_dict(keep_vars=True)
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError("`model` is on the meta device; build it with memory before loading weights")
    stripped = _strip_wrappers(opened.specs)
    options: dict[str, Any] = {
        "strict": strict,
        "adapt_in_channels": adapt_in_channels,
        "reset_head": reset_head,
    }
    own_layout = layout_of(model)
    if set(stripped.values()) == set(target):
        # Saved from such a network.
        if own_layout is not None:
            options.update(stem=own_layout.stem, head=own_layout.head, other_head=own_layout.other_head)
        plan = _make_plan(opened, stripped, {}, target, **options)
        _raise_problems(opened, plan.problems, "it does not fit the network")
        _carry_out(opened, plan, target)
        return LoadReport(type(model).__name__, {}, opened.label, plan.records)

    try:
        found = recognize({key: spec.shape for key, spec in opened.specs.items()})
    except CheckpointError as error:
        raise opened.refuse(error.reason) from error
    prefix, needed = _find_part(model, found, opened)
    options.update(
        prefix=prefix,
        stem=found.layout.stem,
        head=found.layout.head,
        other_head=found.layout.other_head,
        detachable=found.layout.detachable,
        optional=found.layout.optional,
        title=found.layout.title,
    )
    plan = _make_plan(opened, found.names, found.ignored, target, **options)
    _raise_problems(opened, plan.problems, _introduction(found, needed))
    if not plan.moves:
        raise opened.refuse(f"{_introduction(found, needed)}: not one tensor fits. Nothing was loaded")
    _carry_out(opened, plan, target, prefix)
    return LoadReport(found.title, found.arguments, opened.label, plan.records)


def _find_part(model: nn.Module, found: Recognized, opened: _Weights) -> tuple[str, dict[str, Any] | None]:
    """Return the name prefix of the network or of its part that the file is for, and that part's arguments."""
    classes = (found.layout.network(), *found.layout.part())
    parts = [name for name, module in model.named_modules() if isinstance(module, classes)]
    outer = [name for name in parts if not any(name != other and name.startswith(other) for other in parts)]
    if len(outer) != 1:
        raise opened.refuse(
            f"it holds {found.title}, which is no part of {type(model).__name__}"
            if not outer
            else f"it holds {found.title}, of which {type(model).__name__} has several parts: {', '.join(outer)}; load "
            "it into one of them"
        )
    module = model.get_submodule(outer[0])
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    try:
        needed = found.layout.arguments(shapes)
    except (LayoutError, IndexError, ZeroDivisionError):
        needed = None
    return f"{outer[0]}." if outer[0] else "", needed


def _introduction(found: Recognized, needed: dict[str, Any] | None) -> str:
    text = f"it holds {found.title}"
    if needed is not None:
        described = found.layout.describe(needed)
        if described != found.title:
            text += f"; this network needs {described}"
    return f"{text}; it does not fit"


def layout_of(model: nn.Module) -> Layout | None:
    """Return the published layout of a network, None if there is none."""
    exact = (entry for entry in LAYOUTS if type(model) is entry.network())
    return next(exact, None) or next((entry for entry in LAYOUTS if isinstance(model, entry.network())), None)


def to_published(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a network under the published names, in the published order.

    Modules that the published network registers several times appear as often; their tensors are shared.

    Args:
        model: a network whose parts all exist in the published one.

    Raises:
        ValueError: if the network has no published layout or parts that the published one does not have.
    """
    layout = layout_of(model)
    if layout is None:
        raise ValueError(f"`model` is a {type(model).__name__}, for which there is no published layout")
    state = model.state_dict()
    try:
        arguments = layout.arguments({key: tuple(value.shape) for key, value in state.items()})
    except LayoutError as error:
        raise ValueError(f"`model` has no published form: {error}") from error
    names = {key: layout.rename(key) for key in layout.published_keys(arguments)}
    extra = set(state) - set(names.values())
    lacking = set(names.values()) - set(state)
    if extra or lacking:
        raise ValueError(
            f"`model` differs from the published {layout.title}: "
            + "; ".join(
                part
                for part in (
                    extra and f"there is no published name for {_some(extra)}",
                    lacking and f"it lacks {_some(lacking)}",
                )
                if part
            )
        )
    return {key: state[name].detach() for key, name in names.items()}


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(f"`{name}`" for name in shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
