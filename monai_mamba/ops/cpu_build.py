"""Compile the C library of the backend ``cpu``.

Standard library only and imported by its path from ``hatch_build.py``, so that a wheel can be built where neither
PyTorch nor this package is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).with_name("csrc")
LIBRARY_NAME = "libmonai_mamba_ops" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

#: Set to 0 to keep the package from ever calling a compiler.
BUILD_VARIABLE = "MONAI_MAMBA_BUILD"

#: The oldest macOS that PyTorch runs on.
MACOS_VERSION = "11.0"

_TIMEOUT = 300  # seconds for one compiler call; a loaded machine needs about ten
# Added to the variant that every processor of the architecture can run.
_VARIANT_FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ),
}
# No -ffast-math: NaN and infinity must come through, and the rounding trick of exp2_ must not be "simplified".
_FLAGS = (
    *("-std=gnu11", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=fast", "-Wno-psabi"),
)
# Without tables for unwinding GCC aligns the stack for vectors of 32 and 64 bytes on Windows too (its bug 54412).
_SYSTEM_FLAGS = {
    "win32": ("-fno-asynchronous-unwind-tables",),
    "darwin": ("-fPIC", f"-mmacosx-version-min={MACOS_VERSION}"),
}
# Compilers of some distributions make code for newer processors unless told, and zig for the one it runs on.
_MACHINE_FLAGS = {"x86_64": ("-march=x86-64",)}
_ZIG_FLAGS = ("-mcpu=baseline",)
_LINK_FLAGS = {"win32": ("-shared",)}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "powerpc64le": "ppc64le"}


class BuildError(Exception):
    """The library could not be compiled; the text says why in one line."""


def source_hash() -> str:
    """Return the fingerprint of the C sources, which the library carries too."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def is_allowed() -> bool:
    """Tell whether the user lets the package call a compiler."""
    return os.environ.get(BUILD_VARIABLE, "1").strip().lower() not in ("0", "false", "no", "off")


class Target(NamedTuple):
    """What code is made for: ``system`` in the words of ``sys.platform``, ``machine`` in those of Linux."""

    system: str
    machine: str


def host() -> Target:
    """Return what this Python runs on."""
    # Windows runs programs for x86-64 on ARM too, where `platform` tells of the processor.
    name = sysconfig.get_platform().removeprefix("win-") if sys.platform == "win32" else platform.machine()
    return Target(sys.platform, _machine(name))


def find_compiler() -> tuple[str, ...] | None:
    """Return the command of the C compiler: ``CC``, else the first of cc, gcc, clang and the package ziglang.

    ``CC`` is a program or a command with arguments; if it names none that is there, no other is taken.
    """
    chosen = os.environ.get("CC", "").strip()
    if chosen:
        whole = shutil.which(chosen)
        try:
            name, *arguments = [whole] if whole else shlex.split(chosen, posix=os.name == "posix")
        except ValueError:  # a quotation without an end
            return None
        path = shutil.which(name)
        return (path, *arguments) if path else None
    for name in ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path:
            return (path,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "cc")
    return None


def target_of(compiler: Sequence[str]) -> Target:
    """Ask a compiler what it makes code for.

    Raises:
        BuildError: if it does not answer like GCC and Clang do.
    """
    command = " ".join(compiler)
    if Path(compiler[0]).stem.lower() in ("cl", "clang-cl"):
        raise BuildError(f"{command} cannot compile the C library, which needs GCC or Clang (gcc, clang); set CC")
    run = subprocess.run(
        [*compiler, "-dumpmachine"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_TIMEOUT,
    )
    triple = run.stdout.strip().lower()
    if run.returncode or "-" not in triple:
        reason = _first_error(run.stderr, run.returncode)
        raise BuildError(f"{command} -dumpmachine failed: {reason}; set CC to a GCC or Clang that works")
    machine, _, rest = triple.partition("-")
    systems = {"mingw": "win32", "windows": "win32", "cygwin": "cygwin", "msys": "cygwin", "linux": "linux"}
    systems |= {"darwin": "darwin", "macos": "darwin"}
    return Target(next((system for word, system in systems.items() if word in rest), sys.platform), _machine(machine))


def build(
    file: Path,
    *,
    extra_flags: Sequence[str] = (),
    variants: Sequence[str] | None = None,
    target: Target | None = None,
) -> Path:
    """Compile the library to ``file``, which appears whole or not at all.

    Args:
        file: file to write; its folder must exist.
        extra_flags: added to every compiler call, for sanitizer builds.
        variants: instruction sets beside the baseline; default all of the architecture. One that the compiler does
            not know is left out.
        target: what the compiler must make code for; default what this Python runs on.

    Raises:
        BuildError: if there is no compiler, or it makes code for something else, or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(_no_compiler())
    command = " ".join(compiler)
    try:
        found, wanted = target_of(compiler), target or host()
        if found != wanted:
            raise BuildError(
                f"{command} makes code for {' '.join(found)}, needed is {' '.join(wanted)}; set CC to one for that"
            )
        if variants is None:
            variants = tuple(_VARIANT_FLAGS) if wanted.machine == "x86_64" else ()
        with tempfile.TemporaryDirectory(prefix=".build-", dir=file.parent) as folder:
            work = Path(folder)
            flags = (
                *(*_FLAGS, *_SYSTEM_FLAGS.get(wanted.system, ("-fPIC",))),
                *(_ZIG_FLAGS if _is_zig(compiler) else _MACHINE_FLAGS.get(wanted.machine, ())),
                *(*extra_flags, f'-DMM_SOURCE_HASH="{source_hash()}"'),
            )
            runs = {
                name: _start(compiler, "kernels.c", work / f"{name}.o", (*flags, f"-DMM_VARIANT={name}", *more))
                for name, more in (("baseline", ()), *((v, _VARIANT_FLAGS[v]) for v in variants))
            }
            errors = {name: _finish(run) for name, run in runs.items()}
            if errors["baseline"]:
                raise BuildError(f"{command} failed: {errors['baseline']}; set CC to another compiler")
            compiled = [name for name, error in errors.items() if not error]
            have = tuple(f"-DMM_HAVE_{name.upper()}" for name in compiled if name != "baseline")
            objects = [str(work / f"{name}.o") for name in compiled]
            linked = work / file.name
            more_link = (*_LINK_FLAGS.get(wanted.system, ("-shared", "-pthread")), *have, *objects)
            error = _finish(_start(compiler, "library.c", linked, (*flags, *more_link), link=True))
            if error:
                raise BuildError(f"{command} failed to link: {error}; set CC to another compiler")
            with open(linked, "r+b") as whole:  # Windows brings to the disk only what may be written
                os.fsync(whole.fileno())
            os.replace(linked, file)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command} gave no answer within {_TIMEOUT} s") from error
    except OSError as error:
        raise BuildError(f"cannot build in {file.parent}: {error}") from error
    return file


def _machine(name: str) -> str:
    return _MACHINES.get(name.lower(), name.lower())


def _is_zig(compiler: Sequence[str]) -> bool:
    return Path(compiler[0]).stem == "zig" or "ziglang" in compiler


def _no_compiler() -> str:
    if os.environ.get("CC", "").strip():
        return f"no C compiler found: CC is {os.environ['CC']!r}, which is not there; correct or unset it"
    cure = {
        "win32": "MinGW-w64 or Clang on the PATH, or `pip install ziglang` (Visual C++ cannot compile the library)",
        "darwin": "`xcode-select --install`",
    }
    return (
        "no C compiler found (looked for cc, gcc, clang and the package ziglang); "
        f"install one: {cure.get(sys.platform, 'the package gcc of the system, or `pip install ziglang`')}"
    )


class _Run(NamedTuple):
    """A compiler at work. It writes to a file: a pipe would stay open as long as a program that it has started."""

    process: subprocess.Popen[bytes]
    messages: Path
    deadline: float


def _start(compiler: Sequence[str], source: str, output: Path, flags: Sequence[str], *, link: bool = False) -> _Run:
    messages = output.with_suffix(".txt")
    with open(messages, "wb") as stderr:
        process = subprocess.Popen(
            [*compiler, str(SOURCES / source), *flags, *(() if link else ("-c",)), "-o", str(output)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    return _Run(process, messages, time.monotonic() + _TIMEOUT)


def _finish(run: _Run) -> str:
    """Wait for a compiler; return its first error line, or an empty text."""
    try:
        code = run.process.wait(max(0.0, run.deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        run.process.kill()
        run.process.wait()
        return f"no answer within {_TIMEOUT} s"
    return _first_error(run.messages.read_text(errors="replace"), code) if code else ""


def _first_error(stderr: str, returncode: int) -> str:
    lines = stderr.splitlines()
    # That the linker has failed is said after the reason, which is not called an error.
    errors = [line for line in lines if "error" in line.lower() and " exit " not in line]
    return (errors or lines or [f"exit code {returncode}"])[0].strip()
