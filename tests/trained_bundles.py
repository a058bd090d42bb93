"""Trained bundles for tests: the configurations of the repository, a small network, weights without a training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from monai.bundle import ConfigParser

ROOT = Path(__file__).parents[1] / "bundles"
#: Entries that make the networks small; written into the configuration, so that a test needs no overrides.
SMALL = {
    "medmamba": {"network_def#depths": [1, 1], "network_def#dims": 8, "default_card#image_size": 32},
    "xfmamba": {"network_def#depths": [1, 1], "network_def#dims": 16, "default_card#image_size": 32},
    "nnmamba_adni": {
        "network_def#init_filters": 4,
        "network_def#num_blocks": 1,
        "default_card#image_size": [16, 24, 16],
    },
    "nnmamba_seg": {"network_def#network#num_blocks": 2},
    "nnmamba_landmark": {"network_def#num_blocks": 2},
}


def make_trained(name: str, folder: Path, network: torch.nn.Module | None = None, **card) -> Path:
    """Write the bundle ``name`` with weights, those of ``network`` or random ones, and return its folder.

    Args:
        name: bundle.
        folder: where its folder is made.
        network: gives the weights.
        card: entries of ``model.json``.
    """
    bundle = folder / name
    shutil.copytree(ROOT / name / "configs", bundle / "configs")
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    parser.update(SMALL[name])
    (bundle / "configs" / "inference.json").write_text(json.dumps(parser.get()))
    (bundle / "models").mkdir()
    (bundle / "models" / "model.json").write_text(json.dumps({"epoch": 1, **card}))
    if network is None:
        parser.update({"bundle_root": str(bundle)})
        torch.manual_seed(0)
        network = parser.get_parsed_content("network_def")
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    return bundle
