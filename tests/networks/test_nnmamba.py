"""nnMamba for segmentation, classification and landmarks: the published numbers, and what ours does beyond them."""

from __future__ import annotations

import pytest
import torch

from monai_mamba.layers.taps import extract_features
from monai_mamba.networks import NNMambaClassifier, NNMambaLandmark, NNMambaSeg
from monai_mamba.networks.nnmamba import PUBLISHED_KEYS
from tests.parity import load_fixture, renamed


def num_parameters(network):
    return sum(p.numel() for p in network.parameters())


def small(**arguments):
    return NNMambaSeg(**({"out_channels": 3, "init_filters": 16, "num_blocks": 2} | arguments))


def test_seg_matches_published_output_and_gradients():
    fixture = load_fixture("nnmamba", "seg_pub")
    network = NNMambaSeg(spatial_dims=3, in_channels=1, out_channels=6, init_filters=16).eval()
    network.load_state_dict(renamed(fixture.weights, PUBLISHED_KEYS))
    y = network(fixture.input)
    tolerance = 1e-4 * fixture.table["output_absmax"]
    expected = torch.from_numpy(fixture.arrays["output_sub"])
    assert (y[..., 1::3, ::3, 2::3] - expected).abs().max() <= tolerance
    torch.testing.assert_close(
        y.flatten(2).mean(2), torch.from_numpy(fixture.arrays["output_mean"]).float(), rtol=0, atol=tolerance
    )
    y.square().mean().backward()
    gradients = fixture.table["gradients"]["values"]
    assert len(gradients) == 7
    for key, reference in gradients.items():
        (name,) = renamed({key: torch.empty(0)}, PUBLISHED_KEYS)
        gradient = network.get_parameter(name).grad
        assert gradient.norm().item() == pytest.approx(reference["norm"], rel=5e-3), key
        torch.testing.assert_close(
            gradient.flatten()[:8], torch.tensor(reference["first8"]), rtol=0, atol=5e-3 * reference["absmax"]
        )


@pytest.mark.parametrize(
    ("in_channels", "init_filters", "out_channels", "count"),
    [(1, 32, 6, 15_944_958), (1, 32, 16, 15_959_598), (4, 32, 4, 15_945_270), (1, 16, 6, 4_003_287)],
)
def test_seg_parameter_count_equals_the_published_network(in_channels, init_filters, out_channels, count):
    with torch.device("meta"):
        network = NNMambaSeg(3, in_channels, out_channels, init_filters)
    assert num_parameters(network) == count


@pytest.mark.parametrize("head", ["double_conv", "conv1x1"])
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("size", [(16, 17), (32, 48), (33, 47), (5, 70)], ids=str)
def test_seg_2d_any_size_keeps_the_size(size, norm, head):
    network = small(spatial_dims=2, in_channels=2, head=head, norm=norm).eval()
    y = network(torch.randn(2, 2, *size))
    assert y.shape == (2, 3, *size)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("size", [(20, 32, 32), (10, 28, 28), (40, 56, 40), (7, 16, 3)], ids=str)
def test_seg_3d_any_size_with_deep_supervision_follows_nnunets_targets(size):
    network = small(deep_supervision=True)
    logits = network(torch.randn(2, 1, *size))
    assert [tuple(v.shape[2:]) for v in logits] == [
        tuple(max(1, round(n * scale)) for n in size) for scale in (1, 1 / 2, 1 / 4, 1 / 8)
    ]
    sum(v.square().mean() for v in logits).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_seg_pads_by_repeating_the_last_plane_and_crops_back():
    network = small().eval()
    x = torch.randn(1, 1, 32, 16, 16)
    x[:, :, 16:] = x[:, :, 16:17]
    # 17 planes are padded to exactly this volume of 32.
    torch.testing.assert_close(network(x[:, :, :17]), network(x)[:, :, :17])


def test_seg_mixer_none_has_no_mamba_and_is_otherwise_the_same():
    mamba, none = small(), small(mixer="none")
    extra = set(mamba.state_dict()) - set(none.state_dict())
    assert extra and all(".mamba." in key for key in extra)
    assert not set(none.state_dict()) - set(mamba.state_dict())
    assert none(torch.randn(2, 1, 16, 16, 32)).shape == (2, 3, 16, 16, 32)


def test_seg_published_head_is_never_negative_and_conv1x1_is():
    x = torch.randn(1, 1, 32, 32, 32)
    assert small(head="double_conv").eval()(x).min() >= 0
    assert small(head="conv1x1").eval()(x).min() < 0


def test_seg_deep_supervision_can_be_switched_if_built():
    network = small(deep_supervision=True).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    with_heads = network(x)
    network.decoder.deep_supervision = False
    assert torch.equal(network(x), with_heads[0])
    with pytest.raises(ValueError, match="deep_supervision=True"):
        small().decoder.deep_supervision = True


def test_seg_checkpointing_changes_nothing_but_memory():
    plain = small(deep_supervision=True)
    saved = small(deep_supervision=True, use_checkpoint=True)
    saved.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, 16, 32, 16)
    for network in (plain, saved):
        sum(v.square().mean() for v in network(x)).backward()
    for (name, a), b in zip(plain.named_parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, a), b in zip(plain.named_buffers(), saved.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_seg_no_weight_decay_names_exist():
    network = small()
    names = network.no_weight_decay()
    assert len(names) == 9  # three per stage
    assert names <= set(dict(network.named_parameters()))


def test_seg_compiles_without_graph_breaks():
    network = small(spatial_dims=2).eval()
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), network(x))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"spatial_dims": 1}, "`spatial_dims`.*got 1"),
        ({"in_channels": 0}, "`in_channels`.*got 0"),
        ({"out_channels": 0}, "`out_channels`.*got 0"),
        ({"init_filters": 8}, "`init_filters`.*got 8"),
        ({"num_blocks": 0}, "`num_blocks`.*got 0"),
        ({"head": "linear"}, "`head`.*'linear'"),
        ({"norm": "layer"}, "`norm`.*'layer'"),
        ({"mixer": "lstm"}, "`mixer`.*'lstm'"),
    ],
)
def test_seg_bad_argument_is_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        small(**arguments)


@pytest.mark.parametrize("shape", [(1, 2, 16, 16, 16), (1, 1, 16, 16), (16, 16, 16)], ids=str)
def test_seg_wrong_input_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, 1,"):
        small()(torch.zeros(shape))


@pytest.mark.parametrize(("norm", "training"), [("instance", False), ("batch", True)])
def test_seg_single_voxel_to_normalize_is_refused(norm, training):
    network = small(norm=norm).train(training)
    with pytest.raises(ValueError, match="single voxel at 1/16"):
        network(torch.zeros(1, 1, 16, 16, 16))
    network(torch.zeros(1, 1, 16, 16, 17))


def small_classifier(**arguments):
    return NNMambaClassifier(**({"num_classes": 3, "init_filters": 16, "num_blocks": 2} | arguments))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cls_pub", {"num_classes": 2}),
        ("cls_seq_pub", {"num_classes": 2, "init_filters": 16, "num_blocks": 2, "sequential_head": True}),
    ],
)
def test_classifier_matches_published_output(name, arguments):
    fixture = load_fixture("nnmamba", name)
    network = NNMambaClassifier(**arguments).eval()
    network.load_state_dict(renamed(fixture.weights, PUBLISHED_KEYS))
    assert num_parameters(network) == fixture.table["parameters"]
    with torch.no_grad():
        embedding = extract_features(network, fixture.input, names=["embedding"])["embedding"]
        y = network(fixture.input)
    expected = torch.from_numpy(fixture.arrays["output"])
    assert (y - expected).abs().max() <= 1e-4 * fixture.table["output_absmax"]
    pooled = torch.from_numpy(fixture.arrays["debug/mlp_in" if "seq" in name else "debug/pooled"])
    assert (embedding - pooled).abs().max() <= 1e-4 * pooled.abs().max()


@pytest.mark.parametrize(
    ("arguments", "count"),
    [({}, 12_876_321), ({"num_classes": 2}, 12_876_354), ({"sequential_head": True}, 12_905_633)],
    ids=["one", "two", "sequential"],
)
def test_classifier_parameter_count_equals_the_published_network(arguments, count):
    with torch.device("meta"):
        network = NNMambaClassifier(**arguments)
    assert num_parameters(network) == count


@pytest.mark.parametrize("size", [(17, 5, 1), (33, 20, 18)], ids=str)
def test_classifier_3d_any_size(size):
    network = small_classifier(in_channels=2)
    y = network(torch.randn(2, 2, *size))
    assert y.shape == (2, 3)
    y.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("sequential_head", [False, True], ids=["joined", "sequential"])
def test_classifier_2d_options(sequential_head):
    x = torch.randn(2, 1, 32, 48)
    arguments = {"spatial_dims": 2, "sequential_head": sequential_head}
    network, none = small_classifier(**arguments), small_classifier(**arguments, mixer="none")
    extra = set(network.state_dict()) - set(none.state_dict())
    assert {key.split(".mamba.")[0] for key in extra if ".mamba." in key} == {"encoder.stem_mixer"}
    assert any(key.startswith("sequential_head.") for key in extra) == sequential_head
    assert none(x).shape == (2, 3)
    assert network.no_weight_decay() <= set(dict(network.named_parameters()))
    assert len(network.no_weight_decay()) == 3 + 3 * sequential_head
    network.reset_classifier(7)
    assert network(x).shape == (2, 7)


def test_classifier_checkpointing_changes_nothing_but_memory():
    plain, saved = small_classifier(dropout_rate=0.0), small_classifier(dropout_rate=0.0, use_checkpoint=True)
    saved.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, 32, 16, 16)
    for network in (plain, saved):
        network(x).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saved.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b[1].grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, a), b in zip(plain.named_buffers(), saved.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["in_channels", "num_classes", "init_filters", "num_blocks"])
def test_classifier_bad_argument_is_named(name):
    with pytest.raises(ValueError, match=f"`{name}`.*got 0"):
        small_classifier(**{name: 0})


def test_classifier_batch_of_one_voxel_is_refused_in_training():
    with pytest.raises(ValueError, match="single voxel at 1/16"):
        small_classifier()(torch.zeros(1, 1, 16, 16, 16))


def test_landmark_network_is_the_segmentation_network_and_locates_maxima():
    network = NNMambaLandmark(num_landmarks=2, init_filters=16, num_blocks=2).eval()
    seg = NNMambaSeg(out_channels=2, init_filters=16, num_blocks=2).eval()
    seg.load_state_dict(network.state_dict())
    x = torch.randn(1, 1, 18, 20, 33)
    heat_maps = network(x)
    assert torch.equal(heat_maps, seg(x)) and heat_maps.min() >= 0
    voxels = network.locate(x)
    assert voxels.shape == (1, 2, 3)
    for landmark in range(2):
        i, j, k = voxels[0, landmark]
        assert heat_maps[0, landmark, i, j, k] == heat_maps[0, landmark].max()
    with pytest.raises(ValueError, match="`num_landmarks`"):
        NNMambaLandmark(num_landmarks=0)


def test_seg_features_by_name():
    network = small().eval()
    features = extract_features(network, torch.randn(1, 1, 32, 16, 16))
    assert {name: tuple(value.shape[1:3]) for name, value in features.items()} == {
        "stem": (16, 16),
        "stage1": (32, 8),
        "stage2": (64, 4),
        "stage3": (128, 2),
        "decoder": (16, 16),
    }
