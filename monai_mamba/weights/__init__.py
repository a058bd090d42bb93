"""Weight files: read without risk, recognise, load, convert, write back."""

from __future__ import annotations

from monai_mamba.weights.catalogue import CATALOGUE, Published, list_published
from monai_mamba.weights.io import Limits, WeightFile, read_state_dict, write_safetensors
from monai_mamba.weights.loading import from_published, load_pretrained, recognize, to_published
from monai_mamba.weights.report import KeyRecord, LoadReport

__all__ = [
    "CATALOGUE",
    "KeyRecord",
    "Limits",
    "LoadReport",
    "Published",
    "WeightFile",
    "from_published",
    "list_published",
    "load_pretrained",
    "read_state_dict",
    "recognize",
    "to_published",
    "write_safetensors",
]
