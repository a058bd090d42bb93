"""The 2D segmentation networks on the encoders of MedMamba, VMamba and XFMamba."""

from __future__ import annotations

import pytest
import torch

from monai_mamba.layers.taps import extract_features
from monai_mamba.networks import MedMamba, MedMambaSeg, VMamba, VMambaSeg, XFMamba, XFMambaSeg

NETWORKS = [MedMambaSeg, VMambaSeg, XFMambaSeg]
SMALL = {"depths": (1, 1, 1, 1), "dims": 16}


def small(network_class, **arguments):
    return network_class(**({"in_channels": 2, "out_channels": 3, "detail_filters": 8} | SMALL | arguments))


@pytest.mark.parametrize("size", [(33, 70), (40, 56), (64, 64), (7, 32)], ids=str)
@pytest.mark.parametrize("network_class", NETWORKS)
def test_any_size_with_deep_supervision_follows_nnunets_targets(network_class, size):
    network = small(network_class, deep_supervision=True)
    logits = network(torch.randn(2, 2, *size))
    assert [tuple(v.shape) for v in logits] == [
        (2, 3, *(max(1, round(n * scale)) for n in size)) for scale in (1, 1 / 2, 1 / 4, 1 / 8)
    ]
    sum(v.square().mean() for v in logits).backward()
    trained = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert trained == []  # nnU-Net's distributed training allows no idle parameter
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("network_class", NETWORKS)
def test_deep_supervision_can_be_switched_if_built(network_class):
    network = small(network_class, deep_supervision=True).eval()
    x = torch.randn(1, 2, 32, 32)
    with_heads = network(x)
    network.decoder.deep_supervision = False
    assert torch.equal(network(x), with_heads[0])
    assert {key.split(".")[1] for key in network.state_dict() if "seg_layers" in key} == {"seg_layers"}
    with pytest.raises(ValueError, match="deep_supervision=True"):
        small(network_class).decoder.deep_supervision = True


@pytest.mark.parametrize("network_class", NETWORKS)
def test_only_seg_layers_depend_on_the_number_of_classes(network_class):
    few, many = small(network_class).state_dict(), small(network_class, out_channels=9).state_dict()
    differing = {key for key in few if few[key].shape != many[key].shape}
    assert differing and all(".seg_layers." in key for key in differing)


def test_encoder_takes_the_weights_of_the_classifier():
    medmamba = MedMamba(in_channels=2, num_classes=0, **SMALL)
    small(MedMambaSeg).encoder.load_state_dict(medmamba.state_dict())
    vmamba = {k: v for k, v in VMamba(in_channels=2, **SMALL).state_dict().items() if not k.startswith("classifier.")}
    result = small(VMambaSeg).encoder.load_state_dict(vmamba, strict=False)
    assert not result.unexpected_keys and all(key.startswith("outnorm") for key in result.missing_keys)
    xfmamba = XFMamba(in_channels=1, **SMALL).state_dict()
    result = small(XFMambaSeg).encoder.load_state_dict(xfmamba, strict=False)
    assert not result.missing_keys
    assert {key.split(".")[0] for key in result.unexpected_keys} == {"final_conv", "head"}


def test_two_views_are_told_apart():
    network = small(XFMambaSeg).eval()
    x = torch.randn(1, 2, 32, 32)
    assert not torch.allclose(network(x), network(x.flip(1)), atol=1e-3)


@pytest.mark.parametrize("network_class", NETWORKS)
def test_mixer_none_has_no_scan_and_checkpointing_changes_nothing(network_class):
    none = small(network_class, mixer="none")
    assert none.no_weight_decay() == set()
    network = small(network_class)
    assert network.no_weight_decay() <= set(dict(network.named_parameters()))
    assert not set(none.state_dict()) - set(network.state_dict())
    saved = small(network_class, use_checkpoint=True, drop_path_rate=0.0)
    plain = small(network_class, drop_path_rate=0.0)
    plain.load_state_dict(saved.state_dict())
    x = torch.randn(2, 2, 32, 64)
    for candidate in (plain, saved):
        candidate(x).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saved.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("network_class", [MedMambaSeg, VMambaSeg])
def test_features_by_name(network_class):
    features = extract_features(small(network_class).eval(), torch.randn(1, 2, 32, 64))
    assert {name: tuple(value.shape[1:]) for name, value in features.items()} == {
        "stage1": (16, 8, 16),
        "stage2": (32, 4, 8),
        "stage3": (64, 2, 4),
        "stage4": (128, 1, 2),
        "decoder": (8, 32, 64),
    }


@pytest.mark.parametrize(
    ("network_class", "arguments", "message"),
    [
        (MedMambaSeg, {"depths": (1, 1, 1)}, "`depths` must name four stages"),
        (MedMambaSeg, {"out_channels": 0}, "`out_channels`.*got 0"),
        (VMambaSeg, {"detail_filters": 0}, "`detail_filters`.*got 0"),
        (VMambaSeg, {"norm": "layer"}, "`norm`.*'layer'"),
        (XFMambaSeg, {"in_channels": 3}, "`in_channels` must be even.*got 3"),
    ],
)
def test_bad_argument_is_named(network_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        small(network_class, **arguments)


@pytest.mark.parametrize("network_class", NETWORKS)
def test_wrong_input_shape_is_named(network_class):
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, 2, H, W\)"):
        small(network_class)(torch.zeros(1, 1, 32, 32))
