"""Mamba (selective state space) networks for medical imaging.

The package root imports nothing heavy: submodules are loaded when they are first used, so that
``import monai_mamba`` and ``monai-mamba --help`` do not pay for torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"

_SUBMODULES = ("errors", "evaluation", "layers", "networks", "nnunet", "ops", "training", "weights")

__all__ = ["__version__", *_SUBMODULES]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
