"""Time the scans on this machine against loops, other kernels and what the machine can do; writes JSON and Markdown.

    OMP_NUM_THREADS=1 python benchmarks/scan.py --output benchmarks/results/scan

runs on the CPU and, where PyTorch finds one, on the GPU. Every shape passes a comparison with float64 before it is
timed. Times on the CPU are of one thread, but for the table ``threads``. The minimum of the repetitions is the figure;
median and number tell how disturbed the run was. Compare ratios within one run only.

``--tables`` and ``--variants`` make a part; the rows of parts written to one ``--output`` are put together.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_mamba import __version__
from monai_mamba.errors import BackendError
from monai_mamba.ops import causal_conv1d, cpu_library, get_backend, selective_scan, ss2d_scan
from monai_mamba.ops.backends import Backend
from monai_mamba.ops.cpu import use_variant
from monai_mamba.ops.routes import ROUTES


@dataclass(frozen=True)
class Shape:
    """Sizes of a scan: batch, channels (of all groups), steps, groups, states, and whether there is a gate."""

    batch: int
    channels: int
    length: int
    groups: int
    states: int
    gate: bool

    @property
    def updates(self) -> int:
        return self.batch * self.channels * self.length * self.states

    @property
    def moved_bytes(self) -> int:
        """What a forward pass in float32 reads and writes at least: sequences, matrices, output."""
        sequences = (4 if self.gate else 3) * self.channels
        return 4 * self.batch * self.length * (sequences + 2 * self.groups * self.states)


_MEDMAMBA = {1: (384, 3136), 2: (768, 784), 3: (1536, 196), 4: (3072, 49)}  # at 224 x 224: routes x channels, pixels
SHAPES = {
    **{
        f"MedMamba-T stage {stage}, batch {batch}": Shape(batch, channels, length, 4, 16, False)
        for batch in (1, 4, 32)
        for stage, (channels, length) in _MEDMAMBA.items()
    },
    # At 128 x 128 x 128 the three stages see 32, 16 and 8 cubed, four passes in one call.
    "nnMamba 32^3, 4 passes": Shape(4, 128, 32768, 1, 16, True),
    "nnMamba 16^3, 4 passes": Shape(4, 256, 4096, 1, 16, True),
    "nnMamba 8^3, 4 passes": Shape(4, 512, 512, 1, 16, True),
    "long, 48^3": Shape(1, 128, 110592, 1, 16, True),
    **{
        f"VMamba-T stage {stage}, N=1": Shape(1, channels, length, 4, 1, False)
        for stage, (channels, length) in _MEDMAMBA.items()
    },
    "VMamba-T stage 1, N=1, batch 32": Shape(32, 384, 3136, 4, 1, False),
}
MAPS = {"56^2, 96": (56, 96), "28^2, 192": (28, 192), "14^2, 384": (14, 384), "7^2, 768": (7, 768)}
CONVOLUTIONS = {"32768 x 128": (32768, 128), "4096 x 256": (4096, 256), "512 x 512": (512, 512)}
#: The loops are timed up to so many state updates: beyond, they need minutes and gigabytes.
_LOOP_UPDATES, _LOOP_BACKWARD_UPDATES = 3.0e8, 3.0e7
_PROBE_ROUNDS = 2000  # state updates of each lane of the probe of a GPU
_FORWARD_TOLERANCE, _GRADIENT_TOLERANCE = 5e-7, 3e-6


class Clock:
    """Times functions on one device."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def once(self, function: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end)
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)

    def measure(self, function: Callable[[], object], seconds: float | None = None) -> dict[str, float]:
        """Minimum, median and number of as many calls as fit the seconds, but at least four after a first one.

        Two for ``seconds=0``: of the loops, which take long.
        """
        self.once(function)
        times: list[float] = []
        end = time.perf_counter() + (self.seconds if seconds is None else seconds)
        least = 2 if seconds == 0 else 4  # large outputs are new memory, the price of which varies
        while len(times) < least or (time.perf_counter() < end and len(times) < 1000):
            times.append(self.once(function))
        return {"ms": min(times), "median_ms": sorted(times)[len(times) // 2], "calls": len(times)}

    def extra_bytes(self, function: Callable[[], object]) -> int | None:
        """How far memory rises above what is in use before the call; None where the system does not tell."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = function()
            peak = torch.cuda.max_memory_allocated()
            del result
            return peak - before
        try:
            ctypes.CDLL(None).malloc_trim(0)  # pages that were freed would be used again without showing
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
            before = _resident("VmRSS")
            result = function()
            peak = _resident("VmHWM")
            del result
            return max(0, peak - before)
        except (OSError, AttributeError):
            return None


def _resident(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    if found is None:
        raise OSError(f"no {name} in /proc/self/status")
    return 1024 * int(found[1])


def inputs(shape: Shape, device: str = "cpu") -> list[Tensor | None]:
    """Arguments of ``scan_forward`` up to the bias, drawn like those of a network at its initialisation."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    sequence = (shape.batch, shape.length, shape.channels)
    matrix = (shape.batch, shape.length, shape.groups, shape.states)
    A = -torch.arange(1, shape.states + 1.0, device=device).repeat(shape.channels, 1)
    u, delta, z = draw(*sequence), 0.5 * draw(*sequence), draw(*sequence) if shape.gate else None
    return [u, delta, A, draw(*matrix), draw(*matrix), draw(shape.channels), z, draw(shape.channels) - 4]


def channels_first(values: list[Tensor | None]) -> list[Tensor | None]:
    """The same arguments as published networks have them.

    ``u``, ``delta``, ``z`` are ``(B, D, L)``, B and C ``(B, G, N, L)``, or ``(B, N, L)`` for a single group.
    """
    u, delta, A, B, C, D, z, bias = values
    B, C = (m.permute(0, 2, 3, 1).squeeze(1).contiguous() for m in (B, C))
    u, delta, z = (None if t is None else t.transpose(1, 2).contiguous() for t in (u, delta, z))
    return [u, delta, A, B, C, D, z, bias]


def _of_channels(matrix: Tensor, channels: int) -> Tensor:
    """B or C repeated for all channels of their groups, as published code does."""
    return matrix if matrix.ndim == 3 else matrix.repeat_interleave(channels // matrix.shape[1], 1)


def _steps(tensor: Tensor, axis: int, by_unbind: bool) -> Iterable[Tensor]:
    """The steps of a sequence one by one: by ``unbind``, or by indexing, the backward pass of which is quadratic."""
    return tensor.unbind(axis) if by_unbind else (tensor.select(axis, i) for i in range(tensor.shape[axis]))


def _finished(outputs: list[Tensor], u: Tensor, D: Tensor, z: Tensor | None) -> Tensor:
    y = torch.stack(outputs, 2) + D[:, None] * u
    return y if z is None else y * F.silu(z)


def published_loop(u, delta, A, B, C, D, z, bias, *, by_unbind: bool = False) -> Tensor:
    """The formula to which published code falls back without CUDA: einsum before the loop and in every step."""
    delta = F.softplus(delta + bias[:, None])
    B, C = (_of_channels(m, u.shape[1]) for m in (B, C))
    letters = "bdn" if B.ndim == 4 else "bn"
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum(f"bdl,{letters}l,bdl->bdln", delta, B, u)
    h = torch.zeros_like(drive[:, :, 0])
    outputs = []
    for a, x, c in zip(*(_steps(t, axis, by_unbind) for t, axis in ((decay, 2), (drive, 2), (C, -1))), strict=True):
        h = a * h + x
        outputs.append(torch.einsum(f"bdn,{letters}->bd", h, c))
    return _finished(outputs, u, D, z)


def lean_loop(u, delta, A, B, C, D, z, bias, *, by_unbind: bool = False) -> Tensor:
    """The same by products and sums, without einsum: faster where the steps are few and wide."""
    delta = F.softplus(delta + bias[:, None])
    B, C = (_of_channels(m, u.shape[1]) if m.ndim == 4 else m[:, None] for m in (B, C))
    decay = torch.exp(delta[..., None] * A[:, None])
    drive = (delta * u)[..., None] * B.transpose(2, 3)
    h = torch.zeros_like(drive[:, :, 0])
    outputs = []
    for a, x, c in zip(*(_steps(t, axis, by_unbind) for t, axis in ((decay, 2), (drive, 2), (C, -1))), strict=True):
        h = a * h + x
        outputs.append((h * c).sum(-1))
    return _finished(outputs, u, D, z)


def mamba_ssm_reference() -> Callable[..., Tensor] | None:
    """The fallback in mamba-ssm's own source, if it is installed: what ``published_loop`` is held against."""
    try:
        # It imports its CUDA kernel, which the fallback does not use and a machine without CUDA does not have.
        with mock.patch.dict(sys.modules, {"selective_scan_cuda": ModuleType("selective_scan_cuda")}):
            source = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except (ImportError, OSError) as error:
        print(f"mamba-ssm's loop is left out: {error}", file=sys.stderr)
        return None
    return lambda *values: source.selective_scan_ref(*values, delta_softplus=True)


def with_backward(function: Callable[..., Tensor], values: list[Tensor | None]) -> Callable[[], object]:
    """A call of the function and of its derivatives by autograd."""
    leaves = [None if v is None else v.detach().clone().requires_grad_() for v in values]
    wanted = [v for v in leaves if v is not None]

    def run() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves).sum(), wanted)

    return run


def part_of_scan(values: list[Tensor | None], groups: int) -> list[Tensor | None]:
    """All steps of the first batch item and of at most 32 channels of each group."""

    def first_channels(t: Tensor, axis: int) -> Tensor:
        own = t.unflatten(axis, (groups, -1)).narrow(axis + 1, 0, min(32, t.shape[axis] // groups))
        return own.flatten(axis, axis + 1).contiguous()

    u, delta, A, B, C, D, z, bias = values
    u, delta, z = (None if t is None else first_channels(t[:1], 2) for t in (u, delta, z))
    A, D, bias = (first_channels(t, 0) for t in (A, D, bias))
    return [u, delta, A, B[:1], C[:1], D, z, bias]


def gate_of_correctness(backend: Backend, values: list[Tensor | None], groups: int) -> dict[str, float]:
    """Errors against PyTorch in float64; ends the program if they are too large.

    Over the whole length, along which errors add up, but of a part of the channels.
    """
    short = part_of_scan(values, groups)
    y, states = backend.scan_forward(*short, True, True)
    wide = [None if v is None else v.double() for v in short]
    expected, wide_states = get_backend("torch").scan_forward(*wide, True, True)
    forward = ((y - expected).abs().max() / expected.abs().max()).item()
    if not forward <= _FORWARD_TOLERANCE:
        raise SystemExit(
            f"forward error {forward:.1e} of the maximum, more than {_FORWARD_TOLERANCE}: nothing is timed"
        )
    found = backend.scan_backward(y, states, *short, True)
    reference = get_backend("torch").scan_backward(y.double(), wide_states, *wide, True)
    errors = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, reference, strict=True) if b is not None
    ]
    if not max(errors) <= _GRADIENT_TOLERANCE:
        raise SystemExit(f"gradient error {max(errors):.1e} of the maximum, more than {_GRADIENT_TOLERANCE}")
    return {"forward_error": forward, "gradient_error": max(errors)}


def cpu_limits(variant: str, clock: Clock) -> dict[str, float]:
    """Rates of one core with everything in registers and the first-level cache, and bandwidth of a large copy."""
    library = cpu_library.load()
    index = library.choose_variant(variant)
    rounds, found = 1000, {}
    kinds = ((0, "exp2", 1024), (1, "fma", 8192), (2, "update", 16384), (3, "single_state", 1024))
    for kind, name, operations in kinds:
        best = clock.measure(lambda kind=kind: library.probe(index, kind, rounds), 0.3)["ms"]
        found[f"{name}_g_per_s"] = rounds * operations / best / 1e6
    return {**found, **copy_bandwidth(clock)}


def copy_bandwidth(clock: Clock) -> dict[str, float]:
    source = torch.randn(2**25, device=clock.device)  # 134 MB: more than any cache holds
    target = torch.empty_like(source)
    best = clock.measure(lambda: target.copy_(source), 0.5)["ms"]
    return {"copy_gb_per_s": 2 * 4 * source.numel() / best / 1e6}


def scan_row(
    name: str,
    backend: Backend,
    clock: Clock,
    limit: dict[str, float],
    rivals: dict[str, Callable],
    loops: dict[str, Callable],
) -> dict:
    """One shape: our times and memory, the limit, and what others need for the same."""
    shape = SHAPES[name]
    values = inputs(shape, clock.device)
    row: dict = {"shape": name, **gate_of_correctness(backend, values, shape.groups)}
    forward = clock.measure(lambda: backend.scan_forward(*values, True, False))
    training = clock.measure(lambda: backend.scan_forward(*values, True, True))
    outcome = backend.scan_forward(*values, True, True)
    backward = clock.measure(lambda: backend.scan_backward(*outcome, *values, True))
    row |= {f"forward_{k}": v for k, v in forward.items()} | {f"backward_{k}": v for k, v in backward.items()}
    both = training["ms"] + backward["ms"]
    row["forward_g_per_s"] = shape.updates / forward["ms"] / 1e6
    row["backward_per_forward"] = backward["ms"] / forward["ms"]
    memory_ms = shape.moved_bytes / limit["copy_gb_per_s"] / 1e6
    single = limit.get("single_state_g_per_s") if shape.states == 1 else None  # its softplus costs most
    update_ms = shape.updates / (single or limit["update_g_per_s"]) / 1e6
    row["forward_per_copy_bandwidth"] = forward["ms"] / memory_ms
    row["forward_per_limit"] = forward["ms"] / max(update_ms, memory_ms)
    size = output = 4 * shape.batch * shape.length * shape.channels
    extra = clock.extra_bytes(lambda: backend.scan_forward(*values, True, False))
    if extra is not None:
        row["inference_extra_mb_above_output"] = (extra - output) / 1e6
        kept = clock.extra_bytes(lambda: backend.scan_forward(*values, True, True))
        row["training_extra_above_output_per_u"] = (kept - output) / size
        row["states_per_u"] = 4 * outcome[1].numel() / size
        made = sum(4 * v.numel() for v in values if v is not None)  # one gradient for each
        used = clock.extra_bytes(lambda: backend.scan_backward(*outcome, *values, True))
        row["backward_extra_mb_above_gradients"] = (used - made) / 1e6
    if loops and shape.updates <= _LOOP_UPDATES:
        first = channels_first(values)
        loop_ms = {column: clock.measure(lambda loop=loop: loop(*first), 0)["ms"] for column, loop in loops.items()}
        row |= {f"{column}_per_forward": ms / forward["ms"] for column, ms in loop_ms.items()}
        torch_ms = clock.measure(lambda: get_backend("torch").scan_forward(*values, True, False), 0)["ms"]
        row["loop_per_torch"] = loop_ms["loop"] / torch_ms
    if loops and shape.updates <= _LOOP_BACKWARD_UPDATES:
        for column, loop in (("linear_loop", published_loop), ("lean_linear_loop", lean_loop)):
            linear = with_backward(functools.partial(loop, by_unbind=True), first)
            row[f"{column}_per_forward_and_backward"] = clock.measure(linear, 0)["ms"] / both
    for rival, scan in rivals.items():
        row[f"{rival}_per_forward"] = clock.measure(lambda scan=scan: scan(*values))["ms"] / forward["ms"]
        row[f"{rival}_per_forward_and_backward"] = clock.measure(with_backward(scan, values))["ms"] / both
    return row


def map_row(name: str, backend: Backend, clock: Clock) -> dict:
    """Scan, cross-scan and cross-merge in one pass against the three one after the other."""
    size, channels = MAPS[name]
    shape = (1, size, size, 4)
    values = (
        *(torch.randn(1, size, size, channels), 0.5 * torch.randn(*shape, channels)),
        -torch.arange(1, 17.0).repeat(4, channels, 1),
        *(torch.randn(*shape, 16), torch.randn(*shape, 16), torch.randn(4, channels), torch.randn(4, channels) - 4),
    )
    values = tuple(v.to(clock.device) for v in values)
    fused, fused_states = backend.ss2d_forward(*values, ROUTES, True, True)
    apart, apart_states = Backend.ss2d_forward(backend, *values, ROUTES, True, True)
    if not (fused - apart).abs().max() <= 1e-6 * apart.abs().max():
        raise SystemExit(f"the fused map scan differs from the separate one at {name}: nothing is timed")
    row: dict = {"map": name}
    for part, calls in (
        (
            "forward",
            (
                lambda: backend.ss2d_forward(*values, ROUTES, True, False),
                lambda: Backend.ss2d_forward(backend, *values, ROUTES, True, False),
            ),
        ),
        (
            "backward",
            (
                lambda: backend.ss2d_backward(fused, fused_states, *values, ROUTES, True),
                lambda: Backend.ss2d_backward(backend, fused, apart_states, *values, ROUTES, True),
            ),
        ),
    ):
        one, three = (clock.measure(call) for call in calls)
        row[f"fused_{part}_ms"], row[f"separate_{part}_ms"] = one["ms"], three["ms"]
        row[f"fused_per_separate_{part}"] = one["ms"] / three["ms"]
    return row


def conv_row(name: str, backend: str, clock: Clock) -> dict:
    """The causal convolution with SiLU, channels-last, against PyTorch's, channels-first, and against a copy."""
    length, channels = CONVOLUTIONS[name]
    x, weight, bias = (
        torch.randn(*s, device=clock.device) for s in ((1, length, channels), (channels, 4), (channels,))
    )
    first, target = x.transpose(1, 2).contiguous(), torch.empty_like(x)

    def theirs() -> Tensor:
        return F.silu(F.conv1d(first, weight[:, None], bias, padding=3, groups=channels)[..., :length])

    def ours() -> Tensor:
        return causal_conv1d(x, weight, bias, "silu", channels_last=True, backend=backend)

    if not (ours() - theirs().transpose(1, 2)).abs().max() <= 1e-5:
        raise SystemExit(f"the convolution differs from PyTorch's at {name}: nothing is timed")
    own, other, copy = clock.measure(ours), clock.measure(theirs), clock.measure(lambda: target.copy_(x))
    row = {"sequence": name, **own, "torch_ms": other["ms"], "copy_ms": copy["ms"]}
    return {**row, "torch_per_ours": other["ms"] / own["ms"], "ours_per_copy": own["ms"] / copy["ms"]}


def thread_rows(clock: Clock) -> list[dict]:
    """What a second thread gains.

    Columns ``kept``: again for outputs that malloc asks of the system at every call, with a malloc that keeps them.
    """
    shapes = {name: shape for name, shape in SHAPES.items() if 1e7 <= shape.updates <= 3e8}
    rows = {name: {"shape": name, **thread_times(shape, clock)} for name, shape in shapes.items()}
    if keep_memory():
        for name, shape in shapes.items():
            if 4 * shape.batch * shape.length * shape.channels >= 32 * 2**20:
                rows[name] |= {f"kept_{k}": v for k, v in thread_times(shape, clock).items()}
    for row in rows.values():
        print(_digest(row), flush=True)
    return list(rows.values())


def thread_times(shape: Shape, clock: Clock) -> dict[str, float]:
    """Times with one thread and with two, which take turns, so that other work meets both."""
    values, row, backend = inputs(shape), {}, get_backend("cpu")
    outcome = backend.scan_forward(*values, True, True)
    calls: dict[str, Callable[[], object]] = {
        "": lambda: backend.scan_forward(*values, True, False),
        "backward_": lambda: backend.scan_backward(*outcome, *values, True),
    }
    for part, call in calls.items():
        times: dict[int, list[float]] = {1: [], 2: []}
        end = time.perf_counter() + 2 * clock.seconds
        while len(times[2]) < 3 or time.perf_counter() < end:
            for threads in times:
                torch.set_num_threads(threads)
                times[threads].append(clock.once(call))
        torch.set_num_threads(1)
        one, two = min(times[1]), min(times[2])
        row |= {
            f"{part}one_ms": one,
            f"{part}two_ms": two,
            f"{part}calls": len(times[2]),
            f"{part}one_per_two": one / two,
        }
    return row


def keep_memory() -> bool:
    """Make malloc keep all memory for later calls from now on, as other allocators do.

    Returns False where it cannot be told.
    """
    no_mappings, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of glibc
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return False
    return bool(mallopt(no_mappings, 0) and mallopt(trim_threshold, 2**31 - 1))


def call_rows(clock: Clock) -> list[dict]:
    """Microseconds of the smallest calls, where the way through Python and PyTorch is all that is seen.

    ``kernel_us`` is the C library alone; the layer norm is the same kind of call to an operator of PyTorch.
    """
    sequence, matrix = torch.randn(1, 4, 16), torch.randn(1, 4, 1, 16)
    area, areas, matrices = torch.randn(1, 2, 2, 16), torch.randn(1, 2, 2, 4, 16), torch.randn(1, 2, 2, 4, 16)
    scan_values = (sequence, sequence, -torch.rand(16, 16), matrix, matrix, torch.randn(16), sequence, torch.randn(16))
    map_values = (area, areas, -torch.rand(4, 16, 16), matrices, matrices, torch.randn(4, 16), torch.randn(4, 16))
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "selective_scan": (lambda *t: selective_scan(*t, True, channels_last=True), scan_values),
        "ss2d_scan": (ss2d_scan, map_values),
        "causal_conv1d": (
            lambda *t: causal_conv1d(*t, "silu", channels_last=True),
            (sequence, torch.randn(16, 4), torch.randn(16)),
        ),
        "layer_norm": (lambda x, w, b: F.layer_norm(x, (16,), w, b), (sequence, torch.randn(16), torch.randn(16))),
    }
    rows, repeat = [], 5  # few, so that some measurement falls between two interruptions

    def microseconds(function: Callable[[], object]) -> float:
        def many() -> None:
            for _ in range(repeat):
                function()

        return 1e3 * clock.measure(many)["ms"] / repeat

    library = cpu_library.load()
    for name, (call, values) in calls.items():
        row: dict = {"operator": name}
        jobs: list = []
        original = library.call
        library.call = lambda *a, original=original, jobs=jobs: (jobs.append(a), original(*a))[1]  # type: ignore[method-assign]
        kept = call(*values)  # the jobs hold addresses of its arrays
        library.call = original  # type: ignore[method-assign]
        if jobs:
            row["kernel_us"] = microseconds(lambda jobs=jobs: library.call(*jobs[0]))
        row["inference_us"] = microseconds(lambda call=call, values=values: call(*values))
        row["training_us"] = microseconds(with_backward(call, list(values)))
        rows.append(row)
        print(row, flush=True)
        del kept
    for row in rows:
        for part in ("inference", "training"):
            row[f"{part}_per_layer_norm"] = row[f"{part}_us"] / rows[-1][f"{part}_us"]
    return rows


def gpu_limits(clock: Clock) -> dict[str, float]:
    """Rates of the whole device, from a Triton kernel that does nothing but state updates in registers."""
    import triton
    import triton.language as tl

    global gpu_probe_kernel

    @triton.jit
    def gpu_probe_kernel(out, rounds, WIDTH: tl.constexpr):
        lane = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        h = lane.to(tl.float32) * 1e-9
        step = h
        for _ in range(rounds):
            h = tl.exp2(step) * h + 1e-3
            step = h * -1e-6
        tl.store(out + lane, h)

    width, rounds = 1024, _PROBE_ROUNDS
    programs = 8 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * width, device=clock.device)
    best = clock.measure(lambda: gpu_probe_kernel[(programs,)](out, rounds, WIDTH=width, num_warps=4))["ms"]
    return {"update_g_per_s": programs * width * rounds / best / 1e6, **copy_bandwidth(clock)}


def gpu_rivals() -> dict[str, Callable]:
    """Kernels of others that can be imported here; they copy our layout into theirs, as a network would have to."""
    rivals: dict[str, Callable] = {}
    try:
        mamba_ssm = get_backend("mamba_ssm")
        if mamba_ssm.availability().ok:

            def scan(u, delta, A, B, C, D, z, bias):
                return selective_scan(u, delta, A, B, C, D, z, bias, True, channels_last=True, backend="mamba_ssm")

            rivals["mamba_ssm"] = scan
    except BackendError as error:
        print(f"mamba-ssm is left out: {error}", file=sys.stderr)
    try:
        oflex = importlib.import_module("selective_scan_cuda_oflex")
    except (ImportError, OSError) as error:
        print(f"VMamba's kernel is left out: {error}", file=sys.stderr)
        return rivals

    class Oflex(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D, bias):
            y, kept, *_ = oflex.fwd(u, delta, A, B, C, D, bias, True, 1, True)
            ctx.save_for_backward(u, delta, A, B, C, D, bias, kept)
            return y

        @staticmethod
        def backward(ctx, grad):
            u, delta, A, B, C, D, bias, kept = ctx.saved_tensors
            return tuple(oflex.bwd(u, delta, A, B, C, D, bias, grad.contiguous(), kept, True, 1))[:7]

    def vmamba(u, delta, A, B, C, D, z, bias):
        u, delta = (t.transpose(1, 2).contiguous() for t in (u, delta))
        B, C = (m.permute(0, 2, 3, 1).contiguous() for m in (B, C))
        y = Oflex.apply(u, delta, A, B, C, D, bias).transpose(1, 2)
        return y if z is None else y * F.silu(z)

    rivals["vmamba"] = vmamba
    return rivals


def cpu_tables(arguments: argparse.Namespace) -> dict:
    library = cpu_library.load()
    clock = Clock("cpu", arguments.seconds)
    best = list(library.variants)[-1]
    variants = arguments.variants or list(library.variants)
    loops: dict[str, Callable] = {"loop": published_loop, "lean_loop": lean_loop}
    if (reference := mamba_ssm_reference()) is not None:
        loops["mamba_ssm_loop"] = reference
    tables: dict = {"cpu limits": [], "cpu scan": []}
    for variant in variants:
        with use_variant(variant):
            limit = cpu_limits(variant, clock)
            tables["cpu limits"].append({"variant": variant, **limit})
            for name in SHAPES if "scan" in arguments.tables else ():
                row = scan_row(name, get_backend("cpu"), clock, limit, {}, loops if variant == best else {})
                tables["cpu scan"].append({"variant": variant, **row})
                print(variant, _digest(row), flush=True)
    if "ss2d" in arguments.tables:
        tables["cpu ss2d"] = [map_row(name, get_backend("cpu"), clock) for name in MAPS]
    if "conv" in arguments.tables:
        tables["cpu conv"] = [conv_row(name, "cpu", clock) for name in CONVOLUTIONS]
    if "calls" in arguments.tables:
        tables["cpu calls"] = call_rows(clock)
    if "threads" in arguments.tables:
        tables["cpu threads"] = thread_rows(clock)
    return tables


def gpu_tables(arguments: argparse.Namespace) -> dict:
    clock, backend = Clock("cuda", arguments.seconds), get_backend("triton")
    availability = backend.availability()
    if not availability.ok:
        raise SystemExit(f"backend 'triton' is not available: {availability.reason}")
    rivals, limit = gpu_rivals(), gpu_limits(clock)
    tables: dict = {"cuda limits": [limit], "cuda scan": []}
    for name in SHAPES if "scan" in arguments.tables else ():
        row = scan_row(name, backend, clock, limit, rivals, {})
        tables["cuda scan"].append(row)
        print(_digest(row), flush=True)
    if "ss2d" in arguments.tables:
        tables["cuda ss2d"] = [map_row(name, backend, clock) for name in MAPS]
    if "conv" in arguments.tables:
        tables["cuda conv"] = [conv_row(name, "triton", clock) for name in CONVOLUTIONS]
    return tables


def _digest(row: dict) -> str:
    numbers = ", ".join(f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, float))
    return f"{row['shape']}: {numbers}"


def table(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(k for row in rows for k in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    for row in rows:
        cells = (row.get(k, "") for k in keys)
        lines.append("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def machine() -> dict[str, str]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    versions = {"monai-mamba": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "mamba-ssm"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"cpu": found[1] if found else platform.processor(), "gpu": gpu, **versions}


def merge(earlier: list[dict], later: list[dict]) -> list[dict]:
    """Rows of both, those of the later part where both have one of the same name."""

    def name(row: dict) -> tuple:
        return tuple(row.get(k) for k in ("variant", "shape", "map", "sequence", "operator"))

    fresh = {name(row): row for row in later}
    kept = [fresh.pop(name(row), row) for row in earlier]
    return [*kept, *fresh.values()]


def write(output: Path, result: dict) -> None:
    """Write JSON and Markdown, together with what an earlier part found on the same machine."""
    path = output.with_suffix(".json")
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier.get("machine") == result["machine"]:
            names = dict.fromkeys([*earlier["tables"], *result["tables"]])
            tables = {n: merge(earlier["tables"].get(n, []), result["tables"].get(n, [])) for n in names}
            result = {**result, "tables": tables, "commands": [*earlier["commands"], *result["commands"]]}
    output.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    head = [f"- {k}: {v}" for k, v in result["machine"].items()] + [f"- command: `{c}`" for c in result["commands"]]
    body = "\n\n".join(f"## {name}\n\n{table(rows)}" for name, rows in result["tables"].items() if rows)
    output.with_suffix(".md").write_text("# Scan benchmark\n\n" + "\n".join(head) + f"\n\n{body}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="name of the results without ending")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure; the loops run three times")
    parser.add_argument("--device", choices=["cpu", "cuda"], nargs="*", help="default: all there are")
    parser.add_argument("--variants", nargs="*", help="instruction sets of the C library; default: all that run here")
    parser.add_argument("--tables", nargs="*", default=["scan", "ss2d", "conv", "calls", "threads"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    # From now on glibc keeps blocks of this size instead of returning them after every call, as in a running network;
    # otherwise the page faults of fresh memory are timed.
    block = torch.empty(31 * 2**20, dtype=torch.uint8)
    del block
    devices = arguments.device or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    result: dict = {"machine": machine(), "commands": [" ".join(["python", *sys.argv])], "tables": {}}
    if "cpu" in devices:
        result["tables"] |= cpu_tables(arguments)
    if "cuda" in devices:
        result["tables"] |= gpu_tables(arguments)
    write(arguments.output, {**result, "tables": {k: v for k, v in result["tables"].items() if v}})


if __name__ == "__main__":
    main()
