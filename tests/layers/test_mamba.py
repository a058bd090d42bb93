"""The Mamba mixer and the siamese layer against the published numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_mamba.layers import ChannelGate, MambaLayer, MambaMixer
from monai_mamba.layers.checkpoint import checkpointed
from monai_mamba.layers.convolution import pad_to_multiple, resample_to_grid
from monai_mamba.layers.siamese import siamese_scan
from monai_mamba.networks.nnmamba import PUBLISHED_KEYS
from tests.parity import load_fixture, renamed


def test_mixer_matches_published_output_and_gradients():
    fixture = load_fixture("nnmamba", "mamba_unit")
    mixer = MambaMixer(**fixture.table["arguments"])
    assert list(mixer.state_dict()) == list(fixture.weights)
    mixer.load_state_dict(fixture.weights)
    assert sum(p.numel() for p in mixer.parameters()) == fixture.table["parameters"]
    y = mixer(fixture.input)
    expected = torch.from_numpy(fixture.arrays["output"])
    assert (y - expected).abs().max() <= 1e-4 * fixture.table["output_absmax"]
    y.square().mean().backward()
    gradients = fixture.table["gradients"]["values"]
    assert gradients
    for name, reference in gradients.items():
        gradient = mixer.get_parameter(name).grad
        assert gradient.norm().item() == pytest.approx(reference["norm"], rel=5e-3)
        torch.testing.assert_close(
            gradient.flatten()[:8], torch.tensor(reference["first8"]), rtol=0, atol=5e-3 * reference["absmax"]
        )


@pytest.mark.parametrize(("case", "siamese"), [("mambalayer_seg_unit", True), ("mambalayer_cls_unit", False)])
def test_mamba_layer_matches_published_output(case, siamese):
    fixture = load_fixture("nnmamba", case)
    layer = MambaLayer(3, 32, d_state=fixture.table["arguments"]["d_state"], siamese=siamese).eval()
    table = [(r"^", ".mixer."), *PUBLISHED_KEYS, (r"^\.mixer\.", "")]
    layer.load_state_dict(renamed(fixture.weights, table))
    expected = torch.from_numpy(fixture.arrays["output"])
    assert (layer(fixture.input) - expected).abs().max() <= 1e-4 * fixture.table["output_absmax"]


def test_siamese_scan_batches_the_four_passes():
    mixer, tokens = MambaMixer(16, d_state=4), torch.randn(2, 30, 16)
    expected = sum(
        mixer(tokens.flip(d) if d else tokens).flip(d) if d else mixer(tokens) for d in ((), (2,), (1,), (1, 2))
    )
    torch.testing.assert_close(siamese_scan(mixer, tokens), expected / 4, rtol=1e-5, atol=1e-6)


def test_siamese_scan_commutes_with_flips():
    mixer, tokens = MambaMixer(16, d_state=4), torch.randn(2, 30, 16)
    for dims in ((1,), (2,), (1, 2)):
        torch.testing.assert_close(
            siamese_scan(mixer, tokens.flip(dims)), siamese_scan(mixer, tokens).flip(dims), rtol=1e-5, atol=1e-6
        )


def test_mixer_initialization_follows_the_definition():
    mixer = MambaMixer(64, d_state=8, dt_min=1e-3, dt_max=1e-1)
    step_size = nn.functional.softplus(mixer.dt_proj.bias)
    assert step_size.min() >= 1e-3 * 0.999 and step_size.max() <= 1e-1 * 1.001
    torch.testing.assert_close(mixer.A_log[0].exp(), torch.arange(1.0, 9.0))
    assert (mixer.D == 1).all()
    assert mixer.dt_proj.weight.abs().max() <= mixer.dt_rank**-0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mixer_under_autocast_stays_near_float32(dtype):
    mixer, x = MambaMixer(32), torch.randn(1, 200, 32)
    expected = mixer(x)
    with torch.autocast("cpu", dtype=dtype):
        y = mixer(x)
    y.float().square().mean().backward()
    assert torch.isfinite(mixer.A_log.grad).all()
    assert (y.float() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("argument", ["d_model", "d_state", "d_conv", "expand"])
def test_mixer_size_below_one_is_named(argument):
    with pytest.raises(ValueError, match=f"`{argument}`.*got 0"):
        MambaMixer(**({"d_model": 16} | {argument: 0}))


def test_mamba_layer_unknown_mixer_is_named():
    with pytest.raises(ValueError, match=r"`mixer`.*'attention'"):
        MambaLayer(3, 16, mixer="attention")


def test_channel_gate_needs_enough_channels():
    with pytest.raises(ValueError, match=r"`channels`.*got 8"):
        ChannelGate(8)


def test_checkpointed_batch_norm_counts_each_batch_once():
    plain, saved = (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2))
    saved.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, 8, 8)
    plain(x).sum().backward()
    checkpointed(saved, x).sum().backward()
    for (name, a), b in zip(plain.state_dict().items(), saved.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(plain.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_pad_to_multiple_repeats_the_far_plane():
    x = torch.randn(1, 1, 17, 16, 5)
    padded = pad_to_multiple(x, 16)
    assert padded.shape[2:] == (32, 16, 16)
    assert torch.equal(padded[:, :, :17, :, :5], x)
    assert torch.equal(padded[:, :, 31, :, :5], x[:, :, 16])
    assert pad_to_multiple(padded, 16) is padded


def test_resample_to_grid_is_a_crop_where_cells_align():
    x = torch.randn(1, 2, 6, 8)
    assert torch.equal(resample_to_grid(x, (40, 56), (5, 7), 8), x[:, :, :5, :7])


def test_resample_to_grid_reproduces_a_linear_ramp():
    # Cells of 8 voxels hold their center coordinate; two cells over 20 voxels have centers 5 and 15.
    x = (torch.arange(4.0) * 8 + 4).reshape(1, 1, 4, 1)
    assert resample_to_grid(x, (20, 8), (2, 1), 8).flatten().tolist() == pytest.approx([5.0, 15.0])
