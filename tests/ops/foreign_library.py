"""The C library on a machine that is emulated; a helper of ``test_cross_compile.py``.

:class:`ForeignLibrary` takes the place of :class:`monai_mamba.ops.cpu_library.Library` and sends every job with its
arrays to the program ``foreign_library.c``, which runs under an emulator beside the library compiled for it. As a
plugin of pytest (``-p foreign_library``; the variable ``FOREIGN_LIBRARY`` has the command in JSON) it makes the tests
of the operators run with that library, unchanged.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from monai_mamba.ops import cpu_build, cpu_library
from monai_mamba.ops.cpu_library import ConvJob, Library, LibraryError, ScanJob, View

COMMAND_VARIABLE = "FOREIGN_LIBRARY"
_FUNCTIONS = ("scan_forward", "scan_backward", "conv_forward", "conv_backward")


class ForeignLibrary(Library):
    """The library in another process.

    Args:
        command: emulator, program and library.

    Raises:
        LibraryError: if it is not of these sources.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.path = Path(command[-1])
        self._lock = threading.Lock()
        self._default = None
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._write(struct.pack("5q", 0, 0, 0, 0, 0))
        *sizes, count = struct.unpack("4q", self._read(32))
        expected = [cpu_library._ABI, ctypes.sizeof(ScanJob), ctypes.sizeof(ConvJob)]
        if self._text() != cpu_build.source_hash() or sizes != expected:
            raise LibraryError(f"{self.path} was compiled from other sources")
        names = [self._text() for _ in range(count)]
        self.variants = {name: index for index, name in enumerate(names) if name}

    def call(self, name: str, job: bytes, variant: int, threads: int) -> None:
        kind = ScanJob if name.startswith("scan") else ConvJob
        arrays = list(arrays_of(kind.from_buffer_copy(job)))
        request = [struct.pack("5q", 1 + _FUNCTIONS.index(name), variant, threads, len(job), len(arrays)), job]
        for _, offset, address, size in arrays:
            request += [struct.pack("3q", offset, address, size), ctypes.string_at(address, size)]
        with self._lock:
            self._write(b"".join(request))
            (status,) = struct.unpack("q", self._read(8))
            results = [self._read(size) for _, _, _, size in arrays]
        if status:
            raise LibraryError(f"status {status}")
        written = ("y", "states") if name.endswith("forward") else ("grad_",)
        for (field, _, address, size), result in zip(arrays, results, strict=True):
            if field.startswith(written) and field != "grad_y":
                ctypes.memmove(address, result, size)

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise LibraryError(f"the emulated process has ended with exit code {self._process.wait()}")
        return data

    def _text(self) -> str:
        return self._read(*struct.unpack("q", self._read(8))).decode()


def arrays_of(job: ScanJob | ConvJob) -> Iterator[tuple[str, int, int, int]]:
    """Yield field, place of the pointer in the job, address and bytes of every array."""
    rows, length = job.channels, job.batch * job.length
    if isinstance(job, ScanJob):
        groups, states = job.groups, job.d_state
        rows *= groups
        sizes = dict.fromkeys(("D", "delta_bias", "grad_D", "grad_delta_bias"), rows)
        sizes |= dict.fromkeys(("A", "grad_A"), rows * states)
        sizes |= dict.fromkeys(("grad_B", "grad_C"), length * groups * states)
        sizes["states"] = job.batch * (-(-job.length // 64) - 1) * rows * states
    else:
        groups, states = 1, 0
        sizes = {"bias": rows, "grad_bias": rows, "weight": rows * job.taps, "grad_weight": rows * job.taps}
    for name, _ in job._fields_:
        value, offset = getattr(job, name), getattr(type(job), name).offset
        if isinstance(value, View) and value.data:
            last = states if name in ("B", "C") else job.channels
            elements = (job.batch - 1) * value.batch + (job.length - 1) * value.step + (groups - 1) * value.group + last
            yield name, offset, value.data, elements * (4 if value.dtype == cpu_library.FLOAT32 else 2)
        elif name in sizes and value:
            yield name, offset, value, sizes[name] * 4


def pytest_configure() -> None:
    cpu_library._loaded = ForeignLibrary(json.loads(os.environ[COMMAND_VARIABLE]))
