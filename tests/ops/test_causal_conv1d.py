"""The causal convolution against its definition and against PyTorch's own padded convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_mamba.errors import BackendError
from monai_mamba.ops import causal_conv1d


def make(length, width, dtype=torch.float32):
    return [torch.randn(*s, dtype=dtype).requires_grad_() for s in ((2, length, 6), (6, width), (6,))]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 65])
def test_conv_matches_torch_conv1d(length, width, activation):
    x, weight, bias = make(length, width)
    y = causal_conv1d(x, weight, bias, activation, channels_last=True)
    padded = F.conv1d(x.double().transpose(1, 2), weight.double()[:, None], bias.double(), padding=width - 1, groups=6)
    expected = padded[..., :length].transpose(1, 2)
    expected = F.silu(expected) if activation else expected
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight, bias), grad)
    wanted = torch.autograd.grad(expected, (x, weight, bias), grad.double())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_conv_channels_first_equals_channels_last():
    x, weight, bias = make(33, 4)
    torch.testing.assert_close(
        causal_conv1d(x.transpose(1, 2), weight, bias, "silu"),
        causal_conv1d(x, weight, bias, "silu", channels_last=True).transpose(1, 2),
    )


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv_gradcheck_float64(activation, backend):
    def run(x, weight, bias):
        return causal_conv1d(x, weight, bias, activation, channels_last=True, backend=backend)

    assert torch.autograd.gradcheck(run, make(5, 4, torch.float64))


def test_conv_without_bias_matches_zero_bias():
    x, weight, bias = make(10, 4)
    torch.testing.assert_close(
        causal_conv1d(x, weight, channels_last=True), causal_conv1d(x, weight, 0 * bias, channels_last=True)
    )
    causal_conv1d(x, weight, channels_last=True).sum().backward()
    assert x.grad is not None and weight.grad is not None


def test_conv_bfloat16_sums_in_float32():
    x, weight, bias = (t.detach() for t in make(50, 4))
    low = causal_conv1d(x.bfloat16(), weight, bias, channels_last=True)
    exact = causal_conv1d(x.bfloat16().double(), weight.double(), bias.double(), channels_last=True)
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(torch.bfloat16).eps


def test_conv_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.monai_mamba.causal_conv1d_fwd.default, (*make(9, 4), True, "torch"))


def test_conv_double_backward_is_refused():
    x, weight, bias = make(9, 4)
    (first,) = torch.autograd.grad(
        causal_conv1d(x, weight, bias, "silu", channels_last=True).sum(), x, create_graph=True
    )
    with pytest.raises(BackendError, match="reference"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ((torch.zeros(2, 3), torch.zeros(3, 4)), ValueError, "`x`"),
        ((torch.zeros(2, 0, 3), torch.zeros(3, 4)), ValueError, "`x`"),
        ((torch.zeros(2, 5, 3), torch.zeros(4, 4)), ValueError, "`weight`"),
        ((torch.zeros(2, 5, 3), torch.zeros(3, 0)), ValueError, "`weight`"),
        ((torch.zeros(2, 5, 3), torch.zeros(3, 4), torch.zeros(4)), ValueError, "`bias`"),
        ((torch.zeros(2, 5, 3), torch.zeros(3, 4), None, "relu"), ValueError, "'relu'"),
        ((torch.zeros(2, 5, 3), None), TypeError, "`weight` must be a tensor"),
        ((torch.zeros(2, 5, 3, dtype=torch.int32), torch.zeros(3, 4)), TypeError, "int32"),
    ],
)
def test_conv_bad_argument_is_named(arguments, error, word):
    with pytest.raises(error, match=word):
        causal_conv1d(*arguments, channels_last=True)
