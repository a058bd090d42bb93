"""Networks by name: every variant as data, with where its numbers come from.

network = create_model("medmamba_t", num_classes=6, in_channels=1)
list_models("xfmamba*")
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn

from monai_mamba.networks.medmamba import MedMamba
from monai_mamba.networks.nnmamba import NNMambaClassifier, NNMambaLandmark, NNMambaSeg
from monai_mamba.networks.segmentation import MedMambaSeg, VMambaSeg, XFMambaSeg
from monai_mamba.networks.vmamba import VMamba
from monai_mamba.networks.xfmamba import XFMamba

NNMAMBA = "Gong et al., nnMamba, 2024, arXiv:2402.03526"
MEDMAMBA = "Yue and Li, MedMamba, 2024, arXiv:2403.03849"
VMAMBA = "Liu et al., VMamba, 2024, arXiv:2401.10166"
XFMAMBA = "Zheng et al., XFMamba, 2025, arXiv:2503.02619"
OURS = "this project; the encoder is the published one"


@dataclass(frozen=True)
class Published:
    """Figures a paper or its code states for a network.

    Attributes:
        parameters: as printed, e.g. ``"15.2 M"``; empty if nothing is printed.
        flops: as printed, e.g. ``"2.0 G"``.
        arguments: what the network they belong to has beyond the variant's arguments.
        note: what the figures count, and why ours differ where they do.
    """

    parameters: str = ""
    flops: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class ModelEntry:
    """One variant of a network.

    Attributes:
        name: the name for :func:`create_model`.
        family: ``"nnmamba"``, ``"medmamba"``, ``"vmamba"`` or ``"xfmamba"``.
        constructor: class of the network.
        arguments: what the variant fixes; arguments of :func:`create_model` go before these.
        task: ``"classification"``, ``"two-view classification"``, ``"segmentation"`` or ``"landmarks"``.
        source: paper, section or table, or where else the numbers come from.
        input_shape: a typical input, ``(B, C, *spatial)``, the one FLOPs in papers belong to.
        parameters: exact number of parameters with the variant's own arguments.
        aliases: other names :func:`create_model` takes, among them the published ones.
        published: figures of the paper.
        note: what a user should know.
    """

    name: str
    family: str
    constructor: Callable[..., nn.Module]
    arguments: Mapping[str, Any]
    task: str
    source: str
    input_shape: tuple[int, ...]
    parameters: int
    aliases: tuple[str, ...] = ()
    published: Published = field(default_factory=Published)
    note: str = ""


_REGISTRY: dict[str, ModelEntry] = {}
_ALIASES: dict[str, str] = {}


def register_model(entry: ModelEntry) -> ModelEntry:
    """Add a variant; its name and aliases must be new.

    Raises:
        ValueError: if one of them is taken.
    """
    for name in (entry.name, *entry.aliases):
        if _key(name) in _ALIASES:
            raise ValueError(f"`name` {name!r} is registered already, for {_ALIASES[_key(name)]!r}; names are unique")
    _REGISTRY[entry.name] = entry
    _ALIASES.update({_key(name): entry.name for name in (entry.name, *entry.aliases)})
    return entry


def list_models(pattern: str = "*", *, with_aliases: bool = False) -> list[str]:
    """Return the names that match a shell pattern, sorted.

    Args:
        pattern: e.g. ``"xfmamba*"``; upper and lower case are the same.
        with_aliases: list the other names :func:`create_model` takes too.
    """
    names = [n for e in _REGISTRY.values() for n in ((e.name, *e.aliases) if with_aliases else (e.name,))]
    return sorted(name for name in names if fnmatch.fnmatchcase(name.lower(), pattern.lower()))


def model_entry(name: str) -> ModelEntry:
    """Return what is known about a variant, by its name or one of its aliases.

    Raises:
        ValueError: if there is none; the message names the nearest ones.
    """
    try:
        return _REGISTRY[_ALIASES[_key(name)]]
    except KeyError:
        near = difflib.get_close_matches(_key(name), _ALIASES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "list_models() gives all names"
        raise ValueError(f"`name` {name!r} is not a known network; {hint}") from None


def create_model(name: str, **arguments: Any) -> nn.Module:
    """Build a network by name, freshly initialised.

    Args:
        name: a name of :func:`list_models` or an alias, the published ones included.
        arguments: of the network's class; they go before what the variant fixes.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if the network has no such argument.

    Example:
        >>> network = create_model("medmamba_t", num_classes=6, in_channels=1)
    """
    entry = model_entry(name)
    known = inspect.signature(entry.constructor).parameters
    for argument in arguments:
        if argument not in known:
            raise TypeError(f"{name!r} has no argument `{argument}`; it has {', '.join(known)}")
    return entry.constructor(**{**entry.arguments, **arguments})


def _key(name: str) -> str:
    return name.lower().replace("-", "_")


def _add(name: str, family: str, constructor: Callable[..., nn.Module], arguments: dict[str, Any], **rest: Any) -> None:
    register_model(ModelEntry(name, family, constructor, MappingProxyType(arguments), **rest))


_NNMAMBA_NOTE = (
    "printed for 16 classes at 128^3, by a counter that sees nothing inside the Mamba layers and counts the layers "
    "around them twice"
)
_MEDMAMBA_NOTE = "printed: MACs of convolutions, linear layers and norms, without the scans and their projections"
_MEDMAMBA_DEPTH_NOTE = (
    _MEDMAMBA_NOTE + "; the printed figures fit a network with four more blocks in stage 3 ({}), not the depths of "
    "the paper's table 1 and of the released code, which are these"
)
_VMAMBA_NOTE = "printed: MACs with the scans added, 9 B L D N + B L D"
_XFMAMBA_NOTE = "printed beside a figure of the released code, which does not reproduce it"

_add(
    "nnmamba_seg",
    "nnmamba",
    NNMambaSeg,
    {},
    task="segmentation",
    source=f"{NNMAMBA}, section 2; released code",
    input_shape=(1, 1, 128, 128, 128),
    parameters=15_940_614,
    aliases=("nnMambaSeg", "nnmamba"),
    published=Published("15.55 M", "141.14 G", {"out_channels": 16}, _NNMAMBA_NOTE),
)
_add(
    "nnmamba_seg_2d",
    "nnmamba",
    NNMambaSeg,
    {"spatial_dims": 2},
    task="segmentation",
    source="this project; the published network with two-dimensional convolutions",
    input_shape=(1, 1, 256, 256),
    parameters=5_856_510,
)
_add(
    "nnmamba_landmark",
    "nnmamba",
    NNMambaLandmark,
    {},
    task="landmarks",
    source=f"{NNMAMBA}, section 3.3; released code of the LFC data set",
    input_shape=(1, 1, 128, 128, 128),
    parameters=15_944_958,
)
_add(
    "nnmamba_cls",
    "nnmamba",
    NNMambaClassifier,
    {},
    task="classification",
    source=f"{NNMAMBA}, section 2; released code",
    input_shape=(1, 1, 112, 136, 112),
    parameters=12_876_321,
    aliases=("nnMambaEncoder", "nnmamba_classifier"),
)
_add(
    "nnmamba_cls_sequential",
    "nnmamba",
    NNMambaClassifier,
    {"sequential_head": True},
    task="classification",
    source=f"{NNMAMBA}, section 2; code of July 2024, with channel-sequential learning",
    input_shape=(1, 1, 112, 136, 112),
    parameters=12_905_633,
)

_MEDMAMBA_SIZES: dict[str, dict[str, Any]] = {
    "t": {"depths": (2, 2, 4, 2), "dims": 96},
    "s": {"depths": (2, 2, 8, 2), "dims": 96},
    "b": {"depths": (2, 2, 12, 2), "dims": 128},
    "s12": {"depths": (2, 2, 12, 2), "dims": 96},
    "b16": {"depths": (2, 2, 16, 2), "dims": 128},
}
for _size, _parameters, _figures in (
    ("t", 15_221_608, Published("15.2 M", "2.0 G", {}, _MEDMAMBA_NOTE)),
    ("s", 19_389_544, Published("23.5 M", "3.5 G", {}, _MEDMAMBA_DEPTH_NOTE.format("medmamba_s12"))),
    ("b", 40_883_688, Published("48.1 M", "7.4 G", {}, _MEDMAMBA_DEPTH_NOTE.format("medmamba_b16"))),
    ("s12", 23_557_480, Published("23.5 M", "3.5 G", {}, _MEDMAMBA_NOTE)),
    ("b16", 48_144_872, Published("48.1 M", "7.4 G", {}, _MEDMAMBA_NOTE)),
):
    _add(
        f"medmamba_{_size}",
        "medmamba",
        MedMamba,
        _MEDMAMBA_SIZES[_size],
        task="classification",
        source=f"{MEDMAMBA}, table 1" if len(_size) == 1 else f"{MEDMAMBA}, the sizes its tables count",
        input_shape=(1, 3, 224, 224),
        parameters=_parameters,
        aliases=("medmamba",) if _size == "t" else (),
        published=_figures,
    )
_ABLATIONS: tuple[tuple[str, dict[str, Any], int, Published], ...] = (
    (
        "ssm_only",
        {"channel_split": False, "with_conv_branch": False},
        16_913_032,
        Published("16.2 M", "2.0 G", {"num_classes": 9}, _MEDMAMBA_NOTE),
    ),
    (
        "sum",
        {"channel_split": False},
        52_316_872,
        Published("51.6 M", "7.4 G", {"num_classes": 9}, _MEDMAMBA_NOTE),
    ),
    (
        "no_shuffle",
        {"channel_shuffle": False},
        15_221_608,
        Published("14.5 M", "2.0 G", {"num_classes": 9}, _MEDMAMBA_NOTE),
    ),
)
for _suffix, _switches, _parameters, _figures in _ABLATIONS:
    _add(
        f"medmamba_t_{_suffix}",
        "medmamba",
        MedMamba,
        {**_MEDMAMBA_SIZES["t"], **_switches},
        task="classification",
        source=f"{MEDMAMBA}, table 7 (ablation)",
        input_shape=(1, 3, 224, 224),
        parameters=_parameters,
        published=_figures,
    )

_VMAMBA_V0 = {"d_state": 16, "ssm_ratio": 2.0, "mlp_ratio": 0.0, "gate": True, "stem": "patch", "downsample": "merge"}
_VMAMBA_SIZES: dict[str, dict[str, Any]] = {
    "t": {"depths": (2, 2, 8, 2), "dims": 96, "ssm_ratio": 1.0, "drop_path_rate": 0.2},
    "s": {"depths": (2, 2, 15, 2), "dims": 96, "ssm_ratio": 2.0, "drop_path_rate": 0.3},
    "b": {"depths": (2, 2, 15, 2), "dims": 128, "ssm_ratio": 2.0, "drop_path_rate": 0.6},
}
_VMAMBAS: tuple[tuple[str, dict[str, Any], int, tuple[str, ...], tuple[str, str]], ...] = (
    ("vmamba_t", _VMAMBA_SIZES["t"], 30_249_064, ("vmamba_t_s1l8", "vssm1_tiny_0230s"), ("30 M", "4.9 G")),
    ("vmamba_s", _VMAMBA_SIZES["s"], 50_147_752, ("vmamba_s_s2l15", "vssm_small_0229"), ("50 M", "8.7 G")),
    ("vmamba_b", _VMAMBA_SIZES["b"], 88_557_800, ("vmamba_b_s2l15", "vssm_base_0229"), ("89 M", "15.4 G")),
    (
        "vmamba_t_s2l5",
        {"depths": (2, 2, 5, 2), "dims": 96, "ssm_ratio": 2.0, "drop_path_rate": 0.2},
        30_705_832,
        ("vssm_tiny_0230",),
        ("", ""),
    ),
    (
        "vmamba_s_s1l20",
        {"depths": (2, 2, 20, 2), "dims": 96, "ssm_ratio": 1.0, "drop_path_rate": 0.3},
        49_012_840,
        ("vssm1_small_0229s",),
        ("", ""),
    ),
    (
        "vmamba_b_s1l20",
        {"depths": (2, 2, 20, 2), "dims": 128, "ssm_ratio": 1.0, "drop_path_rate": 0.5},
        86_614_504,
        ("vssm1_base_0229s",),
        ("", ""),
    ),
    (
        "vmamba_v0_t",
        {**_VMAMBA_V0, "depths": (2, 2, 9, 2), "dims": 96, "drop_path_rate": 0.1},
        22_893_448,
        ("vssmtiny_dp01",),
        ("", ""),
    ),
    (
        "vmamba_v0_s",
        {**_VMAMBA_V0, "depths": (2, 2, 27, 2), "dims": 96, "drop_path_rate": 0.3},
        44_417_416,
        ("vssmsmall_dp03",),
        ("", ""),
    ),
    (
        "vmamba_v0_b",
        {**_VMAMBA_V0, "depths": (2, 2, 27, 2), "dims": 128, "drop_path_rate": 0.6},
        76_254_056,
        ("vssmbase_dp06",),
        ("", ""),
    ),
)
for _name, _arguments, _parameters, _aliases, _printed in _VMAMBAS:
    _add(
        _name,
        "vmamba",
        VMamba,
        _arguments,
        task="classification",
        source=f"{VMAMBA}, released variants ({'first' if '_v0_' in _name else 'second'} generation)",
        input_shape=(1, 3, 224, 224),
        parameters=_parameters,
        aliases=_aliases,
        published=Published(*_printed, {}, _VMAMBA_NOTE) if _printed[0] else Published(),
    )

_XFMAMBAS: tuple[tuple[str, int, str, tuple[str, ...]], ...] = (
    ("t", 38_831_810, "10.13 G", ("xfmamba", "twoviewxfmamba_tiny")),
    ("s", 58_730_498, "16.73 G", ("dualfusionmambav13", "twoviewxfmamba", "twoviewxfmamba_small")),
    ("b", 103_933_954, "27.61 G", ("twoviewxfmamba_base",)),
)
for _size, _parameters, _flops, _aliases in _XFMAMBAS:
    _add(
        f"xfmamba_{_size}",
        "xfmamba",
        XFMamba,
        _VMAMBA_SIZES[_size],
        task="two-view classification",
        source=f"{XFMAMBA}; released code",
        input_shape=(1, 6, 224, 224),
        parameters=_parameters,
        aliases=_aliases,
        published=Published("", _flops, {}, _XFMAMBA_NOTE),
    )
_BASELINES: tuple[tuple[str, Callable[..., nn.Module], dict[str, Any], int, tuple[int, ...], str], ...] = (
    ("xfmamba_s_late", XFMamba, {"fusion": "late"}, 49_383_170, (1, 6, 224, 224), "twoviewlatejoinmamba"),
    ("xfmamba_s_early", XFMamba, {"fusion": "early"}, 49_381_805, (1, 6, 224, 224), "twoviewearlyfusionmamba"),
    ("xfmamba_s_single", VMamba, {"num_classes": 2}, 49_380_290, (1, 3, 224, 224), "singleviewmamba"),
)
for _name, _constructor, _arguments, _parameters, _shape, _alias in _BASELINES:
    _add(
        _name,
        "xfmamba",
        _constructor,
        {**_VMAMBA_SIZES["s"], **_arguments},
        task="classification" if "single" in _name else "two-view classification",
        source=f"{XFMAMBA}; baseline of the released code",
        input_shape=_shape,
        parameters=_parameters,
        aliases=(_alias,),
        note="the baseline without cross-fusion; it takes one view" if "single" in _name else "without cross-fusion",
    )

_SEGMENTATION: tuple[tuple[str, Callable[..., nn.Module], dict[str, Any], int, int], ...] = (
    ("medmamba_t_seg", MedMambaSeg, _MEDMAMBA_SIZES["t"], 1, 21_652_770),
    ("medmamba_s_seg", MedMambaSeg, _MEDMAMBA_SIZES["s"], 1, 25_820_706),
    ("medmamba_b_seg", MedMambaSeg, _MEDMAMBA_SIZES["b"], 1, 52_496_610),
    ("vmamba_t_seg", VMambaSeg, _VMAMBA_SIZES["t"], 1, 36_683_778),
    ("vmamba_s_seg", VMambaSeg, _VMAMBA_SIZES["s"], 1, 56_582_466),
    ("vmamba_b_seg", VMambaSeg, _VMAMBA_SIZES["b"], 1, 100_175_458),
    ("xfmamba_t_seg", XFMambaSeg, _VMAMBA_SIZES["t"], 2, 47_184_162),
    ("xfmamba_s_seg", XFMambaSeg, _VMAMBA_SIZES["s"], 2, 67_082_850),
    ("xfmamba_b_seg", XFMambaSeg, _VMAMBA_SIZES["b"], 2, 118_620_034),
)
for _name, _constructor, _arguments, _channels, _parameters in _SEGMENTATION:
    _add(
        _name,
        _name.split("_")[0],
        _constructor,
        _arguments,
        task="segmentation",
        source=OURS,
        input_shape=(1, _channels, 256, 256),
        parameters=_parameters,
    )
