"""Call the C library with random jobs, good and bad; a helper of ``test_cpu_library.py`` run in its own process.

Usage: fuzz_cpu_library.py LIBRARY COUNT SEED. Runs under the address and undefined-behavior sanitizers, so it uses the
standard library and exactly sized ctypes arrays only: a read or write next to one of them ends the process.
"""

from __future__ import annotations

import ctypes
import random
import sys
from pathlib import Path

from monai_mamba.ops.cpu_library import MAX_ROUTES, ConvJob, Library, LibraryError, ScanJob, View

_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)
_libc.free.argtypes = (ctypes.c_void_p,)


class Arena:
    """Arrays straight from malloc, which the sanitizer surrounds with poisoned memory."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.pointers: list[int] = []

    def array(self, count: int, dtype: int = 0) -> int:
        size = count * (4 if dtype == 0 else 2)
        pointer = _libc.malloc(max(size, 1))
        self.pointers.append(pointer)
        # Any bytes are valid input: NaN, infinity and subnormal numbers included.
        ctypes.memmove(pointer, self.rng.randbytes(size), size)
        return pointer

    def free(self) -> None:
        for pointer in self.pointers:
            _libc.free(pointer)


def view(arena: Arena, batch: int, steps: int, groups: int, last: int, shared: bool = False) -> View:
    """An array ``(batch, steps, groups, last)``, dense, with gaps, or with the axes in another order."""
    rng = arena.rng
    dtype = rng.choice((0, 0, 1, 2))
    groups_there = 1 if shared else groups
    group = last + rng.choice((0, 0, 3))
    step = group * groups_there + rng.choice((0, 0, 5))
    stride_batch = step * steps + rng.choice((0, 0, 7))
    if rng.random() < 0.2 and steps:  # steps outermost
        stride_batch = group * groups_there
        step = stride_batch * batch
    count = (batch - 1) * stride_batch + (steps - 1) * step + (groups_there - 1) * group + last
    return View(arena.array(count, dtype), stride_batch, step, 0 if shared else group, dtype)


def scan_job(arena: Arena) -> ScanJob:
    rng = arena.rng
    job = ScanJob()
    job.merge = rng.random() < 0.5
    job.height, job.width = rng.choice((1, 1, 2, 3, 9)), rng.choice((1, 2, 5, 8, 30))
    job.batch, job.length = rng.choice((1, 1, 2)), job.height * job.width
    job.groups = rng.choice((1, 2, 4))
    job.channels, job.d_state = rng.choice((1, 3, 15, 16, 17, 33, 100)), rng.choice((1, 1, 2, 4, 5, 8, 16, 16, 31))
    if rng.random() < 0.01:
        job.d_state = 256
    if rng.random() < 0.06:  # enough work for several threads, which add up in stages
        job.batch, job.height, job.width = rng.choice((1, 2, 9)), rng.choice((1, 9)), rng.choice((64, 65, 100))
        job.channels, job.d_state, job.length = rng.choice((100, 130)), rng.choice((8, 16, 31)), job.height * job.width
    job.softplus = rng.random() < 0.7
    for k in range(MAX_ROUTES):
        job.routes[k] = rng.randrange(4) if job.merge else 0
    b, steps, groups, channels, states = job.batch, job.length, job.groups, job.channels, job.d_state
    shared = bool(job.merge)
    for name in ("u", "y", "grad_y", "grad_u"):
        setattr(job, name, view(arena, b, steps, groups, channels, shared))
    for name in ("delta", "grad_delta"):
        setattr(job, name, view(arena, b, steps, groups, channels))
    for name in ("B", "C"):
        setattr(job, name, view(arena, b, steps, groups, states))
    if not shared and rng.random() < 0.5:
        job.z, job.grad_z = (view(arena, b, steps, groups, channels) for _ in range(2))
    rows = groups * channels
    job.A, job.grad_A = arena.array(rows * states), arena.array(rows * states)
    for name in ("D", "delta_bias"):
        if rng.random() < 0.6:
            setattr(job, name, arena.array(rows))
            setattr(job, "grad_" + name, arena.array(rows))
    job.grad_B, job.grad_C = (arena.array(b * steps * groups * states) for _ in range(2))
    job.states = arena.array(b * (-(-steps // 64) - 1) * rows * states)
    return job


def conv_job(arena: Arena) -> ConvJob:
    rng = arena.rng
    job = ConvJob()
    job.batch, job.length = rng.choice((1, 2, 3)), rng.choice((1, 2, 63, 64, 65, 256, 257, 300))
    job.channels, job.taps = rng.choice((1, 7, 8, 16, 17, 40)), rng.choice((1, 2, 3, 4, 4, 5, 64))
    job.silu = rng.random() < 0.5
    for name in ("x", "y", "grad_y", "grad_x"):
        setattr(job, name, view(arena, job.batch, job.length, 1, job.channels))
    job.weight, job.grad_weight = (arena.array(job.channels * job.taps) for _ in range(2))
    if rng.random() < 0.5:
        job.bias, job.grad_bias = arena.array(job.channels), arena.array(job.channels)
    return job


#: Changes that must be refused whatever else the job says.
_SPOIL = {
    ScanJob: (
        "batch",
        "length",
        "groups",
        "channels",
        "d_state",
        "A",
        "u",
        "delta",
        "B",
        "C",
        "dtype",
        "route",
        "huge",
    ),
    ConvJob: ("batch", "length", "channels", "taps", "weight", "x", "dtype", "huge"),
}


def spoil(job: ScanJob | ConvJob, rng: random.Random) -> None:
    what = rng.choice(_SPOIL[type(job)])
    main = job.u if isinstance(job, ScanJob) else job.x
    if what == "dtype":
        main.dtype = rng.choice((-1, 3, 1 << 40))
    elif what == "route":
        job.routes[0] = rng.choice((-1, 4, 1 << 33))
    elif what == "huge":
        job.batch = job.length = job.channels = rng.choice((1 << 31, 1 << 62))
    elif what in ("A", "weight"):
        setattr(job, what, None)
    elif what in ("u", "delta", "B", "C", "x"):
        getattr(job, what).data = None
    else:
        limit = {"d_state": 257, "taps": 65}.get(what, 0)
        setattr(job, what, rng.choice((0, -1, -(1 << 62), limit)))


def main() -> None:
    library, count, seed = Library(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    refused = 0
    for _ in range(count):
        arena = Arena(rng)
        kind = rng.choice(("scan", "scan", "conv"))
        job = scan_job(arena) if kind == "scan" else conv_job(arena)
        bad = rng.random() < 0.2
        if bad:
            spoil(job, rng)
        variant, threads = rng.choice(list(library.variants.values())), rng.choice((1, 1, 2, 5))
        # The backward pass reads what the forward pass has left in `states`.
        for name in ("forward", "backward"):
            try:
                library.call(f"{kind}_{name}", bytes(job), variant, threads)
                assert not bad, "a spoiled job was accepted"
            except LibraryError:
                assert bad, "a good job was refused"
                refused += 1
        arena.free()
    print(f"done {count} refused {refused // 2}")


if __name__ == "__main__":
    main()
