"""The layouts of published weight files: how to recognise each, and which network its names and shapes describe.

A layout works on *our* names: keys of a file are renamed first, with the table that stands beside the network
(``PUBLISHED_KEYS``), so a file in the published layout and one saved from our network are treated alike. What is
needed in the other direction is the list of published names, given the network's arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from monai_mamba.weights.catalogue import CATALOGUE

Shapes = Mapping[str, tuple[int, ...]]


class LayoutError(ValueError):
    """Names and shapes contradict each other."""


@dataclass(frozen=True)
class Layout:
    """One published layout.

    Attributes:
        name: short name.
        title: what to call it in messages.
        recognises: tells from the names (ours) whether a file has this layout.
        renames: published names to ours, applied in order with ``re.sub``.
        network: class of the network; a function, so that networks are imported when needed.
        arguments: reads the constructor's arguments from names (ours) and shapes.
        published_keys: names of the published state dict in its order, given the arguments.
        stem: name (ours) of the first convolution's weight.
        head: pattern of the names (ours) that depend on the number of classes.
        other_head: pattern of further names (ours) that only networks with one of several heads have.
        detachable: pattern of the names (ours) for which a larger network, of which this one is a part, has no place.
        optional: pattern of the names (ours) that a file may lack.
        part: classes of parts of larger networks for which such a file is meant too.
        variant: published name and file of a set of arguments, empty if it is none of the published ones.
    """

    name: str
    title: str
    recognises: Callable[[Set[str]], bool]
    renames: Callable[[], Sequence[tuple[str, str]]]
    network: Callable[[], type[nn.Module]]
    arguments: Callable[[Shapes], dict[str, Any]]
    published_keys: Callable[[Mapping[str, Any]], list[str]]
    stem: str
    head: str
    other_head: str = ""
    detachable: str = ""
    optional: str = r".*\.num_batches_tracked$"  # files of PyTorch before 0.4.1 have none
    part: Callable[[], tuple[type[nn.Module], ...]] = lambda: ()
    variant: Callable[[Mapping[str, Any]], str] = lambda arguments: ""

    def describe(self, arguments: Mapping[str, Any]) -> str:
        """Return what to call a network with these arguments, with the published file if there is one."""
        return self.variant(arguments) or self.title

    def rename(self, key: str) -> str:
        """Return our name for a published one; our own names stay as they are."""
        for pattern, replacement in self.renames():
            key = re.sub(pattern, replacement, key)
        return key

    def build(self, arguments: Mapping[str, Any]) -> nn.Module:
        """Build the network on the current default device."""
        return self.network()(**arguments)


# Helpers to read arguments

_MAX_MODULES = 256


def shape_of(shapes: Shapes, key: str, ndim: int | None = None) -> tuple[int, ...]:
    """Return the shape of a tensor that must be there, with at least ``ndim`` axes."""
    shape = shapes.get(key)
    if shape is None:
        raise LayoutError(f"`{key}` is missing")
    if ndim is not None and len(shape) < ndim:
        raise LayoutError(f"`{key}` has shape {shape}, expected at least {ndim} axes")
    return shape


def count(shapes: Shapes, pattern: str) -> int:
    """Return how many modules ``pattern`` numbers among the names; they must be numbered without a gap."""
    numbers = {int(match[1]) for key in shapes if (match := re.match(pattern, key))}
    # A few names must not be able to ask for a network of a million blocks.
    if len(numbers) > _MAX_MODULES or numbers != set(range(len(numbers))):
        raise LayoutError(f"its modules `{pattern}` are numbered with gaps or are more than {_MAX_MODULES}")
    return len(numbers)


def has(keys: Set[str], pattern: str) -> bool:
    """Tell whether a name begins with ``pattern``."""
    return any(re.match(pattern, key) for key in keys)


# Helpers to list published names


def _norm(prefix: str) -> Iterator[str]:
    yield from (f"{prefix}.{name}" for name in ("weight", "bias"))


def _batch_norm(prefix: str) -> Iterator[str]:
    yield from _norm(prefix)
    yield from (f"{prefix}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked"))


def _mamba(prefix: str) -> Iterator[str]:
    yield from (f"{prefix}.{name}" for name in ("A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias"))
    yield from (f"{prefix}.{name}" for name in ("x_proj.weight", "dt_proj.weight", "dt_proj.bias", "out_proj.weight"))


def _double_conv(prefix: str) -> Iterator[str]:
    for conv, norm in ((0, 1), (3, 4)):
        yield from _norm(f"{prefix}.conv.{conv}")
        yield from _batch_norm(f"{prefix}.conv.{norm}")


# nnMamba


def _mamba_layer(prefix: str, mixer: str) -> Iterator[str]:
    yield f"{prefix}.nin.weight"
    if mixer != "single":
        yield f"{prefix}.nin2.weight"
        yield from _batch_norm(f"{prefix}.norm2")
    yield from _batch_norm(f"{prefix}.norm")
    yield from _mamba(f"{prefix}.mamba")


def _residual_stage(prefix: str, num_blocks: int, mixer: str | None) -> Iterator[str]:
    for i in range(num_blocks):
        for j in (1, 2):
            yield f"{prefix}.{i}.conv{j}.weight"
            yield from _batch_norm(f"{prefix}.{i}.bn{j}")
        if i == 0:
            yield f"{prefix}.{i}.downsample.0.weight"
            yield from _batch_norm(f"{prefix}.{i}.downsample.1")
        elif mixer is not None:
            yield from _mamba_layer(f"{prefix}.{i}.mamba_layer", mixer)


def _nnmamba_encoder_arguments(shapes: Shapes) -> dict[str, Any]:
    stem = shape_of(shapes, "encoder.stem.conv1.weight", 4)
    arguments: dict[str, Any] = {
        "spatial_dims": len(stem) - 2,
        "in_channels": stem[1],
        "init_filters": stem[0],
        "num_blocks": count(shapes, r"encoder\.stages\.0\.blocks\.(\d+)\."),
    }
    mixers = r"encoder\.(stages\.0\.|stem_)mixer\."
    if has(shapes.keys(), mixers):
        if not has(shapes.keys(), mixers + r"mamba\."):
            arguments["mixer"] = "none"
        elif not has(shapes.keys(), mixers + r"proj_out\."):
            arguments["mixer"] = "single"
    if "encoder.stem.norm1.running_mean" not in shapes:
        arguments["norm"] = "instance"
    return arguments


def _nnmamba_seg_arguments(shapes: Shapes) -> dict[str, Any]:
    arguments = _nnmamba_encoder_arguments(shapes)
    if "decoder.full_resolution.conv1.weight" in shapes:
        arguments["head"] = "conv1x1"
        arguments["out_channels"] = shape_of(shapes, "decoder.seg_layers.0.weight", 4)[0]
    else:
        arguments["out_channels"] = shape_of(shapes, "decoder.seg_layers.0.conv1.weight", 4)[0]
    if "decoder.seg_layers.1.weight" in shapes:
        arguments["deep_supervision"] = True
    return arguments


def _nnmamba_landmark_arguments(shapes: Shapes) -> dict[str, Any]:
    arguments = _nnmamba_seg_arguments(shapes)
    arguments["num_landmarks"] = arguments.pop("out_channels")
    return arguments


def _nnmamba_seg_keys(arguments: Mapping[str, Any]) -> list[str]:
    def keys() -> Iterator[str]:
        yield from _double_conv("in_conv")
        for i in (1, 2, 3):
            yield from _norm(f"att{i}.layer1")
            yield from _norm(f"att{i}.layer2")
            yield from _residual_stage(f"layer{i}", arguments["num_blocks"], arguments.get("mixer", "mamba"))
        for i in (5, 6, 7, 8):
            yield from _double_conv(f"conv{i}")
        if arguments.get("deep_supervision") and arguments.get("mixer") == "single":
            for i in (1, 2, 3):
                yield from _norm(f"ds{i}_cls_conv")

    return list(keys())


def _nnmamba_cls_arguments(shapes: Shapes) -> dict[str, Any]:
    arguments = _nnmamba_encoder_arguments(shapes)
    arguments["num_classes"] = shape_of(shapes, "head.3.weight", 2)[0]
    arguments["sequential_head"] = has(shapes.keys(), r"sequential_head\.")
    return arguments


def _nnmamba_cls_keys(arguments: Mapping[str, Any]) -> list[str]:
    def keys() -> Iterator[str]:
        yield from _double_conv("in_conv")
        yield from _mamba_layer("mamba_layer_stem", "mamba")
        for i in (1, 2, 3):
            yield from _residual_stage(f"layer{i}", arguments["num_blocks"], None)
        if arguments["sequential_head"]:
            yield from _mamba("mamba_seq.mamba")
        yield from _norm("mlp.0")
        yield from _norm("mlp.3")

    return list(keys())


def _nnmamba_renames() -> Sequence[tuple[str, str]]:
    from monai_mamba.networks.nnmamba import PUBLISHED_KEYS

    return PUBLISHED_KEYS


def _nnmamba_seg() -> type[nn.Module]:
    from monai_mamba.networks.nnmamba import NNMambaSeg

    return NNMambaSeg


def _nnmamba_landmark() -> type[nn.Module]:
    from monai_mamba.networks.nnmamba import NNMambaLandmark

    return NNMambaLandmark


def _nnmamba_classifier() -> type[nn.Module]:
    from monai_mamba.networks.nnmamba import NNMambaClassifier

    return NNMambaClassifier


# MedMamba


def _is_medmamba(keys: Set[str]) -> bool:
    # The first VMamba files have the same names, but a norm before the head and no convolution branch.
    return has(keys, r"layers\.\d+\.blocks\.\d+\.conv_branch\.") or (
        has(keys, r"layers\.\d+\.blocks\.\d+\.op\.") and has(keys, r"patch_embed\.proj\.") and not has(keys, r"norm\.")
    )


def _medmamba_arguments(shapes: Shapes) -> dict[str, Any]:
    stem = shape_of(shapes, "patch_embed.proj.weight", 4)
    num_stages = count(shapes, r"layers\.(\d+)\.")
    depths = tuple(count(shapes, rf"layers\.{i}\.blocks\.(\d+)\.") for i in range(num_stages))
    if num_stages == 0 or min(depths) == 0:
        raise LayoutError(f"its stages have {depths} blocks")
    norm = shape_of(shapes, "layers.0.blocks.0.norm.weight", 1)[0]
    arguments: dict[str, Any] = {
        "in_channels": stem[1],
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
        "depths": depths,
        "dims": tuple(stem[0] * 2**i for i in range(num_stages)),
        "patch_size": stem[2],
    }
    if has(shapes.keys(), r"layers\.\d+\.blocks\.\d+\.op\.(A_logs|x_proj_weight)"):
        arguments["d_state"] = shape_of(shapes, "layers.0.blocks.0.op.A_logs", 2)[1]
    else:
        arguments["mixer"] = "none"
    # The ablations of the paper's table 7; whether channels are shuffled leaves no trace in the file.
    if norm == stem[0]:
        arguments["channel_split"] = False
        arguments["with_conv_branch"] = "layers.0.blocks.0.conv_branch.0.weight" in shapes
    return arguments


def _medmamba_keys(arguments: Mapping[str, Any]) -> list[str]:
    def keys() -> Iterator[str]:
        yield from _norm("patch_embed.proj")
        yield from _norm("patch_embed.norm")
        for i, depth in enumerate(arguments["depths"]):
            for j in range(depth):
                block = f"layers.{i}.blocks.{j}"
                yield from _norm(f"{block}.ln_1")
                scan = f"{block}.self_attention"
                yield from (f"{scan}.{name}" for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"))
                yield from (f"{scan}.{name}" for name in ("A_logs", "Ds", "in_proj.weight"))
                yield from _norm(f"{scan}.conv2d")
                yield from _norm(f"{scan}.out_norm")
                yield f"{scan}.out_proj.weight"
                if arguments.get("with_conv_branch", True):
                    for number in (0, 1, 2, 4, 5, 7):
                        names = _batch_norm if number in (0, 2, 5) else _norm
                        yield from names(f"{block}.conv33conv33conv11.{number}")
            if i + 1 < len(arguments["depths"]):
                yield f"layers.{i}.downsample.reduction.weight"
                yield from _norm(f"layers.{i}.downsample.norm")
        if arguments["num_classes"]:
            yield from _norm("head")

    return list(keys())


def _medmamba_renames() -> Sequence[tuple[str, str]]:
    from monai_mamba.networks.medmamba import PUBLISHED_KEYS

    return PUBLISHED_KEYS


def _medmamba() -> type[nn.Module]:
    from monai_mamba.networks.medmamba import MedMamba

    return MedMamba


# VMamba


def _scan_keys(prefix: str) -> Iterator[str]:
    names = ("x_proj_weight", "A_logs", "Ds", "dt_projs_weight", "dt_projs_bias")
    yield from (f"{prefix}.{name}" for name in names)


def _vmamba_arguments(shapes: Shapes) -> dict[str, Any]:
    stem = shape_of(shapes, "patch_embed.0.weight", 4)
    is_overlap = "patch_embed.5.weight" in shapes
    dim = shape_of(shapes, "patch_embed.5.weight", 4)[0] if is_overlap else stem[0]
    num_stages = count(shapes, r"layers\.(\d+)\.")
    depths = tuple(count(shapes, rf"layers\.{i}\.blocks\.(\d+)\.") for i in range(num_stages))
    if num_stages == 0 or min(depths) == 0:
        raise LayoutError(f"its stages have {depths} blocks")
    block = "layers.0.blocks.0"
    d_inner = shape_of(shapes, f"{block}.op.out_norm.weight", 1)[0]
    hidden = shapes.get(f"{block}.mlp.fc1.weight", (0,))[0]
    is_merge = "layers.0.downsample.reduction.weight" in shapes
    return {
        "in_channels": stem[1],
        "num_classes": shapes["classifier.head.weight"][0] if "classifier.head.weight" in shapes else 0,
        "depths": depths,
        "dims": tuple(dim * 2**i for i in range(num_stages)),
        "d_state": shape_of(shapes, f"{block}.op.A_logs", 2)[1],
        "ssm_ratio": d_inner / dim,
        "mlp_ratio": hidden / dim,
        "gate": shape_of(shapes, f"{block}.op.in_proj.weight", 2)[0] == 2 * d_inner,
        "stem": "overlap" if is_overlap else "patch",
        "downsample": "merge" if is_merge else "conv",
        # The first generation drops what does not fill a patch.
        "odd_size": "crop" if is_merge else "pad",
    }


def _vmamba_body_keys(arguments: Mapping[str, Any]) -> Iterator[str]:
    for number in (0, 2, 5, 7) if arguments["stem"] == "overlap" else (0, 2):
        yield from _norm(f"patch_embed.{number}")
    for i, depth in enumerate(arguments["depths"]):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            yield from _norm(f"{block}.norm")
            yield from _scan_keys(f"{block}.op")
            if arguments["gate"]:
                yield f"{block}.op.in_proj.weight"
                yield from _norm(f"{block}.op.conv2d")
                yield from _norm(f"{block}.op.out_norm")
            else:
                yield from _norm(f"{block}.op.out_norm")
                yield f"{block}.op.in_proj.weight"
                yield f"{block}.op.conv2d.weight"
            yield f"{block}.op.out_proj.weight"
            if arguments["mlp_ratio"]:
                yield from _norm(f"{block}.norm2")
                yield from _norm(f"{block}.mlp.fc1")
                yield from _norm(f"{block}.mlp.fc2")
        if i + 1 < len(arguments["depths"]):
            if arguments["downsample"] == "conv":
                yield from _norm(f"layers.{i}.downsample.1")
                yield from _norm(f"layers.{i}.downsample.3")
            else:
                yield f"layers.{i}.downsample.reduction.weight"
                yield from _norm(f"layers.{i}.downsample.norm")


def _is_vmamba(keys: Set[str]) -> bool:
    return has(keys, r"layers\.\d+\.blocks\.\d+\.op\.") and has(keys, r"patch_embed\.[02]\.")


def _vmamba_backbone_arguments(shapes: Shapes) -> dict[str, Any]:
    arguments = _vmamba_arguments(shapes)
    del arguments["num_classes"]
    return arguments


def _vmamba_backbone_keys(arguments: Mapping[str, Any]) -> list[str]:
    norms = [key for i in range(len(arguments["depths"])) for key in _norm(f"outnorm{i}")]
    return [*_vmamba_body_keys(arguments), *norms]


def _vmamba_keys(arguments: Mapping[str, Any]) -> list[str]:
    head = list(_norm("classifier.head")) if arguments["num_classes"] else []
    return [*_vmamba_body_keys(arguments), *_norm("classifier.norm"), *head]


#: (stem, blocks of the third stage, width, inner width over width) to the name and the entry of the catalogue.
_VMAMBA_VARIANTS = {
    ("overlap", 8, 96, 1.0): ("VMamba-T s1l8", "vmamba_t"),
    ("overlap", 5, 96, 2.0): ("VMamba-T s2l5", "vmamba_t_s2l5"),
    ("overlap", 15, 96, 2.0): ("VMamba-S s2l15", "vmamba_s"),
    ("overlap", 20, 96, 1.0): ("VMamba-S s1l20", "vmamba_s_s1l20"),
    ("overlap", 15, 128, 2.0): ("VMamba-B s2l15", "vmamba_b"),
    ("overlap", 20, 128, 1.0): ("VMamba-B s1l20", "vmamba_b_s1l20"),
    ("patch", 9, 96, 2.0): ("VMamba-T", "vmamba_v0_t"),
    ("patch", 27, 96, 2.0): ("VMamba-S", "vmamba_v0_s"),
    ("patch", 27, 128, 2.0): ("VMamba-B", "vmamba_v0_b"),
}


def _vmamba_variant(arguments: Mapping[str, Any]) -> str:
    depths = arguments["depths"]
    third = depths[2] if len(depths) == 4 and (depths[0], depths[1], depths[3]) == (2, 2, 2) else 0
    generation = "first generation (v0)" if arguments["stem"] == "patch" else "second generation (v2)"
    found = _VMAMBA_VARIANTS.get((arguments["stem"], third, arguments["dims"][0], arguments["ssm_ratio"]))
    if found is None:
        shown = f"depths {depths}, width {arguments['dims'][0]}, inner width x{arguments['ssm_ratio']:g}"
        return f"a VMamba of the {generation} with {shown}"
    name, entry = found
    file = next(published.file for published in CATALOGUE if published.name == entry)
    return f"{name} of the {generation}, published as {file}"


def _vmamba_renames() -> Sequence[tuple[str, str]]:
    from monai_mamba.networks.vmamba import PUBLISHED_KEYS

    return PUBLISHED_KEYS


def _vmamba() -> type[nn.Module]:
    from monai_mamba.networks.vmamba import VMamba

    return VMamba


def _vmamba_backbone() -> type[nn.Module]:
    from monai_mamba.networks.vmamba import VMambaBackbone

    return VMambaBackbone


def _vmamba_encoder() -> tuple[type[nn.Module], ...]:
    from monai_mamba.networks.vmamba import VMambaEncoder

    return (VMambaEncoder,)


# XFMamba


def _xfmamba_arguments(shapes: Shapes) -> dict[str, Any]:
    backbone = {key[len("backbone.") :]: shape for key, shape in shapes.items() if key.startswith("backbone.")}
    body = _vmamba_arguments(backbone)
    channels = body["dims"][-1]
    arguments = {name: body[name] for name in ("in_channels", "depths", "dims", "ssm_ratio")}
    arguments["num_classes"] = shapes["head.weight"][0] if "head.weight" in shapes else 0
    if "deep_fusion.A_logs" in shapes:
        arguments["fusion_d_state"] = shape_of(shapes, "deep_fusion.A_logs", 2)[1]
        arguments["fusion_ssm_ratio"] = shape_of(shapes, "deep_fusion.out_norm.weight", 1)[0] / channels
    else:
        arguments["fusion"] = "early" if "early_fusion.0.weight" in shapes else "late"
    return arguments


def _xfmamba_keys(arguments: Mapping[str, Any]) -> list[str]:
    if arguments.get("fusion", "cross") != "cross":
        raise LayoutError("the names of the published baselines are not known")

    def keys() -> Iterator[str]:
        body = {**arguments, "stem": "overlap", "downsample": "conv", "gate": False, "mlp_ratio": 4.0}
        yield from (f"mamba_feature_extrac.{key}" for key in _vmamba_backbone_keys(body))
        yield from _batch_norm("shallow_mamba_fusion.norm")
        shallow = "shallow_mamba_fusion.shallowfuseSS2D"
        yield from _scan_keys(shallow)
        yield f"{shallow}.in_proj.weight"
        yield from _norm(f"{shallow}.conv2d")
        yield from _norm(f"{shallow}.out_norm")
        yield from (f"{shallow}.{name}.weight" for name in ("out_proj", "fc1.0", "fc1.2"))
        yield from _norm("fusemamba.blocks.0.norm")
        deep = "fusemamba.blocks.0.self_attention"
        yield from _scan_keys(deep)
        yield f"{deep}.in_proj.weight"
        yield f"{deep}.in_proj_sec.weight"
        yield from _norm(f"{deep}.conv2d")
        yield from _norm(f"{deep}.out_norm")
        yield f"{deep}.out_proj.weight"
        yield from _norm("final_conv")
        if arguments["num_classes"]:
            yield from _norm("classifier.head")

    return list(keys())


def _xfmamba_renames() -> Sequence[tuple[str, str]]:
    from monai_mamba.networks.xfmamba import PUBLISHED_KEYS

    return PUBLISHED_KEYS


def _two_view_encoder() -> tuple[type[nn.Module], ...]:
    from monai_mamba.networks.segmentation import TwoViewEncoder

    return (TwoViewEncoder,)


def _xfmamba() -> type[nn.Module]:
    from monai_mamba.networks.xfmamba import XFMamba

    return XFMamba


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "nnmamba_seg",
        "nnMamba segmentation",
        lambda keys: has(keys, r"encoder\.stages\.") and has(keys, r"decoder\.seg_layers\.0\."),
        _nnmamba_renames,
        _nnmamba_seg,
        _nnmamba_seg_arguments,
        _nnmamba_seg_keys,
        stem="encoder.stem.conv1.weight",
        head=r"decoder\.seg_layers\.",
        other_head=r"decoder\.full_resolution\.",
    ),
    Layout(
        "nnmamba_landmark",
        "nnMamba landmark detection",
        lambda keys: has(keys, r"encoder\.stages\.") and has(keys, r"decoder\.seg_layers\.0\."),
        _nnmamba_renames,
        _nnmamba_landmark,
        _nnmamba_landmark_arguments,
        _nnmamba_seg_keys,
        stem="encoder.stem.conv1.weight",
        head=r"decoder\.seg_layers\.",
        other_head=r"decoder\.full_resolution\.",
    ),
    Layout(
        "nnmamba_cls",
        "nnMamba classification",
        lambda keys: has(keys, r"encoder\.stem_mixer\."),
        _nnmamba_renames,
        _nnmamba_classifier,
        _nnmamba_cls_arguments,
        _nnmamba_cls_keys,
        stem="encoder.stem.conv1.weight",
        head=r"head\.3\.",
    ),
    Layout(
        "medmamba",
        "MedMamba",
        _is_medmamba,
        _medmamba_renames,
        _medmamba,
        _medmamba_arguments,
        _medmamba_keys,
        stem="patch_embed.proj.weight",
        head=r"head\.",
        detachable=r"head\.",
    ),
    Layout(
        "xfmamba",
        "XFMamba",
        lambda keys: has(keys, r"backbone\.layers\.\d+\.blocks\.\d+\.op\."),
        _xfmamba_renames,
        _xfmamba,
        _xfmamba_arguments,
        _xfmamba_keys,
        stem="backbone.patch_embed.0.weight",
        head=r"head\.",
        detachable=r"(head|final_conv)\.",
        part=_two_view_encoder,
    ),
    Layout(
        "vmamba_backbone",
        "VMamba without its head",
        lambda keys: _is_vmamba(keys) and not has(keys, r"classifier\."),
        _vmamba_renames,
        _vmamba_backbone,
        _vmamba_backbone_arguments,
        _vmamba_backbone_keys,
        stem="patch_embed.0.weight",
        head=r"classifier\.head\.",
        detachable=r"classifier\.",
        optional=r"outnorm\d\.(weight|bias)$",
        part=_vmamba_encoder,
        variant=_vmamba_variant,
    ),
    Layout(
        "vmamba",
        "VMamba",
        _is_vmamba,
        _vmamba_renames,
        _vmamba,
        _vmamba_arguments,
        _vmamba_keys,
        stem="patch_embed.0.weight",
        head=r"classifier\.head\.",
        detachable=r"classifier\.",
        optional=r"outnorm\d\.(weight|bias)$",
        part=_vmamba_encoder,
        variant=_vmamba_variant,
    ),
)
