"""The backend ``mamba_ssm`` without its kernel: what it says then, and the kernel's contract kept by a stand-in."""

from __future__ import annotations

import importlib
import types

import pytest
import torch

from monai_mamba.errors import BackendError
from monai_mamba.ops import backends, mamba_ssm_backend, selective_scan
from monai_mamba.ops.backends import Call
from monai_mamba.ops.chunked import TorchBackend
from monai_mamba.ops.mamba_ssm_backend import MambaSsmBackend, load_kernel

BATCH, CHANNELS, LENGTH, GROUPS, STATES = 2, 6, 130, 2, 4


@pytest.fixture(autouse=True)
def _fresh():
    load_kernel.cache_clear()
    yield
    load_kernel.cache_clear()


def _replace(monkeypatch, kernel=None, error=None, version=None):
    def import_module(name):
        assert name == "selective_scan_cuda"
        if error is not None:
            raise error
        return kernel

    def find(name):
        if version is None:
            raise mamba_ssm_backend.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(mamba_ssm_backend, "importlib", types.SimpleNamespace(import_module=import_module))
    monkeypatch.setattr(
        mamba_ssm_backend,
        "metadata",
        types.SimpleNamespace(version=find, PackageNotFoundError=importlib.metadata.PackageNotFoundError),
    )


@pytest.mark.parametrize(
    ("error", "version", "expected"),
    [
        pytest.param(
            ModuleNotFoundError("x", name="selective_scan_cuda"), None, ["mamba-ssm is not installed"], id="absent"
        ),
        pytest.param(
            ModuleNotFoundError("x", name="selective_scan_cuda"),
            "2.3.2",
            ["mamba-ssm 2.3.2 is installed without the kernel", "MAMBA_KEEP_CUDA_BUILD=TRUE"],
            id="installed-without-kernel",
        ),
        pytest.param(ModuleNotFoundError("x", name="einops"), "2.3.2", ["needs the module einops"], id="dependency"),
        pytest.param(ImportError("undefined symbol: _ZN3c10"), "2.3.2", ["undefined symbol", "build it"], id="abi"),
        pytest.param(OSError("libcudart.so.11.0: cannot open"), "2.3.2", ["libcudart.so.11.0", "build it"], id="cuda"),
    ],
)
def test_availability_names_what_is_missing_and_the_cure(monkeypatch, error, version, expected):
    _replace(monkeypatch, error=error, version=version)
    availability = MambaSsmBackend().availability()
    assert not availability.ok
    for part in expected:
        assert part in availability.reason


def test_forced_backend_without_kernel_raises_with_the_reason(monkeypatch):
    _replace(monkeypatch, error=ModuleNotFoundError("x", name="selective_scan_cuda"), version="2.3.2")
    u = torch.randn(1, 2, 3)
    with pytest.raises(BackendError, match="without the kernel"):
        selective_scan(u, u, -torch.rand(2, 1), torch.randn(1, 1, 3), torch.randn(1, 1, 3), backend="mamba_ssm")


def test_it_is_chosen_on_request_only():
    assert backends.get_backend("mamba_ssm").priority == 0


def test_refusals_name_the_limit():
    backend = MambaSsmBackend()
    assert "float64" in backend.refusal(Call("selective_scan", "cuda", torch.float64, 1, 8, 8, 1, 16))
    assert "N=257" in backend.refusal(Call("selective_scan", "cuda", torch.float32, 1, 8, 8, 1, 257))
    assert backend.refusal(Call("selective_scan", "cuda", torch.bfloat16, 1, 8, 8, 1, 16)) is None


class Kernel(types.ModuleType):
    """The calls of selective_scan_cuda with its checks of shape, type and stride; computed by the torch backend."""

    def __init__(self):
        super().__init__("selective_scan_cuda")
        self.calls = []

    @staticmethod
    def _native(u, delta, A, B, C, D, z, bias):
        batch, channels, length = u.shape
        groups, states = B.shape[1], A.shape[1]
        assert delta.shape == u.shape and A.shape == (channels, states)
        assert B.shape == C.shape == (batch, groups, states, length)
        assert z is None or z.shape == u.shape
        for sequence in (u, delta, B, C, z):
            assert sequence is None or (sequence.stride(-1) == 1 and sequence.dtype == u.dtype)
        for parameter in (A, D, bias):
            assert parameter is None or parameter.dtype == torch.float32
        first, second, third = (None if t is None else t.transpose(1, 2) for t in (u, delta, z))
        return first, second, A, B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2), D, third, bias

    def fwd(self, u, delta, A, B, C, D, z, bias, softplus):
        self.calls.append("fwd")
        native = self._native(u, delta, A, B, C, D, z, bias)
        plain, _ = TorchBackend().scan_forward(*native[:6], None, native[7], softplus, False)
        chunks = -(-u.shape[2] // 2048)
        out = [plain.transpose(1, 2).contiguous(), u.new_zeros(*u.shape[:2], chunks, 2 * A.shape[1])]
        if z is not None:
            out.append(out[0] * torch.nn.functional.silu(z))
        return out

    def bwd(self, u, delta, A, B, C, D, z, bias, grad, checkpoints, out, grad_z, softplus, recompute):
        self.calls.append("bwd")
        assert grad.stride(-1) == 1 and grad.dtype == u.dtype and grad_z is None and recompute is False
        assert checkpoints.shape == (*u.shape[:2], 1, 2 * A.shape[1])
        native = self._native(u, delta, A, B, C, D, z, bias)
        plain, _ = TorchBackend().scan_forward(*native[:6], None, native[7], softplus, False)
        assert torch.allclose(out.transpose(1, 2), plain)  # before the gate
        g = TorchBackend().scan_backward(grad.transpose(1, 2), None, *native, softplus)
        found = [g[0].transpose(1, 2), g[1].transpose(1, 2), g[2], g[3].permute(0, 2, 3, 1), g[4].permute(0, 2, 3, 1)]
        return [*found, g[5], g[7], *([] if z is None else [g[6].transpose(1, 2)])]


def _values(with_optional):
    def draw(*shape):
        return torch.randn(*shape)

    values = [draw(BATCH, LENGTH, CHANNELS), draw(BATCH, LENGTH, CHANNELS), -torch.rand(CHANNELS, STATES)]
    values += [draw(BATCH, LENGTH, GROUPS, STATES), draw(BATCH, LENGTH, GROUPS, STATES)]
    optional = [draw(CHANNELS), draw(BATCH, LENGTH, CHANNELS), draw(CHANNELS)]
    return values + (optional if with_optional else [None] * 3)


@pytest.mark.parametrize("with_optional", [True, False], ids=["all", "none"])
def test_calls_keep_the_contract_of_the_kernel(monkeypatch, with_optional):
    kernel = Kernel()
    _replace(monkeypatch, kernel=kernel)
    values = _values(with_optional)
    grad = torch.randn(BATCH, LENGTH, CHANNELS)
    y, states = MambaSsmBackend().scan_forward(*values, True, True)
    expected, known = TorchBackend().scan_forward(*values, True, True)
    assert states is None and y.is_contiguous()
    assert torch.allclose(y, expected, atol=1e-6)
    found = MambaSsmBackend().scan_backward(grad, states, *values, True)
    assert kernel.calls == ["fwd", "fwd", "bwd"]
    for k, (a, b) in enumerate(zip(found, TorchBackend().scan_backward(grad, known, *values, True), strict=True)):
        assert (a is None) == (b is None), k
        assert a is None or (a.shape == b.shape and torch.allclose(a, b, atol=1e-5)), k


def test_low_precision_goes_in_as_one_type(monkeypatch):
    """Types as autocast leaves them: a bfloat16 sequence with float32 steps and matrices."""
    _replace(monkeypatch, kernel=Kernel())
    values = _values(False)
    values[0] = values[0].bfloat16()
    y, _ = MambaSsmBackend().scan_forward(*values, True, False)
    assert y.dtype == torch.bfloat16
    found = MambaSsmBackend().scan_backward(y, None, *values, True)
    assert [g.dtype for g in found if g is not None] == [torch.bfloat16] + [torch.float32] * 4


@pytest.mark.gpu
def test_kernel_on_the_gpu_matches_float64():
    if load_kernel()[0] is None:
        pytest.skip(load_kernel()[1])
    values = [None if v is None else v.cuda() for v in _values(True)]
    results = []
    for backend, dtype in (("mamba_ssm", torch.float32), ("torch", torch.float64)):
        leaves = [v.to(dtype).requires_grad_() for v in values]
        y = selective_scan(*leaves, delta_softplus=True, channels_last=True, backend=backend)
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected).abs().max() <= 1e-4 * expected.abs().max()
