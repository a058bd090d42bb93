"""Networks, one family per file; they need torch alone."""

from __future__ import annotations

from monai_mamba.networks.medmamba import MedMamba
from monai_mamba.networks.nnmamba import NNMambaClassifier, NNMambaLandmark, NNMambaSeg
from monai_mamba.networks.registry import create_model, list_models, model_entry
from monai_mamba.networks.segmentation import MedMambaSeg, VMambaSeg, XFMambaSeg
from monai_mamba.networks.vmamba import VMamba, VMambaBackbone
from monai_mamba.networks.xfmamba import XFMamba

__all__ = [
    "MedMamba",
    "MedMambaSeg",
    "NNMambaClassifier",
    "NNMambaLandmark",
    "NNMambaSeg",
    "VMamba",
    "VMambaBackbone",
    "VMambaSeg",
    "XFMamba",
    "XFMambaSeg",
    "create_model",
    "list_models",
    "model_entry",
]
