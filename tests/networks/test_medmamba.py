"""MedMamba: the published numbers, and what ours does beyond them."""

from __future__ import annotations

import pytest
import torch

from monai_mamba.layers.taps import extract_features
from monai_mamba.networks import MedMamba
from monai_mamba.networks.medmamba import PUBLISHED_KEYS
from tests.parity import load_fixture, renamed


def small(**arguments):
    return MedMamba(**({"num_classes": 3, "depths": (1, 2, 1, 1), "dims": 16} | arguments))


def relative_l2(value, expected):
    expected = torch.as_tensor(expected).double()
    return ((value.double() - expected).norm() / expected.norm()).item()


def published(name):
    fixture = load_fixture("medmamba", name)
    config = fixture.table["config"]
    network = MedMamba(config["in_chans"], config["num_classes"], config["depths"], config["dims"]).eval()
    network.load_state_dict(renamed(fixture.weights, PUBLISHED_KEYS))
    return fixture, network


@pytest.mark.parametrize("name", ["medmamba_tiny_c4_96x64", "medmamba_t_c6_64"])
def test_medmamba_matches_published_outputs(name):
    fixture, network = published(name)
    assert sum(p.numel() for p in network.parameters()) == fixture.table["n_parameters"]
    with torch.no_grad():
        features = extract_features(network, fixture.input, names=["embedding", "layers.1.downsample", "stage4"])
        logits = network(fixture.input)
    assert relative_l2(logits, fixture.arrays["logits"]) < 1e-4
    assert relative_l2(features["embedding"], fixture.arrays["pooled"]) < 1e-4
    # The published stage 1 ends after its merging, ours before.
    for key, value in (("layers.1", features["layers.1.downsample"]), ("layers.3", features["stage4"])):
        stats = fixture.table["stats"][key]
        assert value.mean().item() == pytest.approx(stats["mean"], abs=1e-4)
        assert value.std(correction=0).item() == pytest.approx(stats["std"], abs=1e-4)


def test_medmamba_matches_published_gradients():
    fixture, network = published("medmamba_tiny_c4_96x64")
    logits = network(fixture.input)
    loss = logits.square().mean()
    loss.backward()
    reference = fixture.table["gradients"]
    assert loss.item() == pytest.approx(reference["loss_value"], rel=1e-4)
    assert len(reference["params"]) == 6
    for key, expected in reference["params"].items():
        (name,) = renamed({key: torch.empty(0)}, PUBLISHED_KEYS)
        gradient = network.get_parameter(name).grad.flatten()
        assert gradient.norm().item() == pytest.approx(expected["norm"], rel=1e-3), key
        spread = [int(gradient.numel() * (j + 0.5) / 8) for j in range(8)]
        for values, stored in ((gradient[:8], expected["first8"]), (gradient[spread], expected["spread8"])):
            torch.testing.assert_close(
                values, torch.tensor(stored[: len(values)]), rtol=0, atol=1e-4 * expected["norm"], msg=key
            )


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({}, 15_221_608),
        ({"depths": (2, 2, 8, 2)}, 19_389_544),
        ({"depths": (2, 2, 12, 2), "dims": 128}, 40_883_688),
        ({"depths": (2, 2, 12, 2)}, 23_557_480),
        ({"depths": (2, 2, 16, 2), "dims": 128}, 48_144_872),
        ({"num_classes": 9, "channel_split": False, "with_conv_branch": False}, 16_150_953),
        ({"num_classes": 9, "channel_split": False}, 51_554_793),
        ({"num_classes": 9, "channel_shuffle": False}, 14_459_529),
    ],
    ids=["t", "s", "b", "s12", "b16", "ssm_only", "sum", "no_shuffle"],
)
def test_medmamba_parameter_count_equals_the_published_network(arguments, count):
    with torch.device("meta"):
        network = MedMamba(**arguments)
    assert sum(p.numel() for p in network.parameters()) == count


def test_medmamba_layer_norms_use_the_published_epsilon():
    # Invisible in the fixtures.
    assert {m.eps for m in small().modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_medmamba_sums_the_routes_and_does_not_average_them():
    # Invisible in the fixtures, because a layer normalisation follows.
    op = small().layers[0].blocks[0].op
    with torch.no_grad():
        op.x_proj_weight.zero_()  # no input to the states: what remains is the skip of each of the four routes
        u = torch.randn(1, 3, 4, op.d_inner)
        torch.testing.assert_close(op.scan(u), 4 * u)


@pytest.mark.parametrize("size", [(32, 32), (33, 36), (60, 32), (72, 104)], ids=str)
def test_medmamba_crop_ignores_what_fills_no_patch(size):
    network = small().eval()
    x = torch.randn(2, 3, *size)
    maps = network.forward_features(x)
    assert [m.shape for m in maps] == [
        (2, 16 * 2**i, size[0] // stride, size[1] // stride) for i, stride in enumerate((4, 8, 16, 32))
    ]
    assert network.strides == (4, 8, 16, 32)
    # Pixels beyond the last whole patch do not count.
    cut = x[:, :, : size[0] // 4 * 4, : size[1] // 4 * 4]
    assert torch.equal(network(x), network(cut))


@pytest.mark.parametrize("size", [(28, 28), (1, 1), (33, 47), (64, 96)], ids=str)
def test_medmamba_pad_takes_any_size_and_uses_every_pixel(size):
    network = small(odd_size="pad").eval()
    x = torch.randn(1, 3, *size, requires_grad=True)
    maps = network.forward_features(x)
    assert [m.shape[2:] for m in maps] == [tuple(-(-n // stride) for n in size) for stride in (4, 8, 16, 32)]
    network(x).sum().backward()
    assert (x.grad != 0).any(dim=1).all()


def test_medmamba_crop_and_pad_agree_where_nothing_is_odd():
    network, padded = small().eval(), small(odd_size="pad").eval()
    padded.load_state_dict(network.state_dict())
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(network(x), padded(x))


@pytest.mark.parametrize("size", [(28, 28), (31, 64), (64, 31)], ids=str)
def test_medmamba_too_small_image_names_the_cure(size):
    with pytest.raises(ValueError, match=r'at least 32 pixels.*odd_size="pad"'):
        small()(torch.zeros(1, 3, *size))


def test_medmamba_repeats_a_single_channel():
    network = small().eval()
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(network(x), network(x.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match=r"3 \(or 1\)"):
        network(torch.zeros(1, 2, 32, 32))


def test_medmamba_mixer_none_has_no_scan_and_is_otherwise_the_same():
    mamba, none = small(), small(mixer="none")
    extra = {key.rsplit(".", 1)[1] for key in set(mamba.state_dict()) - set(none.state_dict())}
    assert extra == {"x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"}
    assert not set(none.state_dict()) - set(mamba.state_dict())
    assert none(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert none.no_weight_decay() == set()


def test_medmamba_checkpointing_changes_nothing_but_memory():
    plain, saved = small(drop_path_rate=0.3), small(drop_path_rate=0.3, use_checkpoint=True)
    saved.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 64)
    for network in (plain, saved):
        torch.manual_seed(1)
        network(x).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, a), b in zip(plain.named_buffers(), saved.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_medmamba_shuffle_interleaves_convolution_and_scan():
    network = small()
    shuffled = network.layers[0].blocks[0].eval()
    x = torch.randn(1, 4, 4, 16)
    y = shuffled(x) - x
    shuffled.channel_shuffle = False
    parts = shuffled(x) - x
    torch.testing.assert_close(y[..., 0::2], parts[..., :8])
    torch.testing.assert_close(y[..., 1::2], parts[..., 8:])


def test_medmamba_reset_classifier_and_no_head():
    network = small().eval()
    x = torch.randn(2, 3, 32, 32)
    network.reset_classifier(7)
    assert network(x).shape == (2, 7)
    network.reset_classifier(0)
    assert torch.equal(network(x), network.forward_features(x)[-1].mean((2, 3)))


def test_medmamba_drop_path_rises_linearly_and_only_the_scan_branch_drops():
    network = MedMamba(num_classes=2, depths=(1, 1, 1, 1), dims=16, drop_path_rate=0.3)
    rates = [stage.blocks[0].drop_path.rate for stage in network.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    block = network.layers[3].blocks[0]
    block.drop_path.rate = 1 - 1e-9
    x = torch.randn(1, 2, 2, 128)
    y = block(x) - x
    assert (y[..., 1::2] == 0).all() and (y[..., 0::2] != 0).any()


def test_medmamba_dropout_rate_is_used_in_training_only():
    network = small(dropout_rate=0.5, drop_path_rate=0.0)
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    x = torch.randn(1, 3, 32, 32)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_medmamba_no_weight_decay_names_exist():
    network = small()
    names = network.no_weight_decay()
    assert len(names) == 3 * 5
    assert names <= set(dict(network.named_parameters()))


def test_medmamba_features_by_name_lie_on_the_path():
    network = small().eval()
    x = torch.randn(1, 3, 64, 32)
    features = extract_features(network, x)
    assert set(features) == {"stage1", "stage2", "stage3", "stage4", "embedding"}
    assert features["stage2"].shape == (1, 32, 8, 4)
    (gradient,) = torch.autograd.grad(network(x).sum() * 0 + features["embedding"].sum(), features["stage4"])
    assert gradient.shape == features["stage4"].shape
    with pytest.raises(ValueError, match="'stage9'"):
        extract_features(network, x, names=["stage9"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "`in_channels`.*got 0"),
        ({"num_classes": -1}, "`num_classes`.*got -1"),
        ({"depths": ()}, "`depths`"),
        ({"depths": (1, 0)}, "`depths`"),
        ({"dims": (16, 32)}, "`dims`"),
        ({"dims": (16, 32, 48, 96)}, "`dims` must double"),
        ({"dims": 15}, "even for the channel split, got 15"),
        ({"with_conv_branch": False}, "`with_conv_branch=False`"),
        ({"odd_size": "reflect"}, "`odd_size`.*'reflect'"),
        ({"mixer": "lstm"}, "`mixer`.*'lstm'"),
        ({"drop_path_rate": 1.0}, "`rate`"),
        ({"patch_size": 0}, "`patch_size`"),
    ],
)
def test_medmamba_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
