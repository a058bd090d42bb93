"""Every network under torch.compile and under autocast."""

from __future__ import annotations

import pytest
import torch

from monai_mamba.networks import (
    MedMambaSeg,
    NNMambaClassifier,
    NNMambaSeg,
    VMamba,
    VMambaSeg,
    XFMamba,
    XFMambaSeg,
    create_model,
    medmamba,
    nnmamba,
    xfmamba,
)
from tests.parity import fixture_input, fixture_weights, load_fixture, load_table, renamed

SMALL_2D = {"depths": (1, 1, 1, 1), "dims": 16}
SMALL = {
    "nnmamba_seg": ({"init_filters": 16, "num_blocks": 2, "deep_supervision": True}, (2, 1, 20, 16, 33)),
    "nnmamba_cls": ({"init_filters": 16, "num_blocks": 2, "dropout_rate": 0.0}, (2, 1, 32, 16, 17)),
    "nnmamba_cls_sequential": ({"init_filters": 16, "num_blocks": 2, "dropout_rate": 0.0}, (2, 1, 32, 16, 17)),
    "medmamba_t": (SMALL_2D, (2, 3, 33, 64)),
    "medmamba_t_sum": (SMALL_2D, (2, 3, 33, 64)),
    "vmamba_t": (SMALL_2D, (2, 3, 33, 64)),
    "vmamba_v0_t": (SMALL_2D, (2, 3, 33, 64)),
    "xfmamba_t": (SMALL_2D, (2, 6, 33, 64)),
    "xfmamba_s_late": (SMALL_2D, (2, 6, 33, 64)),
    "xfmamba_s_early": (SMALL_2D, (2, 6, 33, 64)),
    "medmamba_t_seg": ({**SMALL_2D, "detail_filters": 8, "deep_supervision": True}, (2, 1, 40, 33)),
    "vmamba_t_seg": ({**SMALL_2D, "detail_filters": 8}, (2, 1, 40, 33)),
    "xfmamba_t_seg": ({**SMALL_2D, "detail_filters": 8}, (2, 2, 40, 33)),
}


def small(name):
    arguments, shape = SMALL[name]
    if "nnmamba" not in name:
        arguments = {**arguments, "drop_path_rate": 0.0}
    return create_model(name, **arguments), torch.randn(shape)


def total(outputs):
    return sum(y.square().mean() for y in outputs) if isinstance(outputs, list) else outputs.square().mean()


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SMALL)
def test_network_is_one_graph_without_breaks(name):
    network, x = small(name)
    network.eval()
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        torch.testing.assert_close(total(compiled(x)), total(network(x)), rtol=1e-5, atol=1e-6)


# Tracing the backward pass takes 5 to 10 s each: one network of each kind of scan here, the others in the slow suite.
@pytest.mark.parametrize(
    "name", [name if name == "medmamba_t" else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_compiled_network_has_the_same_gradients(name):
    network, x = small(name)
    network.eval()
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    loss, expected = total(compiled(x)), total(network(x))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    reference = gradients(network, expected)
    for key, gradient in gradients(network, loss).items():
        torch.testing.assert_close(gradient, reference[key], rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_xfmamba_compiles_with_a_view_mask():
    network, x = small("xfmamba_t")
    network.eval()
    mask = torch.tensor([[True, False], [True, True]])
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, view_mask=mask), network(x, view_mask=mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", SMALL)
def test_network_trains_finitely_under_autocast(name, dtype):
    network, x = small(name)
    # On processors with AVX512_BF16, the oneDNN of torch 2.14.1 makes the weight gradient of a bfloat16 Conv3d on maps
    # of 2 x 2 x 2 voxels from memory that nobody wrote: its values change with MALLOC_PERTURB_, up to infinity.
    with torch.backends.mkldnn.flags(enabled=False):
        with torch.autocast("cpu", dtype=dtype):
            loss = total(network(x))
        found = gradients(network, loss)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def _medmamba():
    fixture = load_fixture("medmamba", "medmamba_t_c6_64")
    network = create_model("medmamba_t", num_classes=6)
    network.load_state_dict(renamed(fixture.weights, medmamba.PUBLISHED_KEYS))
    return network, (fixture.input,)


def _vmamba(name, table):
    network = create_model(name)
    assert isinstance(network, VMamba)
    network.load_state_dict(fixture_weights(load_table("vmamba", table)["keys"]))
    return network, (fixture_input("vmamba_t_classifier_64", (1, 3, 64, 64)),)


def _xfmamba():
    fixture = load_fixture("xfmamba", "xfmamba_t_c2_64")
    network = XFMamba()
    network.load_state_dict(renamed(fixture.weights, xfmamba.PUBLISHED_KEYS))
    return network, tuple(fixture_input(fixture.name + suffix, (1, 3, 64, 64)) for suffix in ("", ":2"))


def _nnmamba(case, network):
    fixture = load_fixture("nnmamba", case)
    network.load_state_dict(renamed(fixture.weights, nnmamba.PUBLISHED_KEYS))
    return network, (fixture.input,)


# Weights of the parity recipe: not trained, hence harder on rounding than a trained network.
FULL = {
    "medmamba_t": _medmamba,
    "vmamba_t": lambda: _vmamba("vmamba_t", "v2_tiny_s1l8"),
    "vmamba_v0_t": lambda: _vmamba("vmamba_v0_t", "v0_tiny"),
    "xfmamba_t": _xfmamba,
    "nnmamba_seg": lambda: _nnmamba("seg_pub", NNMambaSeg(3, 1, 6, 16)),
    "nnmamba_cls": lambda: _nnmamba("cls_pub", NNMambaClassifier(num_classes=2)),
    "medmamba_t_seg": lambda: (MedMambaSeg(2, 3), (torch.randn(1, 2, 64, 64),)),
    "vmamba_t_seg": lambda: (VMambaSeg(2, 3), (torch.randn(1, 2, 64, 64),)),
    "xfmamba_t_seg": lambda: (XFMambaSeg(2, 3), (torch.randn(1, 2, 64, 64),)),
}


@pytest.mark.parametrize("name", FULL)
def test_autocast_stays_within_the_stated_distance(name):
    network, inputs = FULL[name]()
    network.eval()
    with torch.no_grad():
        expected = network(*inputs)
        # Relative L2 of the output, docs/networks/README.md; measured 0.077 and 0.023 at most (xfmamba_t).
        for dtype, limit in ((torch.bfloat16, 0.1), (torch.float16, 0.03)):
            with torch.autocast("cpu", dtype=dtype):
                found = network(*inputs).float()
            assert torch.isfinite(found).all()
            assert (found - expected).norm() <= limit * expected.norm(), dtype


@pytest.mark.slow
def test_small_network_equals_eager_under_inductor():
    """Slow because inductor compiles C++, for which the quick suite must not need a compiler."""
    from monai_mamba.networks import MedMamba

    network = MedMamba(in_channels=1, num_classes=3, depths=(1, 1), dims=16).eval()
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(network, fullgraph=True)(x), network(x), rtol=1e-4, atol=1e-5)
