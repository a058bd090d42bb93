"""XFMamba: the published numbers, and what ours does beyond them."""

from __future__ import annotations

import pytest
import torch

from monai_mamba.layers.taps import extract_features
from monai_mamba.networks import XFMamba
from monai_mamba.networks.xfmamba import PUBLISHED_KEYS, CrossViewSwap
from tests.parity import fixture_input, load_fixture, load_table, renamed

SIZES = {
    "t": {},
    "s": {"depths": (2, 2, 15, 2), "ssm_ratio": 2.0},
    "b": {"depths": (2, 2, 15, 2), "ssm_ratio": 2.0, "dims": 128},
}


def small(**arguments):
    return XFMamba(**({"num_classes": 3, "depths": (1, 1, 1, 1), "dims": 16} | arguments))


@pytest.fixture(scope="module")
def published():
    fixture = load_fixture("xfmamba", "xfmamba_t_c2_64")
    network = XFMamba().eval()
    network.load_state_dict(renamed(fixture.weights, PUBLISHED_KEYS))
    views = [fixture_input(fixture.name + suffix, (1, 3, 64, 64)) for suffix in ("", ":2")]
    return fixture, network, views


def test_xfmamba_matches_published_logits_and_maps(published):
    fixture, network, views = published
    names = {"view_a": "stage4.a", "view_b": "stage4.b", "shallow_a": "shallow.a", "shallow_b": "shallow.b"}
    names |= {"deep": "deep", "fused": "final_conv"}
    with torch.no_grad():
        features = extract_features(network, *views, names=names)
        logits = network(*views)
    expected = torch.from_numpy(fixture.arrays["logits"])
    assert (logits - expected).abs().max() <= 1e-4 * fixture.table["output_absmax"]
    taps = list(fixture.arrays["tap_names"])
    for ours, theirs in names.items():
        index, value = taps.index(theirs), features[ours]
        assert tuple(value.shape) == tuple(fixture.arrays["tap_shape"][index])
        for found, name in ((value.mean(), "tap_mean"), (value.std(correction=0), "tap_std")):
            reference = fixture.arrays[name][index]
            assert found.item() == pytest.approx(reference, abs=1e-4 * max(1, abs(reference)))
        stored = torch.from_numpy(fixture.arrays[f"sub/{theirs}"])
        values = value.flatten()[:: int(fixture.arrays[f"stride/{theirs}"])][: len(stored)]
        assert (values - stored).abs().max() <= 2e-4 * stored.abs().max()


def test_xfmamba_one_channel_matches_published_logits(published):
    fixture, network, _ = published
    views = [fixture_input(f"{fixture.name}_1ch{suffix}", (1, 1, 64, 64)) for suffix in ("", ":2")]
    with torch.no_grad():
        logits, stacked = network(*views), network(torch.cat(views, dim=1))
    expected = torch.from_numpy(fixture.arrays["logits_one_channel"])
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(logits, stacked)


def test_xfmamba_has_the_exact_gradient(published):
    fixture, network, views = published
    network.zero_grad()
    loss = network(*views).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(fixture.table["grad"]["loss"], rel=1e-4)
    keys = [key[10:] for key in fixture.arrays if key.startswith("grad_norm/")]
    assert len(keys) == 6
    for key in keys:
        (name,) = renamed({key: torch.empty(0)}, PUBLISHED_KEYS)
        gradient = network.get_parameter(name).grad.double().flatten()
        assert gradient.norm().item() == pytest.approx(fixture.arrays[f"grad_norm/{key}"].item(), rel=1e-3), key
        first = torch.from_numpy(fixture.arrays[f"grad_first8/{key}"]).double()
        assert (gradient[:8] - first).abs().max() <= 1e-3 * first.abs().max(), key
    unused = {
        next(iter(renamed({key: torch.empty(0)}, PUBLISHED_KEYS))) for key in fixture.table["grad"]["unused_parameters"]
    }
    without = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert without == unused
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", SIZES)
def test_xfmamba_has_the_keys_shapes_and_count_of_the_published_file(size):
    table = load_table("xfmamba", f"checkpoint_keys_xfmamba_{size}")
    with torch.device("meta"):
        network = XFMamba(num_classes=2, **SIZES[size])
        keys = {key: torch.empty(shape) for key, shape in table["keys"].items()}
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    assert shapes == {key: value.shape for key, value in renamed(keys, PUBLISHED_KEYS).items()}
    count = {"t": 38_831_810, "s": 58_730_498, "b": 103_933_954}[size]
    assert sum(p.numel() for p in network.parameters()) == count


def test_xfmamba_stacked_and_separate_views_agree():
    network = small(in_channels=2).eval()
    a, b = torch.randn(2, 2, 33, 47), torch.randn(2, 2, 33, 47)
    assert torch.equal(network(a, b), network(torch.cat([a, b], dim=1)))
    assert not torch.allclose(network(a, b), network(b, a), atol=1e-4)


def test_swap_exchanges_even_channels_and_its_gradient_follows():
    block = CrossViewSwap(16, mixer="none").eval()
    with torch.no_grad():
        block.conv2d.weight.zero_()
        block.conv2d.weight[:, :, 1, 1] = 1
        block.conv2d.bias.zero_()
        for layer in block.gate:
            if hasattr(layer, "weight"):
                layer.weight.zero_()
        block.in_proj.weight.copy_(torch.eye(16).repeat(2, 1))
        block.out_proj.weight.copy_(torch.eye(16, 32))
        block.out_norm = torch.nn.Identity()
    a, b = torch.randn(1, 2, 2, 16, requires_grad=True), torch.randn(1, 2, 2, 16, requires_grad=True)
    out_a, _ = block(a, b)
    silu = torch.nn.functional.silu
    scale = 1 / (1 + block.norm.eps) ** 0.5
    expected = torch.where(torch.arange(16) % 2 == 0, silu(b * scale), silu(a * scale)) / 2  # the gate is sigmoid(0)
    torch.testing.assert_close(out_a - a, expected)
    (gradient,) = torch.autograd.grad(out_a.sum(), b)
    assert (gradient[..., 0::2] != 0).all() and (gradient[..., 1::2] == 0).all()


def test_missing_view_is_replaced_by_the_other_one():
    network = small().eval()
    a, b = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 32, 32)
    b[1], a[2] = float("nan"), float("nan")  # whatever stands there must not get in
    mask = torch.tensor([[True, True], [True, False], [False, True]])
    logits = network(a, b, mask)
    torch.testing.assert_close(logits[:1], network(a[:1], b[:1]))
    torch.testing.assert_close(logits[1:2], network(a[1:2], a[1:2]))
    torch.testing.assert_close(logits[2:], network(b[2:], b[2:]))
    stacked = network(torch.cat([a, b], dim=1), view_mask=mask)
    assert torch.equal(stacked, logits)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[True, True], [False, False]]), "without any view"),
        (torch.ones(2, 2), "must be booleans"),
        (torch.ones(1, 2, dtype=torch.bool), r"shape \(2, 2\)"),
    ],
    ids=["empty", "float", "shape"],
)
def test_bad_view_mask_is_named(mask, message):
    with pytest.raises(ValueError, match=f"`view_mask`.*{message}"):
        small().eval()(torch.zeros(2, 6, 32, 32), view_mask=mask)


def test_view_dropout_drops_one_view_at_its_rate_in_training_only():
    network = small(view_dropout_rate=0.5)
    a, b = torch.zeros(4000, 3, 1, 1), torch.ones(4000, 3, 1, 1)
    mask = torch.ones(4000, 2, dtype=torch.bool)
    mask[:1000, 0] = False
    new_a, new_b = network.fill_missing(a, b, mask)
    assert (new_a[:1000] == 1).all() and (new_b[:1000] == 1).all()  # the only view stays
    lost_a, lost_b = (new_a[1000:, 0] == 1).float().mean().item(), (new_b[1000:, 0] == 0).float().mean().item()
    # Four standard deviations of a binomial with p = 0.25 over 3000 samples.
    assert lost_a == pytest.approx(0.25, abs=0.032) and lost_b == pytest.approx(0.25, abs=0.032)
    network.eval()
    assert network.fill_missing(a, b, None)[0] is a


@pytest.mark.parametrize("fusion", ["late", "early"])
def test_baseline_without_cross_fusion(fusion):
    network = small(fusion=fusion, in_channels=1)
    a, b = torch.randn(2, 1, 32, 48), torch.randn(2, 1, 32, 48)
    logits = network(a, b)
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert network.head.in_features == (256 if fusion == "late" else 128)
    assert not any("fusion." in key for key in network.state_dict() if not key.startswith("early_fusion"))


def test_single_channel_views_are_repeated_and_others_refused():
    network = small().eval()
    x = torch.randn(1, 2, 32, 32)
    repeated = torch.cat([x[:, :1].repeat(1, 3, 1, 1), x[:, 1:].repeat(1, 3, 1, 1)], dim=1)
    torch.testing.assert_close(network(x), network(repeated))
    with pytest.raises(ValueError, match="2 or 6"):
        network(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="one shape"):
        network(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 33))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        network(torch.zeros(1, 2, 32, 32), torch.zeros(1, 2, 32, 32))


def test_xfmamba_mixer_none_has_no_scan_and_is_otherwise_the_same():
    mamba, none = small(), small(mixer="none")
    extra = {key.rsplit(".", 1)[1] for key in set(mamba.state_dict()) - set(none.state_dict())}
    assert extra == {"x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"}
    assert not set(none.state_dict()) - set(mamba.state_dict())
    assert none(torch.randn(2, 6, 32, 32)).shape == (2, 3)


def test_xfmamba_training_updates_the_shallow_statistics_once_per_view():
    network = small().train()
    network(torch.randn(2, 6, 64, 64)).sum().backward()
    assert network.shallow_fusion.norm.num_batches_tracked == 2


def test_xfmamba_checkpointing_changes_nothing_but_memory():
    plain, saved = small(drop_path_rate=0.3), small(drop_path_rate=0.3, use_checkpoint=True)
    saved.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 64, 32)
    for network in (plain, saved):
        torch.manual_seed(1)
        network(x).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saved.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_xfmamba_features_no_decay_and_classifier_reset():
    network = small().eval()
    x = torch.randn(1, 6, 64, 32)
    features = extract_features(network, x)
    assert features["fused"].shape == (1, 128, 2, 1)
    assert network.no_weight_decay() <= set(dict(network.named_parameters()))
    assert len(network.no_weight_decay()) == 3 * 6
    network.reset_classifier(0)
    torch.testing.assert_close(network(x), features["embedding"])
    network.reset_classifier(5)
    assert network(x).shape == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fusion": "sum"}, "`fusion`.*'sum'"),
        ({"num_classes": -1}, "`num_classes`"),
        ({"view_dropout_rate": 1.5}, "`view_dropout_rate`"),
        ({"in_channels": 0}, "`in_channels`"),
        ({"mixer": "lstm"}, "`mixer`"),
    ],
)
def test_xfmamba_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
