"""Weight files that their authors have published, and where. Nothing here is downloaded."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

_VMAMBA_V2 = "https://github.com/MzeroMiko/VMamba/releases/tag/%23v2cls"
_VMAMBA_V0 = "https://github.com/MzeroMiko/VMamba/releases/tag/%2320240218"
_NO_LICENCE = "none stated; ask the authors before you use them beyond private study"


@dataclass(frozen=True)
class Published:
    """A published weight file.

    Attributes:
        name: our name of the entry.
        file: name of the file as published; empty if the authors give a folder.
        page: where the authors offer it.
        licence: licence of the weights as stated by the authors.
        network: name for :func:`monai_mamba.networks.create_model`.
        parameters: number of parameters, None if the file could not be inspected.
        sha256: hash of the file; None where we know none. Make your own once with ``sha256sum`` and keep it.
        note: what to know before using it.
    """

    name: str
    file: str
    page: str
    licence: str
    network: str
    parameters: int | None = None
    sha256: str | None = None
    note: str = ""


CATALOGUE: tuple[Published, ...] = (
    Published(
        "vmamba_t",
        "vssm1_tiny_0230s_ckpt_epoch_264.pth",
        _VMAMBA_V2,
        "MIT",
        "vmamba_t",
        30_249_064,
        note="ImageNet-1k; the backbone of XFMamba-T",
    ),
    Published(
        "vmamba_s",
        "vssm_small_0229_ckpt_epoch_222.pth",
        _VMAMBA_V2,
        "MIT",
        "vmamba_s",
        50_147_752,
        note="ImageNet-1k; the backbone of XFMamba-S",
    ),
    Published(
        "vmamba_b",
        "vssm_base_0229_ckpt_epoch_237.pth",
        _VMAMBA_V2,
        "MIT",
        "vmamba_b",
        88_557_800,
        note="ImageNet-1k; the backbone of XFMamba-B",
    ),
    Published(
        "vmamba_t_s2l5",
        "vssm_tiny_0230_ckpt_epoch_262.pth",
        _VMAMBA_V2,
        "MIT",
        "vmamba_t_s2l5",
        30_705_832,
        note="ImageNet-1k; fits no XFMamba",
    ),
    Published(
        "vmamba_s_s1l20",
        "vssm1_small_0229s_ckpt_epoch_240.pth",
        _VMAMBA_V2,
        "MIT",
        "vmamba_s_s1l20",
        49_012_840,
        note="ImageNet-1k; fits no XFMamba",
    ),
    Published(
        "vmamba_b_s1l20",
        "vssm1_base_0229s_ckpt_epoch_225.pth",
        _VMAMBA_V2,
        "MIT",
        "vmamba_b_s1l20",
        86_614_504,
        note="ImageNet-1k; fits no XFMamba",
    ),
    Published(
        "vmamba_v0_t",
        "vssmtiny_dp01_ckpt_epoch_292.pth",
        _VMAMBA_V0,
        "MIT",
        "vmamba_v0_t",
        22_893_448,
        note="ImageNet-1k, first generation; named by an older XFMamba README but fits no XFMamba",
    ),
    Published(
        "vmamba_v0_s",
        "vssmsmall_dp03_ckpt_epoch_238.pth",
        _VMAMBA_V0,
        "MIT",
        "vmamba_v0_s",
        44_417_416,
        note="ImageNet-1k, first generation; named by an older XFMamba README but fits no XFMamba",
    ),
    Published(
        "vmamba_v0_b",
        "vssmbase_dp06_ckpt_epoch_241.pth",
        _VMAMBA_V0,
        "MIT",
        "vmamba_v0_b",
        76_254_056,
        note="ImageNet-1k, first generation; named by an older XFMamba README but fits no XFMamba",
    ),
    *(
        Published(
            f"xfmamba_{size}",
            "",
            "https://github.com/XZheng0427/XFMamba",
            _NO_LICENCE,
            f"xfmamba_{size}",
            parameters,
            note="MURA (2 outputs) and CheXpert (14 outputs); the CBIS-DDSM files were never published",
        )
        for size, parameters in (("t", 38_831_810), ("s", 58_730_498), ("b", 103_933_954))
    ),
    Published(
        "medmamba",
        "",
        "https://github.com/YubiaoYue/MedMamba",
        _NO_LICENCE,
        "medmamba_t",
        note="one file per data set on a page that asks for an account; files from before April 2024 are of another "
        "network and are refused",
    ),
    Published(
        "nnmamba",
        "",
        "https://github.com/lhaof/nnMamba",
        _NO_LICENCE,
        "nnmamba_seg",
        note="segmentation, classification and the nnU-Net v1 files in one folder",
    ),
)


def list_published(pattern: str = "*") -> list[Published]:
    """Return the published files whose name, file name or network fits a pattern like ``"vmamba*"``."""
    return [
        entry
        for entry in CATALOGUE
        if any(fnmatch.fnmatch(text, pattern) for text in (entry.name, entry.file, entry.network) if text)
    ]
