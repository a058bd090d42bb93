"""VMamba, both generations: the published numbers and key tables, and what ours does beyond them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_mamba.layers.taps import extract_features
from monai_mamba.networks import VMamba, VMambaBackbone
from monai_mamba.networks.vmamba import PUBLISHED_KEYS
from tests.parity import DATA, fixture_input, fixture_weights, load_fixture, load_table, renamed

V0 = {"gate": True, "d_state": 16, "ssm_ratio": 2.0, "mlp_ratio": 0.0, "stem": "patch", "downsample": "merge"}


def small(**arguments):
    return VMamba(**({"num_classes": 3, "depths": (1, 2, 1, 1), "dims": 16} | arguments))


def from_table(table):
    config = table["config"]
    first_generation = config["forward_type"] == "v0"
    return {
        "num_classes": config["num_classes"],
        "depths": config["depths"],
        "dims": config["dims"],
        "ssm_ratio": config["ssm_ratio"],
    } | (V0 if first_generation else {})


TABLES = sorted(path.stem for path in (DATA / "vmamba").glob("v[02]_*.json"))


def test_all_nine_published_layouts_are_tested():
    assert len(TABLES) == 9


@pytest.mark.parametrize("name", TABLES)
def test_vmamba_has_the_keys_and_shapes_of_the_published_file(name):
    table = load_table("vmamba", name)
    with torch.device("meta"):
        network = VMamba(**from_table(table))
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert shapes == table["keys"]
    assert sum(p.numel() for p in network.parameters()) == table["parameters"]
    if "legacy_keys" in table:
        legacy = {key: torch.empty(shape, device="meta") for key, shape in table["legacy_keys"].items()}
        assert set(renamed(legacy, PUBLISHED_KEYS)) == set(shapes)


def test_vmamba_classifier_matches_published_logits():
    network = VMamba().eval()
    network.load_state_dict(fixture_weights(load_table("vmamba", "v2_tiny_s1l8")["keys"]))
    expected = torch.from_numpy(np.load(DATA / "vmamba" / "vmamba_t_classifier_64.npz")["logits"])
    with torch.no_grad():
        logits = network(fixture_input("vmamba_t_classifier_64", (1, 3, 64, 64)))[0]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_vmamba_backbone_matches_published_maps():
    fixture = load_fixture("xfmamba", "vmamba_t_backbone_64")
    network = VMambaBackbone().eval()
    network.load_state_dict(fixture.weights)
    assert sum(p.numel() for p in network.parameters()) == fixture.table["parameters"]
    with torch.no_grad():
        maps = network(fixture_input(fixture.name, (1, 3, 64, 64)))
    for i, value in enumerate(maps):
        assert tuple(value.shape) == tuple(fixture.arrays["stage_shape"][i])
        assert value.mean().item() == pytest.approx(fixture.arrays["stage_mean"][i], abs=1e-4)
        assert value.std(correction=0).item() == pytest.approx(fixture.arrays["stage_std"][i], abs=1e-4)
        expected = torch.from_numpy(fixture.arrays[f"stage{i + 1}"])
        found = value.flatten()[:: int(fixture.arrays[f"stage{i + 1}_stride"])][: len(expected)]
        assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_vmamba_uses_the_published_epsilon_and_gelu():
    # The epsilon is invisible in the fixtures.
    assert {m.eps for m in small().modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize("size", [(1, 1), (31, 64), (33, 47), (64, 96)], ids=str)
@pytest.mark.parametrize("generation", [{}, V0], ids=["v2", "v0"])
def test_vmamba_any_size_rounds_up(size, generation):
    network = small(**generation).eval()
    maps = network.forward_features(torch.randn(1, 3, *size))
    assert [tuple(m.shape) for m in maps] == [
        (1, 16 * 2**i, -(-size[0] // stride), -(-size[1] // stride)) for i, stride in enumerate((4, 8, 16, 32))
    ]
    assert network.strides == (4, 8, 16, 32)
    assert torch.isfinite(network(torch.randn(1, 3, *size))).all()


def test_vmamba_v0_can_crop_and_then_needs_32_pixels():
    network = small(**V0, odd_size="crop").eval()
    assert [m.shape[2:] for m in network.forward_features(torch.zeros(1, 3, 47, 33))] == [
        (11, 8),
        (5, 4),
        (2, 2),
        (1, 1),
    ]
    with pytest.raises(ValueError, match="at least 32 pixels"):
        network(torch.zeros(1, 3, 31, 64))


def test_vmamba_repeats_a_single_channel():
    network = small().eval()
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(network(x), network(x.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match=r"3 \(or 1\)"):
        network(torch.zeros(1, 2, 32, 32))


@pytest.mark.parametrize("generation", [{}, V0], ids=["v2", "v0"])
def test_vmamba_mixer_none_has_no_scan_and_is_otherwise_the_same(generation):
    mamba, none = small(**generation), small(**generation, mixer="none")
    extra = {key.rsplit(".", 1)[1] for key in set(mamba.state_dict()) - set(none.state_dict())}
    assert extra == {"x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"}
    assert not set(none.state_dict()) - set(mamba.state_dict())
    assert none(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_vmamba_checkpointing_changes_nothing_but_memory():
    plain, saved = small(drop_path_rate=0.3), small(drop_path_rate=0.3, use_checkpoint=True)
    saved.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 64)
    for network in (plain, saved):
        torch.manual_seed(1)
        network(x).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_vmamba_features_by_name_and_classifier_reset():
    network = small().eval()
    x = torch.randn(1, 3, 64, 32)
    features = extract_features(network, x)
    assert set(features) == {"stage1", "stage2", "stage3", "stage4", "embedding"}
    assert features["stage2"].shape == (1, 32, 8, 4)
    network.reset_classifier(0)
    assert torch.equal(network(x), features["embedding"])
    network.reset_classifier(5)
    assert network(x).shape == (1, 5)


def test_vmamba_no_weight_decay_names_exist():
    network = small()
    names = network.no_weight_decay()
    assert len(names) == 3 * 5
    assert names <= set(dict(network.named_parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "`in_channels`.*got 0"),
        ({"num_classes": -1}, "`num_classes`.*got -1"),
        ({"depths": ()}, "`depths`"),
        ({"dims": (16, 32)}, "`dims`"),
        ({"stem": "linear"}, "`stem`.*'linear'"),
        ({"downsample": "pool"}, "`downsample`.*'pool'"),
        ({"ssm_ratio": 0}, "`ssm_ratio`"),
        ({"odd_size": "reflect"}, "`odd_size`.*'reflect'"),
        ({"mixer": "lstm"}, "`mixer`.*'lstm'"),
    ],
)
def test_vmamba_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
