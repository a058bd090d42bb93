"""The choice of a backend: forced, by context, by environment, automatic, and what is said about it."""

from __future__ import annotations

import warnings

import pytest
import torch

from monai_mamba.errors import BackendError
from monai_mamba.ops import backends, causal_conv1d, list_backends, selective_scan, ss2d_scan, use_backend
from monai_mamba.ops.backends import Availability, Backend, Call, resolve

CALL = Call("selective_scan", "cpu", torch.float32, 1, 64, 8, 1, 16)


class Fast(Backend):
    name = "fast"
    priority = 10_000
    ops = frozenset({"selective_scan"})
    device_types = frozenset({"cpu"})
    available = Availability(True, "made for this test")
    why_not: str | None = None

    def availability(self):
        return self.available

    def refusal(self, call):
        return self.why_not

    def scan_forward(self, u, *_):
        return torch.full_like(u, 7.0), None


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(backends, "_REGISTRY", dict(backends._REGISTRY))
    monkeypatch.setattr(backends, "_announced", set())
    return backends.register(Fast())


def scan(d_state=3, dtype=torch.float32, **arguments):
    u, matrix = torch.ones(1, 4, 2, dtype=dtype), torch.ones(1, 4, d_state, dtype=dtype)
    return selective_scan(u, u, -torch.ones(2, d_state, dtype=dtype), matrix, matrix, channels_last=True, **arguments)


def test_automatic_choice_takes_the_highest_priority(fast):
    assert resolve(CALL) is fast
    assert (scan() == 7).all()


def test_forced_by_argument_context_and_environment(fast, monkeypatch):
    assert not (scan(backend="torch") == 7).any()
    with use_backend("torch"):
        assert not (scan() == 7).any()
        assert (scan(backend="fast") == 7).all()  # the argument wins
        with use_backend(None):
            assert (scan() == 7).all()
    assert (scan() == 7).all()
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "torch")
    assert not (scan() == 7).any()


def test_environment_may_ask_for_the_definition(monkeypatch):
    """The one backend that is no operator's."""
    x, maps = torch.randn(1, 4, 3), [torch.randn(1, 2, 2, *rest) for rest in ((3,), (1, 3), (1, 2), (1, 2))]
    calls = (
        lambda **a: scan(**a),
        lambda **a: ss2d_scan(maps[0], maps[1], -torch.ones(1, 3, 2), *maps[2:], routes=["row"], **a),
        lambda **a: causal_conv1d(x, torch.ones(3, 2), channels_last=True, **a),
    )
    expected = [call(backend="reference") for call in calls]
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert all(torch.equal(call(), y) for call, y in zip(calls, expected, strict=True))


def test_context_and_environment_leave_alone_what_their_backend_has_no_operator_for(fast, monkeypatch):
    """A network that convolves before it scans runs its scans on a backend without convolution, as mamba_ssm is one."""
    x, weight = torch.randn(1, 4, 3), torch.ones(3, 2)
    expected = causal_conv1d(x, weight, channels_last=True)
    with use_backend("fast"):
        assert (scan() == 7).all() and torch.equal(causal_conv1d(x, weight, channels_last=True), expected)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fast")
    assert (scan() == 7).all() and torch.equal(causal_conv1d(x, weight, channels_last=True), expected)
    with pytest.raises(BackendError, match="it has no causal_conv1d"):
        causal_conv1d(x, weight, channels_last=True, backend="fast")


def test_what_the_environment_asks_for_in_vain_is_said_with_its_name(fast, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "nope")
    with pytest.raises(BackendError, match=r"^MONAI_MAMBA_BACKEND 'nope' is unknown; use one of: .*torch"):
        scan()
    fast.why_not = "N is odd"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(BackendError, match=r"asked for by MONAI_MAMBA_BACKEND .* N is odd"):
        scan()


def test_context_is_left_after_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert backends.requested_name(None, "selective_scan") == ""


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(BackendError, match=r"'nope' is unknown.*torch"):
        scan(backend="nope")
    with pytest.raises(BackendError, match="unknown"), use_backend("nope"):
        pass


def test_forced_backend_that_cannot_serve_raises_with_the_reason(fast):
    fast.why_not = "N is odd"
    with pytest.raises(BackendError, match=r"'fast' was asked for .* N is odd"):
        scan(backend="fast")
    with pytest.raises(BackendError, match="it serves cpu tensors, got cuda"):
        resolve(Call("selective_scan", "cuda", torch.float32, 1, 64, 8, 1, 16), "fast")
    with pytest.raises(BackendError, match="it has no causal_conv1d"):
        resolve(Call("causal_conv1d", "cpu", torch.float32, 1, 64, 8, width=4), "fast")
    fast.available = Availability(False, "no compiler")
    with pytest.raises(BackendError, match="not available here: no compiler"):
        scan(backend="fast")


def test_slow_automatic_choice_warns_once_with_reason_and_cure(fast, monkeypatch):
    for name in list(backends._REGISTRY):
        if name not in ("fast", "torch", "reference"):
            del backends._REGISTRY[name]
    fast.available = Availability(False, "no compiler found, install gcc")
    with pytest.warns(UserWarning, match=r"slower backend 'torch'.*install gcc.*monai-mamba doctor"):
        scan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: scan(d_state=257), "at most 256 states, got N=257"),
        (lambda: scan(dtype=torch.float64), "computes in float32, got float64"),
        (
            lambda: causal_conv1d(torch.ones(1, 4, 2), torch.ones(2, 65), channels_last=True),
            "at most 64 taps, got W=65",
        ),
    ],
    ids=["states", "float64", "taps"],
)
def test_what_the_fast_backends_do_not_serve_falls_to_torch_and_is_announced(monkeypatch, call, reason):
    if not backends.get_backend("cpu").availability().ok:
        pytest.skip("no C library")
    monkeypatch.setattr(backends, "_announced", set())
    with pytest.warns(UserWarning, match=rf"runs on the slower backend 'torch', because cpu: .*{reason}"):
        y = call()
    with use_backend("reference"):
        torch.testing.assert_close(y, call())


def test_no_backend_at_all_says_why(fast):
    for name in list(backends._REGISTRY):
        if name != "fast":
            del backends._REGISTRY[name]
    fast.why_not = "too long"
    with pytest.raises(BackendError, match="fast: too long"):
        scan()


def test_names_are_unique_and_sorted(fast):
    with pytest.raises(ValueError, match="registered already"):
        backends.register(Fast())
    priorities = [b.priority for b in list_backends()]
    assert priorities == sorted(priorities, reverse=True)
