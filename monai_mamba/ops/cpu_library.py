"""Find, build and call the C library of the backend ``cpu``. Knows neither PyTorch nor NumPy."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import stat
import struct
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from monai_mamba.ops import cpu_build

#: Folder for the library compiled on first use; default `monai-mamba` in the user's cache folder.
CACHE_VARIABLE = "MONAI_MAMBA_CACHE"
#: Instruction set to use instead of the best one: baseline, avx2, avx512.
VARIANT_VARIABLE = "MONAI_MAMBA_CPU_VARIANT"

MAX_STATE = 256
MAX_ROUTES = 16
MAX_TAPS = 64
FLOAT32, BFLOAT16, FLOAT16 = range(3)
ROUTE_CODES = {"row": 0, "column": 1, "row_reversed": 2, "column_reversed": 3}

_ABI = 2
_STATUS = {
    1: "the C library refused the job (sizes, types or missing arrays)",
    2: "not enough memory for the work space of the scan",
    3: "the instruction set asked for is not available",
}
_logger = logging.getLogger(__name__)


class LibraryError(Exception):
    """The library is not there and cannot be made, or refused a call; the text says why."""


class View(ctypes.Structure):
    """``mm_view``: an array ``(batch, step, group, channel or state)`` with a dense last axis."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class ScanJob(ctypes.Structure):
    """``mm_scan_job`` of ``csrc/scan.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "groups", "channels", "d_state", "height", "width")),
        ("softplus", ctypes.c_int64),
        ("merge", ctypes.c_int64),
        ("routes", ctypes.c_int64 * MAX_ROUTES),
        *((name, View) for name in ("u", "delta", "B", "C", "z", "y")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "delta_bias", "states")),
        *((name, View) for name in ("grad_y", "grad_u", "grad_delta", "grad_z")),
        *((name, ctypes.c_void_p) for name in ("grad_A", "grad_D", "grad_delta_bias", "grad_B", "grad_C")),
    )


class ConvJob(ctypes.Structure):
    """``mm_conv_job`` of ``csrc/scan.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "taps", "silu")),
        ("x", View),
        ("y", View),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("grad_y", View),
        ("grad_x", View),
        ("grad_weight", ctypes.c_void_p),
        ("grad_bias", ctypes.c_void_p),
    )


#: Jobs as the bytes that the library takes, out of their numbers in order: far cheaper than filling in the structures.
pack_scan_job = struct.Struct(f"{ctypes.sizeof(ScanJob) // 8}q").pack
pack_conv_job = struct.Struct(f"{ctypes.sizeof(ConvJob) // 8}q").pack


class Library:
    """The loaded library.

    Args:
        path: file to load; it must be compiled from the C sources of this package.

    Raises:
        LibraryError: if it cannot be loaded or belongs to another version.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._dll = ctypes.CDLL(str(path))
            self._dll.mm_source_hash.restype = ctypes.c_char_p
            found = self._dll.mm_source_hash().decode()
            sizes = [self._dll[name]() for name in ("mm_abi", "mm_scan_job_size", "mm_conv_job_size")]
        except (OSError, AttributeError) as error:
            raise LibraryError(f"{path} cannot be loaded: {error}") from error
        expected = [_ABI, ctypes.sizeof(ScanJob), ctypes.sizeof(ConvJob)]
        if found != cpu_build.source_hash() or sizes != expected:
            raise LibraryError(f"{path} was compiled from another version of the sources ({found})")
        self.path = path
        self._dll.mm_variant_name.restype = ctypes.c_char_p
        self._dll.mm_variant_name.argtypes = (ctypes.c_int64,)
        self._dll.mm_num_variants.restype = ctypes.c_int64
        self._dll.mm_probe.restype = ctypes.c_double
        self._dll.mm_probe.argtypes = (ctypes.c_int64,) * 3
        self._calls: dict[str, Callable[..., int]] = {}
        for name in ("scan_forward", "scan_backward", "conv_forward", "conv_backward"):
            function = self._dll["mm_" + name]
            function.argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64)
            function.restype = ctypes.c_int
            self._calls[name] = function
        #: Names and numbers of the instruction sets this machine can run, the best one last.
        self.variants: dict[str, int] = {}
        for index in range(self._dll.mm_num_variants()):
            name = self._dll.mm_variant_name(index)
            if name:
                self.variants[name.decode()] = index
        self._default: int | None = None

    def choose_variant(self, name: str = "") -> int:
        """Return the number of a variant: the named one, that of the environment variable, or the best.

        The environment variable counts as it is at the first scan.

        Raises:
            LibraryError: if this machine or this build does not have it.
        """
        if not name:
            if self._default is None:
                wanted = os.environ.get(VARIANT_VARIABLE, "")
                best = next(reversed(self.variants.values()))
                self._default = self._named(wanted, f"{VARIANT_VARIABLE}: ") if wanted else best
            return self._default
        return self._named(name)

    def _named(self, name: str, asked_by: str = "") -> int:
        try:
            return self.variants[name]
        except KeyError:
            raise LibraryError(
                f"{asked_by}the instruction set {name!r} is not available here; use one of: {', '.join(self.variants)}"
            ) from None

    def call(self, name: str, job: bytes, variant: int, threads: int) -> None:
        """Run a job without the interpreter lock.

        Args:
            name: ``"scan_forward"``, ``"scan_backward"``, ``"conv_forward"`` or ``"conv_backward"``.
            job: the bytes of a :class:`ScanJob` or :class:`ConvJob`.
            variant: number of the instruction set.
            threads: how many may work on it.

        Raises:
            MemoryError: if there is no room for the work space.
            LibraryError: if the job is refused.
        """
        status = self._calls[name](job, variant, threads)
        if status == 2:
            raise MemoryError(_STATUS[status])
        if status:
            raise LibraryError(_STATUS.get(status, f"status {status}"))

    def probe(self, variant: int, kind: int, rounds: int) -> float:
        """Run rounds of pure arithmetic (``probe`` in ``csrc/kernels.c``), to be timed by the caller."""
        return self._dll.mm_probe(variant, kind, rounds)


_lock = threading.Lock()
_loaded: Library | LibraryError | None = None


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # who held the lock, compiling for seconds, is not in the child
    os.register_at_fork(after_in_child=_renew_lock)


def load() -> Library:
    """Return the library: the one in the package, else from the cache, else compiled into the cache now.

    The outcome is kept for the life of the process.

    Raises:
        LibraryError: if none of the three works.
    """
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                try:
                    _loaded = _find_or_build()
                except LibraryError as error:
                    _loaded = error
    if isinstance(_loaded, LibraryError):
        raise _loaded
    return _loaded


def cache_folder() -> Path:
    """Return the folder for the compiled library."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "monai-mamba"


def _find_or_build() -> Library:
    packaged = Path(__file__).with_name(cpu_build.LIBRARY_NAME)
    reasons = []
    if packaged.exists():
        try:
            return Library(packaged)
        except LibraryError as error:
            _logger.warning("%s; trying to compile it again", error)
            reasons.append(f"{error}; ")
    try:
        folder = cache_folder()
    except RuntimeError as error:  # no home folder
        raise LibraryError(f"there is no cache folder ({error}); set {CACHE_VARIABLE}") from error
    stem, suffix = os.path.splitext(cpu_build.LIBRARY_NAME)
    stem = f"{stem}-{cpu_build.source_hash()}-{sys.platform}-{platform.machine()}-"
    try:
        found = sorted(folder.glob(f"{stem}*{suffix}"))
    except OSError as error:  # the home folder of another user, say
        raise LibraryError(f"cannot look into {folder}: {error.strerror}; set {CACHE_VARIABLE}") from error
    for cached in found:
        try:
            _require_private(cached)
            # Mapping a damaged library could end the process, so what is in the file must be what its name says.
            if cached.name != f"{stem}{_digest(cached)}{suffix}":
                raise LibraryError(f"{cached} is damaged")
            return Library(cached)
        except (LibraryError, OSError) as error:
            reasons.append(f"{error}; ")
    reason = "".join(reasons)
    if not cpu_build.is_allowed():
        raise LibraryError(
            f"{reason}the C library is not built and {cpu_build.BUILD_VARIABLE} forbids to compile it; unset it"
        )
    _logger.info("compiling the C library of the CPU scan into %s (once, about ten seconds)", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_private(folder)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as work:
            built = cpu_build.build(Path(work, cpu_build.LIBRARY_NAME))
            final = folder / f"{stem}{_digest(built)}{suffix}"
            try:
                os.replace(built, final)
            except PermissionError:  # Windows: another process has just made the same and is using it
                if not final.exists():
                    raise
        return Library(final)
    except OSError as error:
        raise LibraryError(f"{reason}cannot write to {folder}: {error.strerror}; set {CACHE_VARIABLE}") from error
    except cpu_build.BuildError as error:
        raise LibraryError(f"{reason}{error}") from error


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _require_private(path: Path) -> None:
    """Refuse to load code that somebody else could have put there."""
    if os.name != "posix":
        return
    info = path.stat()
    if info.st_uid not in (os.getuid(), 0):
        raise LibraryError(
            f"{path} belongs to another user and is not loaded; set {CACHE_VARIABLE} to a private folder"
        )
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise LibraryError(f"{path} can be written by others and is not loaded; remove that right (chmod go-w)")
