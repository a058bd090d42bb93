"""Networks by name."""

from __future__ import annotations

import pytest
import torch

from monai_mamba.networks import MedMamba, create_model, list_models, model_entry
from monai_mamba.networks.registry import register_model


@pytest.mark.parametrize("name", list_models())
def test_every_name_builds_the_network_it_promises(name):
    entry = model_entry(name)
    with torch.device("meta"):
        network = create_model(name)
    assert isinstance(network, entry.constructor)
    assert sum(p.numel() for p in network.parameters()) == entry.parameters
    assert entry.source and name.startswith(entry.family)


def test_arguments_go_before_what_the_variant_fixes():
    network = create_model("medmamba_t", num_classes=6, in_channels=1, depths=(1, 1, 1, 1))
    assert isinstance(network, MedMamba)
    assert network.head.out_features == 6
    assert network.patch_embed.proj.in_channels == 1
    assert [len(stage.blocks) for stage in network.layers] == [1, 1, 1, 1]
    # What the variant fixes is left as it is.
    assert model_entry("medmamba_t").arguments["depths"] == (2, 2, 4, 2)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("dualfusionmambav13", "xfmamba_s"),
        ("twoviewxfmamba", "xfmamba_s"),
        ("twoviewxfmamba_tiny", "xfmamba_t"),
        ("twoviewxfmamba_base", "xfmamba_b"),
        ("nnMambaSeg", "nnmamba_seg"),
        ("nnMambaEncoder", "nnmamba_cls"),
        ("MedMamba-T", "medmamba_t"),
        ("XFMamba-B", "xfmamba_b"),
        ("vssm1_tiny_0230s", "vmamba_t"),
        ("vssmbase_dp06", "vmamba_v0_b"),
    ],
)
def test_published_names_are_accepted(alias, name):
    assert model_entry(alias).name == name


def test_list_models_matches_patterns():
    assert list_models("xfmamba_?") == ["xfmamba_b", "xfmamba_s", "xfmamba_t"]
    assert list_models("XFMamba_?") == list_models("xfmamba_?")
    assert list_models("twoview*") == []
    assert "twoviewxfmamba" in list_models("twoview*", with_aliases=True)
    assert list_models("resnet*") == []
    assert list_models() == sorted(list_models())


def test_unknown_name_and_argument_are_named_with_a_cure():
    with pytest.raises(ValueError, match=r"'medmamba_tt'.*did you mean medmamba_t"):
        create_model("medmamba_tt")
    with pytest.raises(ValueError, match="list_models"):
        create_model("zzzz")
    with pytest.raises(TypeError, match=r"`out_channels`.*num_classes"):
        create_model("medmamba_t", out_channels=2)


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match="registered already"):
        register_model(model_entry("xfmamba_t"))
